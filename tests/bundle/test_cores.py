"""Cores of low-rank updates in halves: exact at the updates' own rank, the truncated SVD where nothing is shared."""

import itertools

import numpy as np
import pytest

import jaxsub
from jaxsub.bundle import cores, files
from jaxsub.bundle.allocation import Choice, allocate
from jaxsub.formats import peft, safetensors
from jaxsub.pipelines import fit_budget


def adapters(folder, *, count, out=18, into=20, rank=2, plane=None, decay=1.0, seed=0):
    """Adapters and their updates; within `plane` directions on both sides if given, else with nothing in common."""
    rng, updates = np.random.default_rng(seed), []
    left, right = (np.linalg.qr(rng.standard_normal((d, plane or d)))[0] for d in (out, into))
    for n in range(count):
        b, a = left @ rng.standard_normal((left.shape[1], rank)), rng.standard_normal((rank, right.shape[1])) @ right.T
        a, b = a.astype(np.float32), (b * decay ** np.arange(rank)).astype(np.float32)
        peft.write(folder / f"a{n:03d}", {"q": (a, b, 2.0 * rank, rank)})
        updates.append(2.0 * b.astype(np.float64) @ a)
    return str(folder), np.stack(updates)


def relative(rebuilt, updates):
    return np.sqrt(np.square(rebuilt - updates).sum() / np.square(updates).sum())


def test_halves_are_the_truncated_svd_of_every_core():
    rng = np.random.default_rng(0)
    values = rng.standard_normal((5, 9, 3)) @ rng.standard_normal((5, 3, 8))
    u, s, vt = np.linalg.svd(values)
    for inner in (1, 2, 3):
        left, right = cores.halves(values, inner)
        assert left.shape == (5, 9, inner) and right.shape == (5, inner, 8)
        best = u[:, :, :inner] @ (s[:, :inner, None] * vt[:, :inner])
        np.testing.assert_allclose(cores.joined((left, right)), best, atol=1e-12)
    assert cores.halves(values, 5) == ()  # 5 (9 + 8) numbers are more than 72
    assert [cores.count(9, 8, q) for q in (3, 5)] == [51, 72]


def test_energies_are_those_of_the_products():
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((4, 3, 7)), rng.standard_normal((4, 2, 3))
    scales = np.array([1.0, -2.0, 0.5, 3.0])
    wanted = np.square(np.linalg.svd(scales[:, None, None] * b @ a, compute_uv=False)).sum(axis=0)
    np.testing.assert_allclose(cores.energies(a, b, scales), [*wanted, 0.0], rtol=1e-12)


@pytest.mark.slow
def test_a_shared_plane_wider_than_the_rank_is_kept_in_halves_and_float32(tmp_path):
    folder, updates = adapters(tmp_path / "m", count=9, plane=12)
    made = jaxsub.fit(folder, tmp_path / "b", rank=12)
    (layer,) = made.layers
    assert [h.shape for h in layer.halves] == [(9, 12, 2), (9, 2, 12)]
    assert made.accounting()["coefficients"] == 4 * 9 * 2 * 24  # of 4 * 9 * 144
    stored = safetensors.read(tmp_path / "b" / files.COEFFICIENTS)
    assert {k: v.dtype.name for k, v in stored.items()} == {"00000.left": "float32", "00000.right": "float32"}
    found = jaxsub.load(tmp_path / "b")
    np.testing.assert_array_equal(found.layers[0].values, layer.values)
    assert relative(found.reconstruct(found.coefficients())["q"], updates) < 1e-6
    a, b = found.reconstruct_factors(found.coefficients())["q"]
    assert a.shape == (9, 2, 20) and b.shape == (9, 18, 2)  # the updates' own rank, not that of the subspace
    assert relative(b @ a, updates) < 1e-6
    assert files.verify(tmp_path / "b") == []


@pytest.mark.slow
@pytest.mark.parametrize("inner", [1, 2])
def test_what_shares_nothing_is_no_worse_than_its_truncated_svd(tmp_path, inner):
    folder, updates = adapters(tmp_path / "m", count=60, rank=3, decay=0.3)
    exact = jaxsub.fit(folder, rank=1).accounting()
    rest = exact["total"] - exact["coefficients"] - 4 * (18 + 20)  # manifest, spectra
    budget = rest + 4 * 60 * inner * (18 + 20) + 200
    made = jaxsub.fit(folder, tmp_path / "b", budget_bytes=budget)
    (layer,) = made.layers
    assert layer.subspace.rank == {0: 18, 1: 20} and layer.halves[0].shape[2] == inner
    assert set(layer.tensors()) == {"singular_values_0", "singular_values_1"}  # unit factors take no bytes
    s = np.linalg.svd(updates, compute_uv=False)
    best = np.sqrt(np.square(s[:, inner:]).sum() / np.square(s).sum())
    found = jaxsub.load(tmp_path / "b")
    assert relative(found.reconstruct(found.coefficients())["q"], updates) == pytest.approx(best, rel=1e-5)
    assert 1 - layer.figures["energy_kept"] == pytest.approx(best**2, rel=1e-5)  # what truncation loses is counted
    assert made.accounting()["total"] <= budget


@pytest.mark.parametrize("budget", [4000, 6000, 9000])
def test_no_other_ranks_for_the_same_bytes_hold_more(budget):
    rng = np.random.default_rng(2)
    axes = tuple(np.sort(rng.exponential(size=d))[::-1] for d in (12, 15))
    axes = tuple(e / e.sum() for e in axes)
    choice = Choice(axes, (48, 60), 40, least=1, inner=np.array([0.8, 0.15, 0.05]), whole=(12, 15))
    every = [r for r in itertools.product(range(1, 13), range(1, 16), (1, 2, 3)) if choice.num_bytes(r) <= budget]
    (found,) = allocate([choice], budget)
    assert choice.num_bytes(found) <= budget
    assert choice.held(found) >= max(map(choice.held, every)) - 1e-12
    without = max(choice.held(r) for r in every if r[2] == 3)
    assert choice.held(found) > 1.05 * without  # cores of the updates' own rank are worse


@pytest.mark.slow
def test_no_bundle_is_larger_than_its_budget(tmp_path, monkeypatch):
    """The manifest's numbers may take more digits than at rank 1, here 100 bytes."""
    adapters(tmp_path / "m", count=12)
    ranks, size = fit_budget._ranks, jaxsub.fit(str(tmp_path / "m"), rank=1).accounting()["total"]
    monkeypatch.setattr(fit_budget, "_ranks", lambda least, budget: ranks(least, budget + 100))
    for budget in range(size + 200, size + 1700, 300):
        assert jaxsub.fit(str(tmp_path / "m"), budget_bytes=budget).accounting()["total"] <= budget
