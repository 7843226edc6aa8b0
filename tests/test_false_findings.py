"""How often noise is called a finding: verdicts on whole collections of it, and what each null says of its own law.

Nominal rates, as README and `verdict` state them, that a layer of noise is called shared, lineage or lineage+shared:

    light tails   the gain must exceed the nulls' by 4 sd of 20 draws: Student's t with 19 degrees of freedom, .0006
    heavy tails   few entries carry a model: it must exceed that of each of 200 literal permutations, 1 / 201
"""

import math

import numpy as np
import pytest
import scipy.stats

import jaxsub
from jaxsub import heldout, spectrum, verdict
from jaxsub.formats import safetensors
from jaxsub.nulls import _observed, gaussian, permutation, strength
from tests.figures_log import record

FINDINGS = ("shared", "lineage", "lineage+shared")
SHAPES = [(20, (12, 10)), (40, (24, 18)), (30, (7, 5))]  # N, weight: narrow layers, where draws differ most
LIGHT = {
    "gaussian": lambda rng, n, o, i: rng.standard_normal((n, o, i)),
    "unequal norms": lambda rng, n, o, i: rng.standard_normal((n, o, i)) * np.exp(rng.standard_normal((n, 1, 1))),
    "uniform": lambda rng, n, o, i: rng.uniform(-1, 1, (n, o, i)),
    "rank two": lambda rng, n, o, i: rng.standard_normal((n, o, 2)) @ rng.standard_normal((n, 2, i)),
    "Student, 4": lambda rng, n, o, i: rng.standard_t(4, (n, o, i)),
}
HEAVY = {
    "Student, 2.5": lambda rng, n, o, i: rng.standard_t(2.5, (n, o, i)),
    "sparse": lambda rng, n, o, i: rng.standard_normal((n, o, i)) * (rng.random((n, o, i)) < 0.05),
    "Cauchy": lambda rng, n, o, i: rng.standard_cauchy((n, o, i)),
}
NOMINAL = {"light": 6e-4, "heavy": 1 / 201}


def nominal_light():
    """Chance that one of 21 normal numbers exceeds the mean of the others by 4 of their standard deviations."""
    others = 20
    return scipy.stats.t.sf(verdict.SIGMAS * math.sqrt((others - 1) / others / (1 + 1 / others)), others - 1)


def band(count, rate):
    """(fewest, most) of `count` that a binomial law of this rate gives in 99 of 100 cases."""
    low, high = scipy.stats.binom.ppf([0.005, 0.995], count, rate)
    return int(low), int(high)


def test_the_nominal_rates_are_those_of_the_rule():
    assert nominal_light() == pytest.approx(NOMINAL["light"], rel=0.05)
    assert 1 / (permutation.LITERAL_DRAWS + 1) == NOMINAL["heavy"]


def findings(folder, draw, seed, count):
    """Verdicts of `count` collections of noise, by analyses of their files."""
    found = []
    for number in range(count):
        n, (o, i) = SHAPES[number % len(SHAPES)]
        x = draw(np.random.default_rng([seed, number]), n, o, i)
        x[~x.any(axis=(1, 2)), 0, 0] = 1.0  # a sparse model without an entry would be called untrained
        for m in range(n):
            safetensors.write(folder / f"m{m:02d}.safetensors", {f"w{seed}.{number}": x[m].astype(np.float32)})
        (layer,) = jaxsub.analyze(str(folder), draws=20, splits=1).layers
        assert layer["verdict"] in (*FINDINGS, "chance", "common_mean")
        found.append(layer["verdict"] in FINDINGS)
        for path in folder.iterdir():
            path.unlink()
    return sum(found)


@pytest.mark.slow
@pytest.mark.parametrize("tails", ["light", "heavy"])
def test_a_thousand_collections_of_noise(tmp_path, tails):
    """500 of each: 100 a kind of five, 167 a kind of three."""
    kinds = {"light": LIGHT, "heavy": HEAVY}[tails]
    each = -(-500 // len(kinds))
    counts = {kind: findings(tmp_path, draw, seed, each) for seed, (kind, draw) in enumerate(sorted(kinds.items()))}
    low, high = band(each * len(kinds), NOMINAL[tails])
    record("NUM-6", f"findings among {each * len(kinds)} collections of noise, {tails} tails", sum(counts.values()))
    record("NUM-6", f"99 % band of the nominal rate, {tails} tails", f"{low} to {high}")
    assert low <= sum(counts.values()) <= high, counts


def gain(gram):
    return 1.0 - float(heldout.leave_one_out(spectrum.centred(gram), [4])[0])


def beaten(null, make, trials, draws=20, seed=0):
    """How often the gain of noise exceeds that of all `draws` of a null; exchangeable ones: once in draws + 1."""
    count = 0
    for trial in range(trials):
        rng = np.random.default_rng([seed, trial])
        rows, more = make(rng)
        observed = _observed.Observed(
            num_features=rows.shape[1], norms=np.linalg.norm(rows, axis=1), entry_means=rows.mean(1), **more
        )
        best = max(gain(g) for g in null.sample(observed, null.Options(draws=draws), rng))
        count += gain(rows @ rows.T) > best
    return count


def normal(rng):
    return rng.standard_normal((14, 40)) * np.exp(rng.standard_normal((14, 1))), {"shape": (8, 5)}


def few_entries(rng):
    rows = rng.standard_normal((14, 120)) * (rng.random((14, 120)) < 0.08)
    rows[~rows.any(1), 0] = 1.0
    unit = rows / np.linalg.norm(rows, axis=1)[:, None] * math.sqrt(120)
    return rows, {"shape": (12, 10), "entries": unit.astype(np.float16)}


def rank_one(rng):
    x = rng.standard_normal((14, 8, 1)) @ rng.standard_normal((14, 1, 5))
    values = np.linalg.svd(x, compute_uv=False)
    return x.reshape(14, -1), {"shape": (8, 5), "model_singular_values": values}


CALIBRATED = {
    "gaussian": (gaussian, normal),
    "permutation": (permutation, few_entries),
    "strength": (strength, rank_one),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CALIBRATED)
def test_each_null_is_exact_for_its_own_law(name):
    null, make = CALIBRATED[name]
    count, (low, high) = beaten(null, make, 1000), band(1000, 1 / 21)
    record("NUM-6", f"of 1000 collections that beat all 20 draws of {name} (band {low} to {high})", count)
    assert low <= count <= high


@pytest.mark.slow
def test_a_null_of_another_law_is_found_out():
    """Directions for entries that meet, and unequal singular values for none: far out of the band."""
    _, high = band(400, 1 / 21)

    def blind(rng):
        rows, more = few_entries(rng)
        return rows, {"shape": more["shape"]}

    assert beaten(permutation, blind, 400) > 1.5 * high
    assert beaten(gaussian, rank_one, 400) > high
