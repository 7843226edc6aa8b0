"""Where a report comes from: command, options, inputs, versions, devices, time and memory."""

import sys
import time

from jaxsub import config as configs, errors
from jaxsub.pipelines import plan


def record(config, fingerprint, mesh, meter, started):
    """The report's "provenance".

    Args:
        config: Config of the run.
        fingerprint: the collection's.
        mesh: devices it ran on.
        meter: `layers.Meter` of bytes and seconds. "open" is all before the pass (headers, the plan), "write" the
            statistics' files; the report itself is written when its record is made.
        started: time.perf_counter() at the start.
    """
    import jax
    import numpy

    from jaxsub import __version__

    seconds = {
        "open": meter.open_seconds,
        "read": meter.read_seconds,
        "compute": meter.compute_seconds,
        "figures": meter.figure_seconds,
        "write": meter.write_seconds,
        "total": time.perf_counter() - started,
    }
    return {
        "command": [errors.quote(a) for a in sys.argv],
        "config": configs.to_dict(config),
        "config_digest": configs.digest(config),
        "collection_fingerprint": fingerprint,
        "jaxsub_version": __version__,
        "versions": {"python": sys.version.split()[0], "jax": jax.__version__, "numpy": numpy.__version__},
        "platform": jax.default_backend(),
        "devices": [str(d) for d in mesh.devices.flat],
        "mesh": dict(mesh.shape),
        "processes": jax.process_count(),  # bytes, seconds and memory below are of the first
        "seed": config.seed,
        "precision": config.precision,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "bytes_read": meter.bytes_read,
        "peak_host_bytes": plan.peak_resident(),
    }
