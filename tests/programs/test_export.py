"""Adapters written from bundles: PEFT loads them, and its updates are those that jaxsub rebuilds."""

import json
import os
import types

import numpy as np
import pytest

import jaxsub
from jaxsub import errors, formats
from jaxsub.bundle import export
from jaxsub.formats import peft, safetensors
from jaxsub.pipelines import project
from tests.programs import adapters

WEIGHTS = "adapter_model.safetensors"

LINEAR = pytest.param("linear", marks=pytest.mark.slow)
GPT2 = pytest.param("gpt2", marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Function (family, rank) -> collection, bundle folder and rebuilt updates, made once each; rank 0 keeps all."""
    torch, library = pytest.importorskip("torch"), pytest.importorskip("peft")
    pytest.importorskip("transformers")
    known, collections = {}, {}

    def make(family, rank=0):
        if (family, rank) not in known:
            folder = tmp_path_factory.mktemp(family)
            if family not in collections:
                collections[family] = folder, adapters.collection(folder / "m", family, torch, library)
            source, originals = collections[family]
            jaxsub.fit(str(source / "m"), folder / "b", rank=rank, energy=1.0)
            bundle = jaxsub.load(folder / "b")
            rebuilt = bundle.reconstruct(bundle.coefficients())
            rebuilt = {m: {k: w[n] for k, w in rebuilt.items()} for n, m in enumerate(bundle.model_ids)}
            known[family, rank] = types.SimpleNamespace(
                models=str(source / "m"), bundle=str(folder / "b"), originals=originals, rebuilt=rebuilt
            )
        return known[family, rank]

    return types.SimpleNamespace(of=make, torch=torch, library=library)


def agree(folder, family, made, rank=0):
    """Checks every member's folder against what jaxsub rebuilds, and where that is all, against the originals."""
    one = made.of(family, rank)
    assert one.rebuilt.keys() == one.originals.keys() == adapters.RULES.keys()
    for name, rebuilt in one.rebuilt.items():
        model = adapters.load(os.path.join(folder, name), family, made.torch, made.library)
        found = adapters.deltas(model)
        assert found.keys() == rebuilt.keys() == one.originals[name].keys()
        for layer, delta in found.items():
            assert adapters.relative(delta, rebuilt[layer]) < 1e-5, (name, layer)
            assert rank or adapters.relative(delta, one.originals[name][layer]) < 1e-5, (name, layer)
        before = {k: model.base_model.model.get_submodule(k).base_layer.weight.detach().clone() for k in found}
        merged = model.merge_and_unload()
        for layer in found:
            change = (merged.get_submodule(layer).weight.detach() - before[layer]).numpy()
            assert adapters.relative(change, rebuilt[layer]) < 1e-5, (name, layer)


@pytest.mark.parametrize("family", [LINEAR, GPT2])
@pytest.mark.parametrize("layout", ["exact", "portable"])
def test_peft_loads_what_project_writes(made, tmp_path, family, layout):
    one = made.of(family)
    config = project.Config(
        bundle=one.bundle, collection=(one.models,), write_models=str(tmp_path / "new"), peft_layout=layout
    )
    found = project.run(config)
    agree(tmp_path / "new", family, made)
    for name in one.rebuilt:
        problems = peft.served_problems(tmp_path / "new" / name)
        # Adapters keep their own ranks, and layers of one those that its pattern gives them.
        assert bool(problems) == (layout == "exact" and "rank_pattern" in adapters.RULES[name]), (name, problems)
    if layout == "portable":
        assert [w["model"] for w in found["written"]] == list(one.rebuilt) and {w["r"] for w in found["written"]} == {8}


@pytest.mark.parametrize("family", [LINEAR, GPT2])
def test_members_need_no_originals(made, tmp_path, family):
    one = made.of(family)
    config = project.Config(bundle=one.bundle, members=True, write_models=str(tmp_path / "new"))
    found = project.run(config)
    agree(tmp_path / "new", family, made)
    assert [w["model"] for w in found["written"]] == found["models"] == list(one.rebuilt)
    for written in found["written"]:
        assert peft.served_problems(written["folder"]) == []


@pytest.mark.parametrize("family", [LINEAR, GPT2])
@pytest.mark.parametrize("tied", [True, False])
def test_peft_loads_subspaces_as_tinylora(made, tmp_path, family, tied):
    modules = None if tied else [n for n, _ in adapters.BASES[family][0](made.torch).named_modules()]
    bundle = jaxsub.load(made.of(family, 4).bundle)
    found = bundle.export(tmp_path / "new", layout="tinylora", modules=modules)
    agree(tmp_path / "new", family, made, 4)
    count = len(bundle.layers)
    for one in found:
        names = [n for n in safetensors.read(os.path.join(one["folder"], WEIGHTS)) if "tinylora_v" in n]
        assert (one["r"], one["u"], len(names)) == (4, 5, 1 if tied else count)


@pytest.mark.parametrize("family", [LINEAR])
def test_members_share_a_subspace_and_peft_switches_between_them(made, tmp_path, family):
    one = made.of(family, 4)
    config = {"members": True, "write_models": str(tmp_path / "new"), "peft_layout": "tinylora_shared"}
    project.run(project.Config(bundle=one.bundle, **config))
    assert sorted(os.listdir(tmp_path / "new")) == ["members", "shared"]
    model = adapters.load(tmp_path / "new" / "shared", family, made.torch, made.library)
    assert not any(delta.any() for delta in adapters.deltas(model).values())
    for name, rebuilt in one.rebuilt.items():
        vector = safetensors.read(tmp_path / "new" / "members" / f"{name}.safetensors")
        assert [a.size for a in vector.values()] == [5]
        vector = {key: made.torch.from_numpy(array) for key, array in vector.items()}
        with pytest.warns(UserWarning, match="tinylora_P"):  # PEFT says that it would make P again, and keeps it
            made.library.set_peft_model_state_dict(model, vector)
        for layer, delta in adapters.deltas(model).items():
            assert adapters.relative(delta, rebuilt[layer]) < 1e-5
        export.join(tmp_path / "new", name, tmp_path / "joined" / name)
    agree(tmp_path / "joined", family, made, 4)


# Without PEFT


def collection(folder, *, count=5, head=False, conv=False, transposed=False):
    rng = np.random.default_rng(0)
    for n in range(count):
        a, b = rng.standard_normal((2, 7)).astype(np.float32), rng.standard_normal((9, 2)).astype(np.float32)
        pairs = {"m.0.q": (a, b, 6.0, 2), "m.1.q": (2 * a, b[::-1], 3.0, 2)}
        if conv:
            pairs["c"] = (a.reshape(2, 7, 1, 1), b.reshape(9, 2, 1, 1), 1.0, 2)
        place = folder / "sub" / f"a{n}"
        peft.write(place, pairs, base_model="org/base")
        config = json.loads((place / peft.CONFIG).read_text()) | {"task_type": "CAUSAL_LM"}
        if transposed and n:
            config["fan_in_fan_out"] = True
        if head:
            tensors = safetensors.read(place / "adapter_model.safetensors")
            tensors["base_model.model.head.weight"] = np.full((2, 3), n, np.float32)
            safetensors.write(place / "adapter_model.safetensors", tensors)
            config["modules_to_save"] = ["head"]
        (place / peft.CONFIG).write_text(json.dumps(config))
        (place / "README.md").write_text("words")
    return str(folder)


def deltas(folder):
    model, found = formats.open_model(folder), {}
    for layer, pair in model.adapters.items():
        a, b = (formats.read(model, t).astype(np.float64) for t in (pair.a, pair.b))
        found[layer] = pair.scale * b @ a
    return found


@pytest.mark.slow
@pytest.mark.parametrize("rank", [3, 7])
def test_members_are_what_reconstruct_gives(tmp_path, rank):
    bundle = jaxsub.fit(collection(tmp_path / "m"), rank=rank)
    written = bundle.export(tmp_path / "new", ["sub/a3", "sub/a1"])
    assert [w["model"] for w in written] == ["sub/a3", "sub/a1"]
    assert [w["folder"] for w in written] == [str(tmp_path / "new" / "sub" / n) for n in ("a3", "a1")]
    assert sorted(os.listdir(tmp_path / "new" / "sub")) == ["a1", "a3"]
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".tmp")]
    rebuilt = bundle.reconstruct(bundle.coefficients(["sub/a3", "sub/a1"]))
    for n, one in enumerate(written):
        for layer, delta in deltas(one["folder"]).items():
            assert adapters.relative(delta, rebuilt[layer][n]) < 1e-6
        config = json.loads((tmp_path / "new" / one["model"] / peft.CONFIG).read_text())
        assert (config["base_model_name_or_path"], config["task_type"]) == ("org/base", "CAUSAL_LM")
        assert config["target_modules"] == ["m.0.q", "m.1.q"] and config["r"] == 8


