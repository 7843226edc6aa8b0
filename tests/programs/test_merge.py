"""`jaxsub merge`: files like the inputs' with merged numbers; what does not fit is said; killed runs go on."""

import importlib
import json
import os
import types

import ml_dtypes
import numpy as np
import pytest
import scipy.linalg

import jaxsub
from jaxsub import cli, errors, formats, plugins
from jaxsub.formats import peft, safetensors
from jaxsub.pipelines import merge, merge_store, merge_words
from tests import folders
from tests.merges import twins
from tests.selected import first


def weights(seed=0, *, dtype=np.float32):
    """A base with layers of every kind."""
    rng = np.random.default_rng(seed)
    return {
        "embed.weight": rng.standard_normal((30, 8)).astype(dtype),
        "a.weight": rng.standard_normal((12, 8)).astype(dtype),
        "a.bias": rng.standard_normal(12).astype(dtype),
        "conv.weight": rng.standard_normal((4, 3, 3, 3)).astype(dtype),
        "scale": np.array(1.5, dtype),
        "num_batches_tracked": np.array(7),
    }


def tuned(base, seed, size=0.1):
    rng = np.random.default_rng(1000 + seed)
    return {
        k: (v.astype(np.float32) + size * rng.standard_normal(v.shape)).astype(v.dtype) if v.dtype.kind != "i" else v
        for k, v in base.items()
    }


def collection(folder, count=3, *, dtype=np.float32, change=None):
    """Writes a base and its fine-tunes; ({id: tensors}, base)."""
    base = weights(dtype=dtype)
    os.makedirs(folder / "models")
    safetensors.write(folder / "base.safetensors", base)
    models = {}
    for n in range(count):
        models[f"m{n}"] = tuned(base, n)
        if change is not None:
            change(n, models[f"m{n}"])
        safetensors.write(folder / "models" / f"m{n}.safetensors", models[f"m{n}"], {"epoch": str(n)})
    return models, base


def run(folder, method, **more):
    config = {"collection": (str(folder / "models"),), "method": method, "out": str(folder / "out")} | more
    return merge.run(merge.Config(**config))


def written(folder):
    return safetensors.read(folder / "out" / "model.safetensors")


def stack(models, name):
    return np.stack([m[name].astype(float) for m in models.values()])


@pytest.mark.parametrize(
    "dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64], ids=lambda d: np.dtype(d).name
)
def test_a_mean_is_written_in_the_models_format_and_dtype(tmp_path, dtype):
    models, base = collection(tmp_path, dtype=dtype)
    found = run(tmp_path, "mean")
    new = written(tmp_path)
    assert {k: (v.dtype, v.shape) for k, v in new.items()} == {k: (v.dtype, v.shape) for k, v in base.items()}
    for name in ("embed.weight", "a.weight", "a.bias", "conv.weight", "scale"):
        mean = stack(models, name).mean(axis=0)
        eps = float(ml_dtypes.finfo(dtype).eps)
        assert np.abs(new[name].astype(float) - mean).max() <= eps * np.abs(mean).max()
    assert new["num_batches_tracked"] == 7 and "num_batches_tracked" in found["copied"]
    assert safetensors.open_metadata(tmp_path / "out" / "model.safetensors") == {"epoch": "0"}
    assert json.loads((tmp_path / "out" / merge.RECORD).read_text()) == json.loads(json.dumps(found))
    assert not os.path.exists(tmp_path / "out.part")
    assert (
        formats.open_model(str(tmp_path / "out")).tensors.keys()
        == formats.open_model(str(tmp_path / "models" / "m0.safetensors")).tensors.keys()
    )


@pytest.mark.parametrize("method", first(["ties", "task_arithmetic", "model_stock", "iso_c"], 2))
def test_updates_are_differences_to_the_base(tmp_path, method):
    models, base = collection(tmp_path)
    run(tmp_path, method, base=str(tmp_path / "base.safetensors"))
    new, twin = written(tmp_path), getattr(twins, method)
    for name in ("a.weight", "a.bias", "conv.weight"):
        wanted = base[name] + twin(stack(models, name) - base[name])
        assert np.linalg.norm(new[name] - wanted) < 1e-6 * np.linalg.norm(wanted)


def test_a_method_of_updates_asks_for_the_base(tmp_path):
    collection(tmp_path)
    with pytest.raises(errors.ConfigError, match="ties merges updates.*--base"):
        run(tmp_path, "ties")
    assert not os.path.exists(tmp_path / "out") and not os.path.exists(tmp_path / "out.part")


def test_weights_go_by_order_by_id_or_by_path(tmp_path):
    models, _ = collection(tmp_path)
    wanted = twins.mean(stack(models, "a.weight"), [1, 2, 3])
    path = str(tmp_path / "models" / "m0.safetensors")
    for number, given in enumerate(
        [("1", "2", "3"), ("m2=3", "m0=1", "m1=2"), (f"{path}=1", "m1=2", "m2=3"), ("1,2", "3")]
    ):
        out = tmp_path / f"out{number}"
        found = run(tmp_path, "weighted", weights=given, out=str(out))
        assert found["weights"] == [1, 2, 3]
        new = safetensors.read(out / "model.safetensors")["a.weight"]
        assert np.abs(new - wanted).max() < 1e-6
    for bad, said in ((("1", "2"), "none for m2"), (("1",) * 4, "4 given for 3"), (("x=1", "1", "1"), "no model x")):
        with pytest.raises(errors.ConfigError, match=said):
            run(tmp_path, "weighted", weights=bad, out=str(tmp_path / "bad"))


