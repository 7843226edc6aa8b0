"""How many threads BLAS has, and when."""

import threading
import types

import jax
import numpy as np
import pytest
import scipy.linalg  # noqa: F401  whose library XLA calls
import threadpoolctl

from jaxsub import hostmemory, stacks
from jaxsub.decompositions import _again, gram, hosvd
from tests.selected import first


def threads():
    """Of each BLAS that is loaded."""
    return [one["num_threads"] for one in threadpoolctl.threadpool_info() if one["user_api"] == "blas"]


@pytest.fixture(autouse=True)
def two():
    with threadpoolctl.threadpool_limits(2, "blas"):
        if set(threads()) != {2}:
            pytest.skip("a BLAS that does not do as it is told")
        yield


def test_blas_has_one_thread_within_and_its_own_behind():
    with hostmemory.one_blas_thread():
        assert set(threads()) == {1}
        with hostmemory.one_blas_thread():
            pass
        assert set(threads()) == {1}
    assert set(threads()) == {2}
    with pytest.raises(KeyError), hostmemory.one_blas_thread():
        raise KeyError
    assert set(threads()) == {2}


def test_who_limited_them_gives_them_back():
    """A thread that comes later and stays longer neither keeps the limit nor takes it for what it found."""
    inside, leave = threading.Event(), threading.Event()

    def other():
        with hostmemory.one_blas_thread():
            inside.set()
            leave.wait()

    thread = threading.Thread(target=other)
    with hostmemory.one_blas_thread():
        thread.start()
        inside.wait()
    assert set(threads()) == {2}
    leave.set()
    thread.join()
    assert set(threads()) == {2}


def test_another_thread_can_limit_them_later():
    with hostmemory.one_blas_thread():
        pass
    seen = []

    def other():
        seen.append(hostmemory._one.acquire(timeout=5))
        if seen[0]:
            hostmemory._one.release()

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen == [True]


@pytest.mark.parametrize("module, shape, expected", first([(hosvd, (9, 40), 2), (gram, (4, 9), 1), (gram, (9, 40), 1)]))
def test_decompositions_have_one_thread_but_for_large_eigenproblems(monkeypatch, module, shape, expected):
    monkeypatch.setattr(hostmemory, "THREADED", 40)
    seen = []

    def fit(*arguments):
        seen.extend(threads())
        return module.fit(*arguments)

    plugin = types.SimpleNamespace(**{**vars(module), "fit": fit})
    with jax.enable_x64(True):
        x = np.random.default_rng(0).standard_normal((5, *shape), np.float32)
        stack = stacks.DenseStack.create(x, "layer")
        _again.fit(plugin, stack, module.Options(), jax.random.key(0))
    assert set(seen) == {expected} and set(threads()) == {2}