@pytest.mark.slow
def test_saved_modules_are_named_and_kept_beside(tmp_path, capsys):
    from jaxsub.cli import flags, project as program

    folder = collection(tmp_path / "m", head=True)
    jaxsub.fit(folder, tmp_path / "b", rank=3, exclude_layers=["head"])
    for more in ([f"--collection={folder}"], ["--members"]):
        target = tmp_path / f"new{len(os.listdir(tmp_path))}"
        arguments = ["project", f"--bundle={tmp_path / 'b'}", *more, f"--write_models={target}"]
        program.main(flags.Flags("project", program.config_class(), [*arguments, "--peft_layout=portable"]))
        shown = capsys.readouterr().out
        beside = target / "sub" / "a4" / "other_tensors.safetensors"
        assert f"{target}/sub/a0/other_tensors.safetensors" in shown and "5 adapters of rank 8" in shown
        np.testing.assert_array_equal(safetensors.read(beside)["base_model.model.head.weight"], np.full((2, 3), 4))
        assert peft.served_problems(target / "sub" / "a4") == []
        assert (target / "sub" / "a4" / "README.md").exists() == (more != ["--members"])


@pytest.mark.slow
def test_updates_that_were_not_fitted_keep_their_own_scale(tmp_path):
    folder = collection(tmp_path / "m")
    jaxsub.fit(folder, tmp_path / "b", rank=3, layers=["m.0.q"])
    config = {"bundle": str(tmp_path / "b"), "peft_layout": "portable"}
    project.run(project.Config(**config, collection=(folder,), write_models=str(tmp_path / "new")))
    old, new = (deltas(tmp_path / f / "sub" / "a2")["m.1.q"] for f in ("m", "new"))
    assert adapters.relative(new, old) < 1e-6
    with pytest.raises(errors.ConfigError, match="its scale is not in the bundle"):
        project.run(project.Config(**config, members=True, write_models=str(tmp_path / "other")))
    assert not os.path.exists(tmp_path / "other")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"members": True}, "--members"),
        ({"collection": ()}, "--members"),
        ({"collection": (), "members": True, "write_models": ""}, "--write_models"),
        ({"peft_layout": "portable", "write_models": ""}, "--write_models"),
        ({"peft_layout": "portble"}, "did you mean 'portable'"),
        ({"collection": (), "members": True, "peft_layout": "exact"}, "peft_layout"),
    ],
)
def test_options_that_do_not_go_together(tmp_path, change, words):
    known = {"bundle": "b", "collection": ("m",), "write_models": str(tmp_path / "new")}
    with pytest.raises(errors.ConfigError, match=words):
        project.run(project.Config(**(known | change)))


