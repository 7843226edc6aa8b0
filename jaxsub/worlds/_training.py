"""Many small networks trained at once: one compiled loop, batches drawn inside it.

start (N, ...) --[steps x vmap over N: batch, gradient, Adam]--> parameters (N, ...)
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsub.tasks import digits


@functools.partial(jax.jit, static_argnames=("model", "batch", "steps"))
def train(params, frozen, rows, num_rows, names, keys, images, labels, learning_rate, /, *, model, batch, steps):
    """Parameters after `steps` Adam steps of N networks, each on its own batches.

    Args:
        params: tree of arrays (N, ...), where each network starts.
        frozen: other variable collections of the model, the same for all; {} for none.
        rows: (N, n) int32 rows of `images` each network may see, in the first `num_rows` places.
        num_rows: (N,) int32.
        names: (N, 10) int32 output unit that stands for each class.
        keys: (N,) typed keys of the batches.
        images: (n, 64) float32.
        labels: (n,) int32.
        learning_rate: scalar.
        model: flax module, static.
        batch: digits.Options, static.
        steps: static.

    Returns:
        tree like `params`.

    Source: Kingma and Ba 2015, "Adam".
    """
    optimizer = optax.adam(learning_rate)

    def one(start, own_rows, own_num_rows, own_names, key):
        def loss(params, chosen):
            logits = model.apply({"params": params, **frozen}, images[chosen])
            return digits.loss(logits, own_names[labels[chosen]])

        def step(carry, step_key):
            params, state = carry
            chosen = digits.batches(own_rows, own_num_rows, batch, step_key)
            gradient = jax.grad(loss)(params, chosen)
            with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer power
                updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), jax.random.split(key, steps))
        return params

    return jax.vmap(one)(params, rows, num_rows, names, keys)


@functools.partial(jax.jit, static_argnames="model")
def start(keys, /, *, model):
    """Fresh parameters, a tree of (N, ...), one network a key (N,)."""
    blank = jnp.zeros((1, digits.NUM_PIXELS), jnp.float32)
    return jax.vmap(lambda key: model.init(key, blank)["params"])(keys)


@functools.partial(jax.jit, static_argnames="model")
def logits(params, frozen, images, /, *, model):
    """Logits (N, n, 10) of N networks on images (n, 64)."""
    return jax.vmap(lambda p: model.apply({"params": p, **frozen}, images))(params)


def rows_of(labels, classes):
    """Rows each network may see.

    Args:
        labels: (n,) int32.
        classes: (N, 10) bool, the classes each network is trained on.

    Returns:
        rows (N, n) int32 with the allowed ones first, and their number (N,) int32.
    """
    allowed = classes[:, labels]
    return np.argsort(~allowed, axis=1, kind="stable").astype(np.int32), allowed.sum(axis=1).astype(np.int32)


def accuracy(logits, names, classes, split):
    """Share of right answers on the images of a network's own classes, (N,) float64.

    Args:
        logits: (N, n, 10) on the images of `split`.
        names: (N, 10) int32 output unit of each class.
        classes: (N, 10) bool.
        split: digits.Split.
    """
    own = classes[:, split.labels]
    right = digits.score(np.asarray(logits), names[:, split.labels])
    return (right & own).sum(axis=1) / own.sum(axis=1)


def numbered(seed, *names):
    """Typed keys by name for one seed; adding a name changes no other key."""
    import zlib

    root = jax.random.key(seed)
    return [jax.random.fold_in(root, zlib.crc32(name.encode())) for name in names]


def collection(options, seed, streams, classes, names, frozen, *, same_start, model):
    """N networks trained together from one start or their own, each on its classes and names.

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
    data, held_out = digits.load()
    start_key, batch_key = numbered(seed, *streams)
    start_keys = jax.random.split(start_key, options.num_models)
    params = start(start_keys[:1] if same_start else start_keys, model=model)
    if same_start:
        params = jax.tree.map(lambda p: p.repeat(options.num_models, axis=0), params)
    rows, num_rows = rows_of(data.labels, classes)
    params = train(
        params,
        frozen,
        rows,
        num_rows,
        names,
        jax.random.split(batch_key, options.num_models),
        data.images,
        data.labels,
        np.float32(options.learning_rate),
        model=model,
        batch=digits.Options(batch_size=options.batch_size),
        steps=options.steps,
    )
    answers = logits(params, frozen, held_out.images, model=model)
    return jax.device_get(params), accuracy(answers, names, classes, held_out)
