"""Members of a bundle that come back as it holds them: with what it keeps of them beside coefficients (--max_error).

A model is known by its name, which may be another's. So the numbers decide: what the bundle holds stands in for the
projection where it is nearer to the model as it is now.
"""

import math

import numpy as np

from jaxsub.bundle import corrections


def members(layer, ids, x, left, exponent):
    """What a bundle holds of models, where that is nearer to them than their projections.

    Args:
        layer: the bundle's Layer.
        ids: (n,) ids of the models.
        x: the models, a stack (n, *shape) times 2**-exponent, or factors (a, b, scales) as they are.
        left: (n,) float64 squared errors of the projections, at the scale of x.
        exponent: power of two that brings a stack near 1, so that squares are numbers.

    Returns:
        {position: (coefficients (k...), corrections of this one model, its squared error)}.
    """
    found, at = {}, {m: i for i, m in enumerate(layer.model_ids)}
    if layer.corrections is None:
        return found
    for position in (p for p, identifier in enumerate(ids) if identifier in at):
        place = at[ids[position]]
        own = layer.corrections.take([place], math.prod(layer.shape))
        if isinstance(own, corrections.Factors):
            error = 0.0 if own.are_of(*(part[position] for part in x)) else math.inf
        else:
            rebuilt = own.applied(np.array(layer.subspace.reconstruct(layer.values[place : place + 1])))
            rebuilt = np.ldexp(rebuilt[0].astype(np.float64), -exponent)
            error = np.square(x[position].astype(np.float64) - rebuilt).sum()
        if error < left[position] or not error:
            found[position] = layer.values[place], own, error
    return found
