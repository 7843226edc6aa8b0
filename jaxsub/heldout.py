"""Held-out errors of a layer's models, all from the Gram matrix of their weights.

LOO(k): for each model take the mean and the first k principal components of the *other* models, reconstruct it, and
take the squared error; sum over models; divide by the same sum with the mean alone. 1 means that the components are
useless on an unseen model, and is also the answer where there is nothing to explain (all models equal, fewer than
three models). A component whose variance is rounding explains nothing.

Not for in-sample shares of energy: these are in `spectrum`. NumPy and SciPy float64 on the host.
"""

import numpy as np

from jaxsub import solvers, spectrum
from jaxsub.linalg import secular

# Eigenvalues under this times (number of models) times the largest are rounding of a float64 Gram matrix.
FLOOR_PER_MODEL = 8 * np.finfo(np.float64).eps
# A model whose error could be off by this share of the total is decomposed again without it, at most MAX_DIRECT of
# them: only models that alone hold nearly all the energy, or nearly all in some leading direction, come to that.
DIRECT_TOLERANCE = 1e-9
MAX_DIRECT = 64
SPLIT_ELEMENTS = 2**19  # float64 numbers of the Gram matrices of splits worked on together
WHOLE = 128  # models up to which all eigenvectors come as fast as the few leading ones, with other threads running
SMALLEST = 1e3  # times the floor: eigenvalues under this leave leave_one_out_of_draw to the exact way
TWIN_ROOTS = 1e-8  # roots this close, relatively, on both sides of one pole share its projection by rounding


def decompose(gram):
    """Eigenvalues of a Gram matrix, non-increasing and not negative, and its eigenvectors.

    Args:
        gram: (N, N) symmetric positive semi-definite.

    Returns:
        values: (N,) float64; negative rounding is set to zero.
        vectors: (N, N) float64, columns in the order of `values`.
    """
    values, vectors = solvers.eigh(gram)
    return np.maximum(values[::-1], 0.0), vectors[:, ::-1]


def leave_one_out(gram, ks, *, leverage=None, largest=0.0, eigen=None):
    """LOO(k) for every k of `ks`, exact, from one eigendecomposition.

    Leaving out model i subtracts a_i y_i y_i^T from the features' covariance, y_i = x_i - mean, a_i = N / (N - 1), and
    the model lies a_i y_i from the mean of the others; `linalg.secular` solves all N rank-one problems at once.

    Args:
        gram: (N, N) centred Gram matrix, inner products of the y_i.
        ks: numbers of components, each >= 0, in any order; those above N - 2 give what N - 2 gives.
        leverage: (N,) factors a_i instead of N / (N - 1), as `within_groups` returns them.
        largest: entry of the matrix that `gram` was made of by subtractions, whose rounding it has.
        eigen: `decompose(gram)`, where the caller has it already.

    Returns:
        (len(ks),) float64 between 0 and 1, to 1e-6 of decomposing again without each model. All ones where the error
        with the mean alone is zero (all models equal, or fewer than two); the caller flags that case.

    Fails on: `leverage` with spectra spread over more than 1e9, such as one model far larger than all others: errors of
    1e-5 are usual there, of .1 and more possible at k >= 32. Without it such models are decomposed directly.
    """
    gram = np.asarray(gram, np.float64)
    ks = [int(k) for k in ks]
    num_models = len(gram)
    energy = np.maximum(np.diagonal(gram), 0.0)
    rank = min(max(ks, default=0), num_models - 2)
    if rank < 1 or not energy.max() > 0:
        return np.ones(len(ks))
    unit = energy.max()  # keeps squares of the entries within range
    values, vectors = decompose(gram) if eigen is None else eigen
    values, energy, largest = values / unit, energy / unit, largest / unit
    alpha = np.full(num_models, num_models / (num_models - 1.0)) if leverage is None else np.asarray(leverage)
    baseline = alpha**2 * energy
    floor = FLOOR_PER_MODEL * num_models * max(values[0], largest)
    # Rounding in place of a zero eigenvalue would enter the downdate through its square root, far above `floor`.
    weights = np.where(values > floor, values, 0.0) * vectors**2
    roots, projections = secular.downdate(values, weights, alpha, rank=rank)
    explained = np.where(roots > floor, alpha[:, None] ** 2 * projections, 0.0)
    # The last root is zero for a model that no others replace in their span, as within groups: it lies in just that
    # direction, so that rounding of the root, which can exceed `floor`, would explain all of it.
    last = np.count_nonzero(values > floor) - 1
    gone = (1.0 / alpha - (vectors[:, : last + 1] ** 2).sum(axis=1)) * values[last] <= floor
    explained[gone, last:] = 0.0
    if leverage is None:
        for i in _doubtful(baseline, explained, roots, floor):
            others = np.delete(np.arange(num_models), i)
            baseline[i : i + 1], explained[i : i + 1] = _explain(gram / unit, others, [i], rank)
    return _curve(baseline.sum(), explained.sum(0), ks)


