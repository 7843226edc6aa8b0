"""The command as a user meets it: help, flags, exit codes, signals."""

import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxsub import cli, errors
from jaxsub.cli import flags
from jaxsub.formats import safetensors

ROOT = pathlib.Path(__file__).resolve().parents[2]


def jaxsub(*arguments, **options):
    command = [sys.executable, "-m", "jaxsub", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, **options)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for i in range(6):
        safetensors.write(folder / f"m{i}.safetensors", {"w": np.full((2, 3), i, np.float32)})
    return folder


# Programs and help


def test_overview_lists_the_programs_and_their_modules_exist():
    shown = jaxsub("--help")
    assert shown.returncode == 0 and jaxsub().stdout == shown.stdout
    for program in cli.PROGRAMS:
        assert f"  {program} " in shown.stdout
        assert (ROOT / "jaxsub" / "cli" / f"{program}.py").exists()
    assert {p.stem for p in (ROOT / "jaxsub" / "cli").glob("[a-z]*.py")} - {"flags"} == {*cli.PROGRAMS}


def test_version():
    import jaxsub as package

    assert jaxsub("--version").stdout.strip() == package.__version__


def test_unknown_program_names_the_nearest():
    found = jaxsub("anlyze")
    assert found.returncode == 2 and "did you mean 'analyze'" in found.stderr and not found.stdout


def test_help_names_every_option():
    from jaxsub.pipelines import analyze

    found = jaxsub("analyze", "--help")
    assert found.returncode == 0 and not found.stderr
    for field in dataclasses.fields(analyze.Config):
        assert flags.RENAMED.get(field.name, field.name) in found.stdout
    for flag in ("--collection=", "--workdir=", "--config=", "--debug", "--allow_root=", "--dry_run"):
        assert f"  {flag} " in found.stdout


