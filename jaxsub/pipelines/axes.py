"""Energies along a weight axis, from its mode Gram or from a sketch in two halves."""

import numpy as np

from jaxsub import solvers
from jaxsub.statistics import ModeEnergies


def exact_mode(axis, size, k, *, centred=True):
    """ModeEnergies of an axis from its whole Gram matrix `k`, or from the larger one of its other side."""
    values = np.maximum(solvers.eigvalsh(k)[::-1], 0.0)[:size]
    return ModeEnergies(axis, size, values, float(np.trace(k)), 0, centred)


def sketched_mode(axis, halves, total, *, centred=True):
    """Energies of directions found in one half of a sketch and measured in the other, both ways, averaged."""
    first, second = np.concatenate(halves, axis=1) if isinstance(halves, list) else np.asarray(halves)
    shares = sum(_cross_shares(first, second)) / 2
    return ModeEnergies(axis, first.shape[0], total * shares, total, first.shape[1], centred)


def _cross_shares(first, second):
    """Shares of each half (size, columns) along the directions found in the other."""
    size, columns = first.shape
    if columns <= size:  # from inner products of test columns: directions are combinations of them
        grams, across = (first.T @ first, second.T @ second), first.T @ second
        return _shares(grams[0], across, grams[1]), _shares(grams[1], across.T, grams[0])
    grams = first @ first.T, second @ second.T
    return _shares(grams[0], None, grams[1]), _shares(grams[1], None, grams[0])


def _shares(found, across, scored):
    """Shares of the scored half's energy along the directions found in the other, strongest first.

    Args:
        found, scored: the halves' Gram matrices, of test columns where `across` is given, else of rows.
        across: inner products of the found half's test columns with the scored half's.
    """
    values, vectors = solvers.eigh(found)
    values, vectors = values[::-1], vectors[:, ::-1]
    keep = values > values[0] * 1e-10 if values[0] > 0 else np.zeros(len(values), bool)
    if across is None:
        energy = np.einsum("dj,dj->j", vectors, scored @ vectors)
    else:
        energy = np.square(across.T @ vectors).sum(axis=0) / np.where(keep, values, 1.0)
    total = np.trace(scored)
    return energy * keep / total if total > 0 else energy * 0.0
