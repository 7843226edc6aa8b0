"""The portable layout of LoRA folders: folded scales, one rank, names, what servers refuse, nothing of full size."""

import json
import os
import tracemalloc
import types

import numpy as np
import pytest

from jaxsub import descriptors, errors, formats
from jaxsub.formats import _factors, _portable, peft, safetensors

RNG = np.random.default_rng(0)


def update(o, i, k, *, scale=1.0, rank=None, **more):
    """Factors (k, i) and (o, k) of a product of a lower rank."""
    rank = k if rank is None else rank
    a = RNG.standard_normal((k, rank)) @ RNG.standard_normal((rank, i))
    return peft.Update(a, RNG.standard_normal((o, k)), scale, **more)


def product(one):
    return one.scale * np.asarray(one.b, np.float64) @ np.asarray(one.a, np.float64)


def relative(found, wanted):
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


def saved(folder):
    tensors = safetensors.read(folder / "adapter_model.safetensors")
    return json.loads((folder / peft.CONFIG).read_text()), tensors


def deltas(folder):
    """Layer -> Delta-W as the reader sees it."""
    model, found = formats.open_model(folder), {}
    for layer, pair in model.adapters.items():
        a, b = (formats.read(model, t).astype(np.float64) for t in (pair.a, pair.b))
        one = pair.scale * b @ a
        found[layer] = one.T if pair.transposed else one
    return found


@pytest.mark.parametrize("scale", [1.0, -3.5, 1e-3, 2e4])
@pytest.mark.parametrize("shape", [(9, 13, 4), (13, 9, 4), (3, 20, 5), (20, 3, 5), (6, 6, 6), (1, 1, 1)])
def test_the_scale_is_split_evenly_between_the_factors(shape, scale):
    one = update(*shape, scale=scale)
    a, b = _factors.balanced(one.a, one.b, one.scale)
    assert relative(b @ a, product(one)) < 1e-12
    values = np.linalg.svd(product(one), compute_uv=False)[: len(a)]
    assert len(a) == min(shape)
    for gram in (a @ a.T, b.T @ b):  # both hold the roots of the singular values, and are orthogonal
        np.testing.assert_allclose(gram, np.diag(values), atol=1e-10 * values[0])


def test_directions_that_float32_cannot_hold_are_left_out():
    one = update(30, 20, 12, rank=3)
    noisy = one.a + 1e-8 * RNG.standard_normal(one.a.shape)
    a, _ = _factors.balanced(noisy, one.b)
    assert len(a) == 3
    seen = one.a + 1e-3 * RNG.standard_normal(one.a.shape)
    assert len(_factors.balanced(seen, one.b)[0]) == 12  # the control: what is larger stays
    a, b = _factors.balanced(np.zeros((2, 5)), np.zeros((4, 2)))
    assert a.shape == (0, 5) and b.shape == (4, 0)


def test_one_rank_for_all_layers_and_a_scale_of_one(tmp_path):
    updates = {"m.q": update(14, 12, 9, scale=3.0), "m.v": update(5, 12, 2, scale=0.5, dtype="float16")}
    updates["m.none"] = peft.Update(np.zeros((2, 6)), np.zeros((7, 2)))
    done = peft.write_portable(tmp_path / "x", updates, fields={"base_model_name_or_path": "org/base"})
    assert done == {"r": 16, "other_tensors": None}
    config, tensors = saved(tmp_path / "x")
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (16, 16, {}, {})
    assert (config["bias"], config["modules_to_save"], config["use_rslora"], config["use_dora"]) == (
        "none",
        None,
        False,
        False,
    )
    assert config["base_model_name_or_path"] == "org/base" and config["task_type"] is None
    assert {t.shape[0] for n, t in tensors.items() if "lora_A" in n} == {16}
    assert {t.dtype.name for n, t in tensors.items() if "m.v." in n} == {"float16"}
    found = deltas(tmp_path / "x")
    assert relative(found["m.q"], product(updates["m.q"])) < 1e-6
    assert relative(found["m.v"], product(updates["m.v"])) < 2e-3
    assert not found["m.none"].any()
    assert peft.served_problems(tmp_path / "x") == []
    assert peft.served_problems(tmp_path / "x", max_rank=8) == ["r is 16, more than 8"]


