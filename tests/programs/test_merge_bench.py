"""`jaxsub merge --bench`: equal numbers of evaluations, tuning apart from the test, what intervals say, going on."""

import dataclasses
import importlib
import io
import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest

from jaxsub import errors
from jaxsub.cli import flags, merge as cli
from jaxsub.formats import safetensors
from jaxsub.pipelines import (
    intervals,
    merge,
    merge_bench,
    merge_bench_case as cases,
    merge_bench_processes as processes,
    merge_bench_space as space,
    merge_bench_table as tables,
)

LINES = ("mean", "subspace_mean", "task_arithmetic scaling=0..1", "ties scaling=0..2 density=.1..1", "model_stock")


# Candidates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [text for text in merge_bench.METHODS if "=" in text])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_every_tuned_method_has_the_same_number_of_candidates(text, count):
    method = space.parse(text)
    found = method.candidates(count, 0)
    assert len(found) == (count if method.tuned else 1)
    assert found[0] == dataclasses.replace(method.module.Options(), **method.fixed)
    for name, own in method.tuned.items():
        if isinstance(own, tuple):
            assert len({getattr(one, name) for one in found[1:]}) == min(len(own), count - 1)
            continue
        values = sorted(getattr(one, name) for one in found[1:])
        width = (own.high - own.low) / max(count - 1, 1)
        for number, value in enumerate(values):  # one in every part of the range
            assert number * width <= (value - own.low) * (1 + 1e-3) + 1e-3 and value <= own.low + (number + 1) * width
    assert found == method.candidates(count, 0)
    if count == 7 and len(method.tuned) > 1:
        assert found != method.candidates(count, 1)


def test_choices_are_taken_as_often_as_one_another():
    method = space.parse("sums:ties function=mean|sum density=.1|.2|.5 scaling=.3")
    assert (method.label, method.name, method.fixed) == ("sums", "ties", {"scaling": 0.3})
    found = method.candidates(13, 0)[1:]
    assert [sum(o.function == f for o in found) for f in ("mean", "sum")] == [6, 6]
    assert [sum(o.density == d for o in found) for d in (0.1, 0.2, 0.5)] == [4, 4, 4]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tis", "ties"),
        ("ties densty=.1", "density"),
        ("ties density=.1 density=.2", "given twice"),
        ("ties density=1..0", "a range is low..high"),
        ("ties density=0..inf", "a range is low..high"),
        ("concrete steps=1..9", "whole numbers"),
        ("ties density=a|b", "a number expected"),
    ],
)
def test_lines_that_say_nothing_are_refused(text, said):
    with pytest.raises(errors.ConfigError, match=said):
        space.parse(text)


def test_labels_are_different():
    with pytest.raises(errors.ConfigError, match="stands twice"):
        space.parse_all(["ties density=.1", "ties"])


# What differences are real ----------------------------------------------------------------------------------------


def test_interval_of_a_difference_equals_a_bootstrap_in_loops():
    rng = np.random.default_rng(3)
    first = rng.uniform(0.4, 0.9, (4, 3))
    second = first - rng.normal(0.05, 0.1, (4, 3))
    found = tables.compared("a", "b", first, second)
    draws = []
    for _ in range(4000):
        zoos = rng.integers(4, size=4)
        draws.append(np.mean([np.mean([(first - second)[z, rng.integers(3)] for _ in range(3)]) for z in zoos]))
    assert found["difference"] == pytest.approx(np.mean(first - second), abs=1e-12)
    middle, widened = np.mean(first - second), (4 / 3) ** 0.5 * 3.18245 / 1.95996  # t with 3 degrees of freedom
    wanted = middle + widened * (np.quantile(draws, [0.025, 0.975]) - middle)
    assert (found["low"], found["high"]) == pytest.approx(wanted, abs=0.3 * np.std(draws))
    alone = tables.interval(first)
    assert found["high"] - found["low"] != pytest.approx(alone[2] - alone[1], rel=0.1)  # of differences, not of scores


