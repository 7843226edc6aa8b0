"""Programs side by side give what one program gives, whatever is left over; and where there is only one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from jaxsub import hostmemory, placement
from jaxsub.linalg import gram, mode_gram, orth, pieces
from tests.selected import first

pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture(params=first([3, 2]))
def cores(request, monkeypatch):
    monkeypatch.setattr(hostmemory, "cores", lambda: request.param)
    return request.param


def random(*shape):
    return np.random.default_rng(len(shape)).standard_normal(shape, np.float32)


@pytest.mark.parametrize("number", [1, 2, 3, 5])
@pytest.mark.parametrize("length", [4, 30, 31, 32])
def test_shares_cover_every_entry_once(number, length):
    def step(start, size, total):
        return jax.lax.dynamic_update_slice(total, jax.lax.dynamic_slice(total, (start,), (size,)) + 1, (start,))

    found = [
        jax.jit(lambda i: pieces.fold(step, length, 4, jnp.zeros(length), (i, number)))(np.int32(i))
        for i in range(number)
    ]
    np.testing.assert_array_equal(sum(found), 1)
    np.testing.assert_array_equal(pieces.fold(step, length, 4, jnp.zeros(length)), 1)


@pytest.mark.parametrize(
    "shape, axis",
    first(
        [
            ((20, 512 * 100 + 7), 0),  # columns in pieces of 512, groups of 16 pieces, and rest
            ((70, 20, 512), 1),  # whole slices
            ((4001, 20, 9), 1),  # a short trailing axis, gathered
            ((25_601, 12), 1),  # the last axis
            ((260, 130, 300), 1),  # two row blocks, slices with a rest
        ],
        3,
    ),
)
@pytest.mark.parametrize("stored", first(["float32", "bfloat16"]))
def test_mode_grams(cores, shape, axis, stored):
    x = jnp.asarray(random(*shape), stored)
    assert pieces.programs(x, x.size // shape[axis] // mode_gram.FEW) == cores
    rows = np.moveaxis(np.asarray(x, np.float64), axis, 0).reshape(shape[axis], -1)
    found = mode_gram.mode_gram(x, axis=axis, dtype="float32")
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, rows @ rows.T, atol=3e-7 * np.square(rows).sum(1).max())
    np.testing.assert_allclose(found, mode_gram._mode_gram(x, axis=axis, dtype="float32"), atol=3e-7 * found.max())


@pytest.mark.parametrize("width", [70, 130])
@pytest.mark.parametrize("kernel", ["gram", "row_gram"])
def test_grams_of_a_long_side(cores, kernel, width):
    x = random(512 * 48 + 5, width)
    given = jnp.asarray(x if kernel == "gram" else x.T)
    assert pieces.programs(given, 48) == cores
    found = getattr(orth, kernel)(given, dtype="float32")
    exact = x.T.astype(np.float64) @ x
    np.testing.assert_allclose(found, exact, atol=3e-7 * exact.max())
    np.testing.assert_allclose(
        jax.jit(lambda y: getattr(orth, kernel)(y, dtype="float32"))(given), exact, atol=3e-7 * exact.max()
    )


def test_one_program_where_several_gain_nothing(cores):
    x = jnp.zeros((4, 2**20))
    assert pieces.programs(x, 2**11) == cores
    assert pieces.programs(x, pieces.MANY * 2 - 1) == 1  # few pieces
    assert pieces.programs(jax.device_put(x, NamedSharding(placement.make_mesh(8), P())), 2**11) == 1
    traced = []
    jax.jit(lambda y: traced.append(pieces.programs(y, 2**11)) or y)(x)
    assert traced == [1]


def test_pieces_of_a_block_are_equal(cores):
    mesh = placement.make_mesh(1)
    for width in (gram.MANY * gram.PRODUCT * 6, gram.MANY * gram.PRODUCT * 6 + 1, 7, gram.MANY * gram.PRODUCT - 1):
        number = gram.num_pieces(width, mesh)
        assert width % number == 0 and number <= cores and (number == 1 or width >= gram.MANY * gram.PRODUCT)
    assert gram.num_pieces(gram.MANY * gram.PRODUCT * 6, mesh) == cores


def test_errors_of_a_program_are_raised():
    def kernel(x, index):
        if index:
            raise ValueError("second")
        return x

    with pytest.raises(ValueError, match="second"):
        pieces.side_by_side(kernel, np.zeros(1), 2)


def test_a_trace_around_a_concrete_array_stays_in_one_program(cores):
    """Threads have no part in it: what they were given would be an array of a trace that is not theirs."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((512 * 40 + 3, 70)), jnp.float32)
    mesh, weights = placement.make_mesh(1), jnp.zeros((0, 70), jnp.float32)
    kernels = {
        "gram": lambda: orth.gram(x),
        "mode Gram": lambda: mode_gram.mode_gram(x, axis=1, dtype="float32"),
        "dense": lambda: gram.dense_gram(jnp.tile(x.T, (1, 4)), weights, mesh=mesh, dtype="float32")[0].gram,
    }
    for name, kernel in kernels.items():
        inside = jax.jit(lambda w, kernel=kernel: kernel() + w)(0.0)
        np.testing.assert_allclose(inside, kernel(), rtol=1e-5, atol=1e-2, err_msg=name)
