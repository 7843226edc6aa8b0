"""Bundles of low-rank updates: products, never formed, whatever the gauge; scales and orientations kept."""

import numpy as np
import pytest

import jaxsub
from jaxsub import bundle as bundles, errors, subspace
from jaxsub.bundle import export, files
from jaxsub.formats import peft
from jaxsub.pipelines import fit_plan, project

SHARED = np.random.default_rng(1)
U, V = (np.linalg.qr(SHARED.standard_normal((d, 3)))[0] for d in (11, 9))


def adapters(folder, *, count=10, gauge=0, ranks=(2,), noise=0.0, seed=0):
    """Adapters whose updates lie in three common directions on both sides, alpha / r = 3."""
    rng, turns = np.random.default_rng(seed), np.random.default_rng(gauge)
    updates = []
    for n in range(count):
        r = ranks[n % len(ranks)]
        left = U @ rng.standard_normal((3, r)) + noise * rng.standard_normal((11, r))
        right = rng.standard_normal((r, 3)) @ V.T + noise * rng.standard_normal((r, 9))
        turn = turns.standard_normal((r, r)) if gauge else np.eye(r)
        a, b = (np.linalg.inv(turn) @ right).astype(np.float32), (left @ turn).astype(np.float32)
        peft.write(folder / f"a{n}", {"layer.q": (a, b, 3.0 * r, r)})
        updates.append(3.0 * b.astype(np.float64) @ a)
    return str(folder), np.stack(updates)


@pytest.mark.slow
def test_updates_in_a_common_subspace_come_back_whole(tmp_path):
    folder, updates = adapters(tmp_path / "m", ranks=(2, 1, 3))
    jaxsub.fit(folder, tmp_path / "b", rank=3)
    bundle = jaxsub.load(tmp_path / "b")
    (layer,) = bundle.layers
    assert layer.parametrisation == "lora" and layer.subspace.procedure.name == "hooi"
    assert layer.values.shape == (10, 3, 3) and layer.figures["error_max"] < 1e-5
    rebuilt = bundle.reconstruct(bundle.coefficients())["layer.q"]
    np.testing.assert_allclose(rebuilt, updates, atol=1e-4)
    a, b = bundle.reconstruct_factors(bundle.coefficients())["layer.q"]
    assert a.shape == (10, 3, 9) and b.shape == (10, 11, 3)
    np.testing.assert_allclose(b @ a, updates, atol=1e-4)
    assert all(not kept for kept in bundle.passthrough.values())
    assert files.verify(tmp_path / "b") == []


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"energy": 0.7}, {"rank": 2}, {"rank": 2, "decomposition": "hosvd"}])
def test_errors_are_those_of_the_products(tmp_path, options):
    folder, updates = adapters(tmp_path / "m", noise=0.3)
    bundle = jaxsub.fit(folder, **options)
    (layer,) = bundle.layers
    rebuilt = bundle.reconstruct(bundle.coefficients())["layer.q"]
    left = np.square(rebuilt - updates).sum(axis=(1, 2))
    energies = np.square(updates).sum(axis=(1, 2))
    assert layer.figures["error_max"] == pytest.approx(np.sqrt(left / energies).max(), rel=1e-4)
    assert layer.figures["energy_kept"] == pytest.approx(1 - left.sum() / energies.sum(), rel=1e-5)
    assert np.sqrt(left.sum() / energies.sum()) <= layer.subspace.certificate.bound


def cosines(a, b):
    """Of the principal angles between the row spans of a and b."""
    return np.linalg.svd(np.asarray(a) @ np.asarray(b).T, compute_uv=False)


@pytest.mark.slow
def test_the_gauge_of_the_factors_changes_nothing(tmp_path):
    one, other = (adapters(tmp_path / str(g), gauge=g, noise=0.1)[0] for g in (0, 5))
    first, second = (jaxsub.fit(folder, rank=3).layers[0] for folder in (one, other))
    for axis in (0, 1):
        assert cosines(first.subspace.factors[axis], second.subspace.factors[axis]).min() > 1 - 1e-6
    np.testing.assert_allclose(
        np.linalg.svd(first.values, compute_uv=False),
        np.linalg.svd(second.values, compute_uv=False),
        rtol=1e-3,
        atol=1e-3,
    )
    # The factors themselves see another subspace: the control.
    a, b = (jaxsub.fit(f, rank=2, view="lora_factors", layers=["lora_A"]).layers[0].subspace for f in (one, other))
    assert cosines(a.basis, b.basis).min() < 0.9


@pytest.mark.slow
def test_other_adapters_are_projected_by_their_factors(tmp_path, monkeypatch):
    folder, _ = adapters(tmp_path / "m")
    bundle = jaxsub.fit(folder, rank=3)
    others, updates = adapters(tmp_path / "others", seed=8, count=4)
    monkeypatch.setattr(type(bundle.layers[0].subspace), "project", None)  # products are not for this
    found = bundle.project(jaxsub.open_collection(others))
    a, b = bundle.reconstruct_factors(found)["layer.q"]
    np.testing.assert_allclose(b @ a, updates, atol=1e-4)


