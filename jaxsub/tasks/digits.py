"""Handwritten digits: 1797 images of 8 x 8 pixels, ten classes, in a fixed split.

Data: "Optical Recognition of Handwritten Digits", E. Alpaydin and C. Kaynak, UCI Machine Learning Repository 1998,
doi 10.24432/C50P49, licence CC BY 4.0; the test part, as scikit-learn ships it (`sklearn.datasets.load_digits`).
Kept here as uint8 (`digits.npz`), values unchanged.
"""

import dataclasses
import functools
import importlib.resources

import numpy as np

NUM_CLASSES, NUM_PIXELS, LARGEST_VALUE = 10, 64, 16
NUM_HELD_OUT = 360  # a fifth of the rows


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the task."""

    batch_size: int = 64


@dataclasses.dataclass(frozen=True)
class Split:
    """Images (n, 64) float32 in 0..1 with their labels (n,) int32."""

    images: np.ndarray
    labels: np.ndarray


def table():
    """The table as it is stored: images (1797, 64) uint8 in 0..16 and labels (1797,) uint8."""
    with importlib.resources.files(__package__).joinpath("digits.npz").open("rb") as file:
        stored = np.load(file, allow_pickle=False)
        return stored["images"], stored["labels"]


@functools.cache
def load():
    """(train, held out) as Splits of 1437 and 360 rows; the same rows always."""
    images, labels = table()
    # RandomState's stream is frozen by numpy (NEP 19), so the split does not depend on the version.
    order = np.random.RandomState(0).permutation(len(labels))
    return _split(images, labels, order[NUM_HELD_OUT:]), _split(images, labels, order[:NUM_HELD_OUT])


def _split(images, labels, rows):
    scaled = images[rows].astype(np.float32) / np.float32(LARGEST_VALUE)
    return Split(images=scaled, labels=labels[rows].astype(np.int32))


def batches(rows, num_rows, options, key):
    """Row numbers of one batch, drawn with replacement; runs inside jit.

    Args:
        rows: (n,) int32 row numbers a network may see, in the first `num_rows` places.
        num_rows: () int32.
        options: Options.
        key: typed random key.

    Returns:
        (batch_size,) int32.
    """
    import jax
    import jax.numpy as jnp

    return rows[jax.random.randint(key, (options.batch_size,), 0, num_rows, dtype=jnp.int32)]


def loss(logits, labels):
    """Mean cross-entropy of logits (b, 10) against labels (b,), a scalar."""
    import optax

    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def score(logits, labels):
    """Whether each answer is right: logits (..., n, 10) and labels that broadcast to (..., n) give bools (..., n)."""
    return logits.argmax(axis=-1) == labels
