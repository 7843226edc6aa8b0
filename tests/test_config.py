"""Dataclasses as schema: what freeze takes and refuses, what configuration files may be."""

import dataclasses
import json
import os
import subprocess
import sys
import typing

import pytest

from jaxsub import config, errors


@dataclasses.dataclass(frozen=True)
class Inner:
    rank: int = 8  # components kept
    method: typing.Literal["gram", "svd"] = "gram"


@dataclasses.dataclass(frozen=True)
class Options:
    names: tuple[str, ...] = ()  # patterns # with a sign in them
    rate: float = 0.5
    seed: int = 0
    quiet: bool = False
    label: str | None = None
    sizes: tuple[int, ...] = (1, 2)
    inner: Inner = dataclasses.field(default_factory=Inner)


def test_defaults_nested_and_dotted():
    assert config.freeze(Options, {}) == Options()
    wanted = Options(names=("a",), rate=1.0, inner=Inner(rank=3))
    assert config.freeze(Options, {"names": ["a"], "rate": 1, "inner": {"rank": 3}}) == wanted
    assert config.freeze(Options, {"names": ("a",), "rate": 1.0, "inner.rank": 3}) == wanted
    assert type(config.freeze(Options, {"rate": 1}).rate) is float


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"sed": 1}, "unknown option sed; did you mean 'seed'?"),
        ({"inner": {"rnak": 1}}, "unknown option inner.rnak; did you mean 'inner.rank'?"),
        ({"inner.rnak": 1}, "did you mean 'inner.rank'?"),
        ({"seed": True}, "option seed: an integer expected, True found"),
        ({"seed": 1.0}, "option seed: an integer expected, 1.0 found"),
        ({"seed": "1"}, "option seed: an integer expected"),
        ({"quiet": 1}, "option quiet: true or false expected, 1 found"),
        ({"rate": float("nan")}, "option rate: nan is not a finite number"),
        ({"rate": float("inf")}, "not a finite number"),
        ({"rate": True}, "option rate: a number expected"),
        ({"names": "abc"}, "option names: a list (text each) expected"),
        ({"sizes": [1, True]}, "option sizes[1]: an integer expected"),
        ({"label": 3}, "option label: text expected"),
        ({"inner": 3}, "option inner: a group of options expected"),
        ({"inner": {"method": "grma"}}, "did you mean 'gram'?"),
        ({"inner": {"rank": 1}, "inner.rank": 2}, "given twice"),
        ({3: 4}, "names are text"),
    ],
)
def test_refusals_name_the_option(given, said):
    with pytest.raises(errors.ConfigError) as caught:
        config.freeze(Options, given)
    assert said in str(caught.value)


def test_digest_depends_on_values_alone():
    base = config.digest(Options())
    assert base == config.digest(config.freeze(Options, {"seed": 0, "inner": {"rank": 8}}))
    changed = [Options(seed=1), Options(names=("0",)), Options(inner=Inner(rank=9)), Options(quiet=True)]
    assert len({base, *map(config.digest, changed)}) == 5
    code = "from tests import test_config as t; print(t.config.digest(t.Options()))"
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=root)
    assert found.stdout.strip() == base


def test_to_dict_is_json_and_comes_back():
    options = Options(names=("a", "b"), inner=Inner(method="svd"))
    plain = config.to_dict(options)
    assert plain["names"] == ["a", "b"] and plain["inner"] == {"rank": 8, "method": "svd"}
    assert config.freeze(Options, json.loads(json.dumps(plain))) == options


def test_fields_have_paths_types_defaults_and_the_comments_as_help():
    fields = config.fields(Options)
    assert list(fields) == ["names", "rate", "seed", "quiet", "label", "sizes", "inner.rank", "inner.method"]
    assert (fields["inner.rank"].default, fields["inner.rank"].help) == (8, "components kept")
    assert fields["seed"].help == ""


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("seed", "-3", -3),
        ("rate", "1e-2", 0.01),
        ("quiet", "True", True),
        ("quiet", "no", False),
        ("label", "none", None),
        ("label", "None of these", "None of these"),
        ("names", "a,b", ("a", "b")),
        ("names", "", ()),
        ("names", '["a{1,2}", "b"]', ("a{1,2}", "b")),
        ("names", "(a|b)$", ("(a|b)$",)),
        ("sizes", "(3,4,5)", (3, 4, 5)),
        ("sizes", "7", (7,)),
        ("inner.method", "svd", "svd"),
    ],
)
def test_text_of_the_command_line(path, text, value):
    assert config.parse(config.fields(Options)[path], text) == value


@pytest.mark.parametrize(
    ("path", "text"),
    [("seed", "1.5"), ("seed", ""), ("rate", "nan"), ("rate", "x"), ("quiet", "maybe"), ("sizes", "1,x"),
     ("sizes", "[1"), ("inner.method", "qr")],
)  # fmt: skip
def test_text_that_is_no_value(path, text):
    with pytest.raises(errors.ConfigError, match=path):
        config.parse(config.fields(Options)[path], text)


# Files


def load(tmp_path, name, text, suffix="", **options):
    (tmp_path / name).write_text(text)
    return config.load_file(str(tmp_path / name) + suffix, **options)


def refusal(tmp_path, name, text, **options):
    with pytest.raises(errors.ConfigError) as caught:
        load(tmp_path, name, text, **options)
    return str(caught.value)


