"""Does a merge in a fitted subspace differ from the plain mean? Linear averages of coefficients do not, TIES does.

    jaxsub merge --config=configs/merge_coefficients.py:mean --workdir=runs/coefficients_mean
    jaxsub merge --config=configs/merge_coefficients.py:ties --workdir=runs/coefficients_ties

on what these made before:

    jaxsub zoo --world=same_start_split_task --workdir=runs
    jaxsub fit --collection=runs/same_start_split_task/models --rank=8 --workdir=runs/fit

The mean of coefficients at rank 8 is the plain mean to 1.2e-7 of a weight, and the program says so (E33); held-out
digits of all ten classes: .55, as the plain mean. TIES on the same coefficients: .23. The 200 networks know .49 on
average. 3 and 5 s.
"""

from jaxsub import config
from jaxsub.pipelines import merge


def get_config(method="ties"):
    """Networks of the digits zoo as coefficients of a bundle, by one method."""
    options = config.default(merge.Config)
    options.collection = ("runs/same_start_split_task/models",)
    options.bundle = "runs/fit/bundle"
    options.method = method
    return options
