"""Many processes as one run: how they find each other, and how what only one of them knows becomes known to all.

Every process runs the same program on its own columns of every layer, whose sums meet in the kernels' all-reduce, or
on whole layers of its own. In between, all processes must take the same way: a file that only one cannot read, or a NaN
in its columns, goes through `together` or `gather` first. Process 0 writes. With one process everything here is a plain
call.
"""

import contextlib
import faulthandler
import functools
import itertools
import json
import os
import socket
import sys
import time

import jax
import numpy as np

from jaxsub import errors, launcher

HEARTBEAT_SECONDS = 60  # a process that is silent for so long ends all
STALL_SECONDS = 1800
MEET_SECONDS = 7 * 24 * 3600  # one that hangs ends by its own Watchdog, one that died by its heartbeat
SHUTDOWN_SECONDS = 24 * 3600  # the others wait so long for process 0 to write the report


def start(coordinator="", num_processes=0, process_id=-1):
    """Joins the processes of this run; before JAX is used. With one process, does nothing.

    Args:
        coordinator: host:port of process 0, or empty: taken from Slurm, Open MPI, the TPU's metadata, or from
            JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
        num_processes, process_id: how many there are, and which this one is; 0 and -1 with an empty coordinator.

    Raises:
        ConfigError: options that do not fit each other; or processes that do not find each other, with what was
            detected.
    """
    given = bool(coordinator), num_processes > 0, process_id >= 0
    if any(given) and not all(given):
        raise errors.ConfigError("coordinator, num_processes and process_id: give all three, or none to detect them")
    if not any(given):
        if not launcher.several():
            return
        coordinator, num_processes, process_id = launcher.own()
    if num_processes and not 0 <= process_id < num_processes:
        raise errors.ConfigError(f"process_id={process_id}: must lie in 0 .. {num_processes - 1}")
    if jax.distributed.is_initialized():
        return
    patience = int(os.environ.get("JAXSUB_CONNECT_SECONDS", "300"))
    who = f"process {process_id} of {num_processes}, process 0 at {coordinator}" if num_processes else "as detected"
    # JAX aborts where processes do not find each other, without a word on why: said before, and tried before.
    sys.stderr.write(f"joining the other processes ({who}; {launcher.shown()})\n")
    try:
        if process_id > 0:
            _require_reachable(coordinator, patience)
        jax.distributed.initialize(
            coordinator or None,
            num_processes or None,
            process_id if num_processes else None,
            initialization_timeout=patience,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise errors.ConfigError(
            f"the processes of this run do not find each other ({who}: {errors.quote(error)}); {launcher.shown()}; "
            "give --coordinator=HOST:PORT, --num_processes and --process_id"
        ) from error
    with _stdout_as_stderr():  # gloo says there that it is connected; programs print results there
        processes_here.cache_clear()
        processes_here()
        for devices in (jax.local_devices(), jax.devices()) if jax.default_backend() == "cpu" else ():
            _sum_over(devices)


def _sum_over(devices):
    """Sums a one of each device: what a group of devices exchanges by is made at their first sum."""
    mesh = jax.sharding.Mesh(np.asarray(devices), ("all",))
    spec = jax.sharding.PartitionSpec("all")
    ones = jax.make_array_from_callback(
        (len(devices),), jax.NamedSharding(mesh, spec), lambda _: np.ones(1, np.float32)
    )
    summed = jax.shard_map(lambda x: jax.lax.psum(x, "all"), mesh=mesh, in_specs=spec, out_specs=jax.P())
    jax.jit(summed)(ones).block_until_ready()


def _require_reachable(coordinator, patience):
    """Raises OSError or ValueError unless something answers at host:port within `patience` seconds."""
    host, _, port = coordinator.rpartition(":")
    end = time.monotonic() + patience
    while True:
        try:
            return socket.create_connection((host.strip("[]"), int(port)), timeout=max(1, patience)).close()
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


@contextlib.contextmanager
def _stdout_as_stderr():
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def is_main():
    """Whether this is the process that writes."""
    return jax.process_index() == 0


@functools.cache
def processes_here():
    """How many processes of this run share this machine and its memory; known to all from their `start` on."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            machine = file.read()
    except OSError:
        machine = socket.gethostname()
    return gather_objects(machine).count(machine)


def gather(array):
    """(processes, *shape): a NumPy array of every process; all must call it, with one shape and dtype."""
    array = np.asarray(array)
    if jax.process_count() == 1:
        return array[None]
    from jax.experimental import multihost_utils

    raw = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)  # whatever JAX does to wide dtypes
    found = np.asarray(multihost_utils.process_allgather(raw)).reshape(jax.process_count(), -1)
    return np.stack([np.frombuffer(row.tobytes(), array.dtype).reshape(array.shape) for row in found])


def gather_objects(value):
    """[value of every process]; values that JSON can hold."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = gather(np.array([len(data)], np.int64))[:, 0]
    padded = np.zeros(1 << max(8, int(sizes.max() - 1).bit_length()), np.uint8)  # few shapes are compiled
    padded[: len(data)] = data
    return [json.loads(row[:size].tobytes()) for row, size in zip(gather(padded), sizes, strict=True)]


_meetings = itertools.count()  # the same number on all processes, which take the same way


def meet():
    """Waits for all processes, for days if it must be: a collective of gloo gives up after half an hour."""
    if _service() is not None:
        with _in_words():
            _service().wait_at_barrier(f"jaxsub-{next(_meetings)}", MEET_SECONDS * 1000)


class Notes:
    """Numbers that processes leave for each other, without waiting; to be made at the same place by all of them."""

    def __init__(self):
        self.folder = f"jaxsub/{next(_meetings)}/"

    def leave(self, number):
        """Shows a number to all processes."""
        if _service() is not None:
            with _in_words():
                _service().key_value_set(f"{self.folder}{number}", "")

    def read(self):
        """[numbers] that were left so far."""
        if _service() is None:
            return []
        with _in_words():
            return [int(key.rpartition("/")[2]) for key, _ in _service().key_value_dir_get(self.folder)]


@contextlib.contextmanager
def _in_words():
    """Says what an error of the service means: another process was killed, stalled or ran out of memory."""
    try:
        yield
    except RuntimeError as error:
        said = f"another process of this run has ended; its own output says why ({errors.quote(error, 120)})"
        raise errors.PeerError(said, errors.ResourceError.exit_code) from error


def _service():
    """What keeps the processes together: JAX shows it to nobody, and Orbax takes it from here too.

    None where there is one process, or where a TPU's hosts became one run by themselves: there collectives must do.
    """
    from jax._src import distributed

    return distributed.global_state.client


def from_main(call):
    """call() of process 0, known to all; values that JSON can hold. If it fails, all fail.

    The others wait for as long as it takes.
    """
    if jax.process_count() == 1:
        return call()
    return gather_objects(together(call if is_main() else lambda: None, is_long=True))[0]


def together(call, *, is_long=False):
    """call() on every process; if it fails on one, all fail.

    Args:
        call: function of no arguments.
        is_long: whether one process may take half an hour longer than another.

    Raises:
        JaxsubError: of this process, or else `PeerError` with the message and the exit code of the first that failed.
    """
    if jax.process_count() == 1:
        return call()
    result = failure = None
    try:
        result = call()
    except errors.JaxsubError as error:
        failure = error
    if is_long:
        meet()
    share(failure)
    return result


def share(failure):
    """Raises on all processes if one has a failure (a JaxsubError; None: it has not); see `together`."""
    if jax.process_count() == 1:
        if failure is not None:
            raise failure
        return
    if not gather(np.uint8(failure is not None)).any():
        return
    said = gather_objects(None if failure is None else [str(failure), failure.exit_code])
    if failure is not None:
        raise failure
    first = next(i for i, one in enumerate(said) if one is not None)
    raise errors.PeerError(f"process {first} of {len(said)}: {said[first][0]}", said[first][1])


class Watchdog:
    """Ends this process, with the stacks of its threads on stderr, if no `step` comes in time; the others then end too.

    Heartbeats go on in a process that is stuck. With one process it does nothing: there is someone to press Ctrl-C.
    """

    def __init__(self, seconds=0):
        """`seconds` between steps; 0: half an hour, or 20 times the median step so far where that is longer."""
        self.seconds, self.steps, self.last = seconds, [], None

    def __enter__(self):
        self.step()
        return self

    def step(self):
        """Something was finished; called once for each layer."""
        if jax.process_count() == 1:
            return
        now = time.monotonic()
        self.steps += [] if self.last is None else [now - self.last]
        self.last = now
        allowed = self.seconds or max(STALL_SECONDS, 20 * float(np.median(self.steps or [0])))
        faulthandler.dump_traceback_later(allowed, exit=True, file=sys.__stderr__)

    def __exit__(self, *_):
        faulthandler.cancel_dump_traceback_later()


def require_same(what, value, hint="all must see the same files, with the same times"):
    """Refuses where processes see different things, such as collections on disks that are not the same.

    Raises:
        ConfigError: naming the processes.
    """
    found = gather_objects(value)
    other = [str(i) for i, one in enumerate(found) if one != found[0]]
    if other:
        raise errors.ConfigError(
            f"process {', '.join(other[:8])} sees another {what} than process 0 ({errors.quote(found[0], 40)}): {hint}"
        )
