"""The sections about the models: lineages with their picture, copies, what was set aside, what was left out."""

from . import png, words
from .markup import Markup, join, name, shorten, tag
from .svg import text

_MOST = 200  # items of a list written out; the rest is counted (report.json has all)
_OPENLY = 8  # warnings shown without a click
_SIDE = 520  # of the picture, in view-box units
_MARGIN = 62  # for the brackets, left and above
_FIRST = 6  # lineages of which some members are shown without a click
_SAMPLE = 40  # members shown of these, in all


def lineages(collection, layers=()):
    """The lineage section: what was found, the cosine picture, its key, and the members of each lineage beside it."""
    said, listed = tag("p", _found(collection, layers)), _lists(collection)
    picture = _picture(collection)
    if picture is None:
        return [said, *listed]
    style = "beside" if listed else "beside small"
    return [tag("div", said, picture, _key(collection), tag("div", listed), class_=style)]


def _found(collection, layers):
    groups = collection["lineages"]
    grouped = sum(len(group) for group in groups)
    singles = (collection["num_distinct"] or 0) - grouped
    alone = sum(bool(layer["own_lineages"]) for layer in layers)
    if groups:
        said = f"{words.plural(len(groups), 'lineage')} with {words.plural(grouped, 'model')}"
        said += f"; {words.plural(max(singles, 0), 'model')} in none." if singles >= 0 else "."
    elif alone:
        said = "All layers together show no two models that share a start or a parent."
    else:
        said = "No two models share a start or a parent, as far as their weights tell."
    if alone:
        said += f" {words.plural(alone, 'layer')} {'shows' if alone == 1 else 'show'} groups that the others do not:"
        said += " they are told there."
    threshold, chance = collection["lineage_threshold"], collection["lineage_threshold_chance"]
    if threshold is not None:
        said += f" Groups are joined down to an average cosine of {words.amount(threshold)}"
        said += f" (unrelated models reach {words.amount(chance)})." if chance is not None else "."
    return said


def _lists(collection):
    parts = []
    for heading, title, groups in (
        ("Members of the lineages", "L", collection["lineages"]),
        ("Adapters that start from the same A", "Start ", collection["lora_starts"]),
    ):
        if groups:
            each = _SAMPLE // min(len(groups), _FIRST)
            parts += [tag("h3", heading), members(title, groups, each)]
    return parts


