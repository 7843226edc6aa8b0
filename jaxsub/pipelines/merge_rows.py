"""What a row is in a merge: weights, weights less a base, low-rank updates, or coefficients in a bundle."""

import dataclasses
import hashlib
import os

import jax
import numpy as np

from jaxsub import bundle as bundles, collection, errors, formats, lineup, plugins, reading, rows
from jaxsub.formats import _rewrite
from jaxsub.rows import files, lora


@dataclasses.dataclass(frozen=True)
class Sources:
    """All that rows are made from.

    Attributes:
        opened: Collection.
        base: Model that dense rows are less of, or None.
        bundle: Bundle whose coefficients are merged instead of the weights of its layers, or None.
        weights: (N,) float64 of the user, or None.
        statistics: Models of the user's statistics, one a model, or ().
        cut: lora.Cut of merged low-rank updates.
        past_cache: see `formats.read_into`.
    """

    opened: collection.Collection
    base: object = None
    bundle: object = None
    weights: np.ndarray | None = None
    statistics: tuple = ()
    cut: lora.Cut = lora.Cut()
    past_cache: bool = False

    @property
    def ids(self):
        """Of all models."""
        return tuple(ref.id for ref in self.opened.refs)

    def identity(self):
        """What a run's identity says of the bundle and the statistics."""
        digest = hashlib.sha256()
        for layer in self.bundle.layers if self.bundle is not None else ():
            for name, array in sorted({**layer.tensors(), **layer.coefficient_tensors()}.items()):
                digest.update(name.encode() + np.ascontiguousarray(array).tobytes())
        bundle = None if self.bundle is None else digest.hexdigest()
        return {"bundle_digest": bundle, "statistics": [collection.digest(model) for model in self.statistics]}

    def of(self, layer):
        """Rows of a `merge_layers.Layer`.

        Raises:
            InputError: the base or the statistics lack the layer, or hold it in another shape.
            NonFiniteError: low-rank updates with NaN or Inf.
        """
        statistics = self._statistics(layer)
        if layer.is_lora:
            return self._lora(layer.group, statistics)
        group = layer.group
        models = [self.opened.models[m] for m in group.members]
        base = None
        if self.base is not None and not is_delta(models[0]):
            base = self.base, files.require_base(self.base, group.name, group.shape)
        more = {"base": base, "weights": self.weights, "statistics": statistics, "past_cache": self.past_cache}
        found = files.FileRows(group, models, self.ids, **more)
        found.is_update = found.is_update or is_delta(models[0])
        return found

    def _lora(self, group, statistics):
        """LoraRows of all models: those that lack the layer have an update of zero."""
        models = [self.opened.models[m] for m in group.members]
        a, b, scales = reading.read_factors(group, models)
        count = len(self.ids)
        if len(group.members) < count:
            at = list(group.members)
            whole = [np.zeros((count, *part.shape[1:]), part.dtype) for part in (a, b, scales)]
            for target, part in zip(whole, (a, b, scales), strict=True):
                target[at] = part
            a, b, scales = whole
        more = {"shape": group.shape, "cut": self.cut, "weights": self.weights, "statistics": statistics}
        return lora.LoraRows(a, b, scales, group.name, self.ids, **more)

    def _statistics(self, layer):
        """Rows of the user's statistics of a layer; None where no file has it."""
        found = [model.tensors.get(layer.name) for model in self.statistics]
        if not any(t is not None for t in found):
            return None
        for model, tensor in zip(self.statistics, found, strict=True):
            if tensor is None or tensor.shape != found[0].shape:
                what = (
                    "lacks it" if tensor is None else f"has shape {list(tensor.shape)}, others {list(found[0].shape)}"
                )
                raise errors.InputError(
                    model.path, f"the statistics: {what}", key=layer.name, hint="collect them again"
                )
        members = tuple(range(len(found)))
        group = collection.LayerGroup(layer.name, found[0].shape, lineup.DENSE, members, tuple(found))
        return files.FileRows(group, self.statistics, self.ids)


def is_delta(model):
    """Whether a model's plain tensors are differences to a base, not weights: `.diff` of kohya-ss."""
    return model.format == "kohya"


def open_statistics(folder, opened, allow_roots=()):
    """The Models `<folder>/<model id>.safetensors` of the user's statistics, in the collection's order.

    Raises:
        InputError: a model has none.
    """
    if not folder:
        return ()
    found = []
    for ref in opened.refs:
        path = _rewrite.place(folder, ref.id + ".safetensors")
        if not os.path.lexists(path):
            hint = "one file a model, called by its id"
            raise errors.InputError(path, "no statistics of this model", hint=hint, rule="H12")
        found.append(formats.open_model(path, root=folder, allow_roots=allow_roots))
    return tuple(found)


