"""Options that a merge method refuses, found before anything is read: the method itself is asked, on little."""

import jax
import numpy as np

from jaxsub import errors, rows
from jaxsub.pipelines import merge_rows

SHAPE = (2, 8, 8)  # made-up updates


def require(module, options):
    """Asks the method to merge made-up updates with these options.

    Args:
        module: of `jaxsub.merges`.
        options: its Options.

    Raises:
        ConfigError: as the method does, where its published options would do.
    """
    if options == module.Options() or not hasattr(module, "merge"):
        return
    try:
        _try(module, options)
    except errors.ConfigError:
        try:
            _try(module, module.Options())
        except errors.ConfigError:  # it takes other rows than these: nothing was learnt of the options
            return
        raise


def _try(module, options):
    x = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    own = rows.ArrayRows(x, is_update=True, weights=np.full(len(x), 0.5))
    merge_rows.merged(own, module, options, jax.random.key(0))
