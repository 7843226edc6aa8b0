"""Groups of models that share a layer, and which layers to share under a budget: exact where that can be.

The loss of a group is the sum of its models' squared distances to their mean, which inner products give. Of one layer
the best partition into g groups is found by dynamic programming over subsets (3^N steps, up to EXACT models), beyond by
Ward's merging. Of all layers together one choice of g each is made by dynamic programming over (bytes, loss) states
that no other state is better than.
"""

import functools

import numpy as np

EXACT = 11  # models up to which partitions are the best there are
STATES = 20_000  # (bytes, loss) states that are kept at most: beyond, one for each step of the budget


def losses(gram):
    """{g: (loss, groups)} of the best partition into g groups, for g = 1 .. N; groups are tuples of positions."""
    gram = np.asarray(gram, np.float64)
    return _by_subsets(gram) if len(gram) <= EXACT else _by_ward(gram)


def within(gram, members):
    """Sum of squared distances of some models to their mean."""
    part = gram[np.ix_(members, members)]
    return max(float(np.trace(part) - part.sum() / len(members)), 0.0)


def _by_subsets(gram):
    count = len(gram)

    @functools.cache
    def cost(mask):
        return within(gram, [n for n in range(count) if mask >> n & 1])

    @functools.cache
    def best(mask, groups):
        """(loss, groups) of a set of models in so many groups; its first model is in the first group."""
        if groups == 1:
            return cost(mask), (mask,)
        first = mask & -mask
        rest, found = mask ^ first, (np.inf, ())
        part = rest
        while True:  # all subsets of the rest, which go with the first model
            left = rest ^ part
            if left.bit_count() >= groups - 1:
                loss, others = best(left, groups - 1)
                loss += cost(part | first)
                if loss < found[0]:
                    found = loss, (part | first, *others)
            if not part:
                return found
            part = (part - 1) & rest

    found = {}
    for groups in range(1, count + 1):
        loss, masks = best((1 << count) - 1, groups)
        found[groups] = loss, tuple(tuple(n for n in range(count) if mask >> n & 1) for mask in masks)
    return found


def _by_ward(gram):
    groups = tuple((n,) for n in range(len(gram)))
    found = {len(groups): (0.0, groups)}
    while len(groups) > 1:
        groups = joined(groups, *min(joins(groups, gram))[1:])
        found[len(groups)] = sum(within(gram, g) for g in groups), groups
    return found


def joins(groups, gram):
    """(what it adds to the loss, i, j) of every way to join two groups, the i-th and the j-th before it."""
    for i, a in enumerate(groups):
        for j, b in enumerate(groups[:i]):
            yield within(gram, a + b) - within(gram, a) - within(gram, b), i, j


def joined(groups, i, j):
    """The groups, two of them one; sorted, as their members are."""
    rest = [group for k, group in enumerate(groups) if k not in (i, j)]
    return tuple(sorted([*rest, tuple(sorted(groups[i] + groups[j]))]))


def allocate(choices, sizes, budget):
    """Number of groups of each layer with the smallest sum of losses whose sizes sum to at most `budget`.

    Args:
        choices: for each layer, {g: loss}.
        sizes: for each layer, what one group of it takes.
        budget: sum that may not be exceeded.

    Returns:
        list of g; None where even one group a layer is too much.
    """
    states = [(0, 0.0, ())]
    least = [*np.cumsum(sizes[::-1])[::-1], 0]  # what the layers from here on take at least
    for number, (own, size) in enumerate(zip(choices, sizes, strict=True)):
        grown = [
            (used + g * size, loss + more, (*taken, g))
            for used, loss, taken in states
            for g, more in own.items()
            if used + g * size + least[number + 1] <= budget
        ]
        states = _undominated(grown, budget)
        if not states:
            return None
    return list(min(states, key=lambda state: state[1])[2])


def _undominated(states, budget):
    """States that no cheaper one is as good as; where these are too many, the best of every step of the budget."""
    kept = []
    for state in sorted(states, key=lambda s: (s[0], s[1])):
        if not kept or state[1] < kept[-1][1]:
            kept.append(state)
    if len(kept) <= STATES:
        return kept
    best = {}
    for state in kept:
        step = int(state[0] * STATES / budget)
        if step not in best or state[1] < best[step][1]:
            best[step] = state
    return list(best.values())
