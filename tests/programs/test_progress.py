"""What is said while layers are read: rate, time left, peak memory, on a terminal and in plain lines."""

import io
import re

import pytest

from jaxsub.pipelines import plan, progress

GB = 10**9


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Seconds that only the test moves."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(plan, "peak_resident", lambda: 3 * 2**30)
    return now


def test_plain_lines_say_layer_bytes_rate_time_left_and_peak(clock):
    stream = io.StringIO()
    with progress.Progress(20 * GB, 12, stream=stream) as bar:
        clock[0] += 4
        bar.layer("first", 5 * GB, "N=40")
        clock[0] += 4
        bar.layer("second", 15 * GB)
    first, second = stream.getvalue().splitlines()
    assert first == "[ 1/12] first  N=40  4.7 GiB of 18.6 GiB  1.25 GB/s  12 s left  peak 3.0 GiB"
    assert second == "[ 2/12] second  18.6 GiB of 18.6 GiB  2.50 GB/s  under 0.1 s left  peak 3.0 GiB"


def test_layers_found_in_the_workdir_make_no_rate(clock):
    stream = io.StringIO()
    with progress.Progress(20 * GB, 3, stream=stream) as bar:
        bar.layer("known", 10 * GB, read=0)
        clock[0] += 5
        bar.layer("read", 5 * GB)
    known, read = stream.getvalue().splitlines()
    assert known == "[1/3] known  9.3 GiB of 18.6 GiB  peak 3.0 GiB"
    assert "1.00 GB/s  5.0 s left" in read


def test_no_time_is_promised_while_the_first_layers_compile(clock):
    stream = io.StringIO()
    with progress.Progress(100 * GB, 3, stream=stream) as bar:
        clock[0] += 5
        bar.layer("first", GB)
    assert "left" not in stream.getvalue() and "0.20 GB/s" in stream.getvalue()


def test_a_terminal_has_the_same_figures_beside_the_bar(clock):
    stream = Terminal()
    with progress.Progress(20 * GB, 2, stream=stream) as bar:
        bar.bar.console.width = 160
        clock[0] += 4
        bar.layer("lay[er]", 5 * GB)
        bar.bar.refresh()
    said = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "lay[er]" in said and "1.25 GB/s  12 s left  peak 3.0 GiB" in said


def test_silence_without_a_stream(clock):
    with progress.Progress(5, 1) as bar:
        bar.layer("a", 5)
    assert bar.done == 5 and bar.bar is None


def test_another_pass_adds_its_layers_and_bytes(clock):
    stream = io.StringIO()
    with progress.Progress(2 * GB, 1, stream=stream) as bar:
        clock[0] += 1
        bar.layer("first", 2 * GB)
        bar.more(6 * GB, 1)
        clock[0] += 1
        bar.layer("again", 6 * GB)
    assert stream.getvalue().splitlines()[1].startswith("[2/2] again  7.5 GiB of 7.5 GiB")
