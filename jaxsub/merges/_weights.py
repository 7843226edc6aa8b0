"""Weights of the models: the user's, or the method's own."""

import numpy as np

from jaxsub import errors


def given(rows, default):
    """(N,) float64: the user's weights, or `default` for every model."""
    if rows.weights is not None:
        return np.asarray(rows.weights, np.float64)
    return np.full(rows.num_models, float(default))


def shares(rows):
    """(N,) float64 weights that sum to 1, equal without the user's; raises ConfigError where they sum to 0."""
    found = given(rows, 1.0)
    found = found / max(float(np.abs(found).max()), np.finfo(np.float64).tiny)  # the sum of huge ones overflows
    total = float(found.sum())
    if abs(total) < 1e-8:
        raise errors.ConfigError("weights sum to 0: give others, or take method=weighted with normalize=false")
    return found / total
