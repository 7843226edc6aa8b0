"""Ranks for a number of bytes, against every other choice."""

import itertools

import numpy as np
import pytest

from jaxsub import errors
from jaxsub.bundle.allocation import Choice, allocate


def held(choices, ranks):
    return sum(e[:k].sum() for c, r in zip(choices, ranks, strict=True) for e, k in zip(c.energies, r, strict=True))


def taken(choices, ranks):
    return sum(c.num_bytes(r) for c, r in zip(choices, ranks, strict=True))


@pytest.mark.parametrize("seed", range(30))
def test_nothing_of_as_many_bytes_holds_more(seed):
    rng = np.random.default_rng(seed)
    choices = [Choice((np.sort(rng.exponential(size=4) ** 2)[::-1],), (int(rng.integers(5, 60)),), 7) for _ in range(4)]
    every = list(itertools.product(*[[(k,) for k in range(5)]] * 4))
    budget = int(rng.integers(100, 900))
    best = allocate(choices, budget)
    assert taken(choices, best) <= budget
    # What the greedy choice skipped for want of room is not counted against it: up to there it is the best there is.
    strict = greedy_until_full(choices, budget)
    rivals = [r for r in every if taken(choices, r) <= taken(choices, strict)]
    assert held(choices, strict) == pytest.approx(max(held(choices, r) for r in rivals))
    assert held(choices, best) >= held(choices, strict)


def greedy_until_full(choices, budget):
    """The prefix of the greedy order that fits, by sorting all components at once."""
    steps = sorted(
        (
            (e[k] / (c.base[0] + 4 * c.count), i)
            for i, c in enumerate(choices)
            for e in c.energies
            for k in range(len(e))
        ),
        key=lambda s: (-s[0], s[1]),
    )
    ranks, spent = [0] * len(choices), 0
    for _, i in steps:
        cost = choices[i].base[0] + 4 * choices[i].count
        if spent + cost > budget:
            break
        ranks[i], spent = ranks[i] + 1, spent + cost
    return [(k,) for k in ranks]


def test_one_rank_for_all_is_worse():
    flat, steep = np.full(8, 1.0), np.array([90.0, 5, 0.1, 0.05, 0, 0, 0, 0])
    choices = [Choice((flat,), (100,), 5), Choice((steep,), (100,), 5)]
    budget = 6 * (100 + 20)
    assert held(choices, allocate(choices, budget)) > held(choices, [(3,), (3,)])


def test_what_counts_is_energy_a_byte():
    large = Choice((np.array([10.0]),), (1000,), 1)
    small = Choice((np.array([6.0, 5, 4]),), (10,), 1)
    assert allocate([large, small], 1010) == [(0,), (3,)]  # the larger energy alone would leave no room for 15


def test_two_axes_are_near_the_best_there_is():
    rng = np.random.default_rng(1)
    choices = [
        Choice(tuple(np.sort(rng.exponential(size=4) ** 2)[::-1] for _ in range(2)), (60, 40), 3, least=1)
        for _ in range(2)
    ]
    every = list(itertools.product(list(itertools.product(range(1, 5), range(1, 5))), repeat=2))
    for budget in (260, 400, 600):
        found = allocate(choices, budget)
        assert taken(choices, found) <= budget
        best = max(held(choices, r) for r in every if taken(choices, r) <= budget)
        assert held(choices, found) >= 0.9 * best


def test_what_cannot_be_is_said_and_nothing_is_bought_for_nothing():
    choice = Choice((np.array([1.0, 0.0]),), (10,), 1)
    assert allocate([choice], 10**6) == [(1,)]
    assert allocate([choice], 0) == [(0,)]
    with pytest.raises(errors.ConfigError, match="the least ranks take"):
        allocate([Choice((np.ones(3), np.ones(3)), (10, 10), 1, least=1)], 5)


@pytest.mark.parametrize(
    ("parameters", "analysed", "times", "full"),
    [
        (1_423_872, 93.95, 16.53, 25.61),
        (2_823_936, 88.01, 8.34, 23.98),
        (5_417_472, 76.99, 4.35, 20.98),
        (8_800_512, 62.62, 2.68, 17.07),
        (9_124_608, 61.24, 2.58, 16.69),
    ],
)
def test_bytes_give_the_published_storage_table(parameters, analysed, times, full):
    """470 ViTs, 40 matrices of 768 x 768, principal components of rows: basis and coefficients, the mean not charged.

    Charged, as it must be kept, the mean takes another share of 1 / 470."""
    count, size, side, excluded = 470, 40 * 768**2, 768, 62_974_696
    ranks, rest = divmod(parameters // side, 40)
    layer = Choice((np.ones(side),), (4 * side,), count * side)
    stored = sum(layer.num_bytes([ranks + (n < rest)]) for n in range(40)) / 4
    assert 100 * (1 - stored / (count * size)) == pytest.approx(analysed, abs=0.006)
    assert count * size / stored == pytest.approx(times, abs=0.006)
    assert 100 * (1 - (stored + count * excluded) / (count * (size + excluded))) == pytest.approx(full, abs=0.006)
    assert 100 * (1 - (stored + size) / (count * size)) == pytest.approx(analysed - 100 / count, abs=0.006)
