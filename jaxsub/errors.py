"""Every exception a user can meet, and the wording they share.

An error says what was found, where (file, key), and what to do. Programs print the message without a
traceback and exit with the class's `exit_code`; anything else that escapes is a bug (exit 70).
"""

import difflib
import re


class JaxsubError(Exception):
    """Base of all documented errors."""

    exit_code = 70


class ConfigError(JaxsubError):
    """Wrong usage or configuration: unknown option, wrong type, impossible value."""

    exit_code = 2


class InputError(JaxsubError):
    """A model file, or a whole collection, that is refused.

    Attributes:
        file: path of the offending file or folder, as text.
        key: tensor, field or shard name inside it; None when the whole file is at fault.
        reason: what was found, one clause.
        hint: what to do about it; may be empty.
        rule: short id of the class of fault ("H3", "N1", ...), for quarantine.json.
    """

    exit_code = 4

    def __init__(self, file, reason, *, key=None, hint="", rule=""):
        self.file, self.key, self.reason, self.hint, self.rule = str(file), key, reason, hint, rule
        super().__init__(self.message())

    def message(self):
        """One line: file, key, reason, hint; nothing of it is a control character or outside of ASCII.

        A hint may have lines of its own.
        """
        where = quote(self.file) + (f", {quote(self.key)}" if self.key is not None else "")
        hint = "\n".join(plain(line) for line in self.hint.split("\n"))
        return f"{where}: {plain(self.reason)}" + (f"; {hint}" if hint else "")


class InputChangedError(InputError):
    """An input changed while it was being read: the run stops, earlier layers used other bytes."""


class WorkdirError(JaxsubError):
    """The output folder is in use or belongs to a different run."""

    exit_code = 5


class ResourceError(JaxsubError):
    """Not enough memory or disk."""

    exit_code = 6


class SolverError(JaxsubError):
    """No algorithm solves an eigenproblem of finite numbers: a defect, of the linear algebra or of jaxsub.

    Attributes:
        layer: name of the layer whose it is, once that is known.
    """

    layer = None

    def of(self, layer):
        """The same error, naming the layer."""
        if self.layer is not None:
            return self
        found = SolverError(f"layer {quote(layer)}: {self}; nothing of it was written: leave it out, and report this")
        found.layer = layer
        return found


class PeerError(JaxsubError):
    """Another process of the run failed; its message and exit code."""

    def __init__(self, message, exit_code):
        super().__init__(message)
        self.exit_code = exit_code


def quote(text, limit=200):
    """`text` with control and non-ASCII characters escaped and cut to `limit`, safe on a terminal."""
    shown = ascii(str(text))[1:-1]
    return shown if len(shown) <= limit else f"{shown[: limit - 20]}... ({len(shown)} characters)"


def plain(text):
    """`text` with what is not printable ASCII escaped; quoted parts stay as they are."""
    return re.sub(r"[^ -~]", lambda found: ascii(found[0])[1:-1], str(text))


def require_known(option, value, known):
    """`value` of an option if it is one of the names `known`.

    Raises:
        ConfigError: naming the option, all names and the nearest one.
    """
    if value not in known:
        names = ", ".join(sorted(known))
        raise ConfigError(f"{option}={quote(value)!r}: expected one of {names}{nearest(value, known)}")
    return value


def nearest(name, known):
    """'; did you mean X?' for the known name closest to `name`, or an empty string."""
    close = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
