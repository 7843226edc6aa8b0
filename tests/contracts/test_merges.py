"""What every merge method promises; a new file in jaxsub/merges is tested the moment it exists."""

import dataclasses
import zlib

import jax
import numpy as np
import pytest

from jaxsub import plugins, rows
from tests.merges import stacks
from tests.selected import first

NAMES = [n for n in plugins.available("merges") if hasattr(plugins.load("merges", n), "merge")]
TWO = ("slerp",)  # take two models
DRAWS = ("dare_linear", "dare_ties", "knots_dare", "subspace_dare")
# Options with which a method is an average, so that copies of a model give it back.
AVERAGES = {
    "mean": {}, "weighted": {}, "slerp": {}, "spherical": {}, "model_stock": {}, "subspace_mean": {}, "fisher": {},
    "regmean": {}, "task_arithmetic": {"scaling": 0.25}, "ties": {"density": 1.0},
    "magnitude": {"density": 1.0, "scaling": 0.25}, "breadcrumbs": {"density": 1.0, "scaling": 0.25},
    "dare_linear": {"density": 1.0, "scaling": 0.25}, "dare_ties": {"density": 1.0},
    "knots_ties": {"density": 1.0, "scaling": 1.0}, "knots_dare": {"density": 1.0, "scaling": 1.0},
    "wudi": {"solver": "exact"}, "subspace_sum": {"energy": 1.0, "scaling": 0.25},
    "subspace_rescaled": {"energy": 1.0}, "subspace_ties": {"energy": 1.0, "density": 1.0},
    "subspace_dare": {"energy": 1.0, "density": 1.0},
}  # fmt: skip
# Others change even copies of one model: pcb cuts, the isotropic ones and tsv share out, lora_factors has cross terms.
OTHERS = ("pcb", "iso_c", "iso_cts", "tsv", "subspace_iso", "lora_factors")


def merge(name, own, key=0, **options):
    module = plugins.load("merges", name)
    with jax.enable_x64(True):
        result = module.merge(own, module.Options(**options), jax.random.key(key))
        return stacks.array(result, own.shape)


def count(name):
    return 2 if name in TWO else 4


