"""A few steps on coefficients alone behind a projection, so that models answer again as their originals did.

    c = projection of a model;   minimise the cross-entropy of the rebuilt model's answers to the original's

Inputs are the training rows of a task; no label is used, so that models of different tasks can share one. All models
are calibrated in one program. What is reported is on held-out rows.

Source: calibration of coefficients after projection, the follow-up study of nine ResNet-50s of Kaushik et al. 2025
(2048 samples, 50 steps); answers of the original in place of labels.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxsub import errors, plugins
from jaxsub.parametrisations import _spaces
from jaxsub.pipelines import train_setup
from jaxsub.pipelines.zoo import parse_options
from jaxsub.tasks import _data
from jaxsub.training import network as networks, steps


@dataclasses.dataclass(frozen=True)
class Answers:
    """The task of answering as another network does, in the place of a module of `tasks`."""

    batches = staticmethod(_data.batches)

    @staticmethod
    def loss(outputs, targets):
        """Mean cross-entropy of outputs (..., o) to the original's (..., o)."""
        return -(jax.nn.softmax(targets) * jax.nn.log_softmax(outputs)).sum(axis=-1).mean()

    @staticmethod
    def score(outputs, targets):
        """Whether the largest output is the original's, (..., n)."""
        return outputs.argmax(axis=-1) == targets.argmax(axis=-1)


@dataclasses.dataclass(frozen=True)
class _Size:
    batch_size: int


def run(config, opened, bundle, pairs, values):
    """Calibrated coefficients, and how models answered before and after.

    Args:
        config: project.Config.
        opened: Collection.
        bundle: Bundle of dense layers.
        pairs: its layers, from `Bundle.pairs`.
        values: {key: (n, k...)} projections.

    Returns:
        ({key: (n, k...)}, {"task", "models": {id: {"agreement": [before, after],
        "score": [original, before, after]}}}).

    Raises:
        ConfigError: low-rank updates, layers that not all models have, or a network that is not theirs.
    """
    task = train_setup.task_of(config.calibrate, "calibrate", parts=("Options", "load", "score", "OUTPUTS"))
    options = parse_options(task.Options, config.calibrate_options)
    train, held_out = task.load(options)
    module = train_setup.module_of(config.calibrate_model, task, option="calibrate_model")
    network, shapes = networks.of(module, train.inputs[:2])
    layers = {_spaces.flax_name(layer.name, layer.parametrisation == "lora")[0]: layer for _, layer in pairs}
    for group, layer in pairs:
        if layer.parametrisation == "lora" or len(group.members) < len(opened.models):
            raise errors.ConfigError(
                f"layer {errors.quote(layer.name)}: calibration takes weights that all models have, no updates"
            )
    spaces = _spaces.of_bundle(bundle, shapes)
    originals = [_weights(model, shapes) for model in opened.models]
    linear = [space.basis is not None for space in spaces.values()]
    if not all(linear) and any(linear):
        raise errors.ConfigError("calibrate: a bundle of components or one of cores; this one has both")
    own = plugins.load("parametrisations", "scalar" if all(linear) else "core")
    plan = steps.Plan(
        network, Answers(), _Size(min(config.calibrate_rows, 256)), own, own.Options(), steps.optimizer("adam")
    )
    asked = [np.asarray(jax.jit(network)(w, train.inputs)) for w in originals]
    answered = [np.asarray(jax.jit(network)(w, held_out.inputs)) for w in originals]
    means = {name: jnp.asarray(space.mean) for name, space in spaces.items()}
    starts = [{name: means[name] if name in means else jnp.asarray(w[name]) for name in shapes} for w in originals]
    begun = [own.init(jax.random.key(0), start, spaces, own.Options()) for start in starts]
    frozen, frozen_axes = steps.stacked([steps.shared(begun[0][1], pair[1]) for pair in begun])
    rows = np.random.RandomState(0).permutation(np.asarray(train.rows)[: int(train.num_rows)])[: config.calibrate_rows]
    rows, count = rows.astype(np.int32), np.int32(len(rows))

    def given(inputs, answers, rows, count):
        data, axes = steps.stacked([_data.Data(inputs, one, rows, count) for one in answers])
        keys = jax.random.split(jax.random.key(config.seed), len(originals))
        rates = jnp.full(len(originals), config.calibrate_rate, jnp.float32)
        return steps.Runs(frozen, data, keys, rates), (frozen_axes, axes)

    trainable = {name: jnp.asarray(_turned(values[bundle.key(layers[name])], spaces[name])) for name in begun[0][0]}
    runs, axes = given(train.inputs, asked, rows, count)
    check, check_axes = given(held_out.inputs, answered, held_out.rows, held_out.num_rows)
    state = steps.begin(trainable, runs.rates, plan)
    before = steps.outputs(state.trainable, check, plan=plan, axes=check_axes)
    state, _ = steps.advance(state, runs, plan=plan, axes=axes, num_steps=config.calibrate_steps)
    after = steps.outputs(state.trainable, check, plan=plan, axes=check_axes)
    found = dict(values)
    for name, c in state.trainable.items():
        key = bundle.key(layers[name])
        found[key] = _back(np.asarray(c), spaces[name]).astype(values[key].dtype)
    return found, {"task": config.calibrate, "steps": config.calibrate_steps, "models": {
        ref.id: _figures(task, held_out, answered[n], before[n], after[n]) for n, ref in enumerate(opened.refs)
    }}  # fmt: skip


def _weights(model, shapes):
    found, _ = train_setup.weights_of(model, shapes)
    missing = [name for name in shapes if name not in found]
    if missing:
        raise errors.InputError(model.path, "lacks a layer of the network", key=missing[0], hint="set calibrate_model")
    return {name: w.astype(np.float32) for name, w in found.items()}


def _turned(values, space):
    """Coefficients in the network's orientation: cores have the axes of the layer."""
    if values.ndim == 2:
        return values.astype(np.float32)
    return values.astype(np.float32).transpose(0, *(axis + 1 for axis in space.order))


def _back(values, space):
    if values.ndim == 2:
        return values
    return values.transpose(0, *(space.order.index(a) + 1 for a in range(values.ndim - 1)))


def _figures(task, data, original, before, after):
    rows = np.asarray(data.rows)[: int(data.num_rows)]
    targets, own = np.asarray(data.targets), Answers()

    def mean(each):
        return float(np.asarray(each, np.float64)[rows].mean())

    return {
        "agreement": [mean(own.score(np.asarray(x), original)) for x in (before, after)],
        "score": [mean(task.score(np.asarray(x), targets)) for x in (original, before, after)],
    }


def table(found):
    """The figures as text: medians over models."""
    models = found["models"].values()
    agreement = np.median([m["agreement"] for m in models], axis=0)
    score = np.median([m["score"] for m in models], axis=0)
    return (
        f"calibrated by {found['steps']} steps on {found['task']}; held-out rows, medians of {len(models)} models:\n"
        f"answers as the original: {agreement[0]:.4f} before, {agreement[1]:.4f} after\n"
        f"score: {score[0]:.4f} original, {score[1]:.4f} before, {score[2]:.4f} after"
    )
