"""The host: arrays that devices can use in place, giving back memory that is free, cores and BLAS threads."""

import contextlib
import ctypes
import functools
import gc
import math
import mmap
import os
import threading

import numpy as np

from jaxsub import cgroups

ALIGNMENT = 64  # bytes; device_put of host memory aligned so is free of copies on CPU
WORTHWHILE = 8 * 2**20
THREADED = 2048  # float32 on two cores: 0.72 s with one thread, 0.50 with two; 1024: 0.11 and 0.10
M_MMAP_THRESHOLD = -3  # of malloc.h
_trimmed = 0  # bytes resident after the last `trim`
_one = threading.RLock()  # of the thread that is inside `one_blas_thread`


def zeros(shape, dtype):
    """Host array that device_put need not copy on CPU; pages take memory once they are written to."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.zeros(size + ALIGNMENT, np.uint8)
    offset = -raw.ctypes.data % ALIGNMENT
    return raw[offset : offset + size].view(dtype).reshape(shape)


def aligned(x, dtype):
    """A copy of an array in such memory, in C's order."""
    found = zeros(x.shape, dtype)
    found[...] = x
    return found


def cores():
    """Number of cores that this process may use, by its affinity and the quota of its control groups."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return math.ceil(min(found, cgroups.cores()))


@contextlib.contextmanager
def one_blas_thread(side=0):
    """Within it BLAS and LAPACK, also those that XLA calls on CPU, work with one thread; all of the process.

    OpenBLAS gives matrices from 32 x 32 on to all its threads, and these then spin for more than 80 ms waiting for the
    next: six products of a randomized SVD with their small factorisations took 425 ms on two cores instead of 248.
    Nothing is limited for eigenproblems of a `side` from THREADED on, which take less time with all threads, nor where
    another thread of the process is within: the limit is its own to lift, as threadpoolctl has it.
    """
    with contextlib.ExitStack() as stack:
        if side < THREADED and _one.acquire(blocking=False):
            stack.callback(_one.release)
            stack.enter_context(_blas().limit(limits=1, user_api="blas"))
        yield


@functools.cache
def _blas():
    import scipy.linalg  # noqa: F401  whose library XLA calls: it must be loaded to be found
    import threadpoolctl

    return threadpoolctl.ThreadpoolController()


def free_at_once():
    """From now on arrays from WORTHWHILE / 8 on go back to the system when they are freed, whichever thread made them.

    Else glibc gives only larger ones pages of their own, up to 32 MiB, as soon as one has been freed, and keeps what
    threads that have ended freed. For programs whose threads make large arrays and end; new pages cost time.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library, or none
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, WORTHWHILE // 8)


def resident():
    """Bytes of memory that the process holds now; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * mmap.PAGESIZE
    except OSError:
        return 0


def available():
    """Memory that can be had without swapping and within control groups, bytes; 0 where the system does not say."""
    free = meminfo("MemAvailable")
    return max(1, min(free, cgroups.memory_left())) if free else 0


def total():
    """Memory of the machine, or of the control groups if they allow less, bytes; 0 where the system does not say."""
    return min(meminfo("MemTotal"), cgroups.memory_limit())


def meminfo(field):
    """A field of /proc/meminfo, bytes; 0 where there is none."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields[field].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 0


def trim():
    """Hands freed memory back to the system: glibc keeps up to several blocks of it, more in every thread.

    Not where the process holds little more than after the time before: it takes a millisecond, most of a small layer.
    """
    global _trimmed
    held = resident()
    if held < _trimmed + WORTHWHILE:
        _trimmed = min(_trimmed, held)
        return
    gc.collect(0)  # only now does jax let go of host arrays that it used in place
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library, or none
        ctypes.CDLL(None).malloc_trim(0)
    _trimmed = resident()
