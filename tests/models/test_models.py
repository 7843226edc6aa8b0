"""Networks against slow ones of another making: NumPy in float64, and XLA's own convolution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsub.models import _blocks, _trees, cnn, transformer, vit
from tests.selected import first


@pytest.mark.parametrize(("size", "stride"), first([(1, 2), (3, 2), (3, 1), (5, 1)]))
def test_convolution_is_that_of_xla(size, stride):
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    layer = _blocks.Conv(4, size=size, stride=stride)
    params = layer.init(jax.random.key(1), x)
    params = jax.tree.map(lambda p: p + 0.1, params)
    edge = size // 2
    found = jax.lax.conv_general_dilated(
        x, params["params"]["kernel"], (stride, stride), ((edge, edge), (edge, edge)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    np.testing.assert_allclose(layer.apply(params, x), found + 0.1, rtol=1e-4, atol=1e-5)


def dense(x, weights, name):
    return x @ weights[f"{name}/kernel"] + weights[f"{name}/bias"]


def normed(x, weights, name):
    x = x - x.mean(axis=-1, keepdims=True)
    x = x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + 1e-6)
    return x * weights[f"{name}/scale"] + weights[f"{name}/bias"]


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def block(x, weights, name, heads, is_causal):
    """The transformer block, one head and one row at a time."""
    width = x.shape[1] // heads
    h = normed(x, weights, f"{name}/norm_attention")
    query, key, value = (dense(h, weights, f"{name}/{part}") for part in ("query", "key", "value"))
    mixed = np.zeros_like(x)
    for head in range(heads):
        own = slice(head * width, (head + 1) * width)
        for t in range(len(x)):
            last = t + 1 if is_causal else len(x)
            logits = key[:last, own] @ query[t, own] / np.sqrt(width)
            shares = np.exp(logits) / np.exp(logits).sum()
            mixed[t, own] = shares @ value[:last, own]
    x = x + dense(mixed, weights, f"{name}/output")
    h = gelu(dense(normed(x, weights, f"{name}/norm_mlp"), weights, f"{name}/up"))
    return x + dense(h, weights, f"{name}/down")


def started(model, x):
    params = jax.jit(model.init)(jax.random.key(0), x)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [p + 0.1 * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys, strict=True)]
    params = jax.tree.unflatten(tree, moved)  # biases and norms, too, are none of 0 and 1
    return params, {n: np.asarray(p, np.float64) for n, p in _trees.flat(params["params"]).items()}


@pytest.mark.slow
def test_vision_transformer():
    x = jax.random.normal(jax.random.key(2), (3, 64))
    model = vit.ViT()
    params, weights = started(model, x)
    found = []
    for image in np.asarray(x, np.float64).reshape(-1, 8, 8):
        patches = np.stack([image[r : r + 2, c : c + 2].ravel() for r in range(0, 8, 2) for c in range(0, 8, 2)])
        h = dense(patches, weights, "embedding") + weights["position"]
        for name in ("block_0", "block_1"):
            h = block(h, weights, name, 2, is_causal=False)
        found.append(dense(normed(h, weights, "norm").mean(axis=0), weights, "head"))
    np.testing.assert_allclose(jax.jit(model.apply)(params, x), found, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_language_model():
    x = jax.random.randint(jax.random.key(2), (2, 9), 0, 27)
    model = transformer.Transformer()
    params, weights = started(model, x)
    found = []
    for row in np.asarray(x):
        h = weights["embedding"][row] + weights["position"]
        for name in ("block_0", "block_1"):
            h = block(h, weights, name, 2, is_causal=True)
        found.append(dense(normed(h, weights, "norm"), weights, "head"))
    np.testing.assert_allclose(jax.jit(model.apply)(params, x), found, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_residual_network():
    x = jax.random.normal(jax.random.key(2), (3, 64))
    model = cnn.CNN(channels=4)
    params, weights = started(model, x)

    def conv(h, name, stride=1):
        kernel = weights[f"{name}/kernel"]
        edge = len(kernel) // 2
        padded = np.pad(h, ((edge, edge), (edge, edge), (0, 0)))
        out = np.zeros((-(-h.shape[0] // stride), -(-h.shape[1] // stride), kernel.shape[3]))
        for r in range(out.shape[0]):
            for c in range(out.shape[1]):
                seen = padded[r * stride : r * stride + len(kernel), c * stride : c * stride + len(kernel)]
                out[r, c] = np.einsum("abi,abio->o", seen, kernel)
        return out + weights[f"{name}/bias"]

    def relu(h):
        return np.maximum(h, 0)

    found = []
    for image in np.asarray(x, np.float64).reshape(-1, 8, 8, 1):
        h = relu(conv(image, "stem"))
        h = relu(h + 0.5 * conv(relu(conv(h, "first_1")), "first_2"))
        h = relu(conv(h, "shortcut", 2) + 0.5 * conv(relu(conv(h, "second_1", 2)), "second_2"))
        found.append(dense(h.mean(axis=(0, 1)), weights, "head"))
    np.testing.assert_allclose(jax.jit(model.apply)(params, x), found, rtol=1e-3, atol=1e-4)
    assert {w.ndim for w in weights.values()} == {1, 2, 4}


@pytest.mark.slow
def test_later_characters_do_not_reach_earlier_ones():
    model = transformer.Transformer()
    x = jnp.zeros((1, 8), jnp.int32)
    params, _ = started(model, x)
    apply = jax.jit(model.apply)
    changed = apply(params, x.at[0, 5].set(3)) - apply(params, x)
    assert np.abs(changed[0, :5]).max() == 0 < np.abs(changed[0, 5:]).max()


def test_names_and_trees():
    tree = {"a": {"b": {"kernel": 1}, "bias": 2}, "c": 3}
    assert _trees.flat(tree) == {"a/b/kernel": 1, "a/bias": 2, "c": 3}
    assert _trees.nested(_trees.flat(tree)) == tree
