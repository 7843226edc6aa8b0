"""What the compiled kernels multiply, and in which precision: read from their HLO."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsub import placement
from jaxsub.linalg import gram, incremental, mode_gram, modes, orth, products, svd, unfold

pytestmark = pytest.mark.usefixtures("x64")


def zeros(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def kernels():
    mesh = placement.make_mesh(1)
    key = jax.random.key(0)
    rsvd = functools.partial(svd.randomized_svd.lower, zeros(512, 2048), key, rank=32)

    def update():
        return incremental._update.lower(incremental.start(8192, rows=64, dtype="float32"), zeros(32, 8192), mesh=mesh)

    return {
        "dense_gram": lambda: gram._dense_gram.lower(
            zeros(256, 8192), zeros(16, 256), np.int32(0), width=8192, mesh=mesh, dtype="float32"
        ),
        "combinations": lambda: gram._combinations.lower(
            zeros(64, 8192), zeros(8, 64), np.int32(0), width=8192, mesh=mesh, dtype="float32"
        ),
        "lora_gram": lambda: gram._lora_gram.lower(
            zeros(64, 16, 256),
            zeros(64, 16, 256),
            np.zeros((1, 3, 2), np.int32),
            size=32,
            own=64,
            mesh=mesh,
            dtype="float32",
            factor="float32",
        ),
        "mode_gram": lambda: mode_gram._mode_gram.lower(zeros(16, 256, 128), axis=1, dtype="float32"),
        "mode_gram_last": lambda: mode_gram._mode_gram.lower(zeros(16, 128, 256), axis=2, dtype="float32"),
        "mode_product": lambda: jax.jit(functools.partial(unfold.mode_product, axis=1)).lower(
            zeros(16, 256, 128), zeros(32, 256)
        ),
        "sketch": lambda: modes.sketch.lower(
            zeros(16, 256 * 512), key, jnp.int32(0), shape=(256, 512), axes=(0, 1), columns=32
        ),
        "cholesky_qr2": lambda: orth.cholesky_qr2.lower(zeros(8192, 32)),
        "cholesky_lq2": lambda: orth.cholesky_lq2.lower(zeros(32, 8192)),
        "gram_svd_wide": lambda: jax.jit(lambda x: svd.gram_svd(x, rank=16)).lower(zeros(64, 8192)),
        "gram_svd_tall": lambda: jax.jit(lambda x: svd.gram_svd(x, rank=16)).lower(zeros(8192, 64)),
        "randomized_even": lambda: rsvd(passes=4),
        "randomized_odd": lambda: rsvd(passes=5),
        "krylov": lambda: rsvd(passes=4, range_finder="krylov"),
        "incremental": update,
    }


def dots(text):
    """Lines of a compiled program that multiply matrices."""
    return [line for line in text.splitlines() if " dot(" in line]


FAST = ("dense_gram", "mode_gram", "mode_product")


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in sorted(kernels())]
)
def test_products_are_at_full_precision(name):
    text = kernels()[name]().compile().as_text()
    found = dots(text)
    assert found, "no product in this program: the test shows nothing"
    assert [line for line in found if "operand_precision={highest,highest}" not in line] == []


def test_a_product_of_default_precision_would_be_seen():
    text = jax.jit(lambda x: x @ x.T).lower(zeros(64, 64)).compile().as_text()
    assert dots(text) and not any("highest" in line for line in dots(text))


def test_which_16_bit_numbers_are_multiplied_as_they_are(monkeypatch):
    for flags, expected in (("fpu avx512_bf16 amx_bf16 amx_tile", True), ("fpu avx2", False), ("", False)):
        monkeypatch.setattr(products, "_flags", flags.split)
        takes = products.takes.__wrapped__
        assert takes("bfloat16") is expected
        assert not takes("float16") and not takes("float32")


def test_a_pinned_product_is_computed_as_it_is_written():
    """(48, D) tests: unpinned, XLA turns the product for a consumer that takes its transpose, 4 to 8 times slower."""
    turned = jax.jit(lambda x, y: products.row_major(products.matmul(y.T, x)).T)
    found = dots(turned.lower(zeros(64, 256), zeros(64, 48)).compile().as_text())
    assert len(found) == 1 and " = f32[48,256]{1,0} dot(" in found[0]
