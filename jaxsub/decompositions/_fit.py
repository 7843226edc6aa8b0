"""What the decompositions share: what is subtracted first, and results in the words of `subspace`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxsub import errors, hostmemory, precision, subspace
from jaxsub.linalg import operands, svd, tucker


@dataclasses.dataclass(frozen=True)
class TuckerOptions:
    """The first of `ranks`, `error`, `energy` that is given chooses the ranks."""

    ranks: tuple[int, ...] = ()  # one for each axis of `axes`
    error: float = 0.0  # relative error that the fit may have
    energy: float = 0.9  # share of its energy that each axis keeps
    axes: tuple[int, ...] = ()  # weight axes to reduce; all by default


def fit_tucker(kernel, name, reference, stack, options, **more):
    """TuckerSubspace of the centred stack, models axis free, by a kernel of `linalg.tucker`."""
    with jax.enable_x64(True):
        axes, chosen = rule(stack, options)
        y, mean = stack.centred()
        cap = max(stack.shape[a] for a in axes)
        found = kernel(y, dtype=dtype_of(stack, cap), **chosen, **more)
        procedure = subspace.Procedure(name, tuple(map(str, axes)), "models", cap, reference=reference)
        certificate = subspace.Certificate(
            float(found.error), float(found.certificate), exact=True, passes=int(found.num_passes)
        )
        factors = {a: alone(found.factors[a + 1]) for a in axes}
        spectra = {a: spectrum_of(found, a + 1) for a in axes}
        return subspace.TuckerSubspace(mean, factors, spectra, stack.shape, procedure, certificate)


def fit_factored(kernel, name, reference, stack, options, **more):
    """TuckerSubspace of a LoraStack by a kernel of `linalg.factored`: two factors, nothing subtracted first."""
    if tuple(options.axes) not in ((), (0, 1)):
        raise errors.ConfigError(f"axes={tuple(options.axes)}: both axes of low-rank updates are reduced")
    _, chosen = rule(stack, options)
    chosen.pop("axes", None)
    if "ranks" in chosen:
        chosen["ranks"] = chosen["ranks"][1:]
    with jax.enable_x64(True):
        dtype = dtype_of_updates(str(stack.a.dtype), stack.num_models, stack.a.shape[1], stack.shape)
        found = kernel(stack.a, stack.b, stack.scales, dtype=dtype, **chosen, **more)
        cap = min(max(stack.shape), stack.num_models * stack.a.shape[1])
        procedure = subspace.Procedure(name, ("0", "1"), "none", cap, reference=reference)
        certificate = subspace.Certificate(
            float(found.error), float(found.certificate), exact=True, passes=int(found.num_passes)
        )
        spectra = {axis: spectrum_of(found, axis) for axis in (0, 1)}
        factors = dict(enumerate(map(alone, found.factors)))
        mean = jnp.zeros((1, 1), factors[0].dtype)
        return subspace.TuckerSubspace(mean, factors, spectra, stack.shape, procedure, certificate)


def dtype_of(stack, axis_size):
    """'float32' or 'float64' for products that contract a stack with itself to (axis_size, axis_size)."""
    return precision.compute_dtype(str(stack.x.dtype), stack.num_models * stack.num_features * axis_size)


def dtype_of_updates(storage, count, rank, shape):
    """The same for `count` low-rank updates of this rank and shape (o, i), stored as `storage`."""
    return precision.compute_dtype(storage, count * rank * sum(shape) * max(shape))


def alone(x):
    """An array that several devices hold whole, on one."""
    return x if len(x.sharding.device_set) == 1 else jnp.asarray(np.asarray(x))


def axis_spectrum(y, axis, dtype):
    """All directions of weight axis `axis` of a stack y (N, *shape): ((d, d) rows, Spectrum)."""
    ranks = tuple(y.shape[axis + 1] if a == axis + 1 else None for a in range(y.ndim))
    found = tucker.hosvd(y, ranks=ranks, dtype=dtype, method="lapack", certify="norms")
    return alone(found.factors[axis + 1]), spectrum_of(found, axis + 1)


def spectrum_of(found, axis):
    """Spectrum of one axis of a `tucker.Tucker`."""
    energies = np.asarray(found.energies[axis], np.float64)
    return subspace.Spectrum(np.sqrt(energies), float(found.totals[axis]), float(np.sqrt(found.floors[axis])))


def axis_subspace(stack, mean, axis, factor, spectrum, procedure, *, passes):
    """TuckerSubspace of one factor (k, d): its error is the tail of the axis' energies (E11)."""
    total, kept = spectrum.total_energy, np.square(spectrum.values[: len(factor)]).sum()
    error = float(np.sqrt(max(total - kept, 0.0) / total)) if total > 0 else 0.0
    # What lies under the floor was not measured: it may be missing from the tail.
    slack = spectrum.floor / np.sqrt(total) if total > 0 else 0.0
    certificate = subspace.Certificate(error, float(np.hypot(error, slack)), exact=True, passes=passes)
    return subspace.TuckerSubspace(mean, {axis: factor}, {axis: spectrum}, stack.shape, procedure, certificate)


