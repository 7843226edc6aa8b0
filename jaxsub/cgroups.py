"""Limits that a container or a batch system sets on memory and processor time: Linux control groups, versions 1 and 2.

The system's own figures (/proc/meminfo, the cores) are those of the machine: a process in a container of 8 GiB on a
host of 512 is killed at 8. Every group from the process's own up to the root counts; those not seen here do not.
"""

import functools
import math
import os

ROOT = "/"  # of /proc and /sys; another one for tests


def memory_left():
    """Bytes that this process's groups may still take, with what they hold of files given back; inf if no limit."""
    return min((limit - used for limit, used in _memory()), default=math.inf)


def memory_limit():
    """Bytes that this process, and others in its groups, may have; inf if there is no limit."""
    return min((limit for limit, _ in _memory()), default=math.inf)


@functools.cache
def cores():
    """Processors' worth of time that this process may take, a fraction perhaps; inf if there is no limit. Read once."""
    found = [math.inf]
    for folder in _folders("cpu"):
        quota, period = (_text(folder, "cpu.max").split() + ["", ""])[:2]  # "max 100000"
        quota, period = quota or _text(folder, "cpu.cfs_quota_us"), period or _text(folder, "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(quota) and int(period):  # "max" and -1: none
            found.append(int(quota) / int(period))
    return min(found)


def _memory():
    """[(limit, bytes in use that are not of files)] of the groups that have a limit."""
    found = []
    for folder in _folders("memory"):
        limit = _text(folder, "memory.max") or _text(folder, "memory.limit_in_bytes")
        used = _text(folder, "memory.current") or _text(folder, "memory.usage_in_bytes")
        if limit.isdigit() and used.isdigit():
            stat = dict(line.split() for line in _text(folder, "memory.stat").splitlines() if line.count(" ") == 1)
            # Of version 1 sums over the groups below have names of their own.
            files = sum(int(stat.get(f"total_{name}", stat.get(name, 0))) for name in ("inactive_file", "active_file"))
            found.append((int(limit), max(0, int(used) - files)))
    return found


def _folders(controller):
    """Folders of the process's groups that `controller` may limit, from its own up to the root; none elsewhere."""
    found = []
    for line in _text(os.path.join(ROOT, "proc/self"), "cgroup").splitlines():
        number, names, path = (line.split(":", 2) + ["", ""])[:3]
        if number == "0" and not names:
            mounts = ["", "unified"]
        elif controller in names.split(","):
            mounts = [names, controller]
        else:
            continue
        # In a container the path may be that of the host, and the mount the container's own: then its root is what is
        # there. Nothing with ".." is looked up: such a path leads out of a namespace.
        parts = [part for part in path.split("/") if part]
        parts = [] if ".." in parts else parts
        for mount in dict.fromkeys(mounts):
            for count in range(len(parts), -1, -1):
                found.append(os.path.join(ROOT, "sys/fs/cgroup", mount, *parts[:count]))
    return found


def _text(folder, name):
    """Content of a file without its last line's end; "" where there is none."""
    try:
        with open(os.path.join(folder, name), encoding="ascii", errors="replace") as file:
            return file.read().strip()
    except (OSError, ValueError):  # a name that is none
        return ""
