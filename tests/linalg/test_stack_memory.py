"""Kernels over a whole stack hold no second copy of it, and pieces give what the whole gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsub import hostmemory, placement, subspace
from jaxsub.linalg import (
    centring,
    certificates,
    gram,
    incremental,
    mode_gram,
    modes,
    moments,
    orth,
    pieces,
    rebuild,
    svd,
    tucker,
    unfold,
)
from jaxsub.linalg.gram import CHUNK
from tests.programs import resident
from tests.selected import first

pytestmark = pytest.mark.usefixtures("x64")
SHAPE = (32, 256, 1024)  # 32 MiB of float32
STACK = 4 * 32 * 256 * 1024


def like(shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def temporary(lowered):
    return lowered.compile().memory_analysis().temp_size_in_bytes


def normal(shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


BLOCK = (32, 2**18)
MESH = placement.make_mesh
FACTORS = {0: like((80, 256)), 1: like((300, 1024))}
KERNELS = {
    "rows' singular vectors": lambda: jax.jit(lambda x: svd.gram_svd(x, rank=4, dtype="float32")).lower(
        like((32, 2**18))
    ),
    "Gram matrix of the last axis": lambda: mode_gram._mode_gram.lower(like(SHAPE), axis=2, dtype="float32"),
    "coefficients of rows": lambda: rebuild.project_rows.lower(
        like((32, 2**18)), like((2**18,)), like((4, 2**18)), dtype=jnp.dtype("float32")
    ),
    "cores in float64": lambda: rebuild.project_models.lower(
        like(SHAPE), like(SHAPE[1:]), {a: like(f.shape, "float64") for a, f in FACTORS.items()}, dtype=jnp.float64
    ),
    "products in float64": lambda: unfold._mode_products.lower(
        like(SHAPE), [like(f.shape, "float64") for f in FACTORS.values()], axes=(1, 2), dtype=jnp.float64, mesh=None
    ),
    "centred rows of models with axes": lambda: centring.centred.lower(
        like(SHAPE), np.ones(32, bool), 32, as_rows=True
    ),
    "their coefficients": lambda: rebuild.project_rows.lower(
        like(SHAPE), like((2**18,)), like((4, 2**18)), dtype=jnp.dtype("float32")
    ),
    "their Gram matrix": lambda: gram._dense_gram.lower(
        like(SHAPE), like((0, 32)), np.int32(0), width=2**18, mesh=MESH(1), dtype="float32"
    ),
    "a factor before which no number of rows goes": lambda: unfold._mode_products.lower(
        like((3, 34843, 9, 9)), [like((4, 9))], axes=(2,), dtype=jnp.dtype("float32"), mesh=None
    ),
}


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_holds_less_than_the_stack_besides(name):
    assert temporary(KERNELS[name]()) < STACK


OF_16_BITS = {
    "dense sums": lambda dtype: gram._dense_gram.lower(
        like(BLOCK, dtype), like((0, 32)), np.int32(0), width=2**18, mesh=MESH(1), dtype="float32"
    ),
    "combinations": lambda dtype: gram._combinations.lower(
        like(BLOCK, dtype), like((4, 32)), np.int32(0), width=2**18, mesh=MESH(1), dtype="float32"
    ),
    "Gram matrix of rows": lambda dtype: orth._gram_sums.lower(like(BLOCK, dtype), dtype=jnp.dtype("float32"), long=1),
    "mode Gram, pieces of slices": lambda dtype: mode_gram._mode_gram.lower(
        like(SHAPE, dtype), axis=1, dtype="float32"
    ),
    "mode Gram, gathered": lambda dtype: mode_gram._mode_gram.lower(like(SHAPE, dtype), axis=2, dtype="float32"),
    "centred mode Gram": lambda dtype: modes.mode_gram.lower(
        like(BLOCK, dtype), shape=(256, 1024), axis=0, dtype="float32"
    ),
    "the axis' other side": lambda dtype: modes.unfolding_gram.lower(
        like(BLOCK, dtype), shape=(2**16, 4), dtype="float32"
    ),
    "coefficients of rows": lambda dtype: rebuild.project_rows.lower(
        like(BLOCK, dtype), like((2**18,)), like((4, 2**18)), dtype=jnp.dtype("float32")
    ),
    "what rows miss": lambda dtype: rebuild.missed_rows.lower(
        like(SHAPE, dtype), like((32, 4)), like((2**18,)), like((4, 2**18))
    ),
    "what models miss": lambda dtype: rebuild.missed_models.lower(
        like(SHAPE, dtype), like((32, 80, 300)), like((1, 1)), FACTORS
    ),
    "mode products": lambda dtype: unfold._mode_products.lower(
        like(SHAPE, dtype), list(FACTORS.values()), axes=(1, 2), dtype=jnp.dtype("float32"), mesh=None
    ),
    "residual": lambda dtype: certificates.residual_error.lower(
        like(BLOCK[::-1], dtype), like((2**18, 4)), like((4,)), like((4, 32))
    ),
    "residual of a Tucker decomposition": lambda dtype: tucker._residual_square.lower(
        like(SHAPE, dtype), like((32, 80, 300)), (None, *FACTORS.values()), dtype="float32"
    ),
    "a stream": lambda dtype: incremental._update.lower(
        incremental.start(2**18, rows=64, dtype="float32"), like(BLOCK, dtype), mesh=MESH(1)
    ),
    "mean": lambda dtype: jax.jit(lambda x: centring._means(x, None)).lower(like(SHAPE, dtype)),
    "new models": lambda dtype: moments._border.lower(
        like(BLOCK, dtype), like(BLOCK, dtype), like((2**18,), "float64"), mesh=MESH(1), dtype="float32"
    ),
}


@pytest.mark.parametrize("name", first(OF_16_BITS, 5))
def test_16_bits_are_not_made_32_of_a_whole_block(name):
    assert temporary(OF_16_BITS[name]("bfloat16")) < temporary(OF_16_BITS[name]("float16")) + 2**20


def test_a_plain_slice_of_bfloat16_would_convert_all():
    """What `pieces.box` is there for."""

    def run(slice_of):
        def sums(x):
            return pieces.fold(
                lambda start, size, s: s + jnp.sum(slice_of(x, start, size, 1).astype(jnp.float32), 1),
                2**18,
                CHUNK,
                jnp.zeros(32),
            )

        return temporary(jax.jit(sums).lower(like(BLOCK, "bfloat16")))

    assert run(pieces.part) < STACK / 8 < STACK <= run(jax.lax.dynamic_slice_in_dim)


def test_a_transposed_product_would_hold_the_stack():
    """What `row_gram` is there for."""
    whole = jax.jit(lambda x: orth.gram(x.T, dtype="float32")).lower(like((32, 2**18)))
    parts = jax.jit(lambda x: orth.row_gram(x, dtype="float32")).lower(like((32, 2**18)))
    assert temporary(whole) >= STACK > 4 * temporary(parts)
    x = normal((7, 3 * CHUNK + 5))
    np.testing.assert_allclose(orth.row_gram(jnp.asarray(x)), x.astype(np.float64) @ x.T.astype(np.float64), rtol=1e-12)


@pytest.mark.slow
@resident.needs_high_water_mark
def test_a_mean_in_one_sum_would_hold_the_stack_in_float64():
    """Out of sight of XLA's analysis; what `centring` is there for."""
    x = jax.device_put(normal((64, 512, 512)))  # 64 MiB

    def mean(x):
        return jnp.mean(x.astype(jnp.float64), axis=0).astype(x.dtype)

    def plain(x):
        y = x - mean(x)
        return y - mean(y)

    def grown(call):
        jax.block_until_ready(call())
        hostmemory.trim()
        return resident.grown(lambda: jax.block_until_ready(call()))

    whole, chunks = jax.jit(plain), np.ones(64, bool)
    assert grown(lambda: centring.energy(x, chunks)) < 0.3 * x.nbytes
    assert grown(lambda: centring.centred(x, chunks, 64)) < 1.3 * x.nbytes < grown(lambda: whole(x))


