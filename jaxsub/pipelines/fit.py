"""`jaxsub fit`: a subspace for every layer of a collection, and its models as coefficients: a bundle.

open (headers) -> plan -> layer by layer: stack, decomposition, coefficients -> bundle folder
"""

import dataclasses
import logging
import math
import os

import jax
import numpy as np

from jaxsub import (
    bundle,
    collection as collections,
    config as configs,
    descriptors,
    errors,
    formats,
    heldout,
    lineup,
    placement,
    plugins,
    precision,
    spectrum,
    stacks,
    subspace,
)
from jaxsub.bundle import allocation, cores
from jaxsub.linalg import gram
from jaxsub.pipelines import aside, layers, plan, progress

log = logging.getLogger("jaxsub")
WORKING_COPIES = 4  # of a stack in the dtype of its products: itself, centred, the kernels' own, the rebuilt one


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of a fit; each can be set as --config.<field>=."""

    collection: tuple[str, ...] = ()  # folders, globs, or text files of paths
    layers: tuple[str, ...] = ()  # regular expressions; only layers that match one; the others are kept whole
    exclude_layers: tuple[str, ...] = ()  # layers to keep whole
    view: str = "weights"  # weights, or lora_factors (A and B apart)
    decomposition: str = ""  # gram (the default of dense layers), hooi (of LoRA), randomized, hosvd, row_pca, ...
    rank: int = 0  # components a layer; 0: as many as `energy` asks for
    energy: float = 0.9  # share of each layer's centred energy
    budget_bytes: int = 0  # of the whole bundle: chooses ranks across layers by energy a byte; reads weights twice
    strict: bool = False  # any model set aside is fatal
    max_quarantined: int = -1  # models that may be set aside; -1: max(1, 5 %)
    allow_roots: tuple[str, ...] = ()  # folders that links may lead into
    max_host_bytes: int = 0  # bound on the plan's peak; 0: what is free
    seed: int = 0
    dry_run: bool = False


def run(config, path=None, *, stream=None):
    """Fits a bundle and saves it in the new folder `path` (nothing is written without one).

    Returns:
        Bundle; with `dry_run`, the plan as text.

    Raises:
        ConfigError, InputError, WorkdirError, ResourceError: see `jaxsub.errors`.
    """
    if not config.collection:
        raise errors.ConfigError("no collection: give --collection=FOLDER (or a glob, or a .txt file of paths)")
    validate(config)
    opened = collections.open_collection(
        list(config.collection),
        allow_roots=config.allow_roots,
        max_quarantined=None if config.max_quarantined < 0 else config.max_quarantined,
        strict=config.strict,
    )
    return fit(opened, config, path, stream=stream)


def validate(config):
    """Raises ConfigError for values that no run could use, before anything is read."""
    if config.rank < 0 or not 0 < config.energy <= 1:
        raise errors.ConfigError(f"rank={config.rank}, energy={config.energy}: a rank of 1 or more, or 0 < energy <= 1")
    if config.budget_bytes < 0 or (config.budget_bytes and config.rank):
        raise errors.ConfigError(f"budget_bytes={config.budget_bytes}, rank={config.rank}: a budget chooses the ranks")
    if not 0 <= config.seed < 2**63:
        raise errors.ConfigError(f"seed={config.seed}: must lie in 0 .. 2**63 - 1")
    if config.decomposition:
        plugins.load("decompositions", config.decomposition)
    if plugins.load("views", config.view).NEEDS_BASE:
        raise errors.ConfigError(f"view={config.view}: fit has no base yet; use weights or lora_factors")


def fit(opened, config, path=None, *, stream=None):
    """`run` on a Collection that is open already."""
    validate(config)
    return aside.going_on(lambda left: _fit(left, config, path, stream), opened, config)


def _fit(opened, config, path, stream):
    if path is not None and os.path.lexists(path):
        raise errors.WorkdirError(f"{errors.quote(path)}: exists already; remove it or give another folder")
    groups = _groups(opened, config)
    needed = max(map(_peak, groups))
    if config.dry_run:
        return _plan_text(groups, needed)
    free = config.max_host_bytes or plan.available_bytes()
    if free and needed > free:
        worst = max(groups, key=_peak)
        raise errors.ResourceError(
            f"layer {errors.quote(worst.name)} needs {plan.size(needed)} on the host, {plan.size(free)} are allowed or "
            "free; allow more with --config.max_host_bytes, or leave it whole with --exclude_layers"
        )
    passes = 2 if config.budget_bytes else 1
    empty = bundle.Bundle(
        model_ids=tuple(r.id for r in opened.refs),
        layers=(),
        passthrough=_passthrough(opened, groups),
        originals={r.id: _file_bytes(r.path) for r in opened.refs},
        provenance=_provenance(opened, config),
    )
    with progress.Progress(passes * sum(g.num_bytes for g in groups), passes * len(groups), stream=stream) as bar:

        def fitted(ranks):
            found = []
            for group, rank in zip(groups, ranks, strict=True):
                found.append(_layer(group, opened, config, rank))
                bar.layer(group.name, group.num_bytes, f"N={len(group.members)}")
            return dataclasses.replace(empty, layers=tuple(found))

        if config.budget_bytes:
            least = fitted([1] * len(groups))
            result = fitted(_ranks(least, config.budget_bytes))
        else:
            result = fitted([config.rank] * len(groups))
    count = result.accounting()
    if count["total"] > count["originals"]:
        log.warning(
            "the bundle takes %s, more than the files' %s: take fewer components or more models",
            plan.size(count["total"]),
            plan.size(count["originals"]),
        )
    if path is not None:
        result.save(path)
    return result


def _groups(opened, config):
    """Layer groups to fit.

    Raises:
        ConfigError: low-rank updates that the decomposition does not take, or nothing is left.
    """
    is_chosen = lineup.layer_filter(config.layers or None, config.exclude_layers or None)
    groups = [g for g in plugins.load("views", config.view).groups(opened) if is_chosen(g.name)]
    groups = [g for g in groups if len(g.members) >= lineup.SMALLEST_GROUP]
    for group in groups:
        if group.parametrisation == lineup.LORA and not hasattr(_module(group, config), "TAKES_LORA"):
            raise errors.ConfigError(
                f"decomposition={config.decomposition} takes no low-rank updates such as {errors.quote(group.name)}: "
                "hooi and hosvd do, --view=lora_factors gives it A and B, --exclude_layers leaves such layers whole"
            )
        if group.parametrisation == lineup.LORA and len(group.shape) != 2:
            raise errors.ConfigError(
                f"layer {errors.quote(group.name)} is a low-rank update of a convolution: not fitted yet; "
                "leave it whole with --exclude_layers"
            )
    if not groups:
        raise errors.ConfigError("no layer to fit: none that at least 3 models have matches --layers, --exclude_layers")
    return groups


def _module(group, config):
    """The decomposition of a group: the one that is asked for, else the default of its kind."""
    default = "hooi" if group.parametrisation == lineup.LORA else "gram"
    return plugins.load("decompositions", config.decomposition or default)


def _ranks(least, budget):
    """A rank a layer, (k,) or (k_0, k_1, ...), for a bundle of `budget` bytes, from the spectra of a fit of rank 1.

    Raises:
        ConfigError: what does not depend on the ranks takes more.
    """
    choices = []
    for layer in least.layers:
        space, count = layer.subspace, len(layer.model_ids)
        if not layer.is_linear and len(space.factors) != len(layer.shape):
            raise errors.ConfigError(f"budget_bytes: {space.procedure.name} reduces one axis only; give --rank")
        spectra = [space.spectrum] if layer.is_linear else [space.spectra[axis] for axis in sorted(space.spectra)]
        sizes = [math.prod(layer.shape)] if layer.is_linear else layer.shape
        itemsize, is_lora = layer.values.dtype.itemsize, layer.parametrisation == lineup.LORA
        kept = [np.square(np.where(s.values > s.floor, s.values, 0.0))[: space.procedure.cap] for s in spectra]
        base = tuple(size * itemsize for size in sizes)
        inner = np.array(layer.figures["energies_of_ranks"]) if is_lora else None
        whole = () if layer.is_linear else sizes
        choices.append(allocation.Choice(tuple(kept), base, count, itemsize, least=1, inner=inner, whole=whole))
    spent = sum(c.num_bytes([1] * len(c.all_energies)) for c in choices)
    fixed = least.accounting()["total"] - spent
    if fixed + spent > budget:
        raise errors.ConfigError(
            f"budget_bytes={budget}: means, kept layers, headers and one component a layer take {fixed + spent} bytes"
        )
    return allocation.allocate(choices, budget - fixed)


def _layer(group, opened, config, rank):
    """The fitted bundle.Layer of a group; `rank` a number, one for each axis, or 0 to go by energy."""
    models = [opened.models[m] for m in group.members]
    ids = tuple(opened.refs[m].id for m in group.members)
    if group.parametrisation == lineup.LORA:
        return _lora_layer(group, models, ids, config, rank)
    x = placement.read_stack(group, models)
    exponent = _exponent(x)
    if exponent:  # squares would leave the range of the dtype
        x = np.ldexp(x, -exponent)
    module = _module(group, config)
    with jax.enable_x64(True):
        stack = stacks.DenseStack.create(x, group.name, ids)
        key = layers.layer_key(group.name, config.seed)
        space = subspace.stored(module.fit(stack, _options(module, config, stack, rank), key), _dtype(group.dtypes))
        values = np.asarray(space.project(stack.x))
        figures = _figures(stack.x, values, space)
    if exponent:
        space, values = subspace.scaled(space, exponent), np.ldexp(values, exponent)
    return bundle.Layer(group.name, space, ids, values, tuple(t.dtype for t in group.entries), figures)


def _lora_layer(group, models, ids, config, rank):
    """The fitted bundle.Layer of low-rank updates, from their factors; `rank` may be (k_o, k_i, rank of the cores)."""
    module = _module(group, config)
    rank, inner = (rank[:2], rank[2]) if isinstance(rank, tuple) else (rank, None)
    dtypes = tuple(precision.widest(t.dtype for t in (e.a, e.b)) for e in group.entries)
    stack = stacks.LoraStack(*placement.read_factors(group, models), group.name, ids)
    with jax.enable_x64(True):
        space = module.fit(stack, _options(module, config, stack, rank), layers.layer_key(group.name, config.seed))
        space = subspace.stored(space, _dtype(dtypes))
        values = np.asarray(space.project_factors(stack.a, stack.b, stack.scales))
        energies, left = subspace.missed(space, (stack.a, stack.b, stack.scales), values)
    halves = cores.halves(values, inner or stack.a.shape[1])
    if halves:
        whole, values = values, cores.joined(halves)
        left = left + np.square(whole.astype(np.float64) - values).sum(axis=(1, 2))
    inside = cores.energies(stack.a, stack.b, stack.scales).tolist()
    figures = {**_errors(left, energies, energies.sum()), "held_out": None, "energies_of_ranks": inside}
    return bundle.Layer(group.name, space, ids, values, dtypes, figures, lineup.LORA, halves)


def _dtype(dtypes):
    """What a layer's basis and coefficients are stored in."""
    return "float64" if "float64" in dtypes else "float32"


