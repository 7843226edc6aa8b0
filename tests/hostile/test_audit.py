"""Reading the corpus executes, imports, sends and opens nothing: every event of the interpreter is looked at."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.figures_log import record
from tests.hostile import corpus

ROOT = pathlib.Path(__file__).resolve().parents[2]
CHILD = """
import json, os, sys
folder, empty, entries, extra = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), sys.argv[4]
sys.path = [p for p in sys.path if p]
from jaxsub import collection, errors, formats, lineup, plugins
import encodings.idna, h5py, tensorstore
for name in plugins.available("formats"):
    plugins.load("formats", name)  # making their dataclasses compiles code of the standard library
os.chdir(empty)
allowed = tuple(os.path.realpath(p) + os.sep for p in (sys.prefix, sys.base_prefix, os.environ["PYTHONPATH"]))
allowed += tuple(os.path.realpath(p) + os.sep for p in sys.path if os.path.isdir(p))
inside, seen, opened = os.path.realpath(folder) + os.sep, [], [0]
FORBIDDEN = (
    "subprocess", "socket", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.remove", "os.rename",
    "os.mkdir", "os.symlink", "os.link", "os.chmod", "os.truncate", "os.putenv", "pickle", "urllib", "ctypes.dlopen",
    "shutil", "webbrowser", "http", "ftplib", "smtplib", "function.__new__",
)
def hook(event, arguments):
    if not on:
        return
    if event == "open":
        opened[0] += 1
        path, _, flags = arguments
        path = os.path.realpath(os.fsdecode(path)) if isinstance(path, (str, bytes)) else str(path)
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes or not path.startswith((inside, *allowed)):
            seen.append([event, path])
    elif event in ("exec", "compile"):
        name = getattr(arguments[0], "co_filename", arguments[-1])
        known = str(name).startswith(allowed) or str(name).startswith("<frozen")
        if not known:
            seen.append([event, str(name)])
    elif event == "import":
        name = arguments[1]
        if name and not os.path.realpath(name).startswith(allowed):
            seen.append([event, str(name)])
    elif event.startswith(FORBIDDEN):
        seen.append([event, repr(arguments)[:100]])
on = False
sys.addaudithook(hook)
def look(path):
    try:
        model = formats.open_model(path)
        pairs = [t for p in model.adapters.values() for t in (p.a, p.b)]
        for tensor in [*model.tensors.values(), *pairs]:
            if tensor.num_bytes < 1 << 24:
                formats.read(model, tensor)
        return "accept"
    except errors.InputError as error:
        return "reject"
on = True
found = {}
for entry in entries:
    path = os.path.join(folder, entry)
    found[entry] = look(path)
    try:
        collection.open_collection(path, check=False)
    except (errors.InputError, errors.ConfigError):
        pass
if extra == "pickle":
    import pickle
    pickle.loads(b"cos\\ngetcwd\\n.")
if extra == "open":
    open("/etc/hostname").close()
if extra == "exec":
    exec("1")
on = False
print(json.dumps({"seen": seen, "found": found, "opened": opened[0], "left": os.listdir(empty)}))
"""


def run(folder, empty, entries, extra=""):
    empty.mkdir(exist_ok=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", CHILD, str(folder), str(empty), json.dumps(entries), extra]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.skipif(corpus.archive() is None, reason="the corpus is not here")
def test_nothing_but_the_inputs_is_opened_and_nothing_runs(tmp_path):
    folder = corpus.unpack(tmp_path / "c")
    entries = [case["entry"] for case in corpus.cases("file", "model", "collection")]
    result = run(folder, tmp_path / "empty", entries)
    record(
        "AUDIT",
        "forbidden events, opens looked at, inputs",
        f"{len(result['seen'])}, {result['opened']}, {len(entries)}",
    )
    assert result["seen"] == [] and result["left"] == []
    assert not list(tmp_path.rglob("*.marker"))
    assert result["opened"] > len(entries)
    wanted = {c["entry"]: {c["expect"], *c["also_ok"]} for c in corpus.cases("file", "model")}
    for entry, verdicts in wanted.items():
        assert result["found"][entry] in {"reject" if v == "quarantine" else v for v in verdicts}, entry


@pytest.mark.slow
@pytest.mark.parametrize(("extra", "event"), [("pickle", "pickle.find_class"), ("open", "open"), ("exec", "exec")])
def test_the_hook_sees_what_it_should(tmp_path, extra, event):
    (tmp_path / "c").mkdir()
    assert event in [name for name, _ in run(tmp_path / "c", tmp_path / "empty", [], extra)["seen"]]
