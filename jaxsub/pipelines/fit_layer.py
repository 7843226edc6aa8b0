"""One layer of a fit: its stack, the decomposition, coefficients, corrections, and what the manifest says of it."""

import dataclasses
import math
import zlib

import jax
import numpy as np

from jaxsub import (
    bundle,
    descriptors,
    errors,
    heldout,
    hostmemory,
    lineup,
    plugins,
    precision,
    reading,
    solvers,
    stacks,
    subspace,
)
from jaxsub.bundle import certificates, cores, corrections, storage
from jaxsub.decompositions import _again
from jaxsub.formats import peft
from jaxsub.pipelines import fit_plan, fit_streamed, layers, plan, sharing


def module(group, config):
    """The decomposition of a group: the one that is asked for, else the default of its kind."""
    default = "hooi" if group.parametrisation == lineup.LORA else "gram"
    return plugins.load("decompositions", config.decomposition or default)


def fit(group, opened, config, rank):
    """The fitted bundle.Layer of a group; `rank` a number, one for each axis, or 0 to go by energy.

    Raises:
        SolverError: numbers that are not finite came out of finite ones, also the second time; names the layer.
    """
    side = _again.side(module(group, config), len(group.members), group.shape or (1,))
    with solvers.of_layer(group.name), hostmemory.one_blas_thread(side):
        found = _fitted(group, opened, config, rank)
        if not solvers.is_finite((found.values, *found.halves, np.asarray(found.subspace.mean))):
            raise errors.SolverError("coefficients that are not finite")
    return found


def _fitted(group, opened, config, rank):
    models = [opened.models[m] for m in group.members]
    ids = tuple(opened.refs[m].id for m in group.members)
    if group.parametrisation == lineup.LORA:
        return _lora_layer(group, models, ids, config, rank)
    if fit_plan.of_layer(group, module(group, config), config).is_streamed:
        return fit_streamed.fit(group, models, ids, config, rank)
    x = reading.read_stack(group, models)
    exponent = _exponent(x)
    require_room(exponent, group, models, config)
    x = precision.scaled(x, -exponent) if exponent else x  # squares would leave the range of the dtype
    plugin = module(group, config)
    with jax.enable_x64(True):
        there = sharing.placed(x, fit_plan.mesh_of(group, plugin), by_rows=fit_plan.by_rows(group, plugin))
        stack = stacks.DenseStack.create(there, group.name, ids, host=x)
        key = layers.layer_key(group.name, config.seed)
        space = _again.fit(plugin, stack, _options(plugin, config, stack, rank), key)
        hostmemory.trim()
        space = subspace.stored(space, _wide(group.dtypes))
        space, values, _, unrounded = _stored(space, stack.x, len(x), config)
        found = _entries(group, x, space, values, exponent, config)
        energies, left = subspace.missed(space, stack.x, values)
        space = certificates.measured(space, left, energies)
        figures = {**_figures(stack, x, values, space, found, exponent, config, energies, left), **unrounded}
    if exponent:
        space, values = subspace.scaled(space, exponent), precision.scaled(values, exponent)
    dtypes = stored_dtypes(group)
    return bundle.Layer(group.name, space, ids, values, dtypes, figures, storage=_storage(config), corrections=found)


def stored_dtypes(group):
    """Stored dtype of each model's weight; of low-rank updates one that holds both factors."""
    if group.parametrisation == lineup.LORA:
        return tuple(precision.widest((e.a.dtype, e.b.dtype)) for e in group.entries)
    return tuple(e.dtype for e in group.entries)


def _entries(group, x, space, values, exponent, config):
    """The entries that config.max_error asks to keep, or None."""
    if config.max_error < 0:
        return None
    dtype = descriptors.numpy_dtype(precision.widest(group.dtypes))

    def rebuild(n):
        return np.asarray(space.reconstruct(values[n : n + 1]))[0]

    return corrections.entries(x, rebuild, config.max_error, dtype=dtype, exponent=exponent)


def _storage(config):
    return config.basis_dtype, config.coefficient_dtype


def _wide(dtypes):
    """What a layer's basis and coefficients are computed in."""
    return "float64" if "float64" in dtypes else "float32"


