"""A fitted layer with models added or removed, from its coefficients and the new models alone.

    old models      mean + c @ B                       as the bundle knows them
    frame           orthonormal directions of B and of what it misses of the new models
    cores           all models in the frame: as many numbers as it has directions, not weights
    decomposition   of the cores, by the plug-in that made the layer; turned back by the frame

Low-rank updates need no frame: factors of the old ones, from their coefficients, and of the new ones are decomposed.
Exact, up to rounding of the stored dtype, where the bundle holds all of its models. Else the part of the old models
outside the basis stays lost: certificate and figures are then bounds.

Source: sequential Karhunen-Loeve, Levy and Lindenbaum 2000; with a mean that moves, Ross et al. 2008, section 3.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxsub import bundle, descriptors, errors, hostmemory, plugins, precision, stacks, subspace
from jaxsub.bundle import certificates, cores, corrections, frames, storage
from jaxsub.decompositions import _again
from jaxsub.linalg import rebuild, unfold

PLUGINS = {"gram": "gram", "randomized": "gram", "hosvd": "hosvd", "sthosvd": "sthosvd", "hooi": "hooi"}
LOSSLESS = 2e-6  # relative error of the worst model under which a bundle holds all of its models


def captured(layer, x):
    """(n,) shares of the energy of new models, about the mean, that the basis holds; 1 for a model that is the mean.

    Args:
        layer: bundle.Layer.
        x: (n, *shape) models or, for low-rank updates, (a, b, scales).
    """
    space, x, values, _ = subspace.unit(layer.subspace, x, layer.project(x))
    norms, left = subspace.missed(space, x, values)
    energies = norms if isinstance(x, tuple) else subspace.from_mean(space, x)
    found = 1.0 - left / np.where(energies > 0, energies, 1.0)
    if layer.is_constant:  # members are the mean but for rounding, and so may new ones be
        near = max(4 * float(np.finfo(layer.values.dtype).eps), 1.001 * layer.figures["error_max"])
        found = np.where(energies <= near**2 * norms, 1.0, found)
    return found


def without(layer, keep):
    """A layer of models that are all equal, for those at positions `keep` alone."""
    kept = layer.corrections and layer.corrections.take(keep, math.prod(layer.shape))
    ids, dtypes = (tuple(given[p] for p in keep) for given in (layer.model_ids, layer.dtypes))
    return dataclasses.replace(layer, model_ids=ids, dtypes=dtypes, values=layer.values[keep], corrections=kept)


def is_lossless(layer):
    """Whether the layer's coefficients hold all of its models, so that a refit equals a fit of the models."""
    return layer.storage == (storage.AS_COMPUTED,) * 2 and layer.figures["error_max"] <= LOSSLESS


def appended(layer, x, ids, dtypes, *, max_error=-1.0):
    """The layer with new models as coefficients in the basis as it is; a bound `max_error` >= 0 is kept for them too.

    Raises:
        ConfigError: 8-bit coefficients of members would change, whose errors are bound.
    """
    count, space = len(layer.values), layer.subspace
    values, halves = _joined(layer, layer.project(x))
    moved = _moved(layer, layer.values, space, values[:count])  # larger 8-bit scales round all members again
    unit_space, unit_x, unit_values, exponent = subspace.unit(space, x, values[count:])
    energies, left = subspace.missed(unit_space, unit_x, unit_values)
    alone = energies if isinstance(x, tuple) else subspace.from_mean(unit_space, unit_x)
    alone, missed = (np.ldexp(one.sum(), 2 * exponent) for one in (alone, left))
    kept = None
    if max_error >= 0:
        same = 4 * np.finfo(values.dtype).eps * np.abs(values).max(initial=0.0)
        if np.abs(values[:count] - layer.values).max(initial=0.0) > same:
            raise errors.ConfigError(
                f"{errors.quote(layer.name)}: larger 8-bit coefficients; use --exact, or fit again"
            )
        dtype = descriptors.numpy_dtype(precision.widest(dtypes))
        if isinstance(x, tuple):
            kept = corrections.factors(*x, subspace.relative(left, energies), max_error, dtype=dtype)
            left[[] if kept is None else kept.positions] = 0.0
        else:
            again = np.array(space.reconstruct(values[count:]))
            kept = corrections.entries(x, lambda n: again[n], max_error, dtype=dtype)
            if kept is not None:
                power = precision.exponent_of(precision.largest(x))
                off = np.ldexp(np.asarray(x, np.float64), -power) - np.ldexp(np.float64(kept.applied(again)), -power)
                left = np.square(off).reshape(len(off), -1).sum(1)
    found, share = _grown(layer, alone, missed, np.ldexp(left.sum(), 2 * exponent))
    return dataclasses.replace(
        layer,
        subspace=found,
        model_ids=layer.model_ids + tuple(ids),
        values=values,
        dtypes=layer.dtypes + tuple(dtypes),
        figures=_figures(layer, moved, subspace.relative(left, energies), share),
        corrections=corrections.joined(layer.corrections, kept, (count, len(ids))),
        halves=halves,
    )


