"""Every task: held-out rows that are not trained on, its model, loss, score and batches."""

import inspect

import jax
import numpy as np
import pytest

from jaxsub import plugins

NAMES = plugins.available("tasks")


@pytest.fixture(params=NAMES)
def task(request):
    return plugins.load("tasks", request.param)


def test_no_held_out_row_is_trained_on(task):
    train, held_out = task.load(task.Options())
    seen, asked = ([x.tobytes() for x in data.used()[0]] for data in (train, held_out))
    assert not {*seen} & {*asked}
    assert len(seen) > 3 * len(asked) > 100


def test_loading_twice_gives_the_same(task):
    for first, second in zip(task.load(task.Options(draw=2)), task.load(task.Options(draw=2)), strict=True):
        for a, b in zip(first, second, strict=True):
            np.testing.assert_array_equal(a, b)


def test_draws_of_a_variation_have_names_of_their_own(task):
    options = {} if "language" in inspect.signature(task.Options).parameters else {"variant": "half"}
    names = [task.name(task.Options(draw=draw, **options)) for draw in range(8)]
    assert len({*names}) > 5
    assert names == [task.name(task.Options(draw=draw, **options)) for draw in range(8)]


def test_its_model_takes_its_inputs(task):
    train, _ = task.load(task.Options())
    model = plugins.load("models", task.MODEL).Model(outputs=task.OUTPUTS)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), train.inputs[:2]))
    found = jax.eval_shape(lambda p: model.apply(p, train.inputs[:2]), params)
    assert found.shape == (2, *train.targets.shape[1:], task.OUTPUTS)


def test_loss_is_the_mean_cross_entropy_of_what_is_asked(task):
    _, held_out = task.load(task.Options())
    targets = held_out.targets[:7]
    outputs = np.random.default_rng(0).standard_normal((*targets.shape, task.OUTPUTS)).astype(np.float32)
    logs = outputs - np.log(np.exp(outputs.astype(np.float64)).sum(axis=-1, keepdims=True))
    each = -np.take_along_axis(logs, np.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    assert float(task.loss(outputs, targets)) == pytest.approx(each[targets >= 0].mean(), rel=1e-5)


def test_score_of_right_and_of_wrong_answers(task):
    _, held_out = task.load(task.Options())
    targets = held_out.targets[:9]
    outputs = np.eye(task.OUTPUTS, dtype=np.float32)[np.maximum(targets, 0)]
    np.testing.assert_array_equal(task.score(outputs, targets), np.ones(9))
    np.testing.assert_array_equal(task.score(-outputs, targets), np.zeros(9))
    np.testing.assert_array_equal(task.score(np.stack([outputs, -outputs]), targets), [np.ones(9), np.zeros(9)])


def test_batches_are_rows_of_the_task(task):
    options = task.Options(batch_size=400)
    rows = np.array([5, 3, 8, 1, 2], np.int32)
    drawn = np.asarray(task.batches(jax.numpy.asarray(rows), np.int32(2), options, jax.random.key(0)))
    assert {*drawn.tolist()} == {5, 3} and drawn.shape == (400,)
