"""Tucker fits against float64 twins, their identities (E11 to E15), certificates and weaker variants."""

import functools
import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsub import errors
from jaxsub.linalg import leading, mode_gram, reference_tucker as reference, tucker
from tests.selected import first

FITS = [tucker.hosvd, tucker.sthosvd, tucker.hooi]
DTYPES = [("float32", 1e-4), ("float64", 1e-10)]


pytestmark = pytest.mark.usefixtures("x64")


def tensor(shape, seed=0, decay=None):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape)
    for axis, size in enumerate(shape if decay else ()):
        turn = np.linalg.qr(rng.standard_normal((size, size)))[0] * decay ** np.arange(size)
        x = reference.mode_product(x, turn, axis)
    return x.astype(np.float32)


def true_error(x, found):
    return reference.error(x, found.core, found.factors)


def projectors(factors):
    return [None if f is None else np.float64(f).T @ np.float64(f) for f in factors]


@pytest.mark.parametrize("dtype, tolerance", first(DTYPES))
@pytest.mark.parametrize(
    "shape, ranks",
    [
        ((8, 12, 10), (3, 4, 5)),
        pytest.param((20, 8, 6, 3, 3), (5, 4, 3, 2, 2), marks=pytest.mark.slow),
        pytest.param((9, 7), (2, 2), marks=pytest.mark.slow),
    ],
)
def test_fits_equal_their_twins(shape, ranks, dtype, tolerance):
    x = tensor(shape, decay=0.7)
    order = tuple(reversed(range(len(shape))))
    fits = [tucker.hosvd(jnp.asarray(x), ranks=ranks, dtype=dtype)]
    fits.append(tucker.sthosvd(jnp.asarray(x), ranks=ranks, order=order, dtype=dtype))
    for found, twin in zip(fits, (reference.hosvd(x, ranks), reference.sthosvd(x, ranks, order)), strict=True):
        assert abs(true_error(x, found) / reference.error(x, *twin[:2]) - 1) < tolerance
        for got, want in zip(projectors(found.factors), projectors(twin[1]), strict=True):
            assert np.abs(got - want).max() < 100 * tolerance  # over the gap of the spectrum
    for axis, energies in enumerate(fits[0].energies):
        want = reference.hosvd(x, ranks)[2][axis]
        np.testing.assert_allclose(energies[: len(want)], want, atol=max(tolerance / 100, 1e-14) * want[0])
    best = reference.error(x, *reference.hooi(x, ranks))
    assert true_error(x, tucker.hooi(jnp.asarray(x), ranks=ranks, dtype=dtype, sweeps=50)) < best * (1 + 2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("dtype, tolerance", DTYPES)
@pytest.mark.parametrize("fit", FITS)
def test_factors_are_orthonormal_signed_and_the_core_is_the_projection(fit, dtype, tolerance):
    x = tensor((8, 12, 10))
    found = fit(jnp.asarray(x), ranks=(None, 4, 5), dtype=dtype)
    assert found.factors[0] is None and found.core.shape == (8, 4, 5)
    for f in map(np.float64, found.factors[1:]):
        assert np.abs(f @ f.T - np.eye(len(f))).max() < tolerance / 10
        assert (f[np.arange(len(f)), np.abs(f).argmax(1)] > 0).all()
    want = reference.mode_products(np.float64(x), [None, *map(np.float64, found.factors[1:])])
    assert np.abs(found.core - want).max() < tolerance * np.abs(want).max()


@pytest.mark.slow
@pytest.mark.parametrize("dtype, tolerance", DTYPES)
def test_tails_are_the_error_of_one_mode_and_bound_several(dtype, tolerance):
    x = tensor((8, 12, 10))
    for axis, k in itertools.product(range(3), (1, 3, 7)):  # E11
        ranks = [k if a == axis else None for a in range(3)]
        found = tucker.hosvd(jnp.asarray(x), ranks=ranks, dtype=dtype)
        energies = np.asarray(found.energies[axis])
        assert abs(true_error(x, found) ** 2 - energies[k:].sum() / energies.sum()) < tolerance
    for ranks in itertools.product((1, 4, 8), (2, 12), (3, 9)):  # E12
        error = true_error(x, tucker.hosvd(jnp.asarray(x), ranks=ranks, dtype=dtype))
        tails = [e[k:].sum() / e.sum() for e, k in zip(reference.hosvd(x, ranks)[2], ranks, strict=True)]
        assert max(tails) - tolerance <= error**2 <= sum(tails) + tolerance
        for fit in FITS:
            found = fit(jnp.asarray(x), ranks=ranks, dtype=dtype)
            assert float(found.lower) <= true_error(x, found) <= float(found.upper) + 1e-15
        found = tucker.sthosvd(jnp.asarray(x), ranks=ranks, dtype=dtype)
        assert float(found.upper) ** 2 - true_error(x, found) ** 2 < tolerance  # attained


@pytest.mark.slow
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("float64", 1e-14)])
@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("shape", [(5, 6, 4), (1, 7, 1), (64, 3, 2), (3,)])
def test_full_rank_is_exact(fit, shape, dtype, tolerance):
    x = tensor(shape)
    found = fit(jnp.asarray(x), ranks=shape, dtype=dtype)  # E13
    assert true_error(x, found) < tolerance
    assert true_error(x, found) <= float(found.certificate) < 20 * tolerance


