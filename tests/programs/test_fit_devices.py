"""Large stacks are shared by the devices: the bundle of one device, and no device holds all of a stack."""

import dataclasses
import os
import shutil

import jax
import numpy as np
import pytest

import jaxsub
from jaxsub import config as configs, placement, plugins, stacks
from jaxsub.decompositions import _again
from jaxsub.formats import peft, safetensors
from jaxsub.linalg import factored
from jaxsub.pipelines import project, sharing
from tests.linalg import compiled

N = 12
CREATE, UPDATES = stacks.DenseStack.create.__func__, sharing.updates


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    os.mkdir(tmp_path / "models")
    shared = rng.standard_normal((3, 16, 40))
    for n in range(N):
        w = (np.tensordot(rng.standard_normal(3), shared, 1) + 0.1 * rng.standard_normal((16, 40))).astype(np.float32)
        odd = rng.standard_normal((7, 5)).astype(np.float32)  # seven rows on eight devices: on one
        safetensors.write(str(tmp_path / "models" / f"m{n:02d}.safetensors"), {"w": w + 3, "odd": odd}, None)
    return str(tmp_path / "models")


@pytest.fixture
def adapters(tmp_path):
    rng = np.random.default_rng(1)
    left, right = rng.standard_normal((30, 6)), rng.standard_normal((6, 40))
    for n in range(N):
        rank = 2 + n % 2
        b, a = left @ rng.standard_normal((6, rank)), rng.standard_normal((rank, 6)) @ right
        b, a = (x + 0.1 * rng.standard_normal(x.shape) for x in (b, a))
        peft.write(tmp_path / "models" / f"m{n:02d}", {"q": (a.astype(np.float32), b.astype(np.float32), 4, rank)})
    return str(tmp_path / "models")


def run(folder, monkeypatch, devices, **options):
    """(bundle, {layer: (devices that its stack was on, share of it that one holds)}) of a fit on so many devices."""
    monkeypatch.setattr(sharing, "SHARED_BYTES", 0)
    monkeypatch.setattr(jax, "local_device_count", lambda: devices)
    seen = {}

    def note(name, x):
        if isinstance(x, jax.Array):
            held = max(s.data.shape[0] * s.data.shape[1] for s in x.addressable_shards)
            seen[name] = len(x.sharding.device_set), held / (x.shape[0] * x.shape[1])

    def created(cls, x, name="", *rest, **more):
        note(name, jax.numpy.asarray(x))
        return CREATE(cls, x, name, *rest, **more)

    def dealt(stack, mesh):
        found = UPDATES(stack, mesh)
        note(stack.name, found.a)
        return found

    monkeypatch.setattr(stacks.DenseStack, "create", classmethod(created))
    monkeypatch.setattr(sharing, "updates", dealt)
    return jaxsub.fit(folder, **options), seen


def require_alike(one, many):
    for a, b in zip(one.layers, many.layers, strict=True):
        assert a.name == b.name and a.subspace.rank == b.subspace.rank and a.values.shape == b.values.shape
        assert b.subspace.procedure == a.subspace.procedure
        assert b.subspace.certificate.relative_error == pytest.approx(a.subspace.certificate.relative_error, abs=1e-5)
        np.testing.assert_allclose(np.asarray(b.subspace.mean), np.asarray(a.subspace.mean), atol=1e-6)
        for x, y in zip(spectra(a), spectra(b), strict=True):
            np.testing.assert_allclose(y.values, x.values, rtol=1e-5, atol=1e-5 * x.values[0])
        for n in range(len(a.values)):  # components may differ in sign, what is rebuilt may not
            again = [np.asarray(x.subspace.reconstruct(x.values[n : n + 1])) for x in (a, b)]
            np.testing.assert_allclose(*again, atol=2e-4)
        for name in ("energy_kept", "held_out", "error_mean", "error_max"):
            assert b.figures[name] == pytest.approx(a.figures[name], abs=2e-6), name


def spectra(layer):
    space = layer.subspace
    return [space.spectrum] if layer.is_linear else list(space.spectra.values())


OPTIONS = {
    "gram": {"rank": 4},
    "randomized": {"rank": 4},
    "flat_pca": {"rank": 3},
    "hosvd": {"energy": 0.8},
    "sthosvd": {"energy": 0.8},
    "hooi": {"rank": 3},
    "row_pca": {"rank": 3},
    "lora_cov": {"rank": 3},
    "lora_tucker": {"rank": 3},
    "col_svd": {"rank": 3},
}
BY_FEATURES = ("gram", "randomized", "flat_pca")


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4, 8])
@pytest.mark.parametrize("decomposition", OPTIONS)
def test_the_bundle_is_that_of_one_device(folder, monkeypatch, decomposition, devices):
    options = {"decomposition": decomposition, **OPTIONS[decomposition]}
    one, alone = run(folder, monkeypatch, 1, **options)
    many, shared = run(folder, monkeypatch, devices, **options)
    assert alone == {"w": (1, 1), "odd": (1, 1)}
    if decomposition in BY_FEATURES:
        assert shared == {"w": (devices, 1 / devices), "odd": (1, 1)}
    else:  # 12 models: two each on six devices, where there are eight
        used = {2: 2, 4: 4, 8: 6}[devices]
        assert shared == {"w": (used, 1 / used), "odd": (used, 1 / used)}
    require_alike(one, many)


@pytest.mark.slow
def test_exact_corrections_and_narrow_storage_are_those_of_one_device(folder, monkeypatch):
    more = {"layers": ("w",), "coefficient_dtype": "bfloat16"}
    options = {"decomposition": "hosvd", "rank": 3, "max_error": 0.05, **more}
    one, many = (run(folder, monkeypatch, d, **options)[0].layers[0] for d in (1, 5))
    assert abs(one.corrections.counts - many.corrections.counts).max() <= 2 and many.figures["error_max"] <= 0.05
    assert many.figures["error_unrounded"] == pytest.approx(one.figures["error_unrounded"], abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4, 8])
