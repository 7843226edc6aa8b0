"""The charts of one layer: spectrum, energy held, held-out error, weight axes, stability. Each None without data."""

import dataclasses

from . import fields, svg, words
from .markup import Markup, shorten, tag

_SMALL = svg.Frame(width=176, height=132, left=38, right=12, top=22, bottom=32)


def charts(layer):
    """[(caption, chart)] of a layer as `fields.complete` gives it, in reading order."""
    drawn = [_spectrum(layer), _energy(layer), _held_out(layer), _modes(layer), _stability(layer)]
    return [figure for figure in drawn if figure]


def _spectrum(layer):
    floor = layer["floor"] or 0
    null = fields.deciding_null(layer)[1]
    lines = [
        svg.Line(_above(layer["uncentred_singular_values"], floor), "faint", "uncentred"),
        svg.Line(_above(null["singular_values"], floor), "null", "null", _spread(null, floor)),
        svg.Line(_above(layer["singular_values"], floor), "observed", "observed"),
    ]
    values = [y for line in lines for _, y in line.points]
    if not lines[2].points:
        return None
    low, high = min(values), max(values)
    floor_shown = floor > low / 20
    low = min(low, floor) if floor_shown else low
    y = svg.logarithmic("singular value (log scale)", low * 0.85, high * 1.18)
    x = svg.counts("component", max(len(line.points) for line in lines))
    rules = [svg.Rule("y", floor, "floor")] if floor_shown else []
    hidden = sum(1 for value in layer["singular_values"] if value is None or value <= floor)
    caption = f"Spectrum of the centred stack. {_band_words(*fields.deciding_null(layer))}"
    if hidden:
        caption += f" {words.plural(hidden, 'value')} under the floor not drawn."
    return caption, svg.chart("Singular values of the centred stack and of its null", x, y, lines, rules=rules)


def _above(values, floor):
    return [(i + 1, value) for i, value in enumerate(values) if value is not None and value > floor]


def _spread(null, floor):
    pairs = zip(null["singular_values"], null["singular_values_sd"], strict=False)
    known = [(i + 1, mean, sd) for i, (mean, sd) in enumerate(pairs) if mean and sd is not None]
    tiny = floor or 1e-300
    return [(i, max(mean - 2 * sd, tiny), max(mean + 2 * sd, tiny)) for i, mean, sd in known]


def _band_words(name, null):
    if not null["singular_values"]:
        return "No null spectrum in this report."
    spread = " ± 2 sd" if null["singular_values_sd"] else ""
    return f"Null ({shorten(name, 24)}): mean{spread} over {words.plural(null['draws'], 'draw')}."


def _energy(layer):
    null = fields.deciding_null(layer)[1]
    observed = _cumulative(layer, layer) or _known_shares(layer)
    expected = _cumulative(null, layer) or _known_shares(null)
    if not observed:
        return None
    lines = [svg.Line(expected, "null"), svg.Line(observed, "observed")]
    k90, null_k90 = layer["rank_at"].get("0.9"), null["rank_at"].get("0.9")
    x = svg.counts("number of components", max(_full(observed), _full(expected)))
    marks = _k90_marks(k90, null_k90, x.high)
    y = svg.linear("share of centred energy", 0, 1, count=4, percent=True)
    reached = "Dots: k90, the fewest that hold 90 %." if k90 is not None else "90 % is not reached."
    chart = svg.chart(
        "Energy held by the first components", x, y, lines, marks=marks, rules=[svg.Rule("y", 0.9, "90 %")]
    )
    return f"Energy held by the first components. {reached}", chart


def _k90_marks(k90, null_k90, widest):
    """Dots at 90 %, the smaller rank's text to the left where there is room, else one under the other."""
    pairs = [(null_k90, f"null {words.rank(null_k90)}", "null"), (k90, f"observed {words.rank(k90)}", "observed")]
    pairs = sorted([pair for pair in pairs if pair[0] is not None], key=lambda pair: pair[0])
    marks, line = [], 0
    for i, (rank, said, style) in enumerate(pairs):
        left = i == 0 and len(pairs) == 2 and rank > 0.36 * widest
        marks.append(svg.Mark(rank, 0.9, said, style, left, line))
        line += not left
    return marks


def _full(points):
    """Number of components after which nothing is left to add; at least 2."""
    return max(2, next((k for k, share in points if share > 0.9999), points[-1][0] if points else 2))


def _cumulative(figures, layer):
    """[(k, share)] from singular values; empty where the report lists only the first of them."""
    values = [value or 0 for value in figures["singular_values"]]
    top = max(values, default=0) or 1  # squares of large numbers are none that a float holds
    squares = [(value / top) ** 2 for value in values]
    total = layer["total_energy"] if figures is layer else None
    total = None if total is None else total / top / top
    if total is None and len(squares) < (fields.models_used(layer) or 0) - 1:
        return []
    total, running, points = total or sum(squares), 0.0, [(0, 0.0)]
    if not total:
        return []
    for i, square in enumerate(squares):
        running += square
        points.append((i + 1, min(running / total, 1.0)))
    return points


