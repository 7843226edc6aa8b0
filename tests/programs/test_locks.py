"""One run a workdir: two at once, one that died, one on another host; signals, while the main thread cannot answer."""

import fcntl
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from jaxsub import errors
from jaxsub.pipelines import analyze, fit, workdir
from tests.figures_log import record
from tests.folders import contents
from tests.programs import worlds
from tests.programs.test_kills import ROOT
from tests.programs.test_resume import report_of

PAIRS = int(os.environ.get("JAXSUB_PAIRS", "10"))
ASKED = r"""
import sys, time
from jaxsub import errors
from jaxsub.pipelines import workdir
print("ready", flush=True)
for line in sys.stdin:
    began = time.monotonic()
    try:
        with workdir.hold(line.strip(), {"program": "test"}):
            print("won", flush=True)
            sys.stdin.readline()
    except errors.WorkdirError as error:
        print(round(time.monotonic() - began, 3), error, flush=True)
        sys.stdin.readline()
    print("ended", flush=True)
"""


def child(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip


def test_of_two_at_once_one_wins_and_the_other_names_it(tmp_path):
    pair, slowest = [child(ASKED), child(ASKED)], 0.0
    assert [one.stdout.readline() for one in pair] == ["ready\n"] * 2
    for number in range(50):
        for one in pair:
            one.stdin.write(f"{tmp_path / str(number)}\n")
        for one in pair:
            one.stdin.flush()
        said = [one.stdout.readline() for one in pair]
        assert said.count("won\n") == 1, said
        winner = said.index("won\n")
        seconds, _, text = said[1 - winner].partition(" ")
        assert f"host {socket.gethostname()}, pid {pair[winner].pid}, run " in text and ", started 20" in text
        slowest = max(slowest, float(seconds))
        for one in pair:
            one.stdin.write("\n")
            one.stdin.flush()
        assert [one.stdout.readline() for one in pair] == ["ended\n"] * 2
    for one in pair:
        one.communicate(timeout=20)
    record("LOCK", "pairs of 50 with one winner", 50)
    record("LOCK", "slowest refusal, s", slowest)
    assert slowest < 5


def test_a_held_folder_is_refused_before_anything_is_opened(tmp_path):
    held = str(tmp_path)
    with workdir.hold(held, {"program": "test"}):
        for program, run in ((analyze, analyze.run), (fit, lambda c, w: fit.run(c, workdir=w))):
            with pytest.raises(errors.WorkdirError, match=f"in use by another run .*pid {os.getpid()}, run"):
                run(program.Config(collection=("nowhere",)), held)
    workdir.require_free(held)
    workdir.require_free(held + "/none")


def test_who_asks_does_not_refuse_who_takes(tmp_path):
    with workdir.hold(str(tmp_path), {"program": "test"}):
        pass
    fd = os.open(tmp_path / workdir.LOCK, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_SH)
    threading.Timer(0.03, os.close, [fd]).start()
    with workdir.hold(str(tmp_path), {"program": "test"}):
        pass


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path):
    one = child(ASKED)
    one.stdin.write(f"{tmp_path / 'out'}\n")
    one.stdin.flush()
    assert one.stdout.readline() == "ready\n" and one.stdout.readline() == "won\n"
    one.kill()
    one.communicate(timeout=20)
    left = json.loads((tmp_path / "out" / workdir.LOCK).read_text())
    assert left["pid"] == one.pid
    with workdir.hold(str(tmp_path / "out"), {"program": "test"}):
        assert json.loads((tmp_path / "out" / workdir.LOCK).read_text())["pid"] == os.getpid()
    assert not (tmp_path / "out" / workdir.LOCK).read_text()  # a run that ended says so


def test_the_lock_of_another_host_is_taken_over_with_a_flag_only(tmp_path):
    left = {"host": "elsewhere", "pid": 7, "run": "0a1b2c3d", "started": "2026-01-02T03:04:05Z"}
    (tmp_path / workdir.LOCK).write_text(json.dumps(left))
    before = contents(tmp_path)
    words = "host elsewhere, pid 7, run 0a1b2c3d, started 2026-01-02T03:04:05Z.*--break_lock"
    with pytest.raises(errors.WorkdirError, match=words):
        with workdir.hold(str(tmp_path), {"program": "test"}):
            pytest.fail("it was taken")
    assert contents(tmp_path) == before
    with workdir.hold(str(tmp_path), {"program": "test"}, break_lock=True):
        pass
    with workdir.hold(str(tmp_path), {"program": "test"}):
        pass


