"""The table of verdicts, row by row and at its edges."""

import pytest

from jaxsub import verdict

BASE = dict(
    num_models=40, num_features=1000, saturated=False, constant=False, families=verdict.Families(),
    overall=verdict.Gain(0.3, 0.01, 0.001, "gaussian"), within=None, mean=0.03, mean_chance=1 / 40, k=16, k_within=8,
)  # fmt: skip
WEAK = verdict.Gain(0.03, 0.011, 0.001, "permutation")


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, "shared"),
        ({"families": verdict.Families(1, True)}, "shared"),
        ({"num_models": 7}, "undetermined"),
        ({"num_features": 39}, "undetermined"),
        ({"num_features": 40}, "shared"),
        ({"saturated": True}, "undetermined"),
        ({"constant": True}, "undetermined"),
        ({"families": verdict.Families(2), "within": WEAK}, "lineage"),
        ({"families": verdict.Families(2), "within": verdict.Gain(0.2, 0.01, 0.001, "gaussian")}, "lineage+shared"),
        ({"families": verdict.Families(2), "overall": WEAK, "within": WEAK}, "chance"),
        ({"families": verdict.Families(9, False, 0.6, 0.57, 0.001), "overall": WEAK, "within": WEAK}, "lineage"),
        ({"families": verdict.Families(9, False, 0.6, 0.57, 0.008), "overall": WEAK, "within": WEAK}, "chance"),
        ({"overall": WEAK, "mean": 0.9, "mean_chance": 0.9}, "chance"),
        ({"overall": WEAK}, "chance"),
        ({"overall": WEAK, "mean": 0.0751}, "common_mean"),
        ({"overall": WEAK, "mean": 0.0749}, "chance"),
    ],
)
def test_rows_of_the_table(changes, expected):
    word, why = verdict.decide(**(BASE | changes))
    assert word == expected and why


def test_the_margin_is_the_larger_of_two():
    assert not verdict.Gain(0.119, 0.1, 0.0, "").beats and verdict.Gain(0.121, 0.1, 0.0, "").beats
    assert not verdict.Gain(0.139, 0.1, 0.01, "").beats and verdict.Gain(0.141, 0.1, 0.01, "").beats


def test_the_hardest_null_decides_and_shuffle_does_not():
    nulls = {
        "permutation": {"held_out": {"4": 0.9}, "held_out_sd": {"4": 0.001}},
        "gaussian": {"held_out": {"4": 0.99}, "held_out_sd": {"4": 0.001}},
        "shuffle": {"held_out": {"4": 0.1}, "held_out_sd": {"4": 0.001}},
    }
    found = verdict.gain({"4": 0.5}, nulls, 4)
    assert found.null_name == "permutation" and found.null == pytest.approx(0.1) and found.beats
    assert verdict.gain({"4": 0.5}, {"shuffle": nulls["shuffle"]}, 4) is None


@pytest.mark.parametrize(
    "n, k", [(3, None), (4, 1), (5, 1), (6, 2), (9, 2), (10, 4), (18, 8), (33, 8), (34, 16), (999, 16)]
)
def test_deciding_rank(n, k):
    assert verdict.deciding_rank(n) == k


def test_every_verdict_is_explained():
    from jaxsub.report import words

    assert set(words.VERDICTS) == {"shared", "lineage", "lineage+shared", "common_mean", "chance", "undetermined"}


def test_null_curves_are_settled_only_where_they_agree_at_every_k():
    curves = [{"1": 0.99 + 1e-5 * i, "2": 0.98} for i in range(8)]
    assert verdict.settled(curves)
    curves[3]["2"] = 0.97  # sd 3.3e-3, over a tenth of the margin
    assert not verdict.settled(curves)


def test_each_rank_is_said_with_its_own_figure():
    _, why = verdict.decide(**(BASE | {"families": verdict.Families(2), "within": WEAK}))
    assert why.startswith("16 components of the others explain 30.0%")
    assert "within the 2 lineages 8 components of the others explain 3.0%" in why


def test_a_start_that_only_other_layers_show_is_said_so():
    start = {"families": verdict.Families(1, True)}
    assert "which other layers show: here the mean holds 3.0%" in verdict.decide(**(BASE | start))[1]
    assert verdict.decide(**(BASE | start | {"mean": 0.3}))[1].endswith("all models keep a common start")


def test_a_shared_start_of_adapters_is_said_with_the_claim():
    _, why = verdict.decide(**(BASE | {"same_a": 20}))
    assert "20 adapters keep the start of another's A factor" in why and "no common start" not in why
