"""Zoos of a bench scored side by side, on the cores that one process leaves idle.

Each process takes zoos one after another and leaves what it finds in the workdir, where the bench looks before it
works: what a process did not do, because it was killed or met an error, the bench does, and says what is wrong.
"""

import collections
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from concurrent import futures

import jax

from jaxsub import errors, hostmemory

BYTES = 2 * 2**30  # of one process at its peak; the worlds of configs/merge_bench.py take 1.6 GB
CHILD = """
import json, sys
job = json.loads(sys.stdin.readline())
sys.path[:] = job["path"]
from jaxsub.pipelines import merge_bench_processes
merge_bench_processes.serve(job)
"""


def count(wanted, zoos):
    """Processes for so many zoos: `wanted`, or where that is 0 one a core, within memory; 1 on accelerators."""
    if jax.default_backend() != "cpu":
        return 1  # a process takes all memory of a device
    most = wanted or min(os.cpu_count() or 1, hostmemory.available() // BYTES)
    return max(1, min(most, zoos))


def run(bench, place, zoos, processes, stream):
    """Scores zoos, until all are done or no process is left.

    Args:
        bench: the file of a bench's options, see `merge_bench.load`.
        place: its workdir.
        zoos: [(index of the world, number of the zoo)].
        processes: their number.
        stream: for progress, or None.
    """
    left, lock, started = collections.deque(zoos), threading.Lock(), []

    def work(number):
        # From both ends: neighbours are of one world, and each process compiles a world's kernels for itself.
        take = left.pop if number % 2 else left.popleft
        with _started(bench, place) as process, contextlib.suppress(BrokenPipeError, IndexError):
            started.append(process)
            while True:
                process.stdin.write(json.dumps(take()) + "\n")
                process.stdin.flush()
                for line in process.stdout:
                    said = json.loads(line)
                    if said is None:
                        break
                    with lock:
                        if stream is not None:
                            stream.write(said)
                else:
                    return  # it has ended

    with futures.ThreadPoolExecutor(processes) as pool:
        try:
            for done in [pool.submit(work, number) for number in range(processes)]:
                done.result()
        finally:  # after an interrupt threads wait for processes that are at work
            left.clear()
            for process in started:
                process.kill()


def _started(bench, place):
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8", errors="replace"
    )
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(json.dumps({"path": sys.path, "bench": bench, "place": place}) + "\n")
        process.stdin.flush()
    return process


def serve(job):
    """What a process does: zoos that it is told of, until nobody is there to tell it."""
    from jaxsub.pipelines import merge_bench

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal interrupts all; the bench ends this one
    told = queue.SimpleQueue()

    def listen():
        for line in sys.stdin:
            told.put(json.loads(line))
        os._exit(0)  # the bench has ended, or was killed

    own, methods = merge_bench.load(job["bench"])
    threading.Thread(target=listen, daemon=True).start()
    before = None
    with contextlib.suppress(errors.JaxsubError):  # the bench meets it, and says it
        while True:
            world, number = told.get()
            if world != before:
                jax.clear_caches()  # compiled for the shapes of another world
            before = world
            merge_bench.score_zoo(own, methods, job["place"], world, number, _Lines())
            _say(None)


class _Lines:
    def write(self, text):
        _say(text)


def _say(what):
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()