def test_centred_cores_sum_to_zero():  # E14
    x = tensor((9, 12, 10)) + 3
    y = x - x.mean(0, dtype=np.float64)
    found = tucker.hosvd(jnp.asarray(y), ranks=(None, 4, 5), dtype="float64")
    assert np.abs(np.asarray(found.core).sum(0)).max() < 1e-11
    merged = np.asarray(tucker.reconstruct(found)).mean(0)
    assert np.abs(merged).max() < 1e-12  # E33: the mean of the reconstructions is the mean


def test_order_rotation_and_scale_of_the_models():  # E15
    x, rng = np.float64(tensor((9, 12, 10), decay=0.8)), np.random.default_rng(1)
    fit = functools.partial(tucker.hosvd, ranks=(None, 4, 5), dtype="float64")
    base = fit(jnp.asarray(x))
    shuffled = fit(jnp.asarray(x[rng.permutation(9)]))
    turns = [np.linalg.qr(rng.standard_normal((d, d)))[0] for d in (12, 10)]
    turned = fit(jnp.asarray(reference.mode_products(x, [None, *turns])))
    scaled = fit(jnp.asarray(7 * x))
    for axis in (1, 2):
        p = projectors(base.factors)[axis]
        np.testing.assert_allclose(projectors(shuffled.factors)[axis], p, atol=1e-10)
        np.testing.assert_allclose(projectors(scaled.factors)[axis], p, atol=1e-10)
        want = turns[axis - 1] @ p @ turns[axis - 1].T
        np.testing.assert_allclose(projectors(turned.factors)[axis], want, atol=1e-10)
        np.testing.assert_allclose(turned.energies[axis], base.energies[axis], rtol=1e-10)
        np.testing.assert_allclose(scaled.energies[axis], 49 * base.energies[axis], rtol=1e-10)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("decay", [None, 0.8])
def test_errors_are_within_root_modes_of_the_best_and_hooi_never_worse_than_its_start(seed, decay):
    x = tensor((8, 9, 10), seed, decay)
    ranks = (3, 4, 2)
    best = min(reference.error(x, *reference.hooi(x, ranks, sweeps=30)), 1.0)
    start = tucker.sthosvd(jnp.asarray(x), ranks=ranks)
    for found in (start, tucker.hosvd(jnp.asarray(x), ranks=ranks)):
        assert true_error(x, found) <= np.sqrt(3) * best
    found = tucker.hooi(jnp.asarray(x), ranks=ranks)
    assert true_error(x, found) <= true_error(x, start) * (1 + 1e-6)
    assert (np.diff(np.asarray(found.sweeps)) <= 0).all() and len(found.sweeps) >= 2
    assert float(found.lower) <= best


@pytest.mark.slow
def test_without_fitting_again_the_error_is_larger():
    """Noise whose modes compete for the rank: HOSVD, which sees one mode at a time, loses to HOOI."""
    x = jnp.asarray(tensor((10, 20, 20)))
    ranks = (None, 3, 3)
    weak, start = tucker.hosvd(x, ranks=ranks), tucker.sthosvd(x, ranks=ranks)
    found = tucker.hooi(x, ranks=ranks, sweeps=50)
    assert float(weak.error) ** 2 - float(found.error) ** 2 > 0.01
    assert float(start.error) ** 2 - float(found.error) ** 2 > 0.001


