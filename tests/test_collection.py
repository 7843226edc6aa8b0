"""Which models and layers a collection has, who is set aside and why."""

import os
import time

import numpy as np
import pytest

from jaxsub import collection, errors
from jaxsub.formats import safetensors

SHAPES = {"a.weight": (4, 3), "b.weight": (2,)}


def write(path, shapes=SHAPES, dtype=np.float32):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    safetensors.write(path, {name: np.ones(shape, dtype) for name, shape in shapes.items()})


def folder(root, count, **exceptions):
    """`count` models m00, m01, ...; an exception replaces a model's shapes, or leaves the file out if None."""
    for i in range(count):
        name = f"m{i:02}"
        shapes = exceptions.get(name, SHAPES)
        if shapes is not None:
            write(root / f"{name}.safetensors", shapes)
    return root


def ids(opened):
    return [ref.id for ref in opened.refs]


# Finding models


def test_ids_are_relative_paths_without_ending_sorted_by_bytes(tmp_path):
    for name in ("b/x.safetensors", "a/run/model.safetensors", "Z.safetensors", "b/x.y.safetensors"):
        write(tmp_path / name)
    assert ids(collection.open_collection(str(tmp_path))) == ["Z", "a/run", "b/x", "b/x.y"]


def test_hidden_names_caches_and_other_files_are_no_models(tmp_path):
    folder(tmp_path, 3)
    for name in (".git/m.safetensors", ".tmp-1/m.safetensors", "__pycache__/m.safetensors", ".m.safetensors"):
        write(tmp_path / name)
    (tmp_path / "README.md").write_text("about")
    opened = collection.open_collection(str(tmp_path))
    assert ids(opened) == ["m00", "m01", "m02"]
    assert [os.path.basename(p) for p in opened.ignored] == ["README.md"]


def test_glob_list_and_folder_find_the_same_models(tmp_path):
    folder(tmp_path / "models", 4)
    listed = tmp_path / "models" / "paths.txt"
    listed.write_text("# chosen\nm02.safetensors\n\nm00.safetensors\nm03.safetensors\nm01.safetensors\n")
    everything = collection.open_collection(str(tmp_path / "models"))
    for paths in (str(tmp_path / "models" / "*.safetensors"), str(listed), [str(tmp_path / "models"), str(listed)]):
        other = collection.open_collection(paths)
        assert ids(other) == ids(everything) == ["m00", "m01", "m02", "m03"]
        assert other.fingerprint == everything.fingerprint


def test_equal_names_in_two_roots_stay_two_models(tmp_path):
    folder(tmp_path / "one", 2)
    folder(tmp_path / "two", 2)
    opened = collection.open_collection([str(tmp_path / "one"), str(tmp_path / "two")])
    assert ids(opened) == ["one/m00", "one/m01", "two/m00", "two/m01"]


def test_equal_names_with_two_endings_keep_them(tmp_path):
    folder(tmp_path, 3)
    np.savez(tmp_path / "m00.npz", **{n: np.ones(s, np.float32) for n, s in SHAPES.items()})
    opened = collection.open_collection(str(tmp_path))
    assert ids(opened) == ["m00.npz", "m00.safetensors", "m01", "m02"]


def test_folder_without_model_among_model_folders_is_set_aside(tmp_path):
    for i in range(5):
        write(tmp_path / f"m{i}" / "model.safetensors")
    (tmp_path / "m5").mkdir()
    opened = collection.open_collection(str(tmp_path))
    assert len(opened.refs) == 5 and opened.num_candidates == 6
    assert [(q["id"], q["rule"]) for q in opened.quarantined] == [("m5", "H12")]


def test_logs_beside_the_weights_of_each_run_are_no_models(tmp_path):
    for i in range(5):
        write(tmp_path / f"run{i}" / "weights" / "model.safetensors")
        (tmp_path / f"run{i}" / "logs").mkdir()
    opened = collection.open_collection(str(tmp_path))
    assert len(opened.refs) == 5 and not opened.quarantined
    assert ids(opened)[0] == "run0/weights"


def test_link_out_of_the_collection_needs_allow_root(tmp_path):
    folder(tmp_path / "models", 3)
    folder(tmp_path / "elsewhere", 1)
    (tmp_path / "models" / "more").symlink_to(tmp_path / "elsewhere")
    opened = collection.open_collection(str(tmp_path / "models"))
    assert [(q["id"], q["rule"]) for q in opened.quarantined] == [("more", "H10")]
    allowed = collection.open_collection(str(tmp_path / "models"), allow_roots=(str(tmp_path / "elsewhere"),))
    assert ids(allowed) == ["m00", "m01", "m02", "more/m00"]