@pytest.mark.slow
def test_members_that_were_no_adapters_are_refused(tmp_path):
    os.makedirs(tmp_path / "m")
    for n in range(4):
        safetensors.write(tmp_path / "m" / f"{n}.safetensors", {"w": np.full((3, 2), n**2, np.float32)})
    bundle = jaxsub.fit(str(tmp_path / "m"), rank=1)
    with pytest.raises(errors.ConfigError, match="model of format safetensors"):
        bundle.export(tmp_path / "new")
    config = {"collection": (str(tmp_path / "m"),), "write_models": str(tmp_path / "new"), "peft_layout": "portable"}
    bundle.save(tmp_path / "b")
    with pytest.raises(errors.ConfigError, match="is one of PEFT folders, not of safetensors"):
        project.run(project.Config(bundle=str(tmp_path / "b"), **config))
    assert not os.path.exists(tmp_path / "new")


@pytest.mark.slow
def test_layers_that_export_cannot_orient_are_refused(tmp_path):
    rng = np.random.default_rng(0)
    for n in range(4):  # square, so that both orientations are one layer
        a, b = rng.standard_normal((1, 6)).astype(np.float32), rng.standard_normal((6, 1)).astype(np.float32)
        peft.write(tmp_path / "m" / f"{n}", {"q": (a, b, 1.0, 1)})
        path = tmp_path / "m" / f"{n}" / peft.CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | {"fan_in_fan_out": n == 0}))
    bundle = jaxsub.fit(str(tmp_path / "m"), rank=2)
    assert bundle.layers[0].orientation == ""
    with pytest.raises(errors.ConfigError, match="does not say how PEFT stores its factors"):
        bundle.export(tmp_path / "new")
    with pytest.raises(errors.ConfigError, match="did you mean '3'"):
        bundle.export(tmp_path / "new", ["33"])
    factors = jaxsub.fit(str(tmp_path / "m"), rank=1, view="lora_factors")
    with pytest.raises(errors.ConfigError, match="A and B apart"):
        factors.export(tmp_path / "new")


