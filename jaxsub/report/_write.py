"""Whole text files or none, in the units a report is made of."""

import hashlib
import json

from jaxsub.formats import _files


def write_text(path, text):
    """Writes a text file so that it is there whole or not at all.

    Raises:
        ResourceError: it cannot be written; says how much is needed and free.
    """
    _files.write_atomic(path, [text.encode("utf-8", "surrogatepass")])


def write_json(path, value):
    """Writes strict JSON (no NaN), indented, keys as they are."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False, ensure_ascii=True) + "\n")


def write_sealed(path, value):
    """Writes JSON that says by itself whether it is as it was written; see `read_sealed`."""
    write_text(path, _sealed(value))


def read_sealed(path):
    """What `write_sealed` wrote.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not, byte for byte, as it was written.
    """
    with open(path, "rb") as file:
        data = file.read()
    found = json.loads(data)
    if not isinstance(found, dict) or "content" not in found or data != _sealed(found["content"]).encode():
        raise ValueError("not as it was written")
    return found["content"]


def _sealed(value):
    text = json.dumps(value, sort_keys=True, allow_nan=False)
    whole = {"content": json.loads(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    return json.dumps(whole, indent=1, sort_keys=True, allow_nan=False) + "\n"
