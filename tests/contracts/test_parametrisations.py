"""Every parametrisation: it starts at the network, its factored products are those of the dense weights, and so are its
gradients; what it needs of a bundle it says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsub import plugins
from jaxsub.models import cnn, mlp
from jaxsub.parametrisations import _spaces, _values
from jaxsub.tasks import digits
from jaxsub.training import network as networks, steps
from tests.selected import first

NAMES = plugins.available("parametrisations")
INPUTS = jax.random.uniform(jax.random.key(5), (6, 64))
MLP, SHAPES = networks.of(mlp.MLP(hidden=12, activation="tanh"), INPUTS)
START = {
    name: 0.3 * jax.random.normal(jax.random.fold_in(jax.random.key(1), i), shape)
    for i, (name, shape) in enumerate(SHAPES.items())
}
OPTIONS = {"random_subspace": {"rank": 3}, "moving_basis": {"rank": 3}, "scalar": {"rank": 3}}


def space_of(name, shape, *, rank=4, factors=False, members=9):
    rng = np.random.default_rng([len(name), *shape])

    def rows(k, d):
        return np.linalg.qr(rng.standard_normal((d, k)))[0].T.astype(np.float32)

    mean, values = np.asarray(START[name]), {-1: np.arange(rank, 0, -1.0)}
    if factors:
        sides = {axis: rows(min(rank, size), size) for axis, size in enumerate(shape)}
        sizes = tuple(len(f) for f in sides.values())
        coefficients = rng.standard_normal((members, *sizes)).astype(np.float32)
        values = {axis: np.arange(len(f), 0, -1.0) for axis, f in sides.items()}
        return _spaces.Space(mean, None, sides, coefficients, values, False, (0, 1))
    basis = rows(rank, int(np.prod(shape))).reshape(rank, *shape)
    coefficients = rng.standard_normal((members, rank)).astype(np.float32)
    return _spaces.Space(mean, basis, {}, coefficients, values, False, tuple(range(len(shape))))


def spaces_for(name):
    kernels = [n for n in SHAPES if n.endswith("kernel")]
    return {n: space_of(n, SHAPES[n], factors=name in ("core", "factor")) for n in kernels}


def begun(name, **options):
    module = plugins.load("parametrisations", name)
    made = module.Options(**{**OPTIONS.get(name, {}), **options})
    spaces = spaces_for(name) if module.NEEDS_SPACES else {}
    trainable, frozen = module.init(jax.random.key(0), START, spaces, made)
    return module, made, trainable, frozen


def moved(trainable):
    leaves, structure = jax.tree.flatten(trainable)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    return jax.tree.unflatten(
        structure, [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    )


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.mark.slow
def test_training_begins_at_the_network(name):
    module, options, trainable, frozen = begun(name)
    found = module.params(trainable, frozen, options)
    assert sorted(found) == sorted(START)
    for layer, w in found.items():
        np.testing.assert_allclose(_values.dense(w), START[layer], atol=2e-6)


@pytest.mark.slow
def test_what_is_trained_reaches_the_weights(name):
    module, options, trainable, frozen = begun(name)
    found = module.params(moved(trainable), frozen, options)
    changed = [n for n, w in found.items() if np.abs(np.asarray(_values.dense(w)) - START[n]).max() > 1e-3]
    assert {n for n in SHAPES if n.endswith("kernel")} <= {*changed}


@pytest.mark.slow
def test_outputs_and_gradients_are_those_of_the_dense_weights(name):
    module, options, trainable, frozen = begun(name)
    trainable, labels = moved(trainable), jnp.arange(6) % 10

    def loss(trainable, is_dense):
        weights = module.params(trainable, frozen, options)
        if is_dense:
            weights = {n: _values.dense(w) for n, w in weights.items()}
        return digits.loss(MLP(weights, INPUTS), labels)

    for is_dense in (False, True):
        value, gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)(trainable, is_dense)
        if not is_dense:
            own = value, gradient
    np.testing.assert_allclose(own[0], value, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(own[1]), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradient)) > 1e-3


FACTORED = ("core", "factor", "lora", "tucker")


@pytest.mark.parametrize("name", first(FACTORED, 2))
def test_no_dense_product_of_factors_is_formed(name):
    module, options, trainable, frozen = begun(name)
    trainable = moved(trainable)

    def products(function):
        text = str(jax.make_jaxpr(function)(trainable))
        wanted = "f32[64,12] = dot_general"
        return text.count(wanted)

    def outputs(trainable):
        return MLP(module.params(trainable, frozen, options), INPUTS)

    def formed(trainable):
        weights = module.params(trainable, frozen, options)
        return MLP({n: _values.dense(w) for n, w in weights.items()}, INPUTS)

    assert products(outputs) == 0
    assert products(formed) == 1  # the count can tell


def test_it_says_what_it_is(name):
    module = plugins.load("parametrisations", name)
    assert dataclasses.is_dataclass(module.Options) and isinstance(module.REFERENCE, str)
    assert module.NEEDS_SPACES in (True, False)
    hash(module.Options())


@pytest.mark.slow
def test_the_same_key_gives_the_same_start(name):
    first, second = begun(name)[2:], begun(name)[2:]
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)


def test_parameter_counts_of_the_papers():
    """12,288: roberta-base, K = 32, r = 8, q and v of 12 layers; 10,240: 40 matrices of a ViT, cores 16 x 16."""
    rng = np.random.default_rng(0)

    def space(k, size):
        rows = np.linalg.qr(rng.standard_normal((size, k)))[0].T.astype(np.float32)
        cores, values = np.zeros((3, k, k), np.float32), {0: np.ones(k), 1: np.ones(k)}
        return _spaces.Space(None, None, {0: rows, 1: rows}, cores, values, True, (1, 0))

    shape = jax.ShapeDtypeStruct((768, 768), jnp.float32)
    factor = plugins.load("parametrisations", "factor")
    spaces = dict.fromkeys([f"layer_{n}/{part}/kernel" for n in range(12) for part in "qv"], space(32, 768))
    trainable, _ = factor.init(jax.random.key(0), dict.fromkeys(spaces, shape), spaces, factor.Options(rank=8))
    assert steps.count(trainable) == 12288
    core = plugins.load("parametrisations", "core")
    spaces = dict.fromkeys([f"layer_{n}/kernel" for n in range(40)], space(16, 768))
    trainable, _ = core.init(jax.random.key(0), dict.fromkeys(spaces, shape), spaces, core.Options())
    assert steps.count(trainable) == 10240


@pytest.mark.slow
def test_kernels_of_convolutions_take_tucker_adapters_and_cores():
    network, shapes = networks.of(cnn.CNN(channels=4), INPUTS)
    start = {n: 0.2 * jax.random.normal(jax.random.key(i), s) for i, (n, s) in enumerate(shapes.items())}
    tucker = plugins.load("parametrisations", "tucker")
    trainable, frozen = tucker.init(jax.random.key(0), start, {}, tucker.Options(rank=2))
    assert trainable["second_1/kernel"]["core"].shape == (2, 2, 2, 2)
    parts = moved(trainable)
    found = tucker.params(parts, frozen, tucker.Options(rank=2))
    own = parts["second_1/kernel"]
    wanted = np.einsum(
        "abio,ah,bw,im,on->hwmn", *(np.asarray(own[k], np.float64) for k in ("core", "0", "1", "2", "3"))
    )
    np.testing.assert_allclose(found["second_1/kernel"] - start["second_1/kernel"], 2 * wanted, rtol=1e-4, atol=1e-5)
    assert np.abs(network(found, INPUTS) - network(start, INPUTS)).max() > 1e-3
