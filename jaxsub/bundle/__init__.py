"""The saved subspace: fitted layers, the coefficients of their models, and what was kept whole.

    fit --> Bundle --save--> folder --load--> Bundle --project, reconstruct--> coefficients, weights

Bytes are counted here, the folder is written, read and checked in `files`.
"""

import collections
import dataclasses
import functools
import hashlib
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxsub import errors, reading, subspace
from jaxsub.bundle import cores, corrections, files, storage
from jaxsub.views import lora_factors

NOTHING_SHARED = "the models have no layer of the bundle (by name, shape and kind)"


@dataclasses.dataclass(frozen=True)
class Layer:
    """One fitted layer and the coefficients of the models that have it.

    Attributes:
        name: the layer; two layers may share it where their shapes differ.
        subspace: LinearSubspace or TuckerSubspace.
        model_ids: whose coefficients `values` holds.
        values: (n, k...) float32 or float64.
        dtypes: stored dtype of each of these models' weights.
        figures: numbers for the manifest: energy kept, held-out error, ...
        parametrisation: "dense", or "lora": low-rank updates, projected and rebuilt by their factors.
        storage: dtypes of the basis and of the coefficients in the file, see `storage`; the arrays here are what
            comes back from there.
        corrections: corrections.Entries or Factors of these models, or None.
        weight_shape: of one weight, where the subspace is of it flattened: low-rank updates of convolutions.
        orientation: of low-rank updates, how PEFT stores their factors: "linear", "fan_in_fan_out" or "embedding"; ""
            where that is not known, or not the same in all models.
        halves: of low-rank updates: `values` as the product of two smaller arrays (see `cores`), which are stored
            instead; () where they would not be smaller.
    """

    name: str
    subspace: subspace.LinearSubspace | subspace.TuckerSubspace
    model_ids: tuple[str, ...]
    values: np.ndarray
    dtypes: tuple[str, ...]
    figures: dict = dataclasses.field(default_factory=dict)
    parametrisation: str = "dense"
    storage: tuple[str, str] = (storage.AS_COMPUTED, storage.AS_COMPUTED)
    corrections: "corrections.Entries | corrections.Factors | None" = None
    weight_shape: tuple[int, ...] = ()
    orientation: str = ""
    halves: tuple[np.ndarray, ...] = ()

    def __repr__(self):
        rank = self.subspace.rank if self.is_linear else "x".join(map(str, self.subspace.rank.values()))
        return f"<Layer {self.name!r} {self.shape}, {len(self.model_ids)} models, {self.parametrisation}, rank {rank}>"

    @property
    def shape(self):
        """Shape of one model's weight."""
        return tuple(self.weight_shape or self.subspace.shape)

    @property
    def is_linear(self):
        """Whether the subspace is one of flat rows."""
        return isinstance(self.subspace, subspace.LinearSubspace)

    @property
    def is_constant(self):
        """Whether its models are all equal: principal components without a direction."""
        return self.is_linear and not self.subspace.rank

    def project(self, x):
        """Coefficients (n, k...) of a stack (n, *shape), or of low-rank updates (a, b, scales)."""
        return subspace.project(self.subspace, x)

    def tensors(self):
        """Arrays of the layer's file, by name; unit factors, and the zeros where no mean was taken, are left out."""
        space, dtype = self.subspace, self.storage[0]
        if self.is_linear:
            mean, basis = np.asarray(space.mean), np.asarray(space.basis)
            found = {"singular_values": np.asarray(space.spectrum.values)}
            found |= _named("basis", storage.encode(basis.reshape(-1, *self.shape), dtype, component=0))
            return found | _named("mean", storage.encode(mean.reshape(self.shape), storage.of_mean(dtype), component=0))
        found = {}
        if space.procedure.centring != "none":
            found = _named("mean", storage.encode(space.mean, storage.of_mean(dtype), component=0))
        for axis, factor in space.factors.items():
            if not is_unit(factor):
                found |= _named(f"factor_{axis}", storage.encode(factor, dtype, component=0))
            found[f"singular_values_{axis}"] = np.asarray(space.spectra[axis].values)
        return found

    def coefficient_tensors(self):
        """Arrays of the layer's coefficients, by the ending of their name."""
        parts = dict(zip(cores.HALVES, self.halves, strict=True)) if self.halves else {"": self.values}
        found = {}
        for name, array in parts.items():
            found |= _named(name, storage.encode(array, self.storage[1], component=-1))
        return found


