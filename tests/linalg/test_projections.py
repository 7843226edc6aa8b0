"""Random projections: the Hadamard transform, columns of unit norm, and what a random subspace can and cannot solve."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from jaxsub.linalg import projections
from tests.selected import first


@pytest.mark.parametrize("n", first([64, 1, 2, 8]))
def test_hadamard_transform_is_that_of_scipy(n):
    x = np.random.default_rng(0).standard_normal((3, n)).astype(np.float32)
    np.testing.assert_allclose(projections.walsh_hadamard(x), x @ scipy.linalg.hadamard(n), rtol=1e-4, atol=1e-5)


def test_other_lengths_are_refused():
    with pytest.raises(ValueError, match="no power of two"):
        projections.walsh_hadamard(jnp.zeros(6))


def matrix(kind, size, dimension, seed):
    drawn = projections.draw(kind, jax.random.key(seed), size, dimension)
    return np.asarray(jax.jit(jax.vmap(lambda z: projections.apply(drawn, z, size)))(jnp.eye(dimension))).T


@pytest.mark.slow
@pytest.mark.parametrize("kind", projections.KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_columns_have_unit_norm_and_are_nearly_orthogonal(kind, seed):
    size, dimension = 3000, 48
    p = matrix(kind, size, dimension, seed)
    gram = p.T @ p
    np.testing.assert_allclose(np.diag(gram), 1.0, atol=0.12)
    off = gram - np.diag(np.diag(gram))
    assert np.sqrt(np.square(off).mean()) < 2.5 / np.sqrt(size)
    assert np.abs(off).max() < 0.15
    assert np.linalg.matrix_rank(p) == dimension


@pytest.mark.slow
@pytest.mark.parametrize("kind", projections.KINDS)
@pytest.mark.parametrize(("dimension", "solves"), [(9, False), (10, True), (12, True)])
def test_ten_constraints_need_ten_numbers(kind, dimension, solves):
    """Block sums of 1000 numbers equal 1, ..., 10 (Li et al. 2018): solvable in d dimensions exactly where d >= 10."""
    blocks = np.kron(np.eye(10), np.ones(100))
    p = matrix(kind, 1000, dimension, 0).astype(np.float64)
    wanted = np.arange(1.0, 11.0)
    z = np.linalg.lstsq(blocks @ p, wanted, rcond=None)[0]
    assert (np.linalg.norm(blocks @ p @ z - wanted) < 1e-8) == solves


@pytest.mark.slow
def test_fastfood_keeps_numbers_in_proportion_to_the_weights():
    drawn = projections.draw("fastfood", jax.random.key(0), 10_000, 100)
    assert sum(x.size for x in jax.tree.leaves(drawn)) < 4 * 10_000
    assert drawn["signs"].shape == (79, 128)
