"""Lineages of a collection and of single layers, on worlds of known descent with more than one layer."""

import numpy as np
import pytest

from jaxsub.pipelines import figures, kinship
from tests.test_figures import statistics

N, BIG, SMALL = 40, (64, 96), (24, 30)


def verdicts(**layers):
    """name -> record of each layer, and the Kinship of all, as `analyze` makes them."""
    stats = [statistics(x.astype(np.float32), name) for name, x in layers.items()]
    kin = kinship.find(stats, [f"m{n}" for n in range(N)], 0.15)
    groups = [[int(m[1:]) for m in g] for g in kin.lineages]
    found = {}
    for one in stats:
        lineages, is_own = kinship.of_layer(one, groups, 0.15)
        found[one.name] = figures.layer(one, lineages, figures.Options(splits=2), is_own)
    return found, kin


def noise(rng, shape=BIG):
    return rng.standard_normal((N, *shape))


def families(rng, label, shape=SMALL):
    """Models about a start for each label; those of label -1 have none."""
    label = np.asarray(label)
    starts = rng.standard_normal((label.max() + 2, *shape))
    starts[-1] = 0
    return starts[label] + 0.7 * noise(rng, shape)


FOUR = np.arange(N) % 4


@pytest.mark.parametrize("beside", ["unrelated", "frozen"])
def test_families_of_a_small_layer_show_beside_a_large_one(beside):
    rng = np.random.default_rng(0)
    big = noise(rng) if beside == "unrelated" else np.repeat(noise(rng)[:1], N, axis=0)
    found, kin = verdicts(big=big, small=families(rng, FOUR))
    assert [len(g) for g in kin.lineages] == ([] if beside == "unrelated" else [N])
    small = found["small"]
    assert small["verdict"] == "lineage" and small["lineages"] == 4, small["why"]
    assert "that this layer alone shows" in small["why"] and small["flags"] == ["own_lineages"]
    assert sorted(small["own_lineages"]) == sorted([f"m{n}" for n in np.flatnonzero(FOUR == f)] for f in range(4))
    assert found["big"]["own_lineages"] is None and "own_lineages" not in found["big"]["flags"]


def test_families_that_cross_those_of_all_layers():
    rng = np.random.default_rng(0)
    found, kin = verdicts(big=families(rng, np.arange(N) // 20, BIG), small=families(rng, FOUR))
    assert [len(g) for g in kin.lineages] == [20, 20]
    assert found["big"]["verdict"] == "lineage" and found["big"]["own_lineages"] is None
    assert found["small"]["verdict"] == "lineage" and len(found["small"]["own_lineages"]) == 4


def test_a_layer_that_shows_less_keeps_the_lineages_of_all():
    """Of a family's models one stands alone in the small layer: what all layers say explains as much."""
    rng = np.random.default_rng(0)
    small = families(rng, FOUR)
    small[0] = noise(rng, SMALL)[0]
    found, kin = verdicts(big=families(rng, FOUR, BIG), small=small)
    assert [len(g) for g in kin.lineages] == [10] * 4
    assert found["small"]["own_lineages"] is None and found["small"]["lineages"] == 4


@pytest.mark.parametrize("kind", ["three directions", "one direction", "one start"])
def test_a_shared_subspace_or_start_of_one_layer_is_no_family(kind):
    rng = np.random.default_rng(0)
    if kind == "one start":
        small = families(rng, np.zeros(N, int))
    else:
        count = 3 if kind == "three directions" else 1
        share = rng.standard_normal((N, count)) @ rng.standard_normal((count, SMALL[0] * SMALL[1]))
        small = share.reshape(N, *SMALL) + 0.02 * noise(rng, SMALL)
    found, kin = verdicts(big=noise(rng), small=small)
    assert kin.lineages == [] and found["small"]["own_lineages"] is None
    assert found["small"]["verdict"] == ("common_mean" if kind == "one start" else "shared")


def test_positive_weights_are_no_lineage():
    rng = np.random.default_rng(0)
    found, kin = verdicts(big=np.abs(noise(rng)), small=np.abs(noise(rng, SMALL)))
    assert kin.lineages == [] and {f["verdict"] for f in found.values()} == {"chance"}


def test_copies_are_told_by_plain_cosines_where_a_constant_holds_most():
    """Scales about one beside a little matrix: copies agree in both."""
    rng = np.random.default_rng(0)
    scales, small = 1 + 1e-3 * noise(rng, (4000,)), 0.05 * noise(rng, SMALL)
    small[1], scales[1] = small[0] + 1e-4 * noise(rng, SMALL)[0], scales[0]
    _, kin = verdicts(scales=scales, small=small)
    assert kin.near_copies[0][:2] == ("m0", "m1")
    assert kin.lineages == [["m0", "m1"]]
