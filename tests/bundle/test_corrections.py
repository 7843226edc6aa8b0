"""A bound on every model's error: met, with the fewest entries, and down to the bit where it is zero."""

import dataclasses

import numpy as np
import pytest

import jaxsub
from jaxsub import errors
from jaxsub.bundle import corrections, files
from tests.bundle import test_bundle, test_lora_bundle
from tests.selected import first


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return test_bundle.collection(tmp_path_factory.mktemp("corrections") / "models")


def relative(bundle, folder, layer, count=12):
    x = test_bundle.weights(folder, layer).astype(np.float64).reshape(count, -1)
    again = bundle.reconstruct(bundle.coefficients())[layer].astype(np.float64).reshape(count, -1)
    return np.linalg.norm(again - x, axis=1) / np.linalg.norm(x, axis=1)


def test_every_model_meets_the_bound_and_bytes_fall_as_it_rises(folder, tmp_path):
    sizes, free = [], jaxsub.fit(folder, rank=2, layers=["weight"])
    for bound in (0.0, 1e-3, 0.1, 0.4, 0.8, 0.99):
        path = tmp_path / str(bound)
        jaxsub.fit(folder, path, rank=2, layers=["weight"], max_error=bound)
        bundle = jaxsub.load(path)
        for layer in bundle.layers:
            error = relative(bundle, folder, layer.name)
            assert error.max() <= bound
            assert error.max() <= free.layer(layer.name, layer.shape).figures["error_max"] * (1 + 1e-6)
            assert layer.figures["error_max"] == pytest.approx(error.max(), rel=1e-4, abs=1e-12)
        assert files.verify(path) == []
        sizes.append(bundle.accounting()["corrections"])
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < sizes[0] / 2
    whole = jaxsub.load(tmp_path / "0.0").layer("b.weight", (6, 5)).corrections  # whole: no places of entries
    assert not whole.places.size and sum(a.nbytes for a in whole.tensors().values()) == 12 * 8 + 12 * 30 * 4


def test_without_a_bound_nothing_is_kept(folder):
    bundle = jaxsub.fit(folder, rank=2, layers=["weight"])
    assert bundle.accounting()["corrections"] == 0 and all(one.corrections is None for one in bundle.layers)


@pytest.mark.parametrize("dtype", first([np.float16, np.float32]))
def test_a_bound_of_zero_gives_the_weights_to_the_bit(tmp_path, dtype):
    folder = test_bundle.collection(tmp_path / "m", dtype=dtype)
    bundle = jaxsub.fit(folder, rank=1, layers=["weight"], max_error=0.0, basis_dtype="int8")
    for layer in bundle.layers:
        assert layer.corrections.values.dtype == dtype
        again = bundle.reconstruct(bundle.coefficients())[layer.name].astype(dtype)
        np.testing.assert_array_equal(again, test_bundle.weights(folder, layer.name))


def test_enormous_weights_keep_their_entries(tmp_path):
    folder = test_bundle.collection(tmp_path / "m", scale=2.0**80)
    bundle = jaxsub.fit(folder, rank=1, layers=["weight"], max_error=0.3)
    for layer in bundle.layers:
        error = relative(bundle, folder, layer.name)
        assert error.max() <= 0.3 and layer.figures["error_max"] == pytest.approx(error.max(), rel=1e-3)
    assert bundle.layers[-1].corrections is not None


def test_no_smaller_set_of_entries_would_do():
    """Against all subsets of a small weight: the fewest entries, not those of the first that come."""
    rng = np.random.default_rng(0)
    x, again = rng.standard_normal((2, 1, 200)).astype(np.float32)
    again = x + again * np.exp(2 * rng.standard_normal(200))
    found = corrections.entries(x, lambda n: again[n], 0.5, dtype=np.dtype(np.float32))
    off, norm = np.square(again - x)[0], np.square(x).sum()
    count = int(found.counts[0])
    assert 0 < count < 100
    assert np.sort(off)[: 200 - count].sum() <= 0.25 * norm < np.sort(off)[: 200 - count + 1].sum()
    fixed = found.apply(np.array(again, np.float32))
    assert np.count_nonzero(fixed != again.astype(np.float32)) == count
    assert np.square(fixed - x).sum() <= 0.25 * norm


def test_entries_of_some_models_are_theirs(folder):
    bundle = jaxsub.fit(folder, rank=2, layers=["weight"], max_error=0.3)
    every, ids = bundle.reconstruct(bundle.coefficients()), bundle.model_ids
    some = bundle.reconstruct(bundle.coefficients([ids[7], ids[2]]))
    for name, value in some.items():
        np.testing.assert_allclose(value, every[name][[7, 2]], rtol=1e-5, atol=1e-6)
        wanted = bundle.layer(name, value.shape[1:]).corrections
        if wanted is not None:
            kept = wanted.take([7, 2], value[0].size)
            assert kept.counts.tolist() == wanted.counts[[7, 2]].tolist()
    assert any(one.corrections is not None for one in bundle.layers)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [(2,), (1, 2, 3)])
def test_updates_that_come_back_too_far_off_keep_their_factors(tmp_path, ranks):
    folder, updates = test_lora_bundle.adapters(tmp_path / "m", noise=0.4, ranks=ranks)
    sizes = []
    for bound in (0.0, 0.5, 0.7, 0.95):
        jaxsub.fit(folder, tmp_path / str(bound), rank=2, max_error=bound)
        bundle = jaxsub.load(tmp_path / str(bound))
        every = bundle.coefficients()
        again = bundle.reconstruct(every)["layer.q"].astype(np.float64)
        error = np.sqrt(np.square(again - updates).sum((1, 2)) / np.square(updates).sum((1, 2)))
        assert error.max() <= max(bound, 1e-6) and bundle.layers[0].figures["error_max"] <= bound
        a, b = bundle.reconstruct_factors(every)["layer.q"]
        np.testing.assert_allclose(b @ a, again, atol=1e-5)
        sizes.append(bundle.accounting()["corrections"])
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < sizes[1] < sizes[0]


