"""DARE: drop most entries of every update at random, make up for it by scaling the others, then task arithmetic.

    w_0 + scaling * sum_n a_n (m_n o (w_n - w_0)) / density,   m_n entries of 1 with chance `density`, else 0

In the mean over draws it is task arithmetic; a draw adds noise of relative variance (1 - density) / density to every
entry. The paper drops 90 % and more of updates of large language models (density 0.1 and less); 0.5 is a common choice
for smaller networks, whose updates are not so redundant. Masks hang on `--seed`, the layer's and the model's name only.
Weights a_n are 1 unless given. mergekit rescales by sums of magnitudes instead of 1 / density.

Fails where updates are large beside the weights: their dropped entries are not redundant (section 4.6 of the paper).
"""

import dataclasses

from jaxsub.merges import _drop

REFERENCE = "Yu et al. 2024, language models are super Mario (arXiv 2311.03099), equation 1"
NEEDS_UPDATES = True
IS_ENTRYWISE = True
BLOCKS = 10  # random bits, numbers and masks of all models


@dataclasses.dataclass(frozen=True)
class Options:
    """How much is kept, and how it is added up."""

    density: float = 0.5  # chance of an entry to stay, 1 - p of the paper
    scaling: float = 0.3  # of the sum of the updates


def merge(rows, options, key):
    """The sum of the updates with dropped entries."""
    return _drop.linear(rows, key, options.density, options.scaling)
