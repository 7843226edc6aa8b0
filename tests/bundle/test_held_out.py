"""Held-out errors in the manifest, against fits by NumPy that never saw the models they are measured on."""

import zlib

import numpy as np
import pytest

import jaxsub
from jaxsub.formats import peft, safetensors

COUNT, SEED = 10, 4


def halves(name):
    order = np.random.default_rng([SEED, zlib.crc32(name.encode())]).permutation(COUNT)
    return order[: COUNT // 2], order[COUNT // 2 :]


def leading(unfolding, rank):
    return np.linalg.svd(unfolding, full_matrices=False)[0][:, :rank]


def by_halves(x, ranks, name, *, centred):
    """Squared error of HOSVD factors of one half on the other, over that without them; float64 x (N, o, i)."""
    left = alone = 0.0
    for chosen, others in (halves(name), halves(name)[::-1]):
        mean = x[chosen].mean(0) if centred else 0.0
        seen, strangers = x[chosen] - mean, x[others] - mean
        u = leading(np.concatenate(list(seen), axis=1), ranks[0])
        v = leading(np.concatenate([w.T for w in seen], axis=1), ranks[1])
        left += np.square(strangers - u @ u.T @ strangers @ v @ v.T).sum()
        alone += np.square(strangers).sum()
    return left / alone


@pytest.fixture(scope="module")
def worlds():
    """Models in a planted Tucker subspace, and noise; both (N, 8, 6)."""
    rng = np.random.default_rng(0)
    cores = rng.standard_normal((COUNT, 2, 2))
    planted = np.einsum("nkl,ko,li->noi", cores, rng.standard_normal((2, 8)), rng.standard_normal((2, 6)))
    return {"planted": planted + 0.01 * rng.standard_normal(planted.shape), "noise": rng.standard_normal((COUNT, 8, 6))}


@pytest.mark.slow
def test_dense_tucker_fits(worlds, tmp_path):
    for n in range(COUNT):
        safetensors.write(tmp_path / f"m{n}.safetensors", {k: x[n].astype(np.float32) for k, x in worlds.items()})
    made = jaxsub.fit(str(tmp_path), decomposition="hosvd", rank=2, seed=SEED)
    for layer in made.layers:
        x = worlds[layer.name].astype(np.float32).astype(np.float64)
        assert layer.figures["held_out_by"] == "half of the models"
        assert layer.figures["held_out"] == pytest.approx(by_halves(x, (2, 2), layer.name, centred=True), rel=1e-4)
    noise, planted = made.layers
    assert planted.figures["held_out"] < 1e-3
    assert noise.figures["held_out"] > 1.1 * (1 - noise.figures["energy_kept"])  # which the fit has seen


@pytest.mark.slow
def test_low_rank_updates(worlds, tmp_path):
    updates = {}
    for n in range(COUNT):
        pairs = {}
        for name, x in worlds.items():
            left, s, right = np.linalg.svd(x[n])
            b, a = (left[:, :2] * s[:2]).astype(np.float32), right[:2].astype(np.float32)
            pairs[name] = (a, b, 2, 2)
            updates.setdefault(name, []).append(b.astype(np.float64) @ a)
        peft.write(tmp_path / f"m{n}", pairs)
    made = jaxsub.fit(str(tmp_path), decomposition="hosvd", rank=2, seed=SEED)
    for layer in made.layers:
        wanted = by_halves(np.array(updates[layer.name]), (2, 2), layer.name, centred=False)
        assert layer.figures["held_out"] == pytest.approx(wanted, rel=1e-4, abs=1e-9)


@pytest.mark.slow
def test_three_models_leave_no_halves(worlds, tmp_path):
    for n in range(3):
        safetensors.write(tmp_path / f"m{n}.safetensors", {"w": worlds["noise"][n]})
    made = jaxsub.fit(str(tmp_path), decomposition="hosvd", rank=1)
    assert made.layers[0].figures["held_out"] is None
