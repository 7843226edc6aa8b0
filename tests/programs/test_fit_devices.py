"""Large stacks are shared by the devices: the bundle of one device, and no device holds all of a stack."""

import jax
import numpy as np
import pytest

import jaxsub
from jaxsub.formats import safetensors
from jaxsub.pipelines import fit_layer, fit_plan

FIGURES = fit_layer._figures


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    shared = rng.standard_normal((3, 16, 40))
    for n in range(12):
        w = (np.tensordot(rng.standard_normal(3), shared, 1) + 0.1 * rng.standard_normal((16, 40))).astype(np.float32)
        odd = rng.standard_normal((7, 5)).astype(np.float32)  # seven rows on eight devices: on one
        safetensors.write(str(tmp_path / f"m{n:02d}.safetensors"), {"w": w, "odd": odd}, None)
    return str(tmp_path)


def run(folder, monkeypatch, devices, **options):
    """(bundle, {layer: devices that its stack was on}) of a fit on so many devices."""
    monkeypatch.setattr(fit_plan, "SHARED_BYTES", 0)
    monkeypatch.setattr(jax, "local_device_count", lambda: devices)
    seen = {}

    def spy(stack, *rest):
        shares = {s.data.nbytes for s in stack.x.addressable_shards}
        seen[stack.name] = (len(stack.x.sharding.device_set), stack.x.nbytes // max(shares))
        return FIGURES(stack, *rest)

    monkeypatch.setattr(fit_layer, "_figures", spy)
    return jaxsub.fit(folder, **options), seen


@pytest.mark.parametrize("devices", [pytest.param(d, marks=pytest.mark.slow) for d in (2, 4, 8)])
@pytest.mark.parametrize("decomposition", ["gram", pytest.param("randomized", marks=pytest.mark.slow)])
def test_the_bundle_is_that_of_one_device(folder, monkeypatch, devices, decomposition):
    options = {"rank": 4, "decomposition": decomposition}
    one, alone = run(folder, monkeypatch, 1, **options)
    many, shared = run(folder, monkeypatch, devices, **options)
    assert alone == {"w": (1, 1), "odd": (1, 1)} and shared == {"w": (devices, devices), "odd": (1, 1)}
    for a, b in zip(one.layers, many.layers, strict=True):
        assert a.name == b.name
        np.testing.assert_allclose(b.subspace.spectrum.values, a.subspace.spectrum.values, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(np.asarray(b.subspace.mean), np.asarray(a.subspace.mean), atol=1e-6)
        for n in range(12):  # components may differ in sign, what is rebuilt may not
            again = [np.asarray(x.subspace.reconstruct(x.values[n : n + 1])) for x in (a, b)]
            np.testing.assert_allclose(*again, atol=1e-4)
        assert b.figures["held_out"] == pytest.approx(a.figures["held_out"], abs=1e-6)
        assert b.figures["error_mean"] == pytest.approx(a.figures["error_mean"], abs=1e-6)


@pytest.mark.slow
def test_weight_axes_stay_on_one_device(folder, monkeypatch):
    _, seen = run(folder, monkeypatch, 8, rank=3, decomposition="hosvd", layers=("w",))
    assert seen == {"w": (1, 1)}
