"""Dataclasses as the schema of a configuration: strict conversion from text, JSON and Python, and a digest.

    --config=FILE --config.field=text --> mapping --freeze--> instance of a frozen dataclass --digest--> sha256

A default exists once, in the dataclass. Unknown names, values of another type, booleans for integers and NaN are
errors that name the field.
"""

import ast
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import types
import typing

from jaxsub import errors

MAX_FILE_BYTES = 1 << 20  # a configuration is written by a person
_NONE = type(None)


# Dataclasses ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Field:
    """One option: `path` is dotted ("decomposition.rank"), `type` an annotation, `help` what its comment says."""

    path: str
    type: typing.Any
    default: typing.Any
    help: str = ""


def fields(cls, prefix=""):
    """Map path -> Field of every option of a dataclass, nested ones dotted, in the order they are written."""
    found = {}
    hints, comments = typing.get_type_hints(cls), _comments(cls)
    for field in dataclasses.fields(cls):
        path, hint = prefix + field.name, hints[field.name]
        if dataclasses.is_dataclass(hint):
            found |= fields(hint, path + ".")
        else:
            found[path] = Field(path, hint, _default_of(field), comments.get(field.name, ""))
    return found


def _default_of(field):
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


@functools.cache
def _comments(cls):
    """Map field -> the comment behind it in the source, which is its documentation."""
    import inspect

    try:
        source = inspect.getsource(cls)
    except (OSError, TypeError):
        return {}
    return {m[1]: m[2].strip() for m in re.finditer(r"^    (\w+): [^#\n]*#[ ]*(.+)$", source, re.MULTILINE)}


def freeze(cls, mapping):
    """An instance of a dataclass from a mapping that may be nested or have dotted keys; missing fields keep defaults.

    Args:
        cls: a dataclass; its fields are bool, int, float, str, tuple[T, ...], Literal, T | None, or dataclasses.
        mapping: names to values, as JSON, a ConfigDict or keyword arguments give them.

    Returns:
        An instance in which every value has exactly the annotated type (an int is taken for a float).

    Raises:
        ConfigError: an unknown field (names the nearest), a value of another type, NaN or infinity.
    """
    return _freeze(cls, _nested(mapping), "")


def _nested(mapping):
    """The mapping with dotted keys turned into nested mappings."""
    out = {}
    for key, value in dict(mapping).items():
        if not isinstance(key, str):
            raise errors.ConfigError(f"option {key!r}: names are text")
        *folders, last = key.split(".")
        place = out
        for folder in folders:
            place = place.setdefault(folder, {})
            if not isinstance(place, dict):
                raise errors.ConfigError(f"option {errors.quote(key)}: given as a whole and in part")
        if last in place:
            raise errors.ConfigError(f"option {errors.quote(key)} is given twice")
        place[last] = value
    return out


def _freeze(cls, mapping, prefix):
    hints = typing.get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls)]
    values = {}
    for key, value in mapping.items():
        path = prefix + key
        if key not in known:
            unknown = errors.quote(path, 80)
            raise errors.ConfigError(f"unknown option {unknown}{_nearest(path, prefix, known, cls)}")
        if dataclasses.is_dataclass(hints[key]):
            if isinstance(value, hints[key]):
                value = to_dict(value)
            if not isinstance(value, typing.Mapping):
                raise _wrong(path, "a group of options", value)
            values[key] = _freeze(hints[key], _nested(value), path + ".")
        else:
            values[key] = _checked(value, hints[key], path)
    return cls(**values)


def _nearest(path, prefix, known, cls):
    close = errors.nearest(path, [prefix + name for name in known])
    return close or f" (there are: {', '.join(prefix + f.name for f in dataclasses.fields(cls))})"


