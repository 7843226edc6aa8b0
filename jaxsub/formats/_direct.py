"""Large reads past the page cache, from local drives; what is cached is taken from there.

A collection larger than memory is read once: keeping its pages costs the system more than the numbers cost
us (1 to 2 processor seconds a GiB against 0.25) and pushes out what others had there. Only files on block devices of
this machine are read so; network and memory file systems keep their own ways.
"""

import contextlib
import ctypes
import errno
import fcntl
import functools
import mmap
import os
import threading

import numpy as np

ALIGNMENT = 4096  # of offsets, lengths and memory; no drive in use asks for more
PIECE = 4 * 2**20  # bytes a read; they land in a buffer of the thread's own and are copied from there
_O_DIRECT = getattr(os, "O_DIRECT", 0)
_local = threading.local()


def fill(fd, device, position, view):
    """Fills as much of `view` as it can, from its start; returns how many bytes. The caller reads the rest as usual.

    Args:
        fd: descriptor of a regular file.
        device: its st_dev.
        position: byte of the file at which `view` begins.
        view: writable memoryview of bytes.
    """
    if not _O_DIRECT or not _is_drive(device) or _is_cached(fd, position, view.nbytes):
        return 0
    return _past_the_cache(fd, position, view)


@functools.cache
def _is_drive(device):
    """Whether a device number is that of a block device of this machine, not of a network or memory file system."""
    return os.path.exists(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")


def _is_cached(fd, position, num_bytes):
    """Whether most of a range lies in the page cache (or whether that is not to be known: it then is to be tried)."""
    first = position // ALIGNMENT * ALIGNMENT
    length = position + num_bytes - first
    try:
        # Never read through: a mapping only serves as the address range that mincore asks about.
        with mmap.mmap(fd, length, prot=mmap.PROT_READ, offset=first) as mapped:
            pages = np.zeros(-(-length // mmap.PAGESIZE), np.uint8)
            address = np.frombuffer(mapped, np.uint8)
            failed = _mincore()(address.ctypes.data, length, pages.ctypes.data)
            del address
    except (OSError, ValueError, AttributeError):
        return True
    return bool(failed) or np.count_nonzero(pages & 1) > len(pages) // 2


@functools.cache
def _mincore():
    function = ctypes.CDLL(None, use_errno=True).mincore
    function.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p
    return function


def _past_the_cache(fd, position, view):
    buffer, done = _buffer(), 0
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | _O_DIRECT)
        target, source = np.frombuffer(view, np.uint8), np.frombuffer(buffer, np.uint8)
        while done < view.nbytes:
            first = (position + done) % ALIGNMENT
            count = min(view.nbytes - done, PIECE)
            whole = -(-(first + count) // ALIGNMENT) * ALIGNMENT
            read = os.preadv(fd, [memoryview(buffer)[:whole]], position + done - first) - first
            if read <= 0:
                break
            count = min(count, read)
            np.copyto(target[done : done + count], source[first : first + count])  # other threads run meanwhile
            done += count
    except OSError as error:
        if error.errno != errno.EINVAL:  # the file system has no such reads
            raise
    finally:
        with contextlib.suppress(OSError):
            fcntl.fcntl(fd, fcntl.F_SETFL, flags)
    return done


def _buffer():
    """Memory of the thread's own for reads, aligned to a page."""
    if not hasattr(_local, "buffer"):
        _local.buffer = mmap.mmap(-1, PIECE + ALIGNMENT)
    return _local.buffer
