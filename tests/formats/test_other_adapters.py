"""Adapters of kinds that are not read: refused by name, never taken for two full weights that happen to be small."""

import numpy as np
import pytest

from jaxsub import errors, formats
from jaxsub.formats import safetensors

X = np.ones((4, 4), np.float32)
KINDS = {
    "MLX": ("model.layers.0.q_proj.lora_a", "model.layers.0.q_proj.lora_b"),
    "names of JAX": ("layer_0/attn/q/kernel_lora_a", "layer_0/attn/q/kernel_lora_b"),
    "of its own": ("w_lora_a", "w_lora_b"),
    "nested": ("q/lora/a", "q/lora/b"),
    "VeRA": ("base_model.model.q.vera_lambda_b", "base_model.model.q.vera_lambda_d"),
    "IA3 of PEFT": ("base_model.model.q.ia3_l", "norm.weight"),
    "GLoRA": tuple(f"lycoris_c2.{part}" for part in ("a1.weight", "a2.weight", "b1.weight", "b2.weight", "alpha")),
    "IA3 of LyCORIS": ("lycoris_c2.weight", "lycoris_c2.on_input"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ending", [".safetensors", ".npz"])
def test_factors_of_other_kinds_are_refused_by_name(tmp_path, kind, ending):
    arrays = dict.fromkeys(KINDS[kind], X)
    path = str(tmp_path / f"m{ending}")
    if ending == ".npz":
        if "LyCORIS" in kind or kind == "GLoRA":
            pytest.skip("written as .safetensors alone")
        np.savez(path, **arrays)
    else:
        safetensors.write(path, arrays)
    with pytest.raises(errors.InputError) as caught:
        formats.open_model(path)
    assert caught.value.rule == "H13" and caught.value.key.startswith(tuple(KINDS[kind])) or "c2" in caught.value.key


@pytest.mark.parametrize("names", [("a1.weight", "b1.weight"), ("flora_a.weight", "explora_b"), ("x.alpha", "x.lora")])
def test_weights_with_names_like_these_are_weights(tmp_path, names):
    safetensors.write(str(tmp_path / "m.safetensors"), dict.fromkeys(names, X))
    assert sorted(formats.open_model(str(tmp_path / "m.safetensors")).tensors) == sorted(names)
