"""Handwritten digits: 1797 images of 8 x 8 pixels, ten classes, in a fixed split; variations make many tasks of them.

Data: "Optical Recognition of Handwritten Digits", E. Alpaydin and C. Kaynak, UCI Machine Learning Repository 1998,
doi 10.24432/C50P49, licence CC BY 4.0; the test part, as scikit-learn ships it (`sklearn.datasets.load_digits`).
Kept here as uint8 (`digits.npz`), values unchanged.
"""

import dataclasses
import functools
import importlib.resources

import numpy as np

from jaxsub import errors
from jaxsub.tasks import _data

MODEL, OUTPUTS = "mlp", 10
batches, loss, score = _data.batches, _data.cross_entropy, _data.right
NUM_CLASSES, NUM_PIXELS, LARGEST_VALUE = 10, 64, 16
NUM_HELD_OUT = 360  # a fifth of the rows
VARIANTS = ("plain", "half", "names", "pixels", "turned", "mirrored", "inverted")

KINDS = {"turned": 3, "mirrored": 2, "inverted": 1}  # different tasks of a variant, whatever the number of the draw


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the task."""

    batch_size: int = 64
    variant: str = "plain"  # half (of the classes), names (labels permuted), pixels (permuted), turned, ...
    draw: int = 0  # which half, permutation, turn (1 to 3 quarters) or axis


def table():
    """The table as it is stored: images (1797, 64) uint8 in 0..16 and labels (1797,) uint8."""
    with importlib.resources.files(__package__).joinpath("digits.npz").open("rb") as file:
        stored = np.load(file, allow_pickle=False)
        return stored["images"], stored["labels"]


@functools.cache
def _plain():
    """((inputs, targets) of 1437 rows, the same of 360 held out); the same rows always."""
    images, labels = table()
    # RandomState's stream is frozen by numpy (NEP 19), so the split does not depend on the version.
    order = np.random.RandomState(0).permutation(len(labels))
    inputs = images[order].astype(np.float32) / np.float32(LARGEST_VALUE)
    targets = labels[order].astype(np.int32)
    return (inputs[NUM_HELD_OUT:], targets[NUM_HELD_OUT:]), (inputs[:NUM_HELD_OUT], targets[:NUM_HELD_OUT])


def name(options):
    """'digits 01234' for classes, 'digits turned 1' for others; one name for draws that are one task."""
    _require(options)
    if options.variant in ("plain", "half"):
        classes = _data.half(options.draw) if options.variant == "half" else range(NUM_CLASSES)
        return "digits " + "".join(map(str, classes))
    if options.variant == "names":
        return "digits names " + "".join(map(str, _names(options.draw)))
    return f"digits {options.variant} {options.draw % KINDS.get(options.variant, 2**32)}"


def load(options=Options()):
    """(train, held out) as Data of 1437 and 360 rows; inputs (n, 64) float32 in 0..1.

    Raises:
        ConfigError: an unknown variant.
    """
    _require(options)
    return tuple(_varied(inputs, targets, options) for inputs, targets in _plain())


def _require(options):
    errors.require_known("variant", options.variant, VARIANTS)
    if not 0 <= options.draw < 2**32:
        raise errors.ConfigError(f"draw={options.draw}: expected 0 to 2**32 - 1")


def _names(draw):
    return np.random.RandomState(draw).permutation(NUM_CLASSES).astype(np.int32)


def _varied(inputs, targets, options):
    if options.variant == "half":
        return _data.of_classes(inputs, targets, _data.half(options.draw))
    images = inputs.reshape(-1, 8, 8)
    if options.variant == "names":
        targets = _names(options.draw)[targets]
    elif options.variant == "pixels":
        inputs = inputs[:, np.random.RandomState(options.draw).permutation(NUM_PIXELS)]
    elif options.variant == "turned":
        inputs = np.rot90(images, 1 + options.draw % KINDS["turned"], axes=(1, 2)).reshape(inputs.shape)
    elif options.variant == "mirrored":
        inputs = np.flip(images, 2 - options.draw % KINDS["mirrored"]).reshape(inputs.shape)
    elif options.variant == "inverted":
        inputs = np.float32(1) - inputs
    return _data.whole(np.ascontiguousarray(inputs), targets)
