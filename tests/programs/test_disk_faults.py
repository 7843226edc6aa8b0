"""Disks that fail, processes that end, power that is cut, at every single thing that a run does to its files."""

import errno
import os
import re
import resource
import shutil
import subprocess
import sys

import pytest

import jaxsub
from jaxsub import errors
from jaxsub.bundle import files
from jaxsub.pipelines import analyze, fit
from jaxsub.statistics import Statistics
from tests import disk
from tests.figures_log import record
from tests.folders import contents
from tests.programs.test_kills import ROOT
from tests.programs.test_resume import QUICK, dense, report_of
from tests.selected import first

ENDS = [("before", False), ("after", False)]
FAULTS = [(code, persistent) for code in (errno.EIO, errno.ENOSPC) for persistent in (False, True)]


class Analysis:
    """`analyze` in a workdir."""

    def __init__(self, models):
        self.config = analyze.Config(collection=(models,), **QUICK)

    def run(self, root):
        analyze.run(self.config, str(root))

    def result(self, root):
        """What must be the same after all."""
        return contents(root / "statistics"), report_of(root), (root / "quarantine.json").read_bytes()

    def check(self, root, wanted):
        """Nothing that a reader takes differs from the run that was not disturbed."""
        for name, data in contents(root / "statistics").items():
            try:
                Statistics.load(root / "statistics" / name)
            except errors.InputError:
                continue
            assert name.startswith(".tmp-") or data == wanted[0][name]
        if (root / "report.json").exists():
            try:
                found = report_of(root)
            except ValueError:  # no report to anyone
                return
            assert found == wanted[1]


class Fit:
    """`fit` in a workdir."""

    def __init__(self, models):
        self.config = fit.Config(collection=(models,), rank=2)

    def run(self, root):
        fit.run(self.config, workdir=str(root))

    def result(self, root):
        return contents(root / "bundle")

    def check(self, root, wanted):
        taken(root / "bundle", wanted)


def taken(path, wanted):
    """A bundle is refused, or it is the one that was to be written."""
    try:
        jaxsub.load(path)
        found = files.verify(path)
    except errors.InputError:
        return
    assert found or contents(path) == wanted


class Saved:
    """`Bundle.save`: no workdir, nobody holds the place."""

    def __init__(self, models):
        self.bundle = jaxsub.fit(models, rank=2)

    def run(self, root):
        if os.path.lexists(root / "b"):  # it was whole already
            assert not files.verify(root / "b")
        else:
            self.bundle.save(root / "b")

    def result(self, root):
        return contents(root / "b")

    def check(self, root, wanted):
        taken(root / "b", wanted)


class Written:
    """`Report.save`."""

    def __init__(self, models):
        self.report = jaxsub.analyze(models, **QUICK)

    def run(self, root):
        self.report.save(root)

    def result(self, root):
        return {name: data for name, data in contents(root).items() if not name.startswith(".tmp-")}

    def check(self, root, wanted):
        for name, data in contents(root).items():
            assert name.startswith(".tmp-") or data == wanted[name]


def strays(root):
    return list(root.rglob(".tmp-*"))


def count_on(program, folder, how, persistent, start=1, step=1):
    """Operations at which a run was stopped; after each, the same command gives the same result."""
    program.run(folder / "whole")
    wanted, at, tried = program.result(folder / "whole"), start, 0
    while True:
        root = folder / f"out{at}"
        with disk.Disk(root, at, how, persistent) as faulty:
            try:
                program.run(root)
            except disk.Ended:
                assert how in ("before", "after")
            except errors.JaxsubError as error:
                assert faulty.failed, error
                assert isinstance(error, errors.ResourceError) and error.exit_code == 6, (faulty.failed, error)
                assert os.fspath(root) in str(error) and " free" in str(error)
                assert ".tmp-" not in str(error), error
        if faulty.count < at:
            return tried
        if root.exists():
            program.check(root, wanted)
        program.run(root)
        assert program.result(root) == wanted, (at, faulty.log[-1:])
        if isinstance(program, Analysis | Fit):
            assert not strays(root) and not (root / "parts").exists()
        shutil.rmtree(root)
        at, tried = at + step, tried + 1


