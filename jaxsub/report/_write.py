"""Whole text files or none: written under a temporary name, synced, renamed."""

import contextlib
import json
import os
import secrets
import shutil

from jaxsub import errors


def write_text(path, text):
    """Writes a text file so that it is there whole or not at all."""
    temporary = os.path.join(os.path.dirname(path) or ".", f".tmp-{secrets.token_hex(6)}")
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with os.fdopen(os.open(temporary, flags, 0o666), "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        free = shutil.disk_usage(os.path.dirname(path) or ".").free
        raise errors.ResourceError(
            f"{errors.quote(path)}: cannot be written: {error.strerror} ({len(text)} bytes needed, {free} free)"
        ) from error


def write_json(path, value):
    """Writes strict JSON (no NaN), indented, keys as they are."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False, ensure_ascii=True) + "\n")
