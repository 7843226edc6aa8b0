"""Many small networks trained at once: one compiled loop, batches drawn inside it.

start (N, ...) --[steps x vmap over N: batch, gradient, Adam]--> parameters (N, ...)
"""

import functools

import jax
import numpy as np
import optax

from jaxsub.tasks import digits
from jaxsub.tasks._data import Data


@functools.partial(jax.jit, static_argnames=("model", "task", "options", "axes", "steps"))
def train(params, frozen, data, keys, learning_rate, /, *, model, task, options, axes, steps):
    """Parameters after `steps` Adam steps of N networks, each on its own batches.

    Args:
        params: tree of arrays (N, ...), where each network starts.
        frozen: other variable collections of the model, the same for all; {} for none.
        data: tasks.Data, with a leading axis of N where `axes` says so.
        keys: (N,) typed keys of the batches.
        learning_rate: scalar.
        model: flax module, static.
        task: module of `tasks`, static.
        options: its Options, static.
        axes: Data of 0, one for each network, or None, the same for all; static.
        steps: static.

    Returns:
        tree like `params`.

    Source: Kingma and Ba 2015, "Adam".
    """
    optimizer = optax.adam(learning_rate)

    def one(start, own, key):
        def loss(params, chosen):
            outputs = model.apply({"params": params, **frozen}, own.inputs[chosen])
            return task.loss(outputs, own.targets[chosen])

        def step(carry, step_key):
            params, state = carry
            chosen = task.batches(own.rows, own.num_rows, options, step_key)
            gradient = jax.grad(loss)(params, chosen)
            with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer power
                updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), jax.random.split(key, steps))
        return params

    return jax.vmap(one, in_axes=(0, axes, 0))(params, data, keys)


@functools.partial(jax.jit, static_argnames="model")
def start(keys, example, /, *, model):
    """Fresh parameters, a tree of (N, ...), one network a key (N,), for inputs like `example` (1, ...)."""
    return jax.vmap(lambda key: model.init(key, example)["params"])(keys)


@functools.partial(jax.jit, static_argnames=("model", "axis"))
def outputs(params, frozen, inputs, /, *, model, axis=None):
    """Outputs (N, n, ...) of N networks on the same inputs (n, ...), or with `axis` 0 on their own (N, n, ...)."""
    return jax.vmap(lambda p, x: model.apply({"params": p, **frozen}, x), in_axes=(0, axis))(params, inputs)


def of_classes(split, classes, targets):
    """Data of N networks that see some classes of a Data each.

    Args:
        split: Data with targets (n,).
        classes: (N, 10) bool.
        targets: (N, n) int32, what stands for each row's class in each network.
    """
    allowed = classes[:, split.targets]
    rows = np.argsort(~allowed, axis=1, kind="stable").astype(np.int32)
    return Data(split.inputs, targets, rows, allowed.sum(axis=1).astype(np.int32))


OF_CLASSES = Data(None, 0, 0, 0)  # axes of `of_classes`


def score(task, answers, targets, rows, num_rows):
    """Mean score of N networks on the rows of their tasks, (N,) float64.

    Args:
        task: module of `tasks`.
        answers: (N, n, ...) outputs on all rows.
        targets: (N, n, ...).
        rows, num_rows: (N, n) and (N,), as in Data.
    """
    each = np.asarray(task.score(np.asarray(answers), np.asarray(targets)), np.float64)
    used = np.arange(each.shape[1])[None] < np.asarray(num_rows)[:, None]
    return np.where(used, np.take_along_axis(each, np.asarray(rows), axis=1), 0).sum(axis=1) / num_rows


def numbered(seed, *names):
    """Typed keys by name for one seed; adding a name changes no other key."""
    import zlib

    root = jax.random.key(seed)
    return [jax.random.fold_in(root, zlib.crc32(name.encode())) for name in names]


def begun(key, example, num_models, *, same_start, model):
    """Where N networks start, a tree of (N, ...): all from the same weights, or each from its own."""
    keys = jax.random.split(key, num_models)
    params = start(keys[:1] if same_start else keys, example, model=model)
    return jax.tree.map(lambda p: p.repeat(num_models, axis=0), params) if same_start else params


def collection(options, seed, streams, classes, names, frozen, *, same_start, model):
    """N networks on digits, trained together from one start or their own, each on its classes and names.

    Args:
        options: num_models, learning_rate, batch_size and steps.
        seed: of starts and batches.
        streams: names of the two random streams, starts and batches.
        classes: (N, 10) bool, the classes a network sees.
        names: (N, 10) int32 output unit that stands for each class.
        frozen: other variable collections of the model; {} for none.
        same_start: whether all start from the same weights.
        model: flax module.

    Returns:
        parameters, a tree of (N, ...) on the host, and held-out accuracy (N,).
    """
    data, held_out = (of_classes(split, classes, names[:, split.targets]) for split in digits.load())
    start_key, batch_key = numbered(seed, *streams)
    params = begun(start_key, data.inputs[:1], options.num_models, same_start=same_start, model=model)
    params = train(
        params,
        frozen,
        data,
        jax.random.split(batch_key, options.num_models),
        np.float32(options.learning_rate),
        model=model,
        task=digits,
        options=digits.Options(batch_size=options.batch_size),
        axes=OF_CLASSES,
        steps=options.steps,
    )
    answers = outputs(params, frozen, held_out.inputs, model=model)
    return jax.device_get(params), score(digits, answers, held_out.targets, held_out.rows, held_out.num_rows)
