"""Every experiment file freezes into its program's Config, and the command in its docstring parses."""

import ast
import importlib
import pathlib
import re
import shlex

import pytest

from jaxsub import cli, config
from jaxsub.cli import flags
from jaxsub.pipelines import merge_bench

ROOT = pathlib.Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "configs").glob("*.py"))


def command(path):
    """The words of the command in a file's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    found = re.search(r"^\s*(jaxsub .+)$", text, re.MULTILINE)
    assert found, f"{path.name}: no command in the docstring"
    return shlex.split(found[1])


def test_there_are_experiments():
    assert FILES


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_experiment_freezes(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    _, program, *arguments = command(path)
    assert program in cli.PROGRAMS
    parsed = flags.Flags(program, importlib.import_module(f"jaxsub.cli.{program}").config_class(), ["", *arguments])
    found = parsed.freeze()
    bench = getattr(found, "bench", "")  # a file of its own kind
    spec = bench or parsed.values["config"].value
    assert f"configs/{path.name}" in spec and parsed.workdir
    assert merge_bench.load(spec) if bench else config.freeze(type(found), config.load_file(spec)) == found


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_experiment_says_what_it_asks_and_what_to_expect(path):
    text = ast.get_docstring(ast.parse(path.read_text()))
    assert "?" in text.splitlines()[0]
    assert "not run yet" in text or re.search(r"\d+ (s|min|h)\b", text)


def test_argument_reaches_the_config(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert config.load_file("configs/analyze_default.py:elsewhere")["collection"] == ("elsewhere",)