def rule(stack, options):
    """Keyword arguments of the Tucker kernels for options with `ranks`, `energy`, `error` and `axes`.

    Raises:
        ConfigError: several rules at once, or axes and ranks that do not fit the weights.
    """
    ndim = len(stack.shape)
    axes = tuple(options.axes) or tuple(range(ndim))
    if any(not 0 <= a < ndim for a in axes) or len(set(axes)) != len(axes):
        raise errors.ConfigError(f"axes={axes}: weights of shape {stack.shape} have axes 0 to {ndim - 1}")
    if options.ranks:
        if len(options.ranks) != len(axes):
            raise errors.ConfigError(f"ranks={tuple(options.ranks)}: one for each of the axes {axes}")
        for axis, rank in zip(axes, options.ranks, strict=True):
            operands.require_rank(rank, stack.shape[axis], f"axis {axis}")
        ranks = dict(zip(axes, options.ranks, strict=True))
        return axes, {"ranks": (None, *(ranks.get(a) for a in range(ndim)))}
    shifted = tuple(a + 1 for a in axes)
    if options.error > 0:
        return axes, {"error": options.error, "axes": shifted}
    if not 0 < options.energy <= 1:
        raise errors.ConfigError(f"energy={options.energy}: must lie in (0, 1]")
    return axes, {"energy": options.energy, "axes": shifted}


def row_cap(stack):
    """Most components that N centred models of D weights can have; of a stack, or of its Statistics."""
    return min(stack.num_models - 1, stack.num_features)


def fit_rows(name, reference, stack, *, rank, energy):
    """LinearSubspace of the models as rows, by their Gram matrix; rank 0 takes as many components as `energy` needs.

    Of float64 models by LAPACK's SVD of the rows: a Gram matrix would keep half of their digits.
    """
    cap = row_cap(stack)
    require_rows(rank, energy, cap, stack.num_models)
    with jax.enable_x64(True):
        is_whole = stack.present is None
        are_equal = is_whole and not stack.gram.any()
        hostmemory.trim()  # what the kernel took to compile is not needed beside the centred copy
        y, mean = stack.rows()
        if are_equal:
            spectrum, procedure, certificate = of_equal(cap, name, reference)
            return subspace.LinearSubspace(mean, y[:0], spectrum, stack.shape, procedure, certificate)
        if stack.x.dtype == jnp.float64:
            return _by_rows(y, mean, stack, name, reference, rank=rank, energy=energy)
        dtype = dtype_of(stack, min(stack.num_models, stack.num_features))
        # The Gram matrix of the models, which held-out errors are of too; else that of the features, made here.
        known = [stack.gram] if is_whole and stack.num_models <= stack.num_features else []
        found = svd.of_shared(svd.gram_svd, y, *known, rank=rank or 1, dtype=dtype)
        spectrum = subspace.Spectrum(np.asarray(found.s)[:cap], float(found.energy), float(found.floor))
        chosen, procedure, certificate = rows_of(spectrum, cap, name, reference, rank=rank, energy=energy)
        if not rank:
            found = svd.of_shared(svd.gram_svd, y, *known, rank=chosen, dtype=dtype)
        return subspace.LinearSubspace(mean, found.vt, spectrum, stack.shape, procedure, certificate)


