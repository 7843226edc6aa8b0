"""Limits of control groups, from trees of files as Linux has them."""

import math
import pathlib
import subprocess
import sys

import pytest

from jaxsub import cgroups, hostmemory

GIB = 2**30
V1_NONE = "9223372036854771712"  # what version 1 says where there is no limit


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Function that lays out /proc/self/cgroup and groups, and lets the module look there."""

    def make(own, files):
        for name, text in {"proc/self/cgroup": own, **{f"sys/fs/cgroup/{k}": v for k, v in files.items()}}.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        monkeypatch.setattr(cgroups, "ROOT", str(tmp_path))
        cgroups.cores.cache_clear()

    yield make
    cgroups.cores.cache_clear()


def test_no_groups_no_limits(tree):
    tree("", {})
    assert cgroups.memory_left() == cgroups.memory_limit() == cgroups.cores() == math.inf
    assert hostmemory.available() <= hostmemory.meminfo("MemAvailable") + 2**30 and hostmemory.cores() >= 1


def test_version_two_in_a_container_of_its_own(tree):
    """Files are given back, shared memory and what programs hold are not."""
    stat = f"anon {2 * GIB}\nfile {3 * GIB}\nshmem {GIB}\ninactive_file {GIB}\nactive_file {GIB}\n"
    tree(
        "0::/\n",
        {
            "memory.max": f"{8 * GIB}\n",
            "memory.current": f"{5 * GIB}\n",
            "memory.stat": stat,
            "cpu.max": "150000 100000\n",
        },
    )
    assert cgroups.memory_limit() == 8 * GIB and cgroups.memory_left() == 5 * GIB
    assert cgroups.cores() == 1.5
    assert hostmemory.total() == min(8 * GIB, hostmemory.meminfo("MemTotal"))


def test_the_tightest_group_on_the_way_up_counts(tree):
    job, step = "system.slice/slurmstepd.scope/job_7", "system.slice/slurmstepd.scope/job_7/step_0"
    tree(
        f"0::/{step}\n",
        {
            f"{step}/memory.max": "max\n",
            f"{step}/memory.current": f"{GIB}\n",
            f"{step}/cpu.max": "max 100000\n",
            f"{job}/memory.max": f"{4 * GIB}\n",
            f"{job}/memory.current": f"{GIB}\n",
            f"{job}/memory.stat": "inactive_file 0\nactive_file 0\n",
            f"{job}/cpu.max": "400000 100000\n",
            "system.slice/memory.max": f"{64 * GIB}\n",
            "system.slice/memory.current": f"{62 * GIB}\n",
        },
    )
    assert cgroups.memory_limit() == 4 * GIB and cgroups.memory_left() == 2 * GIB  # the slice has no more left
    assert cgroups.cores() == 4


@pytest.mark.parametrize("seen", ["docker/abc", ""], ids=["path of the host", "its own root"])
def test_version_one(tree, seen):
    """Sums over the groups below are what counts; of the whole machine there is no limit."""
    at = f"memory/{seen}/" if seen else "memory/"
    stat = f"inactive_file 1\nactive_file 1\ntotal_inactive_file {GIB}\ntotal_active_file 0\n"
    files = {
        at + "memory.limit_in_bytes": f"{6 * GIB}\n",
        at + "memory.usage_in_bytes": f"{3 * GIB}\n",
        at + "memory.stat": stat,
        "cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
        "cpu,cpuacct/cpu.cfs_period_us": "100000\n",
    }
    if seen:
        files |= {"memory/memory.limit_in_bytes": V1_NONE, "memory/memory.usage_in_bytes": str(40 * GIB)}
    tree("4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n0::/\n", files)
    assert cgroups.memory_limit() == 6 * GIB and cgroups.memory_left() == 4 * GIB
    assert cgroups.cores() == math.inf
    (pathlib.Path(cgroups.ROOT) / "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us").write_text("50000\n")
    cgroups.cores.cache_clear()
    assert cgroups.cores() == 0.5 and hostmemory.cores() == 1


@pytest.mark.parametrize("own", ["0::/../../other\n", "nonsense\n", "4:memory\n", ":::\n", "0::/a\x00b\n"])
def test_odd_lines_are_no_limit(tree, own):
    tree(own, {"memory.max": "many\n", "memory.current": "-5\n", "cpu.max": "max\n", "../other/memory.max": "1\n"})
    assert cgroups.memory_left() == cgroups.memory_limit() == cgroups.cores() == math.inf


def test_a_group_that_is_full_is_no_unknown(tree):
    tree("0::/\n", {"memory.max": f"{GIB}\n", "memory.current": f"{GIB + 5}\n", "memory.stat": "anon 1\n"})
    assert hostmemory.available() == 1
    code = "from jaxsub import cgroups; print(cgroups.memory_limit(), cgroups.cores())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).returncode == 0
