"""Pairs of models dealt to devices: each pair once, every device as much, and few models on each."""

import numpy as np
import pytest

from jaxsub.linalg import pairs

CASES = [
    (500, 1, 1),
    (50, 2, 2),
    (3, 4, 1),
    (50, 5, 5),
    (70, 7, 1),
    (512, 8, 8),
    (512, 8, 2),
    (90, 12, 4),
    (300, 64, 8),
]


@pytest.mark.parametrize("num_models, devices, together", CASES)
def test_every_pair_is_computed_from_models_that_its_device_holds(num_models, devices, together):
    deal = pairs.Deal.create(num_models, 16, devices, together)
    table, times = deal.table(), np.zeros((deal.padded, deal.padded), int)
    assert table.shape[0] == devices and table.max() + deal.size <= deal.held and deal.padded >= num_models
    for device in range(devices):
        held = deal.models(device)
        assert len(held) == deal.held and (held[: deal.own] == np.arange(deal.own) + device * deal.own).all()
        for p, q in table[device]:
            times[np.ix_(held[p : p + deal.size], held[q : q + deal.size])] += 1
    assert (times + times.T).min() >= 1
    if devices > 1 and deal.blocks > 1:  # blocks of one group, begun early on one device, overlap
        assert np.maximum(times, times.T).max() == 1


@pytest.mark.parametrize("num_models, devices, together", CASES)
def test_blocks_come_together_as_the_matrix_they_are_of(num_models, devices, together):
    deal = pairs.Deal.create(num_models, 16, devices, together)
    whole = np.random.default_rng(0).standard_normal((deal.padded, deal.padded))
    whole += whole.T
    places = [(deal.models(d), p, q) for d, rows in enumerate(deal.table()) for p, q in rows]
    blocks = np.stack([whole[np.ix_(m[p : p + deal.size], m[q : q + deal.size])] for m, p, q in places])
    np.testing.assert_array_equal(deal.assemble(blocks), whole[:num_models, :num_models])


@pytest.mark.parametrize("devices", range(2, 41))
def test_devices_hold_few_models(devices):
    """The least that any scheme needs is a root: m (m - 1) distances of m groups."""
    cover = pairs.Deal.create(1000, 16, devices).cover
    assert cover[0] == 0 and {(b - a) % devices for a in cover for b in cover} == {*range(devices)}
    least = next(m for m in range(1, devices + 1) if m * (m - 1) + 1 >= devices)
    assert least <= len(cover) <= 1.5 * least + 1


def test_work_is_shared_evenly_and_nearly_half_of_all_pairs():
    for devices in (1, 2, 4, 8, 64):
        deal = pairs.Deal.create(512, 16, devices)
        done = devices * deal.table().shape[1] * deal.size**2
        assert 512**2 / 2 < done <= 1.1 * 512**2 / 2


@pytest.mark.parametrize("num_models", [50, 100, 512])
@pytest.mark.parametrize("devices", [2, 4, 8, 64])
def test_blocks_that_processes_exchange_are_under_the_square_of_models(num_models, devices):
    """Of one matrix of pairs, whatever the width of the updates; devices of one process send nothing at all."""
    deal = pairs.Deal.create(num_models, 16, devices, 1)
    assert devices * deal.table().shape[1] * deal.size**2 <= num_models**2


@pytest.mark.parametrize(
    "num_models, devices, together, share",
    [(512, 2, 1, 1.0), (512, 4, 1, 0.75), (512, 8, 1, 0.5), (512, 64, 8, 0.5), (512, 8, 8, 1.0), (10, 4, 1, 0.8)],
)
def test_what_a_process_reads(num_models, devices, together, share):
    deal = pairs.Deal.create(num_models, 16, devices, together)
    assert deal.share == pytest.approx(share, abs=0.1)
    read = [deal.read_by(range(d, d + together)) for d in range(0, devices, together)]
    assert np.unique(np.concatenate(read))[num_models - 1] == num_models - 1


def test_small_collections_are_not_padded_to_blocks_of_the_cache():
    assert pairs.Deal.create(50, 16).size == 25 and pairs.Deal.create(50, 16, 8).padded <= 64
    assert pairs.Deal.create(3, 16, 8).padded == 8 and pairs.Deal.create(3, 1000, size=2).size == 2