def leave_one_out_of_draw(gram, ks, *, leverage=None, largest=0.0, eigen=None):
    """`leave_one_out` of a null's draw, to 1e-6 and in a quarter of the time; arguments and result as there.

    Only where no eigenvalue that it looks at is near rounding; else it is `leave_one_out`.
    """
    gram = np.asarray(gram, np.float64)
    num_models, ks = len(gram), [int(k) for k in ks]
    rank = min(max(ks, default=0), num_models - 2)
    if rank < 1:
        return np.ones(len(ks))
    values, vectors = eigen = decompose(gram) if eigen is None else eigen
    floor = FLOOR_PER_MODEL * num_models * max(values[0], largest)
    if not values[rank] > SMALLEST * floor:
        return leave_one_out(gram, ks, leverage=leverage, largest=largest, eigen=eigen)
    alpha = np.full(num_models, num_models / (num_models - 1.0)) if leverage is None else np.asarray(leverage)
    baseline = (alpha**2 * np.maximum(np.diagonal(gram), 0.0)).sum()
    weights = np.where(values > floor, values, 0.0) * vectors**2
    found = secular.explained(values, weights, alpha, [min(k, rank) for k in ks])
    return np.clip(1.0 - found.sum(axis=0) / baseline, 0.0, 1.0)


def of_one_model(gram, rank):
    """Figures "held_out" and "held_out_by" of a fit of `rank` components; None where LOO(rank) says nothing."""
    if not np.trace(gram) > 0 or rank > len(gram) - 2:
        return {"held_out": None}
    return {"held_out": float(leave_one_out(gram, [rank])[0]), "held_out_by": "one model"}


def within_groups(gram, groups):
    """Gram matrix of the models about the mean of their own group, and the leverages for leaving one out.

    `leave_one_out(residual, ks, leverage=leverage, largest=gram.max())` then also recomputes the mean of the group
    without the model.

    Args:
        gram: (N, N) Gram matrix about any common point.
        groups: disjoint lists of model indices; groups of one, and models in no group, are dropped.

    Returns:
        residual: (n, n) float64, the n models in the order in which the groups list them; (0, 0) without groups.
        leverage: (n,) float64, n_g / (n_g - 1) for a group of n_g models.
    """
    groups = [np.asarray(group, np.intp) for group in groups if len(group) > 1]
    if not groups:
        return np.zeros((0, 0)), np.zeros(0)
    members = np.concatenate(groups)
    sizes = np.array([len(group) for group in groups])
    label = np.repeat(np.arange(len(groups)), sizes)
    mean_of = (label[:, None] == np.arange(len(groups))) / sizes  # (n, groups): columns average over a group
    residual = np.asarray(gram, np.float64)[np.ix_(members, members)]
    residual = residual - (mean_of.T @ residual)[label]
    residual = residual - (residual @ mean_of)[:, label]
    return _symmetric(residual), (sizes / (sizes - 1.0))[label]


def leave_group_out(gram, groups, ks):
    """Held-out error of whole groups: mean and first k components of all models outside a group, on the group.

    Args:
        gram: (N, N) Gram matrix about any common point.
        groups: lists of model indices; models in no group are never held out but always among the others.
        ks: numbers of components, each >= 0; those above the number of others minus 1 give what that gives.

    Returns:
        (len(ks),) float64: squared error over the groups' models / the same with the mean of the others alone. All
        ones where no group leaves two others, or where there is no error to explain.
    """
    gram = np.asarray(gram, np.float64)
    ks = [int(k) for k in ks]
    rank = max(ks, default=0)
    unit = np.diagonal(gram).max(initial=0.0)
    baseline, explained = 0.0, np.zeros(rank)
    for group in groups:
        others = np.setdiff1d(np.arange(len(gram)), group)
        if len(others) > 1 and unit > 0:
            energy, parts = _explain(gram / unit, others, group, rank)
            baseline, explained = baseline + energy.sum(), explained + parts.sum(0)
    return _curve(baseline, explained, ks)


