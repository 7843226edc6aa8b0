"""Configurations: frozen dataclasses whose fields are the options, their types and their defaults, all in one place.

    dataclass defaults -> experiment file (.py or .json) -> --config.field=value -> freeze() -> a checked instance
"""

import dataclasses
import hashlib
import json
import math
import types
import typing

from jaxsub import errors


def default(cls, **overrides):
    """A ml_collections.ConfigDict with the fields of a Config dataclass, for experiment files."""
    from ml_collections import config_dict

    return config_dict.ConfigDict(to_dict(cls()) | overrides)


def to_dict(config):
    """The fields of a config as a plain dict; nested configs too."""
    return dataclasses.asdict(config)


def digest(config):
    """sha256 of the config's canonical JSON: equal for equal options, whatever their order."""
    text = json.dumps([type(config).__module__, to_dict(config)], sort_keys=True, default=list, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def freeze(cls, values):
    """An instance of the dataclass `cls` from a mapping of its fields.

    Raises:
        ConfigError: unknown field (naming the nearest one), wrong type, a bool for a number, NaN.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    types_of = typing.get_type_hints(cls)
    for name in values:
        if name not in fields:
            raise errors.ConfigError(f"no option {errors.quote(name)!r}{errors.nearest(name, fields)}")
    return cls(**{name: _checked(name, value, types_of[name]) for name, value in values.items()})


def parse(name, text, kind):
    """The value of type `kind` written as `text` on a command line."""
    origin = typing.get_origin(kind)
    try:
        if origin is tuple:
            return tuple(part for part in text.strip("()").split(",") if part)
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if kind in (int, float):
            return _checked(name, kind(text), kind)
        return text
    except (ValueError, KeyError):
        raise errors.ConfigError(f"{name}={errors.quote(text)!r}: expected {_type_name(kind)}") from None


def load(path, cls):
    """Overrides from an experiment file: `x.py[:argument]` with get_config(argument), or strict `x.json`.

    A Python file runs; it must be one that the user names, and must not lie beside model files.

    Raises:
        ConfigError: missing, of another kind, or not a config.
    """
    file, _, argument = path.partition(":")
    if file.endswith(".json"):
        return _load_json(file)
    if not file.endswith(".py"):
        raise errors.ConfigError(
            f"{errors.quote(file)}: not an experiment file; give a .py file with get_config(), or a .json file"
        )
    _require_not_beside_models(file)
    try:
        with open(file, encoding="utf-8") as handle:
            source = handle.read()
    except OSError as error:
        raise errors.ConfigError(f"{errors.quote(file)}: {error.strerror}") from error
    module = types.ModuleType("jaxsub_experiment")
    module.__file__ = file
    exec(compile(source, file, "exec"), module.__dict__)
    if not hasattr(module, "get_config"):
        raise errors.ConfigError(f"{errors.quote(file)}: has no get_config()")
    found = module.get_config(argument) if argument else module.get_config()
    values = found.to_dict() if hasattr(found, "to_dict") else dict(found)
    freeze(cls, values)
    return values


def _load_json(file):
    def unique(pairs):
        names = [n for n, _ in pairs]
        for name in names:
            if names.count(name) > 1:
                raise errors.ConfigError(f"{errors.quote(file)}: {errors.quote(name)!r} stands twice")
        for name, value in pairs:
            if isinstance(value, float) and not math.isfinite(value):
                raise errors.ConfigError(f"{errors.quote(file)}: {errors.quote(name)!r} is not a finite number")
        return dict(pairs)

    try:
        with open(file, encoding="utf-8") as handle:
            values = json.loads(handle.read(1_000_000), object_pairs_hook=unique)
    except (OSError, ValueError, RecursionError) as error:
        raise errors.ConfigError(f"{errors.quote(file)}: cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise errors.ConfigError(f"{errors.quote(file)}: is not an object of options")
    return values


def _require_not_beside_models(file):
    import os

    folder = os.path.dirname(os.path.abspath(file))
    weights = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npz", ".h5", ".hdf5", ".keras", ".msgpack")
    try:
        beside = sorted(n for n in os.listdir(folder) if n.endswith(weights))
    except OSError:
        return
    if beside:
        raise errors.ConfigError(
            f"{errors.quote(file)}: is not run, it lies beside model files ({errors.quote(beside[0])}); move it elsewhere"
        )


def _checked(name, value, kind):
    origin = typing.get_origin(kind)
    if origin is tuple and isinstance(value, (list, tuple)):
        inner = typing.get_args(kind)[0]
        return tuple(_checked(name, v, inner) for v in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    good = isinstance(value, kind) if origin is None else False
    if not good or (isinstance(value, bool) and kind is not bool):
        raise errors.ConfigError(f"{name}={errors.quote(value)!r}: expected {_type_name(kind)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise errors.ConfigError(f"{name}={value}: expected a finite number")
    return value


def _type_name(kind):
    if typing.get_origin(kind) is tuple:
        return f"a list of {typing.get_args(kind)[0].__name__}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(kind, str(kind))
