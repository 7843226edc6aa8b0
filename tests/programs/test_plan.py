"""The plan of an analysis against what is there and what happens: bytes, blocks, device memory, files, bounds, time."""

import dataclasses
import functools
import io
import math
import os
import pathlib
import re
import time
import types

import jax
import numpy as np
import pytest

import jaxsub
from jaxsub import config as configs, descriptors, errors, placement
from jaxsub.formats import peft
from jaxsub.linalg import gram, modes
from jaxsub.pipelines import analyze, estimate, layers, lora, memory, plan, session as sessions
from tests.programs import worlds

QUICK = dict(draws=2, splits=2)


def options(folder, **given):
    return configs.freeze(analyze.Config, {"collection": [str(folder)], **QUICK, **given})


def planned(folder, **given):
    """LayerPlans of a session."""
    session = sessions.Session(jaxsub.open_collection(str(folder)), options(folder, **given), None, None)
    return session.plans()


def adapters(folder, num_models=12, rank=4, shape=(40, 30)):
    rng = np.random.default_rng(0)
    for n in range(num_models):
        a, b = (rng.standard_normal(s).astype(np.float32) for s in ((rank, shape[1]), (shape[0], rank)))
        peft.write(str(folder / f"m{n}"), {"q": (a, b, 8, rank)})
    return folder


# Device memory ----------------------------------------------------------------------------------------------------

# models, shape, dtype, Options; float32 products unless said otherwise, so that no copy in float64 hides an error
SMALL = {"block_bytes": 2**20, "precision": "float32", "mode_work": 2**24}
CASES = {
    "blocks, both axes sketched": (24, (512, 256), "float32", {"mode_width": 64, "strength_width": 1}),
    "sketched beside the next block": (128, (128, 128), "float32", {"mode_width": 64, "strength_width": 1}),
    "blocks of 16 bits": (24, (512, 512), "bfloat16", {"mode_width": 64, "strength_width": 1}),
    "one block, axes exact, float64": (
        12,
        (3, 3, 48, 48),
        "float32",
        {"precision": "float64", "block_bytes": 2**23, "mode_work": 2**36},
    ),
    "few long models": (4, (30000, 8), "float32", {"mode_work": 2**30}),
    "singular values of each model": (64, (256, 24), "float32", {"block_bytes": 2**22, "mode_width": 8}),
}
QUICK_CASES = [("few long models", 1)]  # the others compile for longer


KERNELS = (
    (gram, "_dense_gram _lora_gram"),
    (modes, "sketch mode_gram unfolding_gram model_grams"),
    (lora, "_weighted_rows _row_energies"),
)


class Watch:
    """Largest bytes of the first device that arrays and a kernel's own take while a layer is summed."""

    def __init__(self, monkeypatch):
        self.device, self.most = jax.devices()[0], 0
        self.before = {id(a) for a in jax.live_arrays()}
        for module, names in KERNELS:
            for name in names.split():
                monkeypatch.setattr(module, name, self.kernel(getattr(module, name)))
        put = jax.device_put

        def device_put(*args, **kwargs):
            found = put(*args, **kwargs)
            self.most = max(self.most, self.held())
            return found

        monkeypatch.setattr(jax, "device_put", device_put)

    def held(self):
        arrays = [a for a in jax.live_arrays() if id(a) not in self.before and self.device in a.sharding.device_set]
        return sum(math.prod(a.sharding.shard_shape(a.shape)) * getattr(a.dtype, "itemsize", 8) for a in arrays)

    def kernel(self, function):
        @functools.wraps(function)
        def watched(*args, **kwargs):
            needs = function.lower(*args, **kwargs).compile().memory_analysis()
            self.most = max(self.most, self.held() + needs.temp_size_in_bytes + needs.output_size_in_bytes)
            return function(*args, **kwargs)

        return watched


