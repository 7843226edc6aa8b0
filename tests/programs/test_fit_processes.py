"""One fit as several processes: the bundle of one process to the bit, whole layers each, and one end for all."""

import functools
import json
import os
import time
import types

import numpy as np
import pytest

from jaxsub.formats import peft, safetensors
from jaxsub.pipelines import fit_plan
from tests.folders import contents
from tests.programs import processes

NAMES = tuple(f"l{n}" for n in range(6))
TWO_DEVICES = "import os; os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=2'\n"
STREAMED = """
from jaxsub.pipelines import fit_streamed
fit_streamed.allowed, fit_streamed._require_memory = lambda _: 1, lambda *_: None
fit_streamed.block_bytes = lambda _: 10 * 20 * 4 * 9
"""
LOGGED = """
from jaxsub.cli import _run
_run.keep_compiled_kernels()  # before jax is imported
import time, jaxsub.pipelines.fit_layer as module
real = module.fit
def logged(group, *rest):
    with open({path!r}, "a") as file:
        file.write(group.name + "\\n")
    time.sleep({seconds})
    return real(group, *rest)
module.fit = logged
"""


def write(path, count=10, bad=()):
    """Models of six layers of one size, which are dealt in turn, and a small one; `bad`: (model, layer) with a NaN."""
    rng = np.random.default_rng(0)
    os.makedirs(path)
    for n in range(count):
        tensors = {name: rng.standard_normal((30, 20)).astype(np.float32) for name in NAMES}
        tensors["small"] = rng.standard_normal(33).astype(np.float32)
        for model, name in bad:
            if n == model:
                tensors[name][3, 3] = np.nan
        safetensors.write(os.path.join(path, f"m{n:02d}.safetensors"), tensors)
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("several") / "models")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    path, rng = tmp_path_factory.mktemp("adapters"), np.random.default_rng(1)
    for n in range(8):
        pairs = {m: [rng.standard_normal(s).astype(np.float32) for s in ((2, 37), (21, 2))] for m in "kqv"}
        peft.write(path / f"m{n}", {m: (a, b, 4, 2) for m, (a, b) in pairs.items()})
    return str(path)


@pytest.fixture(scope="module")
def alone(request, tmp_path_factory):
    """alone(kind) gives the bundle's files as one process writes them."""

    @functools.cache
    def made(kind):
        place = tmp_path_factory.mktemp("alone")
        collection, options, before = KINDS[kind]
        given = (f"--collection={request.getfixturevalue(collection)}", f"--workdir={place}", *options)
        assert [e.code for e in processes.run(1, "fit", *given, before={0: before})] == [0]
        return contents(place / "bundle")

    return made


KINDS = {
    "dense": ("folder", ("--rank=3",), ""),
    "lora": ("adapters", ("--rank=2",), ""),
    "tucker": ("folder", ("--decomposition=hosvd", "--energy=0.8", "--exclude_layers=l[45]", "--max_error=0.5"), ""),
    "budget": ("folder", ("--budget_bytes=45000",), ""),
    "streamed": ("folder", ("--rank=3",), TWO_DEVICES + STREAMED),
}


def lines(path):
    return path.read_text().split() if path.exists() else []


@pytest.mark.parametrize(
    ("sizes", "count", "wanted"),
    [
        ([5, 5, 5, 5], 2, [0, 1, 0, 1]),
        ([1, 2, 9, 3, 3], 2, [1, 1, 0, 1, 1]),
        ([3, 1, 3, 1], 3, [0, 2, 1, 2]),
        ([4, 4], 3, [0, 1]),
        ([7, 0, 7], 1, [0, 0, 0]),
        ([], 2, []),
    ],
)
def test_layers_are_dealt_by_bytes_the_largest_first(sizes, count, wanted):
    assert fit_plan.deal([types.SimpleNamespace(num_bytes=size) for size in sizes], count) == wanted


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_the_bundle_is_that_of_one_process(kind, count, request, alone, tmp_path):
    collection, options, before = KINDS[kind]
    given = ("fit", f"--collection={request.getfixturevalue(collection)}", f"--workdir={tmp_path / 'out'}", *options)
    logs = [tmp_path / str(process) for process in range(count)]
    hooks = {p: before + LOGGED.format(path=str(log), seconds=0) for p, log in enumerate(logs)}
    ended = processes.run(count, *given, before=hooks)
    assert [e.code for e in ended] == [0] * count, ended[-1].stderr
    assert "bundle: " in ended[0].stdout and not any(e.stdout for e in ended[1:])
    assert contents(tmp_path / "out" / "bundle") == alone(kind)
    assert sorted(os.listdir(tmp_path / "out")) == [".jaxsub.lock", "bundle", "run.json"]
    fitted = [lines(log) for log in logs]
    assert all(fitted) or len({*sum(fitted, [])}) < count
    if kind != "budget":  # which fits again at other ranks
        assert len(sum(fitted, [])) == len({*sum(fitted, [])})
    again = processes.run(count, *given, before=hooks)
    assert [e.code for e in again] == [0] * count and again[0].stdout == ended[0].stdout
    assert "there already" in again[0].stderr and [lines(log) for log in logs] == fitted


