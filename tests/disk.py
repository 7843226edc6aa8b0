"""A disk that fails, a process that ends, power that is cut: at the n-th thing done to the files of a folder.

`Disk` stands before the functions of `os` that change files. A process that is ended does nothing more to them,
whatever its `finally` and `except` ask for, as after a kill. What was done is kept, and `power_cuts` tells what a disk
may hold if the power goes then: writes that were not synced are gone, short or zero, such names are the old ones.
"""

import contextlib
import errno
import io
import os
from unittest import mock

NEEDS_ROOM = ("open", "write", "fsync", "rename", "mkdir")  # what a full disk refuses


class Ended(BaseException):
    """Nothing catches it, as nothing catches a kill."""


class Disk:
    """Counts, and fails or ends, what is done to files below `root`.

    Args:
        root: folder.
        at: number of the operation, from 1, that fails; 0: none.
        how: "before" or "after", the process ends there; or a number of `errno`, the operation raises it.
        persistent: all operations from then on raise it.
    """

    def __init__(self, root, at=0, how="before", persistent=False):
        self.root, self.at, self.how, self.persistent = os.path.abspath(root), at, how, persistent
        self.count, self.is_over, self.log, self.failed = 0, False, [], ""

    def __enter__(self):
        self.stack = contextlib.ExitStack()
        self.real = {name: getattr(os, name) for name in _PATCHED}
        for name in _PATCHED:
            self.stack.enter_context(mock.patch.object(os, name, getattr(self, "_" + name)))
        return self

    def __exit__(self, *_):
        self.stack.close()

    def _do(self, kind, call, *said):
        if self.is_over:
            raise Ended
        self.count += 1
        is_due = self.at and (self.count == self.at or (self.persistent and self.count > self.at))
        if is_due and self.how == "before":
            self.is_over = True
            raise Ended
        if is_due and isinstance(self.how, int) and (self.how != errno.ENOSPC or kind in NEEDS_ROOM):
            self.failed = self.failed or f"{kind} {said[0]}"
            raise OSError(self.how, os.strerror(self.how))
        found = call()
        self.log.append((kind, *said))
        if is_due and self.how == "after":
            self.is_over = True
            raise Ended
        return found

    def _relative(self, path, dir_fd=None):
        """Path below the root, or None; "" is the root itself."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        elif dir_fd is not None:
            path = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), path)
        path = os.path.abspath(os.fspath(path))
        if path == self.root:
            return ""
        return os.path.relpath(path, self.root) if path.startswith(self.root + os.sep) else None

    def _one(self, kind, name, path, *rest, said=(), dir_fd=None, **options):
        if dir_fd is not None:
            options["dir_fd"] = dir_fd
        where = self._relative(path, dir_fd)
        call = lambda: self.real[name](path, *rest, **options)  # noqa: E731
        return call() if where is None else self._do(kind, call, where, *said)

    def _open(self, path, flags, mode=0o777, *, dir_fd=None):
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return self._one("open", "open", path, flags, mode, dir_fd=dir_fd)
        return self.real["open"](path, flags, mode, dir_fd=dir_fd)

    def _fdopen(self, fd, *rest, **options):
        return self.real["fdopen"](fd, *rest, **options) if self._relative(fd) is None else _stream(self, fd)

    def _fsync(self, fd):
        return self._one("fsync", "fsync", fd)

    def _ftruncate(self, fd, size):
        return self._one("truncate", "ftruncate", fd, size)

    def _pwrite(self, fd, data, offset):
        return self._one("write", "pwrite", fd, data, offset, said=(bytes(data),))

    def _mkdir(self, path, mode=0o777, *, dir_fd=None):
        return self._one("mkdir", "mkdir", path, mode, dir_fd=dir_fd)

    def _unlink(self, path, *, dir_fd=None):
        return self._one("unlink", "unlink", path, dir_fd=dir_fd)

    def _rmdir(self, path, *, dir_fd=None):
        return self._one("unlink", "rmdir", path, dir_fd=dir_fd)

    def _rename(self, old, new, **options):
        return self._one("rename", "rename", old, new, said=(self._relative(new),), **options)

    def _replace(self, old, new, **options):
        return self._one("rename", "replace", old, new, said=(self._relative(new),), **options)


_PATCHED = ("open", "fdopen", "fsync", "ftruncate", "pwrite", "mkdir", "unlink", "rmdir", "rename", "replace")


def _stream(disk, fd):
    """A buffered stream whose writes to the system are operations of a Disk."""

    class Raw(io.RawIOBase):
        def writable(self):
            return True

        def fileno(self):
            return fd

        def write(self, data):
            if disk.is_over:  # what the interpreter flushes when it throws a stream away
                return len(data)
            data = bytes(data)
            return disk._do("write", lambda: os.write(fd, data), disk._relative(fd), data)

        def close(self):
            if not self.closed:
                super().close()
                os.close(fd)

    return io.BufferedWriter(Raw())


# Power cuts -----------------------------------------------------------------------------------------------------------


class _File:
    def __init__(self):
        self.data, self.synced = b"", b""


class _Folder:
    def __init__(self):
        self.entries, self.synced = {}, {}


def power_cuts(log):
    """Yields (number of operations done, what is lost, {path: bytes, or None of a folder}) of states after a power cut.

    Args:
        log: of a Disk over a run that was not disturbed.
    """
    top = _Folder()
    yield 0, "nothing", {}
    for number, (kind, path, *rest) in enumerate(log, 1):
        _apply(top, kind, path, rest)
        for lost, data in _DATA.items():
            yield number, f"data {lost}", _tree(top, lambda folder: folder.entries, data)
        yield number, "names", _tree(top, lambda folder: folder.synced, _DATA["gone"])
        for folder in _folders(top):
            if folder.entries != folder.synced:
                old = lambda one, folder=folder: one.synced if one is folder else one.entries  # noqa: E731
                yield number, "names of one folder", _tree(top, old, _DATA["gone"])


_DATA = {
    "kept": lambda file: file.data,
    "gone": lambda file: file.synced,
    "short": lambda file: file.synced + file.data[len(file.synced) :][: (len(file.data) - len(file.synced)) // 2],
    "zero": lambda file: file.synced.ljust(len(file.data), b"\0"),
}


def _apply(top, kind, path, rest):
    parent, name = _find(top, os.path.dirname(path)), os.path.basename(path)
    if not path and kind == "mkdir":  # the root itself, which is there
        return
    if kind == "mkdir":
        parent.entries[name] = _Folder()
    elif kind == "open":
        parent.entries.setdefault(name, _File())
    elif kind == "unlink":
        del parent.entries[name]
    elif kind == "rename":
        _find(top, os.path.dirname(rest[0])).entries[os.path.basename(rest[0])] = parent.entries.pop(name)
    else:
        one = _find(top, path)
        if kind == "write":
            one.data += rest[0]
        elif kind == "truncate":
            one.data = b""
        else:
            one.synced = dict(one.entries) if isinstance(one, _Folder) else one.data


def _find(top, path):
    for name in path.split(os.sep) if path else ():
        top = top.entries[name]
    return top


def _folders(top):
    yield top
    for one in top.entries.values():
        if isinstance(one, _Folder):
            yield from _folders(one)


def _tree(folder, names, data, path=""):
    found = {}
    for name, one in names(folder).items():
        here = os.path.join(path, name)
        if isinstance(one, _Folder):
            found |= {here: None} | _tree(one, names, data, here)
        else:
            found[here] = data(one)
    return found


def build(state, root):
    """Makes a folder as `power_cuts` says it would be."""
    for path, data in {"": None, **state}.items():
        full = os.path.join(root, path)
        if data is None:
            os.makedirs(full, exist_ok=True)
        else:
            with open(full, "wb") as file:
                file.write(data)
