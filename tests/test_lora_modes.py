"""Weight axes of low-rank updates on many devices: the energies of one, and nothing gathered between devices."""

import jax
import numpy as np
import pytest

from jaxsub import placement
from jaxsub.linalg import pairs
from jaxsub.pipelines import layers, lora
from tests.linalg.compiled import collective_bytes
from tests.linalg.matrices import deal_factors
from tests.linalg.test_modes import kinds
from tests.selected import first

# models, rank, sizes of a side's weight axes: few rows and a wide axis, many and a narrow one; and convolutions
SIDES = [(3, 2, (50,)), (9, 3, (20,)), (5, 2, (6, 3, 3)), (3, 1, (40, 2))]


def sides(case, devices):
    """Factors dealt to a mesh as in `gram.lora_gram`, roots (N, r, r) dealt, rows that there are, and the mesh."""
    count, rank, sizes = case
    rng, mesh = np.random.default_rng(0), placement.make_mesh(devices)
    x = rng.standard_normal((count, rank, int(np.prod(sizes)))).astype(np.float32)
    dealt = pairs.Deal.create(count, rank, devices)
    roots = np.zeros((dealt.padded, rank, rank))
    roots[:count] = rng.standard_normal((count, rank, rank))
    with jax.enable_x64(True):
        return deal_factors(x, dealt, mesh), placement.put(roots, roots.shape, mesh, axis=0), count * rank, mesh


def unfoldings(case):
    """Rows of each axis, (num, size), by NumPy."""
    x, roots, _, _ = sides(case, 1)
    rows = np.einsum("nrs,nsw->nrw", roots, np.asarray(x, np.float64))
    rows = rows.reshape(-1, *case[2])
    return [np.moveaxis(rows, 1 + axis, -1).reshape(-1, size) for axis, size in enumerate(case[2])]


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 3, 8])
@pytest.mark.parametrize("case", SIDES)
@pytest.mark.parametrize("is_exact", [True, False])
def test_energies_do_not_depend_on_the_mesh(case, devices, is_exact):
    x, roots, count, mesh = sides(case, devices)
    options = layers.Options() if is_exact else layers.Options(mode_work=0)
    with jax.enable_x64(True):
        found = lora._modes(x, roots, count, case[2], 1, options, layers.layer_key("w", 0), mesh)
        one = lora._modes(*sides(case, 1)[:3], case[2], 1, options, layers.layer_key("w", 0), sides(case, 1)[3])
    for mode, same, rows in zip(found, one, unfoldings(case), strict=True):
        wanted = np.square(np.linalg.svd(rows, compute_uv=False))
        assert mode.total == pytest.approx(wanted.sum(), rel=1e-6) and mode.size == rows.shape[1]
        if is_exact:
            np.testing.assert_allclose(mode.values, wanted, atol=1e-6 * wanted[0])
        else:
            np.testing.assert_allclose(mode.values, same.values, atol=1e-5 * same.values.max())


# models, rank, sizes, and whether an axis' entries are dealt out: widths and rows that fill eight devices
SENT = [
    ((8, 2, (64,)), (1,)),
    ((48, 2, (64,)), (0,)),
    ((8, 2, (16, 2, 2)), (0, 0, 0)),
    ((8, 1, (64, 2)), (1, 0)),
]


@pytest.mark.parametrize(("case", "times"), first(SENT))
def test_what_devices_send_each_other(case, times):
    """The smaller Gram matrix, and where the axis is the longer side their share of the rows once: never a gather."""
    x, roots, count, mesh = sides(case, 8)
    with jax.enable_x64(True):
        text = lora._weighted_rows.lower(roots, x, mesh).compile().as_text()
        assert kinds(text) == {"all-reduce"} and collective_bytes(text) == 8
        rows, _ = lora._weighted_rows(roots, x, mesh)
        for position, (size, shares) in enumerate(zip(case[2], times, strict=True)):
            text = lora._row_energies.lower(rows, count, case[2], position, mesh).compile().as_text()
            assert kinds(text) == ({"all-reduce", "all-to-all"} if shares else {"all-reduce"})
            side = min(size, rows.size // size)
            assert collective_bytes(text) == shares * 4 * rows.size // 8 + 8 * side**2