@pytest.mark.parametrize("method", ["mean", "weighted", "spherical"])
def test_weights_are_made_to_sum_to_one_or_refused(tmp_path, method):
    models, _ = collection(tmp_path)
    run(tmp_path, method, weights=("1e308", "1e308", "1e308"))  # whose sum overflows
    run(tmp_path, method, out=str(tmp_path / "equal"))
    equal = safetensors.read(tmp_path / "equal" / "model.safetensors")
    assert all(np.array_equal(x, equal[name]) for name, x in written(tmp_path).items())
    for bad in (("0", "0", "0"), ("1", "-1", "0"), ("1e300", "-1e300", "1")):
        with pytest.raises(errors.ConfigError, match="weights sum to 0"):
            run(tmp_path, method, weights=bad, out=str(tmp_path / "bad"), restart=True)


def test_layers_that_are_not_chosen_are_the_first_models(tmp_path):
    models, _ = collection(tmp_path)
    found = run(tmp_path, "mean", exclude_layers=("bias", "conv"))
    new = written(tmp_path)
    assert np.array_equal(new["a.bias"], models["m0"]["a.bias"]) and found["copied"]["a.bias"] == "not chosen"
    assert np.array_equal(new["conv.weight"], models["m0"]["conv.weight"])
    assert np.abs(new["a.weight"] - stack(models, "a.weight").mean(axis=0)).max() < 1e-6


# What does not fit ------------------------------------------------------------------------------------------------


def longer(n, model):
    if n:
        model["embed.weight"] = np.concatenate([model["embed.weight"], np.full((n, 8), 9, np.float32)])


def test_vocabularies_that_differ(tmp_path):
    models, _ = collection(tmp_path, change=longer)
    with pytest.raises(
        errors.InputError, match=r"embed.weight has shapes \[30, 8\], \[31, 8\], \[32, 8\].*mismatched=crop"
    ):
        run(tmp_path, "mean")
    found = run(tmp_path, "mean", mismatched="copy")
    assert np.array_equal(written(tmp_path)["embed.weight"], models["m0"]["embed.weight"])
    assert "stays that of m0" in " ".join(found["said"])
    found = run(tmp_path, "mean", mismatched="crop", out=str(tmp_path / "crop"))
    new = safetensors.read(tmp_path / "crop" / "model.safetensors")["embed.weight"]
    mean = np.mean([m["embed.weight"][:30] for m in models.values()], axis=0)
    assert np.abs(new - mean).max() < 1e-6 and "first 30 rows are merged" in " ".join(found["said"])


def test_the_rows_behind_the_common_ones_are_the_first_models(tmp_path):
    models, base = collection(tmp_path, change=lambda n, m: longer(2 - n, m))
    run(tmp_path, "task_arithmetic", mismatched="crop", base=str(tmp_path / "base.safetensors"))
    new = written(tmp_path)["embed.weight"]
    assert new.shape == (32, 8) and np.array_equal(new[30:], models["m0"]["embed.weight"][30:])
    wanted = base["embed.weight"] + 0.3 * sum(m["embed.weight"][:30] - base["embed.weight"] for m in models.values())
    assert np.abs(new[:30] - wanted).max() < 1e-5


@pytest.mark.parametrize("position", [0, 1])
def test_a_layer_that_a_model_lacks(tmp_path, position):
    models, _ = collection(tmp_path, change=lambda n, m: m.pop("a.bias") if n == position else None)
    with pytest.raises(errors.InputError, match="a.bias is .*mismatched=copy"):
        run(tmp_path, "mean")
    found = run(tmp_path, "mean", mismatched="copy")
    assert ("a.bias" in written(tmp_path)) == bool(position)
    if position:
        assert np.array_equal(written(tmp_path)["a.bias"], models["m0"]["a.bias"])
    assert "a.bias" in " ".join(found["said"])


def test_a_layer_that_the_base_lacks(tmp_path):
    _, base = collection(tmp_path)
    del base["a.weight"]
    safetensors.write(tmp_path / "other.safetensors", base)
    with pytest.raises(errors.InputError, match="a.weight is not in the base"):
        run(tmp_path, "ties", base=str(tmp_path / "other.safetensors"))


def tie(n, model):
    model["head.weight"] = model["embed.weight"].copy()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mean", "dare_linear"])
def test_tied_weights_stay_tied(tmp_path, method):
    collection(tmp_path, change=tie)
    safetensors.write(tmp_path / "base.safetensors", weights() | {"head.weight": weights()["embed.weight"]})
    found = run(tmp_path, method, base=str(tmp_path / "base.safetensors"))
    new = written(tmp_path)
    assert np.array_equal(new["head.weight"], new["embed.weight"])
    assert "tied to embed.weight" in " ".join(found["said"])


@pytest.mark.parametrize("holder", [0, 2])
def test_tied_weights_that_some_models_store_twice(tmp_path, holder):
    collection(tmp_path, change=lambda n, m: tie(n, m) if n == holder else None)
    run(tmp_path, "mean")
    new = written(tmp_path)
    assert ("head.weight" in new) == (holder == 0)
    if holder == 0:
        assert np.array_equal(new["head.weight"], new["embed.weight"])


def test_a_head_that_is_not_tied_is_no_twin(tmp_path):
    def change(n, model):
        tie(n, model)
        if n == 1:
            model["head.weight"][3, 3] += 1

    models, _ = collection(tmp_path, change=change)
    run(tmp_path, "mean")
    new = written(tmp_path)
    assert np.abs(new["head.weight"] - stack(models, "head.weight").mean(axis=0)).max() < 1e-6
    assert not np.array_equal(new["head.weight"], new["embed.weight"])


# Who may be merged ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 9])
def test_models_of_different_starts_are_refused(tmp_path, offset):
    """Also where a mean of all entries makes cosines of nearly 1."""

    def change(n, model):
        if n == 2:
            model.update({k: v for k, v in weights(seed=77).items() if v.dtype.kind == "f"})
        model.update({k: v + v.dtype.type(offset) for k, v in model.items() if v.dtype.kind == "f"})

    collection(tmp_path, change=change)
    with pytest.raises(errors.InputError, match="do not share a start: 2 of 3 share one, not m2.*--force"):
        run(tmp_path, "mean")
    assert not os.path.exists(tmp_path / "out.part")
    found = run(tmp_path, "mean", force=True)
    assert "forced" in " ".join(found["said"])


