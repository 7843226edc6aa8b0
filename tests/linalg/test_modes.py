"""Mode Grams against explicit unfoldings; sketches against them, and against a variant that flatters itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsub import placement
from jaxsub.linalg import gram, modes, reference
from jaxsub.pipelines import axes, layers
from tests.linalg.compiled import COLLECTIVE, collective_bytes
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


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
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


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sketch_finds_a_low_rank_mode(seed):
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((256, 4)))[0]
    x = np.einsum("ok,nki->noi", basis, rng.standard_normal((24, 4, 96))).astype(np.float32)
    first, second = sketch(x, layers.layer_key("w", seed))[0]
    assert axes._cross_shares(first, second)[0][:4].sum() > 0.999
    assert axes._cross_shares(first, second)[0][:3].sum() < 0.999


def on(x, devices, whole_rows=False):
    """Rows (N, D') on a mesh with zeros behind them, and the mesh; `whole_rows`: no row is split between devices."""
    mesh, shape = placement.make_mesh(devices), x.shape[1:]
    row = int(np.prod(shape[1:])) if whole_rows else 64
    width = -(-x[0].size // (row * devices)) * row * devices
    flat = np.pad(x.reshape(len(x), -1), ((0, 0), (0, width - x[0].size)))
    return place(flat, mesh), mesh


# More and fewer models than devices, and no multiple of them.
SHARDED = [(17, (40, 3)), (12, (6, 5)), (3, (4, 3, 2, 2))]


@pytest.mark.slow
@pytest.mark.parametrize("devices", [8, 2, 4])
@pytest.mark.parametrize(("count", "shape"), SHARDED)
def test_grams_of_sharded_rows_are_those_of_one_device(count, shape, devices):
    x = stack(shape, count) + 1
    (one, _), (many, mesh) = on(x, 1), on(x, devices)
    with jax.enable_x64(True):
        for axis in range(len(shape)):
            same = {"shape": shape, "axis": axis, "dtype": "float64"}
            want, got = modes.mode_gram(one, **same), modes.mode_gram(many, **same, mesh=mesh)
            np.testing.assert_allclose(got, want, atol=1e-13 * np.abs(want).max())
        rows, _ = on(x, devices, whole_rows=True)
        want = modes.unfolding_gram(one, shape=shape, dtype="float64")
        got = modes.unfolding_gram(rows, shape=shape, dtype="float64", mesh=mesh)
        np.testing.assert_allclose(got, want, atol=1e-13 * np.abs(want).max())
        for last in (False, True) if len(shape) == 2 else ():
            want = modes.model_grams(one, shape=shape, last=last)
            got = modes.model_grams(many, shape=shape, last=last, mesh=mesh)
            np.testing.assert_allclose(got, want, atol=1e-13 * np.abs(want).max())


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4, 8])
@pytest.mark.parametrize("shape", [(30, 20), (4, 3, 2, 2)])
def test_sketches_do_not_depend_on_the_mesh(shape, devices):
    z, key, axes_ = stack(shape, 16), layers.layer_key("w", 0), tuple(range(len(shape)))
    (one, _), (many, mesh) = on(z, 1), on(z, devices)
    with jax.enable_x64(True):
        given = {"shape": shape, "axes": axes_, "columns": 32}
        wanted = modes.sketch(one, key, jnp.int32(0), **given)
        found = modes.sketch(many, key, jnp.int32(0), **given, mesh=mesh)
    for want, got in zip(wanted, found, strict=True):
        np.testing.assert_array_equal(got, want)


def kinds(text):
    return {found[1] for found in COLLECTIVE.finditer(text)}


@pytest.mark.slow
def test_what_devices_send_each_other():
    """Models are dealt out once, sums are small: per device N D' / devices numbers and d^2, never a gather."""
    devices, count, shape = 8, 16, (64, 48)
    x, mesh = on(stack(shape, count), devices)
    width = x.shape[1]
    with jax.enable_x64(True):
        compiled = modes.mode_gram.lower(x, shape=shape, axis=0, dtype="float32", mesh=mesh).compile().as_text()
        assert kinds(compiled) == {"all-to-all", "all-reduce"}
        # A step deals out as many models as there are devices; there are count / devices steps.
        assert collective_bytes(compiled) <= 4 * width + 8 * 64**2
        rows, _ = on(stack((100, 3), 4), devices, whole_rows=True)
        compiled = modes.unfolding_gram.lower(rows, shape=(100, 3), dtype="float32", mesh=mesh).compile().as_text()
        assert kinds(compiled) == {"all-reduce"} and collective_bytes(compiled) == 8 * 12**2


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_energies_of_a_sketched_axis_do_not_flatter(seed):
    x = stack((256, 64), num_models=24, seed=seed)
    exact = reference.mode_energies(x, 0)
    mode = axes.sketched_mode(0, sketch(x, layers.layer_key("w", seed))[0], exact.sum())
    assert mode.size == 256 and mode.columns == 512 and mode.total == exact.sum()
    assert (np.cumsum(mode.values)[:32] <= np.cumsum(exact)[:32] + 0.01 * exact.sum()).all()
    assert np.cumsum(mode.values)[31] > 0.1 * exact.sum()
