"""Spherical interpolation of two models along the arc between them.

    (sin((1 - t) theta) w_0 + sin(t theta) w_1) / sin(theta),   theta the angle between w_0 and w_1

The norm changes along the chord that a mean would take, not along the arc. Two models in the order of their ids; t is
the second one's share of the weights where the user gives these. Of weights as published, or with `--base` of updates.

Fails where the two point the same or opposite ways (|cos| > 0.9995): there it is linear interpolation. Two fine-tunes
of one base are so close that it nearly always is, unless the base is subtracted.
"""

import dataclasses

import numpy as np

from jaxsub import errors, rows as core
from jaxsub.merges import _weights

REFERENCE = "Shoemake 1985; `slerp` of mergekit, whose threshold is taken over"
NEEDS_UPDATES = False
READS = 2
COLLINEAR = 0.9995  # |cos| from which the arc is a line


@dataclasses.dataclass(frozen=True)
class Options:
    """The place on the arc."""

    t: float = 0.5  # 0 is the first model, 1 the second


def merge(rows, options, key):
    """The row on the arc; deterministic, `key` is not used."""
    del key
    core.require_models(rows, "slerp", 2, 2)
    if not np.isfinite(options.t):
        raise errors.ConfigError(f"t={options.t}: a number")
    t, gram = options.t, rows.gram()
    if rows.weights is not None:
        t = float(_weights.shares(rows)[1])
    norms = np.sqrt(np.maximum(np.diag(gram), 0.0))
    cosine = float(np.clip(gram[0, 1] / np.prod(norms), -1.0, 1.0)) if norms.all() else 1.0
    if abs(cosine) > COLLINEAR:
        return rows.combination([1 - t, t])
    theta = np.arccos(cosine)
    return rows.combination(np.sin([(1 - t) * theta, t * theta]) / np.sin(theta))
