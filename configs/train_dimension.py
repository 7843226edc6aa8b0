"""How many numbers does digits take, in random subspaces and in the joint one of networks trained on halves of it?

    jaxsub train --config=configs/train_dimension.py:runs/wide/bundle --workdir=runs/dimension

The bundle as in train_digits.py, with --rank=64 --layers=kernel. 6 min on two shared cores. Expect d_int90
of 130 to 155 about fresh starts, whatever the projection, and 20 to 25 about the mean, in the joint subspace as in a
random one.
"""

from jaxsub import config
from jaxsub.pipelines import train


def get_config(bundle="runs/wide/bundle"):
    """The sweep for one bundle."""
    options = config.default(train.Config)
    options.bundle = bundle
    options.learning_rates = (0.01, 0.03, 0.1)
    options.seeds, options.steps = 5, 400
    options.sweep = (8, 16, 32, 64, 128, 256, 512)
    return options
