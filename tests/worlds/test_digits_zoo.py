"""Worlds that are trained: accuracy, starts, and what the weights share."""

import importlib

import jax
import numpy as np
import pytest

from jaxsub import errors
from jaxsub.models import mlp
from jaxsub.tasks import digits
from jaxsub.worlds import _digits, _training
from tests.worlds import oracles

TINY = _digits.Options(num_models=16, steps=60, learning_rate=5e-3)
NAMES = ("same_start_same_task", "same_start_split_task", "own_start_same_task", "own_start_split_task")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Layers and labels of the four worlds, small; "compiled" is how often the loop was compiled for them."""
    worlds = {}
    _training.train.clear_cache()
    for name in NAMES:
        folder = tmp_path_factory.mktemp(name)
        importlib.import_module(f"jaxsub.worlds.{name}").make(TINY, 0, folder)
        worlds[name] = oracles.read(folder)
    worlds["compiled"] = _training.train._cache_size()
    return worlds


@pytest.mark.slow
def test_layers_shapes_and_labels(tiny):
    layers, labels = tiny["own_start_split_task"]
    shapes = {name: x.shape for name, x in layers.items()}
    assert shapes == {
        "hidden/kernel": (16, 64, 64),
        "hidden/bias": (16, 64),
        "output/kernel": (16, 64, 10),
        "output/bias": (16, 10),
    }
    assert sorted(labels[0]) == ["accuracy", "seed", "start", "task"]
    assert len({label["task"] for label in labels}) > 8
    assert len({label["start"] for label in labels}) == 16


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_networks_learn(tiny, name):
    reached = [float(label["accuracy"]) for label in tiny[name][1]]
    assert np.mean(reached) > 0.85  # chance is .1 on ten classes, at most .2 on five


@pytest.mark.slow
def test_recorded_accuracy_is_that_of_the_written_weights(tiny):
    layers, labels = tiny["same_start_split_task"]
    held_out = digits.load()[1]
    for i in (0, 7):
        own = np.isin(held_out.targets, [int(c) for c in labels[i]["task"].removeprefix("digits ")])
        assert 0 < own.sum() < 360
        z = held_out.inputs[own] @ layers["hidden/kernel"][i] + layers["hidden/bias"][i]
        h = np.sign(z) * np.maximum(np.abs(z) - 0.5, 0)
        answer = (h @ layers["output/kernel"][i] + layers["output/bias"][i]).argmax(axis=1)
        assert np.mean(answer == held_out.targets[own]) == pytest.approx(float(labels[i]["accuracy"]), abs=0.006)


@pytest.mark.slow
def test_shared_starts_stay_close_and_own_starts_are_unrelated(tiny):
    pairs = np.triu_indices(16, 1)
    for layer in _digits.KERNELS:
        for name in NAMES:
            x = tiny[name][0][layer]
            cosine = oracles.cosines(x)[pairs]
            if name.startswith("same"):
                assert cosine.min() > 0.5
                assert oracles.mean_share(x) > 0.6
            else:
                assert np.abs(cosine).max() < 0.25
                assert oracles.mean_share(x) < 1.5 / 16


@pytest.mark.slow
def test_only_shared_starts_share_a_subspace(tiny):
    for layer in _digits.KERNELS:
        left = {name: oracles.leave_one_out(tiny[name][0][layer], 4) for name in NAMES}
        assert left["same_start_split_task"] < 0.85
        assert left["same_start_split_task"] < left["same_start_same_task"] < 0.98
        assert min(left["own_start_same_task"], left["own_start_split_task"]) > 0.97


@pytest.mark.slow
def test_all_worlds_of_one_size_use_one_compiled_loop(tiny):
    assert tiny["compiled"] == 1


@pytest.mark.slow
def test_a_network_does_not_depend_on_how_many_are_trained_beside_it():
    few, many = (
        _digits.trained(_digits.Options(num_models=n, steps=3), 0, same_start=False, split_task=False)[0]
        for n in (2, 3)
    )
    spread = np.abs(few["hidden"]["kernel"][0] - many["hidden"]["kernel"][0]).max()
    assert spread < 1e-5  # other vector widths round differently


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(mlp.ACTIVATIONS))
def test_only_odd_activations_keep_the_sign_symmetry(name):
    model = mlp.MLP(hidden=8, activation=name)
    x = jax.random.normal(jax.random.key(0), (5, 64))
    params = model.init(jax.random.key(1), x)["params"]
    flipped = jax.tree.map(lambda p: p, params)
    flipped["hidden"] = jax.tree.map(lambda p: p.at[..., 0].multiply(-1.0), params["hidden"])
    flipped["output"]["kernel"] = params["output"]["kernel"].at[0].multiply(-1.0)
    same = np.allclose(model.apply({"params": params}, x), model.apply({"params": flipped}, x), atol=1e-5)
    assert same == (name != "relu")


@pytest.mark.parametrize("values", [{"num_models": 0}, {"learning_rate": 0.0}, {"activation": "rleu"}])
def test_impossible_options_are_named(values):
    with pytest.raises(errors.ConfigError, match=next(iter(values))) as caught:
        _digits.require(_digits.Options(**values))
    if "activation" in values:
        assert "did you mean 'relu'" in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("same_start", "split_task", "most", "least"),
    [(True, False, 0.8, 0.0), (True, True, 0.5, 0.0), (False, False, 1.0, 0.97), (False, True, 1.0, 0.975)],
)
def test_the_full_zoo_has_the_known_truth(same_start, split_task, most, least):
    params, _, reached = _digits.trained(_digits.Options(), 0, same_start=same_start, split_task=split_task)
    assert reached.mean() > 0.965 and reached.min() > 0.93
    x = params["hidden"]["kernel"].reshape(200, -1).astype(np.float64)
    left = oracles.leave_one_out(x[:100], 16)  # half of the models: brute force is slow
    assert least < left < most
    for layer in ("hidden", "output"):
        share = oracles.mean_share(params[layer]["kernel"].astype(np.float64))
        assert share > 0.7 if same_start else share < 3 / 200
