"""What is left of a mean after it was taken off: nothing that a float64 fit could take for a direction."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxsub.linalg import centring

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize(
    "shape, by, axis",
    [
        ((24, 8), "models", None),
        ((16, 4096), "models", None),
        ((16, 4096), "columns", 1),
        ((16, 40), "columns", 0),
        ((4096,), "columns", 0),
    ],
)
def test_no_rounding_of_a_large_mean_stays(shape, by, axis):
    rng = np.random.default_rng(0)
    base = 1e3 * rng.standard_normal((1, *shape))
    if by == "columns":
        base = np.mean(base, axis=tuple(a + 1 for a in range(len(shape)) if a != axis), keepdims=True)
    x = base + 1e3 * rng.standard_normal((5, *shape)) * 50 * 2.0**-52
    y, _ = centring.centred(jnp.asarray(x), np.ones(5, bool), 5, by=by, axis=axis)
    over = 0 if by == "models" else tuple(a for a in range(x.ndim) if a != axis + 1)
    left = np.abs(np.asarray(y, np.longdouble).mean(axis=over)).max()
    assert left < 1e-4 * np.abs(np.asarray(y)).max()