def test_link_loop_ends(tmp_path):
    folder(tmp_path, 3)
    (tmp_path / "self").symlink_to(tmp_path)
    assert ids(collection.open_collection(str(tmp_path))) == ["m00", "m01", "m02"]


@pytest.mark.parametrize("path", ["nowhere", "no*thing"])
def test_path_that_leads_nowhere_is_named(tmp_path, path):
    with pytest.raises(errors.InputError, match=path.replace("*", r"\*")):
        collection.open_collection(str(tmp_path / path))


# Layers


def test_layers_are_sorted_with_numbers_as_numbers(tmp_path):
    shapes = {f"layers.{i}.w": (2, 2) for i in (10, 9, 1)} | {"layers.1.a": (3,)}
    for i in range(3):
        write(tmp_path / f"{i}.safetensors", shapes)
    opened = collection.open_collection(str(tmp_path))
    assert [g.name for g in opened.groups] == ["layers.1.a", "layers.1.w", "layers.9.w", "layers.10.w"]
    assert all(g.members == (0, 1, 2) and g.dtypes == ("float32",) for g in opened.groups)


@pytest.mark.slow
def test_one_layer_in_three_widths_is_three_groups(tmp_path):
    widths = [(155, 32), (116, 64), (42, 16)]
    member = 0
    for count, width in widths:
        for _ in range(count):
            write(tmp_path / f"{member:03}.safetensors", {"w": (width, 2), "head": (5,)})
            member += 1
    opened = collection.open_collection(str(tmp_path))
    found = {g.shape: len(g.members) for g in opened.groups if g.name == "w"}
    assert found == {(32, 2): 155, (64, 2): 116, (16, 2): 42}
    assert [len(g.members) for g in opened.groups if g.name == "head"] == [313]
    assert not opened.quarantined


def test_layer_of_two_models_is_listed_and_skipped(tmp_path):
    more = SHAPES | {"extra": (7,)}
    opened = collection.open_collection(str(folder(tmp_path, 8, m03=more, m05=more)))
    assert opened.skipped_layers == (
        {"name": "extra", "shape": [7], "num_models": 2, "reason": "fewer than 3 models have it in this shape"},
    )
    assert len(opened.refs) == 8 and not opened.quarantined


def test_integers_in_all_models_are_no_weights(tmp_path):
    for i in range(3):
        values = {"w": np.ones(3, np.float32), "ids": np.ones(4, np.int64), "empty": np.ones((0, 2), np.float32)}
        safetensors.write(tmp_path / f"{i}.safetensors", values)
    opened = collection.open_collection(str(tmp_path))
    assert [g.name for g in opened.groups] == ["w"]
    assert {s["name"]: s["reason"] for s in opened.skipped_layers} == {
        "ids": "not a weight: int64",
        "empty": "has no entries",
    }


def test_patterns_choose_layers(tmp_path):
    folder(tmp_path, 3)
    assert [g.name for g in collection.open_collection(str(tmp_path), layers="^a").groups] == ["a.weight"]
    assert [g.name for g in collection.open_collection(str(tmp_path), exclude_layers=["a"]).groups] == ["b.weight"]
    with pytest.raises(errors.ConfigError, match=r"none of the 2 layers: a\.weight"):
        collection.open_collection(str(tmp_path), layers=("zzz",))
    with pytest.raises(errors.ConfigError, match="regular expression"):
        collection.open_collection(str(tmp_path), layers=("(",))


# Models that do not fit

ODD = {
    "lacks": ({"a.weight": (4, 3)}, "b.weight", "is missing; the 5 others have it with shape [2]"),
    "transposed": (
        {"a.weight": (3, 4), "b.weight": (2,)},
        "a.weight",
        "has shape [3, 4], the 5 others have shape [4, 3]",
    ),
}


@pytest.mark.parametrize("kind", sorted(ODD))
def test_one_odd_model_is_set_aside_with_layer_and_both_shapes(tmp_path, kind):
    shapes, layer, reason = ODD[kind]
    opened = collection.open_collection(str(folder(tmp_path, 6, m03=shapes)))
    (record,) = opened.quarantined
    assert (record["id"], record["layer"]) == ("m03", layer) and reason in record["reason"]
    assert ids(opened) == ["m00", "m01", "m02", "m04", "m05"]
    assert {g.name: g.members for g in opened.groups} == {"a.weight": (0, 1, 2, 3, 4), "b.weight": (0, 1, 2, 3, 4)}


