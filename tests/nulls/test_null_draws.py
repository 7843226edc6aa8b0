"""Null models at the level of the Gram matrix against literal draws on the weights themselves.

Literal: permute the entries, shuffle the coordinates, draw the frames or the A factors, then multiply out. The two must
agree in mean and standard deviation over draws of every figure that a report compares with its nulls.
"""

import dataclasses
import math

import numpy as np
import pytest

from jaxsub import errors, heldout, plugins, spectrum, verdict
from jaxsub.nulls import _draw, _observed, fresh_init, gaussian, permutation, shuffle, strength
from tests.selected import first

NUM_MODELS, SHAPE = 24, (15, 20)
NUM_FEATURES = SHAPE[0] * SHAPE[1]
DRAWS = 150
KS = [1, 2, 4, 8, 16]


def observe(rows, shape=SHAPE, **more):
    variance, mean = rows.var(0), rows.mean(0)
    return _observed.Observed(
        num_features=rows.shape[1],
        shape=shape,
        norms=np.linalg.norm(rows, axis=1),
        entry_means=rows.mean(1),
        mean_energy_total=mean @ mean,
        variance_total=variance.sum(),
        variance_squares=(variance**2).sum(),
        model_singular_values=np.linalg.svd(rows.reshape(-1, *shape), compute_uv=False),
        **more,
    )


def figures(gram):
    """Energy at 1, 4, 8, 16, LOO at `KS`, mean energy."""
    values, vectors = heldout.decompose(spectrum.centred(gram))
    energy = np.cumsum(values) / values.sum()
    curve = heldout.leave_one_out(spectrum.centred(gram), KS, eigen=(values, vectors))
    return np.array([*energy[[0, 3, 7, 15]], *curve, gram.mean() * len(gram) / np.trace(gram)])


def compare(null, observed, literal, *, seed=0, options=None):
    """Shift of the means in literal standard deviations, and ratio of the standard deviations, (10,) each."""
    rng = np.random.default_rng(seed)
    options = dataclasses.replace(options or null.Options(), draws=DRAWS)
    drawn = np.array([figures(gram) for gram in null.sample(observed, options, rng)])
    truth = []
    for _ in range(DRAWS):
        rows = literal(rng)
        truth.append(figures(rows @ rows.T))
    sd = np.std(truth, axis=0)
    varies = sd > 1e-10
    shift = (drawn.mean(0) - np.mean(truth, axis=0))[varies] / sd[varies]
    return shift, drawn.std(0)[varies] / sd[varies]


def assert_same(shift, ratio, *, shift_slack=0.0, ratio_slack=0.0):
    # The difference of two means of S draws has sd sqrt(2 / S) = .12, the log ratio of two sds 1 / sqrt(S) = .08.
    assert np.abs(shift).max() < 4 * np.sqrt(2 / DRAWS) + shift_slack
    assert np.abs(np.log(ratio)).max() < 4.5 / np.sqrt(DRAWS) + ratio_slack


