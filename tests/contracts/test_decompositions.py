"""What every decomposition promises; a new file in jaxsub/decompositions is tested the moment it exists."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxsub import errors, plugins, stacks, subspace
from tests.selected import first

NAMES = plugins.available("decompositions")
RESOLVED = 3e-3  # relative errors that float32 energies tell from rounding
RANKS = {"hosvd": {"ranks": (5, 4)}, "sthosvd": {"ranks": (5, 4)}, "hooi": {"ranks": (5, 4)}}
SHAPE, NUM_MODELS = (24, 8), 12


def matrix(kind, seed=0, num_models=NUM_MODELS, shape=SHAPE):
    """The triad of matrices as stacks (N, *shape) float32: exact low rank, low rank plus noise, slow decay."""
    rng = np.random.default_rng(seed)
    left, middle, right = (rng.standard_normal((n, 4)) for n in (num_models, shape[0], shape[1]))
    low = np.einsum("na,oa,ia->noi", left, middle, right) / 4
    if kind == "low rank":
        x = low
    elif kind == "noise":
        x = low + 0.1 * rng.standard_normal(low.shape)
    else:
        u, _, vt = np.linalg.svd(rng.standard_normal((num_models, shape[0] * shape[1])), full_matrices=False)
        x = ((u / np.arange(1, len(vt) + 1)) @ vt).reshape(num_models, *shape) * 10
    return (x + 0.5 * rng.standard_normal(shape)).astype(np.float32)  # and a common mean


def fit(name, x, **options):
    module = plugins.load("decompositions", name)
    chosen = (RANKS.get(name) or {"rank": 4}) | options
    return module.fit(stacks.DenseStack.create(x), module.Options(**chosen), jax.random.key(0))


def true_error(found, x):
    """|X - X_k| / |X| of the centred stack, float64, by the subspace's own project and reconstruct."""
    x = np.asarray(x, np.float64)
    rebuilt = np.asarray(found.reconstruct(found.project(x.astype(np.float32))), np.float64)
    mean = np.asarray(found.mean, np.float64)
    mean = mean.reshape(SHAPE) if isinstance(found, subspace.LinearSubspace) else mean
    return np.linalg.norm(x - rebuilt) / np.linalg.norm(x - mean)


def factors(found):
    return [found.basis] if isinstance(found, subspace.LinearSubspace) else list(found.factors.values())


@pytest.mark.parametrize("kind", first(["low rank", "noise", "slow decay"]))
@pytest.mark.parametrize("name", NAMES)
def test_orthonormal_ordered_idempotent_and_certified(name, kind):
    x = matrix(kind)
    found = fit(name, x)
    for f in factors(found):
        f = np.asarray(f, np.float64)
        kept = f[np.linalg.norm(f, axis=1) > 0]  # directions that rounding hides are zero rows
        np.testing.assert_allclose(kept @ kept.T, np.eye(len(kept)), atol=2e-5)
        assert (f[np.arange(len(f)), np.abs(f).argmax(1)] >= 0).all()
    spectra = [found.spectrum] if isinstance(found, subspace.LinearSubspace) else found.spectra.values()
    for s in spectra:
        assert (np.diff(s.values) <= 1e-6 * s.values[0]).all() and (s.values >= 0).all()
    c = found.project(x)
    again = found.project(np.asarray(found.reconstruct(c), np.float32))
    np.testing.assert_allclose(again, c, atol=2e-4 * np.abs(c).max())
    error = true_error(found, x)
    assert error <= found.certificate.bound * (1 + 1e-5) + 1e-6
    assert abs(error - found.certificate.relative_error) < 2e-3 + 0.02 * error


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_no_certificate_is_under_the_true_error_in_ten_thousand_trials(name):
    rng = np.random.default_rng(7)
    broken, ratios = [], []
    for trial in range(10_000):
        decay, scale = rng.uniform(0.2, 1.0), 10.0 ** rng.uniform(-4, 4)
        u, _, vt = np.linalg.svd(rng.standard_normal((NUM_MODELS, SHAPE[0] * SHAPE[1])), full_matrices=False)
        x = ((u * decay ** np.arange(len(vt))) @ vt).reshape(NUM_MODELS, *SHAPE)
        x = (scale * (x + rng.uniform(0, 3) * rng.standard_normal(SHAPE) / 14)).astype(np.float32)
        found = fit(name, x)
        error = true_error(found, x)
        # `project` rounds to float32 beside the fit: 1e-6 of the models is what it may add.
        mean = np.asarray(found.mean, np.float64)
        mean = mean.reshape(SHAPE) if isinstance(found, subspace.LinearSubspace) else mean
        slack = 1e-6 * max(np.linalg.norm(x) / np.linalg.norm(x - mean), 1.0)
        if error > found.certificate.bound + slack:
            broken.append((trial, error, found.certificate.bound))
        if decay < 0.6 and error > RESOLVED:
            ratios.append(found.certificate.bound / error)
    assert broken == []
    assert not ratios or max(ratios) < 1.5


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_models_does_not_matter(name):
    x = matrix("noise")
    a, b = fit(name, x), fit(name, x[::-1].copy())
    for f, g in zip(factors(a), factors(b), strict=True):
        cosines = np.linalg.svd(np.asarray(f) @ np.asarray(g).T, compute_uv=False)
        assert cosines.min() > 1 - 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_equal_models_have_no_spectrum(name):
    x = np.repeat(matrix("noise")[:1], NUM_MODELS, axis=0)
    found = fit(name, x)
    if found.procedure.centring == "models":
        rebuilt = np.asarray(found.reconstruct(found.project(x)))
        np.testing.assert_allclose(rebuilt, x, atol=1e-5)
        spectra = [found.spectrum] if isinstance(found, subspace.LinearSubspace) else found.spectra.values()
        assert max(s.values.max(initial=0) for s in spectra) < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_names_its_procedure(name):
    found = fit(name, matrix("noise"))
    module = plugins.load("decompositions", name)
    assert found.procedure.name.replace("-", "_") == name and module.REFERENCE == found.procedure.reference
    assert found.procedure.centring in subspace.CENTRINGS and found.procedure.axes and found.procedure.cap >= 4
    assert found.certificate.passes >= 1 and dataclasses.is_dataclass(module.Options)


@pytest.mark.parametrize("name", ["gram", "randomized", "row_pca", "hosvd", "sthosvd", "hooi"])
def test_an_impossible_rank_is_refused(name):
    with pytest.raises(errors.ConfigError, match="rank|components"):
        fit(name, matrix("noise"), **({"ranks": (25, 4)} if name in RANKS else {"rank": 300}))


def test_a_stack_with_nan_is_refused_by_name():
    x = matrix("noise")
    x[3, 1, 1] = np.nan
    with pytest.raises(errors.InputError, match="seed3.*layer.w|layer.w.*seed3"):
        stacks.DenseStack.create(x, "layer.w", tuple(f"seed{n}" for n in range(NUM_MODELS)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_other_dtypes(name, dtype):
    import ml_dtypes

    x = matrix("noise")
    stored = x.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    with jax.enable_x64(True):
        a, b = fit(name, stored), fit(name, stored.astype(np.float64))
    for f, g in zip(factors(a), factors(b), strict=True):
        cosines = np.linalg.svd(np.asarray(f, np.float64) @ np.asarray(g, np.float64).T, compute_uv=False)
        assert cosines.min() > 1 - 1e-4
