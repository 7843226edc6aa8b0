"""What the report says in words: verdicts, flags, definitions, and how a figure is written."""

import collections
import os.path

from jaxsub import errors

from . import fields

# Plain meaning of each verdict, in the order in which a reader wants them: claims first.
VERDICTS = {
    "shared": (
        "The weights share directions: a subspace found on the other models rebuilds a model it has not seen better "
        "than chance allows, and no separate families explain it."
    ),
    "lineage+shared": (
        "Families of models with a common start explain part of it; about the family means a subspace is still "
        "shared beyond chance."
    ),
    "lineage": (
        "The subspace is the families: models that share a start or a parent. Once each family's mean is taken away, "
        "and that of the models in none, nothing beats chance."
    ),
    "common_mean": (
        "The models share a mean, at least three times what unrelated models would, but no directions around it that "
        "help on an unseen model."
    ),
    "chance": "Nothing here that unrelated weights of the same size would not show as well.",
    "undetermined": (
        "The data cannot decide: fewer than 8 distinct models, a saturated or constant layer, or no more weights than "
        "models."
    ),
}

# How a verdict reads inside the summary sentence.
_IN_SENTENCE = {
    "shared": "a shared subspace",
    "lineage+shared": "a shared subspace beyond their lineages",
    "lineage": "lineage alone",
    "common_mean": "a common mean only",
    "chance": "chance",
    "undetermined": "undetermined",
}

FLAGS = {
    "saturated": "90 % of the energy is not reached above the noise floor, so the spectrum cannot be read",
    "one_lineage": "all models come from one start; models from other starts may share nothing with them",
    "own_lineages": (
        "its lineages are groups of models that are alike in this layer; all layers together show others, or none"
    ),
    "identical": "the layer is the same in all models",
    "rank_deficient": "some components lie under the noise floor: fewer directions vary than there could be",
    "heavy_tails": "a few entries carry much of a model: models agree as soon as two such entries meet by chance",
    "one_model": "one model holds more than half of the energy about the mean, and decides the figures",
    "coordinate_spread": (
        "does not beat the shuffle null: a common set of strong coordinates may be all that is shared"
    ),
}

# (term, definition): every figure of the report, as a formula in words.
GLOSSARY = [
    ("N, D", "N: number of distinct models that have the layer. D: number of weights of the layer in one model."),
    (
        "mean %",
        "Share of the uncentred energy (sum of squares over all models) that lies in the mean model: N times the "
        "squared norm of the mean, divided by the sum of the models' squared norms.",
    ),
    (
        "chance (of mean %)",
        "What N unrelated models of the same norms hold in their mean: about 1 / N. The mean is worth a word only well "
        "above this.",
    ),
    (
        "singular values",
        "Of the centred stack: models as rows, the mean model subtracted. Their squares are the energies of the "
        "components.",
    ),
    ("floor", "Values under it are rounding noise of the computation; they are neither drawn nor counted."),
    (
        "k50 ... k99",
        "Fewest components of the centred stack that hold 50 ... 99 % of its energy. “Not reached”: no number of "
        "components that could be computed does. A small k alone proves nothing; compare with the null's.",
    ),
    (
        "LOO(k)",
        "Held-out error, leaving one model out. For each model, take the mean and the first k components of the other "
        "N - 1 models, rebuild the model, and square the error; sum over models; divide by the same sum with the mean "
        "alone (k = 0). 1: the components are useless on a model not seen. 0: they rebuild it fully.",
    ),
    ("gain", "1 - LOO(k): the part of an unseen model's deviation from the mean that the subspace rebuilds."),
    (
        "the k that decides",
        "The largest of 1, 2, 4, 8, 16 that is not above (N - 2) / 2, so that enough models are left to estimate it.",
    ),
    (
        "null",
        "The same figure on weights that share nothing. permutation: the entries of every model are shuffled "
        "independently, which keeps each model's values and destroys their places. gaussian: Gaussian rows of the "
        "models' norms. strength: the models' own singular values with random directions. fresh_init (LoRA): B is "
        "kept, A drawn anew. shuffle, which does not decide: every coordinate's values are permuted among the models, "
        "so a common set of strong coordinates stays. A gain counts only when it "
        "beats the null's mean over draws by more than 0.02 and more than 4 standard deviations, and this for every "
        "null that decides; the one named and drawn is the hardest.",
    ),
    (
        "lineage",
        "A group of models that share a start or a parent, found from the cosines between weights, not from names. "
        "Weights are taken about each model's own mean, layer by layer: those of models whose weights are all positive "
        "are no kin. Groups are found from all layers together; a layer in which other groups explain more is told "
        "with those (own_lineages).",
    ),
    (
        "lineage energy",
        "Share of the centred energy that lies in the lineage means; beside it what means of unrelated models of these "
        "norms hold. Near 100 %: the leading directions are the parents.",
    ),
    (
        "LOO(k) within lineages",
        "The same error after each model's lineage mean has been subtracted; models in no lineage are one more group.",
    ),
    (
        "LOO(k), lineage left out",
        "The whole lineage of a model is left out, not the model alone: does the subspace reach a new family?",
    ),
    (
        "modes",
        "The same energies along one axis of the weight (its rows, its columns): the stack unfolded so that this axis "
        "is the one analysed. “Sketched”: from a random projection of the other axes.",
    ),
    (
        "stability",
        "The models are split at random into halves; mean squared cosine of the principal angles between the top-k "
        "subspaces of the halves. 1: the same subspace; chance: k / D.",
    ),
    ("MP count", "Components above the Marchenko-Pastur edge, the largest value that pure noise of this size reaches."),
    (
        "effective rank",
        "Conventions that differ, each under its own name. stable_rank: total energy / largest energy. "
        "participation_ratio: (sum of energies) squared / sum of squared energies. erank: exp of the entropy of the "
        "singular values' shares; erank_energy: of the energies' shares. entropy: the latter as a share of its "
        "largest possible value, 0 to 1.",
    ),
]