def weights_of(texts, opened):
    """(N,) float64 from texts "0.3" or "0.3,0.7" (in the order of the ids), "id=0.3" or "path=0.3"; None without any.

    Raises:
        ConfigError: not one for every model, no number, or an id that is no model's.
    """
    if not texts:
        return None
    ids, named = [ref.id for ref in opened.refs], {}
    texts = [part for text in texts for part in ([text] if "=" in text else text.split(","))]
    places = {os.path.abspath(ref.path): ref.id for ref in opened.refs}
    for position, text in enumerate(texts):
        name, is_named, value = text.rpartition("=")
        if not is_named:
            if position >= len(ids):
                raise errors.ConfigError(f"weights: {len(texts)} given for {len(ids)} models")
            name = ids[position]
        name = name if name in ids else places.get(os.path.abspath(name), name)
        if name not in ids:
            raise errors.ConfigError(f"weights: no model {errors.quote(name)}{errors.nearest(name, ids)}")
        try:
            number = float(value)
        except ValueError:
            number = np.nan
        if not np.isfinite(number) or name in named:
            what = "given twice" if name in named else "no number"
            raise errors.ConfigError(f"weights: {errors.quote(text, 60)}: {what}")
        named[name] = number
    missing = [name for name in ids if name not in named]
    if missing:
        raise errors.ConfigError(f"weights: none for {lineup.listed(missing, 3)}; give one a model")
    if not any(named.values()):
        raise errors.ConfigError("weights sum to 0: all are")
    return np.array([named[name] for name in ids])


def merged(own, module, options, key):
    """(result of a method on Rows, whether it is the mean of weights that a method for updates cannot take).

    Full values beside low-rank updates, such as a classifier's head, are such: there is nothing that they update.
    """
    is_mean = module.NEEDS_UPDATES and not own.is_update
    if is_mean:
        module = plugins.load("merges", "mean")
        options = module.Options()
    with jax.enable_x64(True):
        return module.merge(own, options, key), is_mean


class CoefficientRows(rows.ArrayRows):
    """Coefficients of the models of one layer in a bundle; results are rebuilt to the layer."""

    def __init__(self, layer, stack, ids, weights, base=None):
        """Projects the models.

        Args:
            layer: bundle.Layer.
            stack: (N, *shape) models, or (a, b, scales) of low-rank updates.
            ids: of the models.
            weights: see `Rows`.
            base: (*shape) base that coefficients are less of and that results begin from, or None: the bundle's mean.
        """
        self.layer, self.origin = layer, base
        values = layer.project(stack)
        if base is not None:
            values = values - layer.project(base[None])
        super().__init__(values, layer.name, ids, weights=weights, is_update=True)

    def rebuilt(self, result):
        """The layer (*shape) of a result of these rows, or its lora factors."""
        c = result.array(self.shape)[None]
        space = self.layer.subspace
        if self.layer.parametrisation == "lora":
            a, b = (np.asarray(part[0], np.float64) for part in space.reconstruct_factors(c))
            return rows.Factors(a, b)
        whole = np.asarray(space.reconstruct(c))[0].reshape(-1)
        if self.origin is not None:
            nothing = np.asarray(space.reconstruct(np.zeros_like(c)))[0].reshape(-1)
            whole = self.origin.reshape(-1) + (whole - nothing)
        return rows.Values.of_array(whole)

    @property
    def is_centred(self):
        """Whether the models' coefficients sum to zero, as those about their own mean do."""
        total, size = (np.abs(s).max(initial=0) for s in (self.x.sum(axis=0), np.abs(self.x).sum(axis=0)))
        return self.origin is None and total <= 1e-4 * size


def coefficients(sources, layer):
    """CoefficientRows of a layer that the bundle has; None where it has not."""
    if sources.bundle is None:
        return None
    group = layer.group
    own = sources.bundle.layer(group.name, group.shape, group.parametrisation)
    if own is None or len(group.members) < len(sources.ids):
        return None
    stack = bundles.read(group, sources.opened)
    base = None
    if sources.base is not None and not layer.is_lora:
        tensor = files.require_base(sources.base, group.name, group.shape)
        base = formats.read(sources.base, tensor).astype(stack.dtype)
    return CoefficientRows(own, stack, sources.ids, sources.weights, base)
