"""Fitted subspaces: what a decomposition returns. Projects models to coefficients and rebuilds them.

    LinearSubspace   w = mean + c @ basis                     c (n, k)
    TuckerSubspace   w = mean + c x_1 F_1^T x_2 F_2^T ...     c (n, k_1, k_2, ...), axes without a factor kept whole

Each names the procedure that made it, the axes, what was subtracted before the fit and the cap on its rank, and carries
the error of the fit. Not for files: that is `bundle`.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxsub import errors, precision
from jaxsub.linalg import dealt, factored, products, rebuild

GROUP = 64 * 2**20  # bytes of the host's models that are put on a device at once
CENTRINGS = ("models", "columns", "none")


@dataclasses.dataclass(frozen=True)
class Certificate:
    """Error of a fit on the data it was fitted to, relative to what was left after centring (Frobenius norms).

    In a bundle of what is stored, about its mean, which stays where models are appended; without corrections.
    """

    relative_error: float  # |X - X_k| / |X|
    bound: float  # never below the true error
    exact: bool  # an identity (E11, E12 of the specification's source), or an estimate
    passes: int  # how often the data were read
    confidence: float = 1.0  # that the true error is not above the bound


@dataclasses.dataclass(frozen=True)
class Procedure:
    """Who made a subspace, and how."""

    name: str
    axes: tuple[str, ...]  # "models", or weight axes as "0", "1", ...
    centring: str  # "models": their mean; "columns": one mean an entry of the axis; "none"
    cap: int  # the largest rank this procedure could have returned for this stack
    reached: bool = True  # whether the asked share of energy was reached within the cap
    faithful: bool = False  # as in the released code, defects included
    flags: tuple[str, ...] = ()  # what makes the figures look better than they are
    reference: str = ""


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """Singular values of what was fitted, all that are known, non-increasing."""

    values: np.ndarray  # (K,) float64
    total_energy: float  # sum of all squared values, known or not
    floor: float  # values under it are noise of the arithmetic

    @property
    def shares(self):
        """(K,) shares of the total energy."""
        return np.square(self.values) / self.total_energy if self.total_energy > 0 else np.zeros(len(self.values))

    def rank_of(self, energy):
        """Fewest leading values that hold `energy` of the total; None if they never do."""
        sums = np.cumsum(self.shares)
        found = int(np.searchsorted(sums, energy - 64 * np.finfo(np.float64).eps))
        return found + 1 if found < len(sums) else None


@dataclasses.dataclass(frozen=True)
class LinearSubspace:
    """Mean and orthonormal directions of models as flat rows."""

    mean: jax.Array  # (D,)
    basis: jax.Array  # (k, D) orthonormal rows; the largest entry of each is positive
    spectrum: Spectrum
    shape: tuple[int, ...]
    procedure: Procedure
    certificate: Certificate

    @property
    def rank(self):
        """k."""
        return self.basis.shape[0]

    def project(self, x):
        """Coefficients of models, c = (x - mean) @ basis.T.

        Args:
            x: (n, *shape) or (n, D) models.

        Returns:
            (n, k) in the basis' dtype.

        Raises:
            ConfigError: if `x` has another shape.
        """
        with jax.enable_x64(True):
            x, dtype = _at_hand(x, self.basis.dtype)
            _require(x, self.shape)
            return rebuild.project_rows(x, self.mean, self.basis, dtype=dtype, mesh=dealt.mesh_of(x, 1))

    def reconstruct(self, c):
        """Models (n, *shape) = mean + c @ basis from coefficients (n, k)."""
        with jax.enable_x64(True):
            is_shared = dealt.mesh_of(self.basis, 1) is not None
            rows = rebuild.rebuild_rows(_roomy(c, self.basis.dtype), self.mean, self.basis, is_shared=is_shared)
            return rows.reshape(rows.shape[0], *self.shape)


@dataclasses.dataclass(frozen=True)
class TuckerSubspace:
    """Mean and one orthonormal factor a reduced weight axis; the models axis is never reduced."""

    mean: jax.Array  # broadcasts to `shape`; zeros of shape (1, ..., 1) without centring
    factors: dict[int, jax.Array]  # weight axis -> (k_m, d_m) orthonormal rows
    spectra: dict[int, Spectrum]
    shape: tuple[int, ...]
    procedure: Procedure
    certificate: Certificate

    @property
    def dtype(self):
        """Of the factors, and so of coefficients."""
        return next(iter(self.factors.values())).dtype

    @property
    def rank(self):
        """Weight axis -> k_m."""
        return {axis: f.shape[0] for axis, f in self.factors.items()}

    def project(self, x):
        """Coefficients (n, k_1, k_2, ...) of models (n, *shape): (x - mean) times each factor on its axis (E7).

        Raises:
            ConfigError: if `x` has another shape.
        """
        with jax.enable_x64(True):
            x, dtype = _at_hand(x, self.dtype)
            _require(x, self.shape)
            x = x if x.shape[1:] == tuple(self.shape) else x.reshape(len(x), *self.shape)
            return rebuild.project_models(x, self.mean, self.factors, dtype=dtype, mesh=dealt.mesh_of(x))

    def project_factors(self, a, b, scales):
        """Coefficients (n, k_o, k_i) of low-rank updates scales_n b_n a_n; the products are never formed.

        Args:
            a: (n, r, i).
            b: (n, o, r).
            scales: (n,).
        """
        power = 0
        if isinstance(a, np.ndarray):
            a, b, scales, power = precision.unit_factors(a, b, scales)
        with jax.enable_x64(True):
            a, b = (jnp.asarray(x).astype(self.dtype) for x in (a, b))
            found = factored.cores(a, b, scales, self.factors[0], self.factors[1])
            return precision.scaled(np.asarray(found), power) if power else found

    def reconstruct_factors(self, c, rank=0):
        """(a (n, k, i), b (n, o, k)) of updates b_n a_n from coefficients (n, k_o, k_i); k is the smallest rank.

        For subspaces of low-rank updates: two factors, no mean.

        Args:
            c: (n, k_o, k_i) coefficients.
            rank: of the models themselves, where it is known: more of their cores is rounding, and is left out.
        """
        with jax.enable_x64(True):
            c = _roomy(c, self.dtype)
            u, v = (self.factors[axis].astype(c.dtype) for axis in (0, 1))
            if 0 < rank < min(u.shape[0], v.shape[0]):
                left, s, right = jnp.linalg.svd(c, full_matrices=False)
                a = products.einsum("nkl,li->nki", right[:, :rank], v)
                return a, products.einsum("ko,nkl->nol", u, left[:, :, :rank] * s[:, None, :rank])
            if u.shape[0] < v.shape[0]:
                a, b = products.einsum("nkl,li->nki", c, v), jnp.broadcast_to(u.T, (len(c), *u.T.shape))
            else:
                a, b = jnp.broadcast_to(v, (len(c), *v.shape)), products.einsum("ko,nkl->nol", u, c)
            return a, b

    def reconstruct(self, c):
        """Models (n, *shape) from coefficients (E8)."""
        with jax.enable_x64(True):
            c = _roomy(c, jnp.promote_types(self.dtype, self.mean.dtype))
            return rebuild.rebuild_models(c, self.mean, self.factors)


def project(space, x):
    """Coefficients (n, k...) on the host of models (n, *shape) or of low-rank updates (a, b, scales)."""
    return np.asarray(space.project_factors(*x) if isinstance(x, tuple) else space.project(x))


def relative(squares, energies):
    """Roots of squared errors over squared norms; of a model that is zero, over the mean of the others'."""
    energies = np.asarray(energies)
    other = energies[energies > 0].mean() if (energies > 0).any() else 1.0
    return np.sqrt(squares / np.where(energies > 0, energies, other))