def _grown(layer, alone, missed, left):
    """(the subspace with new models counted in its total energy and certificate, share of all energy that is kept).

    Args:
        layer: bundle.Layer without them.
        alone: squared distances of the new models to the mean, summed; of low-rank updates squared norms.
        missed: their squared errors, summed.
        left: the same with their corrections.
    """
    space, kept = layer.subspace, layer.figures["energy_kept"]
    spectra = {"models": space.spectrum} if layer.is_linear else space.spectra
    before = max(one.total_energy for one in spectra.values())
    total = before + alone
    if not 0 < total < math.inf:
        return space, kept

    def grown(error):
        return math.sqrt((error**2 * before + missed) / total)

    certificate = space.certificate
    certificate = dataclasses.replace(
        certificate, relative_error=grown(certificate.relative_error), bound=grown(certificate.bound)
    )
    spectra = {axis: dataclasses.replace(one, total_energy=one.total_energy + alone) for axis, one in spectra.items()}
    spectra = {"spectrum": spectra["models"]} if layer.is_linear else {"spectra": spectra}
    share = 1.0 - ((1.0 - kept) * before + left) / total
    return dataclasses.replace(space, certificate=certificate, **spectra), share


def _stored(layer, values):
    """Coefficients of the layer's kind, and their halves, as they come back from its file."""
    inner = int(np.linalg.matrix_rank(values).max(initial=1)) if layer.parametrisation == "lora" else 0
    return cores.stored(values, layer.storage[1], inner)


def _joined(layer, fresh):
    """Coefficients of the layer's members and new ones, and their halves; those of members stay as they are."""
    if layer.halves:
        inner = max(layer.halves[0].shape[2], int(np.linalg.matrix_rank(fresh).max()))
        if own := cores.halves(fresh, inner):
            room = inner - layer.halves[0].shape[2]
            left, right = layer.halves
            old = np.pad(left, ((0, 0), (0, 0), (0, room))), np.pad(right, ((0, 0), (0, room), (0, 0)))
            both = (np.concatenate(pair) for pair in zip(old, own, strict=True))
            halves = tuple(storage.rounded(half, layer.storage[1], component=-1) for half in both)
            return cores.joined(halves), halves
    return cores.stored(np.concatenate([layer.values, fresh]), layer.storage[1])


def _moved(layer, old, found, values):
    """(n,) bounds of the distances of what `found` rebuilds from `values` to what the layer did from `old`.

    Relative to the norms of the models, of which a rebuilt one is off by the layer's error at most. 0 where nothing
    changed. One model at a time; low-rank updates by their factors.
    """
    space, change = layer.subspace, np.zeros(len(old))
    for n, (before, after) in enumerate(zip(old, values, strict=True)):
        if found is space and np.array_equal(before, after):
            continue
        if layer.parametrisation == "lora":
            was = (*(np.asarray(x) for x in space.reconstruct_factors(before[None])), np.ones(1))
        else:
            was = np.asarray(space.reconstruct(before[None]))
        energies, left = subspace.missed(found, was, after[None])
        change[n] = np.sqrt(left[0] / (energies[0] or 1.0))
    return change * (1.0 + layer.figures["error_max"])


