"""The report as a plain table for a terminal: ASCII, no colour, never wider than asked.

One row a layer; more than forty layers are grouped by verdict and the first of each group shown.
"""

import collections
import textwrap

from ..errors import plain, quote
from . import fields, words

_GROUP_FROM = 40  # layers; above it, equal verdicts are grouped
_ROWS_A_GROUP = 6
_LISTED = 5  # lineages, groups of copies, models set aside, each on a line
_MIN_NAME = 12

# Column: (heading, aligned right, order in which columns give way when the terminal is narrow; 0 stays).
_COLUMNS = [
    ("layer", False, 0),
    ("shape", False, 3),
    ("N", True, 7),
    ("mean", True, 4),
    ("chance", True, 2),
    ("k90", True, 6),
    ("null k90", True, 1),
    ("LOO", True, 8),
    ("null LOO", True, 5),
    ("gain", True, 10),
    ("null gain", True, 9),
    ("verdict", False, 11),
]
_HELD_OUT = slice(7, 11)


def render(report, width=100):
    """The table, the summary and what it means, as lines of at most `width` characters.

    Args:
        report: dictionary as report.json; optional parts may be missing.
        width: characters a line; under about 40 only the name is left of the columns.

    Returns:
        ASCII text without a final newline.
    """
    width = max(int(width), 1)
    summary = words.summary(report)
    report = fields.complete(report)
    layers, collection = report["layers"], report["collection"]
    lines = _layer_lines(layers, width) if layers else []
    lines += ["", *_wrap(summary, width), *_meanings(layers, width)]
    said = quote(collection["summary"], 600)
    if said and said != summary:
        lines += _wrap(said, width)
    lines += ["", *_collection_lines(collection, width)]
    spent = words.time_line(report["provenance"])
    lines += _wrap(f"time: {spent}", width, "  ") if spent else []
    return "\n".join(line.rstrip()[:width] for line in lines).strip("\n")


def _layer_lines(layers, width):
    if len(layers) <= _GROUP_FROM:
        shown, groups = layers, [(None, layers)]
    else:
        groups = [
            (v, [x for x in layers if x["verdict"] == v]) for v, _ in fields.verdict_counts(layers, words.VERDICTS)
        ]
        shown = [layer for _, group in groups for layer in group[:_ROWS_A_GROUP]]
    prefix = words.common_prefix(layers)
    titles = [title for title, _, _ in _COLUMNS]
    rank = fields.one_rank(layers)
    titles[_HELD_OUT] = words.held_out_titles(rank)
    upper, lower = zip(*[title.rpartition(" ")[::2] for title in titles], strict=True)  # "null" above "k90"
    rows = [_cells(layer, prefix, rank) for layer in shown]
    columns, widths, gap = _fit([upper, lower, *rows], width)
    names = words.distinct([row[0] for row in rows], widths[0])
    cells = {id(layer): [name, *row[1:]] for layer, name, row in zip(shown, names, rows, strict=True)}

    def row(values):
        parts = [
            values[c].rjust(w) if _COLUMNS[c][1] else words.cut(values[c], w).ljust(w)
            for c, w in zip(columns, widths, strict=True)
        ]
        return gap.join(parts)

    heading = [row(lower)] if not any(upper[c] for c in columns) else [row(upper), row(lower)]
    lines = [*heading, gap.join("-" * w for w in widths)]
    for verdict, group in groups:
        part = group if verdict is None else group[:_ROWS_A_GROUP]
        if verdict is not None:
            lines += ["", f"{quote(verdict, 40)}: {words.plural(len(group), 'layer')}"]
        lines += [row(cells[id(layer)]) for layer in part]
        if len(part) < len(group):
            lines.append(f"... and {words.plural(len(group) - len(part), 'more', 'more')}")
    if prefix:
        lines = [*_wrap(f"All names start with {quote(prefix, 300)}, left out below.", width), "", *lines]
    return lines


def _cells(layer, prefix, rank):
    """The texts of a layer's row; `rank` is the k that decides in all layers, or None."""
    null = fields.deciding_null(layer)[1]
    return [
        quote(layer["name"].removeprefix(prefix), 2000),
        words.cut(quote(words.shape(layer["shape"])), 13),
        words.count(fields.models_used(layer)),
        words.percent(layer["mean_energy"]),
        words.percent(layer["mean_energy_chance"]),
        _rank(layer["rank_at"]),
        _rank(null["rank_at"]),
        *words.held_out_figures(layer, rank),
        words.cut(quote(words.verdict_label(layer)), 16),
    ]