def _checked(value, hint, path):
    """`value` as the annotated type, or ConfigError."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and _NONE in arguments:
            return None
        return _checked(value, next(a for a in arguments if a is not _NONE), path)
    if origin is typing.Literal:
        if value not in arguments or isinstance(value, bool) != any(
            a is value for a in arguments if a in (True, False)
        ):
            choices = ", ".join(str(a) for a in arguments)
            raise errors.ConfigError(f"option {path}: {value!r} is none of {choices}{errors.nearest(value, arguments)}")
        return value
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, (tuple, list)):
            raise _wrong(path, describe(hint), value)
        return tuple(_checked(item, arguments[0], f"{path}[{i}]") for i, item in enumerate(value))
    return _checked_scalar(value, hint, path)


def _checked_scalar(value, hint, path):
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not hint and not (hint is str and isinstance(value, str)):
        raise _wrong(path, describe(hint), value)
    if hint is float and not math.isfinite(value):
        raise errors.ConfigError(f"option {path}: {value} is not a finite number")
    return value


def _wrong(path, wanted, value):
    return errors.ConfigError(f"option {path}: {wanted} expected, {errors.quote(repr(value), 60)} found")


def describe(hint):
    """An annotation in words: 'an integer', 'a list of text', 'exact or order'."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(a) for a in arguments)
    if origin is typing.Literal:
        return " or ".join(str(a) for a in arguments)
    if origin is tuple:
        return f"a list ({describe(arguments[0])} each)"
    words = {bool: "true or false", int: "an integer", float: "a number", str: "text", _NONE: "none"}
    return words.get(hint, str(hint))


def to_dict(config):
    """Nested dictionaries of plain JSON types, tuples as lists, in the order of the fields."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def digest(config):
    """sha256, in hex, of the canonical JSON of a config dataclass: equal options, equal digest, on any machine."""
    text = json.dumps(dataclasses.asdict(config), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def default(cls, **overrides):
    """An `ml_collections.ConfigDict` with the defaults of a dataclass, for files in configs/.

    Args:
        cls: the dataclass of a pipeline.
        **overrides: fields to set.
    """
    import ml_collections

    return ml_collections.ConfigDict(dataclasses.asdict(freeze(cls, overrides)), convert_dict=True)


# Text of the command line -----------------------------------------------------------------------------------------


def parse(field, text):
    """The value of an option written as text: `32`, `.5`, `true`, `a,b` or `("a", "b")`, `none`.

    Raises:
        ConfigError: text that is no such value.
    """
    return _checked(_parsed(text, field.type, field.path), field.type, field.path)


def _parsed(text, hint, path):
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if text.lower() == "none" and _NONE in arguments:
            return None
        return _parsed(text, next(a for a in arguments if a is not _NONE), path)
    if origin is tuple:
        return tuple(_parsed(item, arguments[0], path) for item in _items(text, path))
    if origin is typing.Literal:
        return next((a for a in arguments if str(a) == text), text)
    if hint is bool:
        found = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(text.lower())
        if found is None:
            raise _wrong(path, describe(hint), text)
        return found
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            raise _wrong(path, describe(hint), text) from None
    return text


def _items(text, path):
    """The texts in a list: Python's spelling if it begins with a bracket, else split at commas."""
    if text[:1] not in ("(", "["):
        return text.split(",") if text else []
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        if text[:1] == "(":  # a regular expression may well begin with a group
            return [text]
        raise errors.ConfigError(f"option {path}: {errors.quote(text, 60)} is no list") from None
    return [str(item) for item in (found if isinstance(found, (tuple, list)) else [found])]


# Files ------------------------------------------------------------------------------------------------------------


def load_file(spec, *, forbidden=()):
    """The mapping in a configuration file that a person named: `x.json`, or `x.py[:arg]` with get_config(arg).

    Args:
        spec: path, for Python files with an argument behind a colon.
        forbidden: folders whose files are data; a Python file in them is never run.

    Raises:
        ConfigError: no such file, another kind of file, or what `freeze` would not take anyway.
    """
    path, argument = split_spec(spec)
    shown = errors.quote(path)
    text = _text_of(path, "configuration file")
    ending = os.path.splitext(path)[1].lower()
    if ending == ".json":
        return _from_json(text, shown)
    if ending == ".py":
        return _from_python(path, text, argument, forbidden)
    if ending in (".yaml", ".yml"):
        raise errors.ConfigError(_about_yaml(text, shown))
    raise errors.ConfigError(f"{shown}: a configuration is a .py file with get_config() or a .json file")


def arguments_of(argv):
    """The arguments of a command line with every --flagfile replaced by the lines of its file, comments left out.

    Raises:
        ConfigError: a flag file that is no regular file of UTF-8 text, is too large, or leads back to itself.
    """
    return list(_flag_lines(iter(argv), ()))


def _flag_lines(items, above):
    for item in items:
        name, equals, path = item.partition("=")
        if item == "--":
            yield from (item, *items)
        elif name not in ("--flagfile", "-flagfile"):
            yield item
        else:
            path = path if equals else next(items, "")
            real, shown = os.path.realpath(path), errors.quote(path)
            if real in above:
                raise errors.ConfigError(f"{shown}: a flag file that leads back to itself")
            text = _text_of(path, "flag file")
            lines = (line.strip() for line in text.splitlines())
            lines = (line for line in lines if line and not line.startswith(("#", "//")))
            yield from _flag_lines(lines, (*above, real))