def test_a_base_of_another_start_is_refused(tmp_path):
    collection(tmp_path)
    safetensors.write(tmp_path / "other.safetensors", weights(seed=5))
    with pytest.raises(errors.InputError, match="not the base"):
        run(tmp_path, "ties", base=str(tmp_path / "other.safetensors"))


def test_a_few_weights_do_not_tell_strangers(tmp_path):
    collection(tmp_path)
    found = run(tmp_path, "mean", layers=("a.bias",))  # 12 of them: unrelated ones may have any cosine
    assert any("12 weights are too few to tell" in one for one in found["said"])


def test_nan_stops_a_merge_unless_models_may_be_set_aside(tmp_path):
    def change(n, model):
        if n == 1:
            model["conv.weight"][0, 0, 0, 0] = np.nan

    models, base = collection(tmp_path, 4, change=change)
    for method in ("mean", "ties", "tsv"):
        with pytest.raises(errors.InputError, match="m1.safetensors.*conv.weight"):
            run(tmp_path, method, base=str(tmp_path / "base.safetensors"), out=str(tmp_path / method))
    found = run(tmp_path, "mean", max_quarantined=1)
    assert [q["id"] for q in found["quarantined"]] == ["m1"]
    del models["m1"]
    assert np.abs(written(tmp_path)["embed.weight"] - stack(models, "embed.weight").mean(axis=0)).max() < 1e-6


@pytest.mark.parametrize("odd", ["another architecture", "a layer less", "the first model"])
def test_models_that_do_not_fit_are_set_aside_if_some_may_be(tmp_path, odd):
    def change(n, model):
        if n == (0 if odd == "the first model" else 2):
            gone = {"a.weight": model.pop("a.weight")}
            if odd != "a layer less":
                gone |= model
                model.clear()
                model.update({f"other.{k}": v for k, v in gone.items()})

    models, _ = collection(tmp_path, 5, change=change)
    with pytest.raises(errors.InputError, match="layers do not fit"):
        run(tmp_path, "mean")
    with pytest.raises(errors.InputError, match="layers do not fit"):
        run(tmp_path, "mean", max_quarantined=1, strict=True)
    found = run(tmp_path, "mean", max_quarantined=1)
    name = "m0" if odd == "the first model" else "m2"
    assert [q["id"] for q in found["quarantined"]] == [name] and name not in [m["id"] for m in found["models"]]
    del models[name]
    assert np.abs(written(tmp_path)["a.weight"] - stack(models, "a.weight").mean(axis=0)).max() < 1e-6
    if odd == "a layer less":
        copied = run(tmp_path, "mean", max_quarantined=1, mismatched="copy", out=str(tmp_path / "copied"))
        assert copied["quarantined"] == []  # layers, not models, are left out then


def test_more_models_that_do_not_fit_than_may_be_set_aside_stop_a_merge(tmp_path):
    def change(n, model):
        if n == 2:
            del model["a.weight"]

    collection(tmp_path, 5, change=change)
    with open(tmp_path / "models" / "m1.safetensors", "r+b") as file:
        file.truncate(100)
    with pytest.raises(errors.InputError, match="2 of 5 models set aside, the last because it is missing"):
        run(tmp_path, "mean", max_quarantined=1)
    found = run(tmp_path, "mean", max_quarantined=2)
    assert sorted(q["id"] for q in found["quarantined"]) == ["m1", "m2"]


def test_numbers_that_the_dtype_cannot_hold_are_refused(tmp_path):
    collection(tmp_path, dtype=np.float16)
    options = {"base": str(tmp_path / "base.safetensors"), "options": ("scaling=1e6",)}
    with pytest.raises(errors.InputError, match="more than float16 holds"):
        run(tmp_path, "task_arithmetic", **options)


@pytest.mark.parametrize("share", [1, 0.01], ids=["all", "one"])
@pytest.mark.parametrize("method", ["mean", "tsv", "iso_c", "iso_cts", "wudi", "knots_ties", "subspace_ties"])
def test_an_overflow_of_updates_is_refused(tmp_path, method, share):
    """Twice the largest float32, of all entries or of one, is no NaN of a file, and no update of 0 either."""
    os.makedirs(tmp_path / "models")
    rng = np.random.default_rng(0)
    far = (3e38 * rng.uniform(0.9, 1, (8, 8))).astype(np.float32)
    near = np.where(np.arange(64).reshape(8, 8) < 64 * share, far, far / np.float32(1e6))
    safetensors.write(tmp_path / "base.safetensors", {"w": -near})
    for n in range(5):
        safetensors.write(tmp_path / "models" / f"m{n}.safetensors", {"w": near * np.float32(1 - n / 50)})
    message = "more than float32 holds|has overflown"
    with pytest.raises((errors.InputError, errors.SolverError), match=message) as caught:
        run(tmp_path, method, base=str(tmp_path / "base.safetensors"), force=True, max_quarantined=2)
    assert "w" in str(caught.value) and not os.path.exists(tmp_path / "merged")


