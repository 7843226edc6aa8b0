"""Runs that are killed at any instant and started again: nothing that was kept is done twice, the result is the same.

JAXSUB_KILLS=30 pytest tests/programs/test_kills.py -m slow -s

JAXSUB_KILLS_SEED chooses other instants, for many kills in portions.
"""

import contextlib
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.figures_log import record
from tests.folders import contents
from tests.programs import worlds
from tests.programs.test_resume import report_of

ROOT = pathlib.Path(__file__).resolve().parents[2]
LAYERS = 40
KILLS, SEED = (int(os.environ.get(name, given)) for name, given in (("JAXSUB_KILLS", "3"), ("JAXSUB_KILLS_SEED", "1")))
PROGRAMS = {
    "analyze": (["--draws=2", "--config.nulls=gaussian", "--config.splits=2"], "statistics"),
    "fit": (["--budget_bytes=150000"], "parts"),  # in several passes
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    stacks = {f"w{i:02d}": worlds.planted(9, (12, 9), seed=i) for i in range(LAYERS)}
    return worlds.write(tmp_path_factory.mktemp("kills") / "models", stacks)


def start(program, models, place, log):
    command = [sys.executable, "-m", "jaxsub", program, f"--collection={models}", f"--workdir={place}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    return subprocess.Popen(
        [*command, *PROGRAMS[program][0]], env=environment, stdout=subprocess.DEVNULL, stderr=log, cwd=ROOT
    )


def run(program, models, place):
    """(seconds, layers read) of a run that is let finish."""
    began = time.monotonic()
    with open(f"{place}.log", "w+", encoding="utf-8") as log:
        assert start(program, models, place, log).wait(120) == 0, log.seek(0) or log.read()
        log.seek(0)
        return time.monotonic() - began, done(log.read())


def done(log):
    """Layers that a log tells of as read."""
    return len(re.findall(r"^\[ *\d+/\d+\] w\d+  N=9(?! as saved)", log, re.MULTILINE))


def kept(program, place):
    """Names of the layers that are kept in a workdir."""
    folder = pathlib.Path(place) / PROGRAMS[program][1]
    ended = []
    with contextlib.suppress(FileNotFoundError):  # no layer yet, or all are in the bundle
        ended = os.listdir(folder)
    return [name for name in ended if not name.startswith(".tmp-") and name != "set_aside.json"]


def stop(program, models, place, rng, longest, total, number):
    """Starts a run and ends it at a random instant; (what it said, layers it kept, exit status, seconds to its end)."""
    log = f"{place}.killed.log"
    with open(log, "w", encoding="utf-8") as stream:
        process = start(program, models, place, stream)
        if number == signal.SIGKILL and rng.random() < 0.25:
            time.sleep(rng.uniform(0, 1.1 * longest))
        else:  # most of a short run is its start: wait for a layer, then for a moment
            count = total if rng.random() < 0.25 else rng.randrange(total)
            # Signals are asked about once the program minds them; before, they end any process as the system does.
            early = number == signal.SIGKILL and not count
            while process.poll() is None and not (early or place.exists() and len(kept(program, place)) >= count):
                time.sleep(0.002)
            time.sleep(rng.uniform(0, longest / 3 if count == total else 0.1))  # figures and reports follow the last
        process.send_signal(number)
        began = time.monotonic()
        process.wait(60)
    with open(log, encoding="utf-8") as stream:
        return stream.read(), len(kept(program, place)), process.returncode, time.monotonic() - began


def result_of(program, place):
    if program == "fit":
        return contents(os.path.join(place, "bundle"))
    return contents(os.path.join(place, "statistics")), report_of(place)


def check(program, models, folder, number, kills, seed):
    rng = random.Random(seed)
    run(program, models, folder / "first")  # compiles
    longest, total = run(program, models, folder / "whole")
    assert total >= LAYERS
    wanted, redone, exits = result_of(program, folder / "whole"), [], []
    over = middle = last = left = 0
    for i in range(kills):
        place = folder / f"out{i}"
        text, saved, status, seconds = stop(program, models, place, rng, longest, total, number)
        left += place.exists() and any(place.rglob(".tmp-*"))
        is_over = status == 0 or (program == "fit" and (place / "bundle").exists())
        _, again = run(program, models, place)
        if not is_over:
            assert saved >= done(text)  # what was said to be done is there
            assert again == total - saved
            redone.append(max(0, min(done(text) + 1, total) - saved))  # begun, and not kept
            middle, last = middle + (0 < saved < total), last + (saved == total)
        over += is_over
        assert result_of(program, place) == wanted
        strays = [p for p in place.rglob(".tmp-*")]
        assert not strays and not (place / "parts").exists()
        # While the interpreter ends, signals end it as the system does: nothing is left to do then.
        is_whole = status == -number and not again
        if number != signal.SIGKILL and status and not is_whole:
            assert status == 128 + number and "with --workdir, the same command goes on" in text
            exits.append(seconds)
    worst = f", the slowest exit after {max(exits):.2f} s" if exits else ""
    sys.stdout.write(
        f"\n{program}, {signal.Signals(number).name}: {kills} stops of runs of {longest:.1f} s, {over} after the end, "
        f"{middle} with some layers kept, {last} with all; layers done again: {sum(redone)}, at most "
        f"{max(redone, default=0)} a stop; unfinished writes left {left} times{worst}\n"
    )
    record(
        "CRASH-1" if number == signal.SIGKILL else "SIGNAL", f"{program}, {signal.Signals(number).name}: stops", kills
    )
    record("CRASH-1", f"{program}, {signal.Signals(number).name}: layers done again at most", max(redone, default=0))
    if exits:
        record("SIGNAL", f"{program}, {signal.Signals(number).name}: slowest exit, s", round(max(exits), 2))
    assert max(redone, default=0) <= 1 and max(exits, default=0) <= 10


@pytest.mark.slow
@pytest.mark.parametrize("program, kills", [("analyze", KILLS), ("fit", max(3, KILLS // 6))])
def test_a_killed_run_goes_on(models, tmp_path, program, kills):
    check(program, models, tmp_path, signal.SIGKILL, kills, seed=SEED)


@pytest.mark.slow
@pytest.mark.parametrize("program", ["analyze", "fit"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_asked_to_stop_goes_on(models, tmp_path, program, number):
    check(program, models, tmp_path, number, max(2, KILLS // 6), seed=SEED + 1000)
