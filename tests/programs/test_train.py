"""`jaxsub train`: coefficients beside baselines, tasks that were held out, kills, exports, and what is refused."""

import json
import pathlib
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest

import jaxsub
from jaxsub import errors
from jaxsub.formats import safetensors
from jaxsub.pipelines import intervals, train, train_setup, train_sweep, train_table, workdir, zoo
from jaxsub.tasks import _data, digits

ROOT = pathlib.Path(__file__).resolve().parents[2]
QUICK = {"tasks": 1, "seeds": 2, "steps": 6, "evaluate_every": 3, "learning_rates": (0.01,), "batch_size": 16}
HALF = {"task_options": ("variant=half",)}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small zoo from one start, with a bundle of its kernels."""
    folder = tmp_path_factory.mktemp("zoo")
    models = zoo.make("same_start_split_task", folder, num_models=12, steps=30)
    jaxsub.fit(models, str(folder / "bundle"), rank=4, layers=("kernel",))
    return folder


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """Adapters of a base, with their bundle."""
    folder = tmp_path_factory.mktemp("adapted")
    adapters = zoo.make("lora", folder, num_models=6, steps=20, base_steps=60)
    jaxsub.fit(adapters, str(folder / "bundle"), rank=3)
    return folder


def run(made, workdir=None, **options):
    config = train.Config(bundle=str(made / "bundle"), **{**QUICK, **HALF, **options})
    return train.run(config, workdir)


@pytest.mark.slow
def test_methods_are_trained_beside_each_other_on_tasks_no_member_saw(made, tmp_path):
    found = run(made, str(tmp_path), tasks=2)
    assert [m["name"] for m in found["methods"]] == ["scalar", "random", "random_matched", "lora", "last_layer", "full"]
    numbers = {m["name"]: m["numbers"] for m in found["methods"]}
    assert numbers == {
        "scalar": 8, "random": 8, "random_matched": 8, "lora": 4 * (64 + 64 + 64 + 10), "last_layer": 650, "full": 4810,
    }  # fmt: skip
    labels = json.loads((made / "same_start_split_task" / "labels.json").read_text())
    assert not {*found["tasks"]} & {label["task"] for label in labels.values()}
    starts = {json.dumps(m["start"]) for m in found["methods"]}
    assert len(starts) == 1  # all start from the same weights
    for method in found["methods"]:
        assert np.shape(method["scores"]) == (2, 2)
        lines = (tmp_path / "metrics" / f"{method['name']}.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [3, 6]
    assert json.loads((tmp_path / "train.json").read_text()) == found
    text = train_table.table(found)
    assert "scalar against random:" in text and max(map(len, text.splitlines())) <= 100


@pytest.mark.slow
def test_trained_coefficients_are_those_of_the_bundle(made, tmp_path):
    found = run(made, str(tmp_path / "work"), baselines=(), write_models=str(tmp_path / "models"))
    stored = safetensors.read(str(tmp_path / "work" / "trained" / "scalar.safetensors"))
    bundle = jaxsub.load(str(made / "bundle"))
    values = {name: stored[name].reshape(2, -1) for name in ("hidden/kernel", "output/kernel")}
    rebuilt = bundle.reconstruct(jaxsub.subspace.Coefficients(("a", "b"), values))
    assert np.abs(values["hidden/kernel"]).max() > 0.01
    for n, path in enumerate(found["written"]):
        model = safetensors.read(path)
        assert sorted(model) == ["hidden/bias", "hidden/kernel", "output/bias", "output/kernel"]
        for name, x in rebuilt.items():
            np.testing.assert_allclose(model[name], x[n], atol=1e-6)


@pytest.mark.slow
def test_random_directions_are_as_many_as_the_bundle_holds_of_its_layers(made):
    (found,) = run(made, parametrisation="random_subspace", baselines=(), steps=1, evaluate_every=1)["methods"]
    assert found["numbers"] == 2 * 4


@pytest.mark.slow
@pytest.mark.parametrize("initial", ["nearest", "ridge", "posterior"])
def test_all_methods_begin_where_examples_say(made, initial):
    found = run(made, initial=initial, baselines=("random", "full"), steps=1, evaluate_every=1)
    starts = [m["start"] for m in found["methods"]]
    assert starts[0] == starts[1] == starts[2]
    mean = run(made, baselines=(), steps=1, evaluate_every=1)["methods"][0]["start"]
    assert np.mean(starts[0]) > np.mean(mean) - 0.02


@pytest.mark.slow
def test_killed_training_goes_on_to_the_bit(made, tmp_path):
    """SIGKILL between checkpoints; the same command ends as one in one piece."""
    arguments = [
        f"--bundle={made / 'bundle'}", "--config.task_options=variant=half", "--seeds=2", "--steps=400",
        "--config.baselines=random", "--config.evaluate_every=20", "--config.learning_rates=.01,.03",
    ]  # fmt: skip
    command = [sys.executable, "-m", "jaxsub", "train", *arguments]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    subprocess.run([*command, f"--workdir={whole}"], check=True, capture_output=True, cwd=ROOT)
    kills = 0
    for wanted in (2, 9):
        process = subprocess.Popen([*command, f"--workdir={parts}"], stdout=-3, stderr=-3, cwd=ROOT)
        metrics = parts / "metrics" / "scalar.jsonl"
        while process.poll() is None and (not metrics.exists() or len(metrics.read_text().splitlines()) < wanted):
            time.sleep(0.01)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills == 2
    subprocess.run([*command, f"--workdir={parts}"], check=True, capture_output=True, cwd=ROOT)
    for name in ("train.json", "trained/scalar.safetensors", "trained/random.safetensors", "metrics/scalar.jsonl"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes(), name
    other = subprocess.run([*command, f"--workdir={parts}", "--seed=5"], capture_output=True, text=True, cwd=ROOT)
    assert other.returncode == 5 and "config.seed was 0, is 5" in other.stderr


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["portable", "tinylora"])
def test_trained_adapters_give_the_same_outputs_in_peft(adapted, tmp_path, layout):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    base = str(adapted / "lora" / "base.safetensors")
    config = train.Config(
        bundle=str(adapted / "bundle"), base=base, parametrisation="core", baselines=(), peft_layout=layout,
        write_models=str(tmp_path / "adapters"), **{**QUICK, "steps": 40, "task_options": ("variant=names", "draw=90")},
    )  # fmt: skip
    found = train.run(config, str(tmp_path / "work"))
    weights = {name: torch.tensor(x) for name, x in safetensors.read(base).items()}

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden, self.output = torch.nn.Linear(64, 64), torch.nn.Linear(64, 10)

        def forward(self, x):
            return self.output(torch.nn.functional.softshrink(self.hidden(x)))

    inputs = digits.load()[1].inputs
    setup = train_setup.of(config)
    cores = safetensors.read(str(tmp_path / "work" / "trained" / "core.safetensors"))
    for n, folder in enumerate(found["written"]):
        net = Net()
        net.load_state_dict(weights)
        plain = net(torch.tensor(inputs)).detach().numpy()
        model = peft.PeftModel.from_pretrained(net, folder)
        own = {name: np.asarray(w, np.float64) for name, w in setup.start.items()}
        for name, space in setup.spaces.items():
            own[name] = own[name] + space.factors[0].T @ cores[name][0, n] @ space.factors[1]
        z = inputs @ own["hidden/kernel"] + own["hidden/bias"]
        wanted = (np.sign(z) * np.maximum(np.abs(z) - 0.5, 0)) @ own["output/kernel"] + own["output/bias"]
        answers = model(torch.tensor(inputs)).detach().numpy()
        np.testing.assert_allclose(answers, wanted, atol=1e-5 * np.abs(wanted).max())
        assert np.abs(plain - wanted).max() > 0.05  # training moved it


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"initial": "base"}, "give --base"),
        ({"parametrisation": "core"}, "no factors of its axes.*hosvd"),
        ({"initial": "ridge", "parametrisation": "lora"}, "no coefficients of the bundle"),
        ({"initial": "ridge", "parametrisation": "random_subspace"}, "no coefficients of the bundle"),
        ({"sweep": (2,), "write_models": "x"}, "leave out write_models"),
        ({"sweep": (8, 4)}, "increasing"),
        ({"devices": 99}, "devices=99, but JAX sees"),
        ({"learning_rates": (float("inf"),)}, "finite"),
        ({"rank": 9}, "rank=9, but the bundle holds 4"),
        ({"task": "digts"}, "did you mean 'digits'"),
        ({"model": "cnn"}, "no layer of the network"),
        ({"accumulate": 3}, "does not divide"),
        ({"shard": "rows"}, "expected one of"),
        ({"task_options": ("variant=plain",), "tasks": 2}, "the task has 1 variations"),
        ({"task_options": ("variant=inverted", "draw=3"), "tasks": 2}, "the task has 1 variations"),
        ({"task_options": ("variant=turned",), "tasks": 4}, "the task has 3 variations"),
        ({"baselines": ("randm",)}, "did you mean 'random'"),
        ({"parametrisation": "moving_basis", "options": ("method=riemannian",)}, "give --optimizer=riemannian_sgd"),
        ({"last_layer": "top/", "baselines": ("last_layer",)}, "no layer of the network matches.*output/kernel"),
        ({"last_layer": "(", "baselines": ("last_layer",)}, "no regular expression"),
        ({"optimizer_options": ("b1=fast",)}, "optimizer=adam fails with them"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name(made, options, said):
    with pytest.raises(errors.ConfigError, match=said):
        run(made, **options)


def test_missing_labels_of_members_are_said(tmp_path, monkeypatch):
    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo" / "labels.json").write_text(json.dumps({"000": {"task": "0,1"}, "001": {"task": "2,3"}}))
    bundle, config = types.SimpleNamespace(provenance={}), train.Config(bundle="")
    bundle.provenance["models"] = [{"path": str(tmp_path / "zoo" / "models" / "000.safetensors")}]
    assert train_setup._seen(config, bundle) == {"0,1": None, "2,3": None}
    (tmp_path / "others.json").write_text(json.dumps({"000": {"accuracy": "0.9"}}))
    assert train_setup._seen(train.Config(bundle="", labels=str(tmp_path / "others.json")), bundle) is None
    bundle.provenance["models"] = [{"path": "models/000.safetensors"}]  # of a fit in another folder
    monkeypatch.chdir(tmp_path)
    assert train_setup._seen(config, bundle) is None
    found = {"methods": [], "tasks": ["a"], "seeds": 2, "skipped": 0, "comparisons": [], "blind": True}
    found["methods"] = [
        {"name": "x", "numbers": 1, "learning_rate": 0.1, "start": [[0.1]], "scores": [[0.2]], "not_finite": 0}
    ]
    assert "no labels of the bundle's members" in train_table.table(found)
    assert "no labels" not in train_table.table({**found, "blind": False})


def test_scores_on_training_rows_are_refused():
    inputs = np.arange(40.0, dtype=np.float32).reshape(10, 4)
    train_rows, held_out = _data.whole(inputs[:8], np.zeros(8)), _data.whole(inputs[7:], np.zeros(3))
    with pytest.raises(errors.ConfigError, match="mine.*1 of 3 held-out rows are training rows"):
        train_setup.require_apart(train_rows, held_out, "mine")
    train_setup.require_apart(train_rows, _data.whole(inputs[8:], np.zeros(2)), "mine")


@pytest.mark.slow
def test_a_run_killed_after_its_models_goes_on_with_the_same_command(made, tmp_path, monkeypatch):
    options = {"baselines": ("full",), "write_models": f"{tmp_path}/models/"}

    def killed(found):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_table, "comparisons", killed)
        run(made, str(tmp_path / "work"), **options)
    found = run(made, str(tmp_path / "work"), **options)
    assert len(found["written"]) == 2 and all(pathlib.Path(path).is_file() for path in found["written"])
    with pytest.raises(errors.WorkdirError, match="exists already"):  # of another training
        run(made, str(tmp_path / "other"), **options)
    with pytest.raises(errors.WorkdirError, match="exists already"):
        run(made, str(tmp_path / "work"), restart=True, **options)


def test_a_single_seed_makes_no_claim():
    method = {"numbers": 4, "learning_rate": 0.1, "not_finite": 0, "start": [[0.2]]}
    methods = [{**method, "name": "scalar", "scores": [[0.9]]}, {**method, "name": "random", "scores": [[0.5]]}]
    found = {
        "methods": methods,
        "tasks": ["a"],
        "seeds": 1,
        "skipped": 0,
        "comparisons": train_table.comparisons(methods),
    }
    text = train_table.table(found)
    assert (
        "of one run, or of seeds that all give the same: no claim" in text
        and "a single seed" in text
        and "better" not in text
    )


@pytest.mark.slow
def test_intervals_cover_what_they_say():
    """Scores with a spread of tasks and of seeds: 95 % intervals of 12 tasks hold the true mean about as often."""
    rng, held = np.random.default_rng(0), 0
    for n in range(150):
        scores = 0.8 + 0.05 * rng.standard_normal((12, 1)) + 0.02 * rng.standard_normal((12, 4))
        _, low, high = intervals.interval(scores, seed=n)
        held += low <= 0.8 <= high
    assert 0.86 < held / 150 < 0.99
    # Seeds alone would leave the tasks' spread out: twelve tasks as one have an interval far too narrow.
    _, low, high = intervals.interval(np.full((1, 48), 0.8) + 0.02 * rng.standard_normal((1, 48)))
    assert high - low < 0.02


def test_differences_that_leave_out_zero_are_better_or_worse():
    rng = np.random.default_rng(1)
    noise = 0.01 * rng.standard_normal((10, 5))
    names = [("scalar", 0.9 + noise), ("random", 0.85 + noise[::-1]), ("full", 0.9 - noise), ("lora", 0.95 + noise)]
    found = train_table.comparisons([{"name": n, "scores": s.tolist()} for n, s in names])
    assert [one["better"] for one in found] == [True, None, False]


@pytest.mark.slow
def test_the_users_own_task_and_model(made, tmp_path, monkeypatch):
    (tmp_path / "own_training.py").write_text(
        """