def _stored(space, x, count, config, inner=0):
    """The subspace, the coefficients of the first `count` of `x` and their halves as they come back from the file.

    And what that costs: {"error_unrounded": mean relative error before rounding}, empty where nothing is rounded.
    `inner` is the rank of the cores of low-rank updates.
    """
    basis_dtype, coefficient_dtype = _storage(config)
    values, halves = cores.stored(subspace.project(space, x)[:count], storage.AS_COMPUTED, inner)
    if not (basis_dtype or coefficient_dtype):
        return space, values, halves, {}
    energies, left = subspace.missed(space, x, values)
    space = bundle.rounded(space, basis_dtype)
    values, halves = cores.stored(subspace.project(space, x)[:count], coefficient_dtype, inner)
    return space, values, halves, {"error_unrounded": subspace.error_figures(left, energies, 0.0)["error_mean"]}


def _lora_layer(group, models, ids, config, rank):
    """The fitted bundle.Layer of low-rank updates, from their factors; `rank` may be (k_o, k_i, rank of the cores)."""
    plugin, inner = module(group, config), None
    if isinstance(rank, tuple):
        rank, inner = rank[:2], rank[2]
    dtypes = stored_dtypes(group)
    given = reading.read_factors(group, models)
    *factors, exponent = precision.unit_factors(*given)
    require_room(exponent, group, models, config, precision.ROOM_FOR_SQUARES)
    stack = stacks.LoraStack(*factors, group.name, ids)
    with jax.enable_x64(True):
        there = sharing.updates(stack, fit_plan.mesh_of(group, plugin))
        key = layers.layer_key(group.name, config.seed)
        space = _again.fit(plugin, there, _options(plugin, config, stack, rank), key)
        hostmemory.trim()
        factors = stack.a, stack.b, stack.scales
        space = subspace.stored(space, _wide(dtypes))
        _require_memory(group, space, config)
        space, values, halves, unrounded = _stored(space, factors, len(models), config, inner or stack.a.shape[1])
        energies, left = subspace.missed(space, factors, values)
        space = certificates.measured(space, left, energies)
    found = None
    if config.max_error >= 0:
        relative = subspace.relative(left, energies)
        found = corrections.factors(*given, relative, config.max_error, dtype=np.dtype(precision.widest(dtypes)))
        left[[] if found is None else found.positions] = 0.0
    inside = np.ldexp(cores.energies(*factors), 2 * exponent).tolist()
    held = _held_out_half(there, factors, space, config)
    fitted = subspace.error_figures(left, energies, energies.sum())
    figures = {**fitted, **held, "energies_of_ranks": inside, **unrounded}
    if exponent:
        space = subspace.scaled(space, exponent)
        halves = halves and (precision.scaled(halves[0], exponent), halves[1])
        values = cores.joined(halves) if halves else precision.scaled(values, exponent)
    return bundle.Layer(
        group.name,
        space,
        ids,
        values,
        dtypes,
        figures,
        lineup.LORA,
        _storage(config),
        found,
        tuple(group.shape),
        orientation(group),
        halves,
    )


def _require_memory(group, space, config):
    """Refuses ranks, known only now, whose cores (n, k_o, k_i) would not fit on the host: here, as halves, joined.

    Raises:
        ResourceError: naming the layer, the ranks, what they need and what there is.
    """
    needed = 3 * len(group.members) * math.prod(space.rank.values()) * space.dtype.itemsize
    of = f" for cores of {' x '.join(map(str, space.rank.values()))} of {len(group.members)} models"
    cure = "take fewer components with --rank or --energy"
    plan.require_host_memory(group.name, needed, config.max_host_bytes, cure, of)


def orientation(group):
    """How PEFT stores the factors of a group; "" where its models differ."""
    found = {peft.orientation(e) for e in group.entries}
    return found.pop() if len(found) == 1 else ""


def _exponent(x):
    """Power of two that brings the largest entry near 1; 0 where squares are safe as they are."""
    return 0 if x.dtype == np.float16 else precision.exponent_of(precision.largest(x))  # float16 leaves no range


def require_room(exponent, group, models, config, room=precision.ROOM["float64"]):
    """Refuses a layer that is scaled by 2**exponent where not even float64 can hold what a bundle keeps of it.

    Raises:
        InputError: numbers so small that what is made of them is zero.
        ConfigError: narrow storage, for numbers that only float64 has room for.
    """
    if exponent < -room:
        raise errors.InputError(
            models[0].path, f"holds numbers of at most 2**{exponent}, as the others do: products of them are zero",
            key=group.name, hint="scale the models up, or leave the layer out with --exclude_layers", rule="N5",
        )  # fmt: skip
    if not precision.has_room(exponent, "float32") and any(_storage(config)):
        raise errors.ConfigError(
            f"layer {errors.quote(group.name)}: numbers near 2**{exponent} need float64, not "
            f"{' and '.join(filter(None, _storage(config)))}; store them as computed, or exclude the layer"
        )


