"""One analysis as several processes: the figures of one process, half the bytes each, and one end for all."""

import json
import os
import time

import numpy as np
import pytest

import jaxsub
from jaxsub.formats import peft, safetensors
from tests.figures_log import record
from tests.programs import processes

QUICK = ("--config.draws=4", "--config.splits=4", "--config.nulls=gaussian,strength")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """12 models with a matrix, a wide one in several shapes, a convolution, a vector, and low-rank updates."""
    path, rng = tmp_path_factory.mktemp("several") / "models", np.random.default_rng(0)
    common = rng.standard_normal((2, 40, 30))
    for n in range(12):
        tensors = {
            "matrix": np.tensordot(rng.standard_normal(2), common, 1) + 0.1 * rng.standard_normal((40, 30)),
            "tall": rng.standard_normal((700, 3)),
            "conv": rng.standard_normal((3, 3, 8, 16)),
            "bias": rng.standard_normal(33),
        }
        os.makedirs(path, exist_ok=True)
        safetensors.write(path / f"m{n:02d}.safetensors", {k: v.astype(np.float32) for k, v in tensors.items()})
    return str(path)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    path, rng = tmp_path_factory.mktemp("adapters"), np.random.default_rng(1)
    for n in range(10):
        rank = 2 + n % 2
        a, b = (rng.standard_normal(s).astype(np.float32) for s in ((rank, 37), (21, rank)))
        peft.write(path / f"m{n}", {"q": (a, b, 4, rank)})
    return str(path)


def report(path):
    with open(os.path.join(path, "report.json"), encoding="utf-8") as file:
        return json.load(file)


def require_alike(one, other, where=""):
    """Reports of the same numbers: figures to 1e-5, all else equal."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for name in one:
            if not name.endswith("_sd"):
                require_alike(one[name], other[name], f"{where}.{name}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for a, b in zip(one, other, strict=True):
            require_alike(a, b, where)
    elif isinstance(one, float):
        assert other == pytest.approx(one, rel=1e-5, abs=1e-6), where
    else:
        assert one == other, where


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("kind", ["folder", "adapters"])
def test_the_report_is_that_of_one_process(count, kind, request, tmp_path):
    given = f"--collection={request.getfixturevalue(kind)}"
    alone, together = str(tmp_path / "one"), str(tmp_path / "several")
    for processes_, place in ((1, alone), (count, together)):
        ended = processes.run(processes_, "analyze", given, f"--workdir={place}", *QUICK)
        assert [e.code for e in ended] == [0] * processes_, ended[-1].stderr
        assert "report:" in ended[0].stdout and not any(e.stdout for e in ended[1:])
    one, several = report(alone), report(together)
    require_alike(one["layers"], several["layers"])
    require_alike(one["collection"], several["collection"])
    assert several["provenance"]["processes"] == count and one["provenance"]["processes"] == 1
    read = one["provenance"]["bytes_read"]
    # Of dense layers columns of its own; of low-rank updates the models of its pairs: of 10 on 4 processes 9.
    share = 1 / count if kind == "folder" else {2: 1.0, 4: 0.9}[count]
    assert several["provenance"]["bytes_read"] == pytest.approx(read * share, rel=0.02, abs=64 * count)


@pytest.mark.slow
def test_saved_statistics_are_used_again(folder, tmp_path):
    place = str(tmp_path / "out")
    for again in (False, True):
        ended = processes.run(2, "analyze", f"--collection={folder}", f"--workdir={place}", *QUICK)
        assert [e.code for e in ended] == [0, 0], ended[-1].stderr
        assert (report(place)["provenance"]["bytes_read"] == 0) == again


@pytest.mark.slow
def test_a_nan_that_one_process_reads_sets_the_model_aside_for_all(folder, tmp_path):
    """In the last column: process 1 alone sees it."""
    os.makedirs(tmp_path / "models")
    for name in os.listdir(folder):
        tensors = safetensors.read(os.path.join(folder, name))
        if name == "m03.safetensors":
            tensors["matrix"][-1, -1] = np.nan
        safetensors.write(tmp_path / "models" / name, tensors)
    ended = processes.run(2, "analyze", f"--collection={tmp_path / 'models'}", f"--workdir={tmp_path / 'out'}", *QUICK)
    assert [e.code for e in ended] == [0, 0], ended[-1].stderr
    found = report(tmp_path / "out")["collection"]
    assert [q["id"] for q in found["quarantined"]] == ["m03"] and found["num_models"] == 11
    one = jaxsub.analyze(str(tmp_path / "models"), draws=4, splits=4, nulls=("gaussian", "strength"))
    require_alike(one["layers"], report(tmp_path / "out")["layers"])
    assert one["collection"]["quarantined"] == found["quarantined"]


UNREADABLE = """
from jaxsub import errors, formats
def read_into(extent, start, view):
    raise errors.InputChangedError(extent.file.path, "cannot be read here")