def _exponent(x):
    """Power of two that brings the largest entry near 1; 0 where squares are safe as they are."""
    if x.dtype.itemsize < 4:
        return 0  # computed in float32, whose range squares of narrower numbers do not leave often enough to matter
    largest = max(-float(x.min()), float(x.max()), 0.0)
    exponent = math.frexp(largest)[1] if largest else 0
    return 0 if abs(exponent) <= precision.SAFE_EXPONENT else exponent


def _options(module, config, stack, rank):
    """A decomposition's Options for a rank (see `_layer`) or for config.energy, as far as it has them."""
    known = {f.name for f in dataclasses.fields(module.Options)}
    if rank and "ranks" in known:
        every = rank if isinstance(rank, tuple) else (rank,) * len(stack.shape)
        return module.Options(ranks=tuple(min(k, size) for k, size in zip(every, stack.shape, strict=True)))
    if rank:
        return module.Options(rank=rank[0] if isinstance(rank, tuple) else rank)
    if "energy" not in known:
        raise errors.ConfigError(f"decomposition={config.decomposition}: cannot choose ranks by energy; give --rank")
    return module.Options(energy=config.energy)


def _figures(x, values, space):
    """What the manifest says of a layer beside its spectrum: errors of its own models, and of models left out."""
    count, width = len(x), math.prod(x.shape[1:])
    energies, left = subspace.missed(space, x, values)
    dtype = precision.compute_dtype(str(x.dtype), count**2 * width)
    flat = x.reshape(count, width)
    sums, _ = gram.dense_gram(flat, np.zeros((0, count), np.float32), mesh=placement.make_mesh(1), dtype=dtype)
    centred = spectrum.centred(np.asarray(sums.gram))
    total, held = float(np.trace(centred)), None
    if isinstance(space, subspace.LinearSubspace) and total > 0 and space.rank <= count - 2:
        held = float(heldout.leave_one_out(centred, [space.rank])[0])
    return {**_errors(left, energies, total), "held_out": held}


