"""The only module that opens input files; what writes them is `_output`, and has its names here too.

    identify(path) -> FileId            regular file, links checked
    read_bytes(file, offset, n)         exactly n bytes, or an error
    read_into(extent, start, view)      straight into a caller's buffer, the file unchanged since `identify`

Files are read with pread, never mapped: a file that is cut while mapped kills the process. Each read opens
the file anew and compares size, time and inode before and after, so no mixture of two versions is ever returned;
an open costs about 10 microseconds and no descriptor outlives a call.
"""

import contextlib
import errno
import os
import re
import stat

from jaxsub import descriptors, errors
from jaxsub.formats import _direct, _hints
from jaxsub.formats._output import (  # noqa: F401
    DISK,
    failed,
    free_bytes,
    is_alive,
    make_folder,
    new_file,
    new_folder,
    remove,
    require_new,
    sweep,
    sync_folder,
    temporary_in,
    write_atomic,
)

_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # git or sha256 digest: the names in a hub cache
MAX_TREE_FILES = 100_000  # of one model that is a folder of many files
_MAX_PREAD = 1 << 30  # Linux moves at most 2^31 - 4096 bytes a call
_HOLES, _HOLES_RATIO = 1 << 30, 256  # a file of holes: bytes, and bytes over stored ones (as for zip members)
_LARGE = 1 << 18  # bytes from which a read is a block of its own: see `_advise`
_KINDS = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"))


def identify(path, *, root=None, allow_roots=()):
    """The FileId of a regular file.

    Links are followed only to places inside `root` (default: the file's folder), inside one of `allow_roots`,
    or from `snapshots/<revision>/` to `blobs/<digest>` of one hub cache.

    Raises:
        InputError: missing, not a regular file, unreadable, or a link that leaves the collection (rules H10, H12).
    """
    path = os.fspath(path)
    _check_links(path, root, allow_roots)
    with _opened(path) as fd:
        status = os.fstat(fd)
        if status.st_size > _HOLES and getattr(status, "st_blocks", _HOLES) * 512 < status.st_size // _HOLES_RATIO:
            _require_stored(fd, path, status.st_size)
        return _file_id(path, status)


def _require_stored(fd, path, size):
    """Refuses a file that is almost nothing but holes: hours of zeros that nobody trained."""
    stored = position = 0
    with contextlib.suppress(OSError, AttributeError):  # past the last data; or a system that knows no holes
        for _ in range(1000):
            position = os.lseek(fd, position, os.SEEK_DATA)
            start, position = position, os.lseek(fd, position, os.SEEK_HOLE)
            stored += position - start
        return  # in many pieces: no accident
    if stored < size // _HOLES_RATIO:
        reason = f"has {size} bytes of which {stored} are stored, the rest are holes"
        raise errors.InputError(path, reason, hint="the download is incomplete; get it again", rule="H14")


def identify_tree(folder, *, root=None, allow_roots=()):
    """FileIds of all files in and under a folder, each checked as by `identify`; linked folders are refused."""
    found = []
    for where, folders, names in os.walk(folder):
        for name in folders:
            if os.path.islink(os.path.join(where, name)):
                reason, hint = "is a link to a folder, inside of a model", "put the folder itself there"
                raise errors.InputError(os.path.join(where, name), reason, hint=hint, rule="H10")
        if len(found) + len(names) > MAX_TREE_FILES:
            raise errors.InputError(folder, f"holds more than {MAX_TREE_FILES} files", rule="H19")
        root = folder if root is None else root
        found += [identify(os.path.join(where, name), root=root, allow_roots=allow_roots) for name in sorted(names)]
    return found


def require_unchanged(files):
    """Refuses when any of the FileIds is not what its path leads to now."""
    for file in files:
        try:
            status = os.stat(file.path)
        except OSError as error:
            raise errors.InputChangedError(file.path, "is gone since it was read", hint=_CHANGED_HINT) from error
        _require_unchanged(file, status)


