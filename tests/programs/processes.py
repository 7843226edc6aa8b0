"""Runs one program as several processes of this machine, joined by gloo."""

import dataclasses
import os
import socket
import subprocess
import sys

ENTRY = "import sys; from jaxsub.cli import entry; entry(['jaxsub', *sys.argv[1:]])"


@dataclasses.dataclass
class Ended:
    """How one process ended."""

    code: int
    stdout: str
    stderr: str


def start(count, *arguments, before=None, heartbeat=None):
    """Popen objects of `jaxsub ARGUMENTS` in `count` processes; `before` maps a process to Python code run first."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    environment = {n: v for n, v in os.environ.items() if n != "XLA_FLAGS"}
    quick = f"import jaxsub.distributed as d; d.HEARTBEAT_SECONDS = {heartbeat};" if heartbeat else ""
    started = []
    for own in range(count):
        joined = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}", f"--process_id={own}"]
        code = quick + (before or {}).get(own, "") + "\n" + ENTRY
        command = [sys.executable, "-c", code, *arguments, *(joined if count > 1 else [])]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, env=environment, **pipes))
    return started


def run(count, *arguments, before=None, seconds=240, heartbeat=None):
    """[Ended] of `start`, all of them waited for."""
    ended = []
    started = start(count, *arguments, before=before, heartbeat=heartbeat)
    try:
        for process in started:
            out, err = process.communicate(timeout=seconds)
            ended.append(Ended(process.returncode, out, err))
    finally:
        for process in started:
            process.kill()
    return ended