def refitted(layer, keep, x=None, ids=(), dtypes=(), *, rank=0, key=None):
    """The layer of the models at positions `keep` and of new ones, with mean and basis fitted to both.

    Args:
        layer: bundle.Layer.
        keep: positions of the models that stay.
        x: new models as in `captured`, or None.
        ids, dtypes: of the new models.
        rank: components; 0 for as many as the layer has.
        key: typed PRNG key for the decomposition.

    Raises:
        ConfigError: a procedure whose basis is not one of all models alike, or too few models.
    """
    space, name = layer.subspace, layer.subspace.procedure.name
    if name not in PLUGINS:
        raise errors.ConfigError(f"{errors.quote(layer.name)}: a basis of {name} cannot be updated; fit again")
    exponent = _exponent(layer, x)
    if exponent:  # squares would leave the range of the dtype
        if isinstance(x, tuple):
            a, b, scales, power = precision.unit_factors(*x)
            x = (a, b, np.ldexp(scales, power - exponent))
        elif x is not None:
            x = precision.scaled(np.asarray(x), -exponent).astype(layer.values.dtype)
        made = refitted(_scaled(layer, -exponent), keep, x, ids, dtypes, rank=rank, key=key)
        return _scaled(made, exponent)
    old, options = layer.values[list(keep)], {"plugin": plugins.load("decompositions", PLUGINS[name]), "key": key}
    with jax.enable_x64(True):
        if layer.parametrisation == "lora":
            found, values, kept = _fit_updates(layer, old, x, rank, **options)
        else:
            frame = frames.of(space, x)
            every = _cores(space, frame, old, x)
            small = _fit(layer, every, rank, **options)
            found, values = _composed(space, frame, small), np.asarray(small.project(every))
            found = _with_losses(layer, found, small)
        found = bundle.rounded(found, layer.storage[0])
        values, halves = _stored(layer, values)
        if layer.parametrisation == "lora":
            energies, left = subspace.missed(found, kept, values[: len(old)])
            change = subspace.relative(left, energies) * (1.0 + layer.figures["error_max"])  # of what they stand for
        else:
            norms, left = _norms(frame, every[: len(old)]), subspace.missed(small, every, values[: len(old)])[1]
            # Of the models as they were rebuilt, which are off by the layer's error at most.
            change = subspace.relative(left, np.square(norms)) * (1.0 + layer.figures["error_max"])
            if layer.storage[0]:  # rounded directions leave the frame
                change = np.maximum(change, _moved(layer, old, found, values[: len(old)]))
            energies = np.square(norms)
        relative, lost, whole = np.zeros(0), float((np.square(change) * energies).sum()), energies.sum()
        if x is not None:
            energies, left = subspace.missed(found, x, values[len(old) :])
            relative, lost = subspace.relative(left, energies), lost + left.sum()
            whole += energies.sum()
        found = certificates.at_least(found, math.sqrt(_lost_before(layer)) + math.sqrt(lost), math.sqrt(whole))
    kept = 1.0 - min(found.certificate.relative_error, 1.0) ** 2
    figures = _figures(layer, change, relative, kept)
    return dataclasses.replace(
        layer,
        subspace=found,
        model_ids=tuple(layer.model_ids[p] for p in keep) + tuple(ids),
        values=values,
        dtypes=tuple(layer.dtypes[p] for p in keep) + tuple(dtypes),
        figures=figures,
        halves=halves,
    )


def _exponent(layer, x):
    """Power of two that brings the largest entry of coefficients, mean and new models near 1; 0 where that is safe."""
    parts = [layer.values, np.asarray(layer.subspace.mean)]
    if isinstance(x, tuple):
        parts.append(np.ldexp(1.0, precision.unit_factors(*x)[3]))
    elif x is not None:
        parts.append(np.asarray(x))
    return precision.exponent_of(max(map(precision.largest, parts)))


def _scaled(layer, exponent):
    """The layer of models times 2**exponent."""
    halves = layer.halves and (precision.scaled(layer.halves[0], exponent), layer.halves[1])
    space, values = subspace.scaled(layer.subspace, exponent), precision.scaled(layer.values, exponent)
    return dataclasses.replace(layer, subspace=space, values=values, halves=halves)


def _mean_shape(space):
    return space.shape if math.prod(space.mean.shape) == math.prod(space.shape) else space.mean.shape


def _cores(space, frame, old, x):
    """All models as coordinates in the frame: old ones from their coefficients, and new ones, or None."""
    old = _turned(space, frame, old)
    if x is None:
        return jax.device_put(old)
    new = subspace.project(frame, jax.device_put(x))  # on a CPU device where it is
    every = hostmemory.zeros((len(old) + len(new), *old.shape[1:]), old.dtype)
    every[: len(old)], every[len(old) :] = old, new
    return jax.device_put(every)


def _turned(space, frame, values):
    """Coefficients (n, k...) in `space` as coordinates in the frame."""
    if isinstance(space, subspace.LinearSubspace):
        none = jnp.zeros_like(frame.mean)
        return values @ np.asarray(rebuild.project_rows(space.basis, none, frame.basis, dtype=frame.basis.dtype))
    for axis, factor in space.factors.items():
        values = np.asarray(unfold.mode_product(jnp.asarray(values), frame.factors[axis] @ factor.T, axis + 1))
    return values


def _norms(frame, cores):
    """(n,) norms of the models that the cores are, of which the mean has a part outside the frame."""
    mean = outside = 0.0
    if isinstance(frame, subspace.LinearSubspace) or frame.procedure.centring == "models":
        whole = np.broadcast_to(np.asarray(frame.mean).reshape(_mean_shape(frame)), frame.shape)
        mean = np.asarray(frame.project(2 * whole[None]))[0]  # it subtracts the mean once
        squares = np.square(whole, dtype=np.float64).sum()
        rounding = 16 * float(np.finfo(mean.dtype).eps) * squares
        outside = max(0.0, squares - np.square(mean, dtype=np.float64).sum() - rounding)
    return np.array([math.sqrt(np.square(c + mean, dtype=np.float64).sum() + outside) for c in np.asarray(cores)])


