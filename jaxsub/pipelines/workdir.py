"""The output folder: one run at a time, atomic files, a record of whose it is."""

import contextlib
import fcntl
import json
import os
import socket

from jaxsub import errors
from jaxsub.report import _write

LOCK, RECORD = ".jaxsub.lock", "run.json"


@contextlib.contextmanager
def hold(path, identity, *, restart=False):
    """Makes `path` if missing and holds it for this run.

    Args:
        path: folder.
        identity: dict of what the run is; another one found there is refused, naming the difference.
        restart: start over whatever is there; statistics whose digests still match are used again.

    Raises:
        WorkdirError: another process holds it, or it belongs to a different run.
    """
    try:
        os.makedirs(path, exist_ok=True)
        fd = os.open(os.path.join(path, LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise errors.WorkdirError(f"{errors.quote(path)}: cannot be used as workdir: {error.strerror}") from error
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = errors.quote(os.pread(fd, 200, 0).decode("utf-8", "replace").strip() or "unknown")
            raise errors.WorkdirError(f"{errors.quote(path)}: in use by another run ({holder})") from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"host {socket.gethostname()}, pid {os.getpid()}".encode(), 0)
        _require_same(path, identity, restart)
        _write.write_json(os.path.join(path, RECORD), identity)
        yield
    finally:
        os.close(fd)


def _require_same(path, identity, restart):
    record = os.path.join(path, RECORD)
    if restart or not os.path.exists(record):
        return
    try:
        with open(record, encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError):
        found = {}
    wanted = json.loads(json.dumps(identity))
    different = (
        [k for k in sorted({*found, *wanted}) if found.get(k) != wanted.get(k)] if isinstance(found, dict) else []
    )
    if different:
        key = different[0]
        shown = f"{key} was {errors.quote(found.get(key), 60)}, is {errors.quote(wanted.get(key), 60)}"
        raise errors.WorkdirError(
            f"{errors.quote(path)}: belongs to a different run ({shown}); use another --workdir, or --restart "
            "(statistics that still fit are used again)"
        )