@pytest.mark.parametrize(("program", "how", "persistent", "step"), first([
    (Analysis, "after", False, 9), (Analysis, errno.ENOSPC, True, 13), (Fit, "before", False, 23),
    (Saved, "before", False, 1), (Saved, errno.EIO, False, 1), (Written, errno.ENOSPC, False, 1),
], 3))  # fmt: skip
def test_a_fault_at_an_operation_leaves_what_the_next_run_mends(tmp_path, quick, program, how, persistent, step):
    assert count_on(program(dense(tmp_path / "c")), tmp_path, how, persistent, start=2, step=step) > 2


@pytest.mark.slow
@pytest.mark.parametrize(("how", "persistent"), ENDS + FAULTS)
@pytest.mark.parametrize("program", [Analysis, Fit, Saved, Written])
def test_a_fault_at_every_operation_leaves_what_the_next_run_mends(tmp_path, quick, program, how, persistent):
    tried = count_on(program(dense(tmp_path / "c")), tmp_path, how, persistent)
    name = how if isinstance(how, str) else errno.errorcode[how] + (" from then on" if persistent else " once")
    record("CRASH-2", f"{program.__name__.lower()}, {name}: operations", tried)
    assert tried > 10


# Power cuts


def cuts(program, folder, every=1):
    """(states, those run again): no state is taken for a result, and each leads to it."""
    with disk.Disk(folder / "whole") as watched:
        program.run(folder / "whole")
    wanted, seen, again = program.result(folder / "whole"), set(), 0
    for number, lost, state in disk.power_cuts(watched.log):
        key = tuple(sorted((name, data) for name, data in state.items()))
        if key in seen:
            continue
        seen.add(key)
        root = folder / f"cut{len(seen)}"
        disk.build(state, root)
        program.check(root, wanted)
        if len(seen) % every == 0:
            again += 1
            restart(program, root, lost)
            assert program.result(root) == wanted, (number, lost)
        shutil.rmtree(root)
    return len(seen), again


def restart(program, root, lost):
    """The same command; with --restart where the record of whose folder it is did not outlive the power."""
    try:
        program.run(root)
    except errors.WorkdirError as error:
        assert "run.json is damaged" in str(error) or "exists already" in str(error), (lost, error)
        raise


@pytest.mark.parametrize("program", [Saved, Written])
def test_no_power_cut_leaves_anything_damaged_that_is_taken(tmp_path, quick, program):
    assert cuts(program(dense(tmp_path / "c")), tmp_path)[0] > 20


@pytest.mark.slow
@pytest.mark.parametrize("program", [Analysis, Fit])
def test_no_power_cut_of_a_run_leaves_anything_damaged_that_is_taken(tmp_path, quick, program):
    states, again = cuts(program(dense(tmp_path / "c")), tmp_path)
    record("CRASH-3", f"{program.__name__.lower()}: states", states)
    assert states == again > 100


@pytest.mark.parametrize(("program", "place"), [(Analysis, "statistics"), (Fit, "parts")])
def test_a_layer_that_was_synced_outlives_a_power_cut(tmp_path, quick, program, place):
    with disk.Disk(tmp_path / "out") as watched:
        program(dense(tmp_path / "c")).run(tmp_path / "out")
    named = [(i, rest[0]) for i, (kind, _, *rest) in enumerate(watched.log) if kind == "rename"]
    kept = [(i, name) for i, name in named if os.path.dirname(name) == place]
    assert len(kept) == 3
    synced = {name: watched.log.index(("fsync", place), i) + 1 for i, name in kept}
    removed = next((i for i, (kind, path, *_) in enumerate(watched.log) if kind == "unlink" and place in path), 10**6)
    for number, lost, state in disk.power_cuts(watched.log):
        if lost.startswith("names") and number <= removed:
            assert all(name in state for name, at in synced.items() if at <= number), (number, lost)


# Room


@pytest.mark.parametrize(("program", "size"), [(Analysis, 0), (Analysis, 2500), (Fit, 1500)])
def test_a_limit_on_the_size_of_files_is_said(tmp_path, quick, program, size):
    limited(program(dense(tmp_path / "c")), tmp_path, size)


