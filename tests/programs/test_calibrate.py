"""Calibration: coefficients that were projected answer again as the originals did, on rows that were not used."""

import json

import numpy as np
import pytest

import jaxsub
from jaxsub import errors
from jaxsub.formats import safetensors
from jaxsub.pipelines import project, zoo


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zoo")
    models = zoo.make("same_start_split_task", folder, num_models=20, steps=150)
    jaxsub.fit(models, str(folder / "bundle"), rank=5, layers=("hidden/kernel",))
    jaxsub.fit(models, str(folder / "cores"), decomposition="hosvd", rank=8, layers=("hidden/kernel",))
    return folder, models


@pytest.mark.slow
@pytest.mark.parametrize("bundle", ["bundle", "cores"])
def test_models_answer_again_as_their_originals(made, tmp_path, bundle):
    folder, models = made
    options = {"bundle": str(folder / bundle), "collection": (models,), "calibrate": "digits"}
    config = project.Config(**options, write_models=str(tmp_path / "models"), calibrate_steps=200)
    found = project.run(config, str(tmp_path / "work"))
    figures = found["calibration"]["models"]
    agreement = np.mean([m["agreement"] for m in figures.values()], axis=0)
    score = np.mean([m["score"] for m in figures.values()], axis=0)
    assert agreement[1] > agreement[0] + 0.05
    assert score[1] < score[2] <= score[0] + 0.05
    assert json.loads((tmp_path / "work" / "project.json").read_text())["calibration"] == found["calibration"]
    # What is written are the calibrated models, in the bundle's subspace still.
    stored = safetensors.read(str(tmp_path / "work" / "coefficients.safetensors"))["hidden/kernel"]
    own = jaxsub.load(str(folder / bundle)).layers[0].subspace
    written = safetensors.read(str(tmp_path / "models" / "003.safetensors"))["hidden/kernel"]
    np.testing.assert_allclose(written, np.asarray(own.reconstruct(stored[3:4]))[0], atol=1e-5)
    plain = project.run(project.Config(bundle=str(folder / bundle), collection=(models,)), str(tmp_path / "plain"))
    before = safetensors.read(str(tmp_path / "plain" / "coefficients.safetensors"))["hidden/kernel"]
    assert np.abs(before - stored).max() > 0.01 and "calibration" not in plain
    assert "answers as the original" in project.table(found)


@pytest.mark.slow
def test_low_rank_updates_are_not_calibrated(tmp_path):
    adapters = zoo.make("lora", tmp_path, num_models=4, steps=4, base_steps=4)
    jaxsub.fit(adapters, str(tmp_path / "bundle"), rank=2)
    with pytest.raises(errors.ConfigError, match="no updates"):
        config = project.Config(bundle=str(tmp_path / "bundle"), collection=(adapters,), calibrate="digits")
        project.run(config)
