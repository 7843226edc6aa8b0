"""Decompositions of low-rank updates against the dense kernels and twins on the updates formed in full."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsub import errors
from jaxsub.linalg import factored, reference_tucker as reference, tucker

FITS = [factored.hosvd, factored.hooi]
DTYPES = [("float32", 1e-5), ("float64", 1e-11)]


pytestmark = pytest.mark.usefixtures("x64")


def stack(num_models=12, r=4, i=30, o=21, seed=0, mixed=False, mean=0.0):
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((num_models, r, i)) + mean * rng.standard_normal((r, i))
    b = rng.standard_normal((num_models, o, r)) + mean * rng.standard_normal((o, r))
    if mixed:
        a[::3, r // 2 :] = 0
        b[::3, :, r // 2 :] = 0
    return a.astype(np.float32), b.astype(np.float32), rng.uniform(0.5, 2, num_models)


def dense(a, b, scales, centred=False):
    w = reference.updates(a, b, scales)
    return w - w.mean(0) if centred else w


def true_error(w, found):
    return reference.error(w, found.cores, (None, *found.factors))


@pytest.mark.slow
@pytest.mark.parametrize("dtype, tolerance", DTYPES)
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize(
    "sizes", [{}, {"mixed": True}, {"num_models": 1}, {"r": 1}, {"r": 25, "i": 9}, {"o": 600, "i": 1}]
)
def test_mode_grams_equal_dense_ones(sizes, centred, dtype, tolerance):
    a, b, scales = stack(**sizes)
    w = dense(a, b, scales, centred)
    raw = np.square(dense(a, b, scales)).sum()
    for side, spec in (("in", "noi,noj->ij"), ("out", "noi,npi->op")):
        got = np.asarray(factored.mode_gram(a, b, scales, side=side, centred=centred, dtype=dtype))
        want = np.einsum(spec, w, w)
        assert got.dtype == np.float64 and np.abs(got - want).max() < tolerance * raw


@pytest.mark.slow
@pytest.mark.parametrize("dtype, tolerance", DTYPES)
@pytest.mark.parametrize("mixed, centred", [(False, False), (True, True)])
def test_hosvd_equals_the_dense_one(mixed, centred, dtype, tolerance):
    a, b, scales = stack(mixed=mixed)
    w = dense(a, b, scales, centred)
    for ranks in ((5, 6), (21, 2)):
        found = factored.hosvd(a, b, scales, ranks=ranks, centred=centred, dtype=dtype)
        core, factors, energies = reference.hosvd(w, (None, *ranks))
        assert abs(true_error(w, found) - reference.error(w, core, factors)) < 10 * tolerance
        assert abs(float(found.error) - true_error(w, found)) < tolerance
        assert true_error(w, found) <= float(found.certificate)
        assert float(found.lower) - tolerance <= true_error(w, found) <= float(found.upper)
        for got, want in zip(found.energies, energies[1:], strict=True):
            np.testing.assert_allclose(got[: len(want)], want, atol=tolerance * want[0])
        want = reference.mode_products(w, [None, *map(np.float64, found.factors)])
        assert np.abs(found.cores - want).max() < tolerance * np.abs(want).max()
        assert not centred or np.abs(np.asarray(found.cores).sum(0)).max() < 1e3 * tolerance


@pytest.mark.slow
@pytest.mark.parametrize("centred", [False, True])
def test_hooi_equals_the_dense_one_and_beats_its_start(centred):
    a, b, scales = stack()
    w = dense(a, b, scales, centred)
    options = {"sweeps": 100, "tolerance": 1e-10, "dtype": "float64"}
    found = factored.hooi(a, b, scales, ranks=(5, 6), centred=centred, **options)
    same = tucker.hooi(jnp.asarray(w), ranks=(None, 5, 6), **options)
    start = factored.hosvd(a, b, scales, ranks=(5, 6), centred=centred, dtype="float64")
    assert true_error(w, found) == pytest.approx(true_error_dense(w, same), rel=1e-5)
    assert true_error(w, found) < 0.99 * true_error(w, start)  # HOSVD alone is the weaker variant
    assert (np.diff(np.asarray(found.sweeps)) < 0).all() and found.num_passes == 3 + 2 * (len(found.sweeps) - 1)
    assert float(found.error) == pytest.approx(true_error(w, found), rel=1e-10)


def true_error_dense(w, found):
    return reference.error(w, found.core, found.factors)


@pytest.mark.slow
@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("rule", [{"energy": 0.9}, {"error": 0.3}])
@pytest.mark.parametrize("centred", [False, True])
def test_ranks_by_energy_and_by_total_error(fit, rule, centred):
    a, b, scales = stack()
    found = fit(a, b, scales, centred=centred, dtype="float64", **rule)
    w = dense(a, b, scales, centred)
    if "error" in rule:
        assert true_error(w, found) <= rule["error"]
    for energies, f in zip(found.energies, found.factors, strict=True):
        captured, k = np.cumsum(energies) / np.sum(energies), len(f)
        tau = rule.get("energy", 1 - rule.get("error", 0) ** 2 / 2)
        assert captured[k - 1] >= tau - 1e-12 and captured[k - 2] < tau


@pytest.mark.slow
@pytest.mark.parametrize("condition", [1.0, 1e3])
def test_nothing_depends_on_the_gauge(condition):
    a, b, scales = stack()
    rng = np.random.default_rng(5)
    turn = rng.standard_normal((12, 4, 4)) @ (np.diag(condition ** np.linspace(0, 1, 4)))
    a2, b2 = np.linalg.solve(turn, np.float64(a)), np.float64(b) @ turn
    for fit in FITS:
        one = fit(jnp.float64(a), jnp.float64(b), scales, ranks=(5, 6), dtype="float64")
        two = fit(jnp.asarray(a2), jnp.asarray(b2), scales, ranks=(5, 6), dtype="float64")
        for p, q in zip(one.factors, two.factors, strict=True):
            np.testing.assert_allclose(p.T @ p, q.T @ q, atol=1e-7)
        np.testing.assert_allclose(one.error, two.error, rtol=1e-8)
    # The weak variant, factors stacked as they are stored, does depend on it.
    stacked = [np.linalg.svd(x.reshape(-1, 30), compute_uv=False) for x in (np.float64(a), a2)]
    assert np.abs(stacked[0] / stacked[1] - 1).max() > 0.1


def test_factors_of_very_different_size_lose_nothing():
    a, b, scales = stack()
    size = np.float32([1, 1e6, 1e-6, 1e3])
    got = factored.mode_gram(a / size[:, None], b * size, scales, side="in")
    want = factored.mode_gram(a, b, scales, side="in")
    assert np.abs(got - want).max() < 1e-6 * np.abs(want).max()


@pytest.mark.slow
@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("centred", [False, True])
def test_zero_updates(fit, centred):
    a, b, scales = stack()
    found = fit(a, 0 * b, scales, ranks=(3, 4), centred=centred)
    assert float(found.error) == float(found.certificate) == 0 and not np.asarray(found.cores).any()
    for f in found.factors:
        np.testing.assert_allclose(f @ f.T, np.eye(len(f)), atol=1e-6)


@pytest.mark.slow
def test_equal_models_have_no_centred_energy_above_the_floor():
    a, b, _ = stack(num_models=1)
    a, b = np.repeat(a, 5, 0), np.repeat(b, 5, 0)
    found = factored.hosvd(a, b, np.ones(5), ranks=(2, 2), centred=True)
    raw = np.square(dense(a, b, np.ones(5))).sum()
    for energies, floor in zip(found.energies, found.floors, strict=True):
        assert float(energies[0]) <= float(floor) < 1e-4 * raw


@pytest.mark.slow
def test_a_large_mean_is_within_the_certificate():
    a, b, scales = stack(mean=30.0)
    w = dense(a, b, scales, True)
    found = factored.hosvd(a, b, scales, ranks=(21, 30), centred=True)
    assert true_error(w, found) <= float(found.certificate)
    exact = factored.hosvd(jnp.asarray(a), jnp.asarray(b), scales, ranks=(5, 6), centred=True, dtype="float64")
    assert abs(float(exact.error) - true_error(w, exact)) < 1e-9


def test_no_update_is_formed():
    """64 updates of 512 x 512 would be 64 MiB; the largest array of the program is a few factors."""
    a, b = jnp.zeros((64, 4, 512), jnp.float32), jnp.zeros((64, 512, 4), jnp.float32)
    lowered = factored._gram.lower(a, b, jnp.ones(64), side="in", centred=True, dtype="float32", mesh=None)
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 24 * 2**20
    lowered = factored._residual_square.lower(a, b, jnp.ones(64), a[:3, 0], b[:3, :, 0], centred=True, mesh=None)
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 24 * 2**20


@pytest.mark.slow
def test_certificates_are_never_below_the_true_error():
    rng = np.random.default_rng(7)
    trials = 3000
    a, b = rng.standard_normal((trials, 5, 2, 6)), rng.standard_normal((trials, 5, 7, 2))
    a *= (rng.uniform(0.02, 1, (trials, 1, 1, 1))) ** np.arange(6)
    b *= ((rng.uniform(0.02, 1, (trials, 1, 1))) ** np.arange(7))[..., None]
    a, b = a.astype(np.float32), b.astype(np.float32)
    for centred in (False, True):

        def one(a, b, centred=centred):
            found = factored.hosvd(a, b, jnp.ones(5), ranks=(3, 3), centred=centred)
            return found.cores, *found.factors, found.certificate

        cores, u, v, certificate = jax.jit(jax.vmap(one))(jnp.asarray(a), jnp.asarray(b))
        w = np.einsum("tnor,tnri->tnoi", np.float64(b), np.float64(a))
        w = w - w.mean(1, keepdims=True) if centred else w
        got = np.einsum("tnkl,tko,tli->tnoi", *map(np.float64, (cores, u, v)), optimize=True)
        error = np.sqrt(np.square(w - got).sum((1, 2, 3)) / np.square(w).sum((1, 2, 3)))
        assert (np.asarray(certificate) >= error).all()
        if not centred:
            clear = error > 1e-4
            assert clear.sum() > 1000 and (np.asarray(certificate)[clear] < 1.5 * error[clear]).all()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"a": np.zeros((2, 3, 4))}, "none empty"),
        ({"scales": np.ones(3)}, "with scales"),
        ({"ranks": (3, 31)}, "rank 31 of axis 1, which has 30"),
        ({"ranks": (3, None)}, "both sides"),
        ({"energy": 0.5}, "exactly one"),
    ],
)
def test_impossible_options_are_refused(change, words):
    a, b, scales = stack()
    options = {"a": a, "b": b, "scales": scales, "ranks": (2, 2), **change}
    with pytest.raises(errors.ConfigError, match=words):
        factored.hosvd(options.pop("a"), options.pop("b"), options.pop("scales"), **options)
    with pytest.raises(errors.ConfigError, match="in or out"):
        factored.mode_gram(a, b, scales, side="left")


@pytest.mark.parametrize("seed", range(6))
def test_ranks_by_error_are_those_of_the_updates_turned(seed):
    """A short side, which can seldom spare a direction, takes what the long one leaves, whichever it is."""
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((6, 4, 64)), rng.standard_normal((6, 4, 4)) * [[[3], [2], [1], [0.5]]]
    found = factored.hosvd(a, b, np.ones(6), error=0.4)
    turned = factored.hosvd(b.transpose(0, 2, 1), a.transpose(0, 2, 1), np.ones(6), error=0.4)
    assert [len(f) for f in found.factors] == [len(f) for f in turned.factors][::-1]