def test_a_name_that_would_write_on_the_terminal_does_not(tmp_path):
    (tmp_path / workdir.LOCK).write_text(json.dumps({"host": "\x1b[31mred", "pid": [1]}))
    with pytest.raises(errors.WorkdirError, match=r"host \\x1b\[31mred, pid \[1\], run unknown"):
        with workdir.hold(str(tmp_path), {"program": "test"}):
            pytest.fail("it was taken")


@pytest.mark.slow
@pytest.mark.parametrize("program", ["analyze", "fit"])
def test_pairs_of_programs(tmp_path, program):
    models = worlds.write(tmp_path / "models", {n: worlds.planted(9, (12, 9), seed=i) for i, n in enumerate("abc")})
    command = [sys.executable, "-m", "jaxsub", program, f"--collection={models}"]

    def start(place):
        return time.monotonic(), subprocess.Popen(
            [*command, f"--workdir={place}"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT
        )

    def result(place):
        return contents(place / "bundle") if program == "fit" else (contents(place / "statistics"), report_of(place))

    solo = start(tmp_path / "solo")[1]
    said = solo.communicate(timeout=300)[1]
    assert solo.returncode == 0, said
    wanted, refused, slowest = result(tmp_path / "solo"), 0, 0.0
    for number in range(PAIRS):
        place = tmp_path / f"out{number}"
        pair, codes = [start(place), start(place)], {}
        while len(codes) < 2:
            for began, one in pair:
                if one.pid not in codes and one.poll() is not None:
                    codes[one.pid] = one.returncode
                    text = one.communicate()[1]
                    if one.returncode == 5:
                        other = next(p.pid for _, p in pair if p is not one)
                        assert f"in use by another run (host {socket.gethostname()}, pid {other}, run " in text
                        refused, slowest = refused + 1, max(slowest, time.monotonic() - began)
            time.sleep(0.01)
        assert sorted(codes.values()) in ([0, 5], [0, 0])  # the second may have come when the first had ended
        assert result(place) == wanted and not list(place.rglob(".tmp-*"))
    record("LOCK", f"{program}: refused of {PAIRS} pairs", refused)
    record("LOCK", f"{program}: slowest refusal with the program's start, s", round(slowest, 2))
    assert refused


# Signals

BUSY = r"""
import hashlib, sys
from jaxsub import cli
from jaxsub.pipelines import inspect, tracing
def run(*_, **__):
    with tracing.stage("layers.3.attn"):
        print("ready", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", int(sys.argv[1]))  # cannot be interrupted, as a device call
    return {}
inspect.run = run
cli.entry(["jaxsub", "inspect", "--collection=."])
"""


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_second_signal_ends_a_program_in_the_midst_of_a_call(number, status):
    process = child(BUSY, 40_000_000)  # many seconds
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.3)  # until it is in the call
    began = time.monotonic()
    process.send_signal(number)
    said = process.stderr.readline()
    waited = time.monotonic() - began
    assert "stopping after layers.3.attn; a second signal ends it at once" in said and waited < 2
    time.sleep(0.1)
    assert process.poll() is None
    began = time.monotonic()
    process.send_signal(number)
    process.communicate(timeout=20)
    record("SIGNAL", f"{number.name}: seconds to the second one's end", round(time.monotonic() - began, 3))
    assert process.returncode == status and time.monotonic() - began < 2


@pytest.mark.slow
def test_the_first_signal_waits_for_the_call(tmp_path):
    process = child(BUSY, 3_000_000)
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command starts over" in said.splitlines()[-1]


def test_figures_are_kept_where_they_are_asked_for(tmp_path, monkeypatch):
    path = pathlib.Path(tmp_path / "figures")
    monkeypatch.setenv("JAXSUB_FIGURES", str(path))
    record("X", "count", 3)
    record("X", "count", 4)
    assert [json.loads(line)["value"] for line in path.read_text().splitlines()] == [3, 4]