def error_figures(left, energies, total):
    """Figures of a fit from squared errors and norms of the models, and the energy that it set out to hold."""
    found = relative(left, energies)
    return {
        "energy_kept": 1.0 - float(left.sum()) / total if total > 0 else 1.0,  # below 0: worse than the mean alone
        "error_mean": float(found.mean()),
        "error_max": float(found.max()),
    }


def from_mean(space, x):
    """(n,) squared distances of models (n, *shape) to the mean, float64."""
    return missed(space, x)[1]


def missed(space, x, values=None):
    """What a subspace misses of models: ((n,) squared norms, (n,) squared errors of their reconstructions), float64.

    Args:
        space: LinearSubspace or TuckerSubspace; its directions need not be orthonormal, as rounded ones are not.
        x: (n, *shape) models, or (a, b, scales) of low-rank updates, whose products are not formed.
        values: (n, k...) coefficients to rebuild from, as they are stored; fewer than `x` where other models follow.
            None: the mean stands for all of x.

    On several devices they send each other nothing but these numbers. Models of the host are taken GROUP bytes at a
    time, of less than that one by one.
    """
    if isinstance(x, tuple):
        return _missed_updates(space, x, values)
    count = len(x if values is None else values)
    if not isinstance(x, jax.Array) or not count:
        return _missed_on_host(space, np.asarray(x), values, count)
    mesh = _mesh(x)
    with jax.enable_x64(True):
        if isinstance(space, LinearSubspace):
            c = None if values is None else _roomy(values, space.basis.dtype)
            found = rebuild.missed_rows(x, c, space.mean, space.basis, mesh=mesh)
        else:
            c = None if values is None else _roomy(values, jnp.promote_types(space.dtype, space.mean.dtype))
            if c is not None and mesh is not None:
                c = jnp.pad(c, [(0, len(x) - count), *[(0, 0)] * (c.ndim - 1)])
            found = rebuild.missed_models(x, c, space.mean, space.factors, mesh=mesh)
    energies, left = (np.array(one)[:count] for one in found)
    for n in np.flatnonzero(energies < 4.0 ** -precision.ROOM["float32"]):  # XLA may have taken such weights for zero
        energies[n], left[n] = _missed_model(space, x, values, n)
    return energies, left