def _fit(layer, cores, rank, *, plugin, key):
    """The decomposition of the cores at `rank`, or at the layer's own."""
    count, sizes = len(cores), cores.shape[1:]
    if layer.is_linear:
        most = min(count - 1, sizes[0])
        if most < 1:
            raise errors.ConfigError(f"{errors.quote(layer.name)}: {count} models are left; fit again")
        options = plugin.Options(rank=min(rank or layer.subspace.rank, most))
    elif len(sizes) != len(layer.subspace.factors):
        raise errors.ConfigError(f"{errors.quote(layer.name)}: axes that are not reduced; fit again")
    else:
        options = plugin.Options(ranks=_ranks(layer, rank, sizes))
    return _again.fit(plugin, stacks.DenseStack.create(cores, layer.name), options, key)


def _ranks(layer, rank, sizes):
    return tuple(min(rank or k, size) for k, size in zip(layer.subspace.rank.values(), sizes, strict=True))


def _fit_updates(layer, old, x, rank, *, plugin, key):
    """(subspace, coefficients, factors of the old) of low-rank updates, old ones (coefficients) and new."""
    kept = (*(np.asarray(part) for part in layer.subspace.reconstruct_factors(old)), np.ones(len(old)))
    parts = [kept] if x is None else [kept, x]
    most, dtype = max(a.shape[1] for a, _, _ in parts), kept[0].dtype
    a = np.concatenate([np.pad(a.astype(dtype), ((0, 0), (0, most - a.shape[1]), (0, 0))) for a, _, _ in parts])
    b = np.concatenate([np.pad(b.astype(dtype), ((0, 0), (0, 0), (0, most - b.shape[2]))) for _, b, _ in parts])
    stack = stacks.LoraStack(a, b, np.concatenate([scales for *_, scales in parts]), layer.name)
    found = _again.fit(plugin, stack, plugin.Options(ranks=_ranks(layer, rank, stack.shape)), key)
    return _with_losses(layer, found, found), subspace.project(found, (a, b, stack.scales)), kept


def _composed(space, frame, small):
    """The subspace of weights that a subspace of cores in the frame is."""
    if isinstance(space, subspace.LinearSubspace):
        mean = space.mean + jnp.asarray(small.mean, frame.basis.dtype) @ frame.basis
        return dataclasses.replace(space, mean=mean, basis=small.basis @ frame.basis)
    factors = {axis: small.factors[axis] @ factor for axis, factor in frame.factors.items()}
    mean = space.mean
    if space.procedure.centring == "models":
        shift = jnp.broadcast_to(small.mean, small.shape)[None]
        for axis, factor in frame.factors.items():
            shift = unfold.mode_product(shift, factor.T, axis + 1)
        mean = space.mean + shift[0]
    return dataclasses.replace(space, mean=mean, factors=factors)


def _lost_before(layer):
    """Squared errors of the members as they are in the bundle, at most; 0 of one that holds all of them."""
    space = layer.subspace
    return 0.0 if is_lossless(layer) else space.certificate.bound**2 * certificates.total_energy(space)


def _with_losses(layer, found, small):
    """`found` with the spectra of the cores, and a certificate that counts what the old basis had lost before."""
    before, exact = _lost_before(layer), is_lossless(layer)
    news = [small.spectrum] if isinstance(small, subspace.LinearSubspace) else list(small.spectra.values())
    inside = max(s.total_energy for s in news)
    now = small.certificate.bound**2 * inside
    total = inside + before
    bound = (math.sqrt(before) + math.sqrt(now)) / math.sqrt(total) if total > 0 else 0.0
    error = small.certificate.relative_error if exact else min(bound, 1.0)
    certificate = subspace.Certificate(error, bound, exact=exact, passes=1)
    if isinstance(small, subspace.LinearSubspace):
        spectrum = dataclasses.replace(small.spectrum, total_energy=total)
        return dataclasses.replace(found, spectrum=spectrum, certificate=certificate)
    spectra = {a: dataclasses.replace(s, total_energy=s.total_energy + before) for a, s in small.spectra.items()}
    return dataclasses.replace(found, spectra=spectra, certificate=certificate)


def _figures(layer, change, relative, kept):
    """Figures of the manifest: errors of new models as measured, of old ones at most what they were and the change."""
    mean, most = layer.figures["error_mean"], layer.figures["error_max"]
    old = min(mean * len(layer.model_ids) / max(len(change), 1), most) + change  # of some, where others are removed
    worst = most + change
    together = np.concatenate([old, relative])
    return {
        "energy_kept": kept,
        "error_mean": float(together.mean()),
        "error_max": float(max(worst.max(initial=0.0), relative.max(initial=0.0))),
        "held_out": None,
        "bounds": True,
    }
