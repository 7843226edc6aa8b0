"""Whether merging can work, before it is done: one read of the models, layer by layer.

    kin        do they share a start?                      else no merge of weights is a model
    norms      of the updates                              one that is far larger decides alone
    cosines    between updates                             near 0: the mean shrinks each to 1 / N
    against    share of the magnitude that goes against the sum, beside (1 - 1 / sqrt(N)) / 2 of unrelated updates
    overlap    of leading input directions, beside chance  at chance: updates keep apart, sums interfere little
    ranks      effective ranks: of each update, of all together, of their mean: what the mean has to hold

Effective ranks are participation ratios, (sum s^2)^2 / sum s^4, found with random vectors: right to a few percent.
"""

import functools
import math
import textwrap

import jax
import jax.numpy as jnp
import numpy as np

from jaxsub import lineage, placement
from jaxsub.linalg import gram as grams, products
from jaxsub.pipelines import layers as layer_loop, merge_kin, progress
from jaxsub.report import words

PROBES = 48  # random vectors that effective ranks and leading directions are found with
LEADING = 8  # directions of each update that are compared
SHOWN = 30  # layers in the table
LARGE = 5.0  # ratio of the norms of two updates that is told


def run(found, sources, config, plan_text, stream=None, *, unfit=""):
    """dict: "layers", "kinship", "said", and "text" for the terminal.

    Args:
        found: merge_layers.Lineup.
        sources: merge_rows.Sources.
        config: of the merge.
        plan_text: of the plan.
        stream: of progress, or None.
        unfit: why the method cannot merge these models, or "".

    Raises:
        NonFiniteError: naming the first model with a NaN or an Inf.
    """
    kin, reason = merge_kin.look(found, sources)
    records, total = [], sum(layer.group.num_bytes for layer in found.layers)
    with progress.Progress(total, len(found.layers), stream=stream) as bar, jax.enable_x64(True):
        for layer in found.layers:
            records.append(of_layer(sources.of(layer), layer_loop.layer_key(layer.name, config.seed)))
            bar.layer(layer.name, layer.group.num_bytes, f"N={len(layer.group.members)}")
    alien = f"{reason}: {merge_kin.ALIGN}" if reason else ""
    said = [*found.said, *kin.said, *(one for one in (unfit, alien) if one), *sentences(records)]
    return {
        "models": [ref.id for ref in sources.opened.refs],
        "quarantined": [dict(q) for q in sources.opened.quarantined],
        "kinship": kin.figures,
        "layers": records,
        "said": said,
        "can_work": not (reason or unfit),
        "text": "\n".join([plan_text, "", table(records), *(textwrap.fill(one, 100) for one in said)]),
    }


@jax.jit
def _against(x):
    """(sum of |x|, sum over columns of |sum over models|) of x (N, W), float64."""
    return jnp.sum(jnp.abs(x), dtype=jnp.float64), jnp.sum(jnp.abs(jnp.sum(x, axis=0)), dtype=jnp.float64)


def of_layer(rows, key):
    """What is found of one layer's Rows, numbers only."""
    count, gram, sums = rows.num_models, np.zeros((rows.num_models,) * 2), np.zeros(2)
    mesh, nothing = placement.make_mesh(1, is_local=True), np.zeros((0, count), np.float32)
    is_lora = rows.factors() is not None
    if is_lora:
        gram = rows.gram()
    for block in rows.blocks():
        x = jax.device_put(block.x)
        if not is_lora:
            one = jax.device_get(grams.dense_gram(x, nothing, mesh=mesh, dtype="float32")[0])
            gram += one.gram + one.cross[:, None] + one.cross + one.mean_square
        sums += np.array(jax.device_get(_against(x)))
    norms, cosines = np.sqrt(np.maximum(np.diag(gram), 0.0)), lineage.cosines(gram)
    pairs = cosines[np.triu_indices(count, 1)]
    found = {
        "name": rows.name,
        "shape": list(rows.shape),
        "is_update": bool(rows.is_update),
        "norm_min": float(norms.min()),
        "norm_max": float(norms.max()),
        "cosine": float(np.mean(pairs)) if len(pairs) else None,
    }
    if rows.is_update and count > 1:
        found["against"] = float((1 - sums[1] / sums[0]) / 2) if sums[0] > 0 else 0.0
        found["against_chance"] = (1 - 1 / math.sqrt(count)) / 2
        if rows.is_matrix and min(rows.shape) > 1:
            found |= _shared(rows, key)
    if is_lora and count > 1:
        found |= _cut(rows)
    return found


