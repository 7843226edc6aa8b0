"""The page: nothing from the data becomes markup, figures are drawn where the axes say, missing parts stay out."""

import base64
import copy
import hashlib
import math
import re
import struct
import time
import unicodedata
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest

from jaxsub.report import fields, html, markup, png, svg, words

ELEMENTS = set(
    "html head meta title style body script main header section nav h1 h2 h3 p b i a dl dt dd div span bdi ul li table "
    "caption thead tbody tr th td details summary figure figcaption label input select option button pre br wbr "
    "svg path rect circle line text image".split()
)
ATTRIBUTES = set(
    "lang charset http-equiv content name class id open hidden href scope title type role placeholder autocomplete "
    "value aria-label aria-hidden data-sort data-text data-verdict viewbox d x y x1 x2 y1 y2 cx cy r width height "
    "text-anchor preserveaspectratio".split()
)
VOID = {"meta", "input", "br", "wbr"}


class Strict(HTMLParser):
    """Collects what a browser would see and fails on anything outside the lists or badly nested."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.stack, self.text, self.attributes, self.scripts = [], [], [], []
        self.titles, self.charts, self.ids = [], [], []
        self.feed(page)
        self.close()
        assert not self.stack

    def handle_starttag(self, tag, attrs):
        assert tag in ELEMENTS, tag
        for key, value in attrs:
            assert key in ATTRIBUTES, (tag, key)
            if key == "href":
                assert re.fullmatch(r"#[a-z0-9-]+|data:image/png;base64,[A-Za-z0-9+/=]+", value), value[:80]
            if key in ("id", "class"):
                assert re.fullmatch(r"[a-z0-9 -]+", value), value
            self.attributes.append((tag, key, value))
        assert len({key for key, _ in attrs}) == len(attrs), attrs
        self.ids += [value for key, value in attrs if key == "id"]
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.stack.pop()

    def handle_endtag(self, tag):
        assert self.stack and self.stack.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        inside = self.stack[-1] if self.stack else ""
        if inside == "script":
            self.scripts.append(data)
        elif inside == "title" and "svg" not in self.stack:
            self.titles.append(data)
        elif inside != "style":
            self.text.append(data)

    def handle_comment(self, data):
        raise AssertionError(f"comment {data!r}")

    def handle_pi(self, data):
        raise AssertionError(f"processing instruction {data!r}")

    def unknown_decl(self, data):
        raise AssertionError(f"declaration {data!r}")


def shown(page):
    """The text of a page, spaces joined."""
    return re.sub(r"\s+", " ", " ".join(Strict(page).text))


def test_hostile_names_stay_text(hostile, hostile_names):
    page = html.render(hostile)
    parsed = Strict(page)
    assert parsed.titles == ["</title></style></svg><h1>x</h1> · jaxsub report"]
    assert len(parsed.ids) == len(set(parsed.ids))
    text = "".join(parsed.text)
    for name in ('"><script>alert(1)</script>', "</title></style></svg><h1>x</h1>", "&lt;b&gt; &amp; ]]> <!-- -->"):
        assert name in text
    assert r"\u202egnp.live\u2066\x00\x1b[31m\r\n\t" in text
    assert r"\ud800 lone surrogate \u2028\u2029\ufeff\u200b" in text
    assert "日本語.重み" in text
    page.encode("utf-8")
    assert {c for c in page if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")} == {"\n"}
    assert "a" * 601 not in page


def test_the_walk_finds_a_payload_that_was_not_escaped(hostile):
    page = html.render(hostile).replace("&lt;img src=x onerror=alert(1)&gt;", "<img src=x onerror=alert(1)>", 1)
    with pytest.raises(AssertionError, match="img"):
        Strict(page)


def test_one_script_and_its_hash_is_in_the_policy(hostile):
    parsed = Strict(html.render(hostile))
    assert len(parsed.scripts) == 1
    policies = [value for tag, key, value in parsed.attributes if tag == "meta" and "default-src" in (value or "")]
    digest = base64.b64encode(hashlib.sha256(parsed.scripts[0].encode()).digest()).decode()
    assert len(policies) == 1
    rules = dict(rule.strip().split(" ", 1) for rule in policies[0].split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == f"'sha256-{digest}'"
    assert rules["img-src"] == "data:"
    assert rules["style-src"] == "'unsafe-inline'"
    assert "http:" not in html.render(hostile) and "https:" not in html.render(hostile)


def test_policy_comes_before_anything_it_governs(report, layer):
    page = html.render(report([layer()]))
    assert page.index("Content-Security-Policy") < min(
        page.index("<style"), page.index("<script"), page.index("<title")
    )


@pytest.mark.parametrize("full", [True, False])
def test_missing_parts_leave_no_trace(report, layer, full):
    given = report([layer(full=False)], full=full)
    text = shown(html.render(given))
    assert not re.search(r"\b(None|nan|NaN|inf|undefined)\b", text)
    assert "No null spectrum" in text


def test_a_report_of_nothing_is_a_page():
    text = shown(html.render({"schema": "jaxsub.report/1", "layers": [], "collection": {}}))
    assert "No layer was analysed" in text


def test_not_finite_figures_become_dashes(report, layer):
    broken = layer() | {"mean_energy": math.nan, "lineage_energy": math.inf}
    broken["singular_values"][3] = math.nan
    broken["held_out"]["2"] = math.nan
    broken["nulls"]["permutation"]["held_out_sd"]["2"] = math.inf
    given = report([broken])
    page = html.render(given)
    assert not re.search(r"\bnan\b|\binf\b", page.lower().split("<body>")[1].split("<script>")[0])
    assert math.isnan(broken["mean_energy"])  # the dictionary given is not changed


def test_input_is_not_changed(report, layer):
    given = report([layer()])
    before = copy.deepcopy(given)
    html.render(given)
    assert given == before


def test_rank_never_reached_is_said_and_is_not_the_cap(report, layer):
    cut = layer(full=False) | {"flags": ["saturated"]}
    cut["rank_at"] = {"0.5": 3, "0.9": None, "0.99": None}
    text = shown(html.render(report([cut])))
    assert text.count("not reached") >= 3
    assert "90 % is not reached" in text
    assert "39" not in re.findall(r"components for.*?Share of", text)[0].split()


@pytest.mark.slow
def test_three_hundred_layers_are_small_and_quick(report, layer):
    given = report([layer(f"blocks.{i}.attention.query.kernel", num_models=120) for i in range(300)], num_models=120)
    start = time.process_time()
    page = html.render(given)
    seconds = time.process_time() - start
    assert len(page) < 12e6
    assert seconds < 3
    cards = page.split('<details class="card"')[1:]
    assert len(cards) == 300
    assert max(len(card) for card in cards[:-1]) < 25e3
    assert sum(" open " in card[:200] for card in cards) == 2


def test_every_row_leads_to_a_card(report, layer):
    parsed = Strict(html.render(report([layer(f"layer{i}") for i in range(12)])))
    targets = {value[1:] for _, key, value in parsed.attributes if key == "href" and value.startswith("#")}
    assert {f"layer-{i}" for i in range(12)} <= targets <= set(parsed.ids)


def test_summary_counts_verdicts(report, layer):
    verdicts = ["lineage"] * 9 + ["chance"] * 2 + ["shared"]
    given = report([layer(verdict=verdict) for verdict in verdicts])
    sentence = words.summary(given)
    assert (
        sentence == "Of 12 layers, 1 has a shared subspace under one common start, 9 are explained by lineage alone "
        "and 2 are explained by chance."
    )
    assert sentence in shown(html.render(given))
    assert words.summary(report([layer(verdict="undetermined")])) == "The one layer is undetermined."


def test_shared_says_what_it_is_under(report, layer):
    one = layer(verdict="shared")
    several = layer(verdict="shared") | {"flags": []}
    assert "shared (1 start)" in shown(html.render(report([one])))
    assert "shared (1 start)" not in shown(html.render(report([several])))


def test_held_out_curve_is_where_its_axes_say(report, layer):
    """The heights of the observed dots, read off with the printed ticks alone, are LOO(k)."""
    given = layer(full=False)
    page = html.render(report([given]))
    chart = next(part for part in page.split("<svg") if "<title>Held-out error" in part)
    ticks = re.findall(r'<text x="[\d.]+" y="([\d.]+)" text-anchor="end">([\d.]+)</text>', chart)
    heights, values = np.array([[float(y) - 3.5, float(v)] for y, v in ticks]).T
    slope, start = np.polyfit(heights, values, 1)
    dots = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)" r="2.6" class="dot observed"', chart)
    read = [slope * float(cy) + start for _, cy in dots]
    np.testing.assert_allclose(read, [given["held_out"][k] for k in ("1", "2", "4", "8", "16", "32")], atol=0.004)
    across = np.diff([float(cx) for cx, _ in dots])
    np.testing.assert_allclose(across, across[0], atol=0.2)  # doublings are equal steps


def test_spectrum_stops_at_the_floor_and_says_so(layer, report):
    given = layer(full=False)
    given["floor"] = given["singular_values"][9] * 1.0001  # nine values above
    page = html.render(report([given]))
    chart = next(part for part in page.split("<svg") if "<title>Singular values" in part)
    path = re.findall(r'<path d="M([^"]+)" class="line observed"', chart)[0]
    assert len(path.split("L")) == 9
    assert "30 values under the floor not drawn" in shown(page)
    assert ">floor</text>" in chart


def test_charts_have_titles_and_no_reference_outside(report, layer):
    page = html.render(report([layer()]))
    for chart in page.split('<svg class="chart"')[1:]:
        assert chart.split(">", 1)[1].startswith("<title>")


def test_truncated_null_spectrum_is_not_taken_for_all_of_it(layer):
    given = fields.complete({"layers": [layer()]})["layers"][0]
    from jaxsub.report import layer_charts

    full = layer_charts._cumulative(given, given)
    assert full[-1][1] == pytest.approx(1)
    given["singular_values"] = given["singular_values"][:5]
    assert layer_charts._cumulative(given, given) == []
    given["total_energy"] = 2 * sum(v**2 for v in given["singular_values"])
    assert layer_charts._cumulative(given, given)[-1] == (5, pytest.approx(0.5))


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_curves_of_numbers_whose_squares_no_float_holds(layer, scale):
    from jaxsub.report import layer_charts

    given = fields.complete({"layers": [layer()]})["layers"][0]
    usual = layer_charts._cumulative(given, given)
    given["singular_values"] = [scale * value for value in given["singular_values"]]
    np.testing.assert_allclose(layer_charts._cumulative(given, given), usual)


def decode(uri):
    """(rows, columns, 4) of a palette PNG, chunk by chunk as the format says."""
    raw, place, chunks = base64.b64decode(uri.split(",", 1)[1]), 8, {}
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    while place < len(raw):
        (length,) = struct.unpack(">I", raw[place : place + 4])
        kind, content = raw[place + 4 : place + 8], raw[place + 8 : place + 8 + length]
        assert struct.unpack(">I", raw[place + 8 + length : place + 12 + length])[0] == zlib.crc32(kind + content)
        chunks[kind], place = content, place + 12 + length
    columns, rows, depth, colour = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    assert (depth, colour) == (8, 3)
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(rows, columns + 1)
    assert not lines[:, 0].any()
    palette = np.frombuffer(chunks[b"PLTE"], np.uint8).reshape(-1, 3)
    alpha = np.frombuffer(chunks[b"tRNS"], np.uint8)
    return np.concatenate([palette[lines[:, 1:]], alpha[lines[:, 1:]][..., None]], axis=-1)


def test_png_shows_sign_and_size():
    values = np.array([[1.0, 0.0, -1.0], [0.5, math.nan, -0.25], [2.0, 0.004, -3.0]])
    pixels = decode(png.data_uri(values))
    want = np.abs(np.clip(np.nan_to_num(values), -1, 1))
    np.testing.assert_allclose(pixels[..., 3] / 255, want, atol=0.006)  # half a level of 255, and of opacity
    assert tuple(pixels[0, 0, :3]) == png.POSITIVE and tuple(pixels[0, 2, :3]) == png.NEGATIVE


def test_lineage_picture_follows_the_order(report, layer):
    """Blocks of one lineage stay together when models are stored shuffled and `order` sorts them."""
    given = report([layer()])
    cosine, shuffle = given["collection"]["cosine"], np.random.default_rng(0).permutation(40)
    sorted_matrix = np.array(cosine["matrix"])
    cosine["ids"] = [cosine["ids"][i] for i in shuffle]
    cosine["matrix"] = sorted_matrix[np.ix_(shuffle, shuffle)].tolist()
    cosine["order"] = np.argsort(shuffle).tolist()
    page = html.render(given)
    uri = re.search(r'<image href="(data:[^"]+)" x="62"', page).group(1)
    np.testing.assert_allclose(decode(uri)[..., 3] / 255, sorted_matrix, atol=0.006)
    assert page.count('class="bracket"') == 2


@pytest.mark.parametrize(
    ("low", "high", "want"),
    [(0, 1, ["0", "0.2", "0.4", "0.6", "0.8", "1"]), (0, 121, ["0", "25", "50", "75", "100"]), (0, 3, None)],
)
def test_ticks_are_round(low, high, want):
    ticks = svg.linear("", low, high).ticks
    assert want is None or [text for _, text in ticks] == want
    assert all(low <= value <= high + 1e-9 for value, _ in ticks) and 3 <= len(ticks) <= 8


@pytest.mark.parametrize(("low", "high"), [(0.9, 1.1), (0.1, 3), (2, 60), (1e-9, 1e4), (3.3, 3.4)])
def test_logarithmic_ticks_lie_inside(low, high):
    ticks = svg.logarithmic("", low, high).ticks
    assert 2 <= len(ticks) <= 9
    assert all(low * 0.99 <= value <= high * 1.01 for value, _ in ticks)


def test_components_are_whole_numbers():
    assert [text for _, text in svg.counts("", 3).ticks] == ["0", "1", "2", "3"]


def test_end_labels_do_not_overlap():
    x, y = svg.linear("", 0, 1), svg.linear("", 0, 1)
    lines = [svg.Line([(0, 0), (1, 0.01 * i)], "observed", f"line {i}") for i in range(5)]
    chart = svg.chart("t", x, y, lines)
    places = sorted(float(p) for p in re.findall(r'y="([\d.]+)" class="label', chart))
    assert len(places) == 5
    assert min(np.diff(places)) >= 12
    assert places[-1] <= svg.Frame().height


def test_long_lines_keep_both_ends():
    points = [(i, i * i) for i in range(5000)]
    kept = svg.thin(points)
    assert len(kept) == 100 and kept[:30] == points[:30] and kept[-1] == points[-1]
    assert kept == sorted(set(kept))


def test_text_is_escaped_once_and_markup_not_at_all():
    inner = markup.tag("b", 'a<"')
    assert inner == "<b>a&lt;&quot;</b>"
    assert markup.tag("p", inner, " & ", None, title='"') == '<p title="&quot;"><b>a&lt;&quot;</b> &amp; </p>'


@pytest.mark.parametrize("limit", [8, 20, 56])
def test_shortened_names_keep_their_end(limit):
    cut = markup.shorten("layers.11." + "x" * 300 + ".weight", limit)
    assert len(cut) == limit and cut.endswith("ght") and cut.startswith("la")


@pytest.mark.parametrize(
    ("names", "want"),
    [
        (["model.layers.0.q", "model.layers.0.k", "model.layers.1.q"], "model.layers."),
        (["a.0", "a.1", "a.2"], ""),
        (["model.layers.0.q", "model.layers.0.k"], ""),
        (["encoder/a", "encoder/b", "decoder/a"], ""),
    ],
)
def test_common_start_of_names(names, want):
    assert words.common_prefix([{"name": name} for name in names]) == want


def test_figures_as_written():
    assert [words.percent(x) for x in (0.0945, 1.0, 0.0001, 0.0, None)] == ["9.4%", "100.0%", "<0.1%", "0.0%", "-"]
    assert [words.rank(x) for x in (66.0, 66.4, 3.5, 0, None)] == ["66", "66", "3.5", "0", "not reached"]
    assert [words.ratio(x) for x in (0.7654, -0.0001, -0.25, None)] == ["0.765", "0.000", "-0.250", "-"]


def test_deciding_rank_and_null(layer):
    def decide(**changes):
        return fields.complete({"layers": [layer() | changes]})["layers"][0]

    assert [fields.deciding_rank(decide(num_models=n)) for n in (3, 4, 10, 17, 18, 34, 500)] == [
        None,
        1,
        4,
        4,
        8,
        16,
        16,
    ]
    assert fields.deciding_rank(decide(num_models=500, num_distinct=10)) == 4
    assert fields.deciding_null(decide())[0] == "permutation"
    assert fields.deciding_null(decide(gain={"null_name": "gaussian"}))[0] == "gaussian"
    assert fields.deciding_null(decide(nulls={}))[0] == ""
