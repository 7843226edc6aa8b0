"""MNIST-1D is what the published generator makes."""

import numpy as np
import pytest

from jaxsub.tasks import mnist1d

# Of mnist1d 0.0.2.post1, `make_dataset()` with its default arguments.
FIRST = [-0.33200567, -0.47191037, -0.77869708]
FIRST_TARGETS = [2, 6, 4, 5, 6, 6, 6, 0, 3, 1]


def test_series_are_those_of_the_published_generator():
    inputs, targets = mnist1d.generated()
    assert (inputs.shape, inputs.dtype, targets.dtype) == ((5000, 40), np.float32, np.int32)
    np.testing.assert_allclose(inputs[0, :3], FIRST, rtol=1e-6)
    assert targets[:10].tolist() == FIRST_TARGETS
    # Weighted sums of all numbers: any draw out of order moves them.
    weights = np.random.RandomState(0).standard_normal(inputs.shape)
    assert float((inputs * weights).sum()) == pytest.approx(SUM, abs=0.01)


SUM = 15.739260817319689


def test_the_package_makes_the_same():
    package = pytest.importorskip("mnist1d.data")
    theirs = package.make_dataset()
    inputs, targets = mnist1d.generated()
    np.testing.assert_array_equal(np.concatenate([theirs["x"], theirs["x_test"]]).astype(np.float32), inputs)
    np.testing.assert_array_equal(np.concatenate([theirs["y"], theirs["y_test"]]), targets)


def test_shuffled_places_are_one_permutation_for_all_rows():
    plain, _ = mnist1d.load()
    mixed, held_out = mnist1d.load(mnist1d.Options(variant="shuffled", draw=3))
    order = np.argmin(np.abs(plain.inputs[0][None] - mixed.inputs[0][:, None]), axis=1)
    assert sorted(order) == list(range(40)) and order.tolist() != list(range(40))
    np.testing.assert_array_equal(plain.inputs[:, order], mixed.inputs)
    np.testing.assert_array_equal(mnist1d.load()[1].inputs[:, order], held_out.inputs)