def _missed_on_host(space, x, values, count):
    """`missed` of NumPy arrays: no copy of more than a group, and one compilation, whatever the number of models."""
    energies, left = found = np.zeros((2, count))
    if x[:count].nbytes <= GROUP:  # not worth a kernel
        for n in range(count):
            energies[n], left[n] = _missed_model(space, x, values, n)
        return energies, left
    step = max(1, GROUP // x[0].nbytes)
    for start in range(0, count, step):
        own = slice(min(start, count - step), min(start + step, count))  # the last group overlaps the one before
        with jax.enable_x64(True):
            group = jax.device_put(x[own].astype(x.dtype.newbyteorder("="), copy=False))
        found[:, own] = missed(space, group, None if values is None else values[own])
    return energies, left


def _missed_model(space, x, values, n):
    """`missed` of the n-th model alone, on the host."""
    row = np.asarray(x[n], np.float64)
    if values is None:
        mean = np.asarray(space.mean, np.float64)
        rebuilt = mean.reshape(row.shape) if mean.size == row.size else mean  # or one that broadcasts
    else:
        rebuilt = np.asarray(space.reconstruct(values[n : n + 1]))[0]
    return np.square(row).sum(), np.square(row - rebuilt).sum()


def _mesh(x):
    """The mesh that models, or their features, are shared by; or None."""
    found = dealt.mesh_of(x)
    return dealt.mesh_of(x, 1) if found is None else found


def _missed_updates(space, x, values):
    """`missed` of low-rank updates, one at a time."""
    sides = [np.linalg.qr(np.asarray(space.factors[axis], np.float64).T) for axis in (0, 1)]
    energies, left = np.zeros(len(values)), np.zeros(len(values))
    with jax.enable_x64(True):
        for n, core in enumerate(values):
            factors = tuple(np.asarray(part[n : n + 1], np.float64) for part in x)
            energies[n], left[n] = _missed_update(factors, sides, np.asarray(core, np.float64))
    return energies, left


def _missed_update(factors, sides, core):
    """(squared norm, squared error) of a low-rank update W rebuilt as U.T core V, from its own factors.

    |W - P W Q|^2 + |P W Q - U.T core V|^2 with the projectors on the spans of U and V, whose thin QR are `sides`.
    """
    a, b, scale = factors
    (u, upper_u), (v, upper_v) = sides
    energy = scale[0] ** 2 * np.sum((b[0].T @ b[0]) * (a[0] @ a[0].T))
    outside = float(factored.residual_square(a, b, scale, u.T, v.T, centred=False))
    inside = scale[0] * (u.T @ b[0]) @ (a[0] @ v) - upper_u @ core @ upper_v.T
    return energy, outside + np.square(inside).sum()


def scaled(space, exponent):
    """The subspace of models times 2**exponent: mean, singular values and floors grow with them, directions stay.

    Where a float32 mean has no room (`precision.has_room`), it becomes float64.
    """

    def grown(s):
        with np.errstate(over="ignore"):  # energies of float64 weights may pass the range; values do not
            total = float(np.ldexp(s.total_energy, 2 * exponent))
        return Spectrum(np.ldexp(s.values, exponent), total, float(np.ldexp(s.floor, exponent)))

    with jax.enable_x64(True):
        mean = jnp.asarray(precision.scaled(np.asarray(space.mean), exponent))
    if isinstance(space, LinearSubspace):
        return dataclasses.replace(space, mean=mean, spectrum=grown(space.spectrum))
    return dataclasses.replace(space, mean=mean, spectra={a: grown(s) for a, s in space.spectra.items()})


def unit(space, x, values):
    """(space, x, values, exponent) with models x near 1, times 2**-exponent all three: squares of them are numbers.

    Low-rank updates stay as they are; `reading.read_factors` refuses those whose squares are none.
    """
    exponent = 0 if isinstance(x, tuple) else precision.exponent_of(precision.largest(x))
    if not exponent:
        return space, x, values, 0
    return scaled(space, -exponent), precision.scaled(x, -exponent), precision.scaled(values, -exponent), exponent


STORED_ROUNDING = 4.0  # eps of the stored dtype that narrowing basis and coefficients may add to a relative error


def stored(space, dtype):
    """The subspace as bundles keep it: in `dtype` where it is wider, and unit factors for axes that are kept whole.

    A factor (d, d) spans its axis whatever its rows are; with unit vectors it need not be stored.
    """
    dtype = np.dtype(dtype)
    is_linear = isinstance(space, LinearSubspace)
    if (space.basis if is_linear else space).dtype.itemsize > dtype.itemsize:
        bound = space.certificate.bound + STORED_ROUNDING * float(np.finfo(dtype).eps)
        certificate = dataclasses.replace(space.certificate, bound=bound)
        space = dataclasses.replace(space, certificate=certificate, mean=space.mean.astype(dtype))
        if is_linear:
            return dataclasses.replace(space, basis=space.basis.astype(dtype))
        space = dataclasses.replace(space, factors={axis: f.astype(dtype) for axis, f in space.factors.items()})
    if is_linear:
        return space
    whole = {axis: jnp.eye(len(f), dtype=f.dtype) for axis, f in space.factors.items() if len(f) == space.shape[axis]}
    return dataclasses.replace(space, factors=space.factors | whole)


@dataclasses.dataclass(frozen=True)
class Coefficients:
    """Models as a few numbers a layer: what projection gives, and what is trained, with n = 1.

    Attributes:
        model_ids: (n,) names.
        values: layer -> (n, k) or (n, k_1, k_2, ...).
        corrections: layer -> what is kept of these models beside their coefficients; of members of a bundle only.
    """

    model_ids: tuple[str, ...]
    values: dict[str, np.ndarray]
    corrections: dict = dataclasses.field(default_factory=dict)


def _require(x, shape):
    """Refuses models that are neither (n, *shape) nor (n, D): ConfigError."""
    if x.shape[1:] not in (tuple(shape), (math.prod(shape),)):
        raise errors.ConfigError(f"models of shape {x.shape[1:]}, the subspace is of {tuple(shape)}")


def _at_hand(x, dtype):
    """Models on a device as they are, those of the host `_roomy`, and the dtype that they are projected in."""
    if isinstance(x, jax.Array):
        return x, jnp.dtype(dtype)
    x = _roomy(x, dtype)
    return x, x.dtype


def _roomy(x, dtype):
    """Models or coefficients in `dtype`; those of the host in float64 where they have no room in it, see `precision`.

    Numbers too small for XLA's float32 are zero for it before it can widen them.
    """
    if isinstance(x, jax.Array):
        return x.astype(dtype)
    x = np.asarray(x)
    has_room = precision.has_room(precision.power_of(precision.largest(x)), dtype)
    return jnp.asarray(x.astype(dtype if has_room else np.float64, copy=False))