def of_equal(cap, name, reference):
    """(Spectrum, Procedure, Certificate) of models that are all equal: they are their mean, with no direction."""
    procedure = subspace.Procedure(name, ("models",), "models", cap, reference=reference)
    return subspace.Spectrum(np.zeros(cap), 0.0, 0.0), procedure, subspace.Certificate(0.0, 0.0, exact=True, passes=1)


def _by_rows(y, mean, stack, name, reference, *, rank, energy):
    found, cap = svd.thin_svd(y), row_cap(stack)
    s = np.asarray(found.s)
    spectrum = subspace.Spectrum(s[:cap], float(np.square(s).sum()), precision.factor_floor(float(s[0]), len(s)))
    rank, procedure, certificate = rows_of(spectrum, cap, name, reference, rank=rank, energy=energy)
    basis = jnp.where((found.s[:rank] > spectrum.floor)[:, None], found.vt[:rank], 0.0)
    return subspace.LinearSubspace(mean, basis, spectrum, stack.shape, procedure, certificate)


def require_rows(rank, energy, cap, num_models):
    """Raises ConfigError for a rank that `num_models` centred rows cannot have, or an energy that is none."""
    if rank:
        operands.require_rank(rank, cap, f"a centred stack of {num_models} models")
    elif not 0 < energy <= 1:
        raise errors.ConfigError(f"energy={energy}: must lie in (0, 1]")


def rows_of(spectrum, cap, name, reference, *, rank, energy):
    """(rank, Procedure, Certificate) of principal components of rows, from their Spectrum."""
    needed = rank or spectrum.rank_of(energy)
    rank, reached = needed or cap, needed is not None
    total = spectrum.total_energy
    left = max(total - float(np.square(spectrum.values[:rank]).sum()), 0.0)
    error = float(np.sqrt(left / total)) if total > 0 else 0.0
    # What lies under the floor was not measured: it may be missing from the tail, or from the basis.
    slack = spectrum.floor * np.sqrt(rank / total) if total > 0 else 0.0
    certificate = subspace.Certificate(error, float(np.hypot(error, slack)), exact=True, passes=2)
    return rank, subspace.Procedure(name, ("models",), "models", cap, reached=reached, reference=reference), certificate


def long_axis(stack):
    """(axis, cap): the longer axis of a stack of LoRA factors, and the most directions it can show.

    Raises:
        ConfigError: if the weights are not matrices.
    """
    if len(stack.shape) != 2:
        raise errors.ConfigError(f"a LoRA factor is a matrix, not of shape {tuple(stack.shape)}")
    axis = int(stack.shape[1] > stack.shape[0])
    return axis, min(stack.shape[axis], stack.num_models * stack.shape[1 - axis])


def fit_columns(name, reference, stack, *, rank, faithful):
    """TuckerSubspace of LoRA factors side by side, one mean for each entry of the long axis."""
    axis, cap = long_axis(stack)
    rank = min(rank, cap)
    operands.require_rank(rank, cap, "the stack")
    with jax.enable_x64(True):
        y, mean = stack.centred("columns", axis)
        rows, spectrum = axis_spectrum(y, axis, dtype_of(stack, stack.shape[axis]))
        procedure = subspace.Procedure(name, (str(axis),), "columns", cap, faithful=faithful, reference=reference)
        found = axis_subspace(stack, mean, axis, rows[:rank], spectrum, procedure, passes=2)
        if not faithful:
            return found
        # Projected without the mean: the error on the stack as it is, not the tail of the fit.
        bare = dataclasses.replace(found, mean=jnp.zeros_like(mean))
        x, _ = stack.centred("none")
        left = x.astype(jnp.float64) - bare.reconstruct(bare.project(x))
        error = float(jnp.sqrt(jnp.sum(jnp.square(left)) / jnp.sum(jnp.square(x.astype(jnp.float64)))))
        certificate = dataclasses.replace(found.certificate, relative_error=error, bound=error * (1 + 1e-5))
        return dataclasses.replace(bare, certificate=certificate)
