"""Fixtures of the kernels' tests."""

import jax
import pytest


@pytest.fixture
def x64():
    """Float64 on, as the callers of kernels have it."""
    with jax.enable_x64(True):
        yield