def _text_of(path, what):
    shown = errors.quote(path)
    if not os.path.isfile(path):
        raise errors.ConfigError(f"{shown}: no such {what}")
    if os.path.getsize(path) > MAX_FILE_BYTES:
        raise errors.ConfigError(f"{shown}: larger than {MAX_FILE_BYTES} bytes, no {what}")
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise errors.ConfigError(f"{shown}: not UTF-8 text at byte {error.start}") from None
    except OSError as error:
        raise errors.ConfigError(f"{shown}: cannot be read: {error.strerror}") from error


def split_spec(spec):
    """(path, argument or None) of `x.py:argument` or a plain path."""
    path, colon, argument = spec.rpartition(":")
    return (path, argument) if colon and path.endswith(".py") else (spec, None)


def _from_json(text, shown):
    def pairs(items):
        out = {}
        for key, value in items:
            if key in out:
                raise errors.ConfigError(f"{shown}: option {errors.quote(key, 80)} stands twice")
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, float) and not math.isfinite(item):
                    raise errors.ConfigError(f"{shown}: option {errors.quote(key, 80)} is {item}, no finite number")
            out[key] = value
        return out

    try:
        found = json.loads(text, object_pairs_hook=pairs)
    except json.JSONDecodeError as error:
        raise errors.ConfigError(f"{shown}: no JSON: {error}") from None
    except (RecursionError, ValueError) as error:
        raise errors.ConfigError(f"{shown}: no configuration: {errors.quote(error, 120)}") from None
    if not isinstance(found, dict):
        raise errors.ConfigError(f"{shown}: an object of options expected, {type(found).__name__} found")
    return found


def _about_yaml(text, shown):
    """Why YAML is not read, and what the file says, so that it is easily rewritten."""
    keys = re.findall(r"^([A-Za-z_][\w.-]*)\s*:", text, re.MULTILINE)
    twice = [k for i, k in enumerate(keys) if k in keys[:i]]
    found = f" ({', '.join(errors.quote(k, 40) for k in keys[:5])})" if keys else ""
    also = f"; {errors.quote(twice[0], 40)} stands twice in it" if twice else ""
    return f"{shown}: YAML is not read; write its options{found} as .json or as a .py file with get_config(){also}"


def _from_python(path, text, argument, forbidden):
    shown, real = errors.quote(path), os.path.realpath(path)
    for folder in forbidden:
        inside = os.path.realpath(folder)
        if real.startswith(inside.rstrip(os.sep) + os.sep):
            where = errors.quote(folder)
            raise errors.ConfigError(
                f"{shown}: lies in {where}, a folder of models; code found beside models is not run"
            )
    # The one place that runs a file: one that a person named, after a look at its outline.
    _check_outline(text, shown)
    module = types.ModuleType("jaxsub_config")
    module.__file__ = path
    try:
        exec(compile(text, path, "exec"), module.__dict__)  # noqa: S102
        found = module.get_config() if argument is None else module.get_config(argument)
    except errors.JaxsubError:
        raise
    except Exception as error:  # the file's own fault, whatever it is
        said = f"{type(error).__name__}: {errors.quote(error, 200)}"
        raise errors.ConfigError(f"{shown}: get_config: {said}") from error
    if dataclasses.is_dataclass(found):
        return to_dict(found)
    found = found.to_dict() if hasattr(found, "to_dict") else found
    if not isinstance(found, dict):
        raise errors.ConfigError(f"{shown}: get_config() returned {type(found).__name__}, not a configuration")
    return found


_OUTLINE = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)


def _check_outline(text, shown):
    """Refuses a file that is no configuration before any of it runs."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise errors.ConfigError(f"{shown}: no Python: {errors.quote(error, 120)}") from None
    if not any(isinstance(node, ast.FunctionDef) and node.name == "get_config" for node in tree.body):
        raise errors.ConfigError(f"{shown}: defines no get_config(); it was not run")
    for node in tree.body:
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if not is_text and not isinstance(node, _OUTLINE):
            raise errors.ConfigError(
                f"{shown}, line {node.lineno}: a configuration is imports, constants and functions"
            )
