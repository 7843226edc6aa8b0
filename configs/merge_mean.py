"""Is the mean of networks of one start a network, although no two of them saw the same classes?

    jaxsub merge --config=configs/merge_mean.py:runs/same_start_split_task/models --workdir=runs/mean

on what this made before:

    jaxsub zoo --world=same_start_split_task --workdir=runs

Of the held-out digits of all ten classes the 200 networks, each trained on five of them, know .49 on average and .55 at
best; their mean knows .55: it is a network, and no better than the best of them. 2 s.
"""

from jaxsub import config
from jaxsub.pipelines import merge


def get_config(collection="runs/same_start_split_task/models"):
    """The plain mean of all layers."""
    options = config.default(merge.Config)
    options.collection = (collection,)
    options.method = "mean"
    return options