@pytest.mark.parametrize("decomposition", ["hooi", "hosvd"])
def test_the_bundle_of_low_rank_updates_is_that_of_one_device(adapters, monkeypatch, decomposition, devices):
    one, alone = run(adapters, monkeypatch, 1, decomposition=decomposition, energy=0.95)
    many, shared = run(adapters, monkeypatch, devices, decomposition=decomposition, energy=0.95)
    used = {2: 2, 4: 4, 8: 6}[devices]
    assert alone == {} and shared == {"q": (used, 1 / used)}
    require_alike(one, many)


def spoil(monkeypatch, decomposition):
    """Every fit of a decomposition ends in NaN."""
    module = plugins.load("decompositions", decomposition)
    whole = module.fit

    def spoilt(*given):
        found = whole(*given)
        return dataclasses.replace(found, mean=found.mean * np.nan)

    monkeypatch.setattr(module, "fit", spoilt)


@pytest.mark.slow
@pytest.mark.parametrize("decomposition", OPTIONS)
def test_fits_that_fail_on_devices_are_made_again_as_on_one(folder, monkeypatch, decomposition):
    os.remove(os.path.join(folder, "m11.safetensors"))  # eleven models on four devices: the last has one that is none
    spoil(monkeypatch, decomposition)
    options = {"decomposition": decomposition, **OPTIONS[decomposition]}
    one, _ = run(folder, monkeypatch, 1, **options)
    many, shared = run(folder, monkeypatch, 4, **options)
    assert shared["w"] == (4, 1 / 4)
    assert {layer.subspace.procedure.flags for layer in many.layers} == {(_again.FLAG,)}
    require_alike(one, many)


@pytest.mark.slow
@pytest.mark.parametrize("decomposition", ["hooi", "hosvd"])
def test_fits_of_low_rank_updates_that_fail_on_devices_are_made_again(adapters, monkeypatch, decomposition):
    shutil.rmtree(os.path.join(adapters, "m11"))
    spoil(monkeypatch, decomposition)
    one, _ = run(adapters, monkeypatch, 1, decomposition=decomposition, energy=0.95)
    many, shared = run(adapters, monkeypatch, 4, decomposition=decomposition, energy=0.95)
    assert shared == {"q": (4, 1 / 4)} and many.layers[0].subspace.procedure.flags == (_again.FLAG,)
    require_alike(one, many)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4, 8])
@pytest.mark.parametrize("decomposition", ["gram", "hosvd"])
def test_projections_are_those_of_one_device(folder, tmp_path, monkeypatch, decomposition, devices):
    jaxsub.fit(folder, tmp_path / "bundle", decomposition=decomposition, rank=3)
    options = {"bundle": str(tmp_path / "bundle"), "collection": [folder]}
    config = configs.freeze(project.Config, options)
    monkeypatch.setattr(sharing, "SHARED_BYTES", 0)
    used, found = [], []
    for count in (1, devices):
        monkeypatch.setattr(jax, "local_device_count", lambda count=count: count)
        found.append(project.run(config, str(tmp_path / f"out{count}")))
        w = next(one for one in found[-1]["layers"] if one["name"] == "w")
        used.append(w)
    for name in ("error", "error_of_mean", "error_of_random"):
        np.testing.assert_allclose(used[1][name], used[0][name], rtol=1e-5)
    one, many = (safetensors.read(str(tmp_path / f"out{count}" / project.COEFFICIENTS)) for count in (1, devices))
    np.testing.assert_allclose(many["w"], one["w"], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 8])
def test_projections_of_low_rank_updates_are_those_of_one_device(adapters, tmp_path, monkeypatch, devices):
    shutil.rmtree(os.path.join(adapters, "m11"))  # eleven: the last device has some of zeros
    jaxsub.fit(adapters, tmp_path / "bundle", rank=3)
    config = configs.freeze(project.Config, {"bundle": str(tmp_path / "bundle"), "collection": [adapters]})
    monkeypatch.setattr(sharing, "SHARED_BYTES", 0)
    spread, cores, found = [], factored.cores, []

    def noted(a, *more):
        spread.append(len(a.sharding.device_set))
        return cores(a, *more)

    monkeypatch.setattr(factored, "cores", noted)
    for count in (1, devices):
        monkeypatch.setattr(jax, "local_device_count", lambda count=count: count)
        found.append(project.run(config, str(tmp_path / f"out{count}")))
    assert spread == [1, devices if devices < 8 else 6]  # eleven models in shares of two
    np.testing.assert_allclose(found[1]["layers"][0]["error"], found[0]["layers"][0]["error"], rtol=1e-6)
    one, many = (safetensors.read(str(tmp_path / f"out{count}" / project.COEFFICIENTS)) for count in (1, devices))
    for name in one:
        np.testing.assert_allclose(many[name], one[name], atol=1e-5 * np.abs(one[name]).max())


def test_projections_of_low_rank_updates_exchange_nothing():
    own, rng = placement.make_mesh(8), np.random.default_rng(0)
    a, b, u, v = (rng.standard_normal(s).astype(np.float32) for s in ((16, 2, 40), (16, 30, 2), (3, 30), (4, 40)))
    a, b = (sharing.placed(x, own, by_rows=False) for x in (a, b))
    text = factored._cores.lower(a, b, np.ones(16), u, v, centred=False, mesh=factored._mesh(a, False)).compile()
    assert compiled.executed(text.as_text()) == []
