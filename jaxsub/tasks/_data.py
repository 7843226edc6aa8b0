"""What tasks share: examples with the rows a task uses, drawing batches, cross-entropy."""

import typing

import numpy as np


class Data(typing.NamedTuple):
    """Examples, and which of them a task uses. A pytree; many tasks are stacked along a leading axis.

    Attributes:
        inputs: (n, *shape).
        targets: (n,) or (n, T) int32; in sequences, -1 where nothing is asked.
        rows: (n,) int32 row numbers, those the task uses in the first `num_rows` places.
        num_rows: () int32.
    """

    inputs: typing.Any
    targets: typing.Any
    rows: typing.Any
    num_rows: typing.Any

    def used(self):
        """(inputs, targets) of the rows the task uses, on the host."""
        rows = np.asarray(self.rows)[: int(self.num_rows)]
        return np.asarray(self.inputs)[rows], np.asarray(self.targets)[rows]


def whole(inputs, targets):
    """Data that uses every row."""
    return Data(inputs, targets, np.arange(len(targets), dtype=np.int32), np.int32(len(targets)))


def of_classes(inputs, targets, classes):
    """Data that uses the rows of some classes only.

    Args:
        inputs, targets: (n, ...) and (n,) int32.
        classes: numbers of the classes.
    """
    allowed = np.isin(targets, classes)
    rows = np.argsort(~allowed, kind="stable").astype(np.int32)
    return Data(inputs, targets, rows, np.int32(allowed.sum()))


def half(draw, num_classes=10):
    """Sorted numbers of a random half of the classes, the one of number `draw`."""
    # RandomState's stream is frozen by numpy (NEP 19), so a draw does not depend on the version.
    return sorted(np.random.RandomState(draw).permutation(num_classes)[: num_classes // 2].tolist())


def batches(rows, num_rows, options, key):
    """Row numbers of one batch, drawn with replacement; runs inside jit.

    Args:
        rows: (n,) int32 row numbers a network may see, in the first `num_rows` places.
        num_rows: () int32.
        options: with a `batch_size`.
        key: typed random key.

    Returns:
        (batch_size,) int32.
    """
    import jax
    import jax.numpy as jnp

    return rows[jax.random.randint(key, (options.batch_size,), 0, num_rows, dtype=jnp.int32)]


def cross_entropy(outputs, targets):
    """Mean cross-entropy of outputs (..., o) against targets (...), a scalar; targets of -1 do not count."""
    import jax.numpy as jnp
    import optax

    asked = targets >= 0
    each = optax.losses.softmax_cross_entropy_with_integer_labels(outputs, jnp.where(asked, targets, 0))
    return jnp.where(asked, each, 0).sum() / jnp.maximum(asked.sum(), 1)


def right(outputs, targets):
    """Whether each answer is right: outputs (..., n, o) and targets that broadcast to (..., n) give bools (..., n)."""
    return outputs.argmax(axis=-1) == targets
