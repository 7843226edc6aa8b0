"""The one-line verdict of a layer and the rule behind it. Pure functions of numbers already computed.

k     the largest of 1, 2, 4, 8, 16 not above (N - 2) / 2
gain  1 - LOO(k), what k components of the other models explain of an unseen one
beats the null: gain exceeds the null's mean gain by max(.02, 4 sd over draws), and every draw's gain, for every null
that decides

Lineages also count where their means hold more of the energy than those of unrelated models in the same groups, by
max(.02, 4 sd) as well: of more families than k no component of the others is an unseen model's own.

Nominal rate at which a layer of noise is called shared or lineage: at most .0006, the chance of Student's t with 19
degrees of freedom to pass 4 sd of 20 draws (none where the sd is so small that .02 decides); at most 1 in 201 where a
few entries carry a model, and its entries are permuted 200 times. `tests/test_false_findings.py` counts them.
"""

import dataclasses
import statistics

MARGIN, SIGMAS, MEAN_FACTOR, FEWEST_MODELS = 0.02, 4.0, 3.0, 8
# Nulls that must all be beaten. The others are shown beside the result: `shuffle` keeps each coordinate's spread and
# so asks another question (is there more than a common set of strong coordinates?), answered by a flag.
DECIDING = ("permutation", "gaussian", "strength", "fresh_init")
FEWEST_DRAWS = 8  # of a null; a standard deviation over 8 is known to about a quarter


@dataclasses.dataclass(frozen=True)
class Gain:
    """A held-out gain at k with the null that came closest to it."""

    value: float
    null: float
    sd: float
    null_name: str
    most: float | None = None  # the largest gain of a draw

    @property
    def needed(self):
        """What the gain must exceed."""
        margin = self.null + max(MARGIN, SIGMAS * self.sd)
        return margin if self.most is None else max(margin, self.most)

    @property
    def beats(self):
        """Whether the gain exceeds the null's by the margin, and that of every draw."""
        return self.value > self.needed


def settled(curves):
    """Whether null curves (dicts from k to LOO(k)) agree so well that more draws would hardly move a verdict.

    The margin is max(.02, 4 sd). Where the sd is under a tenth of .02 at every k, it stays .02 whatever more draws say
    of the sd, and means over 8 draws are known to .0007. So it is wherever a layer is much wider than there are models;
    narrow layers take all their draws.
    """
    return all(statistics.pstdev(c[k] for c in curves) < MARGIN / 10 for k in curves[0]) if curves else True


def deciding_rank(num_models):
    """k of the module docstring; None below four models."""
    return max((k for k in (1, 2, 4, 8, 16) if k <= (num_models - 2) / 2), default=None)


def gain(held_out, nulls, k, curve="held_out"):
    """Gain at k beside its hardest null.

    Args:
        held_out: dict from k as text to LOO(k).
        nulls: name -> dict with `curve`, `curve + "_sd"` and, where known, `curve + "_least"`, dicts from k as text.
        k: components.
        curve: which curve of the nulls belongs to `held_out`.

    Returns:
        Gain, or None where the curve or every deciding null lacks k.
    """
    key = str(k)
    if not held_out or held_out.get(key) is None:
        return None
    value = 1.0 - held_out[key]
    found = [
        Gain(value, 1.0 - n[curve][key], n[curve + "_sd"][key], name, _most(n.get(curve + "_least"), key))
        for name, n in nulls.items()
        if name in DECIDING and n.get(curve) and n[curve].get(key) is not None
    ]
    return max(found, key=lambda g: g.needed, default=None)


def _most(least, key):
    return 1.0 - least[key] if least else None


@dataclasses.dataclass(frozen=True)
class Families:
    """The lineages of a layer, and what their means hold."""

    number: int = 0
    hold_all: bool = False  # a single one holds every model
    energy: float | None = None  # share of the centred energy in their means
    chance: float | None = None  # what means of as many unrelated models of the same norms give
    sd: float = 0.0
    outside: int = 0  # models that are in none
    is_own: bool = False  # found in this layer, where those of all layers together explain less

    @property
    def beat_chance(self):
        """Whether their means hold more than chance gives: many small families outnumber the deciding components."""
        return self.energy is not None and self.energy > self.chance + max(MARGIN, SIGMAS * self.sd)


def decide(
    *, num_models, num_features, saturated, constant, families, overall, within, mean, mean_chance, k, k_within=None,
    same_a=0,
):  # fmt: skip
    """(verdict, why) of a layer.

    Args:
        num_models: N distinct models.
        num_features: D.
        saturated: whether the spectrum is cut before it could be read.
        constant: whether all models are equal here.
        families: Families.
        overall: Gain of the layer, or None.
        within: Gain of the residuals about the lineage means, models in none being one more group, or None.
        mean: share of uncentred energy in the mean, or None for a zero layer.
        mean_chance: what N unrelated models give, also those whose entries have a mean of their own.
        k: the deciding rank.
        k_within: the one of `within`.
        same_a: adapters that keep the start of another's A factor.
    """
    if constant:
        return "undetermined", f"all {num_models} distinct models are equal here: there is no variation to explain"
    if num_models < FEWEST_MODELS:
        return "undetermined", f"{num_models} distinct models; {FEWEST_MODELS} are needed"
    if num_models - 1 >= num_features:
        return "undetermined", f"{num_features} numbers a model cannot tell {num_models} models apart"
    if saturated:
        return "undetermined", "most of the variation lies under the noise floor of the stored numbers"
    if overall is None:
        return "undetermined", "no null model could be drawn for this layer"
    facts = _facts(overall, k)
    if families.number and not families.hold_all and (overall.beats or families.beat_chance):
        named = _count(families.number, families.is_own)
        if not overall.beats:
            held = f"{families.energy:.1%} of the energy where unrelated models give {families.chance:.1%}"
            facts = f"{facts}, but the means of {named} hold {held}"
        if within is None:
            return "lineage", f"{facts}; too few models to look within {named}"
        where = f"within {named}" + (" and among the others" if families.outside > 1 else "")
        return ("lineage+shared" if within.beats else "lineage"), f"{facts}; {where} {_facts(within, k_within)}"
    if overall.beats:
        under = "all models keep a common start" if families.hold_all else "models keep no common start"
        if families.hold_all and mean is not None and mean <= MEAN_FACTOR / num_models:
            under = f"{under}, which other layers show: here the mean holds {mean:.1%} of the energy"
        if same_a and not families.hold_all:
            under = (
                f"{same_a} adapters keep the start of another's A factor, which alone makes updates share directions"
            )
        return "shared", f"{facts}; {under}"
    if mean is not None and mean > MEAN_FACTOR * mean_chance:
        return (
            "common_mean",
            f"{facts}; the mean holds {mean:.1%} of the energy where unrelated models give {mean_chance:.1%}",
        )
    if mean is not None and mean > MEAN_FACTOR / num_models:
        facts = f"{facts}; the mean holds {mean:.1%} of the energy, {mean_chance:.1%} with entries permuted as well"
    return "chance", facts


def _count(lineages, is_own):
    where = " that this layer alone shows" if is_own else ""
    return ("the lineage" if lineages == 1 else f"the {lineages} lineages") + where


def _facts(g, k):
    verb = "against" if g.beats else "no better than"
    return f"{k} components of the others explain {g.value:.1%} of an unseen model {verb} {g.null:.1%} by {g.null_name}"
