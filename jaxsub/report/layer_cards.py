"""One expandable card a layer: the sentence that decided, the charts, the figures."""

from . import collection_parts, fields, layer_charts, words
from .markup import join, name, shorten, tag

_CHIPS = {
    "shared": "v-shared",
    "lineage+shared": "v-both",
    "lineage": "v-lineage",
    "common_mean": "v-mean",
    "chance": "v-chance",
}


def chip_class(verdict):
    """The style class of a verdict's colour; verdicts not known are drawn like `undetermined`."""
    return _CHIPS.get(verdict, "v-open")


def chip(verdict, label=""):
    """A verdict as a coloured label; the word carries the meaning, the colour only helps."""
    return tag("span", tag("i"), shorten(label or verdict, 40), class_=f"chip {chip_class(verdict)}")


def card(position, layer, is_open):
    """The <details> of a layer; `position` is its place in the report, which makes its anchor."""
    size = f"{words.shape(layer['shape'])} · {words.plural(fields.models_used(layer), 'model')}"
    head = tag(
        "summary",
        chip(layer["verdict"], words.verdict_label(layer)),
        name(layer["name"], 72),
        tag("span", shorten(size, 60), class_="meta"),
    )
    figures = [tag("figure", chart, tag("figcaption", caption)) for caption, chart in layer_charts.charts(layer)]
    body = [
        tag("p", shorten(layer["name"], 600), class_="whole") if len(layer["name"]) > 72 else None,
        tag("p", shorten(layer["why"], 1200), class_="why") if layer["why"] else None,
        _remarks(layer),
        collection_parts.members("L", layer["own_lineages"]) if layer["own_lineages"] else None,
        tag("div", figures, class_="charts"),
        tag("div", _held_out_table(layer), _rank_table(layer), _other_figures(layer), class_="figures"),
    ]
    content = tag("div", [part for part in body if part is not None], class_="body")
    text = f"{layer['name']} {' '.join(map(str, layer['flags']))}"
    return tag(
        "details",
        head,
        content,
        class_="card",
        id=f"layer-{position}",
        open=is_open,
        data_verdict=layer["verdict"],
        data_text=shorten(text, 600).lower(),
    )


def _remarks(layer):
    items = [
        tag("li", tag("b", shorten(flag, 60)), ": ", words.FLAGS[flag])
        for flag in layer["flags"]
        if flag in words.FLAGS
    ]
    items += [tag("li", tag("b", shorten(flag, 60))) for flag in layer["flags"] if flag not in words.FLAGS]
    items += [tag("li", shorten(warning, 600)) for warning in layer["warnings"]]
    return tag("ul", items, class_="remarks") if items else None


def _table(caption, header, rows):
    """A figures table; the first cell of each row is its heading. Rows of dashes alone are left out."""
    kept = [row for row in rows if any(cell != "-" for cell in row[1:])]
    if not kept:
        return None
    head = tag("tr", [tag("th", cell, scope="col") for cell in header])
    body = [tag("tr", tag("th", row[0], scope="row"), [tag("td", cell) for cell in row[1:]]) for row in kept]
    table = tag("table", tag("caption", caption), tag("thead", head), tag("tbody", body))
    return tag("div", table, class_="scroll")


def _held_out_table(layer):
    counts = [f"{k:.0f}" for k, _ in fields.by_count(layer["held_out"])]
    hardest = fields.deciding_null(layer)[1]
    rows = [("LOO(k)", *_errors(layer["held_out"], counts))]
    for title, null in layer["nulls"].items():
        rows.append((_null_title(title, null), *_errors(null["held_out"], counts)))
        if null is hardest:  # the spread of the others is in report.json
            rows.append(("sd over draws", *_spreads(null["held_out_sd"], counts)))
    if layer["held_out_within"]:
        title, null = fields.within_null(layer)
        rows.append(("within lineages", *_errors(layer["held_out_within"], counts)))
        rows.append((f"within, {shorten(title, 24)} null", *_errors(null["held_out_within"], counts)))
        rows.append(("sd over draws", *_spreads(null["held_out_within_sd"], counts)))
    rows.append(("lineage left out", *_errors(layer["held_out_lineage"], counts)))
    return _table("Held-out error; nulls: mean over draws", ["k", *counts], rows)


