"""The zoo pipeline: every world by name, determinism, reuse, refusal, restart; and the truth found by the analysis."""

import json
import os

import pytest

from jaxsub import errors, plugins
from jaxsub.pipelines import zoo
from tests.folders import contents

SMALL = {
    "copies": {"num_distinct": 24, "num_originals": 4, "num_copies": 4},
    "lora": {"num_models": 3, "steps": 4, "base_steps": 4},
    "noise": {"num_models": 4},
    "planted": {"num_models": 4},
    "shared_base": {"num_models": 4},
    "shared_init": {"scale": 0.02, "rank": 2},
    "two_parents": {"first": 3, "second": 2},
    "two_parents_shared": {"first": 3, "second": 2},
}
SMALL |= {
    f"{start}_start_{task}_task": {"num_models": 3, "steps": 4}
    for start in ("same", "own")
    for task in ("same", "split")
}
SMALL |= {
    f"{name}_variants": {"num_tasks": 2, "models_per_task": 2, "steps": 2, "base_steps": 2} for name in ("vit", "cnn")
}
VERDICTS = {"shared", "chance", "common_mean", "lineage", "lineage+shared", "undetermined"}


# Trained anew twice, in seconds each.
TRAINED = (
    "cnn_variants", "lora", "vit_variants", "same_start_same_task", "own_start_same_task", "own_start_split_task",
    "same_start_split_task",
)  # fmt: skip


@pytest.mark.parametrize(
    "world", [pytest.param(w, marks=pytest.mark.slow if w in TRAINED else ()) for w in plugins.available("worlds")]
)
def test_every_world_is_made_the_same_twice_and_says_its_truth(tmp_path, world):
    models = zoo.make(world, tmp_path / "a", seed=5, **SMALL[world])
    zoo.make(world, tmp_path / "b", seed=5, **SMALL[world])
    assert models == str(tmp_path / "a" / world / "models")
    first, second = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert first == second
    record = json.loads(first[os.path.join(world, "zoo.json")])
    assert record["truth"]["verdict"] in VERDICTS
    assert record["num_models"] == len(os.listdir(models)) == len(json.loads(first[f"{world}/labels.json"]))
    assert not [name for name in os.listdir(tmp_path / "a") if name.startswith(".tmp")]
    other = contents(os.path.dirname(zoo.make(world, tmp_path / "c", seed=6, **SMALL[world])))
    weights = [k for k in other if k.startswith("models") and k.endswith(".safetensors")]
    assert all(other[k] != first[os.path.join(world, k)] for k in weights)


def test_a_world_that_is_there_is_used_again(tmp_path):
    models = zoo.make("noise", tmp_path, num_models=4)
    before = {name: os.stat(os.path.join(models, name)).st_mtime_ns for name in os.listdir(models)}
    (tmp_path / "noise" / "report.json").write_text("{}")  # an analysis may write beside it
    assert zoo.make("noise", tmp_path, num_models=4) == models
    assert {name: os.stat(os.path.join(models, name)).st_mtime_ns for name in os.listdir(models)} == before


@pytest.mark.parametrize(
    ("values", "named"), [({"seed": 1}, "seed was 0, is 1"), ({"num_models": 5}, "num_models was 4")]
)
def test_another_world_is_refused_by_name_and_kept(tmp_path, values, named):
    zoo.make("noise", tmp_path, num_models=4)
    before = contents(tmp_path)
    with pytest.raises(errors.WorkdirError, match=named):
        zoo.make("noise", tmp_path, **{"num_models": 4, **values})
    assert contents(tmp_path) == before


def test_a_folder_of_something_else_is_refused_and_kept(tmp_path):
    (tmp_path / "noise").mkdir()
    (tmp_path / "noise" / "thesis.txt").write_text("mine")
    with pytest.raises(errors.WorkdirError, match="holds no whole world"):
        zoo.make("noise", tmp_path, num_models=4)
    assert contents(tmp_path) == {"noise/thesis.txt": b"mine"}


def test_a_removed_model_is_noticed(tmp_path):
    models = zoo.make("noise", tmp_path, num_models=4)
    os.unlink(os.path.join(models, "002.safetensors"))
    with pytest.raises(errors.WorkdirError, match="added or removed"):
        zoo.make("noise", tmp_path, num_models=4)


def test_restart_replaces_the_world_and_nothing_else(tmp_path):
    zoo.make("noise", tmp_path / "a", num_models=6)
    (tmp_path / "a" / "noise" / "notes.txt").write_text("mine")
    zoo.make("noise", tmp_path / "a", seed=1, restart=True, num_models=4)
    zoo.make("noise", tmp_path / "b", seed=1, num_models=4)
    found = contents(tmp_path / "a")
    assert found.pop("noise/notes.txt") == b"mine"
    assert found == contents(tmp_path / "b")


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    from jaxsub.worlds import noise

    def fail(options, seed, folder):
        os.mkdir(os.path.join(folder, "models"))
        raise KeyboardInterrupt

    monkeypatch.setattr(noise, "make", fail)
    with pytest.raises(KeyboardInterrupt):
        zoo.make("noise", tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("world", "options", "named"),
    [
        ("nois", (), "did you mean 'noise'"),
        ("noise", ("num_model=3",), "did you mean 'num_models'"),
        ("noise", ("num_models",), "name=value"),
        ("noise", ("num_models=many",), "num_models"),
        ("noise", ("num_models=3", "num_models=4"), "twice"),
        ("noise", ("num_models=0",), "num_models"),
        ("planted", ("signal=nan",), "signal"),
    ],
)
def test_wrong_options_are_named_before_anything_is_written(tmp_path, world, options, named):
    with pytest.raises(errors.ConfigError, match=named):
        zoo.run(zoo.Config(world=world, options=options), tmp_path)
    assert os.listdir(tmp_path) == []


def test_negative_seed_is_refused(tmp_path):
    with pytest.raises(errors.ConfigError, match="seed"):
        zoo.run(zoo.Config(world="noise", seed=-1), tmp_path)


def test_an_unwritable_workdir_is_a_resource_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.ResourceError, match="cannot be written"):
        zoo.make("noise", tmp_path / "file" / "below", num_models=3)


def test_worlds_are_listed_with_a_sentence():
    assert set(zoo.worlds()) == set(SMALL)
    assert all(text.endswith(".") and len(text) < 120 for text in zoo.worlds().values())


@pytest.mark.slow
@pytest.mark.parametrize("world", [w for w in plugins.available("worlds") if w != "shared_init"])
def test_the_analysis_finds_the_truth(tmp_path, world):
    import jaxsub

    report = jaxsub.analyze(jaxsub.open_collection(zoo.make(world, tmp_path)))
    truth, collection = plugins.load("worlds", world).TRUTH, report.data["collection"]
    layers = {layer["name"]: layer for layer in report.layers}
    for name in truth["layers"]:
        assert layers[name]["verdict"] == truth["verdict"], layers[name]["why"]
        assert set(truth["flags"]) <= set(layers[name]["flags"])
    if "lineages" in truth:
        assert [len(group) for group in collection["lineages"]] == truth["lineages"]
    assert collection["num_models"] - collection["num_distinct"] == truth.get("duplicates", 0)
    if "near_duplicates" in truth:
        assert len(collection["near_duplicates"]) == truth["near_duplicates"]