def _named(name, arrays):
    return {name + ending: array for ending, array in arrays.items()}


@dataclasses.dataclass(frozen=True)
class Bundle:
    """Fitted layers and what belongs to them; `jaxsub.fit` makes one, `jaxsub.load` reads one.

    Attributes:
        model_ids: all models it was fitted to.
        layers: Layers, in the collection's order.
        passthrough: model id -> {tensor name: array kept as it was}.
        originals: model id -> bytes of its files.
        provenance: who made it, from what.
    """

    model_ids: tuple[str, ...]
    layers: tuple[Layer, ...]
    passthrough: dict
    originals: dict
    provenance: dict

    def __repr__(self):
        return f"<Bundle of {len(self.model_ids)} models, {len(self.layers)} layers>"

    @property
    def is_of_factors(self):
        """Whether it was fitted to LoRA's A and B apart, `--view=lora_factors`."""
        config = self.provenance.get("config")
        return isinstance(config, dict) and config.get("view") == "lora_factors"

    def layer(self, name, shape, parametrisation=None):
        """The fitted layer of a name, shape and kind (any by default), or None; a number is a vector of one."""
        wanted = (name, tuple(shape) or (1,))
        found = (one for one in self.layers if (one.name, one.shape) == wanted)
        return next((one for one in found if parametrisation in (None, one.parametrisation)), None)

    def key(self, layer):
        """What a Layer is called in Coefficients: its name, with shape and kind where that is not enough."""
        alike = [one for one in self.layers if one.name == layer.name]
        if len(alike) == 1:
            return layer.name
        kind = f",{layer.parametrisation}" if sum(one.shape == layer.shape for one in alike) > 1 else ""
        return f"{layer.name}[{','.join(map(str, layer.shape))}{kind}]"

    def pairs(self, collection):
        """[(group, Layer)] of the layer groups of a Collection that the bundle has, by name, shape and kind."""
        groups = lora_factors.groups(collection) if self.is_of_factors else collection.groups
        found = [(g, self.layer(g.name, g.shape, g.parametrisation)) for g in groups]
        return [(g, one) for g, one in found if one is not None and not (g.shape == () and _has_vector(g, collection))]

    def known(self, model_ids=None):
        """The ids as a tuple, all members by default.

        Raises:
            ConfigError: a model that is no member; names the nearest.
        """
        ids = self.model_ids if model_ids is None else tuple(model_ids)
        for stranger in (i for i in ids if i not in self.model_ids):
            near = errors.nearest(stranger, self.model_ids)
            raise errors.ConfigError(f"no member {errors.quote(stranger)}{near}")
        return ids

    def coefficients(self, model_ids=None):
        """Coefficients of members (all by default) on the layers that all of them have.

        Raises:
            ConfigError: a model that is no member; names the nearest.
        """
        ids, values, kept = self.known(model_ids), {}, {}
        for layer in self.layers:
            at = {m: i for i, m in enumerate(layer.model_ids)}
            if all(i in at for i in ids):
                places = [at[i] for i in ids]
                values[self.key(layer)] = layer.values[places]
                if layer.corrections is not None:
                    kept[self.key(layer)] = layer.corrections.take(places, math.prod(layer.shape))
        return subspace.Coefficients(ids, values, kept)

    def project(self, models):
        """Coefficients of any models on the layers that they and the bundle have.

        Args:
            models: a Collection, or a dict of layer -> (n, *shape) arrays or, for low-rank updates, (a, b, scales) as
                `TuckerSubspace.project_factors` takes them.

        Raises:
            ConfigError: no layer in common, arrays of another shape, or models that lack layers others have.
            InputError: a model holds NaN or Inf.
        """
        if isinstance(models, dict):
            ids, stacks = (), models
        else:
            ids, stacks = _stacks(self, models)
        keyed, values = {self.key(layer): layer for layer in self.layers}, {}
        for key, x in stacks.items():
            if key not in keyed:
                raise errors.ConfigError(f"no layer {errors.quote(key)}{errors.nearest(key, keyed)}")
            values[key] = keyed[key].project(x() if callable(x) else x)
            finite = np.isfinite(values[key]).reshape(len(values[key]), -1).all(axis=1)
            if not finite.all():  # they are so of every model that is not
                name = (ids or range(len(finite)))[int(np.flatnonzero(~finite)[0])]
                reason = "holds NaN or Inf, or more than its coefficients can"
                raise errors.InputError(f"model {name}", reason, key=key, rule="N1")
        if not values:
            raise errors.ConfigError(NOTHING_SHARED)
        count = len(next(iter(values.values())))
        return subspace.Coefficients(ids or tuple(map(str, range(count))), values)

    def reconstruct(self, coefficients):
        """Layer -> (n, *shape) weights from Coefficients, with their corrections; low-rank updates are multiplied out.

        Raises:
            ConfigError: coefficients of a layer that the bundle lacks, or of another rank.
        """
        found = {}
        for key, layer, c in self._checked(coefficients):
            rebuilt = np.array(layer.subspace.reconstruct(c))
            if key in coefficients.corrections:
                rebuilt = coefficients.corrections[key].applied(rebuilt)
            found[key] = rebuilt.reshape(len(rebuilt), *layer.shape)
        return found

    def reconstruct_factors(self, coefficients):
        """Layer -> (a (n, k, i), b (n, o, k)) of the low-rank updates b_n a_n; dense layers are left out.

        Of convolutions (o, c, h, w), i is c h w.

        Raises:
            ConfigError: as `reconstruct`.
        """
        found = {}
        for key, layer, c in self._checked(coefficients):
            if layer.parametrisation == "lora":
                rank = max(int(np.linalg.matrix_rank(c).max()), 1)  # beyond it there is rounding only
                a, b = (np.asarray(x) for x in layer.subspace.reconstruct_factors(c, rank))
                own = coefficients.corrections.get(key)
                found[key] = (a, b) if own is None else own.apply_factors(a, b)
        return found

    def _checked(self, coefficients):
        """[(key, Layer, coefficients)], refusing what does not fit the bundle."""
        keyed, found = {self.key(layer): layer for layer in self.layers}, []
        for key, c in coefficients.values.items():
            if key not in keyed:
                raise errors.ConfigError(f"no layer {errors.quote(key)}{errors.nearest(key, keyed)}")
            wanted = keyed[key].values.shape[1:]
            if np.shape(c)[1:] != wanted:
                raise errors.ConfigError(f"{errors.quote(key)}: coefficients of shape {np.shape(c)[1:]}, not {wanted}")
            found.append((key, keyed[key], c))
        return found

    def export(self, path, model_ids=None, *, layout="portable", modules=None):
        """Writes members of a bundle of PEFT adapters in the new folder `path`, as adapters that PEFT loads.

        Args:
            path: one folder a member is made in it.
            model_ids: members; all by default.
            layout: "portable", LoRA that servers load too; "tinylora", the subspace and a trainable vector of
                coefficients; "tinylora_shared", that with the subspace written once.
            modules: for "tinylora": names of the base's modules in the order of `named_modules()`, for a vector a
                layer; None for one a model.

        Returns:
            [dict] a member: "model", "folder", "r", "other_tensors" (path of its full values, or None).

        Raises:
            ConfigError: a stranger, layers that are no low-rank updates, or what the layout cannot hold.
            WorkdirError: the folder exists.
        """
        from jaxsub.bundle import export

        return export.write(self, path, model_ids, layout, modules)

    def save(self, path):
        """Writes the bundle to a new folder, whole or not at all.

        Raises:
            WorkdirError: the folder exists, or cannot be made.
            ResourceError: no room.
        """
        files.save(self, path)

    @functools.cached_property
    def _distinct(self):
        stored, where, known = {}, {}, {}
        for model, tensors in self.passthrough.items():
            where[model] = {}
            for name, array in tensors.items():
                array = np.asarray(array, order="C")
                content = hashlib.sha256(array.reshape(-1).view(np.uint8)).digest() if array.size else b""
                key = known.setdefault((array.dtype.name, array.shape, content), f"{len(known):06d}")
                stored.setdefault(key, array)
                where[model][name] = key
        return stored, where

    def distinct(self):
        """({key: array}, {model id: {tensor name: key}}) of the passthrough; equal arrays have one key."""
        return self._distinct

    def accounting(self, headers=None):
        """Bytes by what they are for, and what they compare to.

        `ratio` is of the originals' files to the bundle. `break_even` is the smallest number of models of this kind,
        kept at these ranks, that a bundle holds in fewer bytes than their own files do; None if there is none.

        Args:
            headers: bytes of the manifest and of the files' headers; None counts them.
        """
        parts = {"mean": 0, "basis": 0, "coefficients": 0, "corrections": 0}
        for layer in self.layers:
            for name, array in layer.tensors().items():
                parts["mean" if name == "mean" else "basis"] += array.nbytes
            parts["coefficients"] += sum(array.nbytes for array in layer.coefficient_tensors().values())
            if layer.corrections is not None:
                parts["corrections"] += sum(array.nbytes for array in layer.corrections.tensors().values())
        stored, where = self.distinct()
        uses = collections.Counter(key for tensors in where.values() for key in tensors.values())
        own = sum(a.nbytes for key, a in stored.items() if uses[key] == 1)
        parts["passthrough"] = sum(a.nbytes for a in stored.values())
        parts["headers"] = files.headers(self) if headers is None else headers
        total, originals = sum(parts.values()), sum(self.originals.values())
        count = max(len(self.model_ids), 1)
        each = (parts["coefficients"] + parts["corrections"] + own) / count
        gain = originals / count - each
        break_even = math.floor((total - count * each) / gain) + 1 if gain > 0 else None
        return {**parts, "total": total, "originals": originals, "ratio": originals / total, "break_even": break_even}