@pytest.mark.parametrize("method", ["mean", "tsv", "iso_c"])
def test_an_overflow_is_refused_and_no_model_blamed(tmp_path, method):
    """Updates of twice the largest float32, their sum, or results, are no NaN of a file, and no 0 either."""
    os.makedirs(tmp_path / "models")
    rng = np.random.default_rng(0)
    far = (3e38 * rng.uniform(0.9, 1, (8, 8))).astype(np.float32)
    safetensors.write(tmp_path / "base.safetensors", {"w": -far if method == "mean" else far * 0})
    for n in range(3):
        safetensors.write(tmp_path / "models" / f"m{n}.safetensors", {"w": far * np.float32(1 - n / 50)})
    with pytest.raises(errors.InputError, match="more than float32 holds"):
        options = ("scaling=1.3",) if method == "tsv" else ()  # at 1 its result is 2.9e38, which is a number
        run(tmp_path, method, base=str(tmp_path / "base.safetensors"), options=options, force=True, max_quarantined=2)


# Runs that stop and go on -----------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


@pytest.mark.parametrize("count", [8, 9])
def test_layers_of_which_tsv_takes_nothing_are_said(tmp_path, count):
    collection(tmp_path, count)
    found = run(tmp_path, "tsv", base=str(tmp_path / "base.safetensors"))
    said = [one for one in found["said"] if "too many models for tsv" in one]
    assert len(said) == (count > 8) and all("a.weight, embed.weight" in one for one in said)
    assert np.array_equal(written(tmp_path)["a.weight"], weights()["a.weight"]) == (count > 8)


