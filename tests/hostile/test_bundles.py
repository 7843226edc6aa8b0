"""Bundles from strangers: whole to the last hash, and made to mislead, to fill memory, or to write elsewhere."""

import json
import os
import pathlib
import shutil

import numpy as np
import pytest

import jaxsub
from jaxsub import errors
from jaxsub.bundle import files
from jaxsub.formats import peft, safetensors
from tests.bundle.test_bundle import forged
from tests.figures_log import record
from tests.programs import worlds


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return worlds.write(
        tmp_path_factory.mktemp("bundles") / "m", {"w": worlds.planted(8, (6, 5)), "b": np.ones((8, 3))}
    )


MADE = {
    "rows": {"rank": 3},
    "axes": {"decomposition": "hosvd", "rank": 3},
    "narrow": {"rank": 3, "basis_dtype": "int8"},
}


class Bundles(dict):
    """name -> folder of a good bundle, made when asked for: rows, factors of axes, 8-bit storage, LoRA updates."""

    def __init__(self, folder):
        self.folder = folder

    def __missing__(self, name):
        place = self[name] = self.folder.parent / name
        if name in MADE:
            jaxsub.fit(str(self.folder), place, **MADE[name])
            return place
        for n in range(5):
            rng = np.random.default_rng(n)
            a, b = rng.standard_normal((2, 9)).astype(np.float32), rng.standard_normal((8, 2)).astype(np.float32)
            peft.write(self.folder.parent / "l" / f"a{n}", {"q": (a, b, 2, 2)})
        jaxsub.fit(str(self.folder.parent / "l"), place, energy=1.0)
        return place


@pytest.fixture(scope="module")
def saved(folder):
    return Bundles(folder)


def arrays(name, change):
    """A forgery that changes the arrays of one file."""

    def change_manifest(manifest, folder):
        path = folder / name
        tensors = safetensors.read(path)
        safetensors.write(path, tensors | change(tensors))
        manifest["files"][name] = files.identity(path)

    return change_manifest


def spoilt(key, value):
    def change(tensors):
        array = np.array(tensors[key], np.float32)
        array.reshape(-1)[0] = value
        return {key: array}

    return change


LAYER, SECOND = "layers/00000.safetensors", "layers/00001.safetensors"  # the first of equal models: rank 0
FORGERIES = {
    "coefficient NaN": ("rows", arrays(files.COEFFICIENTS, spoilt("00001", np.nan)), "NaN or Inf"),
    "coefficient Inf": ("rows", arrays(files.COEFFICIENTS, spoilt("00001", np.inf)), "NaN or Inf"),
    "basis NaN": ("rows", arrays(SECOND, spoilt("basis", np.nan)), "NaN or Inf"),
    "mean Inf": ("rows", arrays(LAYER, spoilt("mean", -np.inf)), "NaN or Inf"),
    "spectrum NaN": ("rows", arrays(LAYER, spoilt("singular_values", np.nan)), "NaN or Inf"),
    "factor NaN": ("axes", arrays(SECOND, spoilt("factor_0", np.nan)), "NaN or Inf"),
    "8-bit scales that multiply": (
        "narrow", arrays(SECOND, lambda t: {"basis_scale": np.ones(10**6, np.float32)}), "does not fit",
    ),
    "8-bit scale NaN": ("narrow", arrays(SECOND, spoilt("basis_scale", np.nan)), "NaN or Inf"),
    "paths that multiply": (
        "rows", lambda m, f: m["members"].update({"around": ["x" * 10**6, ""]}) or m["members"]["each"].pop("path", 0),
        "does not fit",
    ),
    "rank of text": ("rows", lambda m, f: m["layers"][0].update(rank="3"), "does not fit"),
    "negative rank": ("axes", lambda m, f: m["layers"][0]["rank"].update({"0": -3}), "does not fit"),
    "axes that are none": ("axes", lambda m, f: m["layers"][0].update(rank={"7": 3, "x": 3}), "does not fit"),
    "deep manifest": ("rows", lambda m, f: m.update(provenance=json.loads("[" * 200 + "]" * 200)), "nested"),
    "no layers' file": ("rows", lambda m, f: m["files"].pop(LAYER), "not listed"),
    "file of another layer": ("rows", lambda m, f: m["layers"][0].update(file=files.COEFFICIENTS), "does not fit"),
    "shape of 40 axes": ("rows", lambda m, f: m["layers"][0].update(shape=[1] * 40 + [6, 5]), "does not fit"),
    "originals of text": ("rows", lambda m, f: m.update(originals=["x"] * 8), "does not fit"),
    "storage of one": ("rows", lambda m, f: m["layers"][0].update(storage=[""]), "does not fit"),
    "energy of text": (
        "rows", lambda m, f: m["layers"][0]["spectra"]["models"].update(total_energy="x"), "does not fit",
    ),
    "certificate below 0": ("rows", lambda m, f: m["layers"][0]["certificate"].update(bound=-1), "does not fit"),
    "figure of text": ("rows", lambda m, f: m["layers"][0]["figures"].update(error_max="x"), "does not fit"),
    "name that is a list": ("rows", lambda m, f: m["layers"][0].update(name=["w"]), "does not fit"),
    "integers for coefficients": (
        "rows", arrays(files.COEFFICIENTS, lambda t: {"00000": np.ones_like(t["00000"], np.int32)}), "holds int32",
    ),
    "dtype of code": ("rows", lambda m, f: m["layers"][0].update(dtypes="O"), "does not fit"),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [n if case[0] == "rows" else pytest.param(n, marks=pytest.mark.slow) for n, case in FORGERIES.items()]
)
def test_forgeries(saved, tmp_path, name):
    kind, change, words = FORGERIES[name]
    place = forged(saved[kind], tmp_path / "b", lambda manifest: change(manifest, tmp_path / "b"))
    with pytest.raises(errors.InputError, match=words) as caught:
        jaxsub.load(place)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.slow
