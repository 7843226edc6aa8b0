"""Recipes of mergekit: what is taken, what is refused by name, and that results equal its own where it is installed."""

import os
import pathlib
import subprocess

import numpy as np
import pytest

from jaxsub import errors
from jaxsub.formats import safetensors
from jaxsub.pipelines import merge, mergekit

PROGRAM = os.environ.get("JAXSUB_MERGEKIT", "")  # mergekit-pytorch of an environment of its own
needs_mergekit = pytest.mark.skipif(not PROGRAM, reason="set JAXSUB_MERGEKIT to mergekit-pytorch")


def recipe(folder, text):
    path = folder / "recipe.yaml"
    path.write_text(text)
    return str(path)


def models(folder, count=3):
    rng = np.random.default_rng(0)
    base = {"w": rng.standard_normal((20, 16)).astype("f4"), "b": rng.standard_normal(20).astype("f4")}
    safetensors.write(folder / "base.safetensors", base)
    for n in range(count):
        own = {k: (v + 0.1 * rng.standard_normal(v.shape)).astype("f4") for k, v in base.items()}
        safetensors.write(folder / f"m{n}.safetensors", own)
    return [str(folder / f"m{n}.safetensors") for n in range(count)], str(folder / "base.safetensors")


def entries(paths, weights=(0.5, 0.8, 0.3), more=""):
    return "".join(
        f"  - model: {p}\n    parameters:\n      weight: {w}\n{more}" for p, w in zip(paths, weights, strict=True)
    )


def run(folder, text, out="out", **more):
    return merge.run(merge.Config(mergekit_yaml=recipe(folder, text), out=str(folder / out), **more))


def test_a_recipe_is_the_same_as_options(tmp_path):
    paths, base = models(tmp_path)
    text = (
        f"merge_method: ties\nbase_model: {base}\nmodels:\n{entries(paths)}parameters:\n  density: 0.3\n  lambda: 0.7\n"
    )
    found = run(tmp_path, text + "  normalize: false\ndtype: float32\n")
    assert found["method"] == "ties" and found["weights"] == [0.5, 0.8, 0.3]
    assert found["options"] == {"density": 0.3, "scaling": 0.7, "function": "sum"}
    other = merge.run(
        merge.Config(
            collection=tuple(reversed(paths)),
            base=base,
            method="ties",
            options=("density=0.3", "scaling=0.7", "function=sum"),
            weights=("m2=0.3", "m0=0.5", "m1=0.8"),
            out=str(tmp_path / "other"),
        )
    )
    assert other["weights"] == found["weights"]
    one, two = (safetensors.read(tmp_path / f / "model.safetensors") for f in ("out", "other"))
    assert all(np.array_equal(one[k], two[k]) for k in one)


HEAD = "merge_method: ties\nbase_model: b\nmodels:\n  - model: m\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("merge_method: tiess\nmodels: []\n", "merge_method: tiess is none of linear.*did you mean 'ties'"),
        ("merge_method: ties\nslices: []\n", "slices: is not taken"),
        ("merge_method: ties\nmodels: []\ntokenizer_source: union\n", "tokenizer_source: is not taken"),
        (
            HEAD + "    parameters: {weight: 1, denisty: 0.5}\n",
            r"models\[0\].parameters.denisty: is not taken; did you mean",
        ),
        (HEAD + "    parameters: {weight: [0, 1]}\n", "gradients and filters are not taken"),
        (HEAD + "    parameters:\n      weight:\n        - filter: mlp\n          value: 1\n", "gradients and filters"),
        (HEAD + "    parameters: {weight: x}\n", "a number expected, x found"),
        (HEAD + "    parameters: {weight: true}\n", "a number expected, True found"),
        (HEAD, "weight: is missing; ties needs it"),
        (HEAD + "    parameters: {weight: 1}\nparameters: {normalize: 2}\n", "true or false expected"),
        (HEAD + "    parameters: {weight: 1}\nparameters: {t: 2}\n", "parameters.t: is not taken"),
        ("merge_method: ties\nmodels:\n  - model: m\n    parameters: {weight: 1}\n", "base_model: is missing"),
        ("merge_method: linear\nmodels:\n  - model: a+b\n    parameters: {weight: 1}\n", "a path of a whole model"),
        ("merge_method: linear\nmodels: x\n", "models: is no list"),
        ("merge_method: linear\nmerge_method: ties\nmodels: []\n", "line 2: merge_method twice"),
        ("merge_method: &a linear\nmodels: *a\n", "anchors and tags"),
        ("merge_method: !!python/name:os.system x\n", "anchors and tags"),
        ("a: [" * 40 + "]" * 40, "nested too deep"),
        ("merge_method: [", "is no YAML"),
        ("- a\n", "is no recipe"),
        ("", "is no recipe"),
    ],
)
def test_what_is_not_taken_is_refused_by_name(tmp_path, text, said):
    with pytest.raises(errors.ConfigError, match=said):
        mergekit.apply(merge.Config(mergekit_yaml=recipe(tmp_path, text)))