def test_all_methods_are_averages_or_said_to_be_none():
    assert sorted([*AVERAGES, *OTHERS]) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_method_says_what_it_is(name):
    module = plugins.load("merges", name)
    assert dataclasses.is_dataclass(module.Options) and module.Options()
    assert module.REFERENCE and isinstance(module.NEEDS_UPDATES, bool)
    for word in ("Fails", "Weights") if not hasattr(module, "NOTE") else ("w_n", "E33", "A_n"):
        if word in (module.__doc__ or ""):
            break
    else:
        raise AssertionError(f"{name}: its docstring says neither when it fails nor what it is")
    assert len(module.__doc__) > 200


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((12, 9), id="matrix"),
        pytest.param((60,), id="vector", marks=pytest.mark.slow),
        pytest.param((4, 3, 3, 3), id="kernel", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", first(NAMES, 8))
def test_the_order_of_models_does_not_matter(name, shape):
    x = stacks.dense(shape, count(name))
    if name == "slerp":
        x = x * np.linspace(1, 1, 2).reshape(2, *[1] * len(shape)).astype(np.float32)
    ids = [f"m{n}" for n in range(len(x))]
    found = [
        merge(name, rows.ArrayRows(x[order], "w", [ids[n] for n in order], is_update=True))
        for order in (np.arange(len(x)), np.arange(len(x))[::-1])
    ]
    assert stacks.relative(found[0], found[1].astype(float)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_low_rank_updates_does_not_matter(name):
    parts = stacks.factors(ranks=(2, 3) if name in TWO else (2, 2, 2, 2))
    ids, order = [f"m{n}" for n in range(len(parts[0]))], np.arange(len(parts[0]))[::-1]
    found = []
    for at in (order[::-1], order):
        own = stacks.of_factors(*(part[at] for part in parts))
        own.model_ids = tuple(ids[n] for n in at)
        found.append(merge(name, own))
    assert stacks.relative(found[0], found[1].astype(float)) < 1e-5


@pytest.mark.parametrize("kind", first(["matrix", "vector", "low-rank"]))
@pytest.mark.parametrize("name", AVERAGES)
def test_a_merge_of_copies_is_the_model(name, kind):
    number = count(name)
    if kind == "low-rank":
        a, b, _ = stacks.factors(ranks=(2,))
        own = stacks.of_factors(*(np.repeat(part, number, axis=0) for part in (a, b, np.array([1.5]))))
        wanted = stacks.products(a, b, [1.5])[0]
    else:
        x = np.repeat(stacks.dense((12, 9) if kind == "matrix" else (60,), 1), number, axis=0)
        own, wanted = stacks.of_arrays(x), x[0].astype(float)
    assert stacks.relative(merge(name, own, **AVERAGES[name]), wanted) < 2e-5


@pytest.mark.parametrize("name", ["mean", "weighted", "ties"])
def test_copies_come_back_to_the_last_digit_from_a_mean(name):
    x = np.repeat(stacks.dense((12, 9), 1), 4, axis=0)
    np.testing.assert_array_max_ulp(merge(name, stacks.of_arrays(x[:3]), **AVERAGES[name]), x[0], 2)
    assert np.array_equal(merge(name, stacks.of_arrays(x), **AVERAGES[name]), x[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in NAMES if n not in TWO and n != "model_stock"])
def test_one_model(name):
    x = stacks.dense(count=1)
    found = merge(name, stacks.of_arrays(x), **{k: v for k, v in AVERAGES.get(name, {}).items() if k != "scaling"})
    if name in ("mean", "weighted", "ties", "spherical", "fisher", "regmean", "subspace_mean", "dare_ties"):
        assert stacks.relative(found, x[0].astype(float)) < 1e-6
    assert np.isfinite(found).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_base_is_put_back(name):
    x, base = stacks.dense(count=count(name)), stacks.dense(count=1, seed=9)[0]
    alone = merge(name, stacks.of_arrays(x))
    found = merge(name, rows.ArrayRows(x, "layer.weight", [f"m{n}" for n in range(len(x))], base=base))
    assert stacks.relative(found, alone.astype(float) + base) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_blocks_do_not_show(name, monkeypatch):
    x = stacks.dense((40, 30), count(name))
    whole = merge(name, stacks.of_arrays(x))
    if name not in DRAWS:  # whose draws come in chunks
        monkeypatch.setattr(rows, "CHUNK", 64)
        monkeypatch.setattr(rows, "BLOCK_BYTES", 64 * 4 * 4 * 3)
    else:
        monkeypatch.setattr(rows, "BLOCK_BYTES", 1)
    assert stacks.relative(merge(name, stacks.of_arrays(x)), whole.astype(float)) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_blocks_of_low_rank_updates_do_not_show(name, monkeypatch):
    parts = stacks.factors(ranks=(2, 3) if name in TWO else (2, 2, 2, 2))
    whole = merge(name, stacks.of_factors(*parts))
    monkeypatch.setattr(rows, "BLOCK_BYTES", 3 * 11 * 4 * 4)  # three rows of all models
    assert stacks.relative(merge(name, stacks.of_factors(*parts)), whole.astype(float)) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "low-rank"])
@pytest.mark.parametrize("name", NAMES)
def test_updates_of_zero(name, kind):
    if kind == "dense":
        own = stacks.of_arrays(np.zeros((count(name), 6, 5), np.float32))
    else:
        own = stacks.of_factors(np.zeros((count(name), 2, 5)), np.zeros((count(name), 6, 2)), np.ones(count(name)))
    assert np.abs(merge(name, own)).max(initial=0.0) == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_float64_stays_float64(name):
    x = stacks.dense(count=count(name), dtype=np.float64)
    found = merge(name, stacks.of_arrays(x))
    assert found.dtype == np.float64
    if name not in ("wudi", *DRAWS):
        assert stacks.relative(merge(name, stacks.of_arrays(x.astype(np.float32))), found) < 3e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", DRAWS)
def test_draws_hang_on_key_model_and_place_alone(name):
    x = stacks.dense((30, 20), 4)
    key = zlib.crc32(b"layer")
    again = [merge(name, stacks.of_arrays(x), key=k, density=0.3) for k in (key, key, key + 1)]
    assert np.array_equal(again[0], again[1]) and stacks.relative(again[2], again[0].astype(float)) > 0.1


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
def test_another_model_does_not_change_the_draws_of_the_others(name):
    x = stacks.dense((30, 20), 4)
    x[3] = 0
    ids = ["a", "b", "c", "d"]
    options = {"density": 0.3, "function": "sum"} if name == "dare_ties" else {"density": 0.3}
    with_it = merge(name, rows.ArrayRows(x, "w", ids, is_update=True), **options)
    without = merge(name, rows.ArrayRows(x[:3], "w", ids[:3], is_update=True), **options)
    assert stacks.relative(with_it, without.astype(float)) < 1e-6