def _errors(left, energies, total):
    """Figures from squared errors and norms of the models, and the energy that the fit set out to hold."""
    relative = np.sqrt(left / np.where(energies > 0, energies, 1.0))
    return {
        "energy_kept": 1.0 - float(left.sum()) / total if total > 0 else 1.0,  # below 0: worse than the mean alone
        "error_mean": float(relative.mean()),
        "error_max": float(relative.max()),
    }


def _passthrough(opened, groups):
    """Model id -> {tensor name: array} of all that no group covers."""
    covered = [set() for _ in opened.models]
    for group in groups:
        for member, entry in zip(group.members, group.entries, strict=True):
            covered[member].update(
                [entry.a.name, entry.b.name] if group.parametrisation == lineup.LORA else [entry.name]
            )
    found = {}
    for ref, model, names in zip(opened.refs, opened.models, covered, strict=True):
        pairs = [t for pair in model.adapters.values() for t in (pair.a, pair.b)]
        kept = [t for t in (*model.tensors.values(), *pairs) if t.name not in names]
        found[ref.id] = {t.name: formats.read(model, t) for t in kept}
    return found


def _file_bytes(path):
    """Bytes of a model's file, or of all files in its folder."""
    if not os.path.isdir(path):
        return os.path.getsize(path)
    return sum(os.path.getsize(os.path.join(folder, name)) for folder, _, names in os.walk(path) for name in names)