def held_out_titles(rank):
    """Headings of the held-out figures, the same in both tables; `rank` is the k that decides, None where it varies."""
    return f"LOO({rank or 'k'})", "null LOO", "gain", "null gain"


def held_out_figures(layer, rank):
    """The figures of `held_out_titles` as written; the error with its own k where `rank` is None."""
    (error, null_error), (gain, null_gain, _) = fields.errors(layer), fields.gains(layer)
    named = f"{fields.deciding_rank(layer)}: " if error is not None and rank is None else ""
    return named + ratio(error), ratio(null_error), ratio(gain), ratio(null_gain)


def time_line(provenance):
    """Where the time went, on one line, largest part first; empty where the report does not say."""
    given = provenance.get("seconds") or {}
    if not given.get("total"):
        return ""
    parts = {name: value for name, value in given.items() if name != "total" and value}
    if parts:
        parts["other"] = given["total"] - sum(parts.values())
    shown = sorted(parts.items(), key=lambda part: -part[1])
    listed = ", ".join(f"{name} {value / given['total']:.0%}" for name, value in shown if value >= given["total"] / 200)
    return f"{given['total']:.1f} s" + (f": {listed}" if listed else "")


def summary(report):
    """One sentence with the verdict counts: 'Of 12 layers, 9 are explained by lineage alone, ...'."""
    layers = fields.complete(report)["layers"]
    if not layers:
        return "No layer was analysed."
    parts = [_clause(name, count) for name, count in fields.verdict_counts(layers, VERDICTS)]
    single = sum(verdict_label(layer) != layer["verdict"] for layer in layers)
    if single:  # a claim of a shared subspace never stands without the start it is under
        parts[0] += " under one common start" if parts[0].startswith(f"{single} ") else f" ({single} under one start)"
    total = "The one layer" if len(layers) == 1 else f"Of {len(layers)} layers,"
    if len(layers) == 1:
        return f"{total} {parts[0].removeprefix('1 ')}."
    listed = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
    return f"{total} {listed}."


def _clause(verdict, count):
    said = _IN_SENTENCE.get(verdict, verdict)
    verb = "is" if count == 1 else "are"
    if count == 1:
        said = said.replace("their", "its")
    if verdict in ("shared", "lineage+shared", "common_mean"):
        return f"{count} {'has' if count == 1 else 'have'} {said}"
    if verdict in ("lineage", "chance"):
        return f"{count} {verb} explained by {said}"
    return f"{count} {verb} {said}"


def verdict_label(layer):
    """The verdict as shown; a shared subspace says what it is under."""
    if layer["verdict"] == "shared" and "one_lineage" in layer["flags"]:
        return "shared (1 start)"
    return layer["verdict"]


