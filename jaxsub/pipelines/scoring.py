"""What models do, by a function of the user's: scores of originals beside those of what a subspace leaves of them.

    --score=module:function      function(weights, model_id) -> float

`weights` has every tensor of the model, {layer: array} in the model's stored dtype; a LoRA layer is (a (r, i),
b (o, r)), its update b @ a. It is called for the original, with the mean in place of each layer of the bundle (no
update, for LoRA), with what a random subspace of the same size keeps, and with the reconstruction. Only the module that
is named is run.
"""

import dataclasses
import math
import zlib

import numpy as np

from jaxsub import bundle as bundles, collection, descriptors, errors, formats, subspace
from jaxsub.pipelines import hooks

KINDS = ("original", "mean", "random", "rebuilt")


def load(spec, option="score"):
    """The function that `module:function` names, looked for in the current folder first; `option` is who names it.

    Raises:
        ConfigError: no such name, a module that cannot be imported, or nothing that can be called.
    """
    found = hooks.load(option, spec)
    if not callable(found):
        module, _, name = spec.partition(":")
        raise errors.ConfigError(f"{option}={spec}: {module} has no function {name}")
    return found


def scores(function, spec, opened, bundle, pairs, seed):
    """{model id: {kind: score, None where it is not finite}} of the models of a Collection.

    Args:
        function: from `load`.
        spec: what it was called.
        opened: Collection.
        bundle: Bundle.
        pairs: its layers, from `Bundle.pairs`.
        seed: of the random subspaces.

    Raises:
        InputError: the function failed, or returned no number; names the model.
    """
    spaces = [_random(layer.subspace, seed, layer.name) for _, layer in pairs]
    found = {}
    for member, (ref, model) in enumerate(zip(opened.refs, opened.models, strict=True)):
        kinds = _weights(member, model, opened, pairs, spaces)
        found[ref.id] = {kind: _call(function, spec, kinds[kind], ref.id, kind) for kind in KINDS}
    return found


def _call(function, spec, weights, identifier, kind):
    try:
        value = function(weights, identifier)
    except Exception as error:  # the user's own code: anything may come
        reason = f"score={spec} failed on its {kind} weights: {type(error).__name__}: {errors.quote(error)}"
        raise errors.InputError(identifier, reason, hint="--debug shows where") from error
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        reason = f"score={spec} returned {errors.quote(repr(value), 60)} for its {kind} weights, no number"
        raise errors.InputError(identifier, reason) from error
    return number if math.isfinite(number) else None


def _weights(member, model, opened, pairs, spaces):
    """{kind: {layer: array or (a, b)}} of one model."""
    whole, replaced = {}, {kind: {} for kind in KINDS}
    covered = set()
    for (group, layer), random in zip(pairs, spaces, strict=True):
        if member not in group.members:
            continue
        entry = group.entries[group.members.index(member)]
        x = bundles.read(dataclasses.replace(group, members=(member,), entries=(entry,)), opened)
        is_lora = layer.parametrisation == "lora"
        covered.update(t.name for t in collection.stored_tensors(entry))
        dtype = descriptors.numpy_dtype(entry.a.dtype if is_lora else entry.dtype)
        for kind, made in _kinds(x, layer.subspace, random).items():
            replaced[kind][group.name] = tuple(p.astype(dtype) for p in made) if is_lora else made.astype(dtype)
    for tensor in model.tensors.values():
        if tensor.name not in covered:
            whole[tensor.name] = formats.read(model, tensor)
    for name, pair in model.adapters.items():
        if pair.a.name not in covered:
            a, b = formats.read(model, pair.a), formats.read(model, pair.b)
            whole[name] = (a, (b * pair.scale).astype(b.dtype)) if not pair.transposed else (b.T * pair.scale, a.T)
    return {kind: {**whole, **layers} for kind, layers in replaced.items()}


def _kinds(x, space, random):
    """{kind: array, or (a, b) of a low-rank update} of one model of one layer."""
    if not isinstance(x, tuple):
        values = space.project(x)
        nothing = np.zeros_like(values)
        made = (x, space.reconstruct(nothing), random.reconstruct(random.project(x)), space.reconstruct(values))
        return {kind: np.asarray(one)[0].reshape(x.shape[1:]) for kind, one in zip(KINDS, made, strict=True)}
    a, b, scales = x
    rank = a.shape[1]
    kept = [s.reconstruct_factors(s.project_factors(*x), rank) for s in (random, space)]
    made = ((a, b * scales[0]), (np.zeros_like(a), np.zeros_like(b)), *kept)
    return {kind: tuple(np.asarray(p)[0] for p in one) for kind, one in zip(KINDS, made, strict=True)}


def _random(space, seed, name):
    """A subspace like `space` about the same mean, its directions drawn."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])

    def drawn(rows):
        return np.linalg.qr(rng.standard_normal(rows.shape[::-1]))[0].T.astype(rows.dtype)

    if isinstance(space, subspace.LinearSubspace):
        return dataclasses.replace(space, basis=drawn(space.basis))
    return dataclasses.replace(space, factors={axis: drawn(f) for axis, f in space.factors.items()})


def table(found):
    """The scores as text: one line a model for up to 20 models, then medians."""
    lines = [f"{'score':42}" + "".join(f" {kind:>10}" for kind in KINDS)]
    if len(found) <= 20:
        lines += [f"{errors.quote(name, 42):42}" + _row(one) for name, one in found.items()]
    columns = {kind: [one[kind] for one in found.values() if one[kind] is not None] for kind in KINDS}
    middle = {kind: float(np.median(column)) if column else None for kind, column in columns.items()}
    lines.append(f"{f'median of {len(found)} models':42}" + _row(middle))
    return "\n".join(lines)


def _row(one):
    return "".join(f" {'-' if one[kind] is None else format(one[kind], '.4g'):>10}" for kind in KINDS)
