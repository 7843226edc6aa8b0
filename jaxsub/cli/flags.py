"""The only module that defines flags: `--config.<field>` for every field of a Config, and shorthands for some.

The dataclass gives the defaults; --config=FILE, wherever it stands on the line, overrides them; flags override both.
"""

import dataclasses
import os
import typing

from absl import flags

from jaxsub import config as configs, errors, formats

SHORTHANDS = (
    "collection", "layers", "exclude_layers", "base", "match", "rank", "energy", "seed", "dry_run", "devices", "strict",
    "max_quarantined", "allow_roots", "restart", "preflight", "view", "draws", "world", "workloads", "peers", "quick",
    "rounds", "bundle", "decomposition", "write_models", "budget_bytes", "max_error", "members", "peft_layout",
    "remove", "exact", "score", "max_host_bytes", "max_device_bytes", "profile", "coordinator", "num_processes",
    "process_id", "stall_timeout", "break_lock", "task", "parametrisation", "initial", "seeds", "steps",
    "method", "out", "weights", "force", "mergekit_yaml", "loss", "bench", "calibrate",
)  # fmt: skip
RENAMED = {"allow_roots": "allow_root"}  # a flag that is repeated is called by the name of one value
PLACES = ("collection", "base", "bundle", "out", "write_models")
PROGRAM_FLAGS = {
    "workdir": "folder for all output; made if missing",
    "config": "experiment file to start from: x.py[:argument] or x.json",
}
HELP = ("--help", "-h", "-help", "--helpfull", "--helpshort")


class Flags:
    """The flags of one program, parsed.

    Attributes:
        workdir: path, or None.
        debug: whether errors show their traceback.
    """

    def __init__(self, program, cls, argv):
        """Parses argv[1:].

        Raises:
            ConfigError: an unknown flag (names the nearest), a stray argument, or a value that is no boolean.
        """
        self.program, self.cls, self.fields = program, cls, configs.fields(cls)
        self.values = _defined(self.fields)
        try:
            rest = self.values(configs.arguments_of(argv))
        except flags.Error as error:
            raise errors.ConfigError(self._explain(error)) from error
        if len(rest) == 2 and hasattr(cls, "POSITIONAL") and not self.values[cls.POSITIONAL].present:
            self.values[cls.POSITIONAL].parse(rest.pop())
        if len(rest) > 1:
            raise errors.ConfigError(f"unexpected {errors.quote(rest[1], 80)!r}: options are written --name=value")
        self.workdir, self.debug = _place(self.values["workdir"].value), self.values["debug"].value
        if self.workdir == "":
            raise errors.ConfigError("--workdir is empty; leave it out or name a folder")

    def freeze(self):
        """The Config: defaults, then the experiment file, then flags.

        Raises:
            ConfigError: a value of the wrong type, an option given twice, or a file that is no configuration.
        """
        given = {path: value for path in self.fields for value in self._given(path)}
        spec = self.values["config"].value
        if spec is None:
            return configs.freeze(self.cls, given)
        start = configs.freeze(self.cls, configs.load_file(spec, forbidden=_model_folders(spec, given)))
        return configs.freeze(self.cls, _flat(start) | given)

    def _given(self, path):
        """[the value of a field], or [] if no flag sets it."""
        found = {name: self.values[name] for name in _names(path) if self.values[name].present}
        if len(found) > 1:
            raise errors.ConfigError(f"{' and '.join('--' + name for name in found)} set the same option; give one")
        return [self._value(path, name, flag.value) for name, flag in found.items()]

    def _value(self, path, name, value):
        field = self.fields[path]
        if isinstance(value, bool):
            return value
        if not isinstance(value, list):
            value = configs.parse(field, value)
            return _place(value) if path in PLACES else value
        if not name.startswith("config.") and str in typing.get_args(field.type):
            # A pattern may hold commas: a shorthand takes one value whole, and may be repeated.
            return tuple(_place(text) if path in PLACES else text for text in value)
        return tuple(item for text in value for item in configs.parse(field, text))

    def _explain(self, error):
        if isinstance(error, flags.UnrecognizedFlagError):
            near = errors.nearest("--" + error.flagname, ["--" + name for name in self.values])
            return f"unknown flag --{errors.quote(error.flagname, 80)}{near}; see jaxsub {self.program} --help"
        return errors.quote(error, 300)


def _place(path):
    """A path as it is meant: models/ is models, and shells leave a ~ behind = as it is."""
    return os.path.normpath(os.path.expanduser(path)) if path else path


def help_text(program, cls, summary=""):
    """All flags of a program, with what they mean and their defaults."""
    rows = [(f"--{name}=", text, None) for name, text in PROGRAM_FLAGS.items()]
    rows.append(("--debug", "show the traceback of an error", None))
    for path, field in configs.fields(cls).items():
        name = _names(path)[-1]
        rows.append((f"--{name}" + ("" if field.type is bool else "="), field.help, field))
    lines = [f"jaxsub {program} [flags]", *(["", summary] if summary else []), ""]
    for flag, text, field in rows:
        notes = [text] if text else []
        if field is not None:
            notes.append("may be repeated" if _is_list(field) and not flag.startswith("--config.") else "")
            notes.append(f"default: {_shown(field.default)}")
        lines.append(f"  {flag:22} {'; '.join(n for n in notes if n)}")
    lines += ["", "Every option is also --config.<option>=value, with lists as a,b."]
    return "\n".join(lines) + "\n"


def _shown(default):
    if isinstance(default, bool):
        return str(default).lower()
    return ",".join(map(str, default)) or "none" if isinstance(default, tuple) else str(default) or "none"


def _names(path):
    """Flags that set a field, the one to show last."""
    return [f"config.{path}", *([RENAMED.get(path, path)] if path in SHORTHANDS else [])]


def _is_list(field):
    return typing.get_origin(field.type) is tuple


def _defined(fields):
    """A FlagValues of its own for each parse, so that tests and programs do not share state."""
    values = flags.FlagValues()
    for name, text in PROGRAM_FLAGS.items():
        flags.DEFINE_string(name, None, text, flag_values=values)
    flags.DEFINE_bool("debug", False, "show the traceback of an error", flag_values=values)
    for path, field in fields.items():
        for name in _names(path):
            define = flags.DEFINE_bool if field.type is bool else flags.DEFINE_string
            if _is_list(field):
                define = flags.DEFINE_multi_string
            define(name, None, field.help or path, flag_values=values)
    return values


def _flat(config, prefix=""):
    out = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        nested = dataclasses.is_dataclass(value)
        out |= _flat(value, f"{prefix}{field.name}.") if nested else {prefix + field.name: value}
    return out


def _model_folders(spec, given):
    """Folders in which a Python file is data: those of the collection, and one with models beside the file."""
    path = configs.split_spec(spec)[0]
    beside = os.path.dirname(os.path.abspath(path))
    folders = [item for item in given.get("collection", ()) if os.path.isdir(item)]
    if os.path.isdir(beside) and any(
        os.path.splitext(name)[1].lower() in formats.EXTENSIONS or name == "adapter_config.json"
        for name in os.listdir(beside)
    ):
        folders.append(beside)
    return folders