def test_a_second_algorithm_is_said_after_a_resume_too(tmp_path, monkeypatch):
    collection(tmp_path)
    base = {"base": str(tmp_path / "base.safetensors")}
    whole, eigh = run(tmp_path, "knots_ties", **base, out=str(tmp_path / "whole")), scipy.linalg.eigh
    assert not any("divide and conquer" in said for said in whole["said"])

    def gives_up(*_, **__):
        raise np.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(scipy.linalg, "eigh", gives_up)
    monkeypatch.setattr(merge_store.Framed, "finish", lambda self: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        run(tmp_path, "knots_ties", **base)
    monkeypatch.undo()
    found = run(tmp_path, "knots_ties", **base)
    assert scipy.linalg.eigh is eigh and any("divide and conquer" in said for said in found["said"])
    wanted = safetensors.read(tmp_path / "whole" / "model.safetensors")
    for name, layer in written(tmp_path).items():
        np.testing.assert_allclose(layer, wanted[name], atol=1e-5)


@pytest.mark.parametrize("at", first([0, 3, 1, 4], 2))
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(tmp_path, monkeypatch, at):
    collection(tmp_path)
    config = {"base": str(tmp_path / "base.safetensors"), "options": ("density=0.4",)}
    module, merged = plugins.load("merges", "dare_ties"), []
    original = module.merge

    def counted(rows, options, key, fails):
        if not rows.name:  # made up, to try the options
            return original(rows, options, key)
        if len(merged) == fails:
            raise Killed
        merged.append(rows.name)
        return original(rows, options, key)

    monkeypatch.setattr(module, "merge", lambda *a: counted(*a, fails=at))
    with pytest.raises(Killed):
        run(tmp_path, "dare_ties", **config)
    assert not os.path.exists(tmp_path / "out") and os.path.exists(tmp_path / "out.part")
    first = list(merged)
    monkeypatch.setattr(module, "merge", lambda *a: counted(*a, fails=99))
    run(tmp_path, "dare_ties", **config)
    assert len(merged) == 5 and merged[: len(first)] == first  # nothing twice
    (tmp_path / "out").rename(tmp_path / "again")
    run(tmp_path, "dare_ties", **config)  # undisturbed, into a folder of that name
    assert folders.contents(tmp_path / "again") == folders.contents(tmp_path / "out")
    assert not os.path.exists(tmp_path / "out.part")


def test_tensors_of_one_storage_are_not_said_to_be_the_first_models(tmp_path):
    torch = pytest.importorskip("torch")
    for n in range(3):
        (tmp_path / f"m{n}").mkdir()
        shared = torch.ones(20, 8) * torch.arange(8) + n
        state = {"embed.weight": shared, "lm_head.weight": shared, "w": torch.ones(5, 4) + n, "count": torch.tensor(3)}
        torch.save(state, tmp_path / f"m{n}" / "pytorch_model.bin")
        (tmp_path / f"m{n}" / "config.json").write_text("{}")
    config = {"collection": (str(tmp_path / "m?"),), "method": "mean", "out": str(tmp_path / "out"), "force": True}
    found = merge.run(merge.Config(**config))
    assert list(found["copied"]) == ["count"]
    assert "lm_head.weight: tied to embed.weight, and merged with it" in found["said"]


def test_a_layer_that_was_damaged_meanwhile_is_merged_again(tmp_path, monkeypatch):
    collection(tmp_path)
    run(tmp_path, "mean", out=str(tmp_path / "whole"))
    monkeypatch.setattr(merge_store.Framed, "finish", lambda self: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        run(tmp_path, "mean")
    monkeypatch.undo()
    file = tmp_path / "out.part" / "model" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-300] ^= 1
    file.write_bytes(bytes(data))
    journal = tmp_path / "out.part" / "journal"
    journal.write_bytes(journal.read_bytes()[:-5])  # and a line that was not written to its end
    run(tmp_path, "mean")
    assert (
        folders.contents(tmp_path / "out")["model.safetensors"]
        == folders.contents(tmp_path / "whole")["model.safetensors"]
    )


def test_other_options_do_not_go_on_with_a_run(tmp_path, monkeypatch):
    collection(tmp_path)
    monkeypatch.setattr(merge_store.Framed, "finish", lambda self: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        run(tmp_path, "mean")
    monkeypatch.undo()
    with pytest.raises(errors.WorkdirError, match="config.method was mean, is spherical"):
        run(tmp_path, "spherical")
    run(tmp_path, "spherical", restart=True)


def test_a_finished_merge_is_found_and_nothing_else_is_replaced(tmp_path, monkeypatch):
    collection(tmp_path)
    found = run(tmp_path, "mean")
    module = plugins.load("merges", "mean")
    monkeypatch.setattr(module, "merge", None)
    assert run(tmp_path, "mean") == json.loads(json.dumps(found))
    monkeypatch.undo()
    with pytest.raises(errors.WorkdirError, match="exists already"):
        run(tmp_path, "spherical")
    assert run(tmp_path, "mean")["method"] == "mean"


# Formats ----------------------------------------------------------------------------------------------------------


def folder_models(folder, *, sharded):
    """Hugging Face folders, in two shards or whole; {id: tensors}."""
    base, models = weights(), {}
    for n in range(3):
        place = folder / "models" / f"m{n}"
        os.makedirs(place)
        models[f"m{n}"] = tuned(base, n)
        (place / "config.json").write_text(json.dumps({"model_type": "toy", "number": n}))
        (place / "tokenizer.json").write_text("{}")
        (place / "modeling_toy.py").write_text("raise SystemExit")
        names = sorted(models[f"m{n}"])
        if not sharded:
            safetensors.write(place / "model.safetensors", models[f"m{n}"], {"format": "pt"})
            continue
        where = {name: f"model-0000{1 + i // 3}-of-00002.safetensors" for i, name in enumerate(names)}
        for shard in sorted({*where.values()}):
            part = {name: models[f"m{n}"][name] for name in names if where[name] == shard}
            safetensors.write(place / shard, part, {"format": "pt"})
        total = sum(v.nbytes for v in models[f"m{n}"].values())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (place / "model.safetensors.index.json").write_text(json.dumps(index))
    return models


def test_the_merged_model_may_not_lie_among_the_models(tmp_path):
    collection(tmp_path)
    models = tmp_path / "models"
    os.symlink(models, tmp_path / "link")
    globs = (str(models / "m*"),)
    cases = ((models / "out", {}), (tmp_path / "link" / "out", {}), (models / "merged", {"collection": globs}))
    for place, own in cases:
        with pytest.raises(errors.ConfigError, match="lies in, or is, the collection"):
            run(tmp_path, "mean", out=str(place), **own)
    assert sorted(os.listdir(models)) == ["m0.safetensors", "m1.safetensors", "m2.safetensors"]
    run(tmp_path, "mean", out=str(models / "out"), collection=globs)  # does not match, and is found again
    assert run(tmp_path, "mean", out=str(models / "out"), collection=globs)["method"] == "mean"


@pytest.mark.parametrize("method", ["wudi", "spherical"])
def test_steps_below_0_are_refused(tmp_path, method):
    collection(tmp_path)
    with pytest.raises(errors.ConfigError, match="steps=-1"):
        run(tmp_path, method, options=("steps=-1",), base=str(tmp_path / "base.safetensors"))


@pytest.mark.parametrize("sharded", [False, True])
def test_folders_keep_config_tokenizer_and_shards(tmp_path, sharded):
    models = folder_models(tmp_path, sharded=sharded)
    run(tmp_path, "mean")
    out = tmp_path / "out"
    names = sorted(os.listdir(tmp_path / "models" / "m0"))
    names.remove("modeling_toy.py")
    assert sorted(os.listdir(out)) == sorted([*names, merge.RECORD])
    assert json.loads((out / "config.json").read_text())["number"] == 0
    opened = formats.open_model(str(out))
    for name, tensor in opened.tensors.items():
        mean = stack(models, name).mean(axis=0)
        assert np.abs(formats.read(opened, tensor) - mean).max() < 1e-6


def test_archives_are_merged_into_archives(tmp_path):
    base, models = weights(), {}
    os.makedirs(tmp_path / "models")
    for n in range(3):
        models[f"m{n}"] = {k: v for k, v in tuned(base, n).items()}
        np.savez(tmp_path / "models" / f"m{n}.npz", **models[f"m{n}"])
    run(tmp_path, "mean")
    with np.load(tmp_path / "out" / "model.npz") as new:
        for name in ("a.weight", "scale"):
            assert np.abs(new[name] - stack(models, name).mean(axis=0)).max() < 1e-6
        assert new["num_batches_tracked"] == 7


def adapters(folder, *, ranks=(2, 3, 2), missing=True, name="models"):
    """PEFT folders of mixed ranks; the last one lacks a layer. {layer: updates (N, o, i)}."""
    rng, products = np.random.default_rng(3), {}
    for n, r in enumerate(ranks):
        entries = {}
        for layer, (o, i) in {"m.q": (11, 7), "m.v": (9, 7)}.items():
            if missing and layer == "m.v" and n == len(ranks) - 1:
                products.setdefault(layer, []).append(np.zeros((o, i)))
                continue
            a, b = rng.standard_normal((r, i)).astype("f4"), rng.standard_normal((o, r)).astype("f4")
            entries[layer] = (a, b, 4.0, r)
            products.setdefault(layer, []).append(4.0 / r * b.astype(float) @ a)
        peft.write(folder / name / f"a{n}", entries, base_model="some/base")
    return {layer: np.stack(parts) for layer, parts in products.items()}


def updates(folder):
    """layer -> s B A as the files say."""
    model = formats.open_model(str(folder))
    return {
        name: pair.scale * formats.read(model, pair.b).astype(float) @ formats.read(model, pair.a)
        for name, pair in model.adapters.items()
    }


@pytest.mark.parametrize("layout", ["portable", "exact"])
@pytest.mark.parametrize("method", first(["ties", "mean", "tsv", "knots_ties"]))
def test_adapters_of_mixed_ranks(tmp_path, method, layout):
    x = adapters(tmp_path)
    options = () if method != "ties" else ("density=0.5",)
    found = run(tmp_path, method, peft_layout=layout, options=options, rank=7)
    twin = {
        "mean": twins.mean, "ties": lambda x: twins.ties(x, 0.5), "tsv": twins.tsv,
        "knots_ties": lambda x: twins.knots(x, lambda r: twins.ties(r, 0.2, 0.6)),
    }[method]  # fmt: skip
    new = updates(tmp_path / "out")
    for layer, stacked in x.items():
        wanted = twin(stacked)
        assert np.linalg.norm(new[layer] - wanted) < 2e-5 * np.linalg.norm(wanted)
    assert all(record["truncation_error"] < 1e-6 for record in found["layers"])
    if layout == "portable":
        assert not peft.served_problems(str(tmp_path / "out"))


def with_heads(folder, task="SEQ_CLS"):
    """Adapters with a saved head; the heads, (N, 2, 7)."""
    adapters(folder, missing=False)
    heads = np.random.default_rng(8).standard_normal((3, 2, 7)).astype("f4")
    for n, head in enumerate(heads):
        place = folder / "models" / f"a{n}"
        tensors, config = safetensors.read(place / "adapter_model.safetensors"), place / "adapter_config.json"
        safetensors.write(place / "adapter_model.safetensors", tensors | {"base_model.model.head.weight": head})
        fields = {"modules_to_save": ["head"], "task_type": task}
        config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    return heads


def test_saved_heads_are_merged_where_programs_load_them(tmp_path):
    heads = with_heads(tmp_path)
    found = run(tmp_path, "mean")
    merged = safetensors.read(tmp_path / "out" / "adapter_model.safetensors")
    np.testing.assert_allclose(merged["base_model.model.head.weight"], heads.mean(axis=0), rtol=1e-5)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["head"] and config["task_type"] == "SEQ_CLS" and found["said"] == []


def test_heads_that_the_portable_layout_leaves_out_are_said(tmp_path):
    """Of a task with a head PEFT would look for it in the adapter's own file, and fail."""
    with_heads(tmp_path)
    found = run(tmp_path, "mean", peft_layout="portable")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["task_type"] is None and "head.weight" in found["said"][0]
    assert (tmp_path / "out" / "other_tensors.safetensors").exists()


@pytest.mark.parametrize("layout", ["portable", "exact"])
def test_updates_that_vanish_have_one_direction_of_zeros(tmp_path, layout):
    """No program opens an adapter of rank 0."""
    adapters(tmp_path, missing=False)
    for n in range(3):
        place = tmp_path / "models" / f"a{n}" / "adapter_model.safetensors"
        tensors = safetensors.read(place)
        zero = {k: v * 0 if "m.v.lora_B" in k else v for k, v in tensors.items()}
        safetensors.write(place, zero)
    run(tmp_path, "mean", peft_layout=layout)
    model = formats.open_model(str(tmp_path / "out"))
    assert min(pair.rank for pair in model.adapters.values()) >= 1 and not updates(tmp_path / "out")["m.v"].any()


def test_the_rank_of_a_merged_adapter(tmp_path):
    x = adapters(tmp_path, missing=False)
    found = run(tmp_path, "mean", rank=3, peft_layout="exact")
    new = updates(tmp_path / "out")
    for record in found["layers"]:
        mean = x[record["name"]].mean(axis=0)
        s = np.linalg.svd(mean, compute_uv=False)
        best = np.sqrt(np.sum(s[3:] ** 2) / np.sum(s**2))
        assert record["rank"] == 3 and record["truncation_error"] == pytest.approx(best, rel=1e-5)
        assert np.linalg.norm(new[record["name"]] - mean) / np.linalg.norm(mean) == pytest.approx(best, rel=1e-4)
    assert f"{found['layers'][0]['truncation_error']:.2e}" in merge_words.table(found)


def test_an_update_that_no_single_adapter_has_needs_the_portable_layout(tmp_path):
    rng = np.random.default_rng(0)
    for n, layer in enumerate(["m.q", "m.v"]):
        a, b = rng.standard_normal((2, 5)).astype("f4"), rng.standard_normal((6, 2)).astype("f4")
        peft.write(tmp_path / "models" / f"a{n}", {layer: (a, b, 2.0, 2)})
    with pytest.raises(errors.ConfigError, match="m.v: no single adapter has all updates.*portable"):
        run(tmp_path, "mean", peft_layout="exact")
    run(tmp_path, "mean")
    assert {*updates(tmp_path / "out")} == {"m.q", "m.v"}


def test_adapters_of_different_bases_are_refused(tmp_path):
    adapters(tmp_path)
    path = tmp_path / "models" / "a1" / peft.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "other/base"}))
    with pytest.raises(errors.InputError, match="different base models: other/base, some/base"):
        run(tmp_path, "mean")