def test_integer_weights_in_one_model_set_it_aside(tmp_path):
    folder(tmp_path, 6)
    write(tmp_path / "m02.safetensors", dtype=np.int64)
    (record,) = collection.open_collection(str(tmp_path)).quarantined
    assert record["id"] == "m02" and "int64" in record["reason"]


def test_model_that_shares_no_layer_is_set_aside(tmp_path):
    (record,) = collection.open_collection(str(folder(tmp_path, 6, m04={"z": (9,)}))).quarantined
    assert record["id"] == "m04" and "shares no layer" in record["reason"]


def test_deviation_outside_the_chosen_layers_is_no_fault(tmp_path):
    folder(tmp_path, 6, m03=ODD["transposed"][0])
    opened = collection.open_collection(str(tmp_path), exclude_layers="a.weight")
    assert len(opened.refs) == 6 and not opened.quarantined


def test_three_that_deviate_alike_are_a_group_and_two_are_odd(tmp_path):
    other = {"a.weight": (8, 3), "b.weight": (2,)}
    folder(tmp_path / "three", 60, m01=other, m02=other, m03=other)
    three = collection.open_collection(str(tmp_path / "three"))
    assert {g.shape: len(g.members) for g in three.groups if g.name == "a.weight"} == {(4, 3): 57, (8, 3): 3}
    folder(tmp_path / "two", 60, m01=other, m02=other)
    assert [q["id"] for q in collection.open_collection(str(tmp_path / "two")).quarantined] == ["m01", "m02"]


def test_more_odd_models_than_the_limit_are_a_design(tmp_path):
    wide, narrow = {"a.weight": (8, 3), "b.weight": (2,)}, {"a.weight": (1, 3), "b.weight": (2,)}
    opened = collection.open_collection(str(folder(tmp_path, 20, m01=wide, m02=narrow)))
    assert len(opened.refs) == 20 and not opened.quarantined
    assert {g.name: len(g.members) for g in opened.groups} == {"a.weight": 18, "b.weight": 20}


# Limits


def damage(root, *names):
    for name in names:
        (root / f"{name}.safetensors").write_bytes(b"\x00" * 4)


def test_damaged_model_is_listed_and_the_rest_equals_a_collection_without_it(tmp_path):
    damage(folder(tmp_path, 6), "m02")
    opened = collection.open_collection(str(tmp_path))
    assert [q["id"] for q in opened.quarantined] == ["m02"]
    os.remove(tmp_path / "m02.safetensors")
    without = collection.open_collection(str(tmp_path))
    assert (opened.refs, opened.groups, opened.fingerprint) == (without.refs, without.groups, without.fingerprint)


@pytest.mark.parametrize(("count", "bad", "fits"), [(39, 1, True), (39, 2, False), (40, 2, True), (40, 3, False)])
def test_five_percent_may_be_set_aside(tmp_path, count, bad, fits):
    damage(folder(tmp_path, count), *[f"m{i:02}" for i in range(bad)])
    if fits:
        assert len(collection.open_collection(str(tmp_path)).quarantined) == bad
    else:
        with pytest.raises(errors.InputError, match=f"--max_quarantined={bad}") as caught:
            collection.open_collection(str(tmp_path))
        assert all(f"m{i:02}" in str(caught.value) for i in range(bad))
        assert len(collection.open_collection(str(tmp_path), max_quarantined=bad).quarantined) == bad


def test_strict_takes_no_damaged_model(tmp_path):
    damage(folder(tmp_path, 6), "m02")
    with pytest.raises(errors.InputError, match="none may be"):
        collection.open_collection(str(tmp_path), strict=True)


def test_long_lists_of_damage_are_cut(tmp_path):
    damage(folder(tmp_path, 30), *[f"m{i:02}" for i in range(25)])
    with pytest.raises(errors.InputError, match="and 5 more") as caught:
        collection.open_collection(str(tmp_path))
    assert len(str(caught.value).splitlines()) == 22


def test_two_models_are_too_few(tmp_path):
    with pytest.raises(errors.InputError, match="2 readable models, at least 3"):
        collection.open_collection(str(folder(tmp_path, 2)))
    assert len(collection.open_collection(str(tmp_path), check=False).refs) == 2


def test_hostile_id_is_kept_as_data_and_escaped_in_messages(tmp_path):
    folder(tmp_path, 4)
    hostile = "\x1b[2J<script>"
    damage(tmp_path, hostile)
    opened = collection.open_collection(str(tmp_path))
    assert opened.quarantined[0]["id"] == hostile
    with pytest.raises(errors.InputError) as caught:
        collection.open_collection(str(tmp_path), strict=True)
    assert "\x1b" not in str(caught.value)


# Run-numbered names