def test_a_recipe_and_its_options_are_not_both_given(tmp_path):
    path = recipe(tmp_path, "merge_method: linear\nmodels: []\n")
    with pytest.raises(errors.ConfigError, match="the recipe sets method; leave --method out"):
        mergekit.apply(merge.Config(mergekit_yaml=path, method="mean"))
    with pytest.raises(errors.ConfigError, match="none.yaml: cannot be read"):
        mergekit.apply(merge.Config(mergekit_yaml=str(tmp_path / "none.yaml")))


def test_another_dtype_is_refused(tmp_path):
    paths, _ = models(tmp_path)
    text = f"merge_method: linear\nmodels:\n{entries(paths)}dtype: bfloat16\n"
    with pytest.raises(errors.ConfigError, match="dtype: bfloat16: the models are float32"):
        run(tmp_path, text)


@pytest.mark.slow
def test_slerp_goes_from_the_base(tmp_path):
    paths, base = models(tmp_path, 1)
    for t in (0.0, 1.0):
        text = f"merge_method: slerp\nbase_model: {base}\nmodels:\n  - model: {base}\n  - model: {paths[0]}\n"
        run(tmp_path, text + f"parameters:\n  t: {t}\n", out=f"out{t}")
        wanted = safetensors.read(paths[0] if t else base)["w"]
        assert np.abs(safetensors.read(tmp_path / f"out{t}" / "model.safetensors")["w"] - wanted).max() < 1e-6


RECIPES = {
    "linear": "merge_method: linear\nmodels:\n{models}",
    "linear, as they are": "merge_method: linear\nmodels:\n{models}parameters:\n  normalize: false\n",
    "task_arithmetic": "merge_method: task_arithmetic\nbase_model: {base}\nmodels:\n{models}parameters:\n"
    "  lambda: 0.6\n",
    "task_arithmetic, normalized": "merge_method: task_arithmetic\nbase_model: {base}\nmodels:\n{models}parameters:\n"
    "  normalize: true\n",
    "ties": "merge_method: ties\nbase_model: {base}\nmodels:\n{models}parameters:\n  density: 0.3\n",
    "ties, sum": "merge_method: ties\nbase_model: {base}\nmodels:\n{models}parameters:\n  density: 0.5\n"
    "  normalize: false\n  lambda: 0.4\n",
    "breadcrumbs": "merge_method: breadcrumbs\nbase_model: {base}\nmodels:\n{models}parameters:\n  density: 0.5\n"
    "  gamma: 0.05\n",
    "breadcrumbs_ties": "merge_method: breadcrumbs_ties\nbase_model: {base}\nmodels:\n{models}parameters:\n"
    "  density: 0.5\n  gamma: 0.05\n",
    "model_stock": "merge_method: model_stock\nbase_model: {base}\nmodels:\n{bare}",
    "karcher": "merge_method: karcher\nmodels:\n{bare}parameters:\n  max_iter: 100\n  tol: 1.0e-8\n",
    "slerp": "merge_method: slerp\nbase_model: {base}\nmodels:\n  - model: {base}\n  - model: {first}\nparameters:\n"
    "  t: 0.3\n",
}


@pytest.mark.slow
@needs_mergekit
@pytest.mark.parametrize("name", RECIPES)
def test_results_equal_mergekits(tmp_path, name):
    paths, base = models(tmp_path)
    bare = "".join(f"  - model: {p}\n" for p in paths)
    text = RECIPES[name].format(models=entries(paths), bare=bare, base=base, first=paths[0])
    run(tmp_path, text + "dtype: float32\n")
    config = recipe(tmp_path, text + "dtype: float32\n")
    done = subprocess.run([PROGRAM, config, str(tmp_path / "theirs")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = safetensors.read(tmp_path / "out" / "model.safetensors")
    (theirs,) = pathlib.Path(tmp_path / "theirs").glob("*.safetensors")
    wanted = safetensors.read(theirs)
    for key in ("w", "b"):
        assert np.linalg.norm(found[key] - wanted[key]) < 1e-5 * np.linalg.norm(wanted[key]), name


@pytest.mark.slow
@needs_mergekit
def test_dare_has_mergekits_moments(tmp_path):
    rng = np.random.default_rng(0)
    base = np.zeros((300, 200), "f4")
    safetensors.write(tmp_path / "base.safetensors", {"w": base})
    x = rng.standard_normal((2, 300, 200)).astype("f4")
    paths = []
    for n in range(2):
        paths.append(str(tmp_path / f"m{n}.safetensors"))
        safetensors.write(paths[-1], {"w": x[n]})
    text = f"merge_method: dare_linear\nbase_model: {tmp_path / 'base.safetensors'}\nmodels:\n"
    text += entries(paths, (1.0, 1.0)) + "parameters:\n  density: 0.4\ndtype: float32\n"
    run(tmp_path, text, force=True)
    subprocess.run([PROGRAM, recipe(tmp_path, text), str(tmp_path / "theirs")], check=True, capture_output=True)
    found = safetensors.read(tmp_path / "out" / "model.safetensors")["w"]
    (theirs,) = pathlib.Path(tmp_path / "theirs").glob("*.safetensors")
    wanted = safetensors.read(theirs)["w"]
    for moment in (lambda y: np.mean(y * x.sum(axis=0)), lambda y: np.mean(y**2), lambda y: np.mean(y == 0)):
        assert moment(found) == pytest.approx(moment(wanted), rel=0.03)
