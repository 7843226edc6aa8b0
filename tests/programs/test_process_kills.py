"""One of four processes is killed while they analyse: all end, and the same command goes on to the same bytes.

JAXSUB_KILLS=20 pytest tests/programs/test_process_kills.py -m slow -s

Every fourth kill is of process 0, the coordinator. JAXSUB_KILLS_SEED chooses other instants.
"""

import random
import sys
import time

import pytest

from tests.figures_log import record
from tests.folders import contents
from tests.programs import processes, test_kills, worlds
from tests.programs.test_resume import report_of

COUNT, HEARTBEAT = 4, 10
SLOW = """
import time, jaxsub.pipelines.layers as l
whole = l.statistics
def late(*given, **more):
    time.sleep(0.15)
    return whole(*given, **more)
l.statistics = late
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    stacks = {f"w{i:02d}": worlds.planted(9, (12, 9), seed=i) for i in range(test_kills.LAYERS)}
    return worlds.write(tmp_path_factory.mktemp("kills") / "models", stacks)


def result_of(place):
    return contents(place / "statistics"), report_of(place)


@pytest.mark.slow
def test_after_the_death_of_one_of_four_the_bytes_are_those_of_a_whole_run(models, tmp_path):
    rng, gone, redone, kept_at = random.Random(test_kills.SEED), {True: [], False: []}, [], []
    given = ("analyze", f"--collection={models}", *test_kills.PROGRAMS["analyze"][0])
    ended = processes.run(COUNT, *given, f"--workdir={tmp_path / 'whole'}")
    assert [e.code for e in ended] == [0] * COUNT, ended[0].stderr
    wanted = result_of(tmp_path / "whole")
    for number in range(test_kills.KILLS):
        place, killed = tmp_path / f"out{number}", 0 if number % 4 == 3 else rng.randrange(1, COUNT)
        until = rng.randrange(test_kills.LAYERS)
        here = (*given, f"--workdir={place}")
        started = processes.start(COUNT, *here, before=dict.fromkeys(range(COUNT), SLOW), heartbeat=HEARTBEAT)
        while len(test_kills.kept("analyze", place)) < until:
            assert all(p.poll() is None for p in started)
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        started[killed].kill()
        began = time.monotonic()
        codes = [p.wait(timeout=60) for p in started]
        gone[not killed].append(time.monotonic() - began)
        assert all(codes)
        said = [p.communicate()[1] for p in started]
        kept_at.append(len(test_kills.kept("analyze", place)))
        again = processes.run(COUNT, *here)
        assert [e.code for e in again] == [0] * COUNT, again[0].stderr
        assert test_kills.done(again[0].stderr) == test_kills.LAYERS - kept_at[-1]
        redone.append(max(0, test_kills.done(said[0]) + 1 - kept_at[-1]))  # begun by process 0, and not kept
        assert result_of(place) == wanted
    slowest = {who: max(times, default=0.0) for who, times in gone.items()}
    sys.stdout.write(
        f"\n{test_kills.KILLS} kills with {kept_at} layers kept; layers done again at most {max(redone)}; slowest end "
        f"{slowest[False]:.1f} s after a worker's death, {slowest[True]:.1f} s after the coordinator's\n"
    )
    for is_first, who in ((False, "worker"), (True, "coordinator")):
        record("DIST", f"{who} of {COUNT} processes killed, bytes of a whole run after: kills", len(gone[is_first]))
        if gone[is_first]:
            record("DIST", f"{who} killed, heartbeat {HEARTBEAT} s: all gone after s", round(slowest[is_first], 1))
    record("DIST", "layers done again at most", max(redone))
    assert max(slowest.values()) <= HEARTBEAT + 10 and max(redone) <= 1