import dataclasses
import flax.linen as nn
import numpy as np
from jaxsub.tasks import _data

@dataclasses.dataclass(frozen=True)
class Options:
    batch_size: int = 8

class Task:
    Options, OUTPUTS = Options, 3
    batches, loss, score = map(staticmethod, (_data.batches, _data.cross_entropy, _data.right))
    @staticmethod
    def load(options):
        rng = np.random.default_rng(0)
        x = rng.standard_normal((400, 5)).astype(np.float32)
        y = np.abs(x[:, :3]).argmax(axis=1).astype(np.int32)
        return _data.whole(x[:300], y[:300]), _data.whole(x[300:], y[300:])

class Net(nn.Module):
    outputs: int = 3
    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.outputs, name="head")(nn.relu(nn.Dense(16, name="first")(x)))
"""
    )
    monkeypatch.chdir(tmp_path)
    config = train.Config(
        task="own_training:Task", model="own_training:Net", parametrisation="full", baselines=("lora", "last_layer"),
        **{**QUICK, "steps": 200, "evaluate_every": 100, "learning_rates": (0.03,)},
    )  # fmt: skip
    found = train.run(config)
    scores = {m["name"]: np.mean(m["scores"]) for m in found["methods"]}
    assert scores["full"] > 0.75 and [m["numbers"] for m in found["methods"]] == [147, 4 * (5 + 16 + 16 + 3), 51]
    with pytest.raises(errors.ConfigError, match="has no OUTPUTS|has nothing called"):
        train.run(train.Config(task="own_training:Missing"))


def test_a_run_of_edited_code_is_another_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = train.Config(task="edited_task:Task")
    found = []
    for text in ("class Task: pass", "class Task: pass", "class Task: rate = 2"):
        (tmp_path / "edited_task.py").write_text(text)
        found.append(workdir.options(config))
    assert found[0] == found[1] != found[2] and "task (code)" in found[0]
    assert not any("(code)" in name for name in workdir.options(train.Config()))


@pytest.mark.slow
def test_a_run_from_another_base_is_another_run(tmp_path, made):
    base = tmp_path / "base.safetensors"
    options = {"base": str(base), "baselines": (), "initial": "base"}
    shapes = {"hidden/kernel": (64, 64), "hidden/bias": (64,), "output/kernel": (64, 10), "output/bias": (10,)}
    for value in (0.0, 0.5):
        safetensors.write(base, {name: np.full(shape, value, np.float32) for name, shape in shapes.items()})
        if not value:
            run(made, str(tmp_path / "work"), **options)
    with pytest.raises(errors.WorkdirError, match="model base changed"):
        run(made, str(tmp_path / "work"), **options)


@pytest.mark.slow
def test_a_sparse_posterior_predicts_as_training_does(made):
    found = run(made, baselines=(), posterior=True, density=0.75, posterior_steps=1500, steps=150, evaluate_every=50)
    (own,) = found["posterior"]
    assert (own["numbers"], own["active"]) == (8, 6)
    assert own["score"] > np.mean(found["methods"][0]["scores"]) - 0.1 and own["score"] > 0.4
    assert 0 < own["width_right"] < 0.6 and 0 < own["width_wrong"] < 0.6
    assert "6 of 8 coefficients active" in train_table.table(found)


@pytest.mark.slow
def test_a_basis_of_copies_is_no_basis(tmp_path):
    """Copies of one model: there are no directions to train in, and that is said, not trained with noise."""
    models = zoo.make("same_start_split_task", tmp_path, num_models=1, steps=5)
    content = pathlib.Path(models, "000.safetensors").read_bytes()
    for n in range(1, 6):
        pathlib.Path(models, f"{n:03d}.safetensors").write_bytes(content)
    jaxsub.fit(models, str(tmp_path / "bundle"), rank=2, layers=("hidden/kernel",))
    with pytest.raises(errors.ConfigError, match="no directions"):
        train.run(train.Config(bundle=str(tmp_path / "bundle"), **QUICK, **HALF))


@pytest.mark.slow
@pytest.mark.parametrize("rates", [(0.01, 1e30), (1e30,)], ids=["one diverges", "all do"])
def test_runs_that_diverge_are_never_the_best(made, tmp_path, rates):
    """Outputs that are no numbers answer 0 to all, which a task of three classes would call .33 right."""
    options = {"baselines": ("random", "lora"), "tasks": 2, "write_models": str(tmp_path / "written")}
    found = run(made, str(tmp_path / "work"), learning_rates=rates, **options)
    for method in found["methods"]:
        assert method["learning_rate"] == pytest.approx(rates[0]) and method["not_finite"] > 0
        if len(rates) == 1:
            assert method["scores"] == method["start"] and {v for row in method["validation"] for v in row} == {None}
        else:
            assert None not in {v for row in method["validation"] for v in row}
    for path in found["written"]:
        assert all(np.isfinite(x).all() for x in safetensors.read(path).values())
    assert "of its runs were not finite" in train_table.table(found)
    assert json.loads((tmp_path / "work" / "train.json").read_text()) == found


@pytest.mark.slow
def test_a_plan_counts_what_kernels_hold_beside_arrays():
    """All runs are scored on all rows at once: their activations are many times the weights of LoRA."""
    options = {
        "parametrisation": "lora",
        "model": "mlp",
        "model_options": ("hidden=4000",),
        "baselines": (),
        "seeds": 2,
    }
    (plan,) = train.run(train.Config(**options, steps=4, evaluate_every=4, dry_run=True))["plan"]
    scored = 360  # held-out rows, of 1797
    assert plan["bytes"] > plan["runs"] * scored * 4000 * 4 and plan["bytes"] > 100 * 2**20


@pytest.mark.slow
def test_a_layer_in_which_all_models_are_equal_stays_as_it_is(made, tmp_path):
    """A frozen layer has no directions: the others are trained, and that is said."""
    models = tmp_path / "models"
    models.mkdir()
    sources = sorted((made / "same_start_split_task" / "models").glob("*.safetensors"))[:8]
    frozen = safetensors.read(str(sources[0]))["hidden/kernel"]
    for path in sources:
        safetensors.write(str(models / path.name), safetensors.read(str(path)) | {"hidden/kernel": frozen})
    jaxsub.fit(str(models), str(tmp_path / "bundle"), rank=3, layers=("kernel",))
    found = run(tmp_path, str(tmp_path / "work"), baselines=("random",), write_models=str(tmp_path / "written"))
    assert found["fixed"] == ["hidden/kernel"] and found["methods"][0]["numbers"] == 3
    assert "the bundle's models are equal there" in train_table.table(found)
    written = safetensors.read(found["written"][0])
    np.testing.assert_array_equal(written["hidden/kernel"], frozen)
    assert np.abs(written["output/kernel"] - safetensors.read(str(sources[0]))["output/kernel"]).max() > 0


@pytest.mark.slow
def test_a_sweep_finds_fewer_numbers_in_the_joint_subspace(made, tmp_path):
    found = run(
        made, str(tmp_path), task_options=("variant=plain",), sweep=(4, 8, 256), steps=60, evaluate_every=60,
        learning_rates=(0.03,),
    )["sweep"]  # fmt: skip
    assert sorted(found["curves"]) == ["dense", "fastfood", "joint subspace", "random about the mean", "sparse"]
    assert len(found["curves"]["joint subspace"]["scores"]) == 2  # the bundle holds 8 components
    kinds = [np.mean(found["curves"][k]["scores"][-1]) for k in ("dense", "sparse", "fastfood")]
    assert min(kinds) > np.mean(found["curves"]["dense"]["scores"][0]) + 0.2
    page = (tmp_path / "sweep.html").read_text()
    assert "joint subspace" in page and "2 seeds" in page and "<script src" not in page


def test_crossing_is_between_sizes_on_a_log_scale():
    assert train_sweep.crossing([8, 32], [0.2, 0.6], 0.4) == pytest.approx(16)
    assert train_sweep.crossing([8, 32], [0.5, 0.6], 0.4) == 8
    assert train_sweep.crossing([8, 32], [0.2, 0.3], 0.4) is None


def test_a_goal_reached_with_the_fewest_numbers_tried_is_a_bound():
    known, bound = train_sweep._interval([12.0, 20.0]), train_sweep._interval([8.0, 20.0], is_bound=True)
    assert known["mean"] == pytest.approx(240**0.5) and known["at_most"] is None and known["low"] < known["high"]
    assert bound["at_most"] == pytest.approx(160**0.5) and bound["mean"] is bound["low"] is bound["high"] is None
    curves = {"a": {"scores": [[0.5, 0.2]], "d_int90": bound}, "b": {"scores": [[0.1, 0.2]], "d_int90": known}}
    text = train_sweep.table({"dimensions": [8], "full": [0.4, 0.4], "share": 0.9, "curves": curves})
    assert "<=13" in text and " 15  " in text and "smaller ones in --config.sweep" in text
    assert "<=" not in train_sweep.table({"dimensions": [8], "full": [0.4], "share": 0.9, "curves": {"b": curves["b"]}})


@pytest.mark.slow
def test_runs_on_the_same_batches_score_alike(made, tmp_path):
    found = run(made, str(tmp_path), same_batches=True, initial="mean", baselines=("random_matched",))
    scores = np.asarray(found["methods"][0]["scores"])  # (tasks, seeds)
    assert np.ptp(scores) == 0  # the mean is the same start, and now the batches are too
    assert np.ptp(run(made, initial="mean", baselines=())["methods"][0]["scores"]) > 0


@pytest.mark.slow
def test_cores_have_no_covariance_to_match(adapted):
    adapters = {"base": str(adapted / "lora" / "base.safetensors"), "task_options": ("variant=names", "draw=1000")}
    cores = run(adapted, parametrisation="core", baselines=("random", "random_matched"), **adapters)
    assert [m["name"] for m in cores["methods"]] == ["core", "random"]


@pytest.mark.slow
def test_a_sweep_that_was_stopped_goes_on(made, tmp_path, monkeypatch):
    options = {"task_options": ("variant=plain",), "sweep": (4, 8), "seeds": 2, "learning_rates": (0.03,)}
    whole, real, trained = run(made, str(tmp_path / "whole"), **options), train_sweep._scores, []

    def ends(*given):
        if len(trained) == 5:
            raise KeyboardInterrupt
        trained.append(given[0].name)
        return real(*given)

    monkeypatch.setattr(train_sweep, "_scores", ends)
    with pytest.raises(KeyboardInterrupt):
        run(made, str(tmp_path / "parts"), **options)
    trained.clear()
    monkeypatch.setattr(train_sweep, "_scores", lambda *given: (trained.append(given[0].name), real(*given))[1])
    assert run(made, str(tmp_path / "parts"), **options) == whole
    assert len(trained) == 1 + 4 * 2 + 2 - 5  # full, four curves of random subspaces, the joint one
    run(made, str(tmp_path / "parts"), restart=True, **options)
    assert len(trained) == 6 + 11