@pytest.mark.parametrize("dtype", first(["bfloat16", "float32", "float64"]))
def test_centred_models_and_their_energy_are_the_twin_s(dtype):
    x = jnp.asarray(normal((9, 5, CHUNK // 3)) + 100.0).astype(dtype)
    wide = np.asarray(x, np.float64)
    y, mean = centring.centred(x, np.ones(9, bool), 9)
    step = 1e-13 if dtype == "float64" else 2e-5  # eps of numbers near 100
    np.testing.assert_allclose(y, wide - wide.mean(0), atol=step)
    np.testing.assert_allclose(mean, wide.mean(0), rtol=1e-6)
    assert float(centring.energy(x, np.ones(9, bool))) == pytest.approx(np.square(wide - wide.mean(0)).sum(), rel=1e-5)
    assert np.abs(np.asarray(y, np.float64).sum(0)).max() < step / 8  # what rounding left of the mean is gone too
    for axis, over in ((0, (0, 2)), (1, (0, 1))):
        columns, _ = centring.centred(x, np.ones(9, bool), 9, by="columns", axis=axis)
        np.testing.assert_allclose(columns, wide - wide.mean(over, keepdims=True), atol=step)


@pytest.mark.parametrize("count", [1, 7, 8, 13])
def test_pieces_of_models_are_the_whole_whatever_is_left_over(count, monkeypatch):
    x, factors = normal((count, 6, 5)), [None, jnp.asarray(normal((2, 6))), jnp.asarray(normal((3, 5)))]
    whole = unfold.mode_products(jnp.asarray(x), factors)
    monkeypatch.setattr(unfold, "PIECE", 4 * 30)
    some = unfold.in_pieces(lambda z: unfold.chain(z, factors[1:], (1, 2)), jnp.asarray(x))
    np.testing.assert_allclose(some, whole, rtol=1e-6)
    np.testing.assert_allclose(whole, np.einsum("noi,ko,li->nkl", x, *factors[1:]), atol=1e-5)


def test_coefficients_of_millions_of_features_keep_their_digits():
    """One float32 product over them all loses a digit at 2**20 already, two at 2**22."""
    x, basis = normal((1, 2**20)), normal((3, 2**20), 1)
    wanted = x.astype(np.float64) @ basis.T.astype(np.float64)
    mean = np.zeros(2**20, np.float32)
    found = np.asarray(rebuild.project_rows(x, mean, basis, dtype=jnp.dtype("float32")), np.float64)
    plain = np.asarray(jnp.matmul(x, basis.T, precision="highest"), np.float64)
    assert np.abs(found - wanted).max() < 3e-6 * np.abs(wanted).max() < np.abs(plain - wanted).max()


def test_coefficients_keep_the_room_of_a_wider_mean():
    """float32 factors with a float64 mean: what `subspace.scaled` makes of enormous weights."""
    factor = np.linalg.qr(normal((5, 5)))[0].astype(np.float32)
    space = subspace.TuckerSubspace(jnp.zeros((5,), jnp.float64), {0: jnp.asarray(factor)}, {}, (5,), None, None)
    c = normal((2, 5), 1, np.float64)
    for scale in (1e40, 1.0, 1e-45):
        found = np.asarray(space.reconstruct(jnp.asarray(c * scale)))
        np.testing.assert_allclose(found, c * scale @ factor.astype(np.float64), rtol=1e-12)
        np.testing.assert_allclose(space.project(found), c * scale, rtol=1e-5)
