"""How models of a world, and what is merged of them, are scored: the network, and each model's own held-out rows."""

import dataclasses
import typing

import numpy as np


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a world with `evaluation(options, seed)` says of its models, in their order.

    Attributes:
        model: flax module.
        task: module of `tasks`, for its loss and score.
        names: of the tasks, one a model.
        train, held_out: tuples of Data, one a model; row numbers are those of the same images for all.
        base: file beside the models that all were trained from.
        own: regular expression of layers that every task keeps its own model's of; empty for none.
        parameters: function ({layer: array}, base tensors) -> {name in the flax network: array}.
    """

    model: typing.Any
    task: typing.Any
    names: tuple
    train: tuple
    held_out: tuple
    base: str
    own: str = ""
    parameters: typing.Callable = lambda weights, base: weights


def stacked(data):
    """inputs (T, n, ...), targets (T, n), used (T, n) bool of a tuple of Data with the same number of rows."""
    used = np.zeros((len(data), len(np.asarray(data[0].targets))), bool)
    for mask, one in zip(used, data, strict=True):
        mask[np.asarray(one.rows)[: int(one.num_rows)]] = True
    return np.stack([np.asarray(d.inputs) for d in data]), np.stack([np.asarray(d.targets) for d in data]), used
