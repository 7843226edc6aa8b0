"""Branched merging: groups and allocations beside exhaustive search, the learned ones too; budgets are kept."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsub import errors
from jaxsub.merges import _branches, _partitions, branched
from tests.merges import stacks
from tests.merges.test_loss import whole


def partitions(items):
    """All set partitions of a list."""
    if not items:
        yield []
        return
    first, *rest = items
    for smaller in partitions(rest):
        for n, group in enumerate(smaller):
            yield [*smaller[:n], [first, *group], *smaller[n + 1 :]]
        yield [[first], *smaller]


def distance(x, groups):
    return sum(np.square(x[list(g)] - x[list(g)].mean(axis=0)).sum() for g in groups)


def layer(count, seed):
    rng = np.random.default_rng(seed)
    kinds = rng.standard_normal((2, 7))
    return kinds[rng.integers(0, 2, count)] + 0.4 * rng.standard_normal((count, 7))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_groups_of_a_layer_are_the_best_of_all_partitions(count):
    x = layer(count, count)
    found = _partitions.losses(x @ x.T)
    best = {}
    for groups in partitions(list(range(count))):
        best[len(groups)] = min(best.get(len(groups), np.inf), distance(x, groups))
    assert found.keys() == best.keys()
    for g, (loss, groups) in found.items():
        assert sorted(n for one in groups for n in one) == list(range(count)) and len(groups) == g
        assert loss == pytest.approx(best[g], abs=1e-9) and distance(x, groups) == pytest.approx(best[g], abs=1e-9)


def test_ward_joins_many_models_without_a_search():
    x = layer(_partitions.EXACT + 3, 1)
    found = _partitions.losses(x @ x.T)
    assert {*found} == {*range(1, len(x) + 1)}
    for loss, groups in found.values():
        assert loss == pytest.approx(distance(x, groups), abs=1e-9)
    small = x[:6]
    ward, exact = _partitions._by_ward(small @ small.T), _partitions._by_subsets(small @ small.T)
    assert all(ward[g][0] >= exact[g][0] - 1e-9 for g in exact) and ward[2][0] <= 1.5 * exact[2][0] + 1e-9


@pytest.mark.parametrize("budget", [1.0, 1.3, 1.9, 2.4, 3.0])
def test_allocation_is_the_best_within_the_budget(budget):
    xs, sizes = [layer(3, seed) for seed in (3, 4, 5)], [10, 30, 17]
    options = branched.Options(budget=budget)
    found = branched.partition([x @ x.T for x in xs], sizes, options)
    every = [list(partitions([0, 1, 2]))] * 3
    best = min(
        sum(distance(x, g) for x, g in zip(xs, choice, strict=True))
        for choice in itertools.product(*every)
        if sum(len(g) * s for g, s in zip(choice, sizes, strict=True)) <= budget * sum(sizes) + 1e-9
    )
    assert sum(len(g) * s for g, s in zip(found, sizes, strict=True)) <= budget * sum(sizes) + 1e-9
    assert sum(distance(x, g) for x, g in zip(xs, found, strict=True)) == pytest.approx(best, abs=1e-9)
    assert (found == [((0, 1, 2),)] * 3) == (budget == 1.0) and (found == [((0,), (1,), (2,))] * 3) == (budget == 3.0)


def test_a_budget_beats_the_best_single_cut_point():
    xs, sizes = [layer(4, seed) for seed in range(6)], [20] * 6
    found = branched.partition([x @ x.T for x in xs], sizes, branched.Options(budget=2.5))
    cut = min(  # one cut: shared by all before, apart behind
        sum(distance(x, [[0, 1, 2, 3]] if n < at else [[0], [1], [2], [3]]) for n, x in enumerate(xs))
        for at in range(7)
        if (at + 4 * (6 - at)) * 20 <= 2.5 * 120
    )
    assert sum(distance(x, g) for x, g in zip(xs, found, strict=True)) < 0.8 * cut


def test_many_states_keep_the_budget(monkeypatch):
    monkeypatch.setattr(_partitions, "STATES", 50)
    rng = np.random.default_rng(0)
    xs, sizes = [layer(5, seed) for seed in range(12)], rng.integers(100, 5000, 12).tolist()
    for budget in (1.01, 1.7, 3.3):
        found = branched.partition([x @ x.T for x in xs], sizes, branched.Options(budget=budget))
        assert sum(len(g) * s for g, s in zip(found, sizes, strict=True)) <= budget * sum(sizes)
    with pytest.raises(errors.ConfigError, match="budget=0.5"):
        branched.partition([xs[0] @ xs[0].T], [5], branched.Options(budget=0.5))


@pytest.mark.slow
def test_gumbel_softmax_is_torchs_given_the_same_numbers():
    torch = pytest.importorskip("torch")
    logits, uniforms = np.linspace(-2, 2, 12, dtype="f4").reshape(3, 4), np.linspace(0.05, 0.95, 12, dtype="f4")
    gumbel = -np.log(-np.log(uniforms.reshape(3, 4)))
    wanted = torch.softmax((torch.tensor(logits) + torch.tensor(gumbel)) / 0.7, -1).numpy()
    np.testing.assert_allclose(_branches.soft_choice(logits, uniforms.reshape(3, 4), 0.7), wanted, rtol=1e-5)


def test_the_expected_number_of_branches_is_that_of_all_choices():
    p = np.random.default_rng(0).dirichlet(np.ones(3), size=4)
    wanted = sum(
        np.prod([p[t, b] for t, b in enumerate(choice)]) * len({*choice})
        for choice in itertools.product(range(3), repeat=4)
    )
    assert float(_branches.expected_branches(p.astype("f4"))) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.slow
def test_learned_groups_are_near_the_best_of_all_by_the_users_loss():
    # Three models of three layers; function hangs on a product of layers, so that distance alone does not tell.
    xs = {f"l{n}": stacks.dense((5,), 3, seed) for n, seed in enumerate((2, 3, 4))}
    xs["l0"][1] = xs["l0"][0] + 0.001  # alike, and so to be shared
    base = {n: np.ones(5, np.float32) for n in xs}
    from jaxsub import rows

    own = whole({n: rows.ArrayRows(x, n, ["a", "b", "c"], base=base[n]) for n, x in xs.items()})
    output = lambda w: w["l0"] * w["l1"] + jnp.tanh(w["l2"])  # noqa: E731
    target = {m: output({n: base[n] + xs[n][t] for n in xs}) for t, m in enumerate("abc")}
    scale = 1e3
    loss = lambda w, m: scale * jnp.sum(jnp.square(output(w) - target[m]))  # noqa: E731
    sizes, grams, budget = [5, 5, 5], [x @ x.T for x in xs.values()], 2.4
    options = branched.Options(budget=budget, steps=300, rate=0.1, price=0.3)

    def value(groups):
        total = 0.0
        for t, m in enumerate("abc"):
            w = {}
            for (n, x), own_groups in zip(xs.items(), groups, strict=True):
                members = list(next(g for g in own_groups if t in g))
                w[n] = base[n] + x[members].mean(axis=0)
            total += float(loss(w, m))
        return total

    every = [[tuple(tuple(sorted(g)) for g in p) for p in partitions([0, 1, 2])]] * 3
    fits = [c for c in itertools.product(*every) if sum(map(len, c)) * 5 <= budget * 15]
    best, worst = min(map(value, fits)), max(map(value, fits))
    found = []
    for seed in range(3):
        learner = _branches.Learner(own, ("a", "b", "c"), sizes, loss, options)
        groups = branched.partition(grams, sizes, options, learner, jax.random.key(seed))
        assert sum(map(len, groups)) * 5 <= budget * 15
        found.append(value(groups))
    assert max(found) <= 1.05 * best < 0.2 * worst