def _shared(rows, key):
    """Overlap of leading input directions and effective ranks of updates that are matrices."""
    probes = jax.random.normal(key, (rows.shape[1], PROBES), jnp.float32)
    number = max(1, min(LEADING, min(rows.shape) // 4))
    each, leading, whole, total, images = [], [], 0.0, 0.0, 0.0
    for n in range(rows.num_models):
        square, fourth, back, image, directions = _probe(rows.matrix(n), probes, number=number)
        each.append((float(square), float(fourth)))
        leading.append(directions)
        whole, images = whole + back, images + image
        total = total + rows.matrix(n)
    squares = np.array([square for square, _ in each])
    ranks = [square**2 / fourth for square, fourth in each if fourth > 0]
    mean = _probe(total, probes, number=number)
    overlaps = [_overlap(leading[i], leading[j]) for i in range(len(leading)) for j in range(i)]
    stacked = float(jnp.sum(jnp.square(whole.astype(jnp.float64)))) / PROBES
    return {
        "overlap": float(np.mean(overlaps)),
        "overlap_chance": number / rows.shape[1],
        "rank_each": float(np.mean(ranks)) if ranks else 0.0,
        "rank_together": float(squares.sum() ** 2 / stacked) if stacked > 0 else 0.0,
        "rank_of_mean": float(mean[0]) ** 2 / float(mean[1]) if mean[1] > 0 else 0.0,
    }


@functools.partial(jax.jit, static_argnames="number")
def _probe(w, probes, *, number):
    """(|W|^2, |W.T W|^2, W.T W P, W P, leading input directions (i, number)) of a matrix, with probes P."""
    probes = probes.astype(w.dtype)
    image = products.matmul(w, probes)
    back = products.matmul(w.T, image)
    wide = functools.partial(jnp.sum, dtype=jnp.float64)
    again = products.matmul(w.T, products.matmul(w, jnp.linalg.qr(back)[0]))
    leading = jnp.linalg.svd(again, full_matrices=False)[0][:, :number]
    return wide(jnp.square(w)), wide(jnp.square(back)) / probes.shape[1], back, image, leading


@jax.jit
def _overlap(a, b):
    """Mean squared cosine of two orthonormal bases of columns."""
    return jnp.sum(jnp.square(products.matmul(a.T, b))) / a.shape[1]


def _cut(rows):
    """What the mean of low-rank updates loses at the rank that one of them has."""
    most = int(rows.ranks.max())
    before = rows.cut
    rows.cut = type(before)(rank=max(most, 1))
    result = rows.combination(np.full(rows.num_models, 1 / rows.num_models))
    rows.cut = before
    return {"rank_of_one": most, "mean_at_that_rank_loses": result.error}


def sentences(records):
    """What the figures mean, for people."""
    said, updates = [], [r for r in records if "against" in r]
    if not updates:
        if records and any(len(r["shape"]) > 1 for r in records):
            said.append("rows are weights: with --base=MODEL their updates are compared, which says more")
        return said
    cosine = np.median([r["cosine"] for r in updates])
    against, chance = (np.median([r[k] for r in updates]) for k in ("against", "against_chance"))
    if cosine < 0.1:
        said.append(
            f"updates are nearly unrelated (median cosine {cosine:.2f}): the mean keeps 1/N of each; sums keep more "
            "(task_arithmetic, ties, tsv, iso_c)"
        )
    how = "more than" if against > 1.1 * chance else "less than" if against < 0.9 * chance else "about as much as"
    said.append(
        f"sign conflicts: {against:.2f} of the magnitude goes against the sum, {how} {chance:.2f} of unrelated ones"
    )
    matrices = [r for r in updates if "overlap" in r]
    if matrices:
        ratio = np.median([r["overlap"] / r["overlap_chance"] for r in matrices])
        how = "share leading directions" if ratio > 3 else "keep to directions of their own"
        said.append(f"updates {how}: overlap {ratio:.1f} times chance in the median layer")
        share = np.median([r["rank_of_mean"] / max(r["rank_together"], 1e-9) for r in matrices])
        said.append(f"the mean has {share:.2f} of the effective rank that the updates span together (median)")
    large = max((r["norm_max"] / r["norm_min"] for r in updates if r["norm_min"] > 0), default=1.0)
    if large > LARGE:
        said.append(
            f"norms of updates differ by a factor of up to {large:.0f}: the largest decides sums; give --weights"
        )
    lost = [r["mean_at_that_rank_loses"] for r in records if "mean_at_that_rank_loses" in r]
    if lost:
        said.append(
            f"the mean at the rank of one adapter loses {np.median(lost):.2f} of its norm (median); --rank= sets it"
        )
    return said


def table(records):
    """The layers' figures as text of at most 100 columns."""
    head = f"{'layer':28} {'shape':>12} {'norms':>15} {'cosine':>6} {'against':>11} {'overlap':>13} {'ranks':>9}"
    lines = [head]
    names = words.columns([r["name"] for r in records[:SHOWN]], 28)
    for name, r in zip(names, records[:SHOWN], strict=True):
        shape = "x".join(map(str, r["shape"]))
        norms = f"{r['norm_min']:.2g}-{r['norm_max']:.2g}"
        cosine = "" if r["cosine"] is None else f"{r['cosine']:.2f}"
        against = f"{r['against']:.2f} ({r['against_chance']:.2f})" if "against" in r else ""
        overlap = f"{r['overlap']:.3f} ({r['overlap_chance']:.3f})" if "overlap" in r else ""
        ranks = (
            "/".join(f"{r[k]:.0f}" for k in ("rank_each", "rank_together", "rank_of_mean")) if "overlap" in r else ""
        )
        lines.append(f"{name} {shape:>12} {norms:>15} {cosine:>6} {against:>11} {overlap:>13} {ranks:>9}".rstrip())
    if len(records) > SHOWN:
        lines.append(f"... and {len(records) - SHOWN} more")
    lines.append("norms: of the rows; cosine: mean of pairs; against: share of the magnitude against the sum (of")
    lines.append("unrelated ones); overlap: of leading directions (chance); ranks: effective, each/together/mean")
    return "\n".join(lines)