def test_a_and_b_apart_are_another_thing(tmp_path):
    x = adapters(tmp_path, ranks=(2, 2, 2), missing=False)
    found = run(tmp_path, "lora_factors")
    new = updates(tmp_path / "out")["m.q"]
    assert np.linalg.norm(new - x["m.q"].mean(axis=0)) > 0.3 * np.linalg.norm(x["m.q"].mean(axis=0))
    assert "is not the average of the updates" in " ".join(found["said"])


def test_a_bundle_of_a_and_b_apart_is_refused(tmp_path):
    adapters(tmp_path, ranks=(2, 2, 2), missing=False)
    jaxsub.fit(str(tmp_path / "models"), tmp_path / "b", rank=1, view="lora_factors")
    with pytest.raises(errors.ConfigError, match="holds LoRA's A and B apart.*fitted without it"):
        run(tmp_path, "mean", bundle=str(tmp_path / "b"))
    assert not (tmp_path / "out").exists()


def test_a_bundle_of_other_layers_is_refused(tmp_path, fitted):
    adapters(tmp_path, ranks=(2, 2, 2), missing=False)
    with pytest.raises(errors.ConfigError, match="the models have no layer of the bundle"):
        run(tmp_path, "mean", bundle=fitted.bundle)


# Coefficients -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fitted")
    models, base = collection(folder, 9)
    jaxsub.fit(str(folder / "models"), folder / "bundle", rank=4, layers=["a.weight", "embed"])
    return types.SimpleNamespace(folder=folder, models=models, base=base, bundle=str(folder / "bundle"))


