"""Random collections of every dtype and of odd numbers against a few lines of float64 NumPy."""

import json

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

import jaxsub
from tests.figures_log import record
from tests.linalg.test_ratios import DTYPES
from tests.programs import worlds

EXAMPLES = 300
SHAPES = [(4, (1,)), (5, (3, 2)), (9, (2, 2)), (7, (12, 5)), (12, (3, 2, 2, 2))]  # few: each is compiled
SPECTRA = ["noise", "low", "mean", "graded"]
SPECIALS = ["zeros", "copy", "large", "small", "zero model", "nan", "inf", "negative zero", "zero layer"]
LIMITS = {"bfloat16": (-126, 127), "float16": (-14, 15), "float32": (-126, 127), "float64": (-900, 900)}
cases = strategies.fixed_dictionaries(
    {
        "dtype": strategies.sampled_from(sorted(DTYPES)),
        "shape": strategies.sampled_from(SHAPES),
        "spectrum": strategies.sampled_from(SPECTRA),
        "power": strategies.integers(-3, 3),  # of the part of the dtype's range
        "specials": strategies.sets(strategies.sampled_from(SPECIALS), max_size=3),
        "seed": strategies.integers(0, 2**32 - 1),
    }
)


def made(case):
    """(N, *shape) models of a case, in its dtype, and the places of those that are not finite."""
    rng, (count, shape), specials = np.random.default_rng(case["seed"]), case["shape"], case["specials"]
    width = int(np.prod(shape))
    x = rng.standard_normal((count, width))
    if case["spectrum"] == "low":
        x = rng.standard_normal((count, 1)) @ rng.standard_normal((1, width)) + 1e-3 * x
    elif case["spectrum"] == "mean":
        x = 1e3 * rng.standard_normal(width) + x
    elif case["spectrum"] == "graded":
        x = x * 10.0 ** -np.arange(count)[:, None]
    if "zeros" in specials:
        x[rng.random(x.shape) < 0.5] = 0
    if "large" in specials:
        x[rng.integers(count)] *= 2.0**6
    if "small" in specials:
        x[rng.integers(count)] *= 2.0**-9
    least, most = LIMITS[case["dtype"]]
    power = case["power"] * (most if case["power"] > 0 else -least) // 4
    x = np.ldexp(x / (np.abs(x).max() or 1), power)
    if "negative zero" in specials:
        x[:, 0] = -0.0
    if "zero layer" in specials:
        x[:] = 0
    if "zero model" in specials:
        x[0] = 0
    if "copy" in specials:
        x[-1] = x[1]
    bad = {}
    if {"nan", "inf"} & specials:
        bad = {int(rng.integers(count)): np.nan if "nan" in specials else -np.inf}
    for place, value in bad.items():
        x[place, rng.integers(width)] = value
    return x.reshape(count, *shape).astype(DTYPES[case["dtype"]]), [*bad]


def require_true(layer, rows, dtype):
    """Values over the floor in LAPACK's units, those under it within it, and nothing that is no number."""
    unit = np.abs(rows).max() or 1.0
    y = rows / unit - (rows / unit).mean(0)
    values = np.zeros(len(rows) - 1)
    found = np.linalg.svd(y, compute_uv=False)[: len(values)]
    values[: len(found)] = found
    s, floor = np.array(layer["singular_values"]) / unit, layer["floor"] / unit
    assert len(s) == len(values) and np.all(s >= 0) and np.all(np.diff(s) <= 0)
    ulp = 2.0**-52 if dtype == "float64" else 2.0**-23
    # Centring rounds at the scale of the weights, whatever is left of them.
    first = max(values[0], 2.0**-52 * np.linalg.norm(rows / unit) / ulp) or 1.0
    ratio = np.abs(s - values)[s > floor].max(initial=0) / (first * min(y.shape) * ulp)
    assert ratio < 30 and np.all(np.abs(s - values)[s <= floor] <= 2 * floor)
    return ratio


def check(folder, case):
    """The ratio of one case; None where too few models are left, and that is said."""
    x, bad = made(case)
    # A second layer tells models apart that are alike in the first one, but for the copy.
    tag = np.arange(len(x), dtype=np.float32)
    if "copy" in case["specials"]:
        tag[-1] = tag[1]
    worlds.write(folder, {"w": x, "tag": np.stack([tag, np.ones_like(tag)], 1)})
    kept = [n for n in range(len(x)) if n not in bad]
    if "copy" in case["specials"] and {1, len(x) - 1} <= {*kept}:
        kept.remove(len(x) - 1)
    try:
        report = jaxsub.analyze(str(folder), draws=1, splits=1)
    except jaxsub.errors.InputError as error:
        assert len(kept) < 3 or bad, error
        return None
    json.dumps(report.data, allow_nan=False)
    assert [one["id"] for one in report["collection"]["quarantined"]] == [f"m{n:03d}" for n in bad]
    if len(kept) < 3:  # two distinct models are not analysed, and that is said
        assert not report.layers and "w" in json.dumps(report["collection"]["skipped_layers"])
        return None
    layer = next(one for one in report.layers if one["name"] == "w")
    assert layer["num_models"] == len(kept)
    return require_true(layer, x[kept].reshape(len(kept), -1).astype(np.float64), case["dtype"])


@pytest.mark.slow
def test_random_collections(tmp_path):
    ratios, runs = [], []

    @hypothesis.settings(max_examples=EXAMPLES, derandomize=True, deadline=None, database=None)
    @hypothesis.given(cases)
    def run(case):
        runs.append(case)
        ratio = check(tmp_path / f"c{len(runs)}", case)
        ratios.extend([] if ratio is None else [ratio])

    run()
    assert len(ratios) >= 0.8 * len(runs)
    record("NUM-5", "random collections against float64 NumPy", len(runs))
    record("NUM-5", "largest ratio (bound 30)", float(max(ratios)))


def test_the_oracle_refuses_values_that_are_off():
    case = {"dtype": "float32", "shape": SHAPES[3], "spectrum": "noise", "power": 0, "specials": set(), "seed": 1}
    rows = made(case)[0].reshape(7, -1).astype(np.float64)
    values = np.linalg.svd(rows - rows.mean(0), compute_uv=False)[:6]
    layer = {"singular_values": list(values), "floor": 1e-7}
    assert require_true(layer, rows, "float32") < 1
    for spoilt in (values * (1 + 1e-3), np.linalg.svd(rows, compute_uv=False)[:6], values * 2.0**-4):
        with pytest.raises(AssertionError):
            require_true({**layer, "singular_values": list(spoilt)}, rows, "float32")
