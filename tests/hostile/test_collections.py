"""Forty models of which four are bad, through fit and project; what a large file costs before it is refused."""

import json
import os
import pathlib
import re
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

import jaxsub
from jaxsub import errors, formats
from jaxsub.formats import safetensors
from jaxsub.pipelines import copies, project
from tests.figures_log import record
from tests.formats import hostile_files

ROOT = pathlib.Path(__file__).resolve().parents[2]
BAD = {  # name -> words of its reason
    "m03": ("ends at byte", "was changed", "cut short"),
    "m11": ("NaN", "nan", "finite"),
    "m20": ("shares no layer",),
    "m37": ("HTML",),
}


@pytest.fixture(scope="module")
def forty(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forty")
    rng = np.random.default_rng(0)
    shared = rng.standard_normal((3, 6, 5))
    for i in range(40):
        w = np.tensordot(rng.standard_normal(3), shared, 1) + 0.01 * rng.standard_normal((6, 5))
        arrays = {"a.weight": w.astype(np.float32), "b.weight": rng.standard_normal(4).astype(np.float32)}
        if i == 11:
            arrays["a.weight"][2, 3] = np.nan
        if i == 20:
            arrays = {"conv.kernel": rng.standard_normal((3, 3, 2)).astype(np.float32)}
        safetensors.write(folder / f"m{i:02d}.safetensors", arrays)
    path = folder / "m03.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    (folder / "m37.safetensors").write_bytes(b"<!DOCTYPE html><html><body>503 Service Unavailable</body></html>" * 3)
    return folder


def require_reasons(said):
    """Each bad model with its file, a reason of its own and a cure, though lines are folded."""
    entries = re.split(r"(?=set aside:?|\n  m\d\d: )", said)
    for name, words in BAD.items():
        about = [" ".join(entry.split()) for entry in entries if f"{name}.safetensors" in entry]
        assert any(word in entry and "; " in entry for entry in about for word in words), (name, said)


def test_headers_tell_three_of_the_four(forty):
    with pytest.raises(errors.InputError, match="3 of 40 models had to be set aside") as caught:
        jaxsub.open_collection(str(forty))
    message = str(caught.value)
    assert "--max_quarantined=3" in message
    assert all(any(word in message for word in BAD[name]) for name in ("m03", "m20", "m37"))
    opened = jaxsub.open_collection(str(forty), max_quarantined=3)
    assert len(opened.refs) == 37 and {q["id"] for q in opened.quarantined} == {"m03", "m20", "m37"}


@pytest.mark.slow
def test_fit_and_project_set_four_of_forty_aside(forty, tmp_path):
    with pytest.raises(errors.InputError, match="had to be set aside"):
        jaxsub.fit(str(forty), str(tmp_path / "strict"), rank=3)
    assert not (tmp_path / "strict").exists()
    jaxsub.fit(str(forty), str(tmp_path / "b"), rank=3, max_quarantined=4)
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    assert len(manifest["models"]) == 36
    good = [p for p in sorted(forty.iterdir()) if p.stem not in BAD]
    alone = jaxsub.fit([str(p) for p in good], rank=3).coefficients()
    mixed = jaxsub.load(str(tmp_path / "b")).coefficients()
    for layer in ("a.weight", "b.weight"):
        np.testing.assert_array_equal(mixed.values[layer], alone.values[layer].astype(mixed.values[layer].dtype))
    found = project.run(project.Config(bundle=str(tmp_path / "b"), collection=(str(forty),), max_quarantined=4))
    assert len(found["models"]) == 36
    record("CORPUS", "bad models set aside by fit and project, of 40", "4, 4")


@pytest.mark.slow
@pytest.mark.parametrize("program", ["analyze", "fit", "project"])
def test_commands_name_each_bad_file_and_go_on(forty, tmp_path, program):
    options = [f"--collection={forty}", "--max_quarantined=4"]
    if program == "project":
        jaxsub.fit([str(p) for p in sorted(forty.iterdir()) if p.stem not in BAD], str(tmp_path / "b"), rank=3)
        options.append(f"--bundle={tmp_path / 'b'}")
    else:
        options += [f"--workdir={tmp_path / 'w'}"] + (["--rank=3"] if program == "fit" else ["--draws=2"])
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "jaxsub", program, *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-2000:]
    require_reasons(done.stdout + done.stderr)


CHILD = """
import resource, sys, time
from jaxsub import collection, errors
collection.open_collection(sys.argv[1])  # everything is imported, and a collection was read
start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    collection.open_collection(sys.argv[2])
except errors.InputError as error:
    print(time.perf_counter() - start, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, error)
"""


def test_sparse_files_are_refused_at_once(forty, tmp_path):
    for name in hostile_files.HEADS:
        hostile_files.holes(name)(tmp_path)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for i in range(3):
        safetensors.write(tmp_path / f"good{i}.safetensors", {"w": np.full((2, 2), i, np.float32)})
    good = tmp_path / "good"
    good.mkdir()
    for i in range(3):
        (tmp_path / f"good{i}.safetensors").rename(good / f"{i}.safetensors")
    command = [sys.executable, "-c", CHILD, str(good), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    seconds, growth, message = done.stdout.split(" ", 2)
    assert message.count("the rest are holes") == len(hostile_files.HEADS)
    assert float(seconds) < 2 and float(growth) < 50
    record("BUDGET", "six sparse files of 64 GiB refused: seconds, MiB", f"{float(seconds):.2f}, {float(growth):.0f}")


def test_comparing_copies_holds_a_block_at_a_time(tmp_path):
    values = np.random.default_rng(0).standard_normal(4 << 20).astype(np.float32)  # 16 MiB
    for i in range(3):
        safetensors.write(tmp_path / f"{i}.safetensors", {"w": values + (i == 2)})
    opened = jaxsub.open_collection(str(tmp_path))
    assert formats.read(opened.models[0], opened.models[0].tensors["w"]).nbytes == 16 << 20
    del values
    tracemalloc.start()
    try:
        assert copies.find(opened.groups, opened.models) == [[0, 1]]
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e-310, 1e200, 1.79e308])
def test_finite_weights_of_any_size_make_a_report(tmp_path, scale):
    """Squares, and even singular values, may be numbers that no float holds; the run must not end for it."""
    for i in range(8):
        w = np.random.default_rng(i).uniform(-1, 1, (6, 5))
        safetensors.write(tmp_path / f"m{i}.safetensors", {"w": w * scale, "v": w})
    report = jaxsub.analyze(str(tmp_path), draws=2, splits=2)
    json.dumps(report.data, allow_nan=False)
    w, v = ({x["name"]: x for x in report.layers}[name] for name in "wv")
    assert w["rank_at"] == v["rank_at"] and "<svg" in report.html()
    if scale > 2.0**1000:  # such values are capped
        assert max(w["singular_values"]) == 2.0**1000
        return
    ratios = np.array(w["singular_values"][-3:]) / np.array(v["singular_values"][-3:])
    np.testing.assert_allclose(ratios, scale, rtol=1e-6 if scale > 1 else 1e-3)