def _peak(group):
    """Host bytes that a layer needs at most, from its header."""
    if group.parametrisation == lineup.LORA:
        rank = max(e.rank for e in group.entries)
        return 4 * WORKING_COPIES * len(group.members) * rank * sum(group.shape) + 24 * max(group.shape) ** 2
    size = len(group.members) * math.prod(group.shape)
    stored = descriptors.numpy_dtype(precision.widest(group.dtypes)).itemsize
    return size * (stored + WORKING_COPIES * max(stored, 4))


def _plan_text(groups, needed):
    lines = [f"{'layer':42} {'shape':>18} {'models':>7} {'to read':>10} {'host':>10}"]
    for g in groups:
        shape = "x".join(map(str, g.shape))
        lines.append(
            f"{errors.quote(g.name, 42):42} {shape:>18} {len(g.members):>7} {plan.size(g.num_bytes):>10} "
            f"{plan.size(_peak(g)):>10}"
        )
    total = plan.size(sum(g.num_bytes for g in groups))
    return "\n".join([*lines, f"to read: {total}; peak host memory beyond the program's own: {plan.size(needed)}"])


def table(result):
    """The layers of a Bundle and its bytes, as text of at most 100 columns."""
    lines = [f"{'layer':39} {'shape':>16} {'models':>6} {'rank':>9} {'kept':>7} {'held out':>9} {'error':>8}"]
    for layer in result.layers:
        rank = layer.subspace.rank
        rank = "x".join(map(str, rank.values())) if isinstance(rank, dict) else str(rank)
        rank += f"/{layer.halves[0].shape[2]}" if layer.halves else ""
        held, figures = layer.figures["held_out"], layer.figures
        held = "" if held is None else f"{held:.3f}"
        lines.append(
            f"{errors.quote(layer.name, 39):39} {'x'.join(map(str, layer.shape)):>16} {len(layer.model_ids):>6} "
            f"{rank:>9} {figures['energy_kept']:>7.3f} {held:>9} {figures['error_max']:>8.2e}"
        )
    lines.append("kept: share of the centred energy; held out: share missed on a model left out; error: of the worst")
    if any(layer.halves for layer in result.layers):
        lines.append("rank: of the axes, and of the models' cores where these are kept as products of two halves")
    count = result.accounting()
    sizes = {name: plan.size(value) for name, value in count.items() if name not in ("ratio", "break_even")}
    lines.append(f"bundle {sizes['total']}, files {sizes['originals']}: {count['ratio']:.2f} times the bundle")
    lines.append(", ".join(f"{name} {sizes[name]}" for name in ("mean", "basis", "coefficients", "passthrough")))
    number = f"{count['break_even']} models" if count["break_even"] else "no number of models"
    lines.append(f"smaller than the files from {number} on, at these ranks")
    return "\n".join(lines)


def _provenance(opened, config):
    from jaxsub import __version__

    return {
        "program": "fit",
        "config": configs.to_dict(config),
        "config_digest": configs.digest(config),
        "collection_fingerprint": opened.fingerprint,
        "jaxsub_version": __version__,
        "quarantined": [dict(q) for q in opened.quarantined],
        "models": [{"id": r.id, "path": r.path, "format": r.format} for r in opened.refs],
    }
