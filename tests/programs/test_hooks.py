"""Code of the user's own: where its file is, and what it is called with."""

import zipfile

import pytest

from jaxsub import errors, plugins
from jaxsub.optimizers import dct_adamw
from jaxsub.pipelines import hooks, train_setup


def test_code_in_an_archive_has_a_digest(tmp_path, monkeypatch):
    found = []
    for text in ("def loss(weights): return 0\n", "def loss(weights): return 1\n"):
        path, name = tmp_path / f"code{len(found)}.zip", f"zipped_hook_{len(found)}"
        with zipfile.ZipFile(path, "w") as file:
            file.writestr(f"{name}.py", text)
        monkeypatch.syspath_prepend(str(path))
        found.append(hooks.digest("loss", f"{name}:loss"))
    assert all(map(len, found)) and found[0] != found[1]


def test_code_whose_file_is_gone_has_no_digest(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "gone_hook.py").write_text("def loss(weights): return 0\n")
    assert hooks.digest("loss", "gone_hook:loss")
    (tmp_path / "gone_hook.py").unlink()
    assert hooks.digest("loss", "gone_hook:loss") == ""


def test_functions_that_make_a_network_get_the_tasks_outputs(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    lines = [
        "import functools",
        "from jaxsub.models import mlp",
        "def make(outputs): return mlp.Model(outputs=outputs)",
    ]
    (tmp_path / "made_hook.py").write_text("\n".join([*lines, "bound = functools.partial(make, outputs=3)"]))
    task = plugins.load("tasks", "digits")
    assert train_setup.module_of("made_hook:make", task, option="calibrate_model").outputs == task.OUTPUTS
    assert train_setup.module_of("made_hook:bound", task).outputs == 3


def test_unknown_bases_are_refused():
    with pytest.raises(errors.ConfigError, match="dct2, dct3, identity"):
        dct_adamw.make(0.1, kind="dct4")
