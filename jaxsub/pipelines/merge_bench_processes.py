"""Zoos of a bench scored side by side, on the cores that one process leaves idle.

Each process takes zoos one after another and leaves what it finds in the workdir, where the bench looks before it
works: what a process did not do, because it was killed or met an error, the bench does, and says what is wrong.
"""

import collections
import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from concurrent import futures

import jax

from jaxsub import errors, hostmemory

BYTES = 2 * 2**30  # of one process at its peak; the worlds of configs/merge_bench.py take 1.6 GB
# A terminal interrupts all processes: the bench alone answers. What the user's own configuration prints goes to stderr.
CHILD = """
import signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
import json, os, sys
said = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)
job = json.loads(sys.stdin.readline())
sys.path[:] = job["path"]
from jaxsub.pipelines import merge_bench_processes
merge_bench_processes.serve(job, said)
"""
LINE, DONE, FAILED = "line", "done", "failed"  # what a process says: a text of progress, or how a zoo ended


def count(wanted, zoos):
    """Processes for so many zoos: `wanted`, or where that is 0 one a core, within memory; 1 on accelerators."""
    if jax.default_backend() != "cpu":
        return 1  # a process takes all memory of a device
    most = wanted or min(hostmemory.cores(), hostmemory.available() // BYTES)
    return max(1, min(most, zoos))


def run(bench, place, zoos, num_processes, stream):
    """Scores zoos, until all are done, one has failed, or no process is left.

    Args:
        bench: the file of a bench's options, see `merge_bench.load`.
        place: its workdir.
        zoos: [(index of the world, number of the zoo)].
        num_processes: at least 1.
        stream: for progress, or None.

    Returns:
        The zoos whose models or methods met an error that the user should see.
    """
    left, lock, started, failed = collections.deque(zoos), threading.Lock(), [], []

    def stop():
        left.clear()
        for process in started:
            process.kill()

    def say(text):
        if stream is not None:
            with lock:
                stream.write(text)

    def work(number):
        # From both ends: neighbours are of one world, and each process compiles a world's kernels for itself.
        take = left.pop if number % 2 else left.popleft
        # A process that cannot be started, or has ended, is no failure: see above.
        with contextlib.suppress(OSError, ValueError, IndexError), _started(bench, place) as process:
            started.append(process)
            ended = DONE
            while ended == DONE:
                zoo = take()
                ended = _score(process, zoo, say)
            if ended == FAILED:
                failed.append(zoo)
                stop()

    with futures.ThreadPoolExecutor(num_processes) as pool:
        try:
            for done in [pool.submit(work, number) for number in range(num_processes)]:
                done.result()
        finally:  # after an interrupt threads wait for processes that are at work
            stop()
    return failed


def _started(bench, place):
    command = [sys.executable, "-P", "-c", CHILD]  # -P: no modules of the current folder
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")
    with contextlib.suppress(OSError):
        job = {"path": [os.fspath(folder) for folder in sys.path], "bench": bench, "place": place}
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
    return process


def _score(process, zoo, say):
    """How a zoo that a process is told of ended there, DONE or FAILED; None where the process itself has."""
    process.stdin.write(json.dumps(zoo) + "\n")
    process.stdin.flush()
    for line in process.stdout:
        what, text = json.loads(line)
        if what != LINE:
            return what
        say(text)
    return None


def serve(job, said):
    """What a process does: zoos that it is told of, until nobody is there to tell it.

    Args:
        job: dict of the "bench" and the "place" of `run`.
        said: file for lines of JSON, [LINE, text] and, after each zoo, [DONE or FAILED, ""].
    """
    from jaxsub.pipelines import merge_bench

    told = queue.SimpleQueue()

    def listen():
        for line in sys.stdin:
            told.put(json.loads(line))
        os._exit(0)  # the bench has ended, or was killed

    def say(what, text=""):
        said.write(json.dumps([what, text]) + "\n")
        said.flush()

    own, methods = merge_bench.load(job["bench"])
    threading.Thread(target=listen, daemon=True).start()
    before = None
    while True:
        world, number = told.get()
        if world != before:
            jax.clear_caches()  # compiled for the shapes of another world
        before = world
        try:
            merge_bench.score_zoo(own, methods, job["place"], world, number, _Lines(say))
        except errors.JaxsubError:
            say(FAILED)
        else:
            say(DONE)


class _Lines:
    """A stream whose texts are said."""

    def __init__(self, say):
        self.say = say

    def write(self, text):
        self.say(LINE, text)
