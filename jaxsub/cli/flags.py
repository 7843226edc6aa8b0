"""The only module that defines flags: one for each field of a program's Config, and the shorthands of the README.

Every field is `--config.<field>=value`; a shorthand `--<field>` exists for the fields in `SHORTHANDS`. `--config=FILE`
is read first, whatever the order on the command line.
"""

import dataclasses
import typing

from absl import flags

from jaxsub import config as configs, errors

SHORTHANDS = (
    "collection", "layers", "exclude_layers", "base", "match", "strict", "max_quarantined", "allow_roots", "seed",
    "dry_run", "devices", "restart", "world", "preflight", "view", "draws",
)  # fmt: skip
ALIASES = {"allow_root": "allow_roots"}
PROGRAM_FLAGS = {"workdir": "folder for all output; made if missing", "config": "experiment file, x.py[:argument] or x.json"}


class Flags:
    """The flags of one program, parsed: `config` is an instance of its Config, `workdir` a path or None."""

    def __init__(self, program, cls, argv):
        self.cls = cls
        self.values = flags.FlagValues()
        self.types = typing.get_type_hints(cls)
        self.program = program
        self._define()
        try:
            rest = self.values(list(argv))
        except flags.Error as error:
            raise errors.ConfigError(self._explain(error, argv)) from error
        if len(rest) > 1:
            raise errors.ConfigError(f"unexpected {errors.quote(rest[1])!r}: options are written --name=value")
        self.workdir = self.values["workdir"].value
        self.debug = self.values["debug"].value

    def freeze(self):
        """The Config: defaults, then the experiment file, then flags."""
        found = configs.load(self.values["config"].value, self.cls) if self.values["config"].value else {}
        for field in dataclasses.fields(self.cls):
            for name in self._names(field.name):
                value = self.values[name].value
                if value is None or not self.values[name].present:
                    continue
                kind = self.types[field.name]
                if typing.get_origin(kind) is tuple:
                    # A pattern may hold a comma: a shorthand's values are taken whole, and it may be repeated.
                    found[field.name] = tuple(value) if name != f"config.{field.name}" else configs.parse(name, value[-1], kind)
                else:
                    found[field.name] = value if isinstance(value, bool) else configs.parse(name, value, kind)
        return configs.freeze(self.cls, found)

    def help(self):
        """All flags of the program with their meaning and defaults."""
        lines = [f"jaxsub {self.program} [flags]", ""]
        comments = _comments(self.cls)
        for name, text in PROGRAM_FLAGS.items():
            lines.append(f"  --{name}=  {text}")
        lines.append("  --debug  show the traceback of an error")
        for field in dataclasses.fields(self.cls):
            shown = f"--{field.name}" if field.name in SHORTHANDS else f"--config.{field.name}"
            default = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
            value = "" if self.types[field.name] is bool else "="
            note = comments.get(field.name, "")
            lines.append(f"  {shown}{value}  {note}{' ' if note else ''}(default: {default if default != '' else 'none'})")
        lines += ["", "Every field can also be written --config.<field>=value; list flags may be repeated.", ""]
        return "\n".join(lines)

    def _define(self):
        for name, text in PROGRAM_FLAGS.items():
            flags.DEFINE_string(name, None, text, flag_values=self.values)
        flags.DEFINE_bool("debug", False, "show the traceback of an error", flag_values=self.values)
        for field in dataclasses.fields(self.cls):
            for name in self._names(field.name):
                kind = self.types[field.name]
                if kind is bool:
                    flags.DEFINE_bool(name, None, field.name, flag_values=self.values)
                elif typing.get_origin(kind) is tuple:
                    flags.DEFINE_multi_string(name, None, field.name, flag_values=self.values)
                else:
                    flags.DEFINE_string(name, None, field.name, flag_values=self.values)

    @staticmethod
    def _names(field):
        short = [field] if field in SHORTHANDS else []
        return [f"config.{field}", *short, *(a for a, f in ALIASES.items() if f == field)]

    def _explain(self, error, argv):
        if isinstance(error, flags.UnrecognizedFlagError):
            known = [n for n in self.values]
            return f"no flag --{errors.quote(error.flagname)}{errors.nearest(error.flagname, known)}; see jaxsub {self.program} --help"
        return errors.quote(error)


def _comments(cls):
    """Field name -> the comment behind it in the source."""
    import inspect
    import re

    try:
        source = inspect.getsource(cls)
    except (OSError, TypeError):
        return {}
    return dict(re.findall(r"^    (\w+):.*?# (.+)$", source, flags=re.MULTILINE))
