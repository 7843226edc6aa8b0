"""Worlds that are drawn: what they claim to hold, seen with plain NumPy."""

import numpy as np
import pytest

from jaxsub import errors
from jaxsub.worlds import _synthetic, copies, noise, planted, shared_base, two_parents, two_parents_shared
from tests.worlds import oracles

BODY = "body/kernel"


@pytest.mark.slow
def test_planted_subspace_is_found_and_holds_its_share(tmp_path):
    options = planted.Options(num_models=80, rank=4, signal=0.5)
    planted.make(options, 3, tmp_path)
    layers, _ = oracles.read(tmp_path)
    for layer in _synthetic.LAYERS:
        x = layers[layer].reshape(80, -1)
        basis = _synthetic.basis(3, layer, 4)
        np.testing.assert_allclose(basis @ basis.T, np.eye(4), atol=1e-12)
        assert ((x @ basis.T) ** 2).sum() / (x**2).sum() == pytest.approx(0.5, abs=0.06)
        found = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)[2][:4]
        cosines = np.linalg.svd(found @ basis.T, compute_uv=False)
        # Spike D * signal / (k * noise) ~ 384 times the noise: cos^2 ~ 1 - D / (N * 384) = .95.
        assert cosines.min() > 0.95
        assert oracles.leave_one_out(x, 4) < 0.6
        assert oracles.mean_share(x) < 3 / 80


def test_layers_and_seeds_are_independent():
    options = planted.Options(num_models=30)
    a, b = planted.rows(options, 0, BODY), planted.rows(options, 1, BODY)
    size = min(a.shape[1], 1152)
    c = planted.rows(options, 0, "conv/kernel")[:, :size]
    for other in (b[:, :size], c):
        assert abs(np.corrcoef(a[:, :size].ravel(), other.ravel())[0, 1]) < 4 / np.sqrt(30 * size)


def test_noise_shares_nothing(tmp_path):
    noise.make(noise.Options(num_models=40), 0, tmp_path)
    x = oracles.read(tmp_path)[0][BODY]
    assert x.shape == (40, 48, 32)
    assert oracles.mean_share(x) == pytest.approx(1 / 40, abs=0.005)
    assert oracles.leave_one_out(x, 4) > 0.98
    assert x.std() == pytest.approx(_synthetic.SCALE, rel=0.02)


def test_shared_base_is_all_mean_and_no_subspace(tmp_path):
    shared_base.make(shared_base.Options(num_models=40, update=0.5), 0, tmp_path)
    x = oracles.read(tmp_path)[0][BODY]
    assert oracles.mean_share(x) == pytest.approx(1 / 1.25, abs=0.03)
    assert oracles.leave_one_out(x, 4) > 0.98


@pytest.mark.parametrize(("world", "within"), [(two_parents, 0.97), (two_parents_shared, 0.75)])
def test_two_parents_and_what_is_shared_within(tmp_path, world, within):
    world.make(world.Options(first=30, second=20), 0, tmp_path)
    layers, labels = oracles.read(tmp_path)
    x = layers[BODY].reshape(50, -1)
    first = np.array([label["start"] == "0" for label in labels])
    assert first.sum() == 30 and first[:30].sum() < 30  # shuffled: names say nothing
    cosine = oracles.cosines(x)
    assert cosine[np.ix_(first, first)].min() > 0.6
    assert np.abs(cosine[np.ix_(first, ~first)]).max() < 0.4
    residual = x - np.where(first[:, None], x[first].mean(axis=0), x[~first].mean(axis=0))
    left = oracles.leave_one_out(residual, 8)
    assert left > within if world is two_parents else left < within


def test_copies_are_bit_identical_and_near_copies_are_not(tmp_path):
    options = copies.Options(num_distinct=30, num_copies=12, num_near_copies=2, num_originals=5)
    copies.make(options, 0, tmp_path)
    layers, labels = oracles.read(tmp_path)
    together = np.concatenate([x.reshape(44, -1) for x in layers.values()], axis=1)
    assert len(np.unique(together, axis=0)) == 32
    cosine = oracles.cosines(together)
    near = np.argwhere(np.triu((cosine > 0.99) & (cosine < 1 - 1e-9), 1))
    assert len(near) == 2
    for i, j in near:
        assert labels[i]["start"] == labels[j]["start"]
        assert cosine[i, j] == pytest.approx(0.995, abs=0.001)


@pytest.mark.parametrize(
    ("world", "values", "named"),
    [
        (planted, {"num_models": 0}, "num_models"),
        (planted, {"signal": 1.5}, "signal"),
        (planted, {"rank": 49}, "rank"),
        (copies, {"num_copies": -1}, "num_copies"),
        (copies, {"num_distinct": 10}, "num_originals"),
        (two_parents, {"update": 0.0}, "update"),
    ],
)
def test_impossible_options_are_named(tmp_path, world, values, named):
    with pytest.raises(errors.ConfigError, match=named):
        world.make(world.Options(**values), 0, tmp_path)
    assert not (tmp_path / "models").exists()