def test_a_mean_of_centred_coefficients_is_the_mean_and_is_said_to_be(fitted, tmp_path):
    for method in ("mean", "task_arithmetic"):
        found = run(fitted.folder, method, bundle=fitted.bundle, out=str(tmp_path / method))
        new = safetensors.read(tmp_path / method / "model.safetensors")["a.weight"]
        mean = stack(fitted.models, "a.weight").mean(axis=0)
        assert np.abs(new - mean).max() < 1e-5 and "E33" in " ".join(found["said"])
    kinds = {r["name"]: (r["row"], r["method"]) for r in found["layers"]}
    assert kinds["a.weight"] == ("coefficients", "task_arithmetic") and kinds["a.bias"] == ("weights", "mean")


def test_ties_on_coefficients(fitted, tmp_path):
    found = run(fitted.folder, "ties", bundle=fitted.bundle, out=str(tmp_path / "out"), options=("density=0.5",))
    assert "E33" not in " ".join(found["said"])
    new = written(tmp_path)["a.weight"]
    bundle = jaxsub.load(fitted.bundle)
    layer = bundle.layer("a.weight", (12, 8))
    mean, basis = np.asarray(layer.subspace.mean, float), np.asarray(layer.subspace.basis, float)
    wanted = mean + twins.ties(layer.values.astype(float), 0.5) @ basis
    assert np.linalg.norm(new.reshape(-1) - wanted) < 1e-5 * np.linalg.norm(wanted)
    assert np.abs(wanted - mean).max() > 1e-3


def test_coefficients_of_differences_to_a_base(fitted, tmp_path):
    more = {"bundle": fitted.bundle, "base": str(fitted.folder / "base.safetensors"), "options": ("scaling=0.7",)}
    found = run(fitted.folder, "task_arithmetic", **more, out=str(tmp_path / "out"))
    basis = np.asarray(jaxsub.load(fitted.bundle).layer("a.weight", (12, 8)).subspace.basis, float)
    base = fitted.base["a.weight"].astype(float).reshape(-1)
    x = stack(fitted.models, "a.weight").reshape(9, -1) - base
    wanted = base + 0.7 * (x @ basis.T).sum(axis=0) @ basis
    assert np.linalg.norm(written(tmp_path)["a.weight"].reshape(-1) - wanted) < 1e-5 * np.linalg.norm(wanted)
    assert "E33" not in " ".join(found["said"])


# Before, and by the command ---------------------------------------------------------------------------------------


def test_dry_run_says_that_a_base_is_lacking(tmp_path):
    collection(tmp_path)
    found = run(tmp_path, "ties", dry_run=True)
    assert not found["can_work"] and "give --base=MODEL" in found["text"]


@pytest.mark.parametrize("method", ["regmean", "fisher"])
def test_without_statistics_it_is_said_to_be_the_mean(tmp_path, method):
    collection(tmp_path)
    assert any("no statistics were given" in one for one in run(tmp_path, method)["said"])


def test_dry_run_says_whether_it_can_work_and_writes_nothing(tmp_path):
    collection(tmp_path)
    found = run(tmp_path, "ties", base=str(tmp_path / "base.safetensors"), dry_run=True)
    assert sorted(os.listdir(tmp_path)) == ["base.safetensors", "models"]
    layer = next(r for r in found["layers"] if r["name"] == "a.weight")
    assert layer["against_chance"] == pytest.approx((1 - 3**-0.5) / 2)
    assert abs(layer["against"] - layer["against_chance"]) < 0.05 and abs(layer["cosine"]) < 0.3
    assert found["can_work"] and "sign conflicts" in found["text"]
    assert all(len(line) <= 100 for line in found["text"].splitlines())


def test_options_are_checked_before_anything_is_read(tmp_path):
    for bad, said in (
        ({"method": "tie"}, "no merges called 'tie'.*did you mean 'ties'"),
        ({"method": ""}, "no method: give --method="),
        ({"method": "ties", "options": ("densty=1",)}, "unknown option 'densty' of method ties.*density"),
        ({"method": "ties", "options": ("density=2",)}, "density=2.0: a share in"),
        ({"method": "iso_cts", "options": ("common=0",)}, "common=0.0: a share in"),
        ({"method": "mean", "mismatched": "skip"}, "mismatched"),
        ({"method": "mean", "statistics": "x"}, "takes none"),
        ({"method": "mean", "rank": -1}, "rank"),
    ):
        with pytest.raises(errors.ConfigError, match=said):
            merge.run(merge.Config(**{"collection": (str(tmp_path / "none"),), "out": str(tmp_path / "out")} | bad))
    with pytest.raises(errors.ConfigError, match="no place for the merged model"):
        collection(tmp_path)
        merge.run(merge.Config(collection=(str(tmp_path / "models"),), method="mean"))


def test_the_command(tmp_path, capsys):
    collection(tmp_path)
    program = importlib.import_module("jaxsub.cli.merge")
    from jaxsub.cli import flags

    assert "merge" in cli.PROGRAMS
    arguments = [f"--collection={tmp_path / 'models'}", "--method=mean", f"--workdir={tmp_path / 'work'}"]
    program.main(flags.Flags("merge", merge.Config, ["merge", *arguments]))
    said = capsys.readouterr()
    assert (
        "3 models merged by mean, 5 layers" in said.out and f"merged model: {tmp_path / 'work' / 'merged'}" in said.out
    )
    assert "to read: " in said.err and "[5/5]" in said.err
    assert os.path.exists(tmp_path / "work" / "merged" / "model.safetensors")


