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
    assert (len(train.targets), len(held_out.targets)) == (1437, 360)
    # Every row once: a hash of image and label, counted, is the same for the table and the two parts together.
    whole = sorted(bytes(i) + bytes([c]) for i, c in zip(images, labels, strict=True))
    parts = sorted(
        bytes(np.round(i * 16).astype(np.uint8)) + bytes([c])
        for split in (train, held_out)
        for i, c in zip(split.inputs, split.targets, strict=True)
    )
    assert whole == parts
    assert np.bincount(held_out.targets, minlength=10).min() > 20
    assert held_out.targets[:12].tolist() == FIRST_HELD_OUT
    assert (train.inputs.min(), train.inputs.max(), train.inputs.dtype) == (0.0, 1.0, np.float32)


FIRST_HELD_OUT = [2, 8, 2, 6, 6, 7, 1, 9, 8, 5, 2, 8]  # as RandomState(0) orders the rows


def test_batches_draw_all_allowed_rows_and_no_other():
    rows = np.array([7, 3, 5, 0, 1, 2], np.int32)  # the first three are allowed
    drawn = digits.batches(jax.numpy.asarray(rows), np.int32(3), digits.Options(batch_size=300), jax.random.key(0))
    values, counts = np.unique(np.asarray(drawn), return_counts=True)
    assert values.tolist() == [3, 5, 7]
    assert counts.min() > 65  # 100 expected, standard deviation 8


@pytest.mark.slow
def test_loss_is_the_mean_cross_entropy():
    logits = np.random.default_rng(0).standard_normal((5, 10)).astype(np.float32)
    labels = np.array([0, 3, 9, 3, 1], np.int32)
    p = np.exp(logits.astype(np.float64))
    expected = -np.log((p / p.sum(axis=1, keepdims=True))[np.arange(5), labels]).mean()
    assert float(digits.loss(jax.numpy.asarray(logits), labels)) == pytest.approx(expected, rel=1e-6)


def test_score_counts_right_answers():
    logits = np.eye(10)[[[0, 1, 2], [2, 1, 0]]]
    np.testing.assert_array_equal(digits.score(logits, np.array([0, 1, 2])), [[True, True, True], [False, True, False]])


def varied(**options):
    return digits.load(digits.Options(**options))


def test_variations_do_what_they_are_called():
    plain, turned = varied()[0], varied(variant="turned", draw=0)[0]
    images = plain.inputs.reshape(-1, 8, 8)
    np.testing.assert_array_equal(turned.inputs.reshape(-1, 8, 8)[:, 0], images[:, :, 7])  # the last column comes up
    np.testing.assert_array_equal(varied(variant="mirrored", draw=0)[0].inputs.reshape(-1, 8, 8), images[:, :, ::-1])
    np.testing.assert_array_equal(varied(variant="mirrored", draw=1)[0].inputs.reshape(-1, 8, 8), images[:, ::-1])
    np.testing.assert_array_equal(varied(variant="inverted")[0].inputs, 1 - plain.inputs)
    names = {*zip(plain.targets.tolist(), varied(variant="names", draw=2)[0].targets.tolist(), strict=True)}
    assert len(names) == 10 == len({new for _, new in names}) and any(a != b for a, b in names)
    pixels = varied(variant="pixels", draw=2)
    np.testing.assert_array_equal(np.sort(pixels[0].inputs, axis=1), np.sort(plain.inputs, axis=1))
    assert not np.array_equal(pixels[0].inputs, plain.inputs)


def test_the_same_change_is_made_to_the_held_out_images():
    for options in ({"variant": "pixels", "draw": 1}, {"variant": "turned"}, {"variant": "names"}):
        (train, held_out), (plain, other) = varied(**options), varied()
        changed = np.concatenate([train.inputs, held_out.inputs]), np.concatenate([train.targets, held_out.targets])
        whole = np.concatenate([plain.inputs, other.inputs]), np.concatenate([plain.targets, other.targets])
        # One permutation of columns, and one of names, explains both parts: equal multisets a column and a class.
        assert sorted(map(bytes, changed[0].T)) == sorted(map(bytes, whole[0].T))
        assert len({*zip(whole[1].tolist(), changed[1].tolist(), strict=True)}) == 10


def test_halves_use_their_classes_only():
    train, held_out = varied(variant="half", draw=4)
    name = digits.name(digits.Options(variant="half", draw=4))
    for data, total in ((train, 1437), (held_out, 360)):
        _, targets = data.used()
        assert "digits " + "".join(map(str, np.unique(targets))) == name and len(name) == 12
        assert len(targets) == np.isin(data.targets, np.unique(targets)).sum() < total
    assert len({digits.name(digits.Options(variant="half", draw=d)) for d in range(30)}) > 20
