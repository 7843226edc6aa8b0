"""The plan of a fit: what it says, and the bounds it keeps."""

import io
import json

import pytest

import jaxsub
from jaxsub import config as configs, errors
from jaxsub.pipelines import fit, fit_layer, fit_plan, fit_streamed, layers, plan
from tests.programs import worlds


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    stacks = {"thin": worlds.noise(9, (12,)), "wide": worlds.noise(9, (20, 15)), "kept": worlds.noise(9, (7, 5))}
    return str(worlds.write(tmp_path_factory.mktemp("models"), stacks))


def plans(folder, **given):
    config = configs.freeze(fit.Config, given)
    groups = jaxsub.open_collection(folder).groups
    return fit_plan.of(groups, [fit_layer.module(g, config) for g in groups], config)


def test_the_device_holds_copies_of_the_stack_and_the_host_what_was_read_too(folder):
    for found in plans(folder):
        stack = found.bytes_read  # float32, as stored
        assert found.device_bytes >= 2 * stack and found.host_bytes == found.device_bytes  # the stack is used in place
    assert plan.device_peak(plans(folder)) == max(p.device_bytes for p in plans(folder))


def test_tucker_fits_hold_what_their_ranks_ask_for_and_sweeps_more(tmp_path):
    """What the default suite can hold of the plan; test_fit_memory.py measures it."""
    folder = str(worlds.write(tmp_path / "m", {"w": worlds.noise(8, (64, 48, 3, 3))}))
    stack = 8 * 64 * 48 * 9 * 4
    (half,), (most,) = (plans(folder, decomposition="sthosvd", energy=e) for e in (0.5, 0.9))
    # Two of four axes share the error: three quarters of each for half of the energy, 19 of 20 for .9 of it.
    assert most.device_bytes - half.device_bytes == pytest.approx(stack * (0.95**2 - 0.75**2), rel=0.05)
    ranks = {"rank": 3, "decomposition": "hosvd"}
    (once,), (swept,) = plans(folder, **ranks), plans(folder, **(ranks | {"decomposition": "hooi"}))
    # The stack without its longest axis, 3 x 3 x 3 of 48 x 3 x 3 kept on the others.
    assert swept.device_bytes - once.device_bytes == pytest.approx(stack * 3 / 48, rel=0.01)


@pytest.mark.parametrize("host", [2**30, 2**31])
def test_a_streamed_block_is_a_twelfth_of_what_is_allowed_beyond_kernels(host):
    config = configs.freeze(fit.Config, {"max_host_bytes": host})
    wanted = min((host - fit_streamed.KERNELS) // 12, layers.Options().block_bytes)
    assert fit_streamed.block_bytes(config) == wanted


def test_a_bound_on_device_memory_refuses_the_worst_layer_by_name_before_reading(folder, monkeypatch):
    worst = max(p.device_bytes for p in plans(folder, rank=1))
    monkeypatch.setattr(fit_layer, "fit", lambda *_: pytest.fail("read"))
    with pytest.raises(errors.ResourceError, match="layer wide .*--max_device_bytes"):
        jaxsub.fit(folder, rank=1, max_device_bytes=worst - 1)
    with pytest.raises(pytest.fail.Exception, match="read"):
        jaxsub.fit(folder, rank=1, max_device_bytes=worst)
    with pytest.raises(errors.ConfigError, match="max_device_bytes"):
        jaxsub.fit(folder, rank=1, max_device_bytes=-1)


def test_the_plan_says_what_is_read_held_and_written(folder):
    text = jaxsub.fit(folder, dry_run=True, exclude_layers=["kept"], rank=3)
    assert f"to read: {plan.size(9 * 4 * (12 + 300))}\n" in text and "time, an estimate: reading" in text
    assert text.count("on CPU a part of the host's") == 1
    assert f"at most {plan.size(9 * 4 * 35)} of tensors kept whole" in text
    assert all(len(line) <= 100 for line in text.splitlines())
    assert "spectra ask for" in jaxsub.fit(folder, dry_run=True, energy=0.5)
    budget = jaxsub.fit(folder, dry_run=True, budget_bytes=10**6)
    assert f"to read: {plan.size(2 * 9 * 4 * 347)}, in two passes" in budget and "to write: at most 976.6 KiB" in budget


@pytest.mark.slow
def test_the_layers_that_will_be_written_are_as_large_as_planned(folder):
    count = jaxsub.fit(folder, rank=3).accounting()
    written = count["mean"] + count["basis"] + count["coefficients"]
    assert sum(p.bundle_bytes for p in plans(folder, rank=3)) == pytest.approx(written, rel=0.05)


def test_the_plan_stands_before_the_first_layer_is_read(folder, monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(fit_layer, "fit", lambda *_: pytest.fail(stream.getvalue()))
    with pytest.raises(pytest.fail.Exception, match="to read: .*\n(.*\n)*time, an estimate"):
        fit.run(configs.freeze(fit.Config, {"collection": [folder], "rank": 1}), stream=stream)


@pytest.mark.slow
def test_a_trace_lies_beside_the_bundle_and_changes_no_byte_of_it(folder, tmp_path):
    jaxsub.fit(folder, tmp_path / "a" / "bundle", rank=2)
    jaxsub.fit(folder, tmp_path / "b" / "bundle", rank=2, profile=True, max_device_bytes=2**40)
    assert list((tmp_path / "b" / "profile").rglob("perfetto_trace.json.gz"))
    manifests = [json.loads((tmp_path / x / "bundle" / "manifest.json").read_text()) for x in "ab"]
    assert manifests[0] == manifests[1]
    with pytest.raises(errors.ConfigError, match="profile"):
        jaxsub.fit(folder, rank=2, profile=True)


@pytest.mark.parametrize("decomposition", ["gram", "hosvd", "hooi"])
def test_layers_of_one_number_are_planned(tmp_path, decomposition):
    worlds.write(tmp_path, {"scale": worlds.noise(5, ()), "w": worlds.noise(5, (4, 3))})
    assert all(p.host_bytes > 0 for p in plans(str(tmp_path), decomposition=decomposition, rank=1))


def test_a_refusal_of_all_layers_together_blames_none_of_them(folder):
    found = plans(folder, rank=1)
    alone = max(fit_plan.peak([p]) for p in found)
    assert alone < fit_plan.peak(found)
    config = configs.freeze(fit.Config, {"rank": 1, "max_host_bytes": fit_plan.peak(found) - 1})
    with pytest.raises(errors.ResourceError, match="all layers together need"):
        fit_plan.require_memory(found, config)
    with pytest.raises(errors.ResourceError, match="layer wide needs"):
        fit_plan.require_memory(found, configs.freeze(fit.Config, {"rank": 1, "max_host_bytes": alone - 1}))