@pytest.mark.parametrize("zoos", [3, 5])
def test_equal_methods_seldom_seem_to_differ(zoos, monkeypatch):
    monkeypatch.setattr(intervals, "DRAWS", 400)
    rng, count = np.random.default_rng(zoos), 300
    for share in (0.0, 0.5, 1.0):  # of the difference's variance that all tasks of a zoo have together
        wrong = {"widened": 0, "plain": 0}
        for _ in range(count):
            common, own = rng.normal(size=(zoos, 1)), rng.normal(size=(zoos, 8))
            x = share**0.5 * common + (1 - share) ** 0.5 * own
            for name, (low, high) in (("widened", tables.interval(x)[1:]), ("plain", intervals._bootstrap(x))):
                wrong[name] += not low <= 0 <= high
        assert wrong["widened"] <= 0.05 * count + 3 * (0.05 * 0.95 * count) ** 0.5
    assert wrong["plain"] > 0.1 * count  # of what is the same in all tasks of a zoo


def test_words_for_differences():
    rng = np.random.default_rng(0)
    base, noise = rng.uniform(0.3, 0.9, (5, 8)), rng.normal(0, 0.05, (5, 8))
    noise -= noise.mean()
    verdict = lambda x, y: tables.compared("x", "y", x, y)["verdict"]  # noqa: E731
    assert verdict(base + 0.1 + noise, base) == "better" and verdict(base, base + 0.1 + noise) == "worse"
    assert verdict(base + noise, base) == "unclear" and verdict(base, base) == "identical"


def test_a_difference_of_one_zoo_alone_is_unclear():
    difference = np.zeros((5, 8))
    difference[0] = 0.5  # 40 runs, but one independent draw
    assert tables.compared("x", "y", difference, np.zeros((5, 8)))["verdict"] == "unclear"


# A collection of the user's ---------------------------------------------------------------------------------------

HOOK = """
import numpy as np
CALLS = []
def score(weights, model, part):
    CALLS.append((model, part, float(weights["w"][0, 0])))
    n = int(model[1:])
    value = float(weights["w"].reshape(-1)[n])
    assert float(weights["head"][0]) == n + 1  # every task keeps its own
    return {"tuning": 1.5 - abs(value - .5), "test": value}[part]
"""


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """Four models, each of which learned one entry; the Config of a bench on them."""
    os.makedirs(tmp_path / "models")
    base = {"w": np.zeros((2, 2), np.float32), "head": np.zeros(1, np.float32)}
    safetensors.write(tmp_path / "base.safetensors", base)
    for n in range(4):
        w = np.eye(4, dtype=np.float32)[n].reshape(2, 2)
        safetensors.write(tmp_path / "models" / f"m{n}.safetensors", {"w": w, "head": np.full(1, n + 1, np.float32)})
    (tmp_path / "planted_hook.py").write_text(HOOK)
    bench = {"methods": LINES, "evaluations": 11, "pairs": [], "against": ["mean"], "worlds": []}
    (tmp_path / "bench.json").write_text(json.dumps(bench))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "planted_hook", raising=False)
    return merge.Config(
        collection=("models",), base="base.safetensors", score="planted_hook:score", bench="bench.json",
        exclude_layers=("head",), force=True,
    )  # fmt: skip


def calls():
    return importlib.import_module("planted_hook").CALLS


def test_options_are_chosen_by_tuning_data_and_scored_once_on_test_data(planted):
    before = len(calls())
    found = merge_bench.run(planted)
    (one,) = found["collections"]
    rows = one["methods"]
    assert [rows[label]["evaluations"] for label in rows] == [1, 1, 11, 11, 1]
    # By tuning data a scaling of 0.5 is best, by test data 1 would be.
    chosen = rows["task_arithmetic"]["options"][0]["scaling"]
    assert abs(chosen - 0.5) <= 0.06 and rows["task_arithmetic"]["scores"] == [[pytest.approx(chosen)] * 4]
    assert rows["task_arithmetic"]["mean"] == pytest.approx(chosen)  # the individual models score 1
    # The individual models score 1 - 0.5 + 0.5 on tuning data.
    assert max(rows["task_arithmetic"]["tuning"][0]) == pytest.approx(1.5 - abs(chosen - 0.5), abs=1e-6)
    parts = [part for _, part, _ in calls()[before:]]
    assert parts.count("tuning") == 4 * 4 + 4 * (1 + 1 + 11 + 11 + 1)
    assert parts.count("test") == 4 * 4 + 4 + 4 * 5
    assert one["kept"] == ["head"]
    assert one["baselines"]["single model, mean"]["mean"] == pytest.approx(1 / 4)
    assert one["baselines"]["base"]["mean"] == 0 and one["baselines"]["individual models"]["mean"] == 1


