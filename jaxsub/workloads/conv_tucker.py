"""Tucker decomposition of a stack of convolution kernels, five axes."""

import dataclasses

from jaxsub.workloads import _tucker

REFERENCE = _tucker.REFERENCE


@dataclasses.dataclass(frozen=True)
class Options:
    """Shape of the stack and the ranks."""

    shape: tuple[int, ...] = (64, 256, 128, 3, 3)
    ranks: tuple[int, ...] = (16, 64, 32, 3, 3)


QUICK = Options((32, 64, 32, 3, 3), (8, 16, 8, 3, 3))
problem, work, communication = _tucker.problem, _tucker.work, _tucker.communication
ours, peers, error = _tucker.ours, _tucker.peers, _tucker.error
