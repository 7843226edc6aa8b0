"""Reads past the page cache: the same bytes, wherever they begin and however the drive answers."""

import fcntl
import os

import numpy as np
import pytest

from jaxsub import descriptors, errors
from jaxsub.formats import _direct, _files

SIZE = 9 * 2**20 + 1234


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    place = tmp_path_factory.mktemp("direct") / "numbers.bin"
    place.write_bytes(np.random.default_rng(0).bytes(SIZE))
    return str(place)


@pytest.fixture
def uncached(monkeypatch):
    """Nothing counts as cached, every device as a drive; returns what was read past the cache."""
    past, read = [], _direct._past_the_cache

    def counted(*arguments):
        past.append(read(*arguments))
        return past[-1]

    monkeypatch.setattr(_direct, "_is_cached", lambda *_: False)
    monkeypatch.setattr(_direct, "_is_drive", lambda _: True)
    monkeypatch.setattr(_direct, "_past_the_cache", counted)
    return past


def read(path, start, count):
    out = np.zeros(count, np.uint8)
    _files.read_into(descriptors.Extent(_files.identify(path), 200), start - 200, out, past_cache=True)
    return out


RANGES = [(200, 2**18), (201, 2**20 + 3), (4096, 5 * 2**20), (8191, 8 * 2**20 + 5), (SIZE - 2**18, 2**18), (200, 1000)]


@pytest.mark.parametrize(("start", "count"), RANGES)
def test_the_bytes_are_those_of_the_file(path, uncached, start, count):
    with open(path, "rb") as file:
        wanted = np.frombuffer(file.read()[start : start + count], np.uint8)
    np.testing.assert_array_equal(read(path, start, count), wanted)
    assert sum(uncached) in (0, count)  # 0: a file system without such reads, or too small a range for them
    assert count >= 2**18 or not uncached


def test_a_drive_that_refuses_or_answers_short_is_read_as_usual(path, uncached, monkeypatch):
    with open(path, "rb") as file:
        wanted = np.frombuffer(file.read()[300 : 300 + 2**20], np.uint8)
    preadv, calls = os.preadv, []

    def short(fd, buffers, offset, *flags):
        if fcntl.fcntl(fd, fcntl.F_GETFL) & _direct._O_DIRECT:
            calls.append(offset)
            if len(calls) > 1:
                raise OSError(22, "Invalid argument")
            return preadv(fd, [memoryview(b)[:8192] for b in buffers], offset, *flags)
        return preadv(fd, buffers, offset, *flags)

    monkeypatch.setattr(os, "preadv", short)
    np.testing.assert_array_equal(read(path, 300, 2**20), wanted)


def test_an_error_of_the_drive_names_the_file(path, uncached, monkeypatch):
    def broken(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(_direct, "_past_the_cache", broken)
    with pytest.raises(errors.InputError, match="Input/output error") as caught:
        read(path, 300, 2**20)
    assert "numbers.bin" in str(caught.value)


def test_what_is_cached_is_seen_as_such(path):
    """Just written and read: in the page cache, so that no drive is asked."""
    with open(path, "rb") as file:
        file.read()
        assert _direct._is_cached(file.fileno(), 300, 2**20)