def read_bytes(file, offset, num_bytes):
    """Exactly `num_bytes` bytes from `offset` of a FileId (or of a path, which is identified first)."""
    file = file if isinstance(file, descriptors.FileId) else identify(file)
    with reader(file) as opened:
        return opened.read(offset, num_bytes)


def read_into(extent, byte_start, view, past_cache=False):
    """Fills the writable `view` (contiguous, any item size) from `extent.offset + byte_start` on; releases the GIL.

    `past_cache`: large reads leave what is not cached so (`_direct`); for what is read once and more than memory holds.

    Raises:
        InputChangedError: the file is not the one whose header was read, or changed during this read.
    """
    view = memoryview(view).cast("B") if view.nbytes else view
    file, position = extent.file, extent.offset + byte_start
    try:
        with _opened(file.path) as fd:
            _require_unchanged(file, os.fstat(fd))
            _advise(fd, "RANDOM" if view.nbytes >= _LARGE else "NORMAL")
            _fill(fd, position, view, file, past_cache and view.nbytes >= _LARGE)
            _require_unchanged(file, os.fstat(fd))
    except errors.InputChangedError:
        raise
    except errors.InputError as error:  # it was readable when its header was read
        raise errors.InputChangedError(file.path, error.reason, hint=_CHANGED_HINT, rule="F4") from error


_CHANGED_HINT = "leave the inputs alone during a run, and start it again"


class Reader:
    """Many small reads of one file through one descriptor, while its structure is parsed."""

    def __init__(self, fd, file):
        self._fd, self.file = fd, file

    def read(self, offset, num_bytes):
        """Exactly `num_bytes` bytes; asking past the end is the file's fault (InputError)."""
        if offset < 0 or num_bytes < 0 or offset + num_bytes > self.file.size:
            raise _too_short(self.file, offset + num_bytes)
        buffer = bytearray(num_bytes)
        _fill(self._fd, offset, memoryview(buffer), self.file)
        return bytes(buffer)

    def blocks(self, offset, num_bytes, size=1 << 20):
        """The bytes from `offset` on in blocks; the buffer is used again for the next one."""
        if offset < 0 or num_bytes < 0 or offset + num_bytes > self.file.size:
            raise _too_short(self.file, offset + num_bytes)
        _advise(self._fd, "SEQUENTIAL")
        buffer = memoryview(bytearray(min(size, num_bytes)))
        for start in range(0, num_bytes, size):
            block = buffer[: min(size, num_bytes - start)]
            _fill(self._fd, offset + start, block, self.file)
            yield block


@contextlib.contextmanager
def reader(file):
    """A Reader of an identified file."""
    with _opened(file.path) as fd:
        _require_unchanged(file, os.fstat(fd))
        _advise(fd, "RANDOM")
        yield Reader(fd, file)
        _require_unchanged(file, os.fstat(fd))


def _advise(fd, how):
    """Tells the system how far to read ahead.

    Headers and blocks of layers are "RANDOM": the callers ask for the next block in time. Where the system may read
    ahead by megabytes, the headers of a thousand files, or a first block, would else wait for most of the collection.
    """
    with contextlib.suppress(AttributeError, OSError):  # a hint: some systems and file systems have none
        os.posix_fadvise(fd, 0, 0, getattr(os, f"POSIX_FADV_{how}"))


def _too_short(file, end):
    return errors.InputError(
        file.path, f"ends at byte {file.size}, {end} expected", hint="it is cut short; get it again", rule="H7"
    )


def _fill(fd, position, view, file, past_cache=False):
    try:
        done = _direct.fill(fd, file.device, position, view) if past_cache else 0
    except OSError as error:
        raise errors.InputError(file.path, f"cannot be read: {error.strerror}", rule="F4") from error
    while done < view.nbytes:
        try:
            count = os.preadv(fd, [view[done : done + _MAX_PREAD]], position + done)
        except OSError as error:
            raise errors.InputError(file.path, f"cannot be read: {error.strerror}", rule="F4") from error
        if count == 0:
            raise errors.InputChangedError(
                file.path, f"ended at byte {position + done} while it was read", hint=_CHANGED_HINT, rule="F4"
            )
        done += count


