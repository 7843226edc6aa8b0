"""What stands where on the page: its title, names and how they break, columns, the lineage section, empty reports."""

import re

import pytest

from jaxsub.report import html, markup, table, words


def cells(page):
    """(headings, rows) of the layer table, as text."""
    part = page.split('id="layer-table"', 1)[1].split("</table>", 1)[0]
    rows = [re.findall(r"<t[hd][ >].*?</t[hd]>", row, re.S) for row in part.split("<tr")[1:]]
    texts = [[re.sub("<[^>]*>", "", cell.replace("<br>", " ")).split(">", 1)[-1] for cell in row] for row in rows]
    return texts[0], texts[1:]


def section(page, anchor):
    return page.split(f'<section id="{anchor}">', 1)[1].split("</section>", 1)[0]


def test_title_and_heading_bear_the_collections_name(report, layer):
    given = report([layer()])
    given["collection"]["name"] = "a&b/" + "x" * 300
    page = html.render(given)
    title = re.search("<title>(.*?)</title>", page)[1]
    heading = re.search("<h1>(.*?)</h1>", page)[1]
    assert title.startswith("a&amp;b/x") and title.endswith("x · jaxsub report") and len(title) < 120
    assert re.sub("<[^>]*>", "", heading) == title.removesuffix(" · jaxsub report")
    assert words.summary(given) in page.split("</h1>")[1]


def test_a_report_without_a_name_is_headed_by_what_it_found(report, layer):
    page = html.render(report([layer()]))
    assert "<title>jaxsub report</title>" in page and f"<h1>{words.summary(report([layer()]))}</h1>" in page


@pytest.mark.parametrize(
    ("given", "pieces"),
    [
        ("hidden/kernel", ["hidden/", "kernel"]),
        ("mlp_extractor.net.2.weight", ["mlp_", "extractor.", "net.", "2.", "weight"]),
        ("a__b..c//", ["a__", "b..", "c//"]),
        ("w", ["w"]),
        ("", [""]),
    ],
)
def test_names_break_after_separators_alone(given, pieces):
    assert markup.name(given) == f'<bdi class="name">{"<wbr>".join(pieces)}</bdi>'


def test_a_single_long_word_may_break_inside():
    long = "backgroundTransform"
    assert markup.name(f"a.{long}") == f'<bdi class="name">a.<wbr><span class="long">{long}</span></bdi>'
    style = html._asset("style.css")
    assert re.search(r"\.name \{ overflow-wrap: normal; \}", style)
    assert re.search(r"\.name \.long \{ overflow-wrap: anywhere; \}", style)


def test_both_tables_show_the_same_held_out_figures_under_the_same_names(report, layer):
    given = report([layer("a", num_models=40), layer("b", num_models=12)])
    titles, rows = cells(html.render(given))
    start = titles.index("LOO(k)")
    assert titles[start : start + 4] == ["LOO(k)", "null LOO", "gain", "null gain"]
    lines = table.render(given).split("\n")
    assert lines[1].split()[-5:-1] == ["LOO(k)", "LOO", "gain", "gain"] and lines[0].split()[-3:] == ["null"] * 3
    for name, row in zip("ab", rows, strict=True):
        line = next(line for line in lines if line.startswith(f"{name} "))
        assert " ".join(row[start : start + 4]) in " ".join(line.split())


def test_columns_that_would_be_empty_are_left_out(report, layer):
    full = cells(html.render(report([layer(), layer(full=False)])))
    bare = cells(html.render(report([layer(full=False)])))
    assert full[0][-2:] == ["lineage", "flags"] and len(full[1][1]) == len(full[0])
    assert bare[0] == full[0][:-2] and len(bare[1][0]) == len(bare[0])


def test_key_and_members_stand_beside_the_picture(report, layer):
    part = section(html.render(report([layer()])), "lineages")
    beside = part.split('<div class="beside">', 1)[1]
    places = [
        beside.index(mark) for mark in ("2 lineages", 'class="picture"', 'class="key"', "<b>L1</b>", "<b>Start 1</b>")
    ]
    assert places == sorted(places)
    assert "run/<wbr>009" in beside and "<details" not in beside  # so few that all are shown
    style = html._asset("style.css")
    assert re.search(
        r"\.beside \{ display: grid; grid-template-columns: minmax\(0, 580px\) minmax\(18rem, 1fr\)", style
    )
    phone = style.split("@media (max-width: 860px)", 1)[1]
    assert ".beside, .beside.small { grid-template-columns: minmax(0, 580px);" in phone


def test_large_lineages_show_some_members_and_fold_the_rest(report, layer):
    given = report([layer()])
    given["collection"]["lineages"] = [[f"m{i}" for i in range(100)], ["a", "b"]]
    part = section(html.render(given), "lineages")
    assert ">m19</bdi>, and 80 more</summary>" in part and part.count(">m99<") == 1
    assert "</bdi>, <bdi" in part


def test_a_picture_without_lineages_is_small_and_has_no_margin(report, layer):
    given = report([layer()])
    given["collection"] |= {"lineages": [], "lora_starts": []}
    part = section(html.render(given), "lineages")
    assert 'class="beside small"' in part and 'viewBox="0 0 522 522"' in part


def test_a_report_of_nothing_claims_nothing():
    page = html.render({"schema": "jaxsub.report/1", "layers": [], "collection": {}})
    for claim in ("No copies", "every model and", "No two models", "open all"):
        assert claim not in page
    anchors = set(re.findall('<a href="#([^"]+)"', page))
    assert anchors == set(re.findall('<section id="([^"]+)"', page))


def test_a_single_card_needs_no_buttons_for_all(report, layer):
    assert "open-all" not in html.render(report([layer()])).split("<script>")[0]
    assert "open-all" in html.render(report([layer(f"l{i}") for i in range(4)])).split("<script>")[0]


NAMES = [f"encoder.{'x' * 90}.{i}.{'y' * 90}.weight" for i in (3, 7, 11)]


@pytest.mark.parametrize("limit", [20, 36, 52])
def test_names_that_would_be_cut_alike_show_where_they_differ(limit):
    shown = words.distinct([*NAMES, "short", NAMES[0]], limit, markup.shorten)
    assert len(set(shown)) == 4 and shown[0] == shown[4] and shown[3] == "short"
    assert all(len(name) <= limit for name in shown)
    assert all(f".{i}." in name or f"…{i}…" in name for i, name in zip((3, 7, 11), shown, strict=False))


def test_names_that_cannot_be_told_apart_are_cut_as_ever():
    names = ["a" * 99 + str(i) + "b" * 99 for i in range(3)]
    assert words.distinct(names, 12, markup.shorten) == [markup.shorten(name, 12) for name in names]


def test_long_names_that_differ_inside_are_told_apart_in_the_table(report, layer):
    _, rows = cells(html.render(report([layer(name) for name in [*NAMES, "head"]])))
    assert len({row[0] for row in rows}) == 4
