"""The only module that writes files: whole or not at all, on the disk before they have their names.

A file or a folder has a name of its own, `.tmp-...`, until all of it is there: `write_atomic`, `new_file`,
`new_folder`. What dead processes left under such names, `sweep` removes.
"""

import contextlib
import errno
import os
import re
import secrets
import shutil

from jaxsub import errors

CURE = "remove it or give another folder"
_LEFTOVER = re.compile(r"\.tmp-([0-9]+)-[0-9a-f]{12}")  # see `temporary_in`
# What the disk refuses, rather than the folder: room, quotas, the size of a file, faults, a read-only file system.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM)  # of a folder, where the file system has none


def failed(path, error, needed=None):
    """The error for an OSError met while `path` was written: a ResourceError with the bytes needed, and free.

    Args:
        path: what was to be written.
        error: OSError.
        needed: bytes; None where they are not known beforehand.
    """
    wanted = "" if needed is None else f"{needed} bytes needed, "
    free = free_bytes(path)
    return errors.ResourceError(
        f"{errors.quote(path)}: cannot be written: {error.strerror or error} ({wanted}"
        f"{'unknown' if free is None else free} free); what was there before is as it was; when that is mended, the "
        "same command goes on"
    )


def free_bytes(path):
    """Bytes free where `path` is or will be; None where the system does not say."""
    path = os.path.abspath(path)
    while not os.path.exists(path) and os.path.dirname(path) != path:
        path = os.path.dirname(path)
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None


def write_atomic(path, chunks):
    """Writes `chunks` (bytes-like) to `path`; see `new_file`. A list of them tells how much room they need."""
    needed = sum(memoryview(chunk).nbytes for chunk in chunks) if isinstance(chunks, list) else None
    with new_file(path, needed) as stream:
        for chunk in chunks:
            stream.write(chunk)


@contextlib.contextmanager
def new_file(path, needed=None):
    """Gives a stream whose content is at `path` when the block ends.

    Temporary name in the same folder, fsync, rename, fsync of the folder. The mode follows the umask. On any error
    the old file stays and the temporary one is removed.

    Raises:
        ResourceError: it cannot be written; says how much is `needed` (bytes, if known) and free.
    """
    path = os.path.abspath(os.fspath(path))
    folder = os.path.dirname(path)
    temporary = temporary_in(folder)
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)
        with os.fdopen(fd, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        sync_folder(folder)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError):
            raise failed(path, error, needed) from error
        raise


def temporary_in(folder):
    """A path in a folder that is nobody's yet, under the name of a write that is not finished."""
    return os.path.join(folder, f".tmp-{os.getpid()}-{secrets.token_hex(6)}")


def sweep(folder):
    """Removes what writes of dead processes left in a folder; those of living ones stay.

    An own name is a leftover too: in a container that starts anew every run has the same process id.
    """
    for entry in os.scandir(folder) if os.path.isdir(folder) else ():
        found = _LEFTOVER.fullmatch(entry.name)
        if found and (int(found[1]) == os.getpid() or not is_alive(int(found[1]))):
            with contextlib.suppress(OSError):
                remove(entry.path)


def remove(path):
    """Removes a file or a folder with all that is in it; of a link the link alone."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        os.unlink(path)


def is_alive(process):
    """Whether a process of this machine with this id runs."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # someone else's
        return True
    return True


def require_new(path, cure=CURE):
    """Refuses a place for results before they are computed.

    Raises:
        WorkdirError: something is at `path`, or nothing can be made there.
        ResourceError: the file system takes nothing.
    """
    _require_absent(path, cure)
    place = os.path.dirname(os.path.abspath(path))
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    tried = temporary_in(place)
    try:  # permissions say too little: of root, of read-only mounts, of /proc
        os.mkdir(tried)
        os.rmdir(tried)
    except OSError as error:
        raise _not_made(path, error) from error


def _require_absent(path, cure):
    if os.path.lexists(path):
        raise errors.WorkdirError(f"{errors.quote(path)}: exists already; {cure}")


@contextlib.contextmanager
def new_folder(path):
    """Gives a temporary folder beside `path` that becomes `path` when the block ends, and is gone if it fails.

    A folder with some of its weight files can pass for a whole model; under this name it is none.

    Raises:
        WorkdirError: `path` exists, or cannot be made.
        ResourceError: it cannot be written.
    """
    path = os.path.abspath(os.fspath(path))
    _require_absent(path, CURE)
    temporary = temporary_in(os.path.dirname(path))
    make_folder(os.path.dirname(path))
    try:
        os.mkdir(temporary)
    except OSError as error:
        raise _not_made(path, error) from error
    try:
        yield temporary
        os.rename(temporary, path)
        sync_folder(os.path.dirname(path))
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise failed(path, error) from error
        if isinstance(error, errors.ResourceError):  # of a file in it: named as it would have been
            said = str(error).replace(errors.quote(temporary), errors.quote(path))
            raise errors.ResourceError(said) from error
        raise


def make_folder(path):
    """Makes a folder, and those above it, if they are not there; their names are on the disk when it returns.

    Raises:
        WorkdirError, ResourceError: it cannot be made.
    """
    place, missing = os.path.abspath(os.fspath(path)), []
    while not os.path.isdir(place) and os.path.dirname(place) != place:
        missing.append(place)
        place = os.path.dirname(place)
    try:
        for one in reversed(missing):
            with contextlib.suppress(FileExistsError):  # another process was quicker
                os.mkdir(one)
            if not os.path.isdir(one):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            sync_folder(os.path.dirname(one))
    except OSError as error:
        raise _not_made(path, error) from error


def _not_made(path, error):
    if error.errno in DISK:
        return failed(path, error)
    return errors.WorkdirError(f"{errors.quote(path)}: cannot be made: {error.strerror}")


def sync_folder(folder):
    """Puts a folder's entries on the disk: what was renamed into it is there after a power cut."""
    try:
        directory = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
