"""Who descends from whom, from the weights alone: near copies, shared starts and parents, untrained models.

Two models from one start, x_i = s + d_i, keep a cosine of |s|^2 / |x_i| |x_j| however they are named. Groups are
found by average linkage on the cosines and kept only where they stand apart: members of a lineage are clearly
closer to one another than to anyone else. A shared low-dimensional subspace without a shared start gives cosines
of both signs and no such gap, so it is not mistaken for a lineage.
"""

import math

import numpy as np

SAME_START = 0.5  # cosine of LoRA's A factors; real groups were the same from .15 to .6
NEAR_COPY = 0.99  # cosine over all layers above which two models are near copies
EVEN = 0.9  # (sum of norms)^2 / (n sum of squares) of kin; .64 of one half of a normal distribution
FLAT = 1e-5  # share of a row's energy about the mean of its entries under which they are one number, and rounding
THRESHOLD = (
    0.15  # average cosine at which groups stop merging; real families begin at .19, their nearest outsiders end at .11
)
SPREADS = 6.0  # of 125,000 pairs of 500 unrelated models the largest lies 4.5 spreads out
KNOWN_STDS = (0.02,)  # the one common initialiser that does not depend on the width


def cosines(gram):
    """(N, N) cosines from an uncentred Gram matrix; 0 where a model is zero."""
    norms = np.sqrt(np.maximum(np.diag(gram), 0.0))
    inverse = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)
    return np.clip(gram * inverse[:, None] * inverse[None, :], -1.0, 1.0)


def correlations(gram, sums, num_features):
    """(N, N) cosines of rows about the mean of their own entries; NaN where a row's entries are all one number.

    Entries that have a mean (weights that are all positive, scales about 1) make a cosine that says nothing of descent.

    Args:
        gram: (N, N) uncentred Gram matrix.
        sums: (N,) sums of the entries of each row.
        num_features: D.
    """
    about, whole = gram - np.outer(sums, sums) / num_features, np.diag(gram)
    flat = (np.diag(about) <= FLAT * whole) & (whole > 0)
    return np.where(flat[:, None] | flat[None, :], np.nan, cosines(about))


def combine(layers, num_models):
    """Mean cosine of each pair over the layers both have, weighted by features; NaN where none tells.

    Args:
        layers: iterable of (members, cosines (n, n), num_features); a cosine may be NaN.
        num_models: N.

    Returns:
        (N, N) float64.
    """
    total, weight = np.zeros((num_models, num_models)), np.zeros((num_models, num_models))
    for members, values, num_features in layers:
        at = np.ix_(members, members)
        known = np.isfinite(values)
        total[at] += num_features * np.where(known, values, 0.0)
        weight[at] += num_features * known
    return np.divide(total, weight, out=np.full_like(total, np.nan), where=weight > 0)


def related(layers, num_models):
    """Mean cosines of all pairs, about the mean of each row's entries and plain; both NaN where no layer is common.

    The first tell descent (`correlations`; where rows are single numbers the plain ones stand in), the second copies.

    Args:
        layers: list of (members, uncentred Gram matrix (n, n), sums of the rows' entries (n,), num_features).
        num_models: N.

    Returns:
        two (N, N) float64.
    """
    about = combine(((m, correlations(gram, sums, d), d) for m, gram, sums, d in layers), num_models)
    plain = combine(((m, cosines(gram), d) for m, gram, _, d in layers), num_models)
    return np.where(np.isnan(about), plain, about), plain


def chance_threshold(num_features, kurtosis=3.0):
    """Cosine that unrelated models of D features exceed once in a million pairs.

    4.9 / sqrt(D) for entries of light tails. Where few entries carry a model, two of them that meet are a cosine by
    themselves: the largest can hold a share sqrt((K - 3) / D) of a model whose entries have kurtosis K.

    Of 18,000 collections of noise of nine kinds, narrow ones, 7 have a lineage by it, all of rank-one matrices, and
    3,620 by 4.9 / sqrt(D) alone (rank one, Student t, Cauchy, sparse).
    """
    return 4.9 / math.sqrt(max(num_features, 1)) + math.sqrt(max(kurtosis - 3.0, 0.0) / max(num_features, 1))