@pytest.mark.parametrize(
    "rank, r", [(0, 8), (1, 8), (8, 8), (9, 16), (64, 64), (65, 128), (257, 320), (321, 512), (512, 512)]
)
def test_the_rank_is_the_next_that_servers_allow(rank, r):
    assert _portable.rank_for({"a": 0, "b": rank}) == r


@pytest.mark.slow
def test_ranks_over_512_are_refused_by_name(tmp_path):
    with pytest.raises(errors.ConfigError, match=r"'?wide'?: an update of rank 513, servers take 512 at most"):
        peft.write_portable(tmp_path / "x", {"wide": peft.Update(np.eye(513), np.eye(513)), "q": update(3, 4, 1)})
    assert not os.path.exists(tmp_path / "x")
    done = peft.write_portable(tmp_path / "x", {"wide": peft.Update(np.eye(513)[:512], np.eye(513)[:, :512])})
    assert done["r"] == 512


def test_turned_layers_and_embeddings_have_the_keys_and_shapes_of_peft(tmp_path):
    updates = {
        "h.c_attn": update(6, 18, 3, orientation="fan_in_fan_out"),
        "wte": update(40, 6, 2, orientation="embedding"),
    }
    peft.write_portable(tmp_path / "x", updates)
    config, tensors = saved(tmp_path / "x")
    assert config["fan_in_fan_out"] is True
    shapes = {name.removeprefix("base_model.model."): t.shape for name, t in tensors.items()}
    assert shapes == {
        "h.c_attn.lora_A.weight": (8, 6),
        "h.c_attn.lora_B.weight": (18, 8),
        "wte.lora_embedding_A": (8, 40),
        "wte.lora_embedding_B": (6, 8),
    }
    found = deltas(tmp_path / "x")
    for name, one in updates.items():
        assert relative(found[name], product(one)) < 1e-6
    assert peft.served_problems(tmp_path / "x") == []


@pytest.mark.parametrize(
    "known, targets",
    [
        ([], ["m.0.q", "m.1.q", "m.1.v"]),
        (["q", "v"], ["q", "v"]),
        (["q", "1.v"], ["1.v", "q"]),
        (["q", "v", "k"], ["q", "v"]),  # a name that no layer has
        (["q"], ["m.0.q", "m.1.q", "m.1.v"]),  # v would be left out
        (["m.0.q", "m.1.q", "m.1.v"], ["m.0.q", "m.1.q", "m.1.v"]),
        ([".q", "v"], ["m.0.q", "m.1.q", "m.1.v"]),
    ],
)
def test_short_names_are_those_of_the_original(known, targets):
    assert _portable.target_modules(["m.0.q", "m.1.q", "m.1.v"], known) == targets


GOOD = {"r": 8, "lora_alpha": 8, "target_modules": ["q"]}
SHAPES = {"base_model.model.m.q.lora_A.weight": (8, 5), "base_model.model.m.q.lora_B.weight": (4, 8)}


@pytest.mark.parametrize(
    "change, shapes, words",
    [
        ({"rank_pattern": {"q": 4}}, {}, "rank_pattern is not read"),
        ({"alpha_pattern": {"q": 4}}, {}, "alpha_pattern is not read"),
        ({"modules_to_save": ["head"]}, {}, "modules_to_save is set"),
        ({"use_dora": True}, {}, "use_dora is set"),
        ({"bias": "lora_only"}, {}, "bias is lora_only"),
        ({"r": 1024}, {}, "r is 1024, more than 512"),
        ({"target_modules": None}, {}, "target_modules is missing"),
        ({}, {"base_model.model.m.q.lora_A.default.weight": (8, 5)}, "unsupported LoRA weight"),
        ({}, {"base_model.model.head.weight": (8, 5)}, "unsupported LoRA weight"),
        ({}, {"m.q.lora_A.weight": (8, 5)}, "unsupported LoRA weight"),
        ({}, {"base_model.model.m.c.lora_A.weight": (8, 5, 3, 3)}, "unsupported LoRA weight"),
        ({}, {"base_model.model.m.q.lora_magnitude_vector": (8,)}, "unsupported LoRA weight"),
        ({}, {"base_model.model.m.v.lora_A.weight": (4, 5)}, "has rank 4, not 8"),
        ({}, {"base_model.model.e.lora_embedding_B": (5, 4)}, "has rank 4, not 8"),
    ],
)
def test_what_servers_refuse(change, shapes, words):
    assert _portable.problems(GOOD, SHAPES) == []
    (found,) = _portable.problems(GOOD | change, {} if "r" in change else SHAPES | shapes)
    assert words in found


