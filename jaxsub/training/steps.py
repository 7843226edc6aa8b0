"""The training loop: R runs of one parametrisation in one compiled program.

    state (R, ...) --[num_steps x vmap over R: batch, gradient, optimizer]--> state

Runs differ in seed, task, learning rate and what is frozen; what they have in common is there once. Batches of step t
hang on the run's key and t alone, so that a run which goes on from a checkpoint is the run in one piece.
"""

import dataclasses
import functools
import inspect
import typing

import jax
import jax.numpy as jnp
import optax

from jaxsub import errors
from jaxsub.training import network as networks


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is compiled in: hashable, static.

    Attributes:
        network: network.Network.
        task, task_options: module of `tasks` (or an object like it) and its Options.
        parametrisation, options: module of `parametrisations` and its Options.
        optimizer: optax transformation made by `optimizer`.
        schedule: factor of the learning rate by step.
        accumulate: parts that a batch is computed in.
        batch_axis: mesh axis over which a batch is shared, or "".
    """

    network: networks.Network
    task: typing.Any
    task_options: typing.Any
    parametrisation: typing.Any
    options: typing.Any
    optimizer: optax.GradientTransformation
    schedule: typing.Callable = optax.constant_schedule(1.0)
    accumulate: int = 1
    batch_axis: str = ""

    def weights(self, trainable, frozen):
        """{layer: array or a value of `parametrisations`} of one run."""
        return self.parametrisation.params(trainable, frozen, self.options)


class State(typing.NamedTuple):
    """R runs on their way; a pytree. `best` is what scored best on the validation rows so far."""

    step: typing.Any  # () int32
    trainable: typing.Any  # (R, ...)
    optimizer: typing.Any  # (R, ...)
    best: typing.Any  # (R, ...) like trainable
    best_score: typing.Any  # (R,)
    stale: typing.Any  # (R,) int32 evaluations since the best one
    is_stopped: typing.Any  # (R,) bool


class Runs(typing.NamedTuple):
    """What R runs are given; leaves with a leading axis of R where `axes` has 0."""

    frozen: typing.Any
    data: typing.Any
    keys: typing.Any  # (R,) typed keys of the batches, or () one for all: the same batches, drawn once
    rates: typing.Any  # (R,) float32 learning rates


def stacked(trees):
    """(tree, axes): leaves that are one object in all trees stand once (axis None), others are stacked (axis 0)."""
    first, structure = jax.tree.flatten(trees[0])
    columns = list(zip(*(jax.tree.leaves(tree) for tree in trees), strict=True)) if first else []
    leaves, axes = [], []
    for column in columns:
        is_one = all(leaf is column[0] for leaf in column)
        leaves.append(jnp.asarray(column[0]) if is_one else jnp.stack([jnp.asarray(leaf) for leaf in column]))
        axes.append(None if is_one else 0)
    return jax.tree.unflatten(structure, leaves), tuple(axes)


def shared(first, tree):
    """`tree` with the leaves of `first` where they are equal, so that `stacked` keeps them once."""

    def same(a, b):
        is_equal = a is b or (a.shape == b.shape and a.dtype == b.dtype and bool(jnp.array_equal(a, b)))
        return a if is_equal else b

    return jax.tree.map(same, first, tree)


def begin(trainables, rates, plan):
    """The State before the first step.

    Args:
        trainables: tree of (R, ...).
        rates: (R,).
        plan: Plan.
    """

    def one(trainable, rate):
        state = plan.optimizer.init(trainable)
        return state._replace(hyperparams={**state.hyperparams, "learning_rate": rate})

    runs = len(rates)
    state = jax.vmap(one)(trainables, jnp.asarray(rates, jnp.float32))
    nothing = jnp.zeros(runs, jnp.int32)
    found = State(
        step=jnp.zeros((), jnp.int32),
        trainable=trainables,
        optimizer=state,
        best=trainables,
        best_score=jnp.full(runs, -jnp.inf, jnp.float32),
        stale=nothing,
        is_stopped=nothing.astype(bool),
    )
    return jax.tree.map(jnp.copy, found)  # `advance` uses it up: nothing in it may be anything else's


@functools.partial(jax.jit, static_argnames=("plan", "axes", "num_steps"), donate_argnums=0)
def advance(state, runs, /, *, plan, axes, num_steps):
    """The State `num_steps` steps on, and the loss of each step, (num_steps, R). Uses up `state`.

    Args:
        state: State.
        runs: Runs.
        plan: Plan, static.
        axes: (of frozen, of data), as `stacked` gives them; static.
        num_steps: static.

    Runs that are stopped stay as they are.
    """
    numbers = state.step + jnp.arange(num_steps, dtype=jnp.int32)
    sharing = _sharing(runs, axes, is_drawn=True)

    def one(trainable, optimizer, is_stopped, run):
        def step(carry, number):
            trainable, optimizer = carry
            key = jax.random.fold_in(run.keys, number)
            rows = plan.task.batches(run.data.rows, run.data.num_rows, plan.task_options, key)
            loss, gradient = _gradient(plan, trainable, run, rows, sharing)
            rate = run.rates * plan.schedule(number)
            optimizer = optimizer._replace(hyperparams={**optimizer.hyperparams, "learning_rate": rate})
            with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer power
                updates, following = plan.optimizer.update(gradient, optimizer, trainable)
            moved = optax.apply_updates(trainable, updates)
            return jax.tree.map(lambda a, b: jnp.where(is_stopped, a, b), carry, (moved, following)), loss

        return jax.lax.scan(step, (trainable, optimizer), numbers)

    own = Runs(*_axes(runs, axes))
    (trainable, optimizer), losses = jax.vmap(one, in_axes=(0, 0, 0, own))(
        state.trainable, state.optimizer, state.is_stopped, runs
    )
    moved = state._replace(step=state.step + num_steps, trainable=trainable, optimizer=optimizer)
    return moved, losses.T


def _axes(runs, axes):
    """Axes of Runs as `jax.vmap` takes them."""
    frozen, data = (jax.tree.unflatten(jax.tree.structure(tree), own) for tree, own in zip(runs[:2], axes, strict=True))
    return frozen, data, 0 if runs.keys.ndim else None, 0


def _sharing(runs, axes, *, is_drawn):
    """How many runs have their inputs, and what they do not train, in common: all of them, or 1. `is_drawn` by key."""
    is_common = all(axis is None for of in axes for axis in of) and not (is_drawn and runs.keys.ndim)
    return len(runs.rates) if is_common else 1


def _gradient(plan, trainable, run, rows, sharing):
    """Loss and gradient on the rows of a batch, in `plan.accumulate` parts."""

    def loss(trainable, rows):
        inputs, targets = run.data.inputs[rows], run.data.targets[rows]
        if plan.batch_axis:
            inputs, targets = _spread((inputs, targets), plan.batch_axis)
        outputs = plan.network(plan.weights(trainable, run.frozen), inputs, sharing)
        return plan.task.loss(outputs, targets)

    if plan.accumulate == 1:
        return jax.value_and_grad(loss)(trainable, rows)

    def add(sums, part):
        return jax.tree.map(jnp.add, sums, jax.value_and_grad(loss)(trainable, part)), None

    nothing = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, trainable))
    sums, _ = jax.lax.scan(add, nothing, rows.reshape(plan.accumulate, -1))
    return jax.tree.map(lambda s: s / plan.accumulate, sums)


def _spread(arrays, axis):
    spec = jax.sharding.PartitionSpec(axis)
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, spec), arrays)


@functools.partial(jax.jit, static_argnames=("plan", "axes"))
def scores(trainable, runs, /, *, plan, axes):
    """Mean score of each run on the rows of its data, (R,) float32; NaN where an output of them is.

    The largest of numbers that are none is the first, so that a run which diverged would score as one class does.
    """
    sharing = _sharing(runs, axes, is_drawn=False)

    def one(trainable, run):
        data = run.data
        outputs = plan.network(plan.weights(trainable, run.frozen), data.inputs, sharing)
        each = plan.task.score(outputs, data.targets).astype(jnp.float32)[data.rows]
        lost = _have_nan(outputs)[data.rows]
        used = jnp.arange(len(each)) < data.num_rows
        return jnp.where(used, jnp.where(lost, jnp.nan, each), 0).sum() / data.num_rows

    return jax.vmap(one, in_axes=(0, Runs(*_axes(runs, axes))))(trainable, runs)


def _have_nan(outputs):
    """(n,) bool, rows of outputs, an array or a tree of arrays (n, ...), that hold a NaN."""
    parts = [x for x in jax.tree.leaves(outputs) if jnp.issubdtype(x.dtype, jnp.inexact)]
    found = [jnp.isnan(x).any(axis=tuple(range(1, x.ndim))) for x in parts]
    return functools.reduce(jnp.logical_or, found) if found else jnp.zeros(len(jax.tree.leaves(outputs)[0]), bool)


@functools.partial(jax.jit, static_argnames=("plan", "axes"))
def outputs(trainable, runs, /, *, plan, axes):
    """Outputs (R, n, ...) of each run on all inputs of its data."""
    sharing = _sharing(runs, axes, is_drawn=False)

    def one(trainable, run):
        return plan.network(plan.weights(trainable, run.frozen), run.data.inputs, sharing)

    return jax.vmap(one, in_axes=(0, Runs(*_axes(runs, axes))))(trainable, runs)


@functools.partial(jax.jit, static_argnames=("patience",))
def judged(state, found, /, *, patience):
    """The State after an evaluation: the best so far is kept; runs without a better one for `patience` stop (0: never).

    Args:
        state: State.
        found: (R,) validation scores.
        patience: evaluations; static.
    """
    is_better = (found > state.best_score) & ~state.is_stopped

    def kept(old, new):
        return jnp.where(is_better.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    stale = jnp.where(is_better, 0, state.stale + 1)
    return state._replace(
        best=jax.tree.map(kept, state.best, state.trainable),
        best_score=jnp.where(is_better, found, state.best_score),
        stale=stale,
        is_stopped=state.is_stopped | ((stale >= patience) & (patience > 0)),
    )


OPTAX = ("adam", "adamw", "sgd", "lion", "rmsprop", "adagrad", "radam", "nadam", "adabelief", "lamb")


@functools.cache
def schedule(name, num_steps, warmup):
    """Factor of the learning rate by step: "constant" or "cosine" (to zero), behind `warmup` steps of linear growth."""
    errors.require_known("schedule", name, ("constant", "cosine"))
    rest = max(num_steps - warmup, 1)
    after = optax.cosine_decay_schedule(1.0, rest) if name == "cosine" else optax.constant_schedule(1.0)
    return optax.join_schedules([optax.linear_schedule(0.0, 1.0, warmup), after], [warmup]) if warmup else after


@functools.cache
def optimizer(name, options=()):
    """An optax transformation by name, with the learning rate in its state: one of optax, or of `optimizers`.

    Args:
        name: of OPTAX, or a module of `jaxsub.optimizers`.
        options: ((name, value), ...) for it.

    Raises:
        ConfigError: no such optimizer or option.
    """
    from jaxsub import plugins

    own, options = plugins.available("optimizers"), dict(options)
    errors.require_known("optimizer", name, (*OPTAX, *own))
    made = plugins.load("optimizers", name).make if name in own else getattr(optax, name)
    known = [n for n in inspect.signature(made).parameters if n != "learning_rate"]
    for option in options:
        if option not in known:
            raise errors.ConfigError(f"optimizer={name}: no option {option!r}{errors.nearest(option, known)}")
    return optax.inject_hyperparams(made, static_args=tuple(known))(learning_rate=1.0, **options)


def count(trainable):
    """Numbers that one run trains, of a tree of arrays without the axis of runs."""
    return sum(leaf.size for leaf in jax.tree.leaves(trainable))
