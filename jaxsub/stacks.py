"""The models of one layer as one array, as decompositions take them.

A stack is whole on its devices: on one, or on several with its features or its models (`linalg.dealt`) shared among
them. Collections whose layers do not fit are read block by block into `statistics`; that way leads to a Gram matrix,
not here.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxsub import errors, precision, spectrum
from jaxsub.linalg import centring, dealt, gram as kernels


@dataclasses.dataclass(frozen=True)
class DenseStack:
    """N models of one layer.

    Attributes:
        x: (N, *shape) of any float dtype; where models are dealt to devices, (N', *shape) with others among them.
        name, model_ids: for messages.
        present: (N',) bool, which of these are the models; None: all.
        host: the first N of `x` on the host, where models are dealt.
    """

    x: jax.Array
    name: str = ""
    model_ids: tuple[str, ...] = ()
    present: np.ndarray | None = None
    host: np.ndarray | None = None

    @classmethod
    def create(cls, x, name="", model_ids=(), host=None):
        """A checked stack.

        Args:
            x: (N, *shape); or dealt to devices, with models that are none behind the last.
            name: of the layer.
            model_ids: N names.
            host: (N, *shape), the models of a dealt stack on the host.

        Raises:
            InputError: NaN or Inf, naming the layer and the first such model.
            ConfigError: fewer than two models, no weights, or not floating point.
        """
        x = jnp.asarray(x)
        number = len(x) if host is None else len(host)
        if x.ndim < 2 or number < 2 or not x.size:
            raise errors.ConfigError(f"a stack of shape {x.shape}: expected (N, ...) with at least two models")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise errors.ConfigError(f"a stack of dtype {x.dtype}: expected floating point")
        finite = np.asarray(centring.finite(x))
        if not finite.all():
            n = int(np.flatnonzero(~finite)[0])
            label = model_ids[n] if model_ids else f"model {n}"
            raise errors.InputError(label, "holds NaN or Inf", key=name or None, rule="N1")
        if dealt.mesh_of(x) is None:
            return cls(x, name, tuple(model_ids))
        return cls(x, name, tuple(model_ids), np.arange(len(x)) < number, host)

    @property
    def num_models(self):
        """N."""
        return self.x.shape[0] if self.present is None else int(self.present.sum())

    @property
    def shape(self):
        """Shape of one model's weights."""
        return self.x.shape[1:]

    @property
    def num_features(self):
        """D, product of `shape`."""
        return math.prod(self.shape)

    def take(self, models):
        """The stack of some of its models, given by their positions; none moves to another device."""
        if self.present is None:
            return DenseStack(self.x[np.asarray(models)], self.name)
        present = np.zeros_like(self.present)
        present[np.flatnonzero(self.present)[models]] = True
        return dataclasses.replace(self, model_ids=(), present=present)

    def centred(self, by="models", axis=None, *, as_rows=False):
        """The models, float32 or wider, minus a mean, and that mean in a shape that broadcasts to `shape`.

        Where models are dealt the mean comes from the host: devices would exchange sums as large as a model. Means of
        columns are few numbers, which they add up.

        Args:
            by: "models" subtracts the mean model, "columns" one mean for each entry of weight axis `axis`, "none"
                nothing.
            axis: of "columns".
            as_rows: (N, D) and (D,), of "models".

        Returns:
            As `x`; models that are none are zeros.
        """
        present, given, meshes = self._dealt(by)
        y, mean = centring.centred(self.x, present, self.num_models, given, by=by, axis=axis, as_rows=as_rows, **meshes)
        return y, mean if meshes["mesh"] is None else jnp.asarray(np.asarray(mean))

    def _dealt(self, by="models"):
        """(present, mean from the host, meshes) as `linalg.centring` takes them."""
        mesh, given = dealt.mesh_of(self.x), None
        present = np.ones(len(self.x), bool) if self.present is None else self.present
        if mesh is not None and by == "models":
            given = centring.host_mean(self.host, np.flatnonzero(present))
        return present, given, {"mesh": mesh, "shared": dealt.mesh_of(self.x, 1)}

    def rows(self):
        """The models as rows (N, D), minus the mean model, and that (D,)."""
        return self.centred(as_rows=True)

    @functools.cached_property
    def gram(self):
        """(N, N) float64 Gram matrix of the centred models, on the host, made once; not where models are dealt.

        Products in `precision.compute_dtype` of the stored dtype; zeros where all models are equal.
        """
        dtype = precision.compute_dtype(str(self.x.dtype), self.num_models**2 * self.num_features)
        mesh = dealt.mesh_of(self.x, 1) or dealt.mesh_of_one(self.x)
        none = np.zeros((0, self.num_models), np.float32)
        with jax.enable_x64(True):
            sums, _ = kernels.dense_gram(self.x, none, mesh=mesh, dtype=dtype)
        return spectrum.unless_equal(spectrum.centred(np.asarray(sums.gram)), float(sums.mean_square), dtype)

    def centred_energy(self):
        """Sum of the squared distances of the models to their mean."""
        present, given, meshes = self._dealt()
        return float(centring.energy(self.x, present, given, **meshes))


@dataclasses.dataclass(frozen=True)
class LoraStack:
    """N low-rank updates of one layer, W_n = scales_n b_n a_n, kept as their factors.

    Attributes:
        a: (N, r, i) float32 or float64; mixed ranks padded with zero rows. Where models are dealt to devices, updates
            of zero may stand behind the last, in all three.
        b: (N, o, r).
        scales: (N,) float64.
        name, model_ids: for messages.
        count: N where there are; 0: all.
    """

    a: jax.Array
    b: jax.Array
    scales: np.ndarray
    name: str = ""
    model_ids: tuple[str, ...] = ()
    count: int = 0

    @property
    def num_models(self):
        """N."""
        return self.count or self.a.shape[0]

    @property
    def shape(self):
        """(o, i), shape of one update."""
        return self.b.shape[1], self.a.shape[2]

    def take(self, models):
        """The stack of some of its models, given by their positions: the others stay as updates of zero.

        An update of zero changes no sum of products, and the shapes are those that are compiled already.
        """
        scales = np.zeros_like(self.scales)
        scales[models] = self.scales[models]
        return dataclasses.replace(self, scales=scales)
