"""What `jaxsub train` chooses, claims and calls its models, of made-up scores."""

import numpy as np

from jaxsub.pipelines import intervals, train_table, train_write


def test_a_diverged_rate_is_never_chosen_and_seeds_that_are_one_run_make_no_claim():
    scores = np.array([[[-np.inf, -50.0, -60.0], [-0.5, -50.0, -60.0]]])  # e.g. minus a squared error
    assert train_table.chosen(scores) == 1
    assert train_table.chosen(np.full((1, 2, 2), -np.inf)) == 0
    assert train_table.chosen(np.array([[[0.1, 0.9]]])) == 1
    lost = {"name": "full", "scores": [[0.5, 0.5]]}
    assert train_table.comparisons([{"name": "scalar", "scores": [[0.9, 0.9]]}, lost])[0]["better"] is None
    many = intervals.interval([[0.5, 0.5], [0.7, 0.7]])  # tasks differ: an interval there is
    assert many[1] < many[2]


def test_models_of_tasks_with_like_names_do_not_overwrite_each_other():
    class Variation:
        def __init__(self, name):
            self.name = name

    class Training:
        seeds = (0, 1)

        class setup:
            variations = tuple(map(Variation, ("a b", "a-b", "A_b", "\u65e5", "\u4e2d", "a b 2")))

    found = train_write.labels(Training)
    assert found[:2] == ["a_b-0", "a_b-1"] and len({name.lower() for name in found}) == 12