from jaxsub import reading
reading.formats.read_into = read_into
"""


@pytest.mark.slow
@pytest.mark.parametrize("broken", [0, 1])
def test_a_file_that_one_process_cannot_read_ends_all(folder, broken):
    began = time.monotonic()
    ended = processes.run(2, "analyze", f"--collection={folder}", before={broken: UNREADABLE}, seconds=60)
    assert [e.code for e in ended] == [4, 4] and time.monotonic() - began < 60
    assert "cannot be read here" in ended[broken].stderr
    assert f"process {broken} of 2: " in ended[1 - broken].stderr and "cannot be read here" in ended[1 - broken].stderr


@pytest.mark.slow
@pytest.mark.parametrize("program, mebibytes", [("analyze", 100), ("fit", 170)])
def test_processes_of_one_machine_share_its_memory(folder, tmp_path, program, mebibytes):
    """So much is enough for one process, and not for two."""
    memory = f'lambda field: {mebibytes} << 20 if field == "MemAvailable" else 1 << 40'
    scarce = f"from jaxsub import hostmemory as h; assert h.meminfo; h.meminfo = {memory}"
    for count, code in ((1, 0), (2, 6)):
        given = f"--collection={folder}", f"--workdir={tmp_path / str(count)}", *(QUICK if program == "analyze" else ())
        ended = processes.run(count, program, *given, before=dict.fromkeys(range(count), scarce))
        assert [e.code for e in ended] == [code] * count, ended[-1].stderr
        assert count == 1 or all(f"{mebibytes / 2} MiB are allowed or free" in e.stderr for e in ended)


@pytest.mark.slow
def test_options_that_no_run_could_use_end_all_at_once(folder):
    ended = processes.run(2, "analyze", f"--collection={folder}", "--profile", seconds=60)
    assert [e.code for e in ended] == [2, 2] and all("--workdir" in e.stderr for e in ended)


@pytest.mark.slow
def test_processes_that_see_other_files_are_refused(folder, tmp_path):
    other = "import os, jaxsub.collection as c; c._fingerprint = lambda refs, models: 'other'\n"
    ended = processes.run(2, "analyze", f"--collection={folder}", before={1: other}, seconds=60)
    assert [e.code for e in ended] == [2, 2]
    assert all("sees another collection" in e.stderr for e in ended)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_the_death_of_one_ends_all(folder, tmp_path, killed):
    """Within the heartbeat and ten seconds; what was committed serves the next run."""
    slow = "import time, jaxsub.pipelines.layers as l; f = l.statistics\n"
    slow += "def late(*a, **k):\n    time.sleep(3)\n    return f(*a, **k)\nl.statistics = late\n"
    arguments = ("analyze", f"--collection={folder}", f"--workdir={tmp_path / 'out'}", *QUICK)
    started = processes.start(2, *arguments, before={0: slow, 1: slow}, heartbeat=10)
    kept = tmp_path / "out" / "statistics"
    while not (kept.exists() and os.listdir(kept)):
        assert all(p.poll() is None for p in started)
        time.sleep(0.1)
    started[killed].kill()
    began = time.monotonic()
    codes = [p.wait(timeout=40) for p in started]
    seconds = time.monotonic() - began
    assert all(codes) and seconds < 20
    record("DIST", f"process {killed} of 2 killed, heartbeat 10 s: all gone after s", round(seconds, 1))
    for process in started:
        process.communicate()
    ended = processes.run(2, *arguments)
    assert [e.code for e in ended] == [0, 0], ended[0].stderr
    whole = jaxsub.analyze(folder, draws=4, splits=4, nulls=("gaussian", "strength"))
    require_alike(whole["layers"], report(tmp_path / "out")["layers"])
    assert report(tmp_path / "out")["provenance"]["bytes_read"] < whole["provenance"]["bytes_read"] / 2


@pytest.mark.slow
def test_one_that_hangs_shows_where_and_ends_all(folder):
    stuck = "import time, jaxsub.pipelines.layers as l\n"
    stuck += "def hanging_kernel(*a, **k):\n    time.sleep(1000)\nl.statistics = hanging_kernel\n"
    began = time.monotonic()
    given = ("analyze", f"--collection={folder}", "--config.stall_timeout=8")
    ended = processes.run(2, *given, before={1: stuck}, seconds=90)
    assert all(e.code for e in ended) and time.monotonic() - began < 60
    record("DIST", "one that hangs is shown and ends all", "yes")
    assert "Timeout (0:00:08)" in ended[1].stderr and "hanging_kernel" in ended[1].stderr


@pytest.mark.slow
def test_processes_that_do_not_find_each_other_say_what_was_detected(folder, monkeypatch):
    monkeypatch.setenv("JAXSUB_CONNECT_SECONDS", "3")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    lonely = processes.start(2, "analyze", f"--collection={folder}")
    lonely[0].kill()
    _, said = lonely[1].communicate(timeout=60)
    assert lonely[1].returncode != 0
    lonely[0].communicate()
    assert "do not find each other" in said and "SLURM_JOB_ID=77" in said, said
