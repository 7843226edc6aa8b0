"""LoHa, LoKr and Tucker LoCon: Delta-W against the definitions of LyCORIS, refusals, writing as differences."""

import numpy as np
import pytest

from jaxsub import errors, formats
from jaxsub.formats import _lycoris, safetensors
from tests.formats.lora_files import DENSE, STEM, delta, factor, locon, loha, lokr, opened, pair, stored


@pytest.mark.parametrize("kind", DENSE)
def test_dense_updates_follow_their_definitions(tmp_path, kind):
    parts, expected = DENSE[kind]()
    model = opened(tmp_path, stored(parts, alpha=3))
    assert list(model.tensors) == [STEM] and not model.adapters
    assert model.tensors[STEM].shape == expected.shape and model.tensors[STEM].dtype == "float32"
    np.testing.assert_array_equal(delta(model, STEM), expected)
    for alpha in (None, 0):
        parts, expected = DENSE[kind](alpha=2)
        np.testing.assert_array_equal(delta(opened(tmp_path, stored(parts, alpha=alpha)), STEM), expected)


@pytest.mark.parametrize("kind", ["loha", "loha_core", "lokr_both", "lokr_second_conv", "lokr_core", "locon"])
def test_dense_updates_agree_with_lycoris(tmp_path, kind):
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("lycoris.functional")
    parts, _ = DENSE[kind]()
    w = {name.removesuffix(".weight"): torch.from_numpy(array) for name, array in parts.items()}
    if kind == "locon":
        theirs = 1.5 * functional.locon.diff_weight(w["lora_down"], w["lora_up"], w["lora_mid"])
    elif kind.startswith("loha"):
        order = ("hada_w1_b", "hada_w1_a", "hada_w2_b", "hada_w2_a", "hada_t1", "hada_t2")
        theirs = functional.loha.diff_weight(*(w.get(n) for n in order), gamma=torch.tensor(1.5))
    else:
        order = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
        theirs = functional.lokr.kron_weight(*(w.get(n) for n in order), scale=1.5)
    np.testing.assert_array_equal(delta(opened(tmp_path, stored(parts, alpha=3)), STEM), theirs.numpy())


def test_dense_updates_read_no_weights_until_asked(tmp_path, monkeypatch):
    model = opened(tmp_path, stored(loha()[0]))
    with monkeypatch.context() as patch:
        patch.setattr("jaxsub.formats._files.read_into", None)
        again = formats.open_model(model.path)
        with pytest.raises(TypeError):
            formats.read(again, again.tensors[STEM])
    assert delta(model, STEM).any()