@pytest.mark.slow
def test_a_turned_layer_has_the_orientation_of_its_weight(tmp_path):
    rng = np.random.default_rng(0)
    updates = []
    for n in range(5):
        a, b = rng.standard_normal((2, 9)).astype(np.float32), rng.standard_normal((11, 2)).astype(np.float32)
        peft.write(tmp_path / "m" / f"a{n}", {"layer.q": (a, b, 2.0, 2)})
        config = tmp_path / "m" / f"a{n}" / "adapter_config.json"
        config.write_text(config.read_text().replace('"fan_in_fan_out": false', '"fan_in_fan_out": true'))
        updates.append((b @ a).T)
    bundle = jaxsub.fit(str(tmp_path / "m"), energy=1.0)
    (layer,) = bundle.layers
    assert layer.shape == (9, 11)
    np.testing.assert_allclose(bundle.reconstruct(bundle.coefficients())["layer.q"], updates, atol=1e-4)


def convolutions(folder, count=8, noise=0.0):
    """Adapters of a convolution (6, 4, 3, 3) whose flattened updates lie in two directions on the left."""
    rng, left = np.random.default_rng(4), np.random.default_rng(6).standard_normal((6, 2))
    right, updates = np.random.default_rng(7).standard_normal((2, 36)), []
    for n in range(count):
        a = (rng.standard_normal((2, 2)) @ right + noise * rng.standard_normal((2, 36))).astype(np.float32)
        b = (left @ rng.standard_normal((2, 2))).astype(np.float32)
        peft.write(folder / f"c{n}", {"conv": (a.reshape(2, 4, 3, 3), b.reshape(6, 2, 1, 1), 4.0, 2)})
        updates.append(2.0 * b.astype(np.float64) @ a)
    return str(folder), np.stack(updates).reshape(count, 6, 4, 3, 3)


@pytest.mark.slow
def test_updates_of_convolutions_come_back_in_their_shape(tmp_path):
    folder, updates = convolutions(tmp_path / "m")
    jaxsub.fit(folder, tmp_path / "b", rank=2)
    bundle = jaxsub.load(tmp_path / "b")
    (layer,) = bundle.layers
    assert layer.shape == (6, 4, 3, 3) and layer.subspace.shape == (6, 36) and layer.figures["error_max"] < 1e-5
    np.testing.assert_allclose(bundle.reconstruct(bundle.coefficients())["conv"], updates, atol=1e-4)
    config = project.Config(bundle=str(tmp_path / "b"), collection=(folder,), write_models=str(tmp_path / "new"))
    assert max(project.run(config)["layers"][0]["error"]) < 1e-5
    again = jaxsub.open_collection(str(tmp_path / "new"))
    assert again.groups[0].shape == (6, 4, 3, 3)
    a, b, scales = bundles.read(again.groups[0], again)
    np.testing.assert_allclose((scales[:, None, None] * b @ a).reshape(updates.shape), updates, atol=1e-4)


@pytest.mark.slow
def test_updates_of_convolutions_are_not_written_as_matrices(tmp_path):
    """PEFT would not load them: their factors have four axes there."""
    folder, _ = convolutions(tmp_path / "m")
    bundle = jaxsub.fit(folder, tmp_path / "b", rank=2)
    for layout in export.LAYOUTS:
        with pytest.raises(errors.ConfigError, match="convolution has no place"):
            bundle.export(tmp_path / layout, layout=layout)
        assert not (tmp_path / layout).exists()
    config = project.Config(str(tmp_path / "b"), (folder,), write_models=str(tmp_path / "new"), peft_layout="portable")
    with pytest.raises(errors.ConfigError, match="convolution has no place"):
        project.run(config)


@pytest.mark.slow
def test_a_bound_and_a_budget_hold_for_convolutions(tmp_path):
    folder, updates = convolutions(tmp_path / "m", noise=0.5)
    bundle = jaxsub.fit(folder, rank=2, max_error=0.3)
    error = np.linalg.norm((bundle.reconstruct(bundle.coefficients())["conv"] - updates).reshape(8, -1), axis=1)
    assert (error <= 0.3 * np.linalg.norm(updates.reshape(8, -1), axis=1)).all()
    assert bundle.layers[0].corrections is not None
    assert jaxsub.fit(folder, budget_bytes=5600).accounting()["total"] <= 5600


@pytest.mark.slow
def test_cores_that_do_not_fit_are_refused_before_they_are_made(tmp_path, monkeypatch):
    folder, _ = adapters(tmp_path / "m")
    monkeypatch.setattr(subspace.TuckerSubspace, "project_factors", lambda *_: pytest.fail("cores were made"))
    with pytest.raises(errors.ResourceError, match="on the host"):
        jaxsub.fit(folder, rank=3, max_host_bytes=1000)
    with monkeypatch.context() as patch:
        patch.setattr(fit_plan, "require_memory", lambda *_: None)
        with pytest.raises(errors.ResourceError, match="needs 1.1 KiB on the host for cores of 3 x 3 of 10 models"):
            jaxsub.fit(folder, rank=3, max_host_bytes=1000)
