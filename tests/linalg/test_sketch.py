"""Test matrices: moments, independence of cut and sharding, and what each kind promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxsub import errors, placement
from jaxsub.linalg import sketch

KINDS = sorted(sketch.TESTS)
# The others compile for seconds, each of their sizes anew.
SHORT = [pytest.param(k, marks=() if k == "gaussian" else pytest.mark.slow) for k in KINDS]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [7, 1, 48])
def test_rows_do_not_depend_on_where_the_matrix_is_cut(kind, columns):
    draw, key = sketch.named(kind), jax.random.key(3)
    whole = np.asarray(draw(key, 300, columns))
    np.testing.assert_array_equal(draw(key, 120, columns, start=77), whole[77:197])
    np.testing.assert_array_equal(jax.jit(lambda i: draw(key, 40, columns, start=i))(jnp.int32(260)), whole[260:])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_eight_devices_draw_what_one_draws(kind):
    draw, key = sketch.named(kind), jax.random.key(4)
    mesh = placement.make_mesh(8)
    local = jax.shard_map(
        lambda: draw(key, 32, 12, start=32 * jax.lax.axis_index("features")),
        mesh=mesh, in_specs=(), out_specs=P("features", None), check_vma=False,
    )  # fmt: skip
    np.testing.assert_array_equal(jax.jit(local)(), draw(key, 256, 12))


@pytest.mark.parametrize("kind", SHORT)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_moments(kind, seed):
    rows, columns = 20_000, 16
    t = np.asarray(sketch.named(kind)(jax.random.key(seed), rows, columns), np.float64)
    # Means of `rows` independent numbers of variance 1 (means), at most l (squares and products): six deviations.
    assert np.abs(t.mean(0)).max() < 6 / rows**0.5
    assert np.abs(t.T @ t / rows - np.eye(columns)).max() < 6 * (columns / rows) ** 0.5
    pairs = t[: rows // 2] * t[rows // 2 :]  # rows are independent of each other: E[t @ t.T] = l I
    assert abs(pairs.sum(1).mean()) < 6 * (columns / (rows // 2)) ** 0.5


@pytest.mark.slow
def test_signs_are_signs_and_sparse_ones_are_sparse():
    key = jax.random.key(0)
    assert np.all(np.abs(sketch.sign(key, 100, 33)) == 1)
    for nonzeros, columns in ((1, 9), (4, 9), (8, 48), (8, 5)):
        t = np.asarray(sketch.sparse(key, 500, columns, nonzeros=nonzeros))
        count = min(nonzeros, columns)
        assert np.all((t != 0).sum(1) == count)
        np.testing.assert_allclose(np.square(t).sum(1), columns, rtol=1e-6)
        assert np.all((t != 0).any(0))  # every column is hit
    np.testing.assert_array_equal(sketch.count_sketch(key, 50, 6), sketch.sparse(key, 50, 6, nonzeros=1))


@pytest.mark.slow
def test_gaussian_entries_are_gaussian():
    t = np.asarray(sketch.gaussian(jax.random.key(1), 40_000, 3), np.float64)
    assert abs((t**4).mean() - 3) < 6 * (96 / t.size) ** 0.5  # var of z**4 is 96
    assert np.unique(sketch.gaussian(jax.random.key(2), 1000, 2)).size > 1990


def test_unknown_kind_is_refused_with_the_nearest():
    with pytest.raises(errors.ConfigError, match="did you mean 'gaussian'"):
        sketch.named("gausian")