def keras_like(first, run):
    """Names of a model that was built after `first` other dense layers: the first of a session has no number."""

    def dense(i):
        return "dense" if first + i == 0 else f"dense_{first + i}"

    names = [f"{dense(i)}/{dense(i)}_{run}/kernel" if run else f"{dense(i)}/{dense(i)}/kernel" for i in range(12)]
    return {name: (i + 2, 3) for i, name in enumerate(names)}


def test_run_numbered_layers_match_by_place_only_when_asked(tmp_path):
    for i, (first, run) in enumerate([(0, 0), (12, 3), (24, 11), (31, 7)]):
        write(tmp_path / f"{i}.safetensors", keras_like(first, run))
    with pytest.raises(errors.InputError, match="--match=order"):
        collection.open_collection(str(tmp_path))
    opened = collection.open_collection(str(tmp_path), match="order")
    assert [(g.shape[0], g.members) for g in opened.groups] == [(i + 2, (0, 1, 2, 3)) for i in range(12)]
    for group in opened.groups:  # the entries are the layers at that place in their own models
        assert len({e.name for e in group.entries}) == 4


def test_names_that_agree_are_left_alone_by_place(tmp_path):
    folder(tmp_path, 3)
    exact, ordered = (collection.open_collection(str(tmp_path), match=m) for m in ("exact", "order"))
    assert exact.groups == ordered.groups


def test_no_hint_where_places_do_not_match_either(tmp_path):
    for i in range(4):
        write(tmp_path / f"{i}.safetensors", {f"dense_{i}/kernel": (i + 1, 3)})
    opened = collection.open_collection(str(tmp_path), check=False)
    assert not opened.groups and not opened.warnings


def test_megnet_matches_by_place(shared):
    pytest.importorskip("h5py")
    path = str(shared / "data" / "megnet")
    assert "--match=order" in collection.open_collection(path, check=False).warnings[0]
    opened = collection.open_collection(path, match="order")
    assert len(opened.refs) == 13 and len(opened.groups) == 105
    assert all(len(g.members) == 13 for g in opened.groups)


# Later


def test_without_equals_a_collection_that_never_had_them(tmp_path):
    opened = collection.open_collection(str(folder(tmp_path, 6)))
    fewer = opened.without(("m01", "m04"), {"m04": "NaN in a.weight"})
    assert [(q["id"], q["reason"]) for q in fewer.quarantined] == [("m04", "NaN in a.weight")]
    for name in ("m01", "m04"):
        os.remove(tmp_path / f"{name}.safetensors")
    fresh = collection.open_collection(str(tmp_path))
    assert (fewer.refs, fewer.groups, fewer.fingerprint) == (fresh.refs, fresh.groups, fresh.fingerprint)
    with pytest.raises(errors.ConfigError, match="no model .m0. in the collection; did you mean"):
        opened.without(("m0",))


def test_fingerprint_sees_content_times_and_names(tmp_path):
    def now():
        return collection.open_collection(str(tmp_path)).fingerprint

    folder(tmp_path, 4)
    found = [now()]
    assert now() == found[0]
    os.utime(tmp_path / "m00.safetensors", ns=(1, 1))
    found.append(now())
    os.rename(tmp_path / "m00.safetensors", tmp_path / "m09.safetensors")
    found.append(now())
    write(tmp_path / "m01.safetensors", SHAPES, np.float64)
    os.utime(tmp_path / "m01.safetensors", ns=(1, 1))
    found.append(now())
    assert len({*found}) == 4


@pytest.mark.slow
def test_a_thousand_models_are_listed_in_three_seconds(tmp_path):
    shapes = {f"layers.{i}.{part}": (4, 2) for i in range(32) for part in ("q", "v")}
    for i in range(1000):
        write(tmp_path / f"{i:04}" / "model.safetensors", shapes)
    start = time.monotonic()
    opened = collection.open_collection(str(tmp_path))
    assert time.monotonic() - start < 3
    assert len(opened.refs) == 1000 and len(opened.groups) == 64


def test_metadata_of_all_models_have_a_bound(tmp_path, monkeypatch):
    """Each may hold some megabytes, and all stay in memory."""
    for n in range(4):
        safetensors.write(tmp_path / f"m{n}.safetensors", {"w": np.ones((2, 3), np.float32) * n}, {"notes": "x" * 100})
    monkeypatch.setattr(collection, "MOST_METADATA", 315)
    with pytest.raises(errors.InputError, match="metadata pass"):
        collection.open_collection(tmp_path, max_quarantined=0)
    monkeypatch.setattr(collection, "MOST_METADATA", 420)
    assert len(collection.open_collection(tmp_path).refs) == 4
