"""The sparse posterior against closed forms: folded normals, divergences, Bayesian regression."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxsub import errors
from jaxsub.training import variational

X = np.linalg.qr(np.random.default_rng(0).standard_normal((60, 6)))[0].astype(np.float32) * 4
TRUE = np.array([2.0, 0, 0, -1.5, 0, 0], np.float32)
Y = (X @ TRUE + 0.5 * np.random.default_rng(1).standard_normal(60)).astype(np.float32)


def loss(c, key, given):
    """Minus the log-likelihood of a regression with noise of standard deviation 1/2."""
    del key
    return 2 * jnp.square(given["x"] @ c - given["y"]).sum()


GIVEN = {"x": jnp.asarray(X), "y": jnp.asarray(Y)}


@pytest.mark.parametrize(("mean", "scale"), [(0.3, 0.7), (0.0, 2.0), (-4.0, 0.1), (1e-3, 1.0)])
def test_folded_normal_is_that_of_scipy(mean, scale):
    expected, signal = variational.folded(jnp.float32(mean), jnp.float32(scale))
    wanted = scipy.stats.foldnorm(c=abs(mean) / scale, scale=scale)
    assert float(expected) == pytest.approx(wanted.mean(), rel=1e-4)
    assert float(signal) == pytest.approx(wanted.mean() / wanted.std(), rel=2e-3)


def test_divergence_is_the_closed_form_of_what_is_active():
    own = variational.Posterior(jnp.asarray([0.5, 9.0]), jnp.log(jnp.asarray([0.2, 3.0])), jnp.asarray([True, False]))
    rng = np.random.default_rng(0)
    c = 0.5 + 0.2 * rng.standard_normal(400_000)
    drawn = scipy.stats.norm(0.5, 0.2).logpdf(c) - scipy.stats.norm(0, 0.7).logpdf(c)
    assert float(variational.divergence(own, 0.7)) == pytest.approx(drawn.mean(), abs=4 * drawn.std() / len(c) ** 0.5)


@pytest.mark.slow
def test_a_dense_posterior_is_that_of_bayesian_regression():
    """Orthogonal inputs: precision 4 |x_j|^2 + 1 / prior^2 a coefficient, exactly diagonal."""
    options = variational.Options(density=1.0, steps=6000, prior=1.0, learning_rate=0.003)
    found = variational.infer(loss, 6, options, jax.random.key(0), GIVEN)
    precision = 4 * np.square(X).sum(axis=0) + 1
    mean = 4 * (X.T @ Y) / precision
    np.testing.assert_allclose(found.mean, mean, atol=0.05)
    np.testing.assert_allclose(np.exp(found.log_scale), precision**-0.5, rtol=0.25)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_the_support_finds_the_coefficients_there_are(seed):
    """Three of 24 coefficients are not zero; eight may be."""
    rng = np.random.default_rng(seed)
    x = np.linalg.qr(rng.standard_normal((60, 24)))[0] * 4
    true = np.zeros(24)
    true[[1, 11, 20]] = 2.0, -1.5, 1.0
    given = {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(x @ true + 0.5 * rng.standard_normal(60), jnp.float32)}
    options = variational.Options(density=1 / 3, steps=2000, every=50, share=0.5)
    found = variational.infer(loss, 24, options, jax.random.key(seed), given)
    active = np.flatnonzero(found.active)
    assert len(active) == 8 and {1, 11, 20} <= {*active.tolist()}
    np.testing.assert_allclose(np.asarray(found.mean)[[1, 11, 20]], [2.0, -1.5, 1.0], atol=0.45)
    drawn = np.asarray(variational.sample(found, jax.random.key(0), 5))
    assert not np.delete(drawn, active, axis=1).any() and drawn[:, active].all()
    still = variational.Options(density=1 / 3, steps=2000, every=50, share=0.0)  # a support that never moves
    other = np.flatnonzero(variational.infer(loss, 24, still, jax.random.key(seed), given).active)
    assert not {1, 11, 20} <= {*other.tolist()}


@pytest.mark.slow
def test_intervals_of_predictions_hold_the_mean_and_widen_with_the_posterior():
    def outputs(c, given):
        return jnp.stack([given["x"] @ c, jnp.zeros(len(given["x"]))], axis=1)

    spans = []
    for scale in (0.01, 0.3):
        own = variational.Posterior(jnp.asarray(TRUE), jnp.full(6, np.log(scale)), jnp.ones(6, bool))
        mean, low, high = variational.intervals(outputs, own, jax.random.key(0), GIVEN)
        assert bool((low <= mean).all() & (mean <= high).all())
        spans.append(float((high - low).mean()))
    assert spans[0] < 0.1 * spans[1]


@pytest.mark.parametrize("options", [{"density": 0.0}, {"steps": 0}, {"prior": 0.0}])
def test_impossible_options_are_named(options):
    with pytest.raises(errors.ConfigError, match=next(iter(options))):
        variational.infer(loss, 6, variational.Options(**options), jax.random.key(0), GIVEN)
