"""Do the models of a collection share a subspace, layer by layer, and is it more than chance or descent?

    jaxsub analyze --config=configs/analyze_default.py:runs/models --workdir=runs/report

Time, memory and figures: not run yet.
"""

from jaxsub import config
from jaxsub.pipelines import analyze


def get_config(collection="runs/models"):
    """The defaults of `jaxsub analyze` for one collection, with the seed written down."""
    options = config.default(analyze.Config)
    options.collection = (collection,)
    options.seed = 0
    return options