def test_axes_too_wide_for_memory_are_refused_before_they_are_made(saved, tmp_path):
    """80 GB of unit vectors, named by a file of some megabytes."""
    size = 10**6

    def change(manifest):
        layer, path = manifest["layers"][0], tmp_path / "b" / files.COEFFICIENTS
        layer.update(shape=[size, 9], rank={"0": size, "1": layer["rank"]["1"]})
        inner = layer["rank"]["1"]
        halves = {"00000.left": np.ones((5, size, 1), np.float32), "00000.right": np.ones((5, 1, inner), np.float32)}
        safetensors.write(path, halves)
        manifest["files"][files.COEFFICIENTS] = files.identity(path)
        own = tmp_path / "b" / LAYER
        safetensors.write(own, {k: v for k, v in safetensors.read(own).items() if k != "factor_0"})
        manifest["files"][LAYER] = files.identity(own)

    with pytest.raises(errors.ResourceError, match="MiB, .* are free"):
        jaxsub.load(forged(saved["updates"], tmp_path / "b", change))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["../out", "/etc/out", "a/../../out", "..", ".", "", "x\0y"])
def test_members_are_not_written_outside(saved, tmp_path, name):
    """Ids are names of places as soon as members are written."""

    def change(manifest):
        manifest["models"][0] = name
        manifest["passthrough"] = {}

    made = jaxsub.load(forged(saved["updates"], tmp_path / "b", change))
    before = {*tmp_path.rglob("*")}
    with pytest.raises(errors.JaxsubError):
        made.export(str(tmp_path / "new" / "here"))
    assert {p for p in tmp_path.rglob("*")} - before <= {tmp_path / "new", tmp_path / "new" / "here"}


@pytest.mark.slow
def test_two_members_of_one_place_do_not_overwrite_each_other(saved, tmp_path):
    def change(manifest):
        manifest["models"][:2] = ["x", "./x"]
        manifest["passthrough"] = {}

    made = jaxsub.load(forged(saved["updates"], tmp_path / "b", change))
    with pytest.raises(errors.JaxsubError):
        made.export(str(tmp_path / "new"))


@pytest.mark.slow
@pytest.mark.parametrize("field", [{"target_modules": 3}, {"target_modules": [3]}, {"task_type": ["x"]}])
def test_configurations_of_members_that_are_none_are_not_written(saved, tmp_path, field):
    made = jaxsub.load(forged(saved["updates"], tmp_path / "b", lambda m: m["members"]["alike"].update(field)))
    with pytest.raises(errors.InputError, match="no text and names"):
        made.export(str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_arrays_that_are_not_finite_are_not_projected(saved, number):
    made = jaxsub.load(saved["rows"])
    x = np.ones((2, 6, 5), np.float32)
    x[1, 2, 3] = number
    with pytest.raises(errors.InputError, match="NaN or Inf"):
        made.project({"w": x})
    updates = jaxsub.load(saved["updates"])
    a, b = np.ones((1, 2, 9), np.float32), np.full((1, 8, 2), number, np.float32)
    with pytest.raises(errors.InputError, match="NaN or Inf"):
        updates.project({"q": (a, b, np.ones(1))})


PLANTED = {
    "pipe": lambda p: os.mkfifo(p), "device": lambda p: os.symlink("/dev/zero", p),
    "outside": lambda p: os.symlink("/etc/passwd", p), "loop": lambda p: os.symlink(p, p),
    "folder": lambda p: p.mkdir(),
}  # fmt: skip


@pytest.mark.parametrize("file", [files.MANIFEST, files.COEFFICIENTS, LAYER])
@pytest.mark.parametrize("what", PLANTED)
def test_what_is_no_file_is_refused_at_once(saved, tmp_path, file, what):
    place = pathlib.Path(shutil.copytree(saved["rows"], tmp_path / "b"))
    (place / file).unlink()
    PLANTED[what](place / file)
    with pytest.raises(errors.InputError) as caught:
        jaxsub.load(place)
    assert os.path.basename(file) in str(caught.value)
    if file != files.MANIFEST:
        assert file in dict(files.verify(place))


def test_the_list_is_long():
    record("CORPUS", "forged bundles, whole to the last hash, refused", len(FORGERIES))
    assert len(FORGERIES) > 15