def _has_vector(group, collection):
    """Whether models have a vector of one by the name of a group of numbers: a layer is of one of the two."""
    return any(g.name == group.name and g.shape == (1,) for g in collection.groups)


def is_unit(factor):
    """Whether a factor is all of its axis, by unit vectors: it is not stored."""
    return factor.ndim == 2 and factor.shape[0] == factor.shape[1] and np.array_equal(factor, np.eye(len(factor)))


def rounded(space, dtype):
    """The subspace as it comes back from a file that stores its basis so."""
    with jax.enable_x64(True):

        def kept(array, dtype):
            return jnp.asarray(storage.rounded(np.asarray(array), dtype, component=0))

        mean = kept(space.mean, storage.of_mean(dtype))
        if isinstance(space, subspace.LinearSubspace):
            return dataclasses.replace(space, mean=mean, basis=kept(space.basis, dtype))
        factors = {a: f if is_unit(f) else kept(f, dtype) for a, f in space.factors.items()}  # unit ones are not stored
        return dataclasses.replace(space, mean=mean, factors=factors)


def read(group, collection):
    """The models of a layer group as `Layer.project` takes them: a stack, or the factors of low-rank updates."""
    models = [collection.models[m] for m in group.members]
    return (reading.read_factors if group.parametrisation == "lora" else reading.read_stack)(group, models)


def _stacks(bundle, collection):
    """(model ids, layer -> function that reads its models) of a collection."""
    found, ids = {}, None
    for group, layer in bundle.pairs(collection):
        members = tuple(collection.refs[m].id for m in group.members)
        if ids is not None and members != ids:
            raise errors.ConfigError(
                f"{errors.quote(group.name)}: {len(members)} models have it, {len(ids)} have the layers before; "
                "project models with the same layers"
            )
        ids = members
        found[bundle.key(layer)] = functools.partial(read, group, collection)
    return ids or (), found
