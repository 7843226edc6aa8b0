"""Adapters that a bundle keeps exactly come back to the bit, with their own scale; others lose what 16 bits round."""

import json

import ml_dtypes
import numpy as np
import pytest

import jaxsub
from jaxsub import formats
from jaxsub.formats import safetensors
from jaxsub.pipelines import project
from tests.selected import first

COUNT, RANK, OUT, IN = 5, 16, 40, 30
NAMES = {
    "peft": ("base_model.model.x.lora_A.weight", "base_model.model.x.lora_B.weight"),
    "kohya": ("lora_unet_x.lora_down.weight", "lora_unet_x.lora_up.weight"),
    "diffusers": ("unet.x.lora_A.weight", "unet.x.lora_B.weight"),
}
ALPHA = {"kohya": "lora_unet_x.alpha"}


def write(root, kind, dtype, size):
    """Adapters whose B is of a size that a scale of 1 / 16 takes into the last numbers that float16 has."""
    rng = np.random.default_rng(0)
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    for n in range(COUNT):
        a, b = 0.05 * rng.standard_normal((RANK, IN)), size * rng.standard_normal((OUT, RANK))
        tensors = {key: x.astype(dtype) for key, x in zip(NAMES[kind], (a, b), strict=True)}
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 1, "target_modules": ["x"], "bias": "none"}
        if kind == "peft":
            (root / f"m{n}").mkdir(parents=True)
            (root / f"m{n}" / "adapter_config.json").write_text(json.dumps(config))
            safetensors.write(str(root / f"m{n}" / "adapter_model.safetensors"), tensors)
            continue
        root.mkdir(exist_ok=True)
        metadata = {}
        if kind == "kohya":
            tensors[ALPHA[kind]] = np.asarray(1, dtype)
        else:
            fields = {"r": RANK, "lora_alpha": 1, "target_modules": ["x"], "bias": "none"}
            metadata = {"lora_adapter_metadata": json.dumps({f"unet.{k}": v for k, v in fields.items()})}
        safetensors.write(str(root / f"m{n}.safetensors"), tensors, metadata)


def update(path):
    """The update of a file or folder in float64, and its factors as they are stored."""
    model = formats.open_model(path)
    (pair,) = model.adapters.values()
    a, b = formats.read(model, pair.a), formats.read(model, pair.b)
    return pair.scale * b.astype(np.float64) @ a.astype(np.float64), a, b


@pytest.mark.parametrize("kind", first(NAMES, 2))
@pytest.mark.parametrize("dtype", first(["float16", "bfloat16", "float32"], 1))
def test_kept_ones_are_bit_equal(tmp_path, kind, dtype):
    write(tmp_path / "models", kind, dtype, 1e-4)
    jaxsub.fit(str(tmp_path / "models"), str(tmp_path / "bundle"), rank=2, max_error=0)
    options = {"bundle": str(tmp_path / "bundle"), "collection": (str(tmp_path / "models"),)}
    found = project.run(project.Config(**options, write_models=str(tmp_path / "again")))
    assert max(found["layers"][0]["error"]) == 0
    for path in sorted((tmp_path / "models").iterdir()):
        (want, *old), (got, *new) = update(str(path)), update(str(tmp_path / "again" / path.name))
        assert all(x.tobytes() == y.tobytes() and x.dtype == y.dtype for x, y in zip(old, new, strict=True))
        np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.slow  # `_factors.written` by itself is tested with the formats
@pytest.mark.parametrize("kind", first(NAMES, 2))
@pytest.mark.parametrize(("dtype", "most"), first([("float16", 1e-3), ("bfloat16", 8e-3), ("float32", 1e-6)], 1))
def test_rebuilt_ones_lose_no_more_than_a_rounding(tmp_path, kind, dtype, most):
    """Into float16 as they come, with the scale in one factor, 1e-5 / 16 would lose a fifth."""
    write(tmp_path / "models", kind, dtype, 1e-5)
    jaxsub.fit(str(tmp_path / "models"), str(tmp_path / "bundle"), energy=1.0)
    options = {"bundle": str(tmp_path / "bundle"), "collection": (str(tmp_path / "models"),)}
    project.run(project.Config(**options, write_models=str(tmp_path / "again")))
    for path in sorted((tmp_path / "models").iterdir()):
        want, got = update(str(path))[0], update(str(tmp_path / "again" / path.name))[0]
        assert np.linalg.norm(got - want) <= most * np.linalg.norm(want)