def members(title, groups, each=_SAMPLE // _FIRST):
    """Groups of models, numbered; of the first some members, of the others one, and all on a click."""
    listed = [_members(f"{title}{i + 1}", group, each if i < _FIRST else 1) for i, group in enumerate(groups[:_MOST])]
    return tag("div", listed, _rest(groups, "p"), class_="members")


def _members(title, group, shown):
    """One group: its size and the first `shown` names; all of them on a click where there are more."""
    named = [join([name(item, 40), ", " if i + 1 < len(group) else None]) for i, item in enumerate(group[:shown])]
    head = join([tag("b", title), f" {words.plural(len(group), 'model')}: ", *named])
    if len(group) <= shown:
        return tag("p", head)
    return tag("details", tag("summary", head, f"and {words.count(len(group) - shown)} more"), _names(group))


def _names(ids):
    items = [tag("li", name(item, 70)) for item in ids[:_MOST]]
    if len(ids) > _MOST:
        items.append(tag("li", f"and {len(ids) - _MOST} more, in report.json"))
    return tag("ul", items, class_="names")


def _picture(collection):
    """The heat map of cosines, models in the order of their lineages, a bracket on two sides for each lineage."""
    cosine = collection["cosine"]
    if not cosine or not cosine.get("matrix"):
        return None
    matrix = [[value or 0.0 for value in row] for row in cosine["matrix"]]
    size = len(matrix)
    ids = cosine.get("ids") or [""] * size
    order = cosine.get("order") or range(size)
    if sorted(order) != list(range(size)):  # a sub-sample may list places in the whole collection: keep as stored
        order = range(size)
    shown = [[matrix[i][j] for j in order] for i in order]
    brackets = _brackets([ids[i] for i in order], collection["lineages"], _SIDE / size)
    margin = _MARGIN if brackets else 1
    total = margin + _SIDE + 1
    place = {"x": margin, "y": margin, "width": _SIDE, "height": _SIDE}
    frame = tag("rect", **place, class_="frame")
    image = tag("image", href=png.data_uri(shown), **place, class_="pixels")
    title = tag("title", f"Cosine between the weights of {size} models, ordered by lineage")
    chart = tag("svg", title, image, frame, brackets, class_="heat", viewBox=f"0 0 {total} {total}", role="img")
    return tag("figure", chart, class_="picture")


def _key(collection):
    """How to read the picture."""
    size, count = len(collection["cosine"]["matrix"]), collection["num_distinct"] or 0
    said = f"Cosine between the weights of each pair of {words.plural(size, 'model')}"
    said += f" (a sample of {words.count(count)})" if size < count else ""
    said += ", ordered by lineage. The diagonal is each model with itself; a square along it is a group with a common"
    said += " start or parent. Blank: unrelated."
    return tag("div", _legend(), tag("p", said), class_="key")


def _brackets(ids, groups, cell):
    lineage_of = {model: i for i, group in enumerate(groups) for model in group}
    parts, start = [], 0
    for end in range(1, len(ids) + 1):
        lineage = lineage_of.get(ids[start])
        if end < len(ids) and lineage_of.get(ids[end]) == lineage:
            continue
        if lineage is not None and end - start > 1:
            low, high = _MARGIN + start * cell, _MARGIN + end * cell
            parts.append(_bracket(low, high, f"L{lineage + 1}", f"L{lineage + 1} ({len(groups[lineage])})"))
        start = end
    return Markup("".join(parts))


def _bracket(low, high, short, label):
    near, far = _MARGIN - 4, _MARGIN - 10
    a, b, middle = f"{low + 1:.1f}", f"{high - 1:.1f}", (low + high) / 2
    path = f"M{near} {a}H{far}V{b}H{near}M{a} {near}V{far}H{b}V{near}"
    drawn = tag("path", d=path, class_="bracket")
    if high - low < 14:
        return drawn
    above = label if high - low > 56 else short
    return join([drawn, text(far - 5, middle + 4, short, "", "end"), text(middle, far - 6, above, "", "middle")])


def _legend():
    scale = png.data_uri([[i / 50 - 1 for i in range(101)]])
    image = tag("image", href=scale, x=8, y=2, width=184, height=12, preserveAspectRatio="none", class_="pixels")
    frame = tag("rect", x=8, y=2, width=184, height=12, class_="frame")
    ticks = [text(8 + 184 * (value + 1) / 2, 28, shown, "", "middle") for value, shown in _LEGEND_TICKS]
    title = tag("title", "Colour scale of the cosine, from -1 to 1")
    return tag("svg", title, image, frame, ticks, class_="legend", viewBox="0 0 200 32", role="img")


_LEGEND_TICKS = [(-1, "−1"), (-0.5, "−.5"), (0, "0"), (0.5, ".5"), (1, "1")]


def copies(collection):
    """Copies and near copies, or one sentence saying that there are none."""
    duplicates, near = collection["duplicates"], collection["near_duplicates"]
    if not duplicates and not near:
        return [tag("p", "No copies, and no two models with a cosine above .99.")]
    parts = []
    if duplicates:
        extra = sum(len(group) - 1 for group in duplicates)
        parts.append(
            tag(
                "p",
                f"{words.plural(extra, 'model')} identical to another in every layer analysed; one of each is kept.",
            )
        )
        rows = [tag("li", _equals(group)) for group in duplicates[:_MOST]]
        parts.append(tag("ul", rows, _rest(duplicates), class_="names"))
    if near:
        parts.append(
            tag(
                "p",
                f"{words.plural(len(near), 'pair')} of near copies, kept as separate models (cosine over all layers):",
            )
        )
        rows = [
            tag("tr", tag("td", name(a, 48)), tag("td", name(b, 48)), tag("td", words.ratio(c, 4)))
            for a, b, c in near[:_MOST]
        ]
        head = tag("tr", tag("th", "model"), tag("th", "near copy"), tag("th", "cosine"))
        parts.append(tag("div", tag("table", tag("thead", head), tag("tbody", rows), class_="list"), class_="scroll"))
        parts.append(_rest(near, "p"))
    return [part for part in parts if part is not None]


def _equals(group):
    names = [name(item, 48) for item in group[:20]]
    more = [f" and {len(group) - 20} more"] if len(group) > 20 else []
    return join([names[0], *[join([" = ", other]) for other in names[1:]], *more])


def _rest(items, element="li"):
    return tag(element, f"and {len(items) - _MOST} more, in report.json") if len(items) > _MOST else None


def set_aside(collection, analysed=True):
    """What was not analysed and why: models, layers, groups of other shapes; warnings about the collection.

    `analysed` says whether any layer was.
    """
    parts = []
    warnings = [tag("li", shorten(item, 600)) for item in collection["warnings"][:_MOST]]
    if warnings:
        parts += [tag("h3", "Warnings"), tag("ul", warnings[:_OPENLY], class_="remarks")]
    if warnings[_OPENLY:]:
        more = tag("summary", words.plural(len(warnings) - _OPENLY, "more warning"))
        parts.append(tag("details", more, tag("ul", warnings[_OPENLY:], class_="remarks")))
    quarantined = collection["quarantined"]
    if quarantined:
        rows = [
            _cells(name(q["id"]), name(q["layer"] or "whole model"), shorten(q["reason"], 400))
            for q in quarantined[:_MOST]
        ]
        parts += [
            tag("h3", f"Models set aside: {len(quarantined)}"),
            _list(("model", "where", "why"), rows),
            _rest(quarantined, "p"),
        ]
    skipped = collection["skipped_layers"] or collection["groups"]
    if skipped:
        parts += [
            tag("h3", f"Layers not analysed: {len(skipped)}"),
            _list(("layer", "shape", "models", "why"), _skipped(skipped)),
            _rest(skipped, "p"),
        ]
    if collection["identical_layers"]:
        parts += [tag("h3", "Layers identical in all models"), _names(collection["identical_layers"])]
    if collection["untrained"]:
        parts += [tag("h3", "Models that look untrained"), _names(collection["untrained"])]
    nothing = "Nothing: every model and every layer was used." if analysed else "No model and no layer is listed."
    return [part for part in parts if part is not None] or [tag("p", nothing)]


def _skipped(groups):
    for group in groups[:_MOST]:
        shape = shorten(words.shape(group.get("shape") or []), 40)
        yield _cells(
            name(group["name"]), shape, words.count(group.get("num_models")), shorten(group.get("reason") or "-", 400)
        )


def _cells(*cells):
    return tag("tr", [tag("td", cell) for cell in cells])


def _list(header, rows):
    head = tag("thead", tag("tr", [tag("th", title, scope="col") for title in header]))
    return tag("div", tag("table", head, tag("tbody", list(rows)), class_="list"), class_="scroll")
