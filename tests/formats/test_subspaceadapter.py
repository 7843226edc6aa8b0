"""Adapters of the paper's own code: read as the LoRA that they are."""

import json

import numpy as np
import pytest

import jaxsub
from jaxsub import bundle, errors, formats
from jaxsub.formats import safetensors

KEY = "base_model.model.layer.0.query.{kind}_{side}.{part}"


def parts(seed=0, *, kind="subspaceadapter", rank=3, dtype=np.float32, adapter=""):
    rng = np.random.default_rng(seed)
    found = {}
    for side, size in (("A", 7), ("B", 9)):
        for part, shape in (("components", (size, 5)), ("loadings", (5, rank))):
            name = KEY.format(kind=kind, side=side, part=adapter + part)
            found[name] = rng.standard_normal(shape).astype(dtype)
    return found


def delta(tensors, kind="subspaceadapter"):
    """(U_B L_B) (U_A L_A).T, as the released forward pass multiplies."""
    a, b = (
        tensors[KEY.format(kind=kind, side=side, part="components")].astype(np.float64)
        @ tensors[KEY.format(kind=kind, side=side, part="loadings")].astype(np.float64)
        for side in "AB"
    )
    return b @ a.T


def folder(path, tensors, **config):
    path.mkdir(parents=True)
    safetensors.write(path / "adapter_model.safetensors", tensors)
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "SUBSPACEADAPTER", "r": 32, **config}))
    return str(path)


@pytest.mark.parametrize("kind", ["subspaceadapter", "eigenflux"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_the_update_is_that_of_the_released_forward_pass(tmp_path, kind, dtype):
    tensors = parts(kind=kind, dtype=dtype)
    safetensors.write(tmp_path / "one.safetensors", tensors | {"classifier.weight": np.ones((2, 3), dtype)})
    model = formats.open_model(tmp_path / "one.safetensors")
    assert model.format == "subspaceadapter" and list(model.tensors) == ["classifier.weight"]
    (pair,) = model.adapters.values()
    a, b = (formats.read(model, t) for t in (pair.a, pair.b))
    assert (a.shape, b.shape, pair.shape, pair.scale, pair.rank) == ((3, 7), (9, 3), (9, 7), 1.0, 3)
    assert (pair.a.dtype, a.dtype.name) == (a.dtype.name, "float64" if dtype is np.float64 else "float32")
    np.testing.assert_allclose(b.astype(np.float64) @ a, delta(tensors, kind), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_collection_of_folders_is_fitted_like_lora(tmp_path):
    updates = []
    for n in range(6):
        tensors = parts(n)
        tensors |= {k: v for k, v in parts(99).items() if k.endswith("components")}  # one subspace, as they are made
        folder(tmp_path / "m" / f"task{n}", tensors)
        updates.append(delta(tensors))
    opened = jaxsub.open_collection(str(tmp_path / "m"))
    assert {r.format for r in opened.refs} == {"subspaceadapter"} and not opened.quarantined
    a, b, scales = bundle.read(opened.groups[0], opened)
    np.testing.assert_allclose(scales[:, None, None] * b @ a, updates, rtol=1e-4, atol=1e-4)
    made = jaxsub.fit(str(tmp_path / "m"), rank=5)
    assert made.layers[0].name == "layer.0.query" and made.layers[0].figures["error_max"] < 1e-5


def test_an_adapter_name_left_in_the_keys_is_passed_over(tmp_path):
    safetensors.write(tmp_path / "one.safetensors", parts(adapter="default."))
    assert list(formats.open_model(tmp_path / "one.safetensors").adapters) == ["layer.0.query"]


def _without(part):
    return lambda t: {k: v for k, v in t.items() if not k.endswith(part)}


def _with(part, value):
    return lambda t: {k: value if k.endswith(part) else v for k, v in t.items()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_without("A.loadings"), "has no loadings of A"),
        (_without("B.components"), "has no components of B"),
        (_with("A.loadings", np.ones((4, 3), np.float32)), "do not fit"),
        (_with("A.loadings", np.ones((5, 2), np.float32)), "ranks 2 and 3"),
        (_with("A.components", np.ones((7, 5, 1), np.float32)), "do not fit"),
        (_with("B.loadings", np.ones((5, 3), np.int32)), "floats expected"),
        (lambda t: t | parts(adapter="default."), "has two components of A"),
    ],
)
def test_parts_that_make_no_update_are_refused(tmp_path, change, words):
    path = folder(tmp_path / "bad", change(parts()))
    with pytest.raises(errors.InputError, match=words) as caught:
        formats.open_model(path)
    assert "adapter_model.safetensors" in str(caught.value)