def test_planted_winner_wins_and_the_subspace_mean_is_the_mean(planted):
    found = merge_bench.run(planted)
    verdicts = {c["of"]: c["verdict"] for c in found["collections"][0]["comparisons"]}
    assert verdicts == {
        "subspace_mean": "identical", "task_arithmetic": "better", "ties": "better", "model_stock": "worse",
    }  # fmt: skip
    text = tables.table(found)
    assert "subspace_mean is the mean, whatever the rank" in text and max(map(len, text.splitlines())) <= 100
    assert "own layers of each task: head" in text
    markdown = tables.markdown(found)
    assert re.search(r"\| task_arithmetic \| (45|55).0 ▲ \|", markdown) and "▼" in markdown
    page = tables.page(found)
    assert page.count("<svg") == 1 and "model_stock" in page


def test_a_second_run_asks_for_nothing_again_and_a_new_method_only_for_its_own(planted, tmp_path):
    first = merge_bench.run(planted, "work")
    before = len(calls())
    assert {**merge_bench.run(planted, "work"), "seconds": 0} == {**first, "seconds": 0}
    assert len(calls()) == before
    bench = json.loads((tmp_path / "bench.json").read_text())
    (tmp_path / "bench.json").write_text(json.dumps(bench | {"methods": [*LINES, "tsv scaling=0..2"]}))
    with pytest.raises(errors.WorkdirError, match="methods"):
        merge_bench.run(planted, "work")
    again = merge_bench.run(dataclasses.replace(planted, restart=True), "work")
    assert len(calls()) == before + 4 * 11 + 4
    assert again["collections"][0]["methods"]["ties"] == first["collections"][0]["methods"]["ties"]
    for name in sorted(os.listdir(tmp_path / "work" / "bench")):  # a damaged part is found again
        for part in sorted(os.listdir(tmp_path / "work" / "bench" / name)):
            (tmp_path / "work" / "bench" / name / part).write_text("{}")
    assert {**merge_bench.run(planted, "work"), "seconds": 0} == {**again, "seconds": 0}


def test_a_function_that_changed_scores_again(planted, tmp_path, monkeypatch):
    first = merge_bench.run(planted, "work")
    (tmp_path / "planted_hook.py").write_text(HOOK.replace('"test": value}', '"test": value / 2 + .5}'))
    monkeypatch.delitem(sys.modules, "planted_hook")
    importlib.invalidate_caches()
    with pytest.raises(errors.WorkdirError, match="function of --score"):
        merge_bench.run(planted, "work")
    found = merge_bench.run(dataclasses.replace(planted, restart=True), "work")
    base = [run["collections"][0]["baselines"]["base"]["mean"] for run in (first, found)]
    assert base == [0, 0.5]


def test_models_that_changed_are_scored_again(planted, tmp_path):
    merge_bench.run(planted, "work")
    w = 1.5 * np.eye(4, dtype=np.float32)[1].reshape(2, 2)
    safetensors.write(tmp_path / "models" / "m1.safetensors", {"w": w, "head": np.full(1, 2, np.float32)})
    with pytest.raises(errors.WorkdirError, match="m1"):
        merge_bench.run(planted, "work")
    found = merge_bench.run(dataclasses.replace(planted, restart=True), "work")
    assert found["collections"][0]["individual"][0] == [1, 1.5, 1, 1]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise KeyError('w')", "failed on tuning data: KeyError"),
        ("return 'x'", "failed on tuning data: ValueError"),
        ("return float('nan')", "returned nan"),
        ("return -1.0", "scores -1 on tuning data of its own task"),
    ],
)
def test_faults_of_the_users_function_are_named(planted, tmp_path, body, said):
    (tmp_path / "bad_hook.py").write_text(f"def score(weights, model, part):\n    {body}\n")
    importlib.invalidate_caches()
    sys.modules.pop("bad_hook", None)
    with pytest.raises(errors.InputError, match=said) as caught:
        merge_bench.run(dataclasses.replace(planted, score="bad_hook:score"))
    assert "m0" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"score": ""}, "give --score=module:function"),
        ({"method": "ties"}, "method: --bench has no use for it"),
        ({"collection": ()}, "worlds: none"),
        ({"bench": "none.json"}, "no such configuration file"),
    ],
)
def test_runs_that_could_not_be_are_refused(planted, change, said):
    with pytest.raises(errors.ConfigError, match=said):
        merge_bench.run(dataclasses.replace(planted, **change))
    with pytest.raises(errors.ConfigError, match="score"):
        merge.run(dataclasses.replace(planted, bench="", method="mean", out="o"))