def test_wide_factors_stay_wide_and_narrow_ones_are_multiplied_in_float32(tmp_path):
    parts, _ = loha()
    for dtype, wide in (("float64", "float64"), ("float16", "float32")):
        own = {name: (array * 1e-3 + 1).astype(dtype) for name, array in parts.items()}
        model = opened(tmp_path, stored(own, alpha=3))
        a, b, c, d = (own[n].astype("f8") for n in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"))
        assert model.tensors[STEM].dtype == wide
        np.testing.assert_allclose(delta(model, STEM), 1.5 * (a @ b) * (c @ d), rtol=4 * np.finfo(wide).eps)


def loha_with(**changes):
    parts = loha()[0] | changes
    return stored({name: array for name, array in parts.items() if array is not None})


FAULTS = {
    "and no hada_w2_b": loha_with(hada_w2_b=None),
    "and no hada_t2": loha_with(hada_t1=factor(2, 2, 3, 3)),
    "which do not fit": loha_with(hada_w1_a=factor(4, 3)),
    "halves of shapes": loha_with(hada_w1_a=factor(7, 2)),
    "halves of ranks": loha_with(hada_w1_a=factor(4, 3), hada_w1_b=factor(3, 5)),
    "which is no matrix": loha_with(hada_w1_a=factor(4)),
    "no kinds of lokr_w2": stored({"lokr_w1": factor(2, 2)}),
    "two kinds of lokr_w1": stored(lokr(first=True)[0] | {"lokr_w1": factor(2, 3)}),
    "and no lokr_w2_b": stored({"lokr_w1": factor(2, 3), "lokr_w2_a": factor(2, 3)}),
    "no factors belong to": stored(lokr()[0] | {"lokr_t2": factor(2, 2, 3, 3)}),
    "of ranks 2 and 3": stored(lokr(first=True)[0] | {"lokr_w2_a": factor(4, 3), "lokr_w2_b": factor(3, 5)}
                               | {"lokr_w2": None}),
    "more axes": stored({"lokr_w1": factor(2, 2, 3, 3), "lokr_w2": factor(2, 2)}),
    "lora_mid .* does not fit": stored(locon()[0] | {"lora_mid.weight": factor(2, 3, 3, 3)}),
    "no lora_down": stored({"lora_up.weight": factor(4, 2, 1, 1), "lora_mid.weight": factor(2, 2, 3, 3)}),
}  # fmt: skip


@pytest.mark.parametrize("words", FAULTS)
def test_faults_name_the_layer(tmp_path, words):
    arrays = {name: array for name, array in FAULTS[words].items() if array is not None}
    with pytest.raises(errors.InputError, match=words) as caught:
        opened(tmp_path, arrays)
    assert (caught.value.rule, caught.value.key) == ("H13", STEM) and caught.value.hint


def test_factors_that_are_no_floats_are_refused(tmp_path):
    with pytest.raises(errors.InputError, match="floats expected"):
        opened(tmp_path, loha_with(hada_w2_a=factor(4, 2).astype("i1")))


@pytest.mark.parametrize("kind", DENSE)
def test_rebuilt_dense_layers_keep_their_name_and_dtype(tmp_path, kind):
    """As differences where the factors tell the weight's shape, else as LoHa, which has the shape it is loaded into."""
    parts, expected = DENSE[kind]()
    half = {name: array.astype(np.float16) for name, array in parts.items()}
    model = opened(tmp_path, stored(half, alpha=3) | pair("other", alpha=1))
    formats.rewrite(model, tmp_path / "new.safetensors", {STEM: expected + 1})
    again, found = safetensors.read(tmp_path / "new.safetensors"), formats.open_model(tmp_path / "new.safetensors")
    is_flat = expected.ndim == 2
    loha = {f"{STEM}.{part}" for part in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha")}
    assert {name for name in again if name.startswith(STEM)} == (loha if is_flat else {f"{STEM}.diff"})
    assert {again[name].dtype for name in again if name.startswith(STEM) and "alpha" not in name} == {np.dtype("f2")}
    assert (set(found.tensors), set(found.adapters)) == ({STEM}, {"other"})
    scale = np.abs(expected + 1).max()
    np.testing.assert_allclose(delta(found, STEM), expected + 1, rtol=0, atol=(1 + is_flat) * 2**-10 * scale)
    formats.rewrite(found, tmp_path / "third.safetensors", {STEM: expected})
    third = delta(formats.open_model(tmp_path / "third.safetensors"), STEM)
    np.testing.assert_allclose(third, expected, rtol=0, atol=(1 + is_flat) * 2**-10 * np.abs(expected).max())


def test_a_matrix_as_loha_is_also_the_convolution_that_it_may_be():
    """LyCORIS makes the product of the two halves' products and gives it the shape of the weight."""
    w = np.random.default_rng(0).standard_normal((6, 2, 3, 3))
    for value in (w, np.zeros_like(w), w[:, :1, :1, :1] * np.ones(w.shape)):
        parts = _lycoris.as_loha(value.reshape(6, -1))
        product = (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
        rank = len(parts["hada_w1_b"])
        assert parts["alpha"] == rank == max(1, np.linalg.matrix_rank(value.reshape(6, -1)))
        assert {x.shape for x in parts.values()} == {(6, rank), (rank, 18), ()}
        np.testing.assert_allclose(product.reshape(w.shape), value, atol=1e-6)
