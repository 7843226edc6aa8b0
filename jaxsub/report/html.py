"""The report as one self-contained page.

What it is for: reading a report.json with the eyes, offline, for years. What it is not for: recomputing anything.
Every text from the data is escaped by `markup.tag`; the content policy allows the one script of our own (by its
hash) and images inside the page, and nothing from the network.
"""

import base64
import hashlib
import importlib.resources
import json

from . import collection_parts, fields, layer_cards, layer_charts, words
from .markup import Markup, join, name, shorten, tag, visible

_FILTER_FROM = 8  # layers; fewer are seen at a glance
_FOLD_FROM = 4  # cards; fewer are opened one by one
_OVERVIEW_FROM = 10  # layers; the bars of the table do for fewer
_OVERVIEW_HEIGHT = 150
_MOST_TITLE = 80  # characters of the collection's name
_NAME = 52  # characters of a layer's name in the table


def render(report):
    """The page of a report.json dictionary, as text.

    Args:
        report: dictionary as report.json; optional parts may be missing. It is not changed.
    """
    summary = words.summary(report)
    report = fields.complete(report)
    layers, collection = report["layers"], report["collection"]
    sections = [
        ("layers", "Layers", _layers(layers)),
        ("lineages", "Lineages", collection_parts.lineages(collection, layers) if layers else None),
        ("copies", "Copies and near copies", collection_parts.copies(collection) if layers else None),
        ("aside", "Set aside", collection_parts.set_aside(collection, bool(layers))),
        ("cards", "Layer by layer", _cards(layers) if layers else None),
        ("definitions", "How each figure is defined", [_glossary()]),
        ("provenance", "Provenance", [_time(report["provenance"]), _provenance(report["provenance"])]),
    ]
    sections = [section for section in sections if section[2] is not None]
    body = tag(
        "main",
        _header(report, summary, sections),
        [tag("section", tag("h2", title), parts, id=anchor) for anchor, title, parts in sections],
    )
    return page(body, shorten(collection["name"], _MOST_TITLE))


def page(body, about):
    """A whole page around <main>, that loads nothing and runs nothing but its own script."""
    script, style = _asset("page.js"), _asset("style.css")
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=Markup(policy)),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", f"{about} · jaxsub report" if about else "jaxsub report"),
        tag("style", Markup(style)),
    ]
    page = tag("html", tag("head", head), tag("body", body, tag("script", Markup(script))), lang="en")
    return f"<!DOCTYPE html>\n{page}\n"


def _asset(filename):
    return importlib.resources.files(__package__).joinpath(filename).read_text(encoding="utf-8")


def _header(report, summary, sections):
    layers, collection = report["layers"], report["collection"]
    said = shorten(collection["summary"], 600)
    parts = [
        tag("p", "jaxsub report", class_="kind"),
        tag("h1", name(collection["name"], _MOST_TITLE)) if collection["name"] else None,
        tag("p", said or summary, class_="claim") if collection["name"] else tag("h1", said or summary),
        tag("p", summary, class_="lead") if said and said != summary else None,
        _facts(layers, collection),
        _verdicts(layers),
        tag("nav", [tag("a", title, href=f"#{anchor}") for anchor, title, _ in sections], aria_label="Sections"),
    ]
    return tag("header", parts)


def _facts(layers, collection):
    copied = sum(len(group) - 1 for group in collection["duplicates"])
    facts = [
        (collection["num_models"], "model read", "models read"),
        (collection["num_distinct"], "distinct", "distinct"),
        (copied, "copy left out", "copies left out"),
        (len(collection["lineages"]), "lineage", "lineages"),
        (len({item["id"] for item in collection["quarantined"]}), "model set aside", "models set aside"),
        (len(layers), "layer analysed", "layers analysed"),
    ]
    shown = [(words.count(number), one if number == 1 else many) for number, one, many in facts]
    return tag("dl", [tag("div", tag("dt", label), tag("dd", value)) for value, label in shown], class_="facts")


def _verdicts(layers):
    """A bar of the verdicts' shares and, for each that occurs, what it means; the others folded."""
    if not layers:
        return None
    counted = fields.verdict_counts(layers, words.VERDICTS)
    bar, start = [], 0.0
    for verdict, number in counted:
        width = 100 * number / len(layers)
        piece = tag("title", f"{verdict}: {words.plural(number, 'layer')}")
        shape = {"x": f"{start:.2f}%", "width": f"{width:.2f}%", "y": 0, "height": 12}
        bar.append(tag("rect", piece, class_=f"fill {layer_cards.chip_class(verdict)}", **shape))
        start += width
    rows = [_meaning(verdict, words.plural(number, "layer")) for verdict, number in counted]
    absent = [verdict for verdict in words.VERDICTS if verdict not in dict(counted)]
    others = tag("details", tag("summary", "Verdicts that no layer got"), tag("dl", [_meaning(v, "") for v in absent]))
    parts = [
        tag("svg", bar, class_="stack", width="100%", height=12, role="img", aria_label="Verdicts"),
        tag("dl", rows),
    ]
    return tag("div", parts, others if absent else None, class_="verdicts")


