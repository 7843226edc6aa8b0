"""Weights of the models: the user's, or the method's own."""

import numpy as np


def given(rows, default):
    """(N,) float64: the user's weights, or `default` for every model."""
    if rows.weights is not None:
        return np.asarray(rows.weights, np.float64)
    return np.full(rows.num_models, float(default))


def shares(rows):
    """(N,) float64 weights that sum to 1, equal without the user's."""
    found = given(rows, 1.0)
    return found / found.sum()