def _options(module, config, stack, rank):
    """A decomposition's Options for a rank (see `_layer`) or for config.energy, as far as it has them."""
    known = {f.name for f in dataclasses.fields(module.Options)}
    if rank and "ranks" in known:
        every = rank if isinstance(rank, tuple) else (rank,) * len(stack.shape)
        return module.Options(ranks=tuple(min(k, size) for k, size in zip(every, stack.shape, strict=True)))
    if rank:
        rank = rank[0] if isinstance(rank, tuple) else rank
        return module.Options(rank=min(rank, math.prod(stack.shape)))
    if "energy" not in known:
        raise errors.ConfigError(f"decomposition={config.decomposition}: cannot choose ranks by energy; give --rank")
    if "error" in known and config.energy < 1:  # of all axes together; their own rule keeps that share on each
        return module.Options(error=math.sqrt(1.0 - config.energy))
    return module.Options(energy=config.energy)


def _figures(stack, x, values, space, found, exponent, config, energies, left):
    """What the manifest says of a layer beside its spectrum: errors of its own models, and of models left out.

    `x` is the stack on the host; `energies` and `left` are those of `subspace.missed`.
    """
    if found is not None:
        left = np.array(
            [_left(x, n, space, values, found, exponent) if found.counts[n] else left[n] for n in range(len(x))]
        )
    if not isinstance(space, subspace.LinearSubspace):
        held = _held_out_half(stack, stack.x, space, config)
        return {**subspace.error_figures(left, energies, stack.centred_energy()), **held}
    held = heldout.of_one_model(stack.gram, space.rank)
    return {**subspace.error_figures(left, energies, float(np.trace(stack.gram))), **held}


def _held_out_half(stack, x, space, config):
    """Held-out error of a Tucker fit: factors of half of the models, at the ranks of all, measured on the others.

    Both ways, the halves at random; squared error over that of the mean alone, or, where nothing was subtracted, over
    the squared norm. It says what the factors are worth to strangers, from half as many models: an upper estimate.
    """
    count = stack.num_models
    if count < 4:
        return {"held_out": None}
    plugin, ranks = plugins.load("decompositions", space.procedure.name), tuple(space.rank.values())
    rng = np.random.default_rng([config.seed, zlib.crc32(stack.name.encode("utf-8", "surrogatepass"))])
    order, half, left, alone = rng.permutation(count), count // 2, 0.0, 0.0
    for chosen, others in ((order[:half], order[half : 2 * half]), (order[half : 2 * half], order[:half])):
        part = stack.take(np.sort(chosen))
        options = _options(plugin, config, part, ranks if len(ranks) > 1 else ranks[0])
        with jax.enable_x64(True):
            own = _again.fit(plugin, part, options, layers.layer_key(stack.name, config.seed))
        del part
        hostmemory.trim()
        more = _missed_of(own, x, others, count)
        left, alone = left + more[0], alone + more[1]
    return {"held_out": float(left / alone) if alone > 0 else None, "held_out_by": "half of the models"}


def _missed_of(space, x, models, count):
    """(squared error, squared distance to the mean; of low-rank updates squared norm) of some of the first `count`."""
    if isinstance(x, tuple) or len(x.sharding.device_set) > 1:
        energies, left = subspace.missed(space, x, subspace.project(space, x)[:count])
        return left[models].sum(), (energies if isinstance(x, tuple) else subspace.from_mean(space, x))[models].sum()
    left = alone = 0.0
    for n in models:  # one at a time: nothing as large as the stack
        row = x[n : n + 1]
        left += subspace.missed(space, row, subspace.project(space, row))[1][0]
        alone += subspace.from_mean(space, row)[0]
    return left, alone


def _left(x, n, space, values, found, exponent):
    """Squared error of the n-th model with its corrections."""
    again = precision.scaled(np.asarray(space.reconstruct(values[n : n + 1])), exponent)
    again = found.take([n], again[0].size).applied(np.array(again))
    return np.square(np.asarray(x[n], np.float64) - np.ldexp(np.asarray(again[0], np.float64), -exponent)).sum()