def _meaning(verdict, number):
    said = words.VERDICTS.get(verdict, "")
    return tag("div", tag("dt", layer_cards.chip(verdict), tag("b", number)), tag("dd", said))


def _columns(layers, rank):
    """(heading, class, tooltip) of each column; None for one that would be empty throughout."""
    error, null_error, gain, null_gain = words.held_out_titles(rank)
    has_lineages = any(layer["lineage_energy"] is not None for layer in layers)
    has_flags = any(layer["flags"] for layer in layers)
    return [
        ("layer", "", "name of the layer"),
        ("shape", "wide", "shape of the weight in one model"),
        ("N", "num mid", "distinct models that have the layer"),
        ("verdict", "", "sorted as listed above"),
        ("mean", "num mid", "share of the uncentred energy in the mean model"),
        ("chance", "num mid", "what unrelated models of the same norms hold in their mean"),
        ("k90", "num mid", "fewest components that hold 90 % of the centred energy; never: no number of them does"),
        ("null k90", "num mid", "the same under the null"),
        (error, "num wide", "held-out error at the k that decides"),
        (null_error, "num wide", "the same under the null"),
        (gain, "num", "held-out gain, 1 - LOO(k)"),
        (null_gain, "num low", "the same under the null; the dark tick in the bar"),
        ("", "plain", "held-out gain from 0 to 1, the null's as a tick"),
        ("lineage", "num wide", "share of the centred energy in the lineage means") if has_lineages else None,
        ("flags", "wide plain", "see the layer's card") if has_flags else None,
    ]


def _layers(layers):
    if not layers:
        return [tag("p", "No layer was analysed.")]
    ranks = sorted({fields.deciding_rank(layer) for layer in layers} - {None})
    said = "Gain: the part of an unseen model's deviation from the mean that the subspace of the others rebuilds"
    said += f", 1 - LOO(k) at k = {' or '.join(map(str, ranks))}." if ranks else "."
    said += " The tick in the bar is the null. A row leads to the layer's card."
    rank, prefix = fields.one_rank(layers), words.common_prefix(layers)
    columns = _columns(layers, rank)
    short = words.distinct([visible(layer["name"].removeprefix(prefix)) for layer in layers], _NAME, shorten)
    head = tag("tr", [_heading(*column) for column in columns if column])
    rows = [_row(i, layer, short[i], columns, rank) for i, layer in enumerate(layers)]
    table = tag("table", tag("thead", head), tag("tbody", rows), class_="layers", id="layer-table")
    omitted = tag("p", "All names start with ", name(prefix, 100), ", left out in the table.") if prefix else None
    return [tag("p", said), _overview(layers), _filter(layers), omitted, table]


def _heading(title, style, tooltip):
    sortable = "plain" not in style
    first, _, last = title.partition(" ")
    broken = join([first, tag("br"), last]) if last else title  # narrow figures under a wide heading waste room
    shown = tag("button", broken, type="button", title=tooltip) if sortable else broken
    return tag("th", shown, class_=style or None, scope="col", title=None if sortable else tooltip)


def _filter(layers):
    if len(layers) < _FILTER_FROM:
        return None
    options = [tag("option", "all verdicts", value="")]
    for verdict, number in fields.verdict_counts(layers, words.VERDICTS):
        options.append(tag("option", f"{shorten(verdict, 40)} ({number})", value=verdict))
    return tag(
        "div",
        tag("label", "Find ", tag("input", type="search", id="find", placeholder="part of a name", autocomplete="off")),
        tag("label", "Verdict ", tag("select", options, id="pick")),
        tag("span", id="found", class_="meta", role="status"),
        class_="filter",
        hidden=True,
    )


def _row(position, layer, short, columns, rank):
    (error, null_error), (gain, null_gain, _) = fields.errors(layer), fields.gains(layer)
    written = words.held_out_figures(layer, rank)
    null = fields.deciding_null(layer)[1]
    k90, null_k90 = layer["rank_at"].get("0.9"), null["rank_at"].get("0.9")
    shape = words.shape(layer["shape"])
    order = list(words.VERDICTS).index(layer["verdict"]) if layer["verdict"] in words.VERDICTS else 9
    flags = ", ".join(shorten(flag, 30) for flag in layer["flags"])
    cells = [
        (tag("a", name(layer["name"], shown=short), href=f"#layer-{position}"), position),
        (shorten(shape, 24), layer["num_features"]),
        (words.count(fields.models_used(layer)), fields.models_used(layer)),
        (layer_cards.chip(layer["verdict"], words.verdict_label(layer)), order),
        (words.percent(layer["mean_energy"]), layer["mean_energy"]),
        (words.percent(layer["mean_energy_chance"]), layer["mean_energy_chance"]),
        (words.rank(k90, "never") if layer["rank_at"] else "-", k90),
        (words.rank(null_k90, "never") if null["rank_at"] else "-", null_k90),
        *zip(written, (error, null_error, gain, null_gain), strict=True),
        (layer_charts.gain_bar(gain, null_gain), None),
        (words.percent(layer["lineage_energy"]), layer["lineage_energy"]),
        (flags, None),
    ]
    shown = [
        tag("td", cell, class_=column[1] or None, data_sort=_sort_key(key))
        for (cell, key), column in zip(cells, columns, strict=True)
        if column
    ]
    text = shorten(f"{layer['name']} {flags}", 600).lower()
    return tag("tr", shown, data_verdict=layer["verdict"], data_text=text)