@pytest.mark.slow
def test_a_plan_is_shown_once_and_says_how_many_share_it(folder):
    ended = processes.run(2, "fit", f"--collection={folder}", "--rank=3", "--dry_run")
    assert [e.code for e in ended] == [0, 0] and not ended[1].stdout
    share = (3 * 30 * 20 + 33) * 10 * 4 / 1024
    assert f"2 processes share the layers, each fits whole ones: one reads {share:.1f} KiB at most" in ended[0].stdout
    assert all(len(line) <= 100 for line in ended[0].stdout.splitlines())


@pytest.mark.slow
def test_models_with_nan_are_set_aside_by_all_as_one_process_does(tmp_path):
    """l0, l2, l4 are process 0's; process 1 is slow, goes on to l3, whose NaN comes first, and never fits l5 for it."""
    folder = write(tmp_path / "models", bad=((3, "l0"), (5, "l4"), (7, "l3")))
    given = ("fit", f"--collection={folder}", "--rank=2", "--max_quarantined=3")
    assert processes.run(1, *given, f"--workdir={tmp_path / 'one'}")[0].code == 0
    logs = [tmp_path / str(process) for process in range(2)]
    hooks = {p: LOGGED.format(path=str(log), seconds=3 * p) for p, log in enumerate(logs)}
    ended = processes.run(2, *given, f"--workdir={tmp_path / 'two'}", before=hooks)
    assert [e.code for e in ended] == [0, 0], ended[-1].stderr
    assert ended[0].stdout.count("set aside m") == 3
    assert contents(tmp_path / "two" / "bundle") == contents(tmp_path / "one" / "bundle")
    manifest = json.loads((tmp_path / "two" / "bundle" / "manifest.json").read_text())
    assert [q["id"] for q in manifest["provenance"]["quarantined"]] == ["m03", "m07", "m05"]
    assert lines(logs[1]) == ["l1", "l1", "l3", "l1", "l3", "l1", "l3", "l5"]
    strict = processes.run(2, *given[:-1], "--strict", f"--workdir={tmp_path / 'strict'}")
    assert [e.code for e in strict] == [4, 4] and all("1 of 10 models set aside" in e.stderr for e in strict)


UNREADABLE = """
from jaxsub import errors, formats, reading
def read_into(extent, start, view, past_cache=False):
    raise errors.InputChangedError(extent.file.path, "cannot be read here")
reading.formats.read_into = read_into
"""


@pytest.mark.slow
@pytest.mark.parametrize("broken", [0, 1])
def test_a_file_that_one_process_cannot_read_ends_all(folder, tmp_path, broken):
    given = ("fit", f"--collection={folder}", "--rank=2", f"--workdir={tmp_path / 'out'}")
    ended = processes.run(2, *given, before={broken: UNREADABLE}, seconds=60)
    assert [e.code for e in ended] == [4, 4], ended[0].stderr
    assert "cannot be read here" in ended[broken].stderr
    assert f"process {broken} of 2: " in ended[1 - broken].stderr and "cannot be read here" in ended[1 - broken].stderr
    assert [e.code for e in processes.run(2, *given)] == [0, 0]


@pytest.mark.slow
def test_options_that_no_layer_of_one_process_can_use_do_not_claim_the_workdir(folder, tmp_path):
    given = ("fit", f"--collection={folder}", f"--workdir={tmp_path / 'out'}", "--exclude_layers=l[0-4]")
    refused = "import jaxsub.pipelines.fit_layer as f\nfrom jaxsub import errors\n"
    refused += "def fit(*_):\n    raise errors.ConfigError('no such rank')\nf.fit = fit\n"
    ended = processes.run(2, *given, "--rank=2", before={1: refused})
    assert [e.code for e in ended] == [2, 2] and "process 1 of 2: no such rank" in ended[0].stderr
    assert [e.code for e in processes.run(2, *given, "--rank=1")] == [0, 0]