@pytest.mark.slow
@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize(
    "rule", [{"energy": 0.8}, {"energy": 1.0}, {"error": 0.5}, {"error": 0.1}, {"energy": (0.5, 0.9, 0.7)}]
)
def test_ranks_by_energy_and_by_total_error(fit, rule):
    x = tensor((8, 12, 10), decay=0.75)
    found = fit(jnp.asarray(x), dtype="float64", **rule)
    ranks = found.core.shape
    if "error" in rule:
        assert true_error(x, found) <= rule["error"]
        assert true_error(x, fit(jnp.asarray(x), dtype="float64", error=rule["error"] / 3)) < true_error(x, found)
        return
    shares = rule["energy"] if isinstance(rule["energy"], tuple) else (rule["energy"],) * 3
    for energies, k, tau in zip(found.energies, ranks, shares, strict=True):
        captured = np.cumsum(energies) / np.sum(energies)
        assert captured[k - 1] >= tau - 1e-12 and (k == 1 or captured[k - 2] < tau)


@pytest.mark.slow
@pytest.mark.parametrize("fit", first(FITS))
@pytest.mark.parametrize("shape", first([((8, 24, 20, 3, 3),), ((8, 3, 3, 20, 24),)]))
def test_the_error_that_short_axes_cannot_use_is_for_the_long_ones(fit, shape):
    x, axes = jnp.asarray(tensor(shape, decay=0.9)), tuple(range(1, len(shape)))
    found = fit(x, axes=axes, error=0.5**0.5, dtype="float64")
    assert 0.38 < float(found.error) ** 2 <= float(found.upper) ** 2 <= 0.5
    weak = tucker.hosvd(x, axes=axes, energy=1 - 0.5 / len(axes))  # an equal part an axis
    assert 2 * found.core.size < weak.core.size and float(weak.error) ** 2 < 0.25


@pytest.mark.slow
@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("rule", [{"ranks": (2, 3, 1)}, {"energy": 0.9}, {"error": 0.1}])
def test_a_zero_tensor_has_no_error_and_orthonormal_factors(fit, rule):
    found = fit(jnp.zeros((4, 5, 3)), **rule)
    assert float(found.error) == float(found.certificate) == 0 and not np.asarray(found.core).any()
    for f in found.factors:
        np.testing.assert_allclose(f @ f.T, np.eye(len(f)), atol=1e-6)
    assert "ranks" in rule or found.core.shape == (1, 1, 1)


@pytest.mark.slow
def test_exact_low_rank_is_found_and_certified_by_the_residual():
    x = reference.mode_products(np.float64(tensor((2, 3, 2))), [tensor((9, 2)), tensor((8, 3)), tensor((7, 2))])
    x = x.astype(np.float32)
    found = tucker.sthosvd(jnp.asarray(x), error=1e-3)
    assert found.core.shape == (2, 3, 2) and found.num_passes == 3
    assert true_error(x, found) < float(found.certificate) < 1e-5
    blind = tucker.sthosvd(jnp.asarray(x), ranks=(2, 3, 2), certify="norms")
    assert float(blind.certificate) > 1e-4 and blind.num_passes == 2  # why the residual is needed


@pytest.mark.slow
@pytest.mark.parametrize("rest", [(2, 8), (1, 3)])
def test_high_shrunk_unfoldings_lose_nothing_to_squares(rest):
    x = tensor((*rest, 300))
    found = tucker.sthosvd(jnp.asarray(x), error=0.1, order=(0, 1, 2))
    assert found.energies[2].shape[0] <= np.prod(rest) and true_error(x, found) <= 0.1
    assert float(found.floors[2]) < 1e-9 * float(found.energies[2][0])


@pytest.mark.slow
def test_five_way_stack_of_convolutions():
    x = tensor((64, 16, 8, 3, 3), decay=0.8)
    ranks = (16, 8, 4, 3, 3)
    errors_ = [true_error(x, fit(jnp.asarray(x), ranks=ranks)) for fit in FITS]
    best = reference.error(x, *reference.hooi(x, ranks, sweeps=5))
    assert errors_[2] <= min(errors_[:2]) * (1 + 1e-6) and max(errors_) <= 1.2 * best
    for order in ((0, 1, 2, 3, 4), (4, 2, 1, 0, 3)):
        found = tucker.sthosvd(jnp.asarray(x), ranks=ranks, order=order)
        assert true_error(x, found) == pytest.approx(reference.error(x, *reference.sthosvd(x, ranks, order)), rel=1e-4)