# Many models out of many, and losses of the user's ----------------------------------------------------------------


def test_branched_models_share_within_the_budget(tmp_path):
    models, _ = collection(tmp_path, 4)
    found = run(tmp_path, "branched", options=("budget=1.8",))
    total = sum(v.size for v in models["m0"].values() if v.dtype.kind == "f")
    distinct, new = 0, {m: safetensors.read(tmp_path / "out" / m / "model.safetensors") for m in models}
    for record in found["layers"]:
        name, versions = record["name"], {new[m][record["name"]].tobytes() for m in models}
        assert len(versions) == len(record["groups"])
        distinct += len(versions) * models["m0"][name].size
        for group in record["groups"]:
            mean = np.mean([models[m][name].astype(float) for m in group], axis=0)
            assert all(np.abs(new[m][name] - mean).max() < 1e-6 for m in group)
    assert 1.0 < distinct / total <= 1.8 and found["fit"]["models_worth_of_weights"] == pytest.approx(distinct / total)
    assert "models' worth of weights" in merge_words.table(found)
    assert safetensors.open_metadata(tmp_path / "out" / "m2" / "model.safetensors") == {"epoch": "2"}


def test_branched_adapters(tmp_path):
    x = adapters(tmp_path, missing=False)
    found = run(tmp_path, "branched", options=("budget=2",), peft_layout="exact")
    for record in found["layers"]:
        for group in record["groups"]:
            mean = np.mean([x[record["name"]][int(m[1:])] for m in group], axis=0)
            got = updates(tmp_path / "out" / group[0])[record["name"]]
            s = np.linalg.svd(mean, compute_uv=False)
            lost = np.sqrt(np.sum(s[3:] ** 2))  # cut to the rank of one model
            assert np.linalg.norm(got - mean) == pytest.approx(lost, abs=1e-5 * s[0])


def test_a_loss_by_name(tmp_path, monkeypatch):
    models, base = collection(tmp_path)
    wanted = base["a.weight"] + 0.9 * (models["m1"]["a.weight"] - base["a.weight"])
    np.save(tmp_path / "wanted.npy", wanted)
    (tmp_path / "judge.py").write_text(
        "import numpy as np, jax.numpy as jnp\nwanted = np.load('wanted.npy')\n"
        "def loss(weights):\n    return 1e2 * jnp.mean(jnp.square(weights['a.weight'] - wanted))\n"
    )
    monkeypatch.chdir(tmp_path)
    options = ("steps=400", "rate=0.02")
    more = {"base": str(tmp_path / "base.safetensors"), "loss": "judge:loss", "options": options}
    found = run(tmp_path, "adamerging", **more)
    np.testing.assert_allclose(found["fit"]["coefficients"]["a.weight"], (0, 0.9, 0), atol=0.02)
    new = written(tmp_path)
    assert np.linalg.norm(new["a.weight"] - wanted) < 0.02 * np.linalg.norm(wanted)
    bias = base["a.bias"] + twins.task_arithmetic(stack(models, "a.bias") - base["a.bias"])
    assert np.abs(new["a.bias"] - bias).max() < 1e-6  # of which the loss says nothing
    for bad, said in ((("mean", "judge:loss"), "takes none"), (("concrete", ""), "needs a loss of yours")):
        with pytest.raises(errors.ConfigError, match=said):
            run(tmp_path, bad[0], loss=bad[1], out=str(tmp_path / "bad"), base=more["base"])


@pytest.mark.slow
def test_masks_on_coefficients(fitted, tmp_path, monkeypatch):
    bundle = jaxsub.load(fitted.bundle)
    own = bundle.layer("a.weight", (12, 8))
    mean, basis = np.asarray(own.subspace.mean), np.asarray(own.subspace.basis)
    wanted = (mean + 0.5 * own.values[2, 1] * basis[1]).reshape(12, 8)
    np.save(tmp_path / "wanted.npy", wanted)
    (tmp_path / "judge2.py").write_text(
        "import numpy as np, jax.numpy as jnp\nwanted = np.load('wanted.npy')\n"
        "def loss(weights):\n    return 1e3 * jnp.mean(jnp.square(weights['a.weight'] - wanted))\n"
    )
    monkeypatch.chdir(tmp_path)
    options = ("steps=300", "rate=0.05", "inner=layer")
    more = {"bundle": fitted.bundle, "loss": "judge2:loss", "base": str(fitted.folder / "base.safetensors")}
    found = run(fitted.folder, "concrete", **more, options=options, out=str(tmp_path / "out"))
    assert found["fit"]["losses"][-1] < found["fit"]["losses"][0]
    record = next(r for r in found["layers"] if r["name"] == "a.weight")
    assert record["row"] == "coefficients of differences to the base"


def test_what_is_not_as_a_user_may_think_is_said(tmp_path):
    """Results in the dtype of one model among several, and a base that updates are not less of."""
    rng = np.random.default_rng(0)
    for n in range(3):
        weight = rng.standard_normal((5, 4)).astype(np.float16 if n == 0 else np.float32)
        safetensors.write(str(tmp_path / f"m{n}.safetensors"), {"w": weight})
        a, b = (rng.standard_normal(s).astype(np.float32) for s in ((2, 4), (5, 2)))
        peft.write(str(tmp_path / "l" / f"a{n}"), {"q": (a, b, 2, 2)})
    files = tuple(str(tmp_path / f"m{n}.safetensors") for n in range(3))
    text = merge.run(merge.Config(collection=files, method="mean", dry_run=True))["text"]
    assert "1 of 1 layers are stored as float16 and float32; results are written as those of m0 are" in " ".join(
        text.split()
    )
    adapters = merge.Config(collection=(str(tmp_path / "l"),), method="mean", base=files[1], dry_run=True)
    assert "base: not used, as low-rank updates are differences already" in merge.run(adapters)["text"]