@pytest.mark.parametrize(
    "change",
    [
        {"evaluations": 0},
        {"tuning": 1.0},
        {"against": ["tie"]},
        {"pairs": ["ties"]},
        {"seeds": 0},
        {"worlds": ["noise"]},
    ],
    ids=str,
)
def test_configurations_that_say_nothing_are_refused(planted, tmp_path, change):
    bench = json.loads((tmp_path / "bench.json").read_text())
    (tmp_path / "bench.json").write_text(json.dumps(bench | change))
    with pytest.raises(errors.ConfigError):
        merge_bench.run(dataclasses.replace(planted, collection=() if "worlds" in change else planted.collection))


def test_a_method_that_cannot_merge_the_models_is_said_so(planted, tmp_path):
    bench = json.loads((tmp_path / "bench.json").read_text())
    methods = ["mean", "slerp", "concrete steps=1", "branched", "fisher"]
    (tmp_path / "bench.json").write_text(json.dumps(bench | {"methods": methods}))
    found = merge_bench.run(planted)
    refused = {label: row.get("refused", "") for label, row in found["collections"][0]["methods"].items()}
    assert not refused["mean"] and "takes 2 models" in refused["slerp"] and "--loss" in refused["concrete"]
    assert "several models" in refused["branched"] and "statistics" in refused["fisher"]
    assert "slerp" in tables.table(found)


def test_program_prints_the_table_and_the_plan(planted, tmp_path, capsys):
    line = [
        "merge",
        "--bench=bench.json",
        "--collection=models",
        "--base=base.safetensors",
        "--score=planted_hook:score",
    ]
    line += ["--exclude_layers=head", "--force"]
    cli.main(flags.Flags("merge", merge.Config, [*line, "--workdir=work"]))
    found = json.loads((tmp_path / "work" / "merge_bench.json").read_text())
    assert capsys.readouterr().out == tables.table(found) + "\n"
    assert {"merge_bench.html", "merge_bench.md"} <= {*os.listdir("work")}
    cli.main(flags.Flags("merge", merge.Config, [*line, "--dry_run"]))
    assert "ties                           11 candidates a zoo" in capsys.readouterr().out


# Zoos -------------------------------------------------------------------------------------------------------------

SMALL = {
    "same_start_split_task": "num_models=3 steps=120 hidden=24",
    "lora": "num_models=3 base_steps=150 steps=150",
    "cnn_variants": "num_tasks=3 models_per_task=1 base_steps=60 steps=30",
    "vit_variants": "num_tasks=3 models_per_task=1 base_steps=60 steps=30",
}