@pytest.mark.parametrize(
    "case, devices",
    [pytest.param(c, d, marks=[] if (c, d) in QUICK_CASES else pytest.mark.slow) for c in CASES for d in (1, 8)],
)
def test_device_bytes_are_those_of_arrays_and_kernels(tmp_path, monkeypatch, case, devices):
    num_models, shape, dtype, given = CASES[case]
    x = worlds.noise(num_models, shape).astype(descriptors.numpy_dtype(dtype))
    opened = jaxsub.open_collection(str(worlds.write(tmp_path / "c", {"w": x})))
    chosen = dataclasses.replace(layers.Options(), **(SMALL | given))
    found, measured = compare(opened, devices, chosen, monkeypatch)
    assert (found.num_blocks > 1) == (chosen.block_bytes < x.nbytes)
    print(f"{case}, {devices}: planned {found.device_bytes}, measured {measured}")
    assert measured <= found.device_bytes <= (1.6 if devices == 1 else 2.5) * measured


def compare(opened, devices, chosen, monkeypatch):
    """(LayerPlan, bytes measured) of the only layer of a Collection."""
    (group,), mesh = opened.groups, placement.make_mesh(devices)
    (found,) = plan.of([group], mesh, chosen)
    watch = Watch(monkeypatch)
    layers.statistics(group, [(r.id, m) for r, m in zip(opened.refs, opened.models, strict=True)], mesh, chosen)
    return found, watch.most


@pytest.mark.slow
@pytest.mark.parametrize("devices, most", [(1, 1.6), (8, 2.0)])
def test_device_bytes_of_low_rank_updates(tmp_path, monkeypatch, devices, most):
    opened = jaxsub.open_collection(str(adapters(tmp_path, 40, 8, (400, 300))))
    found, measured = compare(opened, devices, layers.Options(), monkeypatch)
    print(f"lora, {devices}: planned {found.device_bytes}, measured {measured}")
    assert measured <= found.device_bytes <= most * measured


# Bounds -----------------------------------------------------------------------------------------------------------


