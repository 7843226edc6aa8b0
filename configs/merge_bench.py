"""Which merge method is best on models with real held-out data, each tuned with the same number of evaluations?

    jaxsub merge --bench=configs/merge_bench.py --workdir=runs/merge_bench

Two free cores of an Intel Xeon, two processes: 6 min 6 s and 6 min 40 s, compiling included. Expect the table of the
README: no method is best in all worlds, the mean is hard to beat but where networks learned halves of one task, and
Concrete beats task arithmetic but not training on its loss.
"""

from jaxsub import config
from jaxsub.pipelines import merge_bench


def get_config(size="all"):
    """Four worlds with five zoos each; "quick" is one small world, for a first look."""
    options = config.default(merge_bench.Config)
    if size == "quick":
        options.worlds = ("same_start_split_task num_models=4 steps=100",)
        options.seeds, options.evaluations = 2, 3
        options.methods = ("mean", "task_arithmetic scaling=0..1", "ties scaling=0..4 density=.05..1")
        options.pairs = ()
        options.processes = 1  # starting more takes longer
    return options
