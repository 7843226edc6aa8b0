"""What the environment says of a launcher: whether this process is one of several. Knows no JAX."""

import os

from jaxsub import errors

COUNTS = (  # variables that say how many processes there are, of the launchers that JAX knows and our own
    "SLURM_STEP_NUM_TASKS",  # of srun; SLURM_NTASKS stands in a batch script too, which runs once
    "OMPI_COMM_WORLD_SIZE",
    "JAX_NUM_PROCESSES",
)
SHOWN = (
    *COUNTS, "SLURM_JOB_ID", "SLURM_PROCID", "SLURM_STEP_NODELIST", "OMPI_COMM_WORLD_RANK", "TPU_WORKER_HOSTNAMES",
    "TPU_WORKER_ID", "JAX_COORDINATOR_ADDRESS", "JAX_PROCESS_ID",
)  # fmt: skip


def several():
    """Whether a launcher started several processes, or this is a host of a TPU of several."""
    hosts = [name for name in os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",") if name]
    return len(hosts) > 1 or _counted() is not None


def shown():
    """What was found, for messages."""
    found = ", ".join(f"{name}={errors.quote(os.environ[name], 60)}" for name in SHOWN if name in os.environ)
    return f"detected: {found or 'no launcher'}"


def own():
    """(coordinator, count, id) of our own variables; nothing where a launcher is left to JAX."""
    names = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
    address, count, number = (os.environ.get(name, "") for name in names)
    if not (address and count.isdecimal() and number.isdecimal()):
        return "", 0, -1
    return address, int(count), int(number)


def require_alone(program):
    """Refuses a program that runs as one process where a launcher started several: all would do and write the same.

    A TPU's host by itself is no reason: nothing says that the program was started on the others too.

    Raises:
        ConfigError: naming the variable.
    """
    name = _counted()
    if name is not None:
        raise errors.ConfigError(
            f"{program} runs as one process, and {name}={errors.quote(os.environ[name], 20)}: start one "
            "(srun --ntasks=1), or unset the variable; analyze and fit run as several"
        )


def _counted():
    """The variable that counts several processes, or None."""
    return next((name for name in COUNTS if os.environ.get(name, "").isdecimal() and int(os.environ[name]) > 1), None)