def common_prefix(layers):
    """The start that all layers' names share, up to a separator; empty when it would save little."""
    names = [layer["name"] for layer in layers]
    start = os.path.commonprefix(names) if len(names) > 2 else ""
    start = start[: max(start.rfind("."), start.rfind("/")) + 1]
    return start if 8 <= len(start) <= 300 else ""


def cut(text, limit):
    """`text` with its middle left out if it is longer than `limit`; ASCII in, ASCII out."""
    if len(text) <= limit:
        return text
    if limit < 6:
        return text[:limit]
    head = (limit - 2) * 2 // 5
    return f"{text[:head]}..{text[len(text) - (limit - 2 - head) :]}"


def columns(names, limit):
    """Names from files as a column of text, filled up to `limit`: printable ASCII, different ones never alike.

    What all begin and end with is left out first, then the middle of each; what is still alike is numbered.
    """
    whole = [errors.quote(name, 10**9) for name in names]
    short = whole
    if max(map(len, whole), default=0) > limit and len({*whole}) > 1:
        start = os.path.commonprefix(whole)
        start = max(start.rfind("."), start.rfind("/")) + 1
        end = os.path.commonprefix([name[start:][::-1] for name in whole])
        end = max(end.rfind("."), end.rfind("/")) + 1
        short = [".." * (start > 3) + name[start if start > 3 else 0 : len(name) - end] for name in whole]
    short = [shown.rstrip() for shown in distinct(short, limit)]  # blanks at an end are not seen in a column
    alike, numbers = _alike(whole, short), {}
    for name, shown in zip(whole, short, strict=True):
        if len(alike[shown]) > 1:
            numbers.setdefault(name, f"~{len(numbers) + 1}")
    tags = [numbers.get(name, "") for name in whole]
    return [(shown[: limit - len(tag)] + tag).ljust(limit) for shown, tag in zip(short, tags, strict=True)]


def distinct(names, limit, cut=cut):
    """The names cut to `limit` characters; those that would look alike show the part in which they differ.

    Args:
        names: texts.
        limit: characters of each.
        cut: function (text, limit) -> text that leaves out the middle.
    """
    short = [cut(name, limit) for name in names]
    alike = _alike(names, short)
    return [
        shown if len(alike[shown]) == 1 else _cut_around(name, sorted(alike[shown]), limit, cut)
        for name, shown in zip(names, short, strict=True)
    ]


def _alike(names, short):
    """Short form -> the set of names that have it."""
    found = collections.defaultdict(set)
    for name, shown in zip(names, short, strict=True):
        found[shown].add(name)
    return found


def _cut_around(name, others, limit, cut):
    start = os.path.commonprefix(others)
    end = os.path.commonprefix([other[len(start) :][::-1] for other in others])[::-1]
    own = name[len(start) : len(name) - len(end)]
    room = limit - min(len(own), limit // 2)
    if room < 12:
        return cut(name, limit)
    before = min(len(start), max(room // 2, room - len(end)))
    return cut(start, before) + cut(own, limit // 2) + cut(end, room - before)


def percent(share, digits=1):
    """0.0945 as '9.4%'; very small shares as '<0.1%'; None as a dash."""
    if share is None:
        return "-"
    smallest = 10.0**-digits
    if 0 < 100 * share < smallest / 2:
        return f"<{smallest:.{digits}f}%"
    return f"{100 * share:.{digits}f}%"


def ratio(value, digits=3):
    """A number near 0 to 1 with fixed digits; None as a dash."""
    if value is None:
        return "-"
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text  # no "-0.000"


def spread(value):
    """A standard deviation in four digits; a smaller one as '<0.0001', None as a dash."""
    return "<0.0001" if value is not None and 0 < value < 5e-5 else ratio(value, 4)


def rank(value, never="not reached"):
    """A number of components, possibly a mean over draws; None as `never`, not as the largest possible rank."""
    if value is None:
        return never
    return f"{value:.0f}" if float(value).is_integer() or value >= 10 else f"{value:.1f}"


def count(value):
    """An integer with thousands separators; None as a dash."""
    return "-" if value is None else f"{value:,}"


def shape(sizes):
    """(64, 3, 3) as '64x3x3'; a scalar as '()'."""
    return "x".join(str(size) for size in sizes) or "()"


def amount(value):
    """A figure of any size in three significant digits; None as a dash."""
    return "-" if value is None else f"{value:.3g}"


def plural(number, noun, plural_noun=""):
    """'1 model', '2 models', '3 copies'."""
    return f"{count(number)} {noun if number == 1 else plural_noun or noun + 's'}"