def _null_title(title, null):
    same = null["drawn_as"] not in ("", title)
    return f"{shorten(title, 24)} null" + f" (here the {shorten(null['drawn_as'], 24)} null)" * same


def _errors(figures, counts):
    return [words.ratio(figures.get(k)) for k in counts]


def _spreads(figures, counts):
    return [words.spread(figures.get(k)) for k in counts]


def _rank_table(layer):
    shares = sorted(layer["rank_at"], key=float)
    header = ["components for", *[f"{100 * float(share):.0f}%" for share in shares]]
    rows = [("observed", *_ranks(layer, shares))]
    rows += [(_null_title(title, null), *_ranks(null, shares)) for title, null in layer["nulls"].items()]
    rows += [(f"axis {mode['axis']} (of {mode['size']})", *_ranks(mode, shares)) for mode in layer["modes"]]
    ranks = _table("Fewest components that hold a share of the centred energy", header, rows)
    counts = [f"{k:.0f}" for k, _ in fields.by_count(layer["energy_at"])]
    rows = [("observed", *_shares(layer, counts))]
    rows += [(_null_title(title, null), *_shares(null, counts)) for title, null in layer["nulls"].items()]
    rows += [(f"axis {mode['axis']} (of {mode['size']})", *_shares(mode, counts)) for mode in layer["modes"]]
    energies = _table("Share of the centred energy in the first k components", ["k", *counts], rows)
    return join([table for table in (ranks, energies) if table is not None])


def _ranks(figures, shares):
    if not figures["rank_at"]:
        return ["-"] * len(shares)
    return [words.rank(figures["rank_at"].get(share)) for share in shares]


def _shares(figures, counts):
    return [words.percent(figures["energy_at"].get(k)) for k in counts]


def _other_figures(layer):
    null_name, null = fields.deciding_null(layer)
    k = fields.deciding_rank(layer)
    rows = [
        ("k that decides", words.count(k)),
        ("hardest null", shorten(null_name, 24) or "-"),
        ("weights in the layer, D", words.count(layer["num_features"])),
        ("distinct models, N", words.count(fields.models_used(layer))),
        ("parametrisation", layer["parametrisation"]),
        ("energy in the mean", words.percent(layer["mean_energy"])),
        ("the same, unrelated models (chance)", words.percent(layer["mean_energy_chance"])),
        (f"the same, {shorten(null_name, 24)} null", words.percent(null["mean_energy"])),
        ("energy in the lineage means", words.percent(layer["lineage_energy"])),
        ("the same of unrelated models", words.percent(layer["lineage_energy_chance"])),
        ("components above the Marchenko-Pastur edge", words.count(layer["mp_count"])),
        ("floor of the singular values", words.amount(layer["floor"])),
        ("stored as", layer["storage_dtype"] or "-"),
        ("computed in", layer["compute_dtype"] or "-"),
    ]
    rows += [
        (f"effective rank, {shorten(title, 40)}", words.amount(value))
        for title, value in layer["effective_rank"].items()
    ]
    pairs = [
        tag("tr", tag("th", title, scope="row"), tag("td", shorten(value, 60))) for title, value in rows if value != "-"
    ]
    table = tag("table", tag("caption", "Other figures"), tag("tbody", pairs), class_="pairs")
    return tag("div", table, class_="scroll")


def most_telling(layers, limit=2):
    """Positions of the layers whose held-out gain beats the null's by most: the cards that start open."""

    def advantage(position):
        gain, null_gain, _ = fields.gains(layers[position])
        if gain is None or layers[position]["verdict"] == "undetermined":
            return -1.0
        return gain - (null_gain or 0)

    ordered = sorted(range(len(layers)), key=lambda position: (-advantage(position), position))
    return set(ordered[:limit])
