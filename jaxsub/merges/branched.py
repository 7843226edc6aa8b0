"""Branched merging: models share a layer where they agree and keep it apart where they do not, under a budget.

    minimise  sum over layers and groups g of sum_(n in g) |w_n - mean_g|^2
    subject to  sum over layers of (number of groups) * (weights of the layer)  <=  budget * (weights of one model)

Every layer's models are parted into groups, each group takes the mean of its models; the result is one model an input,
in a folder of its own, with equal tensors wherever models share. Budget 1 is one model, `mean`; budget N keeps all. The
partition of a layer is the best there is up to 11 models, and so is the choice of layers but for a step of 1 / 20,000
of the budget. With `--loss=` groups are learned instead, by Gumbel-softmax over assignments: function(weights, model)
is the loss of one of the resulting models, given by its id, traceable by JAX; then groups are joined where that costs
least loss a weight saved, until the budget is held.

Fails where distance says little of function: layers in which models are close can matter most.
"""

import dataclasses

import numpy as np

from jaxsub import errors
from jaxsub.merges import _branches, _partitions

REFERENCE = "Bruggemann et al. 2020, branched multi-task networks (arXiv 2008.10292); weights fixed, groups by distance"
NEEDS_UPDATES = False
MANY = True  # a result is many models
TAKES_LOSS = True


@dataclasses.dataclass(frozen=True)
class Options:
    """What the resulting models may take together, and how groups are learned with a loss."""

    budget: float = 2.0  # distinct weights of all results together, in models
    steps: int = 300  # of Adam, with a loss
    rate: float = 0.1  # of Adam
    temperature: float = 5.0  # of the first step's Gumbel-softmax; the last has a tenth of it
    price: float = 0.05  # of a model's worth of weights, added to the loss


def partition(grams, sizes, options, learner=None, key=None):
    """[groups] of each layer, tuples of positions of models; they never take more than the budget.

    Args:
        grams: for each layer, the (N, N) inner products of its models.
        sizes: for each layer, what one version of it takes.
        options: Options.
        learner: `_branches.Learner`, where groups are to be learned on a loss; or None.
        key: typed PRNG key, for that.

    Raises:
        ConfigError: a budget under one model.
    """
    require_budget(options)
    total = options.budget * float(np.sum(sizes)) * (1 + 1e-12)
    if learner is not None:
        return _branches.within(learner.learn(key), grams, sizes, total, learner.of)
    choices = [_partitions.losses(gram) for gram in grams]
    found = _partitions.allocate([{g: loss for g, (loss, _) in one.items()} for one in choices], list(sizes), total)
    return [one[g][1] for one, g in zip(choices, found, strict=True)]


def require_budget(options):
    """Raises ConfigError for a budget that holds no model."""
    if not options.budget >= 1:
        raise errors.ConfigError(f"budget={options.budget}: at least 1, the weights of one model")
