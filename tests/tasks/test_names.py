"""One name a task: whatever number a draw has, tasks of one name are one, and others are not."""

import numpy as np
import pytest

from jaxsub.tasks import digits


@pytest.mark.parametrize(
    ("variant", "kinds"), [("inverted", 1), ("mirrored", 2), ("turned", 3), ("names", 8), ("pixels", 8), ("half", 8)]
)
def test_names_are_equal_exactly_where_tasks_are(variant, kinds):
    every = [digits.Options(variant=variant, draw=draw) for draw in range(8)]
    contents = []
    for options in every:
        inputs, targets = digits.load(options)[0].used()
        contents.append((inputs.tobytes(), targets.tobytes()))
    for a, first in zip(every, contents, strict=True):
        for b, second in zip(every, contents, strict=True):
            assert (digits.name(a) == digits.name(b)) == (first == second)
    assert len({*map(digits.name, every)}) == kinds


def test_the_name_of_renamed_classes_is_their_order():
    order = np.random.RandomState(5).permutation(10)
    assert digits.name(digits.Options(variant="names", draw=5)) == "digits names " + "".join(map(str, order))