def split_half(gram, ks, num_features, *, num_splits=20, rng):
    """Agreement of the leading subspaces of two random halves of the models, each centred on its own mean.

    Overlap of two k-dimensional subspaces = mean squared cosine of their principal angles = |U_a^T U_b|^2 / k.

    Args:
        gram: (N, N) Gram matrix about any common point.
        ks: numbers of components; those that a half of N // 2 models cannot have are left out of the result.
        num_features: D, for the chance level k / D.
        num_splits: random splits.
        rng: numpy Generator.

    Returns:
        k -> {"overlap": mean over splits, "low", "high": 5 and 95 % quantiles over splits, "chance"}. A component
        without variance overlaps with nothing, so that k above the rank of the models shows as a lower overlap.
    """
    gram = np.asarray(gram, np.float64)
    num_models = len(gram)
    ks = [int(k) for k in ks if 1 <= k <= num_models // 2 - 1]
    if not ks:
        return {}
    orders, half = np.stack([rng.permutation(num_models) for _ in range(num_splits)]), num_models // 2
    step = max(1, SPLIT_ELEMENTS // num_models**2)  # at once: short operations of many splits cost as those of one
    parts = [orders[start : start + step] for start in range(0, num_splits, step)]
    overlaps = np.concatenate([_overlaps(gram, part[:, :half], part[:, half:], ks) for part in parts])
    low, high = np.quantile(overlaps, [0.05, 0.95], axis=0)
    return {
        k: {
            "overlap": float(overlaps[:, j].mean()),
            "low": float(low[j]),
            "high": float(high[j]),
            "chance": min(1.0, k / num_features),
        }
        for j, k in enumerate(ks)
    }


def _symmetric(gram):
    return 0.5 * (gram + gram.T)


def _curve(baseline, explained, ks):
    """(len(ks),) ratios (baseline - first k of explained) / baseline, within [0, 1]; ones for a zero baseline."""
    if not baseline > 0:
        return np.ones(len(ks))
    total = np.concatenate([[0.0], np.cumsum(explained)])
    return np.clip(1.0 - total[np.minimum(ks, len(explained))] / baseline, 0.0, 1.0)


def _doubtful(baseline, explained, roots, floor):
    """Models whose error the downdate cannot give: much unexplained energy where the others' variance is rounding,
    or twin roots, as weights of few distinct values have them.

    The downdated spectrum has absolute errors of about `floor`, so that a direction of variance mu is known to
    floor / mu, and what a model has outside the directions before it can be wrong by that share.
    """
    left = np.maximum(baseline[:, None] - np.cumsum(explained, axis=1) + explained, 0.0)
    twins = roots[:, :-1] - roots[:, 1:] <= TWIN_ROOTS * roots[:, :-1]
    mixed = (np.minimum(explained[:, :-1], explained[:, 1:]) * twins).max(axis=1, initial=0.0)
    doubt = (left * np.minimum(1.0, floor / np.maximum(roots, floor))).max(axis=1)
    doubt = np.maximum(doubt, mixed) / max(baseline.sum(), 1e-300)
    worst = np.argsort(-doubt, kind="stable")[:MAX_DIRECT]
    return [int(i) for i in worst if doubt[i] > DIRECT_TOLERANCE]


def _explain(gram, others, held, rank):
    """Energy of the held models about the mean of the others, and the part in each of the others' components.

    Args:
        gram: (N, N) about any common point.
        others, held: index lists.
        rank: components wanted; those above the rank of the others come back as zeros.

    Returns:
        energy: (len(held),); parts: (len(held), rank).
    """
    inner = gram[np.ix_(others, others)]
    cross = gram[np.ix_(others, held)]
    middle = inner.mean(0)
    energy = np.diagonal(gram)[held] - 2.0 * cross.mean(0) + middle.mean()
    cross = cross - cross.mean(0) - (middle - middle.mean())[:, None]
    values, vectors = _leading(inner, min(rank, len(others) - 1))
    parts = np.zeros((len(held), rank))
    parts[:, : len(values)] = (cross.T @ vectors) ** 2 / values
    return np.maximum(energy, 0.0), parts


def _leading(gram, rank):
    """At most `rank` leading eigenpairs of a Gram matrix after centring, those above its rounding only."""
    if rank < 1:
        return np.zeros(0), np.zeros((len(gram), 0))
    values, vectors, kept = _leading_of(gram[None], rank)
    return values[0][kept[0]], vectors[0][:, kept[0]]


def _leading_of(grams, rank):
    """Leading eigenpairs of S Gram matrices (S, n, n) after centring: values (S, k), vectors (S, n, k), and whether
    each is above rounding (S, k)."""
    size = grams.shape[-1]
    centred = np.stack([spectrum.centred(one) for one in grams])
    if size <= WHOLE:
        values, vectors = (x[..., size - rank :] for x in solvers.eigh(centred))
    else:
        found = [solvers.leading(one, rank) for one in centred]
        values, vectors = (np.stack(x) for x in zip(*found, strict=True))
    # Relative to the entries before centring: equal models far from the origin must come out with rank zero.
    largest = np.maximum(np.diagonal(grams, axis1=1, axis2=2).max(axis=1), np.maximum(values[:, -1], 0.0))
    values, vectors = values[:, ::-1], vectors[:, :, ::-1]
    return values, vectors, values > FLOOR_PER_MODEL * size * largest[:, None]


def _overlaps(gram, first, second, ks):
    """(S, len(ks)) overlaps of the leading subspaces of S pairs of disjoint index sets (S, n) and (S, m)."""
    a, b = (_scaled_vectors(gram[half[:, :, None], half[:, None, :]], max(ks)) for half in (first, second))
    cross = gram[first[:, :, None], second[:, None, :]]
    cross = cross - cross.mean(axis=1, keepdims=True)
    cross = cross - cross.mean(axis=2, keepdims=True)
    squares = np.square(a.swapaxes(1, 2) @ cross @ b)
    return np.stack([squares[:, :k, :k].sum(axis=(1, 2)) / k for k in ks], axis=1)


def _scaled_vectors(grams, rank):
    """(S, n, k) weights of the models in unit components, zero for those that are rounding."""
    values, vectors, kept = _leading_of(grams, rank)
    return vectors * np.where(kept, 1.0 / np.sqrt(np.where(kept, values, 1.0)), 0.0)[:, None, :]
