"""Networks on variations of digits: one base, each task learnt, and the weights that were written are those."""

import jax
import numpy as np
import pytest

from jaxsub.formats import safetensors
from jaxsub.models import _trees, cnn, vit
from jaxsub.tasks import digits
from jaxsub.worlds import _variants, cnn_variants, vit_variants
from tests.worlds import oracles


@pytest.mark.slow
@pytest.mark.parametrize(("world", "model"), [(vit_variants, vit.ViT()), (cnn_variants, cnn.CNN())])
def test_each_model_has_learnt_its_task_and_the_base_another(tmp_path, world, model):
    options = world.Options(num_tasks=3, models_per_task=2)
    world.make(options, 0, tmp_path)
    layers, labels = oracles.read(tmp_path)
    base = safetensors.read(str(tmp_path / "base.safetensors"))
    assert {name: x.shape for name, x in base.items()} == {name: x.shape[1:] for name, x in layers.items()}

    def accuracy(weights, task):
        held_out = digits.load(digits.Options(**task))[1]
        tree = _trees.nested({name: np.float32(w) for name, w in weights.items()})
        answers = jax.jit(model.apply)({"params": tree}, held_out.inputs).argmax(axis=1)
        return float(np.mean(answers == held_out.targets))

    for number, task in enumerate(_variants.TASKS[:3]):
        for i in (2 * number, 2 * number + 1):
            reached = accuracy({name: x[i] for name, x in layers.items()}, task)
            assert reached == pytest.approx(float(labels[i]["accuracy"]), abs=0.006)
            assert reached > 0.75 and labels[i]["task"] == digits.name(digits.Options(**task))
    assert accuracy(base, _variants.TASKS[0]) > 0.85
    assert accuracy(base, _variants.TASKS[1]) < 0.5  # quarter turns are another task
    for name, x in layers.items():
        if x.ndim > 2:
            assert 0.5 < oracles.mean_share(x) and np.abs(x - x[0]).max() > 0, name
