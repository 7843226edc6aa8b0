"""Intervals of few draws: how often they leave out what is true."""

import numpy as np
import pytest

from jaxsub.pipelines import intervals


@pytest.mark.slow
@pytest.mark.parametrize("draws", [2, 3, 4, 5, 10])
def test_a_true_zero_is_left_out_as_seldom_as_is_said(draws, monkeypatch):
    """Of 400 samples of normal draws; a plain bootstrap leaves it out in 49, 25, 18, 19 and 9 %."""
    monkeypatch.setattr(intervals, "DRAWS", 2000)
    rng, count, plain, widened = np.random.default_rng(draws), 400, 0, 0
    for _ in range(count):
        scores = rng.normal(size=(draws, 1))
        low, high = intervals._bootstrap(scores)
        plain += not low <= 0 <= high
        _, low, high = intervals.interval(scores)
        widened += not low <= 0 <= high
    most = 0.05 * count + 3 * (0.05 * 0.95 * count) ** 0.5
    assert widened <= most < plain
