"""The vendored digits table and its split."""

import jax
import numpy as np
import pytest

from jaxsub.tasks import digits


def test_table_is_that_of_scikit_learn():
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = digits.table()
    theirs = datasets.load_digits()
    assert images.dtype == labels.dtype == np.uint8
    np.testing.assert_array_equal(images, theirs.data)
    np.testing.assert_array_equal(labels, theirs.target)


def test_split_is_fixed_disjoint_and_has_every_class():
    images, labels = digits.table()
    train, held_out = digits.load()
    assert (len(train.labels), len(held_out.labels)) == (1437, 360)
    # Every row once: a hash of image and label, counted, is the same for the table and the two parts together.
    whole = sorted(bytes(i) + bytes([c]) for i, c in zip(images, labels, strict=True))
    parts = sorted(
        bytes(np.round(i * 16).astype(np.uint8)) + bytes([c])
        for split in (train, held_out)
        for i, c in zip(split.images, split.labels, strict=True)
    )
    assert whole == parts
    assert np.bincount(held_out.labels, minlength=10).min() > 20
    assert held_out.labels[:12].tolist() == FIRST_HELD_OUT
    assert (train.images.min(), train.images.max(), train.images.dtype) == (0.0, 1.0, np.float32)


FIRST_HELD_OUT = [2, 8, 2, 6, 6, 7, 1, 9, 8, 5, 2, 8]  # as RandomState(0) orders the rows


def test_batches_draw_all_allowed_rows_and_no_other():
    rows = np.array([7, 3, 5, 0, 1, 2], np.int32)  # the first three are allowed
    drawn = digits.batches(jax.numpy.asarray(rows), np.int32(3), digits.Options(batch_size=300), jax.random.key(0))
    values, counts = np.unique(np.asarray(drawn), return_counts=True)
    assert values.tolist() == [3, 5, 7]
    assert counts.min() > 65  # 100 expected, standard deviation 8


def test_loss_is_the_mean_cross_entropy():
    logits = np.random.default_rng(0).standard_normal((5, 10)).astype(np.float32)
    labels = np.array([0, 3, 9, 3, 1], np.int32)
    p = np.exp(logits.astype(np.float64))
    expected = -np.log((p / p.sum(axis=1, keepdims=True))[np.arange(5), labels]).mean()
    assert float(digits.loss(jax.numpy.asarray(logits), labels)) == pytest.approx(expected, rel=1e-6)


def test_score_counts_right_answers():
    logits = np.eye(10)[[[0, 1, 2], [2, 1, 0]]]
    np.testing.assert_array_equal(digits.score(logits, np.array([0, 1, 2])), [[True, True, True], [False, True, False]])
