"""Which layers are chosen and which models belong together, and what is said where they do not."""

import pytest

from jaxsub import collection, errors, finding, lineup
from tests.test_collection import folder, write

MLP = {"fc1.weight": (4, 3), "fc1.bias": (4,), "fc2.weight": (2, 4)}
CNN = {"conv.kernel": (3, 3, 1, 2), "conv.bias": (2,)}


def kinds_folder(root, cnn, cnn_shapes=CNN):
    for i in range(10):
        write(root / f"mlp{i}.safetensors", MLP)
    for i in range(cnn):
        write(root / f"cnn{i}.safetensors", cnn_shapes)
    return str(root)


# Layers that are chosen


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"layers": "kernal"},
            "--layers='kernal' matches none of the 5 layers: conv.bias, conv.kernel, fc1.bias, fc1.weight, fc2.weight; "
            "the nearest: conv.kernel",
        ),
        ({"layers": ("zzz", "^y")}, "--layers='zzz' and --layers='^y' match none of the 5 layers: conv.bias, conv."),
        ({"exclude_layers": "."}, "--exclude_layers='.' leaves out all 5 layers: conv.bias, "),
        (
            {"layers": ("conv",), "exclude_layers": ("bias", "kernel")},
            "--exclude_layers='bias' and --exclude_layers='kernel' leave out all 2 layers of 5 that --layers='conv' "
            "selects: conv.bias, conv.kernel",
        ),
    ],
)
def test_expressions_that_leave_no_layer_are_named_with_the_layers_there_are(tmp_path, options, said):
    with pytest.raises(errors.ConfigError) as caught:
        collection.open_collection(kinds_folder(tmp_path, 3), **options)
    assert str(caught.value).startswith(said)
    assert "(" not in str(caught.value)


def test_an_expression_that_matches_nothing_beside_one_that_does_is_a_warning(tmp_path):
    opened = collection.open_collection(str(folder(tmp_path, 3)), layers=("a", "zzz"), exclude_layers=("q",))
    assert opened.warnings == (
        "--layers='zzz' matches none of the 2 layers",
        "--exclude_layers='q' matches none of the 2 layers",
    )
    assert not collection.open_collection(str(tmp_path), layers=("a",)).warnings


def test_hostile_expressions_are_escaped(tmp_path):
    with pytest.raises(errors.ConfigError) as caught:
        collection.open_collection(str(folder(tmp_path, 3)), layers=("\x1b[2J]",))
    assert "\x1b" not in str(caught.value)


# Models of another architecture


def test_two_models_of_another_architecture_are_named_with_a_cure(tmp_path):
    opened = collection.open_collection(kinds_folder(tmp_path, 2))
    assert opened.warnings == (
        "2 of 12 models take part in no layer that is analysed: cnn0, cnn1 (fewer than 3 models have their layers in "
        "these shapes); if they are of another architecture, move them out of the collection",
    )


def test_one_model_of_another_architecture_is_set_aside_with_advice_that_fits(tmp_path):
    (record,) = collection.open_collection(kinds_folder(tmp_path, 1)).quarantined
    assert record["reason"].endswith(
        "shares no layer with any other model; if it is of another architecture, move it out of the collection"
    )


def test_several_kinds_of_models_are_counted_and_named(tmp_path):
    (warning,) = collection.open_collection(kinds_folder(tmp_path, 4)).warnings
    assert "2 kinds of models share no layer with one another: 10 like mlp0, 4 like cnn0;" in warning


def test_models_without_a_chosen_layer_are_said_to_have_none(tmp_path):
    (warning,) = collection.open_collection(kinds_folder(tmp_path, 4), layers="conv").warnings
    assert warning.startswith("10 of 14 models take part in no layer that is analysed: mlp0, mlp1, ")
    assert "hold none of the layers chosen" in warning


def test_models_that_share_some_layers_are_one_kind(tmp_path):
    other = MLP | {"fc2.weight": (7, 4)}
    assert not collection.open_collection(kinds_folder(tmp_path, 2, other)).warnings


@pytest.mark.parametrize(
    ("count", "groups", "want"),
    [
        (0, [], []),
        (3, [], [[0], [1], [2]]),
        (5, [(0, 2), (2, 4)], [[0, 2, 4], [1], [3]]),
        (5, [(3, 4), (0, 1), (1, 2), (0, 1, 2)], [[0, 1, 2], [3, 4]]),
        (4, [(2, 3), (0, 1), (1, 3)], [[0, 1, 2, 3]]),
    ],
)
def test_kinds_are_connected_by_layers(count, groups, want):
    assert lineup.kinds(count, groups) == want


# Names of collections


@pytest.mark.parametrize(
    ("folders", "want"),
    [
        (["/data/wakewords/"], "wakewords"),
        (["/data/a", "/data/b", "/data/a/"], "a, b"),
        (["/one/x", "/two/x"], "one/x, two/x"),
        (["/runs/lora/models"], "lora/models"),
        (["/a", "/b", "/c", "/d", "/e"], "a, b, c and 2 more"),
    ],
)
def test_a_collection_is_called_after_its_folders(folders, want):
    assert finding.name_of(folders) == want


def test_globs_lists_and_single_files_are_called_after_the_folder_they_are_in(tmp_path):
    root = folder(tmp_path / "zoo", 3)
    (root / "paths.txt").write_text("m00.safetensors\nm01.safetensors\nm02.safetensors\n")
    files = [str(root / f"m{i:02}.safetensors") for i in range(3)]
    for paths in (str(root), str(root / "*.safetensors"), str(root / "paths.txt"), files):
        assert collection.open_collection(paths).name == "zoo"