def _sort_key(value):
    return None if value is None else f"{value:.6g}"


def _overview(layers):
    """A dot a layer, in order: held-out gain above the null's. Horizontal places are shares, so it fits any width."""
    known = [(i, layer, *fields.gains(layer)[:2]) for i, layer in enumerate(layers)]
    known = [item for item in known if item[2] is not None]
    if len(known) < _OVERVIEW_FROM:
        return None
    top, radius = max(1.0, *[item[2] for item in known]), 4 if len(layers) <= 120 else 3

    def height(gain):
        return f"{_OVERVIEW_HEIGHT * (1 - min(max(gain, 0), top) / top) + 8:.1f}"

    marks = [tag("line", x1=0, x2="100%", y1=height(v), y2=height(v), class_="grid") for v in (0, 0.5, 1)]
    for position, layer, gain, null_gain in known:
        across = f"{100 * (position + 0.5) / len(layers):.2f}%"
        if null_gain is not None:
            x1, x2 = (f"{100 * (position + 0.5 + side) / len(layers):.2f}%" for side in (-0.4, 0.4))
            marks.append(tag("line", x1=x1, x2=x2, y1=height(null_gain), y2=height(null_gain), class_="base"))
        said = f"{shorten(layer['name'], 80)}: gain {words.ratio(gain)}, null {words.ratio(null_gain)}"
        dot = tag(
            "circle",
            tag("title", said),
            cx=across,
            cy=height(gain),
            r=radius,
            class_=f"dot {layer_cards.chip_class(layer['verdict'])}",
        )
        marks.append(tag("a", dot, href=f"#layer-{position}"))
    size = _OVERVIEW_HEIGHT + 16
    plot = tag("svg", marks, width="100%", height=size, role="img", aria_label="Held-out gain of each layer")
    labels = [tag("text", f"{v:g}", x=24, y=float(height(v)) + 4, text_anchor="end") for v in (0, 0.5, 1)]
    axis = tag("svg", labels, width=30, height=size, aria_hidden="true")
    caption = (
        f"Held-out gain of each layer in the order of the model, layer 1 left, {len(layers)} right. Dashes: the null."
    )
    return tag("figure", tag("div", axis, plot, class_="overview"), tag("figcaption", caption))


def _cards(layers):
    opened = layer_cards.most_telling(layers)
    cards = [layer_cards.card(position, layer, position in opened) for position, layer in enumerate(layers)]
    if len(cards) < _FOLD_FROM:
        return cards
    buttons = [
        tag("button", "open all", type="button", id="open-all"),
        tag("button", "close all", type="button", id="close-all"),
    ]
    return [tag("p", buttons, class_="fold", hidden=True), *cards]


def _glossary():
    return tag("dl", [tag("div", tag("dt", term), tag("dd", said)) for term, said in words.GLOSSARY], class_="glossary")


def _time(provenance):
    spent = words.time_line(provenance)
    return tag("p", f"Time: {spent}.") if spent else None


def _provenance(provenance):
    shown = {key: value for key, value in provenance.items() if key not in ("config", "seconds")}
    rows = [(key.replace("_", " "), _plain(value)) for key, value in shown.items()]
    seconds = provenance.get("seconds") or {}
    rows += [(f"seconds, {part}", words.amount(value)) for part, value in seconds.items()]
    table = tag(
        "tbody", [tag("tr", tag("th", shorten(k, 60), scope="row"), tag("td", shorten(v, 1000))) for k, v in rows]
    )
    parts = [
        tag("summary", "How this report was made"),
        tag("div", tag("table", table, class_="pairs"), class_="scroll"),
    ]
    config = provenance.get("config")
    if config is not None:
        text = config if isinstance(config, str) else json.dumps(config, indent=1, ensure_ascii=False)
        parts.append(tag("pre", join([join([line, Markup("\n")]) for line in text[:20000].split("\n")])))
    return tag("details", parts)


def _plain(value):
    """A provenance value on one line: lists of words joined, everything else as JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return " ".join(value)
    return json.dumps(value, ensure_ascii=False)
