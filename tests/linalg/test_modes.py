"""Mode Grams against explicit unfoldings; sketches against them, and against a variant that flatters itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsub import placement
from jaxsub.linalg import gram, modes, reference
from jaxsub.pipelines import axes, layers
from tests.linalg.matrices import place


def stack(shape, num_models=12, seed=0):
    return np.random.default_rng(seed).standard_normal((num_models, *shape)).astype(np.float32)


@pytest.mark.parametrize("shape", [(6, 5), (1, 9), (4, 3, 2, 2), (16,)])
def test_mode_gram_equals_the_unfolding(shape):
    x = stack(shape) + 5
    for axis in range(len(shape)):
        with jax.enable_x64(True):
            padded = np.pad(x.reshape(len(x), -1), ((0, 0), (0, 7)))
            k = np.asarray(modes.mode_gram(jnp.asarray(padded), shape=shape, axis=axis, dtype="float64"))
        want = reference.mode_energies(x, axis)
        got = np.linalg.eigvalsh(k)[::-1]
        np.testing.assert_allclose(got[: len(want)], want, atol=1e-10 * want[0])


@pytest.mark.parametrize("shape", [(7, 3), (3, 7), (5, 5)])
def test_model_grams_hold_each_models_singular_values(shape):
    x = stack(shape)
    with jax.enable_x64(True):
        flat = jnp.asarray(x.reshape(len(x), -1))
        grams = np.asarray(modes.model_grams(flat, shape=shape, last=shape[1] <= shape[0]))
    got = np.sqrt(np.maximum(np.linalg.eigvalsh(grams)[:, ::-1], 0))
    np.testing.assert_allclose(got, np.linalg.svd(x.astype(np.float64), compute_uv=False), rtol=1e-6)


def sketch(x, key, devices=1):
    mesh = placement.make_mesh(devices)
    with jax.enable_x64(True):
        flat = place(x.reshape(len(x), -1), mesh)
        weights = modes.mixtures(key, len(x), 16)
        _, mixed = gram.dense_gram(flat, weights, mesh=mesh, dtype="float32")
        found = modes.sketch(mixed, key, jnp.int32(0), shape=x.shape[1:], axes=(0, 1), columns=32)
        return [np.asarray(t) for t in found]


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in (1, 2))])
def test_sketched_energies_do_not_flatter(seed):
    """A flat mode spectrum: directions scored on the half that found them claim too much; across halves never."""
    x = stack((256, 64), num_models=24, seed=seed)
    exact = reference.mode_energies(x, 0)
    exact = np.cumsum(exact) / exact.sum()
    first, second = sketch(x, layers.layer_key("w", seed))[0]
    honest = np.cumsum(axes._cross_shares(first, second)[0])
    flattering = np.cumsum(axes._cross_shares(first, first)[0])
    assert (honest[:32] <= exact[:32] + 0.01).all()
    assert flattering[31] > exact[31] + 0.05


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sketch_finds_a_low_rank_mode(seed):
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((256, 4)))[0]
    x = np.einsum("ok,nki->noi", basis, rng.standard_normal((24, 4, 96))).astype(np.float32)
    first, second = sketch(x, layers.layer_key("w", seed))[0]
    assert axes._cross_shares(first, second)[0][:4].sum() > 0.999
    assert axes._cross_shares(first, second)[0][:3].sum() < 0.999


@pytest.mark.slow
def test_sketch_is_the_same_on_eight_devices():
    x, key = stack((64, 32)), layers.layer_key("w", 0)
    for one, eight in zip(sketch(x, key, 1), sketch(x, key, 8), strict=True):
        np.testing.assert_allclose(one, eight, atol=2e-4 * np.abs(one).max())


@pytest.mark.parametrize("seed", [0, 1])
def test_the_energies_of_a_sketched_axis_do_not_flatter(seed):
    x = stack((256, 64), num_models=24, seed=seed)
    exact = reference.mode_energies(x, 0)
    mode = axes.sketched_mode(0, sketch(x, layers.layer_key("w", seed))[0], exact.sum())
    assert mode.size == 256 and mode.columns == 512 and mode.total == exact.sum()
    assert (np.cumsum(mode.values)[:32] <= np.cumsum(exact)[:32] + 0.01 * exact.sum()).all()
    assert np.cumsum(mode.values)[31] > 0.1 * exact.sum()
