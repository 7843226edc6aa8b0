"""`jaxsub project --score`: the user's own function on originals, means, random subspaces and reconstructions."""

import importlib
import json
import os

import numpy as np
import pytest

import jaxsub
from jaxsub import errors
from jaxsub.formats import peft, safetensors
from jaxsub.pipelines import project


@pytest.fixture
def made(tmp_path, monkeypatch):
    """(bundle, models) of rank-2 models, with the working folder that of the user's code."""
    rng, models = np.random.default_rng(0), tmp_path / "m"
    os.makedirs(models)
    mean, plane = rng.standard_normal((8, 6)), rng.standard_normal((2, 8, 6))
    for n in range(5):
        w = mean + np.tensordot(rng.standard_normal(2), plane, 1)
        tensors = {"w": w.astype(np.float16), "bias": np.full(6, n, np.float32)}
        safetensors.write(models / f"m{n}.safetensors", tensors)
    jaxsub.fit(str(models), tmp_path / "b", rank=2, layers=["w"])
    monkeypatch.chdir(tmp_path)
    importlib.invalidate_caches()
    return str(tmp_path / "b"), str(models)


def run(made, spec, workdir=None, **more):
    config = project.Config(bundle=made[0], collection=(made[1],), score=spec, **more)
    return project.run(config, workdir)


def user_code(name, text):
    with open(f"{name}.py", "w", encoding="utf-8") as file:
        file.write(text)
    importlib.invalidate_caches()


def test_scores_are_of_the_weights_they_are_named_for(made, tmp_path):
    user_code(
        "user_sums", "import numpy as np\ndef f(w, name):\n    return float(np.abs(w['w'].astype(float)).sum())\n"
    )
    found = run(made, "user_sums:f", str(tmp_path / "out"))
    bundle = jaxsub.load(made[0])
    mean = np.asarray(bundle.layers[0].subspace.mean).reshape(8, 6).astype(np.float16)
    for n in range(5):
        w = safetensors.read(tmp_path / "m" / f"m{n}.safetensors")["w"]
        one = found["scores"][f"m{n}"]
        assert one["original"] == pytest.approx(np.abs(w.astype(float)).sum(), rel=1e-12)
        assert one["rebuilt"] == pytest.approx(one["original"], rel=2e-3)
        assert one["mean"] == pytest.approx(np.abs(mean.astype(float)).sum(), rel=1e-12)
    assert np.ptp([one["random"] for one in found["scores"].values()]) > 0
    assert all(abs(one["random"] - one["original"]) > 1e-2 for one in found["scores"].values())
    assert json.loads((tmp_path / "out" / project.RECORD).read_text())["scores"] == found["scores"]
    lines = project.table(found).splitlines()
    assert lines[-7].split() == ["score", "original", "mean", "random", "rebuilt"] and max(map(len, lines)) <= 100
    assert float(lines[-1].split()[-4]) == pytest.approx(
        np.median([one["original"] for one in found["scores"].values()]), rel=1e-3
    )
    assert run(made, "user_sums:f")["scores"] == found["scores"]  # the random subspace is that of the seed
    other = run(made, "user_sums:f", seed=1)["scores"]["m0"]
    assert other["random"] != found["scores"]["m0"]["random"] and other["mean"] == found["scores"]["m0"]["mean"]


def test_the_function_sees_the_whole_model_in_its_dtypes(made):
    user_code(
        "user_whole",
        "def f(w, name):\n"
        "    assert sorted(w) == ['bias', 'w'] and w['w'].dtype.name == 'float16' and w['w'].shape == (8, 6)\n"
        "    assert w['bias'].dtype.name == 'float32'\n"
        "    return w['bias'][0] if name == 'm' + str(int(w['bias'][0])) else -1\n",
    )
    found = run(made, "user_whole:f")["scores"]
    assert {name: set(one.values()) for name, one in found.items()} == {f"m{n}": {float(n)} for n in range(5)}


@pytest.mark.slow
def test_low_rank_updates_come_as_factors_with_their_scale(tmp_path, monkeypatch):
    rng, updates = np.random.default_rng(1), {}
    left, right = rng.standard_normal((9, 3)), rng.standard_normal((3, 7))
    for n in range(6):
        a, b = rng.standard_normal((2, 3)) @ right, left @ rng.standard_normal((3, 2))
        peft.write(tmp_path / "m" / f"a{n}", {"q": (a.astype(np.float32), b.astype(np.float32), 6.0, 2)})
        updates[f"a{n}"] = 3.0 * np.linalg.norm(b @ a)
    jaxsub.fit(str(tmp_path / "m"), tmp_path / "b", rank=3)
    monkeypatch.chdir(tmp_path)
    user_code("user_lora", "import numpy as np\ndef f(w, name):\n    a, b = w['q']\n    return np.linalg.norm(b @ a)\n")
    found = run((str(tmp_path / "b"), str(tmp_path / "m")), "user_lora:f")["scores"]
    for name, norm in updates.items():
        assert found[name]["original"] == pytest.approx(norm, rel=1e-5)
        assert found[name]["rebuilt"] == pytest.approx(norm, rel=1e-5)
        assert found[name]["mean"] == 0.0 and found[name]["random"] < 0.9 * norm


@pytest.mark.parametrize(
    "text, spec, error, words",
    [
        ("", "user_bad", errors.ConfigError, "give module:function"),
        ("", "user_bad:", errors.ConfigError, "give module:function"),
        ("", "../user_bad:f", errors.ConfigError, "give module:function"),
        ("x = 1", "user_bad:x", errors.ConfigError, "has no function x"),
        ("", "no_such_module_here:f", errors.ConfigError, "cannot be imported"),
        ("1 / 0", "user_bad:f", errors.ConfigError, "ZeroDivisionError"),
        ("def f(w, name):\n    return w['v']", "user_bad:f", errors.InputError, r"m0: .*original.*KeyError"),
        ("def f(w, name):\n    return 1 if name < 'm3' else 'x'", "user_bad:f", errors.InputError, "m3: .*'x'"),
    ],
)
def test_mistakes_are_said_with_the_model(made, tmp_path, text, spec, error, words):
    name = f"user_bad_{abs(hash((text, spec)))}"  # modules are imported once
    user_code(name, text)
    with pytest.raises(error, match=words):
        run(made, spec.replace("user_bad", name), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_what_is_not_finite_is_no_number_in_the_record(made, tmp_path):
    user_code("user_nan", "def f(w, name):\n    return float('nan') if name == 'm1' else 2\n")
    found = run(made, "user_nan:f", str(tmp_path / "out"))
    assert found["scores"]["m1"]["original"] is None and found["scores"]["m2"]["original"] == 2.0
    assert project.table(found).splitlines()[-1].split()[-1] == "2"