def _known_shares(figures):
    """Cumulative points from the tables energy_at and rank_at, for stacks whose spectrum is not listed."""
    points = dict(fields.by_count(figures["energy_at"]))
    for share, rank in fields.by_count(figures["rank_at"]):
        points.setdefault(float(rank), share)
    ordered = sorted(points.items())
    return [(0, 0.0), *ordered] if ordered else []


def _held_out(layer):
    null = fields.deciding_null(layer)[1]
    same = layer["held_out_within"] == layer["held_out"]  # a single lineage: nothing is taken away
    within = [] if same else fields.by_count(layer["held_out_within"])
    within_null = fields.within_null(layer)[1]
    lines = [
        svg.Line(fields.by_count(null["held_out"]), "null", "null", _error_band(null, "held_out")),
        svg.Line(fields.by_count(within_null["held_out_within"]) if within else [], "within dashed", "within null"),
        svg.Line(within, "within", "within", dots=True),
        svg.Line(fields.by_count(layer["held_out_lineage"]), "family", "left out", dots=True),
        svg.Line(fields.by_count(layer["held_out"]), "observed", "observed", dots=True),
    ]
    points = [point for line in lines for point in line.points]
    if not lines[-1].points:
        return None
    x = svg.doubling("number of components k (log scale)", sorted({k for k, _ in points}))
    y = svg.linear("held-out error LOO(k)", 0, max(1.05, 1.02 * max(y for _, y in points)), count=4)
    k = fields.deciding_rank(layer)
    rules = [svg.Rule("x", k, f"k = {k} decides")] if k else []
    caption = "Error on a model left out; 1 is the mean alone."
    if within:
        caption += " Within: about the lineage means."
    if lines[3].points:
        caption += " Left out: its whole lineage, not the model alone."
    return caption, svg.chart("Held-out error against the number of components", x, y, lines, rules=rules)


def _error_band(null, key):
    spread = dict(fields.by_count(null[f"{key}_sd"]))
    return [(k, mean - 2 * spread[k], mean + 2 * spread[k]) for k, mean in fields.by_count(null[key]) if k in spread]


def _modes(layer):
    drawn = [_mode(mode) for mode in layer["modes"] if mode["size"] and mode["size"] > 1 and _known_shares(mode)]
    if not drawn:
        return None
    sketched = any(mode["sketched"] for mode in layer["modes"])
    centred = {mode["centred"] for mode in layer["modes"]} - {None}
    caption = "Energy along each axis of the weight; dashed: all directions equal."
    if sketched:
        caption += f" From a sketch{_columns(layer['modes'])}."
    if centred:
        caption += " Centred." if centred == {True} else " Not centred." if centred == {False} else ""
    return caption, tag("div", drawn, class_="multiples")


def _columns(modes):
    widths = {mode["sketched"].get("columns") for mode in modes if isinstance(mode["sketched"], dict)} - {None}
    return f" of {words.count(max(widths))} columns" if widths else ""


def _mode(mode):
    points = _known_shares(mode)
    size, k90 = mode["size"], mode["rank_at"].get("0.9")
    x = svg.counts("directions", size)
    inner = [tick for tick in x.ticks if 0.3 * size < tick[0] < 0.7 * size][:1]
    x = dataclasses.replace(x, ticks=[(0, "0"), *inner, (size, f"{size}")])
    y = svg.linear(f"axis {mode['axis']}: k90 = {words.rank(k90)} of {size}", 0, 1, count=2, percent=True)
    flat = svg.Line([(0, 0), (size, 1)], "null dashed")
    marks = [svg.Mark(k90, 0.9, "", "observed")] if k90 is not None else []
    title = f"Energy along axis {mode['axis']} of {size}"
    return svg.chart(title, x, y, [flat, svg.Line(points, "observed")], marks=marks, frame=_SMALL)


def _stability(layer):
    rows = []
    for k, figures in fields.by_count(layer["stability"]):
        value = figures.get("overlap")
        if value is not None:
            rows.append((k, value, figures.get("low"), figures.get("high"), figures.get("chance")))
    if not rows:
        return None
    x = svg.doubling("number of components k (log scale)", [row[0] for row in rows])
    y = svg.linear("mean cos² of the angles", 0, 1, count=4)
    caption = "Agreement of the top-k subspaces of two random halves; bars: 5 to 95 %."
    return caption, svg.intervals("Agreement of the subspaces of two halves of the models", x, y, rows)


def gain_bar(gain, null_gain):
    """A 64-pixel bar of the held-out gain, 0 to 1, with a tick at the null's gain; empty without a gain."""
    if gain is None:
        return Markup("")
    width = 60 * min(max(gain, 0), 1)
    parts = [tag("rect", x=0, y=2, width=60, height=8, class_="track")]
    parts.append(tag("rect", x=0, y=2, width=f"{width:.1f}", height=8, class_="fill observed"))
    if null_gain is not None:
        place = 60 * min(max(null_gain, 0), 1)
        parts.append(tag("rect", x=f"{max(place - 1, 0):.1f}", y=0, width=2, height=12, class_="tick"))
    return tag("svg", parts, class_="bar", viewBox="0 0 60 12", aria_hidden="true")