def unequal_models(seed=1):
    """Dense models of unequal norms with a common mean entry and three lineages."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((NUM_MODELS, NUM_FEATURES)) * (1 + rng.random((NUM_MODELS, 1)))
    return rows + 0.2 + rng.standard_normal((3, NUM_FEATURES))[rng.integers(0, 3, NUM_MODELS)]


def haar(rng, num, size, rank):
    q, r = np.linalg.qr(rng.standard_normal((num, size, rank)))
    return q * np.sign(np.einsum("nii->ni", r))[:, None]


def strength_literal(observed):
    values = observed.model_singular_values

    def draw(rng):
        left, right = (haar(rng, len(values), size, values.shape[1]) for size in observed.shape)
        return ((left * values[:, None]) @ right.transpose(0, 2, 1)).reshape(len(values), -1)

    return draw


def test_permutation_agrees_with_permuting_entries():
    rows = unequal_models()
    assert_same(*compare(permutation, observe(rows), lambda rng: rng.permuted(rows, axis=1)))


@pytest.mark.slow
def test_permutation_of_heavy_tails_keeps_the_means_and_some_of_the_spread():
    """Student t entries with 2.5 degrees of freedom."""
    rows = np.random.default_rng(2).standard_t(2.5, (NUM_MODELS, NUM_FEATURES))
    shift, ratio = compare(permutation, observe(rows), lambda rng: rng.permuted(rows, axis=1))
    assert_same(shift, ratio, ratio_slack=0.4)


@pytest.mark.slow
def test_permutation_of_a_few_entries_has_too_little_spread():
    """About nine nonzero entries of 300: means still agree, but errors vary more than twice as much as drawn."""
    rng = np.random.default_rng(2)
    rows = rng.standard_normal((NUM_MODELS, NUM_FEATURES)) * (rng.random((NUM_MODELS, NUM_FEATURES)) < 0.03)
    shift, ratio = compare(permutation, observe(rows), lambda rng: rng.permuted(rows, axis=1))
    assert np.abs(shift).max() < 4 * np.sqrt(2 / DRAWS)
    assert ratio[:9].max() < 0.6  # the stated failure region is real


def test_permutation_keeps_mean_entries_where_gaussian_does_not():
    rows = np.random.default_rng(3).standard_normal((NUM_MODELS, NUM_FEATURES)) + 0.5
    rng = np.random.default_rng(4)
    observed = observe(rows)
    means = [next(null.sample(observed, null.Options(), rng)).mean() for null in (permutation, gaussian)]
    assert means[0] == pytest.approx((rows @ rows.T).mean(), rel=0.1)
    assert means[1] < 0.3 * means[0]


def test_permutation_is_drawn_as_gaussian_only_where_mean_entries_hold_next_to_nothing():
    rows = unequal_models()
    rows -= rows.mean(axis=1, keepdims=True)
    flat = observe(rows)
    assert permutation.same_as(flat) == "gaussian"
    assert_same(*compare(gaussian, flat, lambda rng: rng.permuted(rows, axis=1)))
    size = np.linalg.norm(rows) / np.sqrt(rows.size)
    for share, found in ((0.5, "gaussian"), (2.0, None)):
        shifted = observe(rows + size * np.sqrt(share * permutation.NEGLIGIBLE))
        assert permutation.same_as(shifted) == found


def test_gaussian_agrees_with_random_directions():
    rows = unequal_models()
    norms = np.linalg.norm(rows, axis=1)[:, None]

    def literal(rng):
        noise = rng.standard_normal(rows.shape)
        return noise / np.linalg.norm(noise, axis=1)[:, None] * norms

    assert_same(*compare(gaussian, observe(rows), literal))


def test_gaussian_gives_the_golden_shares_of_an_iid_stack():
    rng = np.random.default_rng(0)
    observed = _observed.Observed(num_features=768 * 768, shape=(768, 768), norms=np.ones(100))
    shares = []
    for gram in gaussian.sample(observed, gaussian.Options(), rng):
        values, _ = heldout.decompose(spectrum.centred(gram))
        shares.append([values[0] / values.sum(), values[:16].sum() / values.sum()])
    np.testing.assert_allclose(shares, np.tile([0.0103, 0.1648], (20, 1)), rtol=0, atol=5e-4)


@pytest.mark.parametrize("weights", first(["unequal models", "equal", "mild", "one giant"]))
def test_shuffle_agrees_with_shuffling_coordinates(weights):
    rows = {
        "equal": np.random.default_rng(5).standard_normal((NUM_MODELS, NUM_FEATURES)) + 0.2,
        "unequal models": unequal_models(),
        "mild": unequal_models() * np.linspace(0.5, 2, NUM_FEATURES),
        "one giant": unequal_models() * np.where(np.arange(NUM_MODELS) == 3, 1e3, 1.0)[:, None],
    }[weights]
    observed = observe(rows, deviation_fourths=((rows - rows.mean(0)) ** 4).sum())

    def literal(rng):
        return rng.permuted(rows, axis=0)

    shift, ratio = compare(shuffle, observed, literal)
    if weights == "one giant":  # far from Gaussian: energies agree, LOO(16) is .982 for .994
        assert np.abs(shift[:3]).max() < 4 * np.sqrt(2 / DRAWS) and np.abs(shift).max() < 9
        without = dataclasses.replace(observed, deviation_fourths=None)
        assert np.abs(compare(shuffle, without, literal)[0]).max() > 50  # what the fourth moment is for
    else:
        assert_same(shift, ratio, shift_slack=0.3 if weights == "mild" else 0.0)


def test_shuffle_keeps_mean_energy_and_total():
    rows = unequal_models()
    gram = rows @ rows.T
    for drawn in shuffle.sample(observe(rows), shuffle.Options(draws=3), np.random.default_rng(6)):
        assert drawn.mean() == pytest.approx(gram.mean(), rel=1e-10)
        assert np.trace(drawn) == pytest.approx(np.trace(gram), rel=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("frames", [1, 48, 96])
def test_strength_agrees_with_haar_frames(frames):
    """Rank-4 updates with one, two or all four singular values drawn explicitly."""
    rng = np.random.default_rng(7)
    factors = rng.standard_normal((NUM_MODELS, 15, 4)) * [1, 0.7, 0.5, 0.3] @ rng.standard_normal((NUM_MODELS, 4, 20))
    observed = observe(factors.reshape(NUM_MODELS, -1))
    assert_same(*compare(strength, observed, strength_literal(observed), options=strength.Options(frames=frames)))


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "frames"), [(1, 24), (3, 24)])
def test_strength_with_more_models_than_features(rank, frames):
    rng = np.random.default_rng(8)
    rows = (rng.standard_normal((NUM_MODELS, 6, rank)) @ rng.standard_normal((NUM_MODELS, rank, 3))).reshape(24, 18)
    observed = observe(rows, (6, 3))
    options = strength.Options(frames=frames)
    assert_same(*compare(strength, observed, strength_literal(observed), options=options), ratio_slack=0.05)
    gram = next(strength.sample(observed, options, rng))
    assert np.linalg.matrix_rank(gram) == 18


@pytest.mark.parametrize(
    ("num", "shape", "least"), first([(30, (5, 6), 0.02), (500, (2, 40000), 0), (100, (129, 129), 0)])
)
def test_strength_only_matters_to_small_matrices(num, shape, least):
    """Rank-one models, the most concentrated there are: where `layers` keeps no singular values (shorter side above
    128, or first and in several blocks), a strength null would move a gain by a hundredth of its margin."""
    values = np.eye(1, min(shape)) * np.ones((num, 1))
    observed = _observed.Observed(math.prod(shape), shape, np.ones(num), model_singular_values=values)
    gain = []
    for null in (gaussian, strength):
        grams = null.sample(observed, null.Options(4), np.random.default_rng(10))
        gain.append(np.mean([1 - heldout.leave_one_out(spectrum.centred(gram), [16]) for gram in grams]))
    moved = abs(gain[1] - gain[0])
    assert moved > least if least else moved < verdict.MARGIN / 100


@pytest.mark.parametrize("frames", [2000, 1])
def test_strength_pair_variance_and_fourth_moment(frames):
    """<X_i, X_j> of unit matrices: variance 1 / (o i) always; the literal fourth moment only with explicit frames."""
    num, o, i = 300, 8, 9
    observed = _observed.Observed(
        num_features=72, shape=(o, i), norms=np.ones(num), model_singular_values=np.full((num, 2), np.sqrt(0.5))
    )
    rng = np.random.default_rng(9)
    upper = np.triu_indices(num, 1)
    drawn = np.array([gram[upper] for gram in strength.sample(observed, strength.Options(6, frames), rng)])
    rows = [strength_literal(observed)(rng) for _ in range(6)]
    literal = np.array([(x @ x.T)[upper] for x in rows])
    # 6 x 45,000 pairs, independent to first order: sd .003 of a variance, .01 of a kurtosis.
    kurtosis = [np.mean(x**4) / np.mean(x**2) ** 2 for x in (drawn, literal)]
    np.testing.assert_allclose([np.var(drawn), np.var(literal)], 1 / 72, rtol=0.02)
    assert (abs(kurtosis[0] - kurtosis[1]) < 0.06) == (frames > num)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["random B", "narrow", "shared B", "half shared B"])
def test_fresh_init_agrees_with_drawing_the_a_factors(case):
    rng = np.random.default_rng(10)
    width = {"random B": 100, "shared B": 100, "half shared B": 100, "narrow": 20}[case]
    b = rng.standard_normal((NUM_MODELS, 10, 3))
    if case != "random B":
        b[: NUM_MODELS // 2 if case == "half shared B" else NUM_MODELS] = b[0]
    rows = (b @ rng.uniform(-1, 1, (NUM_MODELS, 3, width))).reshape(NUM_MODELS, -1)
    norms = np.linalg.norm(rows, axis=1)[:, None]
    observed = observe(
        rows,
        (10, width),
        parametrisation="lora",
        b_overlap=(np.einsum("nor,mos->nmrs", b, b) ** 2).sum((2, 3)),
        b_norms=np.linalg.norm(b, axis=(1, 2)),
        a_width=width,
    )

    def literal(rng):
        fresh = (b @ rng.uniform(-1, 1, (NUM_MODELS, 3, width))).reshape(NUM_MODELS, -1)
        return fresh / np.linalg.norm(fresh, axis=1)[:, None] * norms

    # With B shared, updates live in 3 * width dimensions of unequal weight, drawn as fewer equal ones.
    slack = 1.2 if case == "narrow" else 0.5
    assert_same(*compare(fresh_init, observed, literal), shift_slack=slack)
    blind = dataclasses.replace(observed, b_overlap=np.full((NUM_MODELS, NUM_MODELS), 1e-3))
    if case != "random B":
        assert np.abs(compare(fresh_init, blind, literal)[0]).max() > 3  # what the overlaps are for


@pytest.mark.parametrize(("num", "dimension"), [(6, 40), (6, 6), (6, 5), (9, 4), (7, 1), (1, 3)])
def test_unit_gram_agrees_with_explicit_vectors(num, dimension):
    rng = np.random.default_rng(11)
    drawn, literal = [], []
    for _ in range(400):
        gram = _draw.unit_gram(rng, num, dimension)
        assert np.allclose(np.diagonal(gram), 1.0, rtol=0, atol=1e-15) and (gram == gram.T).all()
        rows = _draw.unit_rows(rng.standard_normal((num, dimension)))
        drawn.append(np.linalg.eigvalsh(gram))
        literal.append(np.linalg.eigvalsh(rows @ rows.T))
    error = np.sqrt((np.var(drawn, axis=0) + np.var(literal, axis=0)) / 400)
    assert (np.abs(np.mean(drawn, axis=0) - np.mean(literal, axis=0)) < 4.5 * error + 1e-12).all()
    assert np.linalg.matrix_rank(gram) == min(num, dimension)


def test_unit_frames_are_orthonormal_within_and_independent_between():
    rows = _draw.unit_frames(np.random.default_rng(12), 200, 3, 7).reshape(3, 200, -1).swapaxes(0, 1)
    np.testing.assert_allclose(rows @ rows.transpose(0, 2, 1), np.tile(np.eye(3), (200, 1, 1)), atol=1e-12)
    between = np.einsum("nad,mbd->nmab", rows, rows)[np.triu_indices(200, 1)]
    assert np.mean(between**2) == pytest.approx(1 / 7, rel=0.03)


def edge_cases():
    rng = np.random.default_rng(13)
    rows = rng.standard_normal((12, 20))
    some_zero, giant = rows.copy(), rows.copy()
    some_zero[[2, 5]] = 0.0
    giant[3] *= 1e6
    return {
        "zero models": some_zero,
        "all zero": 0 * rows,
        "one giant": giant,
        "constant": np.ones((12, 20)),
        "equal": np.tile(rows[:1], (12, 1)),
        "two": rows[:2],
        "more models than features": np.tile(rows, (5, 1)) + rng.standard_normal((60, 20)),
    }


@pytest.mark.parametrize("case", edge_cases())
@pytest.mark.parametrize("name", plugins.available("nulls"))
def test_every_null_has_a_defined_answer_at_the_edges(name, case):
    null, rows = plugins.load("nulls", name), edge_cases()[case]
    num = len(rows)
    lora = {"b_overlap": np.ones((num, num)), "b_norms": np.linalg.norm(rows, axis=1), "a_width": 5}
    observed = observe(rows, (4, 5), parametrisation="lora", **lora)
    assert null.applies(observed) is None and null.REFERENCE
    grams, again = (list(null.sample(observed, null.Options(draws=3), np.random.default_rng(1))) for _ in range(2))
    assert len(grams) == 3
    energy = (rows**2).sum(1)
    for gram, other in zip(grams, again, strict=True):
        assert gram.shape == (num, num) and gram.dtype == np.float64
        assert np.isfinite(gram).all() and (gram == other).all()
        np.testing.assert_allclose(gram, gram.T, rtol=0, atol=1e-12 * energy.max())
        assert np.trace(gram) == pytest.approx(energy.sum(), rel=1e-9)
        if name != "shuffle":
            np.testing.assert_allclose(np.diagonal(gram), energy, rtol=1e-9, atol=1e-20)
        if name != "fresh_init":
            assert np.linalg.eigvalsh(gram)[0] > -1e-12 * max(energy.sum(), 1.0)


@pytest.mark.parametrize("name", plugins.available("nulls"))
def test_no_draws_is_refused(name):
    null = plugins.load("nulls", name)
    with pytest.raises(errors.ConfigError, match="draws is 0"):
        next(null.sample(observe(unequal_models()), null.Options(draws=0), np.random.default_rng(0)))


def test_nulls_say_why_they_do_not_apply():
    bare = _observed.Observed(num_features=27, shape=(3, 3, 3), norms=np.ones(4))
    assert gaussian.applies(bare) is None
    assert "mean entries" in permutation.applies(bare)
    assert "single entry" in permutation.applies(dataclasses.replace(bare, num_features=1, entry_means=np.ones(4)))
    assert "(3, 3, 3)" in strength.applies(bare)
    assert "not known" in strength.applies(dataclasses.replace(bare, shape=(3, 9)))
    assert "variances" in shuffle.applies(bare)
    assert "no LoRA" in fresh_init.applies(bare)
    assert "overlaps" in fresh_init.applies(dataclasses.replace(bare, parametrisation="lora"))
