"""MNIST-1D: ten shapes of 12 points, padded, scaled, shifted, sheared and with noise, as series of 40 numbers.

Generated, to the bit as the published generator gives it (its default settings; numpy's legacy stream is frozen), in
about a second.

Source: Greydanus and Kobak 2024, "Scaling down deep learning with MNIST-1D", and the package mnist1d 0.0.2 (Apache
2.0), from which the templates and the constants are.
"""

import dataclasses
import functools

import numpy as np

from jaxsub import errors
from jaxsub.tasks import _data

MODEL, OUTPUTS = "mlp", 10
batches, loss, score = _data.batches, _data.cross_entropy, _data.right
TEMPLATES = (
    (5, 6, 6.5, 6.75, 7, 7, 7, 7, 6.75, 6.5, 6, 5),
    (5, 3, 3, 3.4, 3.8, 4.2, 4.6, 5, 5.4, 5.8, 5, 5),
    (5, 6, 6.5, 6.5, 6, 5.25, 4.75, 4, 3.5, 3.5, 4, 5),
    (5, 6, 6.5, 6.5, 6, 5, 5, 6, 6.5, 6.5, 6, 5),
    (5, 4.4, 3.8, 3.2, 2.6, 2.6, 5, 5, 5, 5, 5, 5),
    (5, 3, 3, 3, 3, 5, 6, 6.5, 6.5, 6, 4.5, 5),
    (5, 4, 3.5, 3.25, 3, 3, 3, 3, 3.25, 3.5, 4, 5),
    (5, 7, 7, 6.6, 6.2, 5.8, 5.4, 5, 4.6, 4.2, 5, 5),
    (5, 4, 3.5, 3.5, 4, 5, 5, 4, 3.5, 3.5, 4, 5),
    (5, 4, 3.5, 3.5, 4, 5, 5, 5, 5, 4.7, 4.3, 5),
)
SEED, NUM_SAMPLES, TRAIN_SHARE = 42, 5000, 0.8
PADDING, MAX_SHIFT, LENGTH = (36, 60), 48, 40
SCALE, SHEAR, NOISE, SMOOTH_NOISE, SMOOTHING = 0.4, 0.75, 0.02, 0.25, 2
VARIANTS = ("plain", "half", "shuffled")


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the task."""

    batch_size: int = 64
    variant: str = "plain"  # half (of the classes), shuffled (places permuted)
    draw: int = 0  # which half or permutation


def name(options):
    """'mnist1d 0123456789', 'mnist1d shuffled 3'."""
    errors.require_known("variant", options.variant, VARIANTS)
    if options.variant == "shuffled":
        return f"mnist1d shuffled {options.draw}"
    return "mnist1d " + "".join(map(str, _data.half(options.draw) if options.variant == "half" else range(10)))


def load(options=Options()):
    """(train, held out) as Data of 4000 and 1000 rows; inputs (n, 40) float32 of mean 0 and variance 1.

    Raises:
        ConfigError: an unknown variant.
    """
    errors.require_known("variant", options.variant, VARIANTS)
    inputs, targets = generated()
    if options.variant == "shuffled":
        inputs = inputs[:, np.random.RandomState(options.draw).permutation(LENGTH)]
    cut = int(len(targets) * TRAIN_SHARE)
    parts = ((inputs[:cut], targets[:cut]), (inputs[cut:], targets[cut:]))
    if options.variant == "half":
        return tuple(_data.of_classes(*part, _data.half(options.draw)) for part in parts)
    return tuple(_data.whole(*part) for part in parts)


@functools.cache
def generated(num_samples=NUM_SAMPLES, seed=SEED):
    """(inputs (n, 40) float32, targets (n,) int32) in the generator's order."""
    shapes = np.asarray(TEMPLATES, np.float64)
    shapes -= shapes.mean(axis=1, keepdims=True)
    shapes /= shapes.std(axis=1, keepdims=True)
    shapes = (shapes - shapes[:, :1]) / 6.0
    rng = np.random.RandomState(seed)
    series = np.stack([_drawn(shape, rng) for shape in shapes for _ in range(num_samples // len(shapes))])
    targets = np.repeat(np.arange(len(shapes), dtype=np.int32), num_samples // len(shapes))
    order = rng.permutation(len(targets))
    series = series[order]
    return ((series - series.mean()) / series.std()).astype(np.float32), targets[order]


def _drawn(shape, rng):
    """One series from a template; the order of the draws is the generator's."""
    import scipy.ndimage

    padded = np.concatenate([shape + 1e-8, np.zeros(PADDING[0] + int(rng.rand() * (PADDING[1] - PADDING[0] + 1)))])
    x = _resampled(padded, len(shape) + PADDING[1])
    x *= 1 + SCALE * (rng.rand() - 0.5)
    shift = rng.choice(MAX_SHIFT)
    x = np.concatenate([x[-shift:], x[:-shift]])
    smooth = scipy.ndimage.gaussian_filter(SMOOTH_NOISE * rng.randn(len(x)), SMOOTHING)
    x = np.where(x != 0, x, smooth) + NOISE * rng.randn(len(x))
    x = x - SHEAR * (rng.rand() - 0.5) * np.linspace(-0.5, 0.5, len(x))
    return _resampled(x, LENGTH)


def _resampled(x, length):
    return np.interp(np.linspace(0, 1, length), np.linspace(0, 1, len(x)), x)
