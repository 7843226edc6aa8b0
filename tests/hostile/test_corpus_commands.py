"""The corpus through the commands, a fresh process each: verdicts, names, time, memory, no side effect."""

import json
import os
import pathlib
import re
import subprocess
import sys
import time

import pytest

from tests.figures_log import record
from tests.hostile import corpus

ROOT = pathlib.Path(__file__).resolve().parents[2]
START_MB = 90  # interpreter, NumPy and the program itself
HANGS = 180  # seconds on the clock
ANALYSIS_MB = 1024  # JAX and compiled kernels too


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    if corpus.archive() is None:
        pytest.skip("the corpus is not here")
    return corpus.unpack(tmp_path_factory.mktemp("corpus"))


def jaxsub(cwd, *arguments):
    """(exit status, all that was said, seconds of the processor, MiB at most) of one command; -9 for one that hangs."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    said = cwd.parent / f"{cwd.name}.said"
    with open(said, "wb") as out:
        start, peak, seconds = time.perf_counter(), 0, 0
        process = subprocess.Popen(
            [sys.executable, "-m", "jaxsub", *map(str, arguments)], stdout=out, stderr=out, cwd=cwd, env=environment
        )
        while process.poll() is None:
            peak, seconds = max(peak, high_water(process.pid)), max(seconds, processor_seconds(process.pid))
            if time.perf_counter() - start > HANGS:
                process.kill()
            time.sleep(0.02)
    return process.returncode, said.read_bytes(), seconds, peak


def processor_seconds(pid):
    """Of a process so far: a loaded machine is no fault of a file."""
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def high_water(pid):
    """MiB that a process held at most so far; its rusage would count the parent's, which it was forked from."""
    try:
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) / 1024 if found else 0


def check(case, cwd, folder, status, said, seconds, peak, most):
    limits = case["limits"]
    assert status in (0, 2, 4), said[-500:]
    assert b"Traceback" not in said and b"bug in jaxsub" not in said
    assert all(byte in b"\n\t\r" or 0x20 <= byte < 0x7F for byte in said)
    assert seconds < limits["seconds"] and peak < limits["rss_mb"] + most
    assert os.listdir(cwd) == [] and not list(folder.rglob("*.marker")) and not list(cwd.parent.rglob("*.marker"))


@pytest.mark.slow
@pytest.mark.parametrize("case", corpus.cases("file", "model"), ids=lambda case: case["id"])
def test_inspect(case, folder, tmp_path):
    cwd = tmp_path / "empty"
    cwd.mkdir()
    status, said, seconds, peak = jaxsub(cwd, "inspect", f"--collection={folder / case['entry']}")
    check(case, cwd, folder, status, said, seconds, peak, START_MB)
    # Pages are folded at their width: names may be broken over lines.
    text = "".join(said.decode().split())
    verdict = "reject" if "setaside" in text or "holdsnomodel" in text else "accept"
    allowed = {"reject" if v == "quarantine" else v for v in (case["expect"], *case["also_ok"])}
    assert verdict in allowed, said
    if verdict == "reject":
        assert all("".join(name.split()) in text for name in case["must_name"]), said
    record("CORPUS", "verdicts met by inspect", case["id"])


@pytest.mark.slow
@pytest.mark.parametrize("case", corpus.cases("collection"), ids=lambda case: case["id"])
def test_analyze(case, folder, tmp_path):
    cwd, workdir = tmp_path / "empty", tmp_path / "w"
    cwd.mkdir()
    command = ("analyze", f"--collection={folder / case['entry']}", f"--workdir={workdir}", "--draws=2")
    status, said, seconds, peak = jaxsub(cwd, *command)
    check(case, cwd, folder, status, said, max(0, seconds - 20), peak, ANALYSIS_MB)  # compiling takes its time
    verdict, text = "reject", said.decode()
    if status == 0:
        report = json.loads((workdir / "report.json").read_text())
        aside = report["collection"]["quarantined"]
        verdict, text = ("quarantine" if aside else "accept"), json.dumps(aside)
        assert not aside or not case.get("bad_models") or {a["id"] for a in aside} == set(case["bad_models"])
    assert verdict in {case["expect"], *case["also_ok"]}, said
    assert all(name in text for name in case["must_name"])
    record("CORPUS", "verdicts met by analyze", case["id"])


@pytest.mark.parametrize("case", corpus.cases("config"), ids=lambda case: case["id"])
def test_configuration(case, folder, tmp_path):
    cwd = tmp_path / "empty"
    cwd.mkdir()
    path = folder / case["entry"]
    flag = f"--flagfile={path}" if path.suffix == ".flags" else f"--config={path}"
    status, said, seconds, peak = jaxsub(cwd, "analyze", flag)
    check(case, cwd, folder, status, said, seconds, peak, START_MB)
    assert status == 2  # also where the manifest would take them: none names a collection
    assert case["expect"] != "reject" or all(name.encode() in said for name in case["must_name"]), said
    assert b"no collection" not in said
    record("CORPUS", "configurations refused", case["id"])