@pytest.mark.slow
def test_reconstruction_of_some_models():
    x = tensor((6, 5, 4))
    for ranks in ((3, 2, 2), (None, 2, 2)):
        found = tucker.hosvd(jnp.asarray(x), ranks=ranks)
        whole = np.asarray(tucker.reconstruct(found))
        np.testing.assert_allclose(tucker.reconstruct(found, index=slice(2, 4)), whole[2:4], atol=1e-6)
        assert np.linalg.norm(x - whole) / np.linalg.norm(x) == pytest.approx(true_error(x, found), rel=1e-5)


def batch_errors(x, core, factors):
    """Relative errors of decompositions of three-way tensors, batched, float64."""
    w = np.einsum("zabc,zai,zbj,zck->zijk", *map(np.float64, (core, *factors)), optimize=True)
    x = np.float64(x)
    return np.sqrt(np.square(x - w).sum((1, 2, 3)) / np.square(x).sum((1, 2, 3)))


@pytest.mark.slow
@pytest.mark.parametrize("fit", [tucker.hosvd, tucker.sthosvd])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("certify", ["norms", "residual"])
def test_certificates_are_never_below_the_true_error(fit, dtype, certify):
    rng = np.random.default_rng(3)
    x = rng.standard_normal((10_000, 6, 5, 4))
    rate = rng.uniform(0.02, 1, 10_000)
    for axis, size in enumerate(x.shape[1:]):
        turn = np.linalg.qr(rng.standard_normal((size, size)))[0]
        scale = rate[:, None] ** np.arange(size)
        x = np.moveaxis(np.moveaxis(x, axis + 1, -1) * scale[:, None, None] @ turn.T, -1, axis + 1)
    x = (x * 10.0 ** rng.uniform(-6, 6, (10_000, 1, 1, 1))).astype(np.float32)
    one = functools.partial(fit, ranks=(3, 3, 2), dtype=dtype, certify=certify)
    found = jax.jit(jax.vmap(lambda t: one(t)._replace(num_passes=jnp.int32(0))))(jnp.asarray(x))
    error, certificate = batch_errors(x, found.core, found.factors), np.asarray(found.certificate)
    assert (certificate >= error).all()
    assert (np.asarray(found.lower) <= error).all() and (np.asarray(found.upper) >= error).all()
    least = {"norms": 5e-3, "residual": 1e-4}[certify] if dtype == "float32" else 1e-6
    fast = (rate < 0.5) & (error > least)
    assert fast.sum() > 1000 and (certificate[fast] <= 1.5 * error[fast]).all()


def decaying(size, rate, seed=0):
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.standard_normal((size, size)))[0]
    values = rate ** np.arange(size)
    return jnp.asarray((turn * values) @ turn.T), values


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_subspace_iteration_reaches_the_best_energy_and_one_step_does_not(dtype):
    gram, values = decaying(600, 0.95)
    found = leading.leading(gram, rank=20, dtype=dtype)  # 600 >= 512 and 80 < 600: iteration
    assert found.values.shape == (20,) and bool(
        leading.subspace_iteration((gram / values.sum()).astype(dtype), rank=20)[1]
    )
    tail = values[20:].sum()

    def lost(vectors):
        v = np.float64(vectors)
        return (values[:20].sum() - np.trace(v @ np.asarray(gram) @ v.T)) / tail

    assert abs(lost(found.vectors)) < 1e-4
    rows, known = leading.subspace_iteration(gram.astype(dtype) / values.sum(), rank=20, steps=1)
    assert not bool(known)
    one = leading._ritz(gram, leading.subspace_iteration(gram.astype(dtype), rank=20, steps=0)[0], 20)[1]
    assert lost(one) > 1e-2 and rows.shape == (36, 600)


