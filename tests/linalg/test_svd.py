"""Decompositions against planted spectra, float64 twins, and variants that must miss the same bound."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from jaxsub import errors, placement, precision
from jaxsub.linalg import certificates, range_finder, reference_svd as reference, single_pass, sketch, svd
from tests.linalg.compiled import collective_sizes
from tests.linalg.matrices import TRIAD, planted, spectrum
from tests.selected import first

ULP = {"float32": 2.0**-23, "float64": 2.0**-52}


pytestmark = pytest.mark.usefixtures("x64")


def error(x, result):
    return reference.relative_error(x, result.u, result.s[: result.vt.shape[0]], result.vt)


def best(values, rank):
    return np.sqrt(np.square(values[rank:]).sum() / np.square(values).sum())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_values_under_the_floor_are_not_signal(dtype):
    values = np.logspace(0, -9, 24)
    x, vt = planted(24, 4000, values)
    found = svd.gram_svd(jnp.asarray(x, jnp.float32), dtype=dtype)
    count = int(found.is_resolved.sum())
    assert float(found.floor) == pytest.approx(precision.gram_floor(float(found.s[0]), 24, dtype))
    np.testing.assert_allclose(found.s[:count], values[:count], rtol=0.1)
    assert not np.any(found.vt[count:]) and not np.any(found.u[:, count:])
    assert reference.row_space_angle(found.vt[:1], vt[:1]) < 1e-5
    # What the flag is for: below it the values are wrong.
    assert np.abs(np.asarray(found.s[-3:]) / values[-3:] - 1).max() > 0.5
    assert float(found.energy) == pytest.approx(np.square(values).sum(), rel=1e-6)


@pytest.mark.parametrize(("shape",), first(zip([(40, 3000), (3000, 40), (150, 200), (200, 150)]), 2))
@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-5), ("float64", 2e-6)])
def test_gram_svd_equals_the_twin(shape, dtype, tolerance):
    x = planted(*shape, 0.9 ** np.arange(40))[0].astype(np.float32)
    u, s, vt = reference.svd(x, 12)
    found = svd.gram_svd(jnp.asarray(x), rank=12, dtype=dtype)
    np.testing.assert_allclose(found.s[:12], s, rtol=tolerance)
    assert np.abs(found.vt - vt).max() < 20 * tolerance and np.abs(found.u - u).max() < 20 * tolerance


@pytest.mark.slow
def test_without_oversampling_noise_fails_the_bound():
    values = spectrum("low_rank_noise", 90) * np.where(np.arange(90) < 8, 0.3 ** np.arange(90), 3)
    x = jnp.asarray(planted(90, 300, values)[0], jnp.float32)
    run = functools.partial(svd.randomized_svd, x, rank=8, passes=2)
    assert all(error(x, run(jax.random.key(j), oversample=10)) < 1.15 * best(values, 8) for j in range(3))
    assert all(error(x, run(jax.random.key(j), oversample=0)) > 1.15 * best(values, 8) for j in range(3))


@pytest.mark.slow
def test_krylov_beats_power_at_equal_passes():
    values = 1 / (1 + np.arange(200)) ** 0.25
    x = jnp.asarray(planted(200, 400, values)[0], jnp.float32)
    for seed in range(3):
        run = functools.partial(svd.randomized_svd, x, jax.random.key(seed), rank=8, oversample=4, passes=6)
        gain = [error(x, run(range_finder=name)) / best(values, 8) - 1 for name in ("power", "krylov")]
        assert gain[1] < 0.5 * gain[0]


@pytest.mark.slow
def test_reduced_precision_products_would_fail():
    values = spectrum("fast_decay", 60)
    x = planted(60, 400, values)[0].astype(np.float32)
    found = svd.randomized_svd(jnp.asarray(x), jax.random.key(0), rank=12, passes=4)
    np.testing.assert_allclose(found.s, values[:12], rtol=1e-3)
    rounded = x.astype(ml_dtypes.bfloat16).astype(np.float32)  # one bfloat16 pass of a product, the default elsewhere
    tests = np.asarray(sketch.gaussian(jax.random.key(0), 400, 28)).astype(ml_dtypes.bfloat16).astype(np.float64)
    assert np.abs(reference.randomized_svd(rounded, tests, 12, 4)[1] / values[:12] - 1).max() > 0.05


SLOW = [pytest.param(f, p, marks=pytest.mark.slow) for f in ("power", "krylov") for p in (2, 3, 4, 5, 12)]


@pytest.mark.parametrize("finder, passes", [("krylov", 4), *SLOW])
def test_range_finders_equal_their_twins(finder, passes):
    if finder == "krylov" and passes > 5:
        pytest.skip("a basis wider than x")
    x = planted(30, 40, spectrum("slow_decay", 30))[0]
    tests = np.asarray(sketch.gaussian(jax.random.key(1), 40, 6), np.float64)
    basis, image = map(np.asarray, range_finder.named(finder)(jnp.asarray(x), jnp.asarray(tests), passes=passes))
    np.testing.assert_allclose(image, basis.T @ x if passes % 2 == 0 else x @ basis.T, rtol=0, atol=1e-12)
    basis = basis if passes % 2 == 0 else basis.T
    assert np.abs(basis.T @ basis - np.eye(basis.shape[1])).max() < 1e-13
    assert np.abs(basis @ basis.T - getattr(reference, finder)(x, tests, passes)).max() < 1e-9


@pytest.mark.slow
def test_randomized_svd_equals_the_twin_and_takes_other_steps():
    x = planted(30, 40, spectrum("slow_decay", 30))[0]
    calls = []

    def finder(x, tests, *, passes, axis=None):
        calls.append("finder")
        return range_finder.power(x, tests, passes=passes, axis=axis)

    def draw(key, rows, columns, *, start=0):
        calls.append("sketch")
        return sketch.gaussian(key, rows, columns, start=start)

    def small(x):
        calls.append("svd")
        return svd.thin_svd(x)

    for passes in (4, 5):
        plain = svd.randomized_svd(jnp.asarray(x), jax.random.key(2), rank=5, oversample=4, passes=passes)
        tests = np.asarray(sketch.gaussian(jax.random.key(2), 40, 9), np.float64)
        u, s, vt = reference.randomized_svd(x, tests, 5, passes)
        np.testing.assert_allclose(plain.s, s, rtol=1e-12)
        assert np.abs(plain.u - u).max() < 1e-9 and np.abs(plain.vt - vt).max() < 1e-9
        steps = {"test": draw, "range_finder": finder, "small_svd": small}
        other = svd.randomized_svd(jnp.asarray(x), jax.random.key(2), rank=5, oversample=4, passes=passes, **steps)
        np.testing.assert_array_equal(other.vt, plain.vt)
    assert calls.count("finder") == calls.count("sketch") == calls.count("svd") == 2


def sharded(function, x, devices, outputs):
    mesh = placement.make_mesh(devices)
    columns = P(None, "features")
    run = jax.shard_map(function, mesh=mesh, in_specs=columns, out_specs=outputs, check_vma=False)
    return jax.jit(run), jax.device_put(x, NamedSharding(mesh, columns))


@pytest.mark.slow
@pytest.mark.parametrize("passes, finder", [(4, "power"), (5, "power"), (4, "krylov"), (5, "krylov")])
def test_eight_devices_equal_one_and_gather_nothing_long(passes, finder):
    num_rows, width, count = 48, 8 * 512, 12
    x = planted(num_rows, width, spectrum("harmonic", 48))[0].astype(np.float32)
    x[:, -300:] = 0  # padding
    options = {"rank": 4, "oversample": 8, "passes": passes, "range_finder": finder}
    outputs = svd.RandomizedSvd(P(), P(), P(None, "features"), P(), P(), P())
    one = svd.randomized_svd(jnp.asarray(x), jax.random.key(0), **options)
    run, placed = sharded(lambda x: svd.randomized_svd(x, jax.random.key(0), axis="features", **options), x, 8, outputs)
    eight = run(placed)
    np.testing.assert_allclose(eight.s, one.s, rtol=2e-6)
    assert np.abs(eight.vt - one.vt).max() < 1e-4 and np.abs(np.asarray(eight.vt)[:, -300:]).max() < 1e-7
    np.testing.assert_allclose(eight.bound, one.bound, rtol=1e-4)
    m = count * (passes // 2 if finder == "krylov" else 1)
    long = collective_sizes(run.lower(placed))
    # Sums of (N, l) products, (l, l) or (m, m) matrices, R factors of the fallback: nothing as long as D.
    assert max(long) <= max(num_rows * m, 8 * m * m) < width // 8 * count, long


@pytest.mark.slow
def test_gram_svd_on_eight_devices():
    x = planted(16, 8 * 256, spectrum("harmonic", 16))[0].astype(np.float32)
    outputs = svd.GramSvd(P(), P(), P(None, "features"), P(), P(), P())
    run, placed = sharded(lambda x: svd.gram_svd(x, rank=5, axis="features"), x, 8, outputs)
    one, eight = svd.gram_svd(jnp.asarray(x), rank=5), run(placed)
    np.testing.assert_allclose(eight.s, one.s, rtol=1e-6, atol=1e-7)
    assert np.abs(eight.vt - one.vt).max() < 1e-5
    assert max(collective_sizes(run.lower(placed))) == 16 * 16


def certificate_trials(seed, trials, dtype):
    """True relative errors, tail bounds, residual bounds and probe uppers of random small matrices and ranks."""
    rng = np.random.default_rng(seed)
    decay = rng.uniform(0.3, 1.0, (trials, 1))
    values = decay ** np.arange(10) * np.exp(0.5 * rng.standard_normal((trials, 10)))
    x = np.einsum(
        "tni,ti,tid->tnd", rng.standard_normal((trials, 10, 10)), values, rng.standard_normal((trials, 10, 14))
    )
    x = x.astype(dtype)

    @jax.jit
    @jax.vmap
    def run(x, key):
        found = svd.randomized_svd(x, key, rank=3, oversample=2, passes=2)
        residual = certificates.residual_error(x, found.u, found.s, found.vt)
        probes = certificates.probe_estimate(x, found.u, found.s, found.vt, jax.random.fold_in(key, 1))
        return found, residual, probes

    found, residual, probes = run(x, jax.random.split(jax.random.key(seed), trials))
    wide = [np.asarray(a, np.float64) for a in (x, found.u, found.s, found.vt)]
    rest = wide[0] - np.einsum("tnk,tk,tkd->tnd", *wide[1:])
    true = np.linalg.norm(rest, axis=(1, 2)) / np.linalg.norm(wide[0], axis=(1, 2))
    return true, np.asarray(found.bound), np.asarray(residual.bound), np.asarray(probes.upper)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_certificates_hold_in_ten_thousand_trials(dtype):
    true, tail, residual, upper = certificate_trials(0, 10_000, dtype)
    assert np.all(tail >= true) and np.all(residual >= true)
    assert np.mean(upper < true) < 0.01
    eps = np.finfo(dtype).eps
    assert np.all(residual <= true * (1 + 20 * eps) + 20 * eps)


@pytest.mark.slow
def test_certificates_hold():
    true, tail, residual, upper = certificate_trials(1, 300, np.float32)
    assert np.all(tail >= true) and np.all(residual >= true) and np.mean(upper < true) <= 0.02
    # The weak variant, without its slack, is passed by the true error.
    assert 0 < np.mean(np.sqrt(np.maximum(tail**2 - 3e-5, 0)) < true)


@pytest.mark.slow
@pytest.mark.parametrize("dtype, rank", [("float32", 6), ("float64", 16)])
def test_the_bound_is_tight_for_fast_decay(dtype, rank):
    values = spectrum("fast_decay", 80)
    x = planted(80, 500, values)[0].astype(dtype)
    found = svd.randomized_svd(jnp.asarray(x), jax.random.key(0), rank=rank, passes=4)
    true = error(x, found)
    assert best(values, rank) * (1 - 1e-6) <= true <= float(found.bound) <= 1.5 * best(values, rank)
    residual = certificates.residual_error(jnp.asarray(x), found.u, found.s, found.vt)
    assert true <= float(residual.bound) <= 1.01 * true


def test_probe_factor_covers_the_worst_residual():
    factor = certificates.probe_factor(10, 0.01)
    assert 2.2 < factor < 2.4
    chi = np.random.default_rng(0).chisquare(10, 200_000) / 10  # of a residual of rank one
    assert np.mean(np.sqrt(chi) * factor < 1) < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("cut", ["rows", "columns", "both"])
@pytest.mark.parametrize("name", TRIAD)
def test_single_pass(name, cut):
    values = spectrum(name, 90)
    x = planted(90, 300, values)[0].astype(np.float32)
    n, d = {"rows": (15, 300), "columns": (90, 50), "both": (45, 60)}[cut]
    blocks = [(i, j, x[i : i + n, j : j + d]) for i in range(0, 90, n) for j in range(0, 300, d)]
    key = jax.random.key(1)
    found = single_pass.single_pass_svd(reversed(blocks), key, shape=x.shape, rank=8)
    true = error(x, found)
    assert true < 2 * best(values, 8) + 1e-5
    assert true <= float(found.upper) and float(found.upper) < 4 * true + 1e-4
    assert float(found.energy) == pytest.approx(np.square(x, dtype=np.float64).sum(), rel=1e-12)
    size = 4 * 8 + 1
    shapes = ((300, size), (90, size), (90, 2 * size + 1), (300, 2 * size + 1))
    tests = [
        np.asarray(sketch.gaussian(jax.random.fold_in(key, j), *shape), np.float64) for j, shape in enumerate(shapes)
    ]
    want = reference.single_pass(x.astype(np.float64), tests, 8)
    assert np.linalg.norm((np.asarray(found.u) * found.s) @ found.vt - want) < 1e-4 * np.linalg.norm(x)


@pytest.mark.slow
def test_single_pass_without_oversampling_fails_the_bound():
    values = spectrum("slow_decay", 90)
    x = planted(90, 300, values)[0].astype(np.float32)
    for seed in range(3):
        weak = single_pass.single_pass_svd([(0, 0, x)], jax.random.key(seed), shape=x.shape, rank=8, oversample=0)
        assert error(x, weak) > 1.05 * best(values, 8)
        assert error(x, weak) <= float(weak.upper)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (4, 4)])
def test_degenerate_inputs(shape):
    size = min(shape)
    zero, key = jnp.zeros(shape, jnp.float32), jax.random.key(0)
    for found in (
        svd.randomized_svd(zero, key, rank=size, passes=3),
        svd.gram_svd(zero),
        single_pass.single_pass_svd([(0, 0, zero)], key, shape=shape, rank=size),
    ):
        assert not np.any(found.u) and not np.any(found.vt) and not np.any(found.s)
    found = svd.randomized_svd(zero, key, rank=size)
    assert float(found.bound) == 0 and float(found.tail) == 0
    assert float(certificates.residual_error(zero, found.u, found.s, found.vt).bound) == 0
    ones = jnp.ones(shape, jnp.float32)  # repeated zeros beside one value
    for found in (svd.randomized_svd(ones, key, rank=size), svd.gram_svd(ones), svd.thin_svd(ones)):
        assert float(found.s[0]) == pytest.approx(np.sqrt(shape[0] * shape[1]), rel=1e-5)
        assert error(ones, found) < 1e-6 and np.all(np.isfinite(found.u)) and np.all(np.isfinite(found.vt))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_narrow_inputs_equal_their_float32_upcast(dtype):
    x = planted(20, 60, spectrum("harmonic", 20))[0].astype(dtype)
    wide, key = x.astype(np.float32), jax.random.key(0)
    for run in (
        svd.thin_svd,
        functools.partial(svd.gram_svd, rank=5),
        lambda x: svd.randomized_svd(x, key, rank=5),
        lambda x: single_pass.single_pass_svd([(0, 0, x)], key, shape=(20, 60), rank=5),
    ):
        for got, want in zip(run(jnp.asarray(x)), run(jnp.asarray(wide)), strict=True):
            assert got.dtype == want.dtype and got.dtype in (np.float32, np.float64, bool)
            np.testing.assert_array_equal(got, want)


@pytest.mark.slow
def test_powers_of_two_scale_exactly():
    x = planted(20, 60, spectrum("harmonic", 20))[0].astype(np.float32)
    one = svd.randomized_svd(jnp.asarray(x), jax.random.key(0), rank=5)
    for exponent in (-30, 40):
        scaled = svd.randomized_svd(jnp.asarray(np.ldexp(x, exponent)), jax.random.key(0), rank=5)
        np.testing.assert_array_equal(np.ldexp(scaled.s, -exponent), one.s)
        np.testing.assert_array_equal(scaled.vt, one.vt)


def test_wrong_options_are_refused():
    x, key = jnp.ones((4, 6), jnp.float32), jax.random.key(0)
    cases = [
        (lambda: svd.randomized_svd(x, key, rank=5), "rank is 5, expected an integer from 1 to"),
        (lambda: svd.randomized_svd(x, key, rank=0), "rank is 0"),
        (lambda: svd.randomized_svd(x, key, rank=2, passes=1), "passes=1"),
        (lambda: svd.randomized_svd(x, key, rank=2, oversample=-1), "oversample=-1"),
        (lambda: svd.randomized_svd(x, key, rank=2, test="signs"), "did you mean 'sign'"),
        (lambda: svd.randomized_svd(x, key, rank=2, range_finder="krilov"), "did you mean 'krylov'"),
        (lambda: svd.randomized_svd(x, key, rank=2, passes=6, range_finder="krylov"), "fewer passes"),
        (lambda: svd.gram_svd(x, rank=7), "rank is 7"),
        (lambda: single_pass.start(4, 6, rank=9), "rank is 9"),
    ]
    for call, text in cases:
        with pytest.raises(errors.ConfigError, match=text):
            call()
    with jax.enable_x64(False), pytest.raises(errors.ConfigError, match="enable_x64"):
        svd.gram_svd(jnp.ones((3, 3)))


@pytest.mark.slow
def test_one_compilation_a_shape():
    before = svd.randomized_svd._cache_size()
    for seed in range(3):
        svd.randomized_svd(jnp.ones((7, 11), jnp.float32) * seed, jax.random.key(seed), rank=2)
    assert svd.randomized_svd._cache_size() == before + 1


@pytest.mark.parametrize("fails", [True, False])
def test_another_algorithm_where_lapack_gives_up(monkeypatch, fails):
    """What divide and conquer does not converge for has finite values all the same; NaN in it stays NaN."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((9, 5)), jnp.float32)
    wanted = svd.thin_svd(x)
    if fails:
        parts = lambda x: (x, x[0], x[:5].T)  # noqa: E731
        monkeypatch.setattr(jnp.linalg, "svd", lambda x, **_: jax.tree.map(lambda a: a * jnp.nan, parts(x)))
    found = jax.jit(lambda x: svd.thin_svd.__wrapped__(x))(x)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    if not fails:
        assert np.isnan(jax.jit(lambda x: svd.thin_svd.__wrapped__(x))(x.at[2, 3].set(jnp.nan)).s).all()


def test_a_host_array_is_transferred_once(monkeypatch):
    given, kernel = [], svd._from_gram
    monkeypatch.setattr(svd, "_from_gram", lambda x, *more, **options: given.append(x) or kernel(x, *more, **options))
    svd.gram_svd(np.eye(3, 8, dtype=np.float32))
    assert [type(x) for x in given] == [type(jnp.zeros(1))]
