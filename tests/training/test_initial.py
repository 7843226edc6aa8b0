"""Starts by examples against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from jaxsub import errors
from jaxsub.parametrisations import _spaces
from jaxsub.tasks import _data
from jaxsub.training import initial

RNG = np.random.default_rng(0)
GIVEN = {
    "x": jnp.asarray(RNG.standard_normal((40, 3, 5)), jnp.float32),
    "targets": jnp.asarray(RNG.integers(0, 3, 40), jnp.int32),
}
MEMBERS = (RNG.standard_normal((30, 5)) * [1, 2, 0.5, 1, 1] + [0, 1, 0, 0, -1]).astype(np.float32)


def outputs(c, given):
    return given["x"] @ c + given["x"][..., 0]


@pytest.mark.slow
def test_posterior_mode_is_that_of_a_general_optimizer():
    own = MEMBERS.astype(np.float64)
    covariance = np.cov(own, rowvar=False)
    covariance = 0.9 * covariance + 0.1 * np.diag(np.diag(covariance))
    precision, mean = np.linalg.inv(covariance), own.mean(axis=0)
    x, targets = np.asarray(GIVEN["x"], np.float64), np.asarray(GIVEN["targets"])

    def objective(c):
        logits = x @ c + x[..., 0]
        logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return -logs[np.arange(40), targets].sum() + 0.5 * (c - mean) @ precision @ (c - mean)

    wanted = scipy.optimize.minimize(objective, mean, tol=1e-10).x
    np.testing.assert_allclose(initial.posterior(outputs, GIVEN, MEMBERS), wanted, atol=2e-3)


@pytest.mark.slow
def test_without_examples_the_posterior_is_the_members_mean():
    nothing = {**GIVEN, "targets": jnp.full(40, -1)}
    np.testing.assert_allclose(initial.posterior(outputs, nothing, MEMBERS), MEMBERS.mean(axis=0), atol=1e-4)


@pytest.mark.slow
def test_ridge_is_least_squares_with_a_penalty():
    x = np.asarray(GIVEN["x"], np.float64)
    spread = MEMBERS.astype(np.float64).std(axis=0)
    wanted = np.eye(3)[np.asarray(GIVEN["targets"])] * (np.log(2) + 2) - x[..., 0]
    a = (x - x.mean(axis=1, keepdims=True)).reshape(-1, 5)
    b = (wanted - wanted.mean(axis=1, keepdims=True)).reshape(-1)
    stacked = np.concatenate([a, np.diag(1 / spread)])
    solved = np.linalg.lstsq(stacked, np.concatenate([b, np.zeros(5)]), rcond=None)[0]
    np.testing.assert_allclose(initial.ridge(outputs, GIVEN, MEMBERS), solved, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_nearest_is_the_member_of_smallest_loss():
    losses = [float(_data.cross_entropy(outputs(jnp.asarray(c), GIVEN), GIVEN["targets"])) for c in MEMBERS]
    found = initial.nearest(outputs, GIVEN, _data.cross_entropy, MEMBERS)
    np.testing.assert_array_equal(found, MEMBERS[int(np.argmin(losses))])


def test_members_are_the_leading_coefficients_in_the_order_of_the_vector():
    def space(values):
        return _spaces.Space(None, None, {}, np.asarray(values, np.float32), {}, False, ())

    spaces = {"b": space([[1, 2, 3], [4, 5, 6]]), "a": space([[7, 8], [9, 10]])}
    like = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    found = initial.members(spaces, like)
    assert found.tolist() == [[7, 8, 1, 2], [9, 10, 4, 5]]
    back = initial.unflattener(like)(jnp.asarray(found[1]))
    assert back["b"].tolist() == [4, 5]
    with pytest.raises(errors.ConfigError, match="no coefficients of the bundle"):
        initial.members(spaces, {"a": jnp.zeros(3)})
    assert jax.tree.structure(back) == jax.tree.structure(like)


def test_layers_without_members_are_refused_by_name():
    with pytest.raises(errors.ConfigError, match="layer output/kernel: the bundle has no members of it"):
        initial.members({}, {"output/kernel": np.zeros(3)})
