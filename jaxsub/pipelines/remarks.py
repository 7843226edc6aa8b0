"""What qualifies a layer's figures: flags, and warnings in words."""

import numpy as np

from jaxsub import verdict
from jaxsub.report import words

HALF = 0.5  # of the centred energy in one model, over which the others hardly count


def flags(layer, saturated, above, nulls, held_out, k):
    """Flags of a `figures` layer: what its verdict should not be read without; see `words.FLAGS`.

    Args:
        layer: `figures._Layer`.
        saturated: whether its spectrum is cut before it could be read.
        above: energies of components above the floor.
        nulls: figures of its null models.
        held_out: LOO(k), k as text.
        k: the deciding rank, or None.
    """
    found = []
    cap = min(layer.num_models - 1, layer.num_features)
    if layer.constant:
        found.append("identical")
    if saturated:
        found.append("saturated")
    if not layer.constant and len(above) < cap:
        found.append("rank_deficient")
    if layer.one_lineage:
        found.append("one_lineage")
    if layer.is_own:
        found.append("own_lineages")
    if layer.stats.is_heavy():
        found.append("heavy_tails")
    if largest(layer)[1] > HALF:
        found.append("one_model")
    shuffle = nulls.get("shuffle")
    if k and shuffle and held_out.get(str(k)) is not None:
        key = str(k)
        hardest = verdict.Gain(1 - held_out[key], 1 - shuffle["held_out"][key], shuffle["held_out_sd"][key], "")
        overall = verdict.gain(held_out, nulls, k)
        if overall and overall.beats and not hardest.beats:
            found.append("coordinate_spread")
    return found


def largest(layer):
    """(model that holds most of the energy about the mean, its share of it)."""
    if layer.constant or layer.num_models < 4:
        return 0, 0.0
    first = int(np.diag(layer.gram).argmax())
    return first, float(layer.gram[first, first]) / layer.total


def warnings(layer, nulls):
    """What the user should know of a `figures` layer, in sentences; arguments as in `flags`."""
    found = []
    first, share = largest(layer)
    if share > HALF:
        found.append(
            f"{layer.stats.model_ids[first]!r} holds {share:.0%} of the energy about the mean: figures are of it "
            "more than of the others; analyse them without it"
        )
    fewest = min((null["draws"] for null in nulls.values()), default=verdict.FEWEST_DRAWS)
    if fewest < verdict.FEWEST_DRAWS:
        found.append(f"nulls have {fewest} draws: no verdict should rest on a standard deviation of so few")
    zero = layer.stats.zero()
    small = "too small beside the others to be told from rounding"
    for what, which in (("zero in this layer", zero), (small, layer.stats.lost() & ~zero)):
        if which.any() and not zero.all():
            first = layer.stats.model_ids[int(which.argmax())]
            found.append(f"{words.plural(which.sum(), 'model')} {what}, {first!r} among them")
    spread = nulls.get("permutation", {}).get("spread", 1.0)
    if spread > 1:
        found.append(
            f"few entries carry much of a model: null draws were taken to vary {spread:.2g} times as much as drawn"
        )
    if layer.stats.storage == "float64":
        found.append("weights are float64; all products were made in float64")
    if layer.stats.exponent and not layer.constant:
        found.append(f"weights were scaled by 2**{-layer.stats.exponent} before any product; figures are unscaled")
    return found
