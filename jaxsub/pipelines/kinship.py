"""Kinship of a collection's models from the statistics of all its layers."""

import dataclasses

import numpy as np

from jaxsub import lineage, verdict

PICTURED = 200  # models in the cosine picture


@dataclasses.dataclass
class Kinship:
    """Model ids, grouped; see `report.json`, "collection"."""

    lineages: list
    near_copies: list
    lora_starts: list
    untrained: list
    threshold: float
    chance: float
    picture: dict
    warnings: list


def find(all_stats, ids, threshold):
    """Kinship of the models that appear in `all_stats`.

    Args:
        all_stats: Statistics of every layer.
        ids: ids of all models, in row order.
        threshold: cosine at which lineages stop merging.
    """
    present = {i for s in all_stats for i in s.model_ids}
    ids = [i for i in ids if i in present]
    row = {i: n for n, i in enumerate(ids)}
    layers, starts = [], []
    for stats in all_stats:
        members = [row[i] for i in stats.model_ids]
        layers.append((members, stats.uncentred(), stats.row_sums, stats.num_features))
        if stats.a_cosines is not None:
            starts.append((members, stats.a_cosines, stats.num_features))
    cosine, plain = lineage.related(layers, len(ids))
    features = max((s.num_features for s in all_stats), default=1)
    tails = _tails([s for s in all_stats if s.num_features == features])
    parts = _parts(cosine)
    groups = _groups(cosine, parts, features, threshold, tails, _norms(all_stats, row))
    start_cosine = lineage.combine(starts, len(ids))
    start_groups = _groups(start_cosine, _parts(start_cosine), features, lineage.SAME_START) if starts else []
    near = lineage.near_copies(plain)
    untrained = _untrained(all_stats, ids)
    warnings = []
    if len(near) > 1000:
        warnings.append(
            f"{len(near)} pairs are near copies (cosine above {lineage.NEAR_COPY}); the 1000 closest are listed"
        )
    if start_groups:
        held = sum(len(g) for g in start_groups)
        warnings.append(f"{held} adapters keep the start of another's A factor: stacked A factors would look shared")
    if untrained:
        warnings.append(f"{len(untrained)} models look untrained, {untrained[0]!r} among them")
    return Kinship(
        lineages=[[ids[m] for m in g] for g in groups],
        near_copies=[(ids[a], ids[b], c) for a, b, c in near],
        lora_starts=[[ids[m] for m in g] for g in start_groups],
        untrained=untrained,
        threshold=max(threshold, lineage.chance_threshold(features, tails)),
        chance=lineage.chance_threshold(features, tails),
        picture=_picture(cosine, groups, ids),
        warnings=warnings,
    )


def of_layer(stats, lineages, threshold):
    """(lineages, whether they are its own): groups that explain more of a layer than those of all layers.

    A small layer may have families of which the cosines of all layers together show nothing.

    Args:
        stats: Statistics of the layer.
        lineages: index lists into its models, found from all layers.
        threshold: as in `find`.

    Fails where: families of all layers and of this one cross: only the better of the two groupings is taken.
    """
    cosine = lineage.correlations(stats.uncentred(), stats.row_sums, stats.num_features)
    found = lineage.groups(cosine, stats.num_features, threshold, _tails([stats]), stats.norms())
    lineages = [g for g in lineages if len(g) > 1]
    if not found or len(found[0]) == stats.num_models or sorted(found) == sorted(lineages):
        return lineages, False
    gram = stats.centred()
    (own, sd), (given, other) = (_over_chance(gram, g, stats.num_features) for g in (found, lineages))
    is_own = own > given + max(verdict.MARGIN, verdict.SIGMAS * max(sd, other))
    return (found, True) if is_own else (lineages, False)


def _over_chance(gram, groups, num_features):
    """Energy in the means of groups beyond what unrelated models give, and the standard deviation of that."""
    energy = lineage.group_energy(gram, groups) if groups and len(gram) > 2 else None
    if energy is None:
        return 0.0, 0.0
    chance, sd = lineage.group_energy_chance(gram, groups, num_features)
    return energy - chance, sd


def _norms(all_stats, row):
    """(N,) norms of the models over all layers, up to a factor."""
    most, squares = max((s.exponent for s in all_stats), default=0), np.zeros(len(row))
    for stats in all_stats:
        np.add.at(
            squares, [row[i] for i in stats.model_ids], np.ldexp(np.square(stats.norms()), 2 * (stats.exponent - most))
        )
    return np.sqrt(squares)


def _parts(cosine):
    """Index lists of models connected by common layers, largest first: other kinds of models are no background."""
    from scipy.sparse import csgraph

    if not len(cosine):
        return []
    _, labels = csgraph.connected_components(~np.isnan(cosine), directed=False)
    parts = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    return sorted(parts, key=lambda p: (-len(p), p[0]))


def _tails(all_stats):
    """Kurtosis of entries that nine models in ten stay under, in layers that all have the most weights."""
    known = np.concatenate([s.kurtosis() for s in all_stats]) if all_stats else np.zeros(0)
    known = known[np.isfinite(known)]
    return float(np.quantile(known, 0.9)) if len(known) else 3.0


def _groups(cosine, parts, features, threshold, tails=3.0, norms=None):
    found = []
    for part in parts:
        own = None if norms is None else norms[part]
        inside = lineage.groups(cosine[np.ix_(part, part)], features, threshold, tails, own)
        found += [[int(part[m]) for m in group] for group in inside]
    return sorted(found, key=lambda g: (-len(g), g))


def _untrained(all_stats, ids):
    """Ids of models all of whose matrices that can tell look drawn from an initialiser, or that are zero throughout."""
    votes = {i: [] for i in ids}
    for stats in all_stats:
        squares, strengths = np.diag(stats.uncentred()), stats.model_singular_values
        each = zip(stats.model_ids, squares, stats.row_fourths, stats.zero(), strict=True)
        for n, (i, square, fourth, zero) in enumerate(each):
            if zero:
                votes[i].append(True)
            elif abs(stats.exponent) > 200:
                votes[i].append(False)  # no initialiser draws such numbers
            elif len(stats.shape) > 1 and stats.num_features >= 1000 and np.isfinite(fourth):
                sums = square * stats.scale**2, fourth * stats.scale**4
                own = None if strengths is None else strengths[n]
                votes[i].append(lineage.looks_untrained(*sums, stats.shape, stats.num_features, own))
            elif stats.parametrisation == "lora":
                votes[i].append(False)
    return [i for i in ids if votes[i] and all(votes[i])]


def _picture(cosine, groups, ids):
    order = lineage.order(cosine, groups) if len(ids) > 1 else list(range(len(ids)))
    if len(order) > PICTURED:
        order = [order[i] for i in np.linspace(0, len(order) - 1, PICTURED).round().astype(int)]
    part = cosine[np.ix_(order, order)]
    rounded = np.round(part, 3).astype(object)
    rounded[np.isnan(part)] = None
    matrix = rounded.tolist()
    return {"ids": [ids[i] for i in order], "matrix": matrix}
