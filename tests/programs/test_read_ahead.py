"""The next layer is read while the last block of the one before is computed, and only for the models it is read for."""

import numpy as np
import pytest

import jaxsub
from jaxsub import placement, reading
from jaxsub.formats import safetensors
from jaxsub.pipelines import layers, session


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for n in range(40):
        tensors = {name: rng.standard_normal((6, 8)).astype(np.float32) for name in ("a", "b", "c")}
        if n == 5:
            tensors["b"][2, 3] = np.nan
        safetensors.write(str(tmp_path / f"m{n}.safetensors"), tensors, None)
    return tmp_path


@pytest.fixture
def opened(monkeypatch):
    """[(event, layer, number of models)] of a run: "begin", "compute" and "close"."""
    events = []
    begin, close, dense = reading.Blocks.__init__, reading.Blocks.close, layers._launch

    def note(event, blocks):
        events.append((event, blocks.group.name, len(blocks.sources)))

    def launch(block, *rest):
        events.append(("compute", "", block.x.shape[0]))
        return dense(block, *rest)

    monkeypatch.setattr(
        reading.Blocks, "__init__", lambda self, *a, **k: (begin(self, *a, **k), note("begin", self))[0]
    )
    monkeypatch.setattr(reading.Blocks, "close", lambda self: (close(self), note("close", self))[0])
    monkeypatch.setattr(layers, "_launch", launch)
    return events


@pytest.mark.slow
def test_the_next_layer_is_begun_before_the_last_block_is_computed(folder, opened):
    (folder / "m5.safetensors").unlink()
    jaxsub.analyze(str(folder))
    assert [e[:2] for e in opened if e[0] != "close"] == [
        ("begin", "a"), ("begin", "b"), ("compute", ""), ("begin", "c"), ("compute", ""), ("compute", "")
    ]  # fmt: skip
    assert sorted(e[1] for e in opened if e[0] == "close") == ["a", "b", "c"]


@pytest.mark.slow
def test_a_layer_begun_with_a_model_that_drops_out_is_read_again(folder, opened):
    report = jaxsub.analyze(str(folder))
    assert [q["id"] for q in report["collection"]["quarantined"]] == ["m5"]
    begun = [e[1:] for e in opened if e[0] == "begin"]
    assert begun == [("a", 40), ("b", 40), ("b", 39), ("c", 39), ("a", 39)]
    assert len([e for e in opened if e[0] == "close"]) == len(begun)  # no threads are left
    (folder / "m5.safetensors").unlink()
    alone = jaxsub.analyze(str(folder))
    assert report["layers"] == alone["layers"]


def test_what_was_begun_is_dropped_where_a_run_ends(folder, opened, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(session.Session, "saved_at", _after(session.Session.saved_at, 1, stopped))
    (folder / "m5.safetensors").unlink()
    with pytest.raises(KeyboardInterrupt):
        jaxsub.analyze(str(folder))
    assert sorted(e[1] for e in opened if e[0] == "close") == ["a", "b"]


def _after(function, calls, then):
    """`function` for so many calls, then `then`."""
    left = iter(range(calls))
    return lambda *a: then(*a) if next(left, None) is None else function(*a)


@pytest.mark.slow
def test_a_buffer_is_refilled_only_when_no_kernel_reads_it_any_more(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for n in range(256):  # sketched beside the next block, and too narrow for programs that are waited for
        tensors = {"w": rng.standard_normal((96, 512)).astype(np.float32)}
        safetensors.write(str(tmp_path / f"m{n}.safetensors"), tensors, None)
    opened, mesh, ready = jaxsub.open_collection(str(tmp_path)), placement.make_mesh(1), []
    launch = layers._launch

    def launched(*given):
        found = launch(*given)
        ready.append(all(array.is_ready() for array in found.results[0]))
        return found

    monkeypatch.setattr(layers, "_launch", launched)
    chosen = layers.Options(block_bytes=2**24, precision="float32", mode_width=8, strength_width=1)
    models = [(ref.id, model) for ref, model in zip(opened.refs, opened.models, strict=True)]
    layers.statistics(opened.groups[0], models, mesh, chosen)
    assert len(ready) > 2 and all(ready)