def zoo_case(world, folder):
    own = dataclasses.replace(merge_bench.Config(), seeds=1)
    return merge_bench.sources.World(merge_bench.sources.parse(f"{world} {SMALL[world]}"), own, str(folder), 4, None)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where zoos lie that are trained once for all tests."""
    return tmp_path_factory.mktemp("zoos")


@pytest.mark.slow
@pytest.mark.parametrize("world", SMALL)
def test_scores_of_individual_models_are_the_accuracies_of_training(world, place):
    case = zoo_case(world, place).case()
    labels = json.loads(next(place.rglob(f"{world}/labels.json")).read_text())
    counts = {part: used.sum(axis=1) for part, (*_, used) in case.parts.items()}
    for n, c in enumerate(np.eye(3)):
        right = sum(case.scores(case.combined(c), part)[n] * counts[part][n] for part in case.parts)
        total = sum(count[n] for count in counts.values())
        # Stored as text with four digits; one row of a tie may fall the other way.
        assert right / total == pytest.approx(float(labels[f"{n:03d}"]["accuracy"]), abs=1.1 / total + 1e-4)
        assert case.evaluation.names[n] == labels[f"{n:03d}"]["task"]
    assert case.has_base and case.kept == {"lora": ["output"]}.get(
        world, [] if world == "same_start_split_task" else ["head/bias", "head/kernel"]
    )


@pytest.mark.slow
def test_tuning_and_test_rows_are_apart_and_the_same_for_all_tasks(place):
    case = zoo_case("same_start_split_task", place).case()
    inputs = {part: x for part, (x, *_) in case.parts.items()}
    rows = {part: {row.tobytes() for row in np.concatenate(x)} for part, x in inputs.items()}
    assert not rows["tuning"] & rows["test"]
    assert not rows["test"] & {row.tobytes() for data in case.evaluation.train for row in np.asarray(data.inputs)}
    assert inputs["tuning"].shape[1] == round(0.4 * 360) and inputs["test"].shape[1] == 360 - round(0.4 * 360)
    own = dataclasses.replace(merge_bench.Config(), evaluations=3)
    method = space.parse("task_arithmetic scaling=0..1")
    individual = merge_bench.baselines(case)["individual"]["tuning"]
    first = merge_bench.tried(case, method, own.evaluations, 0, individual)
    x, targets, used = case.parts["test"]
    case.parts["test"] = (x, (targets + 1) % 10, used)
    second = merge_bench.tried(case, method, own.evaluations, 0, individual)
    assert first["tuning"] == second["tuning"] and first["chosen"] == second["chosen"]
    assert first["scores"] != second["scores"]


@pytest.mark.slow
def test_merges_of_a_zoo_are_those_of_the_program(place, tmp_path):
    one = zoo_case("same_start_split_task", place)
    case = one.case()
    models = next(place.rglob("same_start_split_task/models"))
    for text in ("ties density=.3", "dare_linear density=.4", "tsv", "mean"):
        method = space.parse(text)
        (options,) = method.candidates(5, 0)
        found = case.merge(method.name, method.module, options, 7)
        texts = tuple(f"{k}={v}" for k, v in method.fixed.items())
        out = tmp_path / f"out_{method.name}"
        base = str(models.parent / "base.safetensors")
        merge.run(
            merge.Config(collection=(str(models),), base=base, method=method.name, options=texts, out=str(out), seed=7)
        )
        written = safetensors.read(next(out.glob("*.safetensors")))
        for name, array in found.items():
            np.testing.assert_allclose(array, written[name], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_ensemble_is_the_average_of_predictions(place):
    case = zoo_case("same_start_split_task", place).case()
    found = merge_bench.baselines(case)
    votes = 0
    for c in np.eye(3):
        outputs = case.outputs(case.combined(c), "test").astype(np.float64)
        shares = np.exp(outputs - outputs.max(-1, keepdims=True))
        votes = votes + shares / shares.sum(-1, keepdims=True)
    _, targets, used = case.parts["test"]
    wanted = [np.mean((votes[t].argmax(-1) == targets[t])[used[t]]) for t in range(3)]
    np.testing.assert_allclose(found["ensemble"], wanted, atol=1e-12)
    assert np.mean(found["ensemble"]) > np.mean(np.array(found["models"]["test"]))


@pytest.mark.slow
def test_loss_of_a_zoo_is_the_cross_entropy_of_training_rows(place):
    import jax

    case = zoo_case("same_start_split_task", place).case()
    weights = case.combined([1, 0, 0])
    losses = [float(case.loss(weights, jax.random.key(n))) for n in range(40)]
    wanted = []
    for data in case.evaluation.train:
        x, y = data.used()
        h = x @ weights["hidden/kernel"] + weights["hidden/bias"]
        logits = (h - np.clip(h, -0.5, 0.5)) @ weights["output/kernel"] + weights["output/bias"]
        logits = logits - logits.max(-1, keepdims=True)
        wanted.append(np.mean(np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(y)), y]))
    assert np.mean(losses) == pytest.approx(np.mean(wanted), abs=4 * np.std(losses) / 40**0.5)


@pytest.mark.slow
def test_bench_from_end_to_end(tmp_path):
    methods = [
        "mean",
        "subspace_mean",
        "lora_factors",
        "task_arithmetic scaling=0..1",
        "ties scaling=0..4 density=.1..1",
    ]
    methods += ["concrete scaling=0..1 rate=.1 steps=40", "joint_training rate=.003|.03 steps=40"]
    bench = {
        "worlds": [f"{world} {SMALL[world]}" for world in ("same_start_split_task", "lora", "cnn_variants")],
        "seeds": 2, "evaluations": 3, "methods": methods, "pairs": ["concrete task_arithmetic"],
    }  # fmt: skip
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(bench))
    found = merge_bench.run(merge.Config(bench=str(path)), str(tmp_path / "work"))
    assert [one["zoos"] for one in found["collections"]] == [2] * 3
    for one in found["collections"]:
        refused = [label for label, row in one["methods"].items() if "refused" in row]
        assert refused == (["concrete"] if one["name"].startswith("lora") else [])
        assert {row["evaluations"] for row in one["methods"].values() if "refused" not in row} == {1, 3}
        identical = [c["of"] for c in one["comparisons"] if c["with"] == "mean" and c["verdict"] == "identical"]
        assert "subspace_mean" in identical
    first = found["collections"][0]["methods"]
    assert first["concrete"]["mean"] > first["task_arithmetic"]["mean"] + 0.05


@pytest.mark.slow
def test_fisher_information_is_the_squared_gradient_of_the_likelihood(place):
    import jax

    case = zoo_case("same_start_split_task", place).case()
    found = merge_bench.cases.merge_bench_fisher.of(case, 3)
    n, weights = 1, case.member(1)
    x = case.evaluation.train[n].used()[0][:256]
    h = x @ weights["hidden/kernel"] + weights["hidden/bias"]
    act = h - np.clip(h, -0.5, 0.5)
    logits = act @ weights["output/kernel"] + weights["output/bias"]
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    y = np.asarray(jax.random.categorical(jax.random.fold_in(jax.random.key(3), n), logits))
    slope = np.eye(10)[y] - p  # of the log likelihood by the logits
    inner = (slope @ weights["output/kernel"].T) * (np.abs(h) > 0.5)
    wanted = {"output/bias": slope, "hidden/bias": inner}
    wanted |= {"output/kernel": act[:, :, None] * slope[:, None], "hidden/kernel": x[:, :, None] * inner[:, None]}
    for name, gradients in wanted.items():
        np.testing.assert_allclose(found[name][n], np.square(gradients).mean(axis=0), rtol=2e-3, atol=1e-9)
    module = space.parse("fisher").module
    merged = case.merge("fisher", module, module.Options(floor=1e-8), 3)
    members = [case.member(m)["output/bias"] for m in range(3)]
    shares = found["output/bias"] + 1e-8
    np.testing.assert_allclose(merged["output/bias"], (shares * members).sum(0) / shares.sum(0), rtol=1e-4, atol=1e-6)
    with pytest.raises(errors.ConfigError, match="not collected"):
        case.merge("regmean", space.parse("regmean").module, None, 0)


@pytest.mark.slow
def test_joint_training_goes_down_the_loss_from_the_mean(place):
    import jax

    case = zoo_case("same_start_split_task", place).case()
    module = space.parse("joint_training").module
    mean = case.combined(np.full(3, 1 / 3))
    still = case.merge("joint_training", module, module.Options(rate=0.0, steps=2), 0)
    trained = case.merge("joint_training", module, module.Options(steps=60), 0)
    for name in mean:
        np.testing.assert_allclose(still[name], mean[name], atol=1e-6)
    losses = [np.mean([case.loss(w, jax.random.key(n)) for n in range(8)]) for w in (mean, trained)]
    assert losses[1] < 0.5 * losses[0]
    assert case.scores(trained, "test").mean() > case.scores(mean, "test").mean() + 0.1


# Zoos side by side ------------------------------------------------------------------------------------------------


def test_processes_are_as_many_as_cores_memory_and_zoos_allow(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16), raising=False)
    monkeypatch.setattr(processes.hostmemory, "available", lambda: 5 * processes.BYTES)
    assert [processes.count(*given) for given in ((0, 20), (0, 3), (8, 20), (1, 20))] == [5, 3, 8, 1]
    monkeypatch.setattr(processes.hostmemory, "available", lambda: 0)  # not known, or little
    assert processes.count(0, 20) == 1
    monkeypatch.setattr(processes.jax, "default_backend", lambda: "gpu")
    assert processes.count(8, 20) == 1


@pytest.fixture
def small(tmp_path):
    """function(processes) -> Config of a bench of two worlds with two zoos each."""

    def make(count):
        worlds = [f"{world} {SMALL[world]}" for world in ("same_start_split_task", "lora")]
        bench = {"worlds": worlds, "seeds": 2, "evaluations": 2, "methods": LINES, "pairs": [], "processes": count}
        path = tmp_path / f"bench_{count}.json"
        path.write_text(json.dumps(bench))
        return merge.Config(bench=str(path))

    return make


def work_of(folder):
    return sorted((folder / "bench").rglob("*.json"))


@pytest.mark.slow
def test_zoos_side_by_side_give_the_same_bytes(small, tmp_path, monkeypatch):
    alone = merge_bench.run(small(1), str(tmp_path / "alone"))
    monkeypatch.setattr(merge_bench, "_tried", lambda *_: {"refused": "left undone"})  # seen if processes leave it
    said = io.StringIO()
    both = merge_bench.run(small(2), str(tmp_path / "both"), stream=said)
    assert both["collections"] == alone["collections"] and both["notes"] == alone["notes"]
    pairs = list(zip(work_of(tmp_path / "alone"), work_of(tmp_path / "both"), strict=True))
    assert len(pairs) == 4 * (1 + len(LINES)) and all(a.read_bytes() == b.read_bytes() for a, b in pairs)
    labels = [label for one in alone["collections"] for label, row in one["methods"].items() if "refused" not in row]
    lines = [line for line in said.getvalue().splitlines() if " of the individual models (" in line]
    assert len(lines) == 2 * len(labels) and len({line.partition(" of ")[0] for line in lines}) == len(lines)


ENDED = {
    "at once": "raise SystemExit(1)",
    "before it is told of the job": "import os; os.close(0); raise SystemExit(1)",
    "before its second zoo": """import os, sys