def test_a_bound_on_device_memory_makes_the_blocks_smaller(tmp_path):
    folder = worlds.write(tmp_path / "c", {"w": worlds.noise(12, (256, 300))})
    (free,) = planned(folder, precision="float32")
    (tight,) = planned(folder, precision="float32", max_device_bytes=free.device_bytes * 2 // 3)
    assert free.num_blocks == 1 and tight.num_blocks > 1
    assert tight.device_bytes <= free.device_bytes * 2 // 3 and tight.bytes_read == free.bytes_read


def test_more_devices_hold_less_each(tmp_path):
    folder = worlds.write(tmp_path / "c", {"w": worlds.noise(12, (256, 256))})
    one, eight = (planned(folder, precision="float32", devices=n)[0] for n in (1, 8))
    assert eight.device_bytes < one.device_bytes


@pytest.mark.parametrize("option", ["max_device_bytes", "max_host_bytes"])
def test_a_bound_that_no_block_meets_names_the_worst_layer_and_reads_nothing(tmp_path, option, monkeypatch):
    stacks = {"small": worlds.noise(6, (4, 3)), "wide": worlds.noise(6, (3, 4000))}
    folder, workdir = worlds.write(tmp_path / "c", stacks), tmp_path / "out"
    monkeypatch.setattr(layers, "statistics", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(errors.ResourceError, match=rf"layer wide .*{option}") as caught:
        analyze.run(options(folder, **{option: 2**10}), str(workdir))
    assert caught.value.exit_code == 6 and not (workdir / "statistics").exists()


def test_what_devices_have_bounds_them_where_nothing_else_does(monkeypatch):
    class Device:
        platform, process_index = "gpu", 0

        def __init__(self, limit):
            self.limit = limit

        def memory_stats(self):
            return self.limit and {"bytes_limit": self.limit}

    class Mesh:
        devices = np.array([Device(7), Device(5)])

    assert plan.device_limit(Mesh) == 5 and plan.device_limit(placement.make_mesh(2)) == 0
    Mesh.devices = np.array([Device(None)])
    assert plan.device_limit(Mesh) == 0


@pytest.mark.slow
def test_bounds_and_the_trace_are_no_part_of_what_a_run_is(tmp_path):
    folder, workdir = worlds.write(tmp_path / "c", {"w": worlds.noise(12)}), str(tmp_path / "out")
    first = analyze.run(options(folder), workdir)
    again = analyze.run(options(folder, max_device_bytes=2**40, max_host_bytes=2**40, profile=True), workdir)
    assert again["provenance"]["bytes_read"] == 0 and again.layers == first.layers


# Disk -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("power", [1, 9])  # entries with tails so heavy that those of small layers are kept
def test_written_bytes_are_those_of_the_files(tmp_path, power):
    stacks = {"wide": worlds.noise(20, (60, 30)), "thin": worlds.noise(20, (900,)), "f": worlds.noise(20, (5, 4, 6))}
    stacks = {k: v.astype(np.float64 if k == "f" else np.float32) ** power for k, v in stacks.items()}
    worlds.write(tmp_path / "c", stacks)
    check_files(tmp_path / "c", tmp_path / "out", 0 if power > 1 else sum(2 * v.size for v in stacks.values()))


@pytest.mark.slow
def test_written_bytes_of_low_rank_updates(tmp_path):
    check_files(adapters(tmp_path / "c", 60), tmp_path / "out")


def check_files(folder, workdir, less=0):
    opened = jaxsub.open_collection(str(folder))
    session = sessions.Session(opened, options(folder), None, None)
    statistics, report = memory.written(session.plans(), len(opened.refs))
    text = analyze.run(options(folder, dry_run=True), str(workdir))
    assert f"to write: up to about {plan.size(statistics)} of statistics, about {plan.size(report)} of report" in text
    assert "nothing without --workdir" in analyze.run(options(folder, dry_run=True))
    assert not workdir.exists()
    analyze.run(options(folder), str(workdir))
    again = analyze.run(options(folder, dry_run=True), str(workdir))
    assert "whose statistics in the workdir still hold" in again and "whose statistics" not in text
    found = sum(f.stat().st_size for f in (workdir / "statistics").iterdir())
    assert found == pytest.approx(statistics - less, rel=0.1) and found <= statistics
    assert 0.4 < sum((workdir / f"report.{end}").stat().st_size for end in ("json", "html")) / report < 2


# Time -------------------------------------------------------------------------------------------------------------

RATES = estimate.Rates(read=1e9, product=1e11, eigen=1e-9, sampled=1000)


def estimated(folder, rates=RATES, **given):
    session = sessions.Session(jaxsub.open_collection(str(folder)), options(folder), None, None)
    given = {"nulls": ("permutation", "gaussian"), "draws": 8} | given
    return estimate.seconds(session.plans(), session.groups(), rates, session.options, **given)


def test_the_estimate_follows_bytes_rates_products_and_draws(tmp_path):
    x = worlds.noise(12, (130, 200))
    once = estimated(worlds.write(tmp_path / "a", {"a": x}))
    twice = estimated(worlds.write(tmp_path / "b", {"a": x, "b": x}))
    assert once.read == pytest.approx(x.nbytes / 1e9) and twice.read == pytest.approx(2 * once.read)
    assert twice.total == pytest.approx(2 * once.total)
    assert once.total == pytest.approx(max(once.read, once.compute) + once.figures)
    slow = dataclasses.replace(RATES, read=1e3)
    assert estimated(tmp_path / "a", slow).total > 1e3 and estimated(tmp_path / "a", slow).compute == once.compute
    session = sessions.Session(jaxsub.open_collection(str(tmp_path / "a")), options(tmp_path / "a"), None, None)
    (layer,) = [dataclasses.replace(p, own_bytes=p.own_bytes // 4) for p in session.plans()]
    quarter = estimate.seconds([layer], session.groups(), RATES, session.options, nulls=(), draws=8)
    assert quarter.read == pytest.approx(once.read / 4)
    assert estimated(tmp_path / "a", draws=4).figures == pytest.approx(once.figures / 2)
    assert estimated(tmp_path / "a", nulls=()).figures == 0
    slow = dataclasses.replace(RATES, product=1e7)
    assert estimated(tmp_path / "a", slow).compute > 100 * (once.compute - estimate.LAYER_SECONDS)
    assert estimated(tmp_path / "a", dataclasses.replace(RATES, read=0.0)).read == 0  # not known


def test_operations_count_the_products_of_a_layer(tmp_path):
    (found,), chosen = planned(worlds.write(tmp_path / "c", {"w": worlds.noise(12, (300,))})), layers.Options()
    (group,) = jaxsub.open_collection(str(tmp_path / "c")).groups
    assert estimate.operations(found, group, chosen) == 2 * (2 * 12**2 * 300)  # float64 counts twice


def test_the_measurement_is_short_and_reads_no_weight_whole(tmp_path, monkeypatch):
    folder = worlds.write(tmp_path / "c", {"w": worlds.noise(100, (200, 100)), "v": worlds.noise(100, (2,))})
    opened, read = jaxsub.open_collection(str(folder)), []
    sizes = {t.extent: t.num_bytes for group in opened.groups for t in group.entries}
    into = estimate.formats.read_into

    def read_into(extent, start, view):
        read.append((extent, view.nbytes))
        into(extent, start, view)

    monkeypatch.setattr(estimate.formats, "read_into", read_into)
    estimate.measure(opened.groups, opened.models, placement.make_mesh(1))  # compiles
    read.clear()
    started = time.perf_counter()
    rates = estimate.measure(opened.groups, opened.models, placement.make_mesh(1))
    assert time.perf_counter() - started < 2  # a fifth of a second on an idle machine
    assert rates.sampled == sum(n for _, n in read) > 0
    assert all(n <= sizes[extent] // 2 for extent, n in read)
    assert 1e5 < rates.read < 1e12 and 1e7 < rates.product < 1e17 and 1e-13 < rates.eigen < 1e-5
    changed = next(iter(folder.iterdir()))
    changed.write_bytes(b"")  # found by the run, not by the measurement
    assert estimate.measure(opened.groups, opened.models, placement.make_mesh(1)).product > 0


# What is said -----------------------------------------------------------------------------------------------------


def test_the_plan_stands_before_the_first_weight_is_read(tmp_path, monkeypatch):
    folder, stream = worlds.write(tmp_path / "c", {f"l{n}": worlds.noise(9, (6,)) for n in range(23)}), io.StringIO()
    session = sessions.Session(jaxsub.open_collection(str(folder)), options(folder), None, stream)
    monkeypatch.setattr(sessions.Session, "layer", lambda *_: pytest.fail(stream.getvalue()))
    with pytest.raises(pytest.fail.Exception) as caught:
        session.run()
    said = str(caught.value)
    assert all(len(line) <= 100 for line in said.splitlines())
    assert "to read: 4.9 KiB" in said and "time, about " in said and "no weight whole" in said
    assert "... and 3 more, which --dry_run lists" in said and "l22" not in said
    assert said.count("on CPU a part of the host's") == 1 and "nothing without --workdir" in said
    whole = analyze.run(options(folder, dry_run=True))
    assert "l22" in whole and "more, which" not in whole


def test_every_process_has_its_share_of_the_reading():
    assert plan.to_read(2**20) == "to read: 1.0 MiB"
    assert plan.to_read(2**20, 2**18, 4) == "to read: 1.0 MiB, 256.0 KiB by each of 4 processes"


def test_sizes_rates_and_times_are_for_people():
    shown = [plan.duration(s) for s in (0.01, 0.31, 9.96, 99, 240, 9000)]
    assert shown == ["under 0.1 s", "0.3 s", "10 s", "99 s", "4 min", "2.5 h"]
    assert [plan.rate(r) for r in (1.25e9, 2e6)] == ["1.25 GB/s", "2.00 MB/s"]


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux' high-water mark")
def test_the_peak_is_that_of_this_process():
    held = np.ones(2**24)  # 128 MiB
    peak = plan.peak_resident()
    del held  # a peak stays
    kib = int(re.search(r"VmHWM:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])
    assert peak > 2**27 and kib * 1024 == pytest.approx(peak, rel=0.02)


def test_blocks_are_sketched_beside_the_next_on_one_device_and_of_many_models_alone():
    def beside(count, devices):
        plan = types.SimpleNamespace(dtype="float32", storage="float32", num_models=count)
        return layers.sketches_beside(plan, types.SimpleNamespace(size=devices))

    assert beside(256, 1) and not beside(256, 2) and not beside(8, 1)
