"""Subspaces of a bundle in the network's layers, random ones beside them, and directions that are added."""

import jax
import numpy as np
import pytest

from jaxsub import errors
from jaxsub.parametrisations import _spaces, factor, scalar


def rows(k, d, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((d, k)))[0].T.astype(np.float32)


def linear(k=4, shape=(5, 6), members=9):
    basis = rows(k, int(np.prod(shape))).reshape(k, *shape)
    values = {-1: np.linspace(3, 1, k)}
    return _spaces.Space(np.ones(shape, np.float32), basis, {}, np.zeros((members, k)), values, False, (0, 1))


def test_names_of_files_and_of_the_network():
    assert _spaces.flax_name("hidden.weight") == ("hidden/kernel", True)
    assert _spaces.flax_name("block_0.query", is_update=True) == ("block_0/query/kernel", True)
    assert _spaces.flax_name("block_0/query/kernel") == ("block_0/query/kernel", False)
    assert _spaces.flax_name("hidden.bias") == ("hidden/bias", False)


def test_arrays_of_torch_are_turned_and_wrong_ones_refused():
    w = np.arange(2 * 3 * 5 * 7).reshape(2, 3, 5, 7)
    np.testing.assert_array_equal(_spaces.turned(w, (5, 7, 3, 2), "conv.weight")[4, 6], w[:, :, 4, 6].T)
    with pytest.raises(errors.ConfigError, match="conv.weight.*shape"):
        _spaces.turned(w, (5, 7, 2, 3), "conv.weight")


@pytest.mark.parametrize("seed", range(3))
def test_added_directions_are_orthonormal_and_cover_both_signs(seed):
    known = rows(4, 300)
    found = _spaces.augmented(known, 20, jax.random.key(seed))
    np.testing.assert_array_equal(found[:4], known)
    np.testing.assert_allclose(found @ found.T, np.eye(24), atol=3e-6)
    # Gaussian, not positive numbers: the sum of a row of positive ones of norm 1 would be near .87 sqrt(300) = 15.
    assert np.abs(found[4:].sum(axis=1)).max() < 5
    np.testing.assert_array_equal(found, _spaces.augmented(known, 20, jax.random.key(seed)))
    assert not np.array_equal(found, _spaces.augmented(known, 20, jax.random.key(seed + 1)))


def test_the_last_direction_there_is_and_none_beyond():
    known = rows(63, 64)
    found = _spaces.augmented(known, 1, jax.random.key(0))
    np.testing.assert_allclose(found @ found.T, np.eye(64), atol=3e-6)
    with pytest.raises(errors.ConfigError, match="augment=2: 63 directions of 64, at most 1"):
        _spaces.augmented(known, 2, jax.random.key(0))


def test_more_components_than_there_are_is_refused_with_the_cap():
    space = linear(k=4, members=5)
    with pytest.raises(errors.ConfigError, match=r"rank=6.*holds 4 components \(5 models give 4 at most\).*augment"):
        scalar.init(jax.random.key(0), {"a": space.mean}, {"a": space}, scalar.Options(rank=6))


def test_saturated_bases_are_named_and_no_others():
    spaces = {"a": linear(k=4, members=5), "b": linear(k=4, members=6), "c": linear(k=4, shape=(2, 2), members=60)}
    assert _spaces.saturated(spaces) == [("a", 4, 5), ("c", 4, 60)]


def test_directions_of_copies_are_refused():
    space = linear()
    basis = space.basis.copy()
    basis[3] = 0
    for broken in (space._replace(basis=basis), space._replace(values={-1: np.array([3.0, 2, 1, 0])})):
        with pytest.raises(errors.ConfigError, match="no directions.*copies"):
            _spaces.chosen(broken, 4, "a")
        assert len(_spaces.chosen(broken, 3, "a")) == 3


@pytest.mark.parametrize("shape", [(64,), (200, 2)])
def test_matched_directions_of_a_long_axis_are_not_the_bundles_own(shape):
    """The covariance that k components have along it spans nothing but them."""
    space = linear(k=16, shape=shape)
    own, size = space.basis.reshape(16, -1), int(np.prod(shape))
    found = [
        np.square(_spaces.random_like(space, jax.random.key(s), is_matched=True).basis.reshape(16, -1) @ own.T).sum()
        / 16
        for s in range(20)
    ]
    assert np.mean(found) == pytest.approx(
        16 / size, rel=0.15
    )  # what random subspaces share; 1 where they are the same


def test_a_number_of_components_in_all_takes_the_strongest():
    spaces = {"a": linear(), "b": linear()._replace(values={-1: np.linspace(2.5, 0.1, 4)})}
    assert _spaces.leading(spaces, 3) == {"a": 2, "b": 1}  # 3, 2.5, 2.33
    with pytest.raises(errors.ConfigError, match="dimension=9: the bundle holds 8"):
        _spaces.leading(spaces, 9)


def test_random_subspaces_are_orthonormal_and_meet_the_bundle_by_chance():
    space = linear(k=4, shape=(20, 30))
    own = space.basis.reshape(4, -1)
    for is_matched in (False, True):
        found = _spaces.random_like(space, jax.random.key(0), is_matched=is_matched)
        drawn = found.basis.reshape(4, -1)
        np.testing.assert_allclose(drawn @ drawn.T, np.eye(4), atol=1e-5)
        assert np.square(own @ drawn.T).mean() < 0.05


def test_matched_random_directions_have_the_covariance_of_the_axes():
    """Directions that live on the first two of 20 inputs: matched random ones do too, others hardly ever."""
    basis = np.zeros((4, 20, 30), np.float32)
    basis[:, :2] = rows(4, 60).reshape(4, 2, 30)
    space = linear(k=4, shape=(20, 30))._replace(basis=basis)
    shares = [
        float(np.square(_spaces.random_like(space, jax.random.key(1), is_matched=m).basis[:, :2]).sum() / 4)
        for m in (False, True)
    ]
    assert shares[0] < 0.3 and shares[1] > 0.999


@pytest.mark.parametrize("components", [6, 3])
def test_consolidated_loadings_hold_what_the_free_columns_learnt(components):
    rng = np.random.default_rng(0)
    basis = rows(4, 40).astype(np.float64)
    old = basis.T @ rng.standard_normal((4, 3))
    inside = basis.T @ rng.standard_normal((4, 3))
    whole = inside + rng.standard_normal((40, 2)) @ rng.standard_normal((2, 3))
    found, (own, new) = factor.consolidated([old, whole], components)
    np.testing.assert_allclose(found @ found.T, np.eye(components), atol=1e-12)
    left = np.square(old - found.T @ own).sum() + np.square(whole - found.T @ new).sum()
    tail = np.linalg.svd(np.concatenate([old, whole], axis=1), compute_uv=False)[components:]
    assert left == pytest.approx(np.square(tail).sum(), rel=1e-9, abs=1e-18)
    # The published way, loadings of the part inside the old subspace alone, loses the free columns.
    published = found.T @ (found @ inside)
    assert np.square(whole - published).sum() > 1.2 * max(left, 1.0)