def _require_unchanged(file, status):
    now = _file_id(file.path, status)
    if now != file:
        fields = ("size", "mtime_ns", "device", "inode")
        changed = [
            f"{f} {getattr(file, f)} -> {getattr(now, f)}" for f in fields if getattr(file, f) != getattr(now, f)
        ]
        raise errors.InputChangedError(
            file.path, f"changed since its header was read ({', '.join(changed)})", hint=_CHANGED_HINT, rule="F4"
        )


def _file_id(path, status):
    return descriptors.FileId(path, status.st_size, status.st_mtime_ns, status.st_dev, status.st_ino)


@contextlib.contextmanager
def _opened(path):
    """A descriptor of a regular file; never blocks on a pipe or a device."""
    try:
        fd = os.open(path, _FLAGS)
    except (OSError, ValueError) as error:  # ValueError: NUL in a name
        raise _open_error(path, error) from error
    try:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode):
            what = next((name for test, name in _KINDS if test(mode)), "a device")
            raise errors.InputError(
                path, f"is {what}, not a regular file", hint="give the weight file itself", rule="H12"
            )
        yield fd
    finally:
        os.close(fd)


def _open_error(path, error):
    code = getattr(error, "errno", None)
    if code == errno.ENOENT and os.path.islink(path):
        return errors.InputError(
            path, "is a link to nothing", hint="fetch the file again (a pruned cache?)", rule="H12"
        )
    if code == errno.ELOOP:
        return errors.InputError(path, "is a loop of links", hint="give the weight file itself", rule="H12")
    reason = f"cannot be opened: {getattr(error, 'strerror', None) or error}"
    return errors.InputError(path, reason, hint="check the path and its permissions", rule="H12")


def _check_links(path, root, allow_roots):
    try:
        real = os.path.realpath(path)
        if not os.path.exists(real):
            return  # `_opened` says what is wrong with it
        roots = [root if root is not None else os.path.dirname(path) or ".", *allow_roots]
        if any(is_inside(real, os.path.realpath(r)) for r in roots) or _is_hub_blob(path, real):
            return
    except (OSError, ValueError) as error:
        raise _open_error(path, error) from error
    raise errors.InputError(
        path,
        f"is a link that leaves the collection (to {errors.quote(real)})",
        hint="copy the file, or allow its folder with --allow_root",
        rule="H10",
    )


def is_inside(path, folder):
    """Whether `path` is `folder` or lies under it; both already resolved."""
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def _is_hub_blob(path, real):
    """Whether `path` is .../snapshots/<revision>/... and `real` is the digest-named blob of the same cache entry."""
    blobs, name = os.path.split(real)
    entry, last = os.path.split(blobs)
    here = os.path.realpath(os.path.dirname(path) or ".")
    inside = here.startswith(os.path.join(entry, "snapshots") + os.sep)
    return last == "blobs" and bool(_BLOB.fullmatch(name)) and inside


def head(file, num_bytes=512):
    """The first bytes of a file, at most `num_bytes`, for `_hints`."""
    return read_bytes(file, 0, min(num_bytes, file.size))


def damaged(file, reason, *, key=None, rule="H7", hint=""):
    """An InputError for a file that breaks its format, with what it seems to be instead, if that is plain."""
    return errors.InputError(file.path, reason, key=key, hint=_hints.explain(head(file), file.size) or hint, rule=rule)


def list_folder(path):
    """Names in a folder in byte order, without our own unfinished writes ('.tmp-...')."""
    try:
        names = os.listdir(path)
    except (OSError, ValueError) as error:
        raise _open_error(os.fspath(path), error) from error
    return sorted((n for n in names if not n.startswith(".tmp-")), key=os.fsencode)
