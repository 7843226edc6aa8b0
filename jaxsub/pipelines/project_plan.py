"""Memory of `project` and of `update`, from headers and the bundle: one layer at a time, its new models whole.

Follows the code of `subspace`, `bundle.refit` and `decompositions`; a change of what they hold belongs here too.
"""

import math

from jaxsub import errors, lineup, precision
from jaxsub.pipelines import fit_plan, plan

KERNELS = 60 * 2**20  # of a projection, half-way between starts that compile them and others
REFIT = 190 * 2**20  # of a basis fitted again
UPDATES, SWEEPS = 310 * 2**20, 250 * 2**20  # of one of low-rank updates, and what sweeps add
FACTORS = 3  # copies of low-rank updates' factors, with those that were read
LAPACK = 5  # of new rows in float64, which LAPACK makes orthonormal


def projection(group):
    """Bytes of the host that projecting the models of a LayerGroup takes."""
    return KERNELS + (FACTORS if group.parametrisation == lineup.LORA else 1) * fit_plan.stored_bytes(group)


def refit(group, layer):
    """Bytes of the host for a bundle's Layer that is fitted again, with the models of a LayerGroup."""
    new, old, size = len(group.members), len(layer.values), math.prod(group.shape)
    ranks, stack = layer.subspace.rank, fit_plan.stored_bytes(group)
    wide = 8 if precision.widest(group.dtypes) == "float64" else 4
    if layer.parametrisation == lineup.LORA:
        shape = lineup.flat_shape(group.shape)
        most = max(min(ranks.values()), *(e.rank for e in group.entries))
        sweeps = layer.subspace.procedure.name == "hooi"
        copies = 1 + (fit_plan.SWEEP_COPIES if sweeps else fit_plan.FACTOR_COPIES)
        factors = (new + old) * most * sum(shape) * wide
        return UPDATES + sweeps * SWEEPS + stack + int(copies * factors) + fit_plan.SQUARES * max(shape) ** 2
    if layer.is_linear:  # new models about the mean, the frame, and two bases
        rows = 2 * new + 3 * ranks + (LAPACK * new if wide == 8 else 0)
        return REFIT + stack + rows * size * wide
    kept = math.prod(min(d, ranks.get(axis, d) + new * size // d) for axis, d in enumerate(group.shape))
    return REFIT + stack + (new + 2 * (new + old)) * kept * wide


def require_memory(planned, config):
    """Raises ResourceError where the host's memory does not do for a layer; `planned`: (name, bytes) of each."""
    if config.max_host_bytes < 0:
        raise errors.ConfigError(f"max_host_bytes={config.max_host_bytes}: must be at least 0")
    name, most = max(planned, key=lambda item: item[1])
    cure = "allow more with --max_host_bytes, or give fewer models at a time"
    plan.require_host_memory(name, most, config.max_host_bytes, cure, " beside the bundle")


def text(planned, groups):
    """The plan as two lines."""
    read = plan.to_read(sum(group.num_bytes for group in groups))
    most = max(num_bytes for _, num_bytes in planned)
    return f"{read}\npeak host memory beyond the program's own and the bundle: {plan.size(most)}\n"