@pytest.mark.slow
def test_a_folder_that_exists_is_left_alone_and_a_failed_export_leaves_nothing(tmp_path, monkeypatch):
    bundle = jaxsub.fit(collection(tmp_path / "m"), rank=3)
    os.makedirs(tmp_path / "new")
    with pytest.raises(errors.WorkdirError, match="exists already"):
        bundle.export(tmp_path / "new")
    calls = []

    def fails(*arguments, **named):
        calls.append(1)
        if len(calls) == 3:
            raise errors.ConfigError("third")
        return write(*arguments, **named)

    write = peft.write_portable
    monkeypatch.setattr(export.peft, "write_portable", fails)
    with pytest.raises(errors.ConfigError, match="third"):
        bundle.export(tmp_path / "other")
    assert sorted(os.listdir(tmp_path)) == ["m", "new"]


def test_what_members_share_is_written_once(tmp_path):
    bundle = jaxsub.fit(collection(tmp_path / "m", head=True), rank=3, exclude_layers=["head"])
    whole = bundle.export(tmp_path / "whole", layout="tinylora")
    written = bundle.export(tmp_path / "new", layout="tinylora_shared")
    for one in whole:
        export.join(tmp_path / "new", one["model"], tmp_path / "joined" / one["model"])
        for name in (WEIGHTS, peft.CONFIG):
            joined = tmp_path / "joined" / one["model"] / name
            assert joined.read_bytes() == (tmp_path / "whole" / one["model"] / name).read_bytes()
    assert written[2]["other_tensors"] == str(tmp_path / "new" / "other_tensors" / "sub" / "a2.safetensors")
    assert os.path.exists(written[2]["other_tensors"])
    export.join(tmp_path / "new", "sub/a2", tmp_path / "one")
    with pytest.raises(errors.WorkdirError, match="exists already"):
        export.join(tmp_path / "new", "sub/a2", tmp_path / "one")
    with pytest.raises(errors.InputError, match="a9"):
        export.join(tmp_path / "new", "sub/a9", tmp_path / "two")
    path = tmp_path / "new" / "members" / "sub" / "a2.safetensors"
    safetensors.write(path, {"base_model.tinylora_v.0": np.zeros(3, np.float32)})
    with pytest.raises(errors.InputError, match="does not fit what is shared"):
        export.join(tmp_path / "new", "sub/a2", tmp_path / "two")
