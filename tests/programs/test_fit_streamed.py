"""Layers whose stack does not fit are fitted block by block: the same bundle, within the memory that is allowed."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import jaxsub
from jaxsub import errors
from jaxsub.formats import safetensors
from jaxsub.pipelines import fit_streamed
from tests.programs import resident
from tests.selected import first

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCALES = np.array([100, 10, 3, 1, 0.1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path, rng = tmp_path_factory.mktemp("streamed"), np.random.default_rng(0)
    basis = rng.standard_normal((5, 90, 70))
    for n in range(12):
        weight = 7 + np.tensordot(rng.standard_normal(5) * SCALES, basis, 1) + 0.01 * rng.standard_normal((90, 70))
        safetensors.write(path / f"m{n:02d}.safetensors", {"w": weight.astype(np.float32)})
    return str(path)


@pytest.fixture
def streamed(monkeypatch):
    """Every layer is streamed, in several blocks."""

    def on():
        monkeypatch.setattr(fit_streamed, "allowed", lambda _: 1)
        monkeypatch.setattr(fit_streamed, "_require_memory", lambda *_: None)
        monkeypatch.setattr(fit_streamed, "block_bytes", lambda _: 12 * 70 * 4 * 31)

    return on


@pytest.mark.parametrize("options", first([{"rank": 3}, {"energy": 0.9999}, {"rank": 11}]), ids=str)
def test_the_bundle_is_that_of_the_whole_stack(folder, streamed, options):
    whole = jaxsub.fit(folder, **options).layers[0]
    streamed()
    found = jaxsub.fit(folder, **options).layers[0]
    assert found.subspace.procedure == whole.subspace.procedure and found.subspace.rank == whole.subspace.rank
    a, b = (np.asarray(layer.subspace.basis, np.float64) for layer in (whole, found))
    np.testing.assert_allclose(b @ b.T, np.eye(len(b)), atol=2e-6)
    above = np.asarray(whole.subspace.spectrum.values[: len(a)]) > 30 * whole.subspace.spectrum.floor
    np.testing.assert_allclose(b[above], a[above], atol=2e-2 * np.abs(a).max())  # weak directions lean on strong ones
    rebuilt = [np.asarray(layer.subspace.reconstruct(layer.values)) for layer in (whole, found)]
    np.testing.assert_allclose(rebuilt[1], rebuilt[0], atol=1e-6 * np.abs(rebuilt[0]).max())
    values = [layer.subspace.spectrum.values for layer in (whole, found)]
    np.testing.assert_allclose(values[1], values[0], atol=1e-8 * values[0][0])
    for name in ("energy_kept", "held_out"):
        assert found.figures[name] == pytest.approx(whole.figures[name], abs=1e-7)
    x = np.stack([safetensors.read(os.path.join(folder, f))["w"] for f in sorted(os.listdir(folder))])
    left = np.asarray(found.subspace.reconstruct(found.values), np.float64) - x
    errors_ = np.linalg.norm(left.reshape(12, -1), axis=1) / np.linalg.norm(x.reshape(12, -1), axis=1)
    assert found.figures["error_max"] == pytest.approx(errors_.max(), rel=1e-3, abs=3e-7)


def test_a_rank_that_no_stack_has_is_refused_alike(folder, streamed):
    said = []
    for way in (lambda: None, streamed):
        way()
        with pytest.raises(errors.ConfigError) as caught:
            jaxsub.fit(folder, rank=12)
        said.append(str(caught.value))
    assert said[0] == said[1]


@pytest.mark.slow
def test_zeros_and_narrow_weights(tmp_path, streamed):
    rng = np.random.default_rng(1)
    for n in range(9):
        weights = {"zero": np.zeros((40, 70), np.float32), "half": rng.standard_normal((40, 70)).astype(np.float16)}
        safetensors.write(tmp_path / f"m{n}.safetensors", weights)
    whole = jaxsub.fit(str(tmp_path), rank=2)
    streamed()
    for a, b in zip(whole.layers, jaxsub.fit(str(tmp_path), rank=2).layers, strict=True):
        rebuilt = [np.asarray(layer.subspace.reconstruct(layer.values)) for layer in (a, b)]
        np.testing.assert_allclose(rebuilt[1], rebuilt[0], atol=1e-5)
        assert b.figures == pytest.approx(a.figures, abs=1e-6)


@pytest.mark.slow
def test_tiny_weights_are_scaled(folder, tmp_path, streamed):
    for name in os.listdir(folder):
        weight = safetensors.read(os.path.join(folder, name))["w"]
        safetensors.write(tmp_path / name, {"w": np.ldexp(weight, -90)})
    wanted = jaxsub.fit(folder, rank=3).layers[0]
    streamed()
    found = jaxsub.fit(str(tmp_path), rank=3).layers[0]
    np.testing.assert_allclose(np.ldexp(found.values, 90), wanted.values, atol=1e-5 * np.abs(wanted.values).max())
    np.testing.assert_allclose(np.ldexp(found.subspace.mean, 90), np.ravel(wanted.subspace.mean), rtol=1e-6)


def test_what_cannot_be_streamed_is_refused_as_before(folder):
    with pytest.raises(errors.ResourceError, match="needs"):
        jaxsub.fit(folder, rank=2, decomposition="hosvd", max_host_bytes=100_000)
    with pytest.raises(errors.ResourceError, match="needs"):
        jaxsub.fit(folder, rank=2, max_host_bytes=100_000)


def child(folder, allowed):
    small = os.path.join(folder, "small")
    for place, rows in ((small, 256), (folder, 8192)):
        os.makedirs(place, exist_ok=True)
        for n in range(16):
            weight = np.random.default_rng(n).standard_normal((rows, 1024), dtype=np.float32)
            safetensors.write(os.path.join(place, f"m{n:02d}.safetensors"), {"w": weight})
    jaxsub.fit(small, rank=2, max_host_bytes=208 * 2**20)
    given = os.path.join(folder, "*.safetensors")
    print(json.dumps(resident.grown(lambda: jaxsub.fit(given, rank=2, max_host_bytes=allowed))))


@pytest.mark.slow
@resident.needs_high_water_mark
def test_it_stays_within_the_memory_that_is_allowed(tmp_path):
    """512 MiB of stack in 320 MiB, of which mean and basis of rank 2 are 96."""
    allowed = 320 * 2**20
    script = f"from tests.programs import test_fit_streamed as t; t.child({str(tmp_path)!r}, {allowed})"
    environment = {n: v for n, v in os.environ.items() if n != "XLA_FLAGS"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) <= allowed


@pytest.mark.parametrize("options", [{"rank": 3}, {"energy": 0.9}], ids=str)
@pytest.mark.parametrize("value", ["random", "ones", "zeros"])
def test_models_that_are_equal_are_their_mean_alone(tmp_path, streamed, options, value):
    weight = {"random": np.random.default_rng(0).standard_normal((90, 70)), "ones": np.ones((90, 70))}
    weight = weight.get(value, np.zeros((90, 70))).astype(np.float32)
    for n in range(7):
        safetensors.write(tmp_path / f"m{n}.safetensors", {"w": weight})
    streamed()
    (layer,) = jaxsub.fit(str(tmp_path), **options).layers
    assert layer.is_constant and layer.subspace.rank == 0 and layer.values.shape == (7, 0)
    np.testing.assert_allclose(np.asarray(layer.subspace.reconstruct(layer.values))[3], weight, rtol=1e-6)
    assert layer.figures["energy_kept"] == 1 and layer.figures["error_max"] < 1e-6
