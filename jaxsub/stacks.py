"""The models of one layer as one array, as decompositions take them.

A stack is whole on its devices: on one, or on several with its features or its models (`linalg.dealt`) shared among
them. Collections whose layers do not fit are read block by block into `statistics`; that way leads to a Gram matrix,
not here.
"""

import concurrent.futures
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxsub import errors
from jaxsub.linalg import dealt

COLUMNS = 4096  # of all models averaged at a time on the host: a few MiB


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
        finite = np.asarray(jnp.isfinite(x).reshape(len(x), -1).all(axis=1))
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

    def centred(self, centring="models", axis=None):
        """The models, float32 or wider, minus a mean, and that mean in a shape that broadcasts to `shape`.

        Where models are dealt the mean comes from the host: devices would exchange sums as large as a model. Means of
        columns are few numbers, which they add up.

        Args:
            centring: "models" subtracts the mean model, "columns" one mean for each entry of weight axis `axis`, "none"
                nothing.
            axis: of "columns".

        Returns:
            As `x`; models that are none are zeros.
        """
        mesh, given = dealt.mesh_of(self.x), None
        present = np.ones(len(self.x), bool) if self.present is None else self.present
        if mesh is not None and centring == "models":
            given = _host_mean(self.host, np.flatnonzero(present))
        y, mean = _centred(self.x, present, self.num_models, given, centring=centring, axis=axis, mesh=mesh)
        return y, mean if mesh is None else jnp.asarray(np.asarray(mean))

    def rows(self):
        """The models as rows (N, D), minus the mean model, and that (D,)."""
        y, mean = self.centred()
        return y.reshape(len(y), -1), mean.reshape(-1)

    def centred_energy(self):
        """Sum of the squared distances of the models to their mean."""
        return float(_energy(self.centred()[0]))


@functools.partial(jax.jit, static_argnames=("centring", "axis", "mesh"))
def _centred(x, present, count, given, *, centring, axis, mesh):
    """`DenseStack.centred`; `given`: the mean of the models, and what its rounding left of it, where not found here."""
    over = (0,) if centring == "models" else tuple(a for a in range(x.ndim) if axis is None or a != axis + 1)
    is_masked = mesh is not None

    def kept(x, present):
        return jnp.where(present.reshape(-1, *[1] * (x.ndim - 1)), x, 0) if is_masked else x

    def total(parts):
        x, present = parts
        return jnp.sum(kept(x, present).astype(jnp.float64), axis=over, keepdims=True)

    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if centring == "none":
        return kept(x, present), jnp.zeros((1,) * (x.ndim - 1), x.dtype)
    if given is not None:
        return kept(x - given[0] - given[1], present), given[0][0]
    number = count * math.prod(x.shape[a] for a in over[1:])

    def mean(x):
        return (dealt.sums(total, mesh)((x, present)) / number).astype(x.dtype)

    first = mean(x)
    y = x - first
    # What rounding left of the mean is the same for all models: a direction of its own, which can be over the floor.
    return kept(y - mean(y), present), first[0]


def _host_mean(x, models):
    """Mean of some models of x (N, *shape), float32 or wider, and of what is left of them without it; (1, *shape)."""
    dtype = np.promote_types(x.dtype, np.float32)
    flat, found = x.reshape(len(x), -1), np.empty((2, 1, *x.shape[1:]), dtype)
    first, rest = found.reshape(2, -1)

    def some(start):
        part = slice(start, start + COLUMNS)
        rows = flat[models, part].astype(np.float64)
        first[part] = rows.mean(axis=0)
        rest[part] = (rows - first[part]).mean(axis=0)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        for done in [pool.submit(some, start) for start in range(0, flat.shape[1], COLUMNS)]:
            done.result()
    return found


@jax.jit
def _energy(y):
    return jnp.sum(jnp.square(y.astype(jnp.float64)))


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
