"""When a program takes itself for one of several processes; runs of several are in `programs/test_*processes.py`."""

import subprocess
import sys

import numpy as np
import pytest

from jaxsub import cli, distributed, errors, launcher


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in launcher.SHOWN:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("variables", "several"),
    [
        ({}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, False),  # a batch script: it runs once
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "4"}, True),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"JAX_NUM_PROCESSES": "nonsense"}, False),
    ],
)
def test_what_says_that_there_are_several(monkeypatch, variables, several):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launcher.several() == several


@pytest.mark.parametrize(
    "given", [{"coordinator": "a:1"}, {"num_processes": 2}, {"coordinator": "a:1", "process_id": 0}]
)
def test_half_of_the_options_are_refused(given):
    with pytest.raises(errors.ConfigError, match="give all three"):
        distributed.start(**given)


def test_a_number_beyond_the_count_is_refused():
    with pytest.raises(errors.ConfigError, match=r"0 \.\. 1"):
        distributed.start("host:1", 2, 2)


def test_alone_everything_is_a_plain_call():
    assert distributed.is_main() and distributed.gather_objects({"a": 1}) == [{"a": 1}]
    np.testing.assert_array_equal(distributed.gather(np.arange(3)), [[0, 1, 2]])
    assert distributed.together(lambda: 5) == 5
    with pytest.raises(errors.WorkdirError):
        distributed.together(lambda: (_ for _ in ()).throw(errors.WorkdirError("x")))
    distributed.require_same("collection", "abc")


ALONE = [name for name in cli.PROGRAMS if name not in ("analyze", "fit")]


@pytest.mark.parametrize(
    "program", [name if name in ("verify", "zoo") else pytest.param(name, marks=pytest.mark.slow) for name in ALONE]
)
def test_programs_of_one_process_refuse_several(monkeypatch, program):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    script = f"from jaxsub.cli import entry; entry(['jaxsub', {program!r}])"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == 2 and "runs as one process, and SLURM_STEP_NUM_TASKS=4" in ended.stderr


def test_a_host_of_a_tpu_may_run_a_program_alone(monkeypatch):
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b")
    launcher.require_alone("jaxsub verify")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(errors.ConfigError, match="OMPI_COMM_WORLD_SIZE=2"):
        launcher.require_alone("jaxsub verify")
