"""The same run twice, in fresh processes of other surroundings: the same bytes."""

import os
import pathlib
import subprocess
import sys

import pytest

from tests.figures_log import record
from tests.folders import contents
from tests.programs import worlds
from tests.programs.test_kills import ROOT
from tests.programs.test_resume import report_of

SURROUNDINGS = [
    {"PYTHONHASHSEED": "1", "TZ": "UTC", "LC_ALL": "C", "LANG": "C"},
    {"PYTHONHASHSEED": "4242", "TZ": "Asia/Kathmandu", "LC_ALL": "C.UTF-8", "LANG": "tr_TR.UTF-8"},
]
OPTIONS = {
    "analyze": ["--draws=3"],
    "fit": ["--budget_bytes=20000"],
}


def made(folder, names):
    """A collection whose files were made in the order of `names`; its times do not tell."""
    stacks = {n: worlds.families((9, 8), (12, 9), seed=i) for i, n in enumerate(("a", "B", "c", "\u00e4"))}
    worlds.write(folder / "first", stacks)
    (folder / "c").mkdir()
    for name in sorted(os.listdir(folder / "first"), key=names):
        data = (folder / "first" / name).read_bytes()
        (folder / "c" / name).write_bytes(data)
        os.utime(folder / "c" / name, ns=(10**18, 10**18))


@pytest.mark.slow
@pytest.mark.parametrize("program", ["analyze", "fit"])
def test_surroundings_do_not_show(tmp_path, program):
    found = []
    for number, variables in enumerate(SURROUNDINGS):
        place = tmp_path / f"place{number}"
        place.mkdir()
        made(place, str if number else lambda name: [-ord(c) for c in name])
        out = pathlib.Path("out" if number else "another/out")
        command = [sys.executable, "-m", "jaxsub", program, "--collection=c", f"--workdir={out}", *OPTIONS[program]]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""} | variables
        done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        if program == "fit":
            found.append(contents(place / out / "bundle"))
        else:
            one = report_of(place / out)
            found.append((contents(place / out / "statistics"), one, (place / out / "quarantine.json").read_bytes()))
    assert found[0] == found[1]
    record("DET-1", f"{program}: files alike", len(found[0] if program == "fit" else found[0][0]))