def _rank(rank_at):
    return words.rank(rank_at.get("0.9"), "never") if rank_at else "-"


def _fit(rows, width):
    """(columns kept, their widths, gap): drops columns, least needed first, until the name has room."""
    columns = list(range(len(_COLUMNS)))
    wanted = [max(len(row[c]) for row in rows) for c in columns]
    least = min(wanted[0], _MIN_NAME)
    gap = "  " if _room(columns, wanted, width, 2) >= min(wanted[0], 36) else " "
    while len(columns) > 1 and _room(columns, wanted, width, len(gap)) < least:
        columns.remove(min(columns[1:], key=lambda c: _COLUMNS[c][2]))
    room = max(min(_room(columns, wanted, width, len(gap)), wanted[0]), 1)
    return columns, [room, *[wanted[c] for c in columns[1:]]], gap


def _room(columns, wanted, width, gap):
    """Characters left for the name."""
    return width - sum(wanted[c] + gap for c in columns[1:])


def _wrap(text, width, indent=""):
    text = text.encode("ascii", "backslashreplace").decode("ascii")
    if width <= len(indent) + 1:
        return [text[:width]]
    return textwrap.wrap(text, width, subsequent_indent=indent, break_on_hyphens=False) or [""]


def _meanings(layers, width):
    lines = []
    for verdict, number in fields.verdict_counts(layers, words.VERDICTS):
        said = words.VERDICTS.get(verdict, "")
        lines += _wrap(f"{quote(verdict, 40)} ({number}): {said}", width, "  ")
    single = sum(words.verdict_label(layer) == "shared (1 start)" for layer in layers)
    if single:
        lines += _wrap(f"shared (1 start) ({single}): {words.FLAGS['one_lineage']}.", width, "  ")
    for flag in (
        "coordinate_spread",
        "one_model",
        "own_lineages",
    ):  # which a claim, or its absence, should not be read without
        number = sum(flag in layer["flags"] for layer in layers)
        if number:
            lines += _wrap(f"{flag} ({number}): {words.FLAGS[flag]}.", width, "  ")
    return lines


def _collection_lines(collection, width):
    lines = []
    models = f"{words.plural(collection['num_models'], 'model')}, {words.count(collection['num_distinct'])} distinct."
    lines += _wrap(models, width)
    for group in collection["duplicates"][:_LISTED]:
        lines += _wrap("identical: " + _ids(group), width, "  ")
    lines += _more(collection["duplicates"], "groups of copies")
    for first, second, cosine in collection["near_duplicates"][:_LISTED]:
        lines += _wrap(f"near copies, cosine {words.ratio(cosine, 4)}: {_ids([first, second])}", width, "  ")
    lines += _more(collection["near_duplicates"], "pairs of near copies")
    for i, group in enumerate(collection["lineages"][:_LISTED]):
        lines += _wrap(f"lineage {i + 1}, {words.plural(len(group), 'model')}: {_ids(group)}", width, "  ")
    lines += _more(collection["lineages"], "lineages")
    for item in collection["quarantined"][:_LISTED]:
        where = f", {quote(item['layer'], 60)}" if item["layer"] is not None else ""
        lines += _wrap(f"set aside: {quote(item['id'], 60)}{where}: {quote(item['reason'], 200)}", width, "  ")
    lines += _more(collection["quarantined"], "set aside")
    skipped = collections.defaultdict(list)
    for layer in collection["skipped_layers"]:
        skipped[layer.get("reason") or "no reason given"].append(layer["name"])
    for reason, names in list(skipped.items())[:_LISTED]:
        said = f"not analysed, {words.plural(len(names), 'layer')} ({quote(reason, 100)}): {_ids(names)}"
        lines += _wrap(said, width, "  ")
    lines += _more(list(skipped), "reasons why layers are not analysed")
    if collection["identical_layers"]:
        names = collection["identical_layers"]
        lines += _wrap(f"identical in all models, {words.plural(len(names), 'layer')}: {_ids(names)}", width, "  ")
    if collection["untrained"]:
        lines += _wrap(f"look untrained: {_ids(collection['untrained'])}", width, "  ")
    for warning in collection["warnings"][:_LISTED]:
        lines += _wrap(f"warning: {words.cut(plain(warning), 300)}", width, "  ")
    return lines + _more(collection["warnings"], "warnings")


def _ids(ids, most=4):
    listed = ", ".join(words.cut(quote(item), 48) for item in ids[:most])
    return listed + (f", and {len(ids) - most} more" if len(ids) > most else "")


def _more(items, noun):
    return [f"... and {len(items) - _LISTED} more {noun}"] if len(items) > _LISTED else []