def groups(cosine, num_features, threshold=THRESHOLD, kurtosis=3.0, norms=None):
    """Lineages: groups of models that share a start or a parent.

    Average linkage down to `threshold` (or the chance level of so few features, if higher). A group is kept if its
    members are clearly closer to one another than models are elsewhere: the 5th percentile of their own cosines lies
    above the 95th of theirs with all others, and above half the threshold; and their median lies `SPREADS` spreads
    above the middle of all cosines between groups. Closest pairs of a continuum pass the first, never the second.
    Where they are as far from others, by cosines of either sign, as near to one another, their norms must be alike too:
    models with one direction in common, and coefficients of their own, have cosines of 1 and -1, and are no kin.

    Args:
        cosine: (N, N) mean cosines, NaN read as 0.
        num_features: features the cosines were computed from.
        threshold: average cosine at which merging stops.
        kurtosis: of the entries of the models with the heaviest tails.
        norms: (N,) of the models, or None where they are not known.

    Returns:
        list of sorted index lists of two or more models, largest first.

    Fails where: lineages split into sub-families (only the outer one is reported), or kin have cosines under the
    threshold. Source: UPGMA, Sokal and Michener 1958; cosine groups of the shared-initialisation critique.
    """
    count = len(cosine)
    if count < 2:
        return []
    similarity = np.nan_to_num(np.asarray(cosine, np.float64), nan=0.0)
    similarity = (similarity + similarity.T) / 2
    cut = max(threshold, chance_threshold(num_features, kurtosis))
    if not (similarity[np.triu_indices(count, 1)] > cut).any():
        return []
    if similarity.min() > cut:  # all pairs: one group, and importing scipy.cluster takes 20 MiB
        return [list(range(count))]

    from scipy.cluster import hierarchy
    from scipy.spatial import distance

    condensed = distance.squareform(np.maximum(1.0 - similarity, 0.0), checks=False)
    labels = hierarchy.fcluster(hierarchy.average(condensed), 1.0 - cut, criterion="distance")
    background = _background(similarity[labels[:, None] < labels[None, :]])
    found = []
    for label in np.unique(labels):
        inside = labels == label
        members = np.flatnonzero(inside)
        if len(members) < 2:
            continue
        own = similarity[np.ix_(members, members)][np.triu_indices(len(members), 1)]
        others = similarity[np.ix_(members, np.flatnonzero(~inside))]
        low = np.percentile(own, 5)
        apart = not others.size or low > np.percentile(others, 95)
        if apart and others.size and norms is not None and low <= np.percentile(np.abs(others), 95):
            apart = _are_even(norms[members])
        if apart and low > cut / 2 and np.median(own) > background:
            found.append([int(m) for m in members])
    return sorted(found, key=lambda g: (-len(g), g))


def _are_even(norms):
    squares = float(np.square(norms).sum())
    return squares > 0 and float(norms.sum()) ** 2 > EVEN * len(norms) * squares


def _background(between):
    """What cosines between models of different groups do not reach: the middle and SPREADS robust spreads."""
    if not between.size:
        return -1.0
    low, middle, high = np.percentile(between, [15.87, 50, 84.13])
    return middle + SPREADS * (high - low) / 2


def near_copies(cosine, threshold=NEAR_COPY):
    """Pairs (i, j, cosine) above `threshold`, closest first."""
    rows, columns = np.where(np.triu(np.nan_to_num(cosine, nan=0.0), 1) > threshold)
    pairs = [(int(i), int(j), float(cosine[i, j])) for i, j in zip(rows, columns, strict=True)]
    return sorted(pairs, key=lambda p: (-p[2], p[:2]))


