"""The terminal table: it fits, it is ASCII, every layer is in it or counted."""

import math
import re

import pytest

from jaxsub.report import table, words


def body(text):
    """Rows of the table: the lines after the rule, up to the first empty line."""
    lines = text.split("\n")
    start = next(i for i, line in enumerate(lines) if line.startswith("---")) + 1
    return lines[start : lines.index("", start)]


def headings(text):
    """Titles of the columns, put together from the lines above the rule."""
    lines = text.split("\n")
    rule = next(i for i, line in enumerate(lines) if line.startswith("---"))
    above = [line for line in lines[:rule] if line and not line.startswith("All names")]
    ends = [0, *[match.end() for match in re.finditer("-+", lines[rule])]]
    return [
        " ".join(" ".join(line[start:end] for line in above).split())
        for start, end in zip(ends, [*ends[1:-1], None], strict=False)
    ]


@pytest.mark.parametrize("width", [1, 2, 5, 13, 20, 39, 40, 60, 79, 80, 100, 140, 300])
def test_hostile_names_fit_and_are_ascii(hostile, width):
    text = table.render(hostile, width)
    assert max(map(len, text.split("\n"))) <= width
    assert text.isascii()
    assert {c for c in text if ord(c) < 32} <= {"\n"}


@pytest.mark.parametrize("count", [0, 1, 40, 41, 300])
@pytest.mark.parametrize("full", [True, False])
def test_any_number_of_layers_fits_a_hundred_columns(report, layer, count, full):
    layers = [layer(f"model.blocks.{i}." + "very_long_name_" * 8 + "kernel", full=full) for i in range(count)]
    text = table.render(report(layers, full=full))
    assert max(map(len, text.split("\n"))) <= 100
    assert "None" not in text and "nan" not in text


def test_a_row_holds_the_layers_figures(report, layer):
    given = layer("fc1/kernel", num_models=40)
    text = table.render(report([given]))
    row = body(text)[0].split()
    null = given["nulls"]["permutation"]
    errors = [given["held_out"]["16"], null["held_out"]["16"]]
    figures = [f"{value:.3f}" for value in (*errors, 1 - errors[0], 1 - errors[1])]
    ranks = [str(given["rank_at"]["0.9"]), str(null["rank_at"]["0.9"])]
    assert row == ["fc1/kernel", "64x32", "40", "47.1%", "2.5%", *ranks, *figures, "lineage+shared"]
    assert headings(text)[-5:] == ["LOO(16)", "null LOO", "gain", "null gain", "verdict"]


def test_layers_that_differ_in_k_name_it(report, layer):
    text = table.render(report([layer("a", num_models=40), layer("b", num_models=12)]))
    assert "LOO(k)" in headings(text)
    assert [re.search(r"(\d+): 0\.", line).group(1) for line in body(text)] == ["16", "4"]


def test_rank_not_reached_is_never_a_number(report, layer):
    cut = layer(full=False)
    cut["rank_at"]["0.9"] = None
    assert "never" in body(table.render(report([cut])))[0].split()


def test_not_finite_figures_are_dashes(report, layer):
    text = table.render(report([layer(full=False) | {"mean_energy": math.nan, "mean_energy_chance": math.inf}]))
    assert "nan" not in text and "inf" not in text
    assert body(text)[0].split()[3:5] == ["-", "-"]


def test_many_layers_are_grouped_and_all_counted(report, layer):
    verdicts = ["shared"] * 30 + ["chance"] * 11 + ["lineage"] * 4
    text = table.render(report([layer(f"l{i}", verdict=v) for i, v in enumerate(verdicts)]))
    listed = [line for line in text.split("\n") if re.match(r"l\d+ ", line)]
    left_out = [int(n) for n in re.findall(r"^\.\.\. and (\d+) more$", text, re.M)]
    assert len(listed) + sum(left_out) == 45
    assert len(listed) == 6 + 6 + 4
    assert "shared: 30 layers" in text and "lineage: 4 layers" in text


def test_forty_layers_are_all_shown(report, layer):
    text = table.render(report([layer(f"l{i}") for i in range(40)]))
    assert len(body(text)) == 40


def test_long_names_keep_their_ends(report, layer):
    names = [f"encoder.{'x' * 90}.{end}" for end in ("query", "value")]
    rows = body(table.render(report([layer(name) for name in names])))
    assert [row.split()[0][:5] for row in rows] == ["encod"] * 2
    assert [row.split()[0][-5:] for row in rows] == ["query", "value"]


def test_common_start_is_said_once(report, layer):
    text = table.render(report([layer(f"base_model.model.layers.{i}.q") for i in range(3)]))
    assert text.count("base_model.model.layers.") == 1
    assert [row.split()[0] for row in body(text)] == ["0.q", "1.q", "2.q"]


def test_collection_lines(report, layer):
    text = table.render(report([layer(verdict="shared")]), 300)
    assert "42 models, 40 distinct." in text
    assert "identical: run/000, copy/a, copy/b" in text
    assert "near copies, cosine 0.9961: run/001, run/002" in text
    assert "lineage 1, 10 models: run/000, run/001, run/002, run/003, and 6 more" in text
    assert "set aside: broken: cut short" in text
    assert "not analysed, 1 layer (fewer than 3 models): head" in text
    assert "shared (1 start) (1): all models come from one start" in text
    assert "The one layer has a shared subspace under one common start." in text


def test_narrow_terminals_keep_name_and_verdict(report, layer):
    head = headings(table.render(report([layer()]), 40))
    assert head[0] == "layer" and head[-1] == "verdict"


def test_long_names_that_differ_inside_are_told_apart(report, layer):
    """Cut in the middle all would read alike; a common start is said once, so one layer has another."""
    names = [f"{'encoder' * 9}.{i}.{'attention' * 9}" for i in (3, 4, 15)]
    rows = body(table.render(report([layer(name) for name in [*names, "head"]])))
    shown = [row.split()[0] for row in rows]
    assert len(set(shown)) == 4
    assert all(f".{i}." in row for i, row in zip((3, 4, 15), shown, strict=False))


@pytest.mark.parametrize("length", [3, 20, 60])
def test_all_held_out_figures_fit_a_hundred_columns(report, layer, length):
    layers = [
        layer(f"{i}" * length, verdict="lineage+shared", num_models=40 + i) | {"shape": [1536, 32]} for i in (1, 2)
    ]
    text = table.render(report(layers))
    assert [t for t in headings(text) if "LOO" in t or "gain" in t] == ["LOO(16)", "null LOO", "gain", "null gain"]


@pytest.mark.parametrize("limit", [21, 28, 37])
def test_columns_of_names_tell_every_two_apart(limit):
    llama = [f"model.layers.{i}.self_attn.{p}_proj.weight" for i in range(32) for p in "qkvo"]
    whole = [*llama, *(f"model.layers.{i}.mlp.{p}_proj.weight" for i in range(32) for p in ("gate", "up")), "lm_head"]
    for names in (llama, whole, ["x" * 3000 + str(i) for i in range(20)], ["a", "b", "a"]):
        found = words.columns(names, limit)
        assert len({*found}) == len({*names}) and {len(one) for one in found} == {limit}
    assert words.columns(llama, limit)[0].strip() == "..0.self_attn.q_proj"
    assert words.columns(["a", "a ", "b"], 8) == ["a~1     ", "a~2     ", "b       "]  # blanks at an end are not seen
