"""scripts/weak_scaling.py: its arithmetic, against numbers worked out by hand."""

import importlib.util
import pathlib
import sys

import pytest

PATH = pathlib.Path(__file__).resolve().parents[2] / "scripts" / "weak_scaling.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("weak_scaling", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["weak_scaling"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["weak_scaling"]


@pytest.fixture
def plain(script):
    """1 TFLOP/s, 100 GB/s of memory, 1 GB/s of disk, 4 devices a host; near 10 GB/s, 1 us; far 1 GB/s, 10 us."""
    return script.Machine(1e12, 100e9, 1e9, 4, ((4, 10e9, 1e-6), (0, 1e9, 1e-5)))


def test_an_all_reduce_is_a_ring_in_a_ring(script, plain):
    def seconds(devices):
        return script.exchange_seconds([("all-reduce", 8e6)], devices, plain)

    assert seconds(1) == 0
    assert seconds(2) == pytest.approx(8e6 / 10e9 + 2e-6)  # 2 (1/2) b, 2 steps
    assert seconds(4) == pytest.approx(12e6 / 10e9 + 6e-6)  # 2 (3/4) b, 6 steps
    # Beyond a host a quarter of b goes round 3 hosts: 2 (2/3) b / 4 and 4 steps.
    assert seconds(12) == pytest.approx(12e6 / 10e9 + 6e-6 + (8e6 / 3) / 1e9 + 4e-5)


def test_what_leaves_a_device_over_links_of_one_kind_is_what_bench_counts(script):
    from jaxsub.linalg import collectives

    machine = script.Machine(1, 1, 1, 8, ((0, 1.0, 0.0),))
    exchanged = [("all-reduce", 1600), ("all-to-all", 800)]
    assert script.exchange_seconds(exchanged, 8, machine) == collectives.sent(exchanged, 8) == 2800 + 700


def test_an_all_to_all_sends_a_far_share_over_far_links(script, plain):
    found = script.exchange_seconds([("all-to-all", 8e6)], 8, plain)
    assert found == pytest.approx(3e6 / 10e9 + 3e-6 + 4e6 / 1e9 + 1e-5)  # 3/8 near in 3 steps, 4/8 far in 1


def test_a_gram_matrix_by_hand(script, plain):
    """10 models, 10^6 weights a device, 2 devices: 10^8 operations, 40 MB moved and read, 133 float64 exchanged."""
    found = script.gram(plain, 2, 10, 10**6)
    assert (found.arithmetic, found.memory, found.disk) == pytest.approx((1e-4, 4e-4, 0.04))
    assert found.exchange == pytest.approx(133 * 8 / 10e9 + 2e-6)  # 80 MB a host: one block
    assert found.total == pytest.approx(0.04 + found.exchange)
    four = script.gram(plain, 2, 10, 10**6, block_bytes=20 * 10**6)
    assert four.exchange == pytest.approx(4 * found.exchange)
    layers = script.gram(plain, 2, 10, 10**6, layers=7)
    assert layers.exchange == pytest.approx(7 * found.exchange)
    held = script.gram(plain, 2, 10, 10**6, resident=True)
    assert held.disk == 0 and held.total == pytest.approx(4e-4 + found.exchange)


def test_a_randomized_svd_by_hand(script, plain):
    """l = 48, 4 passes of 100 x 10^6 a device: 3.84e10 operations, 1.6 GB; 2 of (N, l), 4 of (l, l), energy, signs."""
    found = script.svd(plain, 4, 100, 10**6)
    assert (found.arithmetic, found.memory, found.disk) == pytest.approx((3.84e-2, 1.6e-2, 0.4))
    num_bytes = 2 * 4 * 100 * 48 + 4 * 8 * 48**2 + 8 + 2 * 4 * 32
    assert found.exchange == pytest.approx(1.5 * num_bytes / 10e9 + 7 * 6e-6)  # 7 all-reduces of 6 steps


def test_mode_grams_keep_no_more_devices_busy_than_there_are_models(script, plain):
    """Weights of 1000 rows of 1024 a device: beyond N devices the busiest has one model, longer with every device."""
    one = script.mode(plain, 1, 8, 1024 * 1000, resident=True)
    eight = script.mode(plain, 8, 8, 1024 * 1000, resident=True)
    many = script.mode(plain, 32, 8, 1024 * 1000, resident=True)
    assert one.arithmetic == eight.arithmetic == pytest.approx(2 * 1024 * 8 * 1.024e6 / 1e12)
    assert many.arithmetic == pytest.approx(4 * eight.arithmetic)
    # Each of 8 devices deals its share of all models, 8 x 4 bytes x 1.024e6, once; then 1024^2 float64 are added up.
    dealt, summed = 32.768e6, 8 * 1024**2
    assert eight.exchange == pytest.approx(
        dealt * 3 / 8 / 10e9 + 3e-6 + dealt / 2 / 1e9 + 1e-5
        + 1.5 * summed / 10e9 + 6e-6 + summed / 4 / 1e9 + 2e-5
    )  # fmt: skip


def test_800_gigabytes_take_as_long_as_their_reading(script):
    _, found = script.table(script.MACHINES["h100"], [8, 64, 512], 2**22)
    one, share = found[script.LARGE, 1]
    assert one.disk == 800e9 / 5e9 == 160 and one.total == 160 and share == 1
    for devices in (8, 64):
        cost, share = found[script.LARGE, devices]
        assert cost.disk == pytest.approx(160 / devices)
        assert cost.disk < cost.total < 1.05 * cost.disk and share == pytest.approx(160 / devices / cost.total)
    # At 512 devices the tensors are smaller than a block: one exchange each, 14 near steps and 126 far ones.
    assert found[script.LARGE, 512][0].exchange == pytest.approx(291 * (14 * 1.9e-6 + 126 * 4e-6), rel=0.01)


@pytest.mark.parametrize("resident", [False, True])
def test_efficiency_of_a_gram_matrix_is_one_devices_time_over_that_of_many(script, resident):
    lines, found = script.table(script.MACHINES["v5e"], [8, 512], 2**22, resident=resident)
    one, many = found["Gram, N = 500", 1][0], found["Gram, N = 500", 512]
    assert many[1] == one.total / many[0].total and 0.9 < many[1] < 1
    assert max(map(len, lines)) <= 100 and len(lines) == 1 + 3 * 6


def test_the_command_takes_a_machine_of_ones_own(script, capsys):
    own = ["--devices", "2", "--features=1000", "--flops=1e9", "--disk=1e6", "--link=0:1e9:1e-3"]
    script.main(own)
    lines = capsys.readouterr().out.splitlines()
    # 50 x 1000 float32 at 1 MB/s; two steps of a millisecond.
    assert lines[2].split()[4:] == ["2", "0.0025", "5.97e-08", "0.2", "0.00202", "0.202", "99%"]
    with pytest.raises(SystemExit):
        script.main([*own, "--link=8:1e9:0"])
    assert "the last --link" in capsys.readouterr().err