def test_the_exact_layout_of_mixed_ranks_is_refused_by_servers(tmp_path):
    a, b = RNG.standard_normal((3, 5)), RNG.standard_normal((4, 3))
    peft.write(tmp_path / "x", {"m.q": (a, b, 6.0, 3), "m.v": (a[:2], b[:, :2], 6.0, 2)})
    found = peft.served_problems(tmp_path / "x")
    assert any("rank_pattern is not read" in one for one in found) and any("has rank" in one for one in found)


def test_full_values_go_beside_the_adapter(tmp_path):
    head = RNG.standard_normal((3, 2)).astype(np.float16)
    other = {"base_model.model.head.weight": head}
    done = peft.write_portable(tmp_path / "x", {"m.q": update(4, 5, 2)}, other=other)
    assert done["other_tensors"] == os.path.join(tmp_path / "x", "other_tensors.safetensors")
    np.testing.assert_array_equal(safetensors.read(done["other_tensors"])["base_model.model.head.weight"], head)
    assert peft.served_problems(tmp_path / "x") == []
    assert set(deltas(tmp_path / "x")) == {"m.q"}


def test_what_cannot_be_written_is_said(tmp_path):
    with pytest.raises(errors.ConfigError, match="convolution"):
        peft.write_portable(tmp_path / "x", {"c": peft.Update(np.ones((2, 3, 3, 3)), np.ones((4, 2, 1, 1)))})
    with pytest.raises(errors.ConfigError, match="no low-rank update"):
        peft.write_portable(tmp_path / "x", {})
    with pytest.raises(errors.InputError, match="not finite"):
        peft.write_portable(tmp_path / "x", {"q": peft.Update(np.full((1, 3), np.inf), np.ones((2, 1)))})
    with pytest.raises(errors.InputError, match="more than float16 holds"):
        peft.write_portable(
            tmp_path / "x", {"q": peft.Update(np.full((1, 3), 1e6), np.full((2, 1), 1e6), 1, "linear", "float16")}
        )
    assert not os.path.exists(tmp_path / "x")


def test_no_product_of_full_size_is_formed(tmp_path):
    one = update(4096, 4096, 4, scale=2.0)
    wide = update(4096, 4096, 4, orientation="fan_in_fan_out")
    tracemalloc.start()
    try:
        peft.write_portable(tmp_path / "x", {"m.q": one, "m.v": wide})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4096 * 4096  # bytes: a quarter of the product in float32


def test_the_header_of_the_weights_names_no_targets(tmp_path):
    peft.write(tmp_path / "x", {"q": (np.ones((1, 3)), np.ones((2, 1)), 1.0, 1)}, labels={"target_modules": "{"})
    path = tmp_path / "x" / peft.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": ".*q"}))
    assert peft.fields_of(formats.open_model(tmp_path / "x"))["target_modules"] == []


@pytest.mark.parametrize(("dtype", "most"), [("float16", 1e-3), ("bfloat16", 8e-3), ("float32", 1e-6)])
@pytest.mark.parametrize("small", [1.0, 1e-7])
def test_products_go_into_narrow_dtypes_balanced_where_a_factor_would_be_lost(dtype, most, small):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((4, 30)), small * rng.standard_normal((20, 4))
    tensor = types.SimpleNamespace(dtype=dtype)
    even_a, even_b, scale = _factors.written((a, b), types.SimpleNamespace(a=tensor, b=tensor))
    stored = [x.astype(descriptors.numpy_dtype(dtype)).astype(np.float64) for x in (even_a, even_b)]
    assert scale == 1 and np.linalg.norm(stored[1] @ stored[0] - b @ a) <= most * np.linalg.norm(b @ a)
    assert (even_a is a) == (small == 1.0 or dtype != "float16")  # the others hold such numbers as they are
    kept_a, kept_b, scale = _factors.written((a, b, 0.25), types.SimpleNamespace(a=tensor, b=tensor))
    assert kept_a is a and kept_b is b and scale == 0.25
