"""ST-HOSVD of a stack of matrices, all three axes reduced."""

import dataclasses

from jaxsub.workloads import _tucker

REFERENCE = _tucker.REFERENCE


@dataclasses.dataclass(frozen=True)
class Options:
    """Shape of the stack and the ranks."""

    shape: tuple[int, ...] = (64, 1024, 1024)
    ranks: tuple[int, ...] = (16, 64, 64)


QUICK = Options((32, 256, 256), (8, 16, 16))
problem, work, communication = _tucker.problem, _tucker.work, _tucker.communication
ours, peers, error = _tucker.ours, _tucker.peers, _tucker.error