@pytest.mark.slow
def test_flat_spectra_fall_back_to_lapack():
    x = np.random.default_rng(0).standard_normal((520, 4000))
    gram = jnp.asarray(x @ x.T)
    scaled = (gram / jnp.trace(gram)).astype(jnp.float32)
    assert not bool(leading.subspace_iteration(scaled, rank=20)[1])
    found = leading.leading(gram, rank=20, dtype="float32")
    np.testing.assert_allclose(found.values, np.linalg.eigvalsh(x @ x.T)[::-1][:20], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, 5])
def test_iteration_on_low_rank_and_zero_matrices(rank):
    for gram in (jnp.zeros((540, 540)), jnp.eye(540) * (jnp.arange(540) < 3)):
        found = leading.leading(gram, rank=rank, dtype="float32")
        np.testing.assert_allclose(found.vectors @ found.vectors.T, np.eye(rank), atol=1e-5)
        np.testing.assert_allclose(found.values, np.sort(np.diag(gram))[::-1][:rank], atol=1e-5)


def test_one_compilation_a_shape():
    x = [jnp.asarray(tensor((7, 11, 13), seed)) for seed in range(3)]
    tucker.hooi(x[0], ranks=(3, 4, 5))
    before = [f._cache_size() for f in (mode_gram._mode_gram, leading._leading)]
    for y in x[1:]:
        tucker.hooi(y, ranks=(3, 4, 5))
    assert before == [f._cache_size() for f in (mode_gram._mode_gram, leading._leading)]


@pytest.mark.parametrize(
    "fit, options, words",
    [
        (tucker.hosvd, {}, "exactly one of ranks, energy and error"),
        (tucker.hosvd, {"ranks": (2, 2, 2), "energy": 0.5}, "exactly one"),
        (tucker.hosvd, {"ranks": (2, 9, 2)}, "rank 9 of axis 1, which has 5"),
        (tucker.hosvd, {"ranks": (0, 1, 1)}, "rank 0 of axis 0"),
        (tucker.hosvd, {"ranks": (2, 2)}, "one an axis"),
        (tucker.hosvd, {"ranks": (None, None, None)}, "one an axis"),
        (tucker.hosvd, {"energy": 1.5}, "a share in"),
        (tucker.hosvd, {"error": -1}, "between 0 and 1"),
        (tucker.hosvd, {"energy": 0.5, "axes": (0, 3)}, "name some of them once"),
        (tucker.hosvd, {"ranks": (1, 1, 1), "certify": "no"}, "auto, norms or residual"),
        (tucker.sthosvd, {"ranks": (2, 2, None), "order": (0, 2)}, "axes to reduce are"),
        (tucker.hooi, {"ranks": (2, 2, 2), "sweeps": 0}, "at least one sweep"),
    ],
)
def test_impossible_options_are_refused(fit, options, words):
    with pytest.raises(errors.ConfigError, match=words):
        fit(jnp.zeros((4, 5, 3)), **options)


@pytest.mark.slow
def test_agrees_with_tensorly():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("tensorly")
        from tensorly.decomposition import tucker as tensorly_tucker

        x, ranks = np.float64(tensor((8, 9, 10), decay=0.8)), (3, 4, 2)
        core, factors = tensorly_tucker(x, list(ranks), init="svd", n_iter_max=100, tol=1e-12)
    theirs = reference.error(x, core, [f.T for f in factors])
    found = tucker.hooi(jnp.asarray(x), ranks=ranks, dtype="float64", sweeps=100, tolerance=1e-12)
    assert true_error(x, found) == pytest.approx(theirs, rel=1e-6)


@pytest.mark.slow
def test_agrees_with_pyttb():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pyttb = pytest.importorskip("pyttb")
        x, ranks = np.float64(tensor((8, 9, 10), decay=0.8)), (3, 4, 2)
        kept = {"verbosity": 0, "ranks": np.array(ranks), "dimorder": np.arange(3)}
        theirs = [pyttb.hosvd(pyttb.tensor(x), 0.5, sequential=s, **kept) for s in (False, True)]
    ours = [tucker.hosvd(jnp.asarray(x), ranks=ranks, dtype="float64")]
    ours.append(tucker.sthosvd(jnp.asarray(x), ranks=ranks, order=(0, 1, 2), dtype="float64"))
    for one, other in zip(ours, theirs, strict=True):
        error = reference.error(x, other.core.data, [f.T for f in other.factor_matrices])
        assert true_error(x, one) == pytest.approx(error, rel=1e-9)
