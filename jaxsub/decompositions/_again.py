"""A fit whose solver failed, made once more: singular vectors of each axis by NumPy in float64.

    fit(plugin, stack, options, key)  --finite--> as the plug-in says
                                      --NaN, Inf--> HOSVD (principal components for rows), flagged "solved_again"

Alternating and sequential methods are replaced by what they start from. On the host, from a QR factorisation of each
unfolding, so that no product squares anything; slow, and never needed unless a library's solver is broken.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxsub import errors, hostmemory, solvers, stacks, subspace
from jaxsub.decompositions import _fit

FLAG = "solved_again"
CENTRING = {"col_svd": "none", "lora_tucker": "none", "lora_cov": "columns", "lora_col_svd": "columns"}


def fit(plugin, stack, options, key):
    """The subspace that a decomposition finds, finite throughout.

    Args:
        plugin: module of `jaxsub.decompositions`.
        stack: DenseStack or LoraStack.
        options: the plug-in's Options.
        key: typed PRNG key of the layer.

    Raises:
        SolverError: neither way gives finite numbers.
    """
    try:
        with hostmemory.one_blas_thread(side(plugin, stack.num_models, stack.shape)):
            found = plugin.fit(stack, options, key)
            if _is_finite(found):
                return found
    except FloatingPointError:
        found = None
    name = plugin.__name__.rpartition(".")[2]
    solvers.note(f"{errors.quote(stack.name)}: {name} gave numbers that are not finite; fitted again by NumPy's SVD")
    try:
        found = _fitted(plugin, stack, options, name)
    except (np.linalg.LinAlgError, errors.SolverError) as error:
        raise errors.SolverError(f"{name} and NumPy's SVD: {error}").of(stack.name) from error
    if not _is_finite(found):
        raise errors.SolverError(f"{name} and NumPy's SVD: no numbers that are finite").of(stack.name)
    return found


def side(plugin, num_models, shape):
    """Side of the largest eigenproblem of a decomposition: of the models, and but for rows of each weight axis."""
    return num_models if hasattr(plugin, "BY_ROWS") else max(num_models, *shape)


def _is_finite(space):
    linear = isinstance(space, subspace.LinearSubspace)
    arrays = [space.mean, *([space.basis] if linear else space.factors.values())]
    spectra = [space.spectrum] if linear else space.spectra.values()
    numbers = [space.certificate.relative_error, *(x for s in spectra for x in (*s.values, s.total_energy, s.floor))]
    return all(map(math.isfinite, numbers)) and all(bool(_all_finite(x)) for x in arrays)


@jax.jit
def _all_finite(x):
    return jnp.isfinite(x).all()


def _fitted(plugin, stack, options, name):
    """The subspace of a plug-in's kind, by singular vectors of unfoldings."""
    with jax.enable_x64(True):
        if hasattr(plugin, "BY_ROWS"):
            return _linear(stack, options, name)
        if isinstance(stack, stacks.LoraStack):
            rows = {axis: _lora_rows(stack, axis) for axis in (0, 1)}
            mean, centring, tall = np.zeros((1, 1)), "none", stack.a.dtype
            ranks = tuple(options.ranks) or None
        else:
            axes, centring = _axes(stack, options, name), CENTRING.get(name, "models")
            y, mean = stack.centred(centring, axes[0] if centring == "columns" else None)
            y, mean, tall = np.asarray(y, np.float64), np.asarray(mean), y.dtype
            y = y if stack.present is None else y[stack.present]
            rows = {axis: np.moveaxis(y, axis + 1, -1).reshape(-1, stack.shape[axis]) for axis in axes}
            ranks = tuple(getattr(options, "ranks", ())) or ((options.rank,) if getattr(options, "rank", 0) else None)
        factors, spectra, tails = {}, {}, 0.0
        for place, (axis, tall_rows) in enumerate(rows.items()):
            s, vectors, spectrum = _axis(tall_rows)
            rank = min(ranks[place], len(vectors)) if ranks else spectrum.rank_of(getattr(options, "energy", 0.9))
            rank = rank or len(s)
            factors[axis], spectra[axis] = jnp.asarray(vectors[:rank].astype(tall)), spectrum
            tails += np.square(s[rank:]).sum()
        total = max(s.total_energy for s in spectra.values())
        bound = math.sqrt(min(tails / total, 1.0)) if total > 0 else 0.0  # E12: at most the sum of the tails
        procedure = subspace.Procedure(
            "hosvd", tuple(map(str, rows)), centring, max(stack.shape), flags=(FLAG,), reference=f"in place of {name}"
        )
        certificate = subspace.Certificate(bound, bound * (1 + 1e-6) + 1e-12, exact=False, passes=2)
        return subspace.TuckerSubspace(jnp.asarray(mean), factors, spectra, stack.shape, procedure, certificate)


def _axes(stack, options, name):
    """The axes that a plug-in for dense stacks reduces."""
    if name == "col_svd":
        return (0,)
    if name == "row_pca":
        return (1,)
    if name in ("lora_cov", "lora_col_svd", "lora_tucker"):
        return (_fit.long_axis(stack)[0],)
    return tuple(options.axes) or tuple(range(len(stack.shape)))


def _linear(stack, options, name):
    y, mean = stack.rows()
    s, vectors, spectrum = _axis(np.asarray(y, np.float64))
    cap = _fit.row_cap(stack)
    spectrum = dataclasses.replace(spectrum, values=spectrum.values[:cap])
    wanted = {"rank": min(options.rank, cap), "energy": getattr(options, "energy", 0.9)}
    rank, procedure, certificate = _fit.rows_of(spectrum, cap, "gram", f"in place of {name}", **wanted)
    procedure = dataclasses.replace(procedure, flags=(FLAG,))
    basis = np.where((s[:rank] > spectrum.floor)[:, None], vectors[:rank], 0.0).astype(y.dtype)
    mean = jnp.asarray(np.asarray(mean))  # of several devices' features, on one
    return subspace.LinearSubspace(mean, jnp.asarray(basis), spectrum, stack.shape, procedure, certificate)


def _axis(rows):
    """(singular values, directions (min(rows, d), d) with their largest entry positive, Spectrum) of rows (m, d)."""
    if len(rows) > rows.shape[1]:
        rows = np.linalg.qr(rows, mode="r")
    else:
        q, r = np.linalg.qr(rows.T)  # (d, m): directions are q times those of the small factor
        u, s, _ = solvers.svd(r)
        return s, _signed((q @ u).T), _spectrum(s)
    _, s, vt = solvers.svd(rows)
    return s, _signed(vt), _spectrum(s)


def _spectrum(s):
    floor = float(s[0]) * len(s) * float(np.finfo(np.float64).eps) if len(s) else 0.0
    return subspace.Spectrum(s, float(np.square(s).sum()), floor)


def _signed(rows):
    largest = rows[np.arange(len(rows)), np.abs(rows).argmax(1)]
    return rows * np.where(largest < 0, -1.0, 1.0)[:, None]


def _lora_rows(stack, axis):
    """(N r, d) rows with the right singular vectors of the updates' axis, from their factors."""
    found, count = [], stack.num_models  # updates of zero behind these only fill the devices
    sides = (np.asarray(x[:count], np.float64) for x in (stack.a, stack.b))
    for a, b, scale in zip(*sides, stack.scales[:count], strict=True):
        right, left = (a, b) if axis else (b.T, a.T)
        found.append(scale * np.linalg.qr(left, mode="r") @ right)
    return np.concatenate(found)
