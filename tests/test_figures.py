"""Figures of layers from statistics: noise must not be called a subspace; nulls must not depend on the order."""

import numpy as np
import pytest

from jaxsub import lineage
from jaxsub.linalg import reference
from jaxsub.pipelines import figures
from jaxsub.statistics import Statistics


def statistics(x, name="w"):
    """Statistics of rows x (N, *shape) by the float64 twin."""
    flat = np.asarray(x, np.float64).reshape(len(x), -1)
    ids = tuple(f"m{n}" for n in range(len(x)))
    stats = Statistics.empty(name, x.shape[1:], "dense", ids, "float32", "float64")
    sums = reference.dense_sums(flat)
    names = ("gram", "cross", "mean_square", "row_sums", "row_fourths", "variance_squares", "deviation_fourths")
    for field, value in zip(names, sums, strict=True):
        setattr(stats, field, value)
    if x.ndim == 3:
        stats.model_singular_values = np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)
    return stats


def verdict(x, name="w", **options):
    stats = statistics(x, name)
    groups = lineage.groups(lineage.cosines(stats.uncentred()), stats.num_features)
    return figures.layer(stats, groups, figures.Options(**({"splits": 2} | options)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gaussian", "unequal norms", "low rank", "with a constant"])
def test_pure_noise_is_not_called_shared(kind):
    """50 collections a kind, 200 in all. Nominal rate: a gain must beat every null by .02 and by 4 sd of 20 draws,
    which a Gaussian gain does less than once in 5,000; two in 50 would be odds of 1 in 20,000."""
    found = []
    for seed in range(50):
        rng = np.random.default_rng(seed)
        n, o, i = int(rng.integers(8, 60)), int(rng.integers(8, 48)), int(rng.integers(8, 48))
        if kind == "low rank":
            x = rng.standard_normal((n, o, 2)) @ rng.standard_normal((n, 2, i))
        else:
            x = rng.standard_normal((n, o, i))
        if kind == "unequal norms":
            x *= np.exp(rng.standard_normal((n, 1, 1)))
        if kind == "with a constant":
            x += rng.standard_normal((n, 1, 1))
        found.append(verdict(x, str(seed))["verdict"])
    assert sum(v in ("shared", "lineage", "lineage+shared") for v in found) <= 1, found


def test_draws_depend_on_the_layer_alone():
    x = np.random.default_rng(0).standard_normal((12, 10, 9))
    a, b = verdict(x, "w", draws=3), verdict(x, "w", draws=3)
    other = verdict(x, "v", draws=3)
    assert a == b
    assert other["nulls"]["gaussian"]["held_out"] != a["nulls"]["gaussian"]["held_out"]
    assert verdict(x, "w", draws=3, seed=1)["nulls"] != a["nulls"]


def test_draws_stop_where_more_could_not_move_a_verdict():
    rng = np.random.default_rng(0)
    wide, narrow = verdict(rng.standard_normal((20, 300, 300))), verdict(rng.standard_normal((20, 12, 10)))
    assert {null["draws"] for null in wide["nulls"].values()} == {8}
    assert {null["draws"] for null in narrow["nulls"].values()} == {20}
    assert verdict(rng.standard_normal((20, 12, 10)), draws=3)["nulls"]["gaussian"]["draws"] == 3


def test_null_ranks_and_energies_are_those_of_noise():
    """The Gaussian null of 40 models with D = 4000 against 20 literal stacks."""
    rng = np.random.default_rng(1)
    literal = []
    for _ in range(20):
        x = rng.standard_normal((40, 4000))
        y = x - x.mean(0)
        values = np.square(np.linalg.svd(y, compute_uv=False))
        literal.append(values[:4].sum() / values.sum())
    layer = verdict(rng.standard_normal((40, 80, 50)))
    drawn = layer["nulls"]["gaussian"]["energy_at"]["4"]
    assert drawn == pytest.approx(np.mean(literal), abs=4 * np.std(literal))


def test_ranks_ignore_what_lies_under_the_floor():
    rng = np.random.default_rng(2)
    x = rng.standard_normal((12, 3)) @ rng.standard_normal((3, 500))
    x = (x + 1e-9 * rng.standard_normal(x.shape)).reshape(12, 20, 25)
    layer = verdict(x)
    values = np.array(layer["singular_values"])
    assert (values > layer["floor"]).sum() == 3 and "rank_deficient" in layer["flags"]
    assert layer["rank_at"]["0.99"] <= 3


def test_sixteen_bit_rounding_sets_the_floor():
    """Models that differ by less than bfloat16 resolves: what the stack shows is rounding, and is said to be."""
    import ml_dtypes

    rng = np.random.default_rng(3)
    base = rng.standard_normal((30, 40))
    x = (base + 1e-4 * rng.standard_normal((12, 30, 40))).astype(ml_dtypes.bfloat16).astype(np.float64)
    stats = statistics(x)
    stats.storage = "bfloat16"
    layer = figures.layer(stats, [], figures.Options(draws=3, splits=2))
    assert layer["verdict"] == "undetermined" and "saturated" in layer["flags"]
    stats.storage = "float32"
    assert figures.layer(stats, [], figures.Options(draws=3, splits=2))["verdict"] != "undetermined"


def test_held_out_within_and_by_lineage_are_there_only_with_lineages():
    rng = np.random.default_rng(4)
    x = np.repeat(rng.standard_normal((2, 20, 20)) * 2, 10, axis=0) + rng.standard_normal((20, 20, 20))
    layer = verdict(x, draws=4)
    assert layer["lineages"] == 2 and layer["held_out_within"] and layer["held_out_lineage"]
    assert layer["lineage_energy"] > 0.5 and layer["nulls"]["gaussian"]["held_out_within"]
    plain = verdict(rng.standard_normal((20, 20, 20)), draws=4)
    assert plain["held_out_within"] is None and plain["held_out_lineage"] is None and plain["lineage_energy"] is None


def test_held_out_within_lineages_equals_brute_force():
    """Each model against the mean of its own lineage without it, and the components of all other residuals."""
    rng = np.random.default_rng(5)
    x = np.repeat(rng.standard_normal((2, 60)) * 4, 7, axis=0) + rng.standard_normal((14, 60))
    groups = [list(range(7)), list(range(7, 14))]
    layer = figures.layer(statistics(x.reshape(14, 6, 10)), groups, figures.Options(draws=2, splits=2))
    error = base = 0.0
    for i in range(14):
        rest = [[m for m in g if m != i] for g in groups]
        residuals = np.concatenate([x[g] - x[g].mean(0) for g in rest])
        vt = np.linalg.svd(residuals, full_matrices=False)[2][:4]
        own = next(g for g, whole in zip(rest, groups, strict=True) if i in whole)
        d = x[i] - x[own].mean(0)
        base += d @ d
        error += d @ d - np.square(vt @ d).sum()
    assert layer["held_out_within"]["4"] == pytest.approx(error / base, abs=1e-6)


def brute_within(x, groups, k):
    """LOO(k) about the groups' means, each model against its own group without it."""
    error = base = 0.0
    for i in range(len(x)):
        rest = [[m for m in g if m != i] for g in groups]
        residuals = np.concatenate([x[g] - x[g].mean(0) for g in rest])
        s, vt = np.linalg.svd(residuals, full_matrices=False)[1:]
        vt = vt[:k][s[:k] > 1e-9 * s[0]]
        d = x[i] - x[next(g for g, whole in zip(rest, groups, strict=True) if i in whole)].mean(0)
        base += d @ d
        error += d @ d - np.square(vt @ d).sum()
    return error / base


def test_models_in_no_lineage_are_looked_at_as_one_more_group():
    """A pair among models of one subspace does not make it the pair's."""
    rng = np.random.default_rng(6)
    x = rng.standard_normal((24, 3)) @ rng.standard_normal((3, 400)) + rng.standard_normal((24, 400)) / 2
    x[1] = x[0] + rng.standard_normal(400) / 10
    layer = figures.layer(statistics(x.reshape(24, 20, 20)), [[0, 1]], figures.Options(draws=8, splits=2))
    assert layer["verdict"] == "lineage+shared" and "and among the others" in layer["why"]
    wanted = brute_within(x, [[0, 1], list(range(2, 24))], 4)
    assert layer["held_out_within"]["4"] == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("noise", [1e-2, 1e-4])
def test_many_small_families_are_lineage_and_rounding_explains_nothing_within_them(noise):
    """More families than the deciding components; beyond their own number of directions only rounding is left."""
    rng = np.random.default_rng(7)
    parents = np.repeat(rng.standard_normal((20, 3600)), 2, axis=0)
    x = parents + noise * rng.standard_normal((40, 3600))
    groups = [[i, i + 1] for i in range(0, 40, 2)]
    layer = figures.layer(statistics(x.reshape(40, 60, 60)), groups, figures.Options(draws=8, splits=2))
    assert layer["verdict"] == "lineage" and "means of the 20 lineages hold" in layer["why"]
    for k in (16, 32):
        assert layer["held_out_within"][str(k)] == pytest.approx(brute_within(x, groups, k), abs=1e-6)


def test_what_unrelated_families_hold_is_known():
    """Of unequal norms and sizes, some models in none: the mean over many draws, and how they spread."""
    rng, groups = np.random.default_rng(8), [[0, 1, 2, 3], [4, 5], [6, 7, 8]]
    scale = np.linspace(0.5, 2, 16)[:, None]
    grams = []
    for _ in range(400):
        x = scale * rng.standard_normal((16, 300))
        grams.append((x - x.mean(0)) @ (x - x.mean(0)).T)
    found = [lineage.group_energy(gram, groups) for gram in grams]
    mean, sd = np.mean([lineage.group_energy_chance(gram, groups, 300) for gram in grams], axis=0)
    assert mean == pytest.approx(np.mean(found), rel=0.01) and 0.5 < np.std(found) / sd < 1.5
    layer = figures.layer(
        statistics((scale * rng.standard_normal((16, 300))).reshape(16, 15, 20)),
        groups,
        figures.Options(draws=8, splits=2),
    )
    assert layer["verdict"] == "chance"


def test_a_mean_of_entries_is_no_common_mean_and_one_huge_model_is_said():
    rng = np.random.default_rng(9)
    layer = verdict(np.abs(rng.standard_normal((12, 20, 20))), draws=8)
    assert layer["verdict"] == "chance" and "with entries permuted as well" in layer["why"]
    x = rng.standard_normal((12, 20, 20))
    x[5] *= 100
    layer = verdict(x, draws=8)
    assert "one_model" in layer["flags"] and "'m5' holds 9" in layer["warnings"][0]


@pytest.mark.slow
def test_nulls_of_one_law_share_their_draws():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((12, 200, 200))
    nulls = verdict(x)["nulls"]
    assert nulls["permutation"] == nulls["gaussian"] and nulls["permutation"]["drawn_as"] == "gaussian"
    assert verdict(x, nulls=("permutation",))["nulls"]["permutation"] == nulls["permutation"]
    nulls = verdict(x + 0.1)["nulls"]
    assert nulls["permutation"]["held_out"] != nulls["gaussian"]["held_out"]
    assert nulls["permutation"]["drawn_as"] == "permutation"
