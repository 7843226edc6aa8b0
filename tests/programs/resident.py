"""Memory that a call takes, as the system counts it."""

import os
import pathlib

import pytest

from jaxsub import hostmemory
from jaxsub.pipelines import plan

RESTART = pathlib.Path("/proc/self/clear_refs")
needs_high_water_mark = pytest.mark.skipif(not os.path.exists(RESTART), reason="needs Linux' high-water mark")


def grown(call):
    """Bytes of resident memory at the most while `call` ran, beyond those before it."""
    before = hostmemory.resident()
    RESTART.write_text("5")  # the high-water mark starts again
    call()
    return plan.peak_resident() - before
