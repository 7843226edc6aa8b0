"""Entry permutation: every model's entries permuted independently.

Keeps each model's values, so its mean entry and norm, and destroys what is where.

A permuted model is its mean entry times the all-ones vector plus a deviation of fixed length. The direction of the
deviation is taken as uniform among the directions orthogonal to all-ones: means and variances of all inner products
are exact, the rest holds when no few entries carry a model's energy.

Where few do, means over draws hold and standard deviations do not: Student t entries with 2.5 degrees of freedom vary
up to 1.6 times as much as drawn so, models with nine nonzero entries of 300 up to 3 times. Small stacks (`KEPT_ENTRIES`
of `statistics`) are therefore permuted literally, and `LITERAL_DRAWS` times before a verdict rests on it, since two
models agree as soon as two such entries meet, which is rare and looks like a finding. Of larger ones `spread` says how
much further the inner products of permuted models lie apart.
"""

import dataclasses

import numpy as np

from jaxsub.nulls import _draw

# Share of the energy in the models' mean entries below which the law is that of `gaussian`: what it adds to a gain or
# to the mean's energy is below it, a two-hundredth of the verdict's margin.
NEGLIGIBLE = 1e-4
LITERAL_DRAWS = 200  # of which a gain must beat every one: one collection of noise in 200 does

REFERENCE = "Pitman 1937 (permutation moments); deviations by Muirhead 1982, section 3.2"


@dataclasses.dataclass(frozen=True)
class Options:
    """How many draws, and how they are made."""

    draws: int = 20  # S


def applies(observed):
    """Why the null cannot be drawn for this layer, or None."""
    if observed.entry_means is None:
        return "the models' mean entries are not known"
    return None if observed.num_features > 1 else "a single entry cannot be permuted"


def same_as(observed):
    """The null whose draws serve as well, because the mean entries hold next to nothing; or None."""
    if observed.entries is not None:
        return None
    constant = np.square(np.asarray(observed.entry_means, np.float64)).sum() * observed.num_features
    total = np.square(np.asarray(observed.norms, np.float64)).sum()
    return "gaussian" if constant <= NEGLIGIBLE * total else None


def spread(observed):
    """How many times as far apart squared inner products of permuted models lie as those that are drawn.

    The standard deviation of c^2 for an inner product c of kurtosis 3 + t over that for t = 0, sqrt(1 + t / 2).
    """
    return 1.0 if observed.entries is not None else float(np.sqrt(1.0 + observed.tails / 2))


def sample(observed, options, rng):
    """Gram matrices of models with permuted entries.

    Args:
        observed: `Observed`; norms, and entries where they are known, else entry_means and num_features are used.
        options: `Options`.
        rng: numpy Generator.

    Yields:
        S uncentred (N, N) float64 Gram matrices.
    """
    _draw.require_draws(options)
    norms = np.asarray(observed.norms, np.float64)
    if observed.entries is not None:
        yield from _literal(observed.entries.astype(np.float64), norms, options, rng)
        return
    constant = np.asarray(observed.entry_means, np.float64) * np.sqrt(observed.num_features)
    deviation = np.sqrt(np.maximum((norms - np.abs(constant)) * (norms + np.abs(constant)), 0.0))
    fixed, scale = constant[:, None] * constant, deviation[:, None] * deviation
    for _ in range(options.draws):
        yield fixed + scale * _draw.unit_gram(rng, len(norms), observed.num_features - 1)


def _literal(entries, norms, options, rng):
    """Gram matrices of rows whose entries were permuted, at the models' norms."""
    entries *= (norms / np.sqrt(np.maximum(np.square(entries).sum(1), 1e-300)))[:, None]
    for _ in range(options.draws):
        rows = rng.permuted(entries, axis=1)
        gram = rows @ rows.T
        np.fill_diagonal(gram, np.square(norms))
        yield gram
