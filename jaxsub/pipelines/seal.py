"""What an analysis leaves in its workdir, file by file with size and sha256: `files.json`, written last."""

import os

from jaxsub import errors
from jaxsub.bundle import files
from jaxsub.report import _write

FILES, SCHEMA = "files.json", "jaxsub.files/1"
TOP = ("report.json", "report.html", "quarantine.json", "log.txt")
STATISTICS = "statistics"


def write(workdir):
    """Writes down what lies in a finished workdir."""
    known = {name: files.identity(os.path.join(workdir, name)) for name in _present(workdir)}
    _write.write_sealed(os.path.join(workdir, FILES), {"schema": SCHEMA, "files": known})


def is_there(workdir):
    """Whether a folder is the workdir of a finished analysis."""
    return os.path.lexists(os.path.join(workdir, FILES))


def verify(workdir):
    """[(file, what is wrong), ...] of a workdir: every byte is hashed; nothing found is an empty list."""
    try:
        known = _write.read_sealed(os.path.join(workdir, FILES))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return [(FILES, "is not as it was written")]
    problems = []
    for name, wanted in known.items():
        try:
            found = files.identity(os.path.join(workdir, name))
        except errors.InputError as error:
            problems.append((name, error.reason))
            continue
        if found != wanted:
            what = "size" if found["bytes"] != wanted["bytes"] else "content"
            problems.append((name, f"has another {what} than when it was written"))
    return problems + [(name, "does not belong to the run") for name in _present(workdir) if name not in known]


def _present(workdir):
    found = [name for name in TOP if os.path.lexists(os.path.join(workdir, name))]
    folder = os.path.join(workdir, STATISTICS)
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    return found + [f"{STATISTICS}/{name}" for name in names if not name.startswith(".tmp-")]