def seconds(code):
    """Fewest seconds of three runs of Python code in a process of its own."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
        times.append(time.perf_counter() - start)
    return min(times)


@pytest.mark.slow
def test_help_is_quick():
    entry = "import sys; from jaxsub import cli; cli.entry({})"
    empty = seconds("")
    assert seconds(entry.format(["jaxsub", "--help"])) - empty < 0.15
    assert seconds(entry.format(["jaxsub", "analyze", "--help"])) - empty < 0.5


# Flags: parsed in this process


@dataclasses.dataclass(frozen=True)
class Inner:
    rank: int = 4


@dataclasses.dataclass(frozen=True)
class Options:
    collection: tuple[str, ...] = ()  # folders
    layers: tuple[str, ...] = ()
    allow_roots: tuple[str, ...] = ()
    seed: int = 0
    strict: bool = False
    inner: Inner = dataclasses.field(default_factory=Inner)


def parsed(*arguments):
    return flags.Flags("toy", Options, ["toy", *arguments]).freeze()


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ([], Options()),
        (["--seed=3"], Options(seed=3)),
        (["--config.seed=3"], Options(seed=3)),
        (["--config.seed", "3"], Options(seed=3)),
        (["--seed=-3"], Options(seed=-3)),
        (["--strict"], Options(strict=True)),
        (["--nostrict"], Options(strict=False)),
        (["--config.strict=true"], Options(strict=True)),
        (["--collection=a,b", "--collection=c"], Options(collection=("a,b", "c"))),
        (["--config.collection=a,b"], Options(collection=("a", "b"))),
        (["--layers=w{1,2}$"], Options(layers=("w{1,2}$",))),
        (["--allow_root=/x", "--allow_root=/y"], Options(allow_roots=("/x", "/y"))),
        (["--config.inner.rank=9"], Options(inner=Inner(rank=9))),
    ],
)
def test_flags_set_fields(arguments, wanted):
    assert parsed(*arguments) == wanted


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--sed=3"], "unknown flag --sed; did you mean '--seed'?"),
        (["--config.inner.rnak=3"], "did you mean '--config.inner.rank'?"),
        (["--rank=3"], "unknown flag --rank"),
        (["--seed=x"], "option seed: an integer expected, 'x' found"),
        (["--seed=1.5"], "option seed: an integer expected"),
        (["--strict=perhaps"], "strict"),
        (["--seed=1", "--config.seed=2"], "--config.seed and --seed set the same option"),
        (["--seed"], "seed"),
        (["models"], "unexpected 'models'"),
        (["--workdir="], "--workdir is empty"),
        (["--config=none.json"], "none.json: no such configuration file"),
    ],
)
def test_flags_that_are_refused(arguments, said):
    with pytest.raises(errors.ConfigError) as caught:
        parsed(*arguments)
    assert said in str(caught.value)


def test_flags_override_the_file_wherever_it_stands(tmp_path):
    file = tmp_path / "x.json"
    file.write_text('{"seed": 1, "inner": {"rank": 7}, "layers": ["a"]}')
    wanted = Options(seed=2, inner=Inner(rank=7), layers=("a",))
    assert parsed("--seed=2", f"--config={file}") == parsed(f"--config={file}", "--seed=2") == wanted
    assert parsed(f"--config={file}", "--config.inner.rank=8").inner.rank == 8


def test_python_file_beside_or_among_models_is_not_run(tmp_path, monkeypatch, models):
    monkeypatch.chdir(tmp_path)
    text = "HANDLE = open('ran', 'w')\ndef get_config():\n    return {}\n"
    for folder, name in ((models / "code", "x.py"), (models, "y.py")):
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(text)
        with pytest.raises(errors.ConfigError, match="is not run"):
            parsed(f"--config={folder / name}", f"--collection={models}")
        (folder / name).unlink()
    (models / "z.py").write_text(text)
    with pytest.raises(errors.ConfigError, match="is not run"):
        parsed(f"--config={models / 'z.py'}")
    (models / "z.py").unlink()
    assert not os.path.exists("ran")


# Exit codes


def test_wrong_usage_is_2_with_one_line_and_no_traceback(models):
    for arguments in (["inspect"], ["inspect", f"--colection={models}"], ["inspect", "--config.match=3", "x"]):
        found = jaxsub(*arguments)
        assert found.returncode == 2 and not found.stdout
        assert found.stderr.startswith("jaxsub inspect: ") and found.stderr.count("\n") == 1


def test_refused_inputs_are_4_and_debug_shows_the_traceback(tmp_path):
    found = jaxsub("inspect", f"--collection={tmp_path}/none")
    assert found.returncode == 4 and "none: no such file or folder" in found.stderr
    assert "Traceback" not in found.stderr
    assert "Traceback" in jaxsub("inspect", f"--collection={tmp_path}/none", "--debug").stderr


def raising(exception, setup=""):
    """Runs `jaxsub inspect` with a pipeline that raises."""
    code = (
        f"import errno\nfrom jaxsub import cli, errors\nfrom jaxsub.pipelines import inspect\n{setup}\n"
        f"def run(*_, **__):\n    raise {exception}\ninspect.run = run\ncli.entry(['jaxsub', 'inspect'])"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)


@pytest.mark.parametrize(
    ("exception", "status", "said"),
    [
        ("errors.ConfigError('a')", 2, "jaxsub inspect: a"),
        ("errors.InputError('f', 'broken', key='k')", 4, "f, k: broken"),
        ("errors.WorkdirError('in use')", 5, "in use"),
        ("errors.ResourceError('too large')", 6, "too large"),
        ("MemoryError()", 6, "out of memory"),
        ("OSError(errno.ENOSPC, 'No space left on device', 'out/x')", 6, "out/x: No space left on device"),
        ("RuntimeError('RESOURCE_EXHAUSTED: 3 GiB')", 6, "out of memory"),
        ("KeyError('\\x1b[2J')", 70, "bug in jaxsub (KeyError: '\\\\x1b[2J' at <string>:6)"),
        ("KeyboardInterrupt()", 130, "interrupted"),
    ],
)
def test_exit_status_of_each_error(exception, status, said):
    found = raising(exception)
    assert (found.returncode, found.stdout) == (status, "")
    assert said in found.stderr and "Traceback" not in found.stderr and "\x1b" not in found.stderr


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_with_a_message_after_cleaning_up(number, status):
    code = (
        "import sys, time\nfrom jaxsub import cli\nfrom jaxsub.pipelines import inspect\n"
        "def run(*_, **__):\n    try:\n        print('ready', flush=True); time.sleep(60)\n"
        "    finally:\n        print('cleaned', flush=True)\n"
        "inspect.run = run\ncli.entry(['jaxsub', 'inspect'])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout.readline() == "ready\n"
    start = time.monotonic()
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert time.monotonic() - start < 2
    assert (process.returncode, out) == (status, "cleaned\n")
    assert err.count("\n") == 1 and "nothing of it is kept" in err


@pytest.mark.parametrize(
    ("name", "said"), [("jaxsub.cli._run", "stopped before it began"), ("swallows", "inspect: interrupted; nothing")]
)
def test_an_interruption_while_modules_are_imported_ends_the_program(tmp_path, name, said):
    """Some modules take any exception in their import for a missing library, and go on without it."""
    (tmp_path / "swallows.py").write_text("try:\n    import other\nexcept BaseException:\n    pass\n")
    (tmp_path / "other.py").write_text("")
    code = (
        "import os, signal, sys\nfrom jaxsub import cli\n"
        "class Finder:\n    def find_spec(self, name, *_):\n"
        f"        if name == {name.replace('swallows', 'other')!r}:\n            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        + (
            "import jaxsub.pipelines.inspect as i\ni.run = lambda *_, **__: __import__('swallows')\n"
            * (name == "swallows")
        )
        + "cli.entry(['jaxsub', 'inspect'])\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 130 and said in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])  # Python writes at the end, or at once
def test_reader_of_the_output_may_leave(models, unbuffered):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "jaxsub", "inspect", f"--collection={models}"]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    found = subprocess.run(
        command, stdout=write, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=60, env=environment
    )
    os.close(write)
    assert found.returncode == 141 and not found.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["merge"])  # it imports jax with its configuration
def test_compiled_kernels_are_kept_whatever_a_program_imports(name, tmp_path):
    script = (
        "import contextlib\nfrom jaxsub.cli import _run\n"
        f"with contextlib.suppress(SystemExit): _run.program({name!r}, [{name!r}, '--help'])\n"
        "import jax\nprint(jax.config.jax_compilation_cache_dir)"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")} | {"XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", script]
    found = subprocess.run(command, env=env, capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.splitlines()[-1].startswith(str(tmp_path))


def test_calibration_of_projections_has_a_short_flag():
    from jaxsub.pipelines import project

    assert (
        flags.Flags("jaxsub project", project.Config, ["jaxsub project", "--calibrate=digits"]).freeze().calibrate
        == "digits"
    )


def test_paths_are_taken_as_they_are_meant(monkeypatch):
    """A slash at the end is no other collection; shells leave a ~ behind = as it is."""
    from jaxsub.pipelines import merge

    monkeypatch.setenv("HOME", "/home/ann")
    given = [
        "--collection=models/",
        "--collection=~/more//b",
        "--base=./base/",
        "--out=~",
        "--weights=.5,2",
        "--weights=1",
    ]
    found = flags.Flags("merge", merge.Config, ["merge", *given, "--workdir=out/"])
    config = found.freeze()
    assert config.collection == ("models", "/home/ann/more/b") and config.base == "base" and config.out == "/home/ann"
    assert found.workdir == "out"