def test_projected_models_have_no_corrections_of_members(folder):
    bundle = jaxsub.fit(folder, rank=1, layers=["weight"], max_error=0.0)
    found = bundle.project(jaxsub.open_collection(folder))
    assert not found.corrections
    again = bundle.reconstruct(dataclasses.replace(bundle.coefficients(), corrections={}))
    np.testing.assert_allclose(bundle.reconstruct(found)["b.weight"], again["b.weight"], rtol=1e-5, atol=1e-5)


def test_a_bound_that_nothing_could_mean_is_refused(folder):
    for options in ({"max_error": 1.0}, {"max_error": 0.1, "budget_bytes": 10_000}, {"max_error": float("nan")}):
        with pytest.raises(errors.ConfigError, match="max_error"):
            jaxsub.fit(folder, **options)


@pytest.mark.parametrize("change", first(["places", "counts", "values", "positions"]))
def test_corrections_that_do_not_fit_are_refused(folder, tmp_path, monkeypatch, change):
    if change == "positions":
        made = jaxsub.fit(test_lora_bundle.adapters(tmp_path / "m", noise=0.4)[0], rank=2, max_error=0.35)
    else:
        made = jaxsub.fit(folder, rank=2, layers=["weight"], max_error=0.5)
    stored = files._contents

    def wrong(bundle):
        for name, tensors in stored(bundle):
            for key in tensors:
                if key.endswith(change):
                    array = tensors[key]
                    tensors[key] = array[:-1] if change == "values" else array + array.dtype.type(2**20)
            yield name, tensors

    monkeypatch.setattr(files, "_contents", wrong)
    made.save(tmp_path / "b")
    with pytest.raises(errors.InputError, match="does not fit its files"):
        jaxsub.load(tmp_path / "b")


def test_own_factors_take_no_more_than_each_update_has():
    rng = np.random.default_rng(0)
    ranks, most = [2, 5, 1, 3], 5
    a, b = np.zeros((4, most, 7), np.float32), np.zeros((4, 6, most), np.float32)
    for n, r in enumerate(ranks):
        a[n, :r], b[n, :, :r] = rng.standard_normal((r, 7)), rng.standard_normal((6, r))
    scales = np.array([1.0, 2.0, 0.5, 3.0])
    wanted = scales[:, None, None] * (b.astype(np.float64) @ a.astype(np.float64))
    found = corrections.factors(a, b, scales, np.array([1.0, 0.2, 1.0, 1.0]), 0.5, dtype=np.dtype(np.float32))
    assert found.positions.tolist() == [0, 2, 3] and found.ranks.tolist() == [2, 1, 3]
    assert sum(x.nbytes for x in (found.a, found.b)) == 6 * (7 + 6) * 4
    found.check(4, (6, 7))
    both = corrections.joined(found, found.take([2, 0], 42), (4, 2))
    both.check(6, (6, 7))
    again = both.applied(np.zeros((6, 6, 7)))
    np.testing.assert_allclose(again[[0, 2, 3, 4, 5]], wanted[[0, 2, 3, 2, 0]], rtol=1e-12)
    assert not again[1].any()
    x, y = both.apply_factors(np.ones((6, 1, 7)), np.ones((6, 6, 1)))
    np.testing.assert_allclose((y @ x)[[0, 2, 3]], wanted[[0, 2, 3]], rtol=1e-6)
    np.testing.assert_array_equal((y @ x)[1], np.ones((6, 7)))
    one = found.take([3], 42)
    assert one.are_of(a[3], b[3], 3.0) and not one.are_of(a[3], b[3], 2.0) and not one.are_of(a[2], b[2], 3.0)
    for other in (
        dataclasses.replace(found, ranks=np.array([2, 1, 4])),
        dataclasses.replace(found, ranks=np.array([2, -1, 5])),
        dataclasses.replace(found, positions=np.array([0, 0, 3])),
        dataclasses.replace(found, scales=np.ones(2)),
        dataclasses.replace(found, scales=np.array([1.0, np.nan, 1.0])),
        dataclasses.replace(found, a=found.a.astype(np.int32)),
    ):
        with pytest.raises(ValueError):
            other.check(4, (6, 7))


def test_factors_of_one_rank_as_bundles_had_them_are_read():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 3, 7)), rng.standard_normal((2, 6, 3))
    old = {"positions": np.array([1, 3]), "a": a, "b": b, "scales": np.array([1.0, 2.0])}
    found = corrections.of_tensors(old)
    found.check(4, (6, 7))
    np.testing.assert_allclose(found.apply(np.zeros((4, 6, 7)))[[1, 3]], [b[0] @ a[0], 2 * b[1] @ a[1]])


@pytest.mark.slow
def test_corrections_of_another_kind_of_layer_are_refused(folder, tmp_path):
    own, updates = jaxsub.fit(folder, rank=2, layers=["a.weight"], max_error=0.0), tmp_path / "l"
    test_lora_bundle.adapters(updates)
    other = jaxsub.fit(str(updates), rank=1, max_error=0.0)
    for made, wrong in ((own, other), (other, own)):
        (layer,), (strange,) = made.layers, wrong.layers
        forged = dataclasses.replace(made, layers=(dataclasses.replace(layer, corrections=strange.corrections),))
        path = tmp_path / layer.parametrisation
        forged.save(path)
        with pytest.raises(errors.InputError, match="corrections of another kind"):
            jaxsub.load(path)