for _ in range(2): sys.stdin.readline()
os.close(0)
print('["done", ""]', flush=True)""",
    "with words of its own": "print('no JSON', flush=True)",
}


@pytest.mark.slow
@pytest.mark.parametrize("when", ENDED)
def test_a_bench_whose_processes_end_does_their_work(small, tmp_path, monkeypatch, when):
    monkeypatch.setattr(processes, "CHILD", ENDED[when])
    monkeypatch.setattr(cases.Zoo, "can_vote", False)  # seen only where the work is done
    found = merge_bench.run(small(2), str(tmp_path / "work"))
    assert all("ensemble" not in one["baselines"] for one in found["collections"])
    monkeypatch.setattr(processes, "run", None)  # nothing is left to do
    assert merge_bench.run(small(2), str(tmp_path / "work"))["collections"] == found["collections"]


@pytest.mark.slow
def test_an_error_of_a_process_is_met_by_the_bench(small, tmp_path, monkeypatch):
    said = []
    failing = processes.CHILD.replace(
        "merge_bench_processes.serve",
        """from jaxsub import errors
from jaxsub.pipelines import merge_bench
def fail(*_): raise errors.ConfigError("of a child")
merge_bench.score_zoo = fail
merge_bench_processes.serve""",
    )
    monkeypatch.setattr(processes, "CHILD", failing)

    def here(own, methods, place, world, number, stream):
        said.append((world, number))
        raise errors.ConfigError("met here")

    monkeypatch.setattr(merge_bench, "score_zoo", here)
    with pytest.raises(errors.ConfigError, match="met here"):
        merge_bench.run(small(2), str(tmp_path / "work"))
    assert said in ([(0, 0)], [(1, 1)])


@pytest.mark.slow
def test_an_interrupt_ends_all_processes(small, tmp_path):
    place = tmp_path / "work"
    command = [sys.executable, "-m", "jaxsub", "merge", f"--bench={small(2).bench}", f"--workdir={place}"]
    bench = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    for line in bench.stderr:
        if " of the individual models (" in line:
            break
    os.killpg(bench.pid, signal.SIGINT)  # as a terminal does
    assert "Traceback" not in bench.communicate(timeout=30)[1] and bench.returncode not in (0, 70)
    assert 0 < len(work_of(place)) < 4 * (1 + len(LINES))
    with pytest.raises(ProcessLookupError):
        os.killpg(bench.pid, 0)  # nobody of the group is left
    left = place / "zoo" / "seed_0" / "0123" / ".tmp-zoo-0123"
    (left / "models").mkdir(parents=True)  # as of one that was killed while it trained
    merge_bench.run(small(2), str(place))
    assert len(work_of(place)) == 4 * (1 + len(LINES)) and not list(place.rglob(".tmp-zoo-*"))
