"""Whole text files or none, in the units a report is made of."""

import json
import os
import shutil

from jaxsub import errors
from jaxsub.formats import _files


def write_text(path, text):
    """Writes a text file so that it is there whole or not at all.

    Raises:
        ResourceError: it cannot be written; says how much is needed and free.
    """
    data = text.encode("utf-8", "surrogatepass")
    try:
        _files.write_atomic(path, [data])
    except OSError as error:
        free = shutil.disk_usage(os.path.dirname(os.path.abspath(path))).free
        raise errors.ResourceError(
            f"{errors.quote(path)}: cannot be written: {error.strerror} ({len(data)} bytes needed, {free} free)"
        ) from error


def write_json(path, value):
    """Writes strict JSON (no NaN), indented, keys as they are."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False, ensure_ascii=True) + "\n")