def order(cosine, lineages):
    """Order of models for a picture: lineages first, largest first, then the others; each by similarity."""
    from scipy.cluster import hierarchy
    from scipy.spatial import distance

    def sorted_members(members):
        if len(members) < 3:
            return list(members)
        part = np.nan_to_num(cosine[np.ix_(members, members)], nan=0.0)
        condensed = distance.squareform(np.maximum(1.0 - (part + part.T) / 2, 0.0), checks=False)
        return [members[i] for i in hierarchy.leaves_list(hierarchy.average(condensed))]

    placed = [m for g in lineages for m in sorted_members(g)]
    rest = sorted(set(range(len(cosine))) - set(placed))
    return placed + sorted_members(rest)


def group_energy(gram, members):
    """Share of the centred energy that lies in the group means, sum_g n_g |m_g - m|^2 / sum_i |x_i - m|^2.

    Args:
        gram: (N, N) centred Gram matrix.
        members: list of index lists; models outside any group count in the denominator only.

    Returns:
        float, or None if there is no energy.
    """
    total = float(np.trace(gram))
    if not total > 0:
        return None
    return max(0.0, float(sum(len(g) * gram[np.ix_(g, g)].mean() for g in members)) / total)


def group_energy_chance(gram, members, num_features):
    """(mean, standard deviation) of `group_energy` of unrelated models of the same norms, in the same groups.

    Args:
        gram: (N, N) centred Gram matrix, N > 2.
        members: list of index lists.
        num_features: D; entries are taken to be Gaussian, whose share between groups follows a beta distribution.
    """
    count, own = len(gram), np.diag(gram)
    total = own.sum() * count / (count - 1)
    squares = np.maximum(own - total / count**2, 0.0) / (1 - 2 / count)  # of models before their mean was taken
    between = sum((1 / len(g) - 2 / count) * squares[g].sum() + len(g) / count**2 * total for g in members)
    share = min(max(between / own.sum(), 0.0), 1.0)
    return float(share), float(np.sqrt(share * (1 - share) / ((count - 1) * num_features / 2 + 1)))


def looks_untrained(squares, fourths, shape, num_features, singular_values=None):
    """Whether entries look drawn from a common initialiser: its shape of distribution, its exact width, no structure.

    Args:
        squares: sum of the squared entries of one model in one layer.
        fourths: sum of the fourth powers.
        shape: weight shape, two or more axes; either of the first two may be the fan-in.
        num_features: D, at least 1000 for a verdict.
        singular_values: of a matrix, where known: the sum of their fourth powers, v^2 o i (o + i - 2 + K) of
            independent entries of variance v, is known to 1 / sqrt(D); products of rank 16 have twice as much.

    Returns:
        True, or False (also where the layer says nothing). Uniform (kurtosis 1.8), normal (3) and normal cut at two
        standard deviations (2.37) with the widths of LeCun, He, Glorot and the uniform default of linear layers.
    """
    if num_features < 1000 or len(shape) < 2 or not squares > 0:
        return False
    std = math.sqrt(squares / num_features)
    kurtosis = fourths * num_features / squares**2
    if singular_values is not None and len(shape) == 2:
        expected = (sum(shape) - 2 + kurtosis) / num_features * float(np.square(singular_values).sum()) ** 2
        if float((singular_values**4).sum()) > expected * (1 + 4 / math.sqrt(num_features)):
            return False
    # Of wide layers fourth powers are taken from an eighth of the columns, without the squares of the same columns.
    sample = num_features / 32 if num_features >= 65536 else num_features
    field = math.prod(shape[2:])
    fans = {shape[0], shape[1], shape[0] * field, shape[1] * field}
    widths = {math.sqrt(g / f) for f in fans for g in (1.0, 2.0, 1.0 / 3.0)} | set(KNOWN_STDS)
    widths.add(math.sqrt(2.0 / ((shape[0] + shape[1]) * field)))
    for shape_kurtosis, spread in ((1.8, 0.9), (3.0, 4.9), (2.37, 1.9)):
        # Three standard errors of a sample kurtosis and of a sample standard deviation.
        if abs(kurtosis - shape_kurtosis) > 3 * spread / math.sqrt(sample):
            continue
        slack = 3 * math.sqrt((shape_kurtosis - 1) / 4 / num_features)
        if any(abs(std / width - 1) < slack for width in widths):
            return True
    return False