def test_json_file(tmp_path):
    assert load(tmp_path, "x.json", '{"seed": 3, "inner": {"rank": 2}}') == {"seed": 3, "inner": {"rank": 2}}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"energy": NaN}', "option energy is nan"),
        ('{"a": {"energy": [1, 1e999]}}', "option energy is inf"),
        ('{"rank": 1, "rank": 2}', "option rank stands twice"),
        ('{"rank": 1', "no JSON"),
        ("[1]", "an object of options expected, list found"),
        ("[" * 100_000, "no configuration"),
    ],
    ids=["nan", "overflow", "twice", "cut", "list", "deep"],
)
def test_json_that_is_refused(tmp_path, text, said):
    message = refusal(tmp_path, "x.json", text)
    assert said in message and "x.json" in message


def test_yaml_is_refused_with_its_options_and_what_to_use(tmp_path):
    message = refusal(tmp_path, "run.yaml", "rank: 8\nseed: 1\nrank: 64\n")
    assert all(part in message for part in ("run.yaml", "rank stands twice", "seed", ".json", "get_config"))


def test_python_file_with_argument(tmp_path):
    text = '"""About."""\nimport math\nSEED = 4\ndef get_config(seed="3"):\n    return {"seed": int(seed)}\n'
    assert load(tmp_path, "x.py", text) == {"seed": 3}
    assert load(tmp_path, "x.py", text, ":17") == {"seed": 17}


def test_python_file_may_return_a_config_dict_or_the_dataclass(tmp_path):
    text = "from jaxsub import config\nfrom tests.test_config import Options\ndef get_config():\n    return {}\n"
    for value in ("config.default(Options, seed=5)", "Options(seed=5)"):
        found = load(tmp_path, "x.py", text.format(value))
        assert config.freeze(Options, found) == Options(seed=5)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("open('ran', 'w')\nrank = 8\n", "defines no get_config"),
        ("open('ran', 'w')\ndef get_config():\n    return {}\n", "imports, constants and functions"),
        ("def get_config(:\n", "no Python"),
        ("def get_config():\n    return 3\n", "returned int"),
    ],
)
def test_python_that_is_no_configuration_is_not_run(tmp_path, monkeypatch, body, said):
    monkeypatch.chdir(tmp_path)
    assert said in refusal(tmp_path, "x.py", body)
    assert not os.path.exists("ran")


def test_python_file_among_models_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    text = "HANDLE = open('ran', 'w')\ndef get_config():\n    return {}\n"
    message = refusal(tmp_path / "models", "x.py", text, forbidden=[str(tmp_path / "models")])
    assert "is not run" in message and not os.path.exists("ran")
    (tmp_path / "link.py").symlink_to(tmp_path / "models" / "x.py")
    with pytest.raises(errors.ConfigError, match="is not run"):
        config.load_file(str(tmp_path / "link.py"), forbidden=[str(tmp_path / "models")])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def get_config():\n    raise ValueError('x\\x1b')\n", r"get_config: ValueError: x\x1b"),
        ("def get_config():\n    return 1 / 0\n", "ZeroDivisionError"),
        ("import no_such_module\ndef get_config():\n    return {}\n", "no_such_module"),
        ("X = {}['a']\ndef get_config():\n    return {}\n", "KeyError"),
    ],
)
def test_what_a_python_file_raises_is_its_own_fault(tmp_path, text, said):
    message = refusal(tmp_path, "x.py", text)
    assert said in message and "x.py" in message


def test_flag_files_stand_for_their_lines(tmp_path):
    (tmp_path / "a").write_text(f"# one\n--x=1\n\n// two\n--flagfile={tmp_path / 'b'}\n--y\n")
    (tmp_path / "b").write_text("--z=a b\n")
    flag = f"--flagfile={tmp_path / 'a'}"
    wanted = ["p", "--x=1", "--z=a b", "--y", "--w"]
    assert config.arguments_of(["p", flag, "--w"]) == wanted
    assert config.arguments_of(["p", *flag.split("="), "--w"]) == wanted
    assert config.arguments_of(["p", "--", flag]) == ["p", "--", flag]


def test_flag_files_that_are_refused(tmp_path):
    (tmp_path / "a").write_text(f"--flagfile={tmp_path / 'b'}\n")
    (tmp_path / "b").write_text(f"--flagfile={tmp_path / 'a'}\n")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    (tmp_path / "large").write_bytes(b"#" * (config.MAX_FILE_BYTES + 1))
    os.mkfifo(tmp_path / "pipe")
    for name, words in {
        "a": "leads back",
        "bytes": "not UTF-8",
        "large": "larger",
        "pipe": "no such",
        "x": "no such",
    }.items():
        with pytest.raises(errors.ConfigError, match=words) as caught:
            config.arguments_of(["p", f"--flagfile={tmp_path / name}"])
        assert str(tmp_path / name) in str(caught.value)


def test_other_files_are_refused(tmp_path):
    assert "get_config" in refusal(tmp_path, "x.toml", "")
    with pytest.raises(errors.ConfigError, match="no such configuration file"):
        config.load_file(str(tmp_path / "none.json"))
    (tmp_path / "b.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(errors.ConfigError, match="not UTF-8 text at byte 7"):
        config.load_file(str(tmp_path / "b.json"))
