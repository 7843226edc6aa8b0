"""What does one adapter of rank 16 keep of the mean of 100 adapters of rank 4, or of their KnOTS-TIES merge?

    jaxsub merge --config=configs/merge_adapters.py:mean --workdir=runs/adapters_mean
    jaxsub merge --config=configs/merge_adapters.py:knots_ties --workdir=runs/adapters_knots

on what this made before:

    jaxsub zoo --world=lora --workdir=runs

Of the mean of 100 adapters rank 16 loses 4 % (norm) of the update of the hidden layer, of their KnOTS-TIES merge 41 %:
trimming fills the spectrum. The output layer has 10 rows, and loses nothing. 2 and 3 s.
"""

from jaxsub import config
from jaxsub.pipelines import merge


def get_config(method="mean"):
    """Adapters of the LoRA zoo by one method, cut to rank 16."""
    options = config.default(merge.Config)
    options.collection = ("runs/lora/models",)
    options.method = method
    options.rank = 16
    options.seed = 0
    return options