@pytest.mark.slow
@pytest.mark.parametrize("program", [Analysis, Fit, Saved, Written])
def test_sixteen_limits_on_the_size_of_files(tmp_path, quick, program):
    made = program(dense(tmp_path / "c"))
    refused = [
        limited(made, tmp_path, size) for size in [*range(0, 6000, 600), 8000, 12000, 20000, 40000, 80000, 10**6]
    ]
    assert len(refused) == 16 and refused[0] and not refused[-1]
    record("ENOSPC", f"{program.__name__.lower()}: limits refused of 16", sum(refused))


def limited(program, folder, size):
    """Whether a run with files of at most `size` bytes was refused; nothing is damaged, without the limit it ends."""
    root, whole = folder / f"limit{size}", folder / "whole"
    if not whole.exists():
        program.run(whole)
    wanted, said = program.result(whole), None
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            program.run(root)
        except errors.ResourceError as error:
            said = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    if said is not None:
        assert "File too large" in said and os.fspath(root) in said and "bytes needed" in said and " free" in said
    if root.exists():
        program.check(root, wanted)
        assert not strays(root)
    program.run(root)
    assert program.result(root) == wanted == program.result(whole)
    return said is not None


@pytest.mark.parametrize("program", [Analysis, Fit])
def test_a_disk_without_room_is_refused_before_anything_is_read(tmp_path, quick, monkeypatch, program):
    from jaxsub import formats

    made, usage = program(dense(tmp_path / "c")), shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        patch.setattr(formats, "read", lambda *_: pytest.fail("a weight was read"))
        free = r"written \([0-9]+ bytes\), 1000 B are free there \(1000 b"
        with pytest.raises(errors.ResourceError, match=free) as said:
            made.run(tmp_path / "out")
    made.run(tmp_path / "out")
    needed = int(re.search(r"written \((\d+) bytes", str(said.value)).group(1))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000 if program is Fit else needed - 1))
    made.run(tmp_path / "out")  # what is there needs no room
    with pytest.raises(errors.ResourceError, match="to be written"):
        made.run(tmp_path / "other")


def test_a_bundle_that_cannot_be_replaced_stays(tmp_path, quick, monkeypatch):
    models = dense(tmp_path / "c")
    fit.run(fit.Config(collection=(models,), rank=2), workdir=str(tmp_path / "out"))
    before, real = contents(tmp_path / "out" / "bundle"), os.rename

    def rename(old, new):
        if os.path.basename(new) == "bundle" and ".tmp-" in os.path.basename(old) and not failed:
            failed.append(old)
            raise OSError(errno.EIO, os.strerror(errno.EIO), os.fspath(old))
        real(old, new)

    failed = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        with pytest.raises((OSError, errors.ResourceError)):
            fit.run(fit.Config(collection=(models,), rank=1, restart=True), workdir=str(tmp_path / "out"))
    assert failed and contents(tmp_path / "out" / "bundle") == before
    fit.run(fit.Config(collection=(models,), rank=1), workdir=str(tmp_path / "out2"))
    fit.run(fit.Config(collection=(models,), rank=1, restart=True), workdir=str(tmp_path / "out"))
    assert contents(tmp_path / "out" / "bundle") == contents(tmp_path / "out2" / "bundle")


@pytest.mark.slow
@pytest.mark.parametrize(("program", "size"), [("analyze", 2500), ("fit", 1500)])
def test_a_program_on_a_full_disk_ends_with_6_and_goes_on(tmp_path, program, size):
    models = dense(tmp_path / "c")
    command = [sys.executable, "-m", "jaxsub", program, f"--collection={models}", f"--workdir={tmp_path / 'out'}"]
    limit = f"ulimit -f {-(-size // 1024)}; exec " + " ".join(command)
    full = subprocess.run(["bash", "-c", limit], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert full.returncode == 6 and "Traceback" not in full.stderr, full.stderr
    said = full.stderr.splitlines()[-1]
    assert str(tmp_path / "out") in said and "File too large (" in said and " free" in said
    assert not list((tmp_path / "out").rglob(".tmp-*"))
    assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=300).returncode == 0
    jaxsub_verify = [sys.executable, "-m", "jaxsub", "verify", str(tmp_path / "out")]
    assert subprocess.run(jaxsub_verify, cwd=ROOT, capture_output=True, timeout=300).returncode == 0