ELSEWHERE = "import sys; sys.argv = [a.replace('/out', '/elsewhere') for a in sys.argv]\n"
ANOTHER_RANK = "import sys; sys.argv = [a.replace('=2', '=3') if 'rank' in a else a for a in sys.argv]\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hook", "said"),
    [(ELSEWHERE, "process 1 does not see what process 0 wrote"), (ANOTHER_RANK, "sees another set of options")],
)
def test_processes_that_cannot_meet_are_refused(folder, tmp_path, hook, said):
    given = ("fit", f"--collection={folder}", "--rank=2", f"--workdir={tmp_path / 'out'}")
    ended = processes.run(2, *given, before={1: hook}, seconds=60)
    assert [e.code for e in ended] == [2, 2] and all(said in e.stderr for e in ended), ended[0].stderr
    assert not (tmp_path / "elsewhere").exists()
    assert [e.code for e in processes.run(2, *given)] == [0, 0]


PYTHON = """
import sys, jaxsub
from jaxsub import errors
given = dict(a[2:].split("=") for a in sys.argv[1:] if "=" in a)
joined = dict(coordinator=given["coordinator"], num_processes=2, process_id=int(given["process_id"]))
try:
    found = jaxsub.fit(given["collection"], given.get("path"), rank=3, **joined)
except errors.ConfigError as error:
    sys.exit(str(error))
sys.exit(0 if (found is None) == (given["process_id"] == "1") else "no bundle of process 0 alone")
"""


@pytest.mark.slow
def test_the_function_needs_a_place(folder, alone, tmp_path):
    hooks = dict.fromkeys(range(2), PYTHON)
    ended = processes.run(2, f"--collection={folder}", before=hooks)
    assert all(e.code and "several processes meet in the workdir" in e.stderr for e in ended)
    ended = processes.run(2, f"--collection={folder}", f"--path={tmp_path / 'b'}", before=hooks)
    assert [e.code for e in ended] == [0, 0], ended[0].stderr
    assert os.listdir(tmp_path) == ["b"] and contents(tmp_path / "b") == alone("dense")
    ended = processes.run(2, "fit", f"--collection={folder}", "--rank=3")
    assert [e.code for e in ended] == [2, 2] and all("--workdir" in e.stderr for e in ended)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_after_the_death_of_one_at_most_a_layer_of_each_is_fitted_again(folder, alone, tmp_path, killed):
    given = ("fit", f"--collection={folder}", f"--workdir={tmp_path / 'out'}", "--rank=3")
    first, second = ([tmp_path / f"{run}{process}" for process in range(2)] for run in ("first", "second"))
    slow, quick = (
        {p: LOGGED.format(path=str(log), seconds=s) for p, log in enumerate(logs)}
        for logs, s in ((first, 3), (second, 0))
    )
    started = processes.start(2, *given, before=slow, heartbeat=10)
    kept = tmp_path / "out" / "parts"
    while sum(len(lines(log)) for log in first) < 4:
        assert all(p.poll() is None for p in started)
        time.sleep(0.1)
    started[killed].kill()
    began = time.monotonic()
    codes = [p.wait(timeout=60) for p in started]
    assert all(codes) and time.monotonic() - began < 30
    for process in started:
        process.communicate()
    whole = len([name for name in os.listdir(kept) if not name.startswith(".")])
    ended = processes.run(2, *given, before=quick)
    assert [e.code for e in ended] == [0, 0], ended[0].stderr
    begun, again = [sum((lines(log) for log in logs), []) for logs in (first, second)]
    assert len(again) == len(NAMES) + 1 - whole and len({*begun} & {*again}) <= 2
    assert contents(tmp_path / "out" / "bundle") == alone("dense")


@pytest.mark.slow
def test_one_that_hangs_ends_all_and_one_that_waits_for_it_does_not(folder, tmp_path):
    """Process 0 waits longer than the timeout for process 1, whose layers come in time; then process 1 hangs."""
    given = ("fit", f"--collection={folder}", f"--workdir={tmp_path / 'out'}", "--rank=2", "--stall_timeout=20")
    hook = LOGGED.format(path=str(tmp_path / "log"), seconds=10)  # three layers
    assert [e.code for e in processes.run(2, *given, before={1: hook})] == [0, 0]
    hook = LOGGED.format(path=str(tmp_path / "log"), seconds=1000)
    ended = processes.run(2, *given, "--restart", before={1: hook}, heartbeat=10)
    assert all(e.code for e in ended) and "Timeout (0:00:20)" in ended[1].stderr and "logged" in ended[1].stderr
    assert "this is a bug" not in ended[0].stderr
