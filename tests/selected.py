"""Which cases of a test run by default: the first few; the others are slow."""

import pytest


def first(values, count=1):
    """Cases for `parametrize`, all but the first `count` marked slow.

    Tuples are several arguments: one that is itself a tuple comes in a tuple of one, as zip(shapes) gives it.
    """
    return [_case(value, () if number < count else pytest.mark.slow) for number, value in enumerate(values)]


def _case(value, marks):
    return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=marks)
