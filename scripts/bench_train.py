"""What a step of coefficient training costs beside the network's own forward and backward pass, and of many runs.

    python scripts/bench_train.py

Passes are of the same batches, drawn by the same rule, in one compiled loop each; medians of rounds that take turns.
"""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxsub import plugins
from jaxsub.models import mlp, vit
from jaxsub.parametrisations import _spaces
from jaxsub.tasks import digits
from jaxsub.training import network as networks, steps

STEPS, ROUNDS, RANK = 50, 9, 16


def plan_of(module, batch):
    train, _ = digits.load()
    network, shapes = networks.of(module, train.inputs[:2])
    keys = jax.random.split(jax.random.key(0), len(shapes))
    start = {n: 0.1 * jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items(), strict=True)}
    spaces = {
        n: _spaces.Space(
            np.asarray(w), _spaces.orthonormal(k, RANK, w.size).reshape(RANK, *w.shape), {}, np.zeros((200, RANK)),
            {-1: np.ones(RANK)}, False, (),
        )
        for k, (n, w) in zip(keys, start.items(), strict=True)
        if w.size > RANK
    }  # fmt: skip
    scalar = plugins.load("parametrisations", "scalar")
    options = digits.Options(batch_size=batch)
    plan = steps.Plan(network, digits, options, scalar, scalar.Options(), steps.optimizer("adam"))
    trainable, frozen = scalar.init(jax.random.key(0), start, spaces, scalar.Options())
    return plan, trainable, frozen, start, train


def begun(plan, trainable, frozen, train, runs, is_shared):
    many = [trainable] * runs
    given, axes = steps.stacked([train] * runs)
    fixed, fixed_axes = steps.stacked([frozen] * runs)
    keys, rates = jax.random.split(jax.random.key(1), runs), jnp.full(runs, 0.01)
    keys = keys[0] if is_shared else keys
    state = steps.begin(jax.tree.map(lambda *x: jnp.stack(x), *many), rates, plan)
    return state, steps.Runs(fixed, given, keys, rates), (fixed_axes, axes)


def coefficients(plan, trainable, frozen, train, runs, is_shared=False):
    """(function that makes STEPS steps of `runs` runs, on the same batches if `is_shared`; their first State)."""
    state, given, axes = begun(plan, trainable, frozen, train, runs, is_shared)
    place = [state]

    def work():
        place[0], losses = steps.advance(place[0], given, plan=plan, axes=axes, num_steps=STEPS)
        jax.block_until_ready(losses)

    return work, state


def passes(plan, start, train):
    """Function that makes STEPS forward and backward passes of the network by itself: loss and all its gradients."""

    @jax.jit
    def loop(start, data, key):
        def step(carry, number):
            rows = digits.batches(data.rows, data.num_rows, plan.task_options, jax.random.fold_in(key, number))

            def loss(weights):
                return digits.loss(plan.network(weights, data.inputs[rows]), data.targets[rows])

            value, gradient = jax.value_and_grad(loss)(carry)
            # Without this the compiler could drop gradients that nobody reads.
            return jax.tree.map(lambda w, g: w - 1e-6 * g, carry, gradient), value

        return jax.lax.scan(step, start, jnp.arange(STEPS))

    data = jax.tree.map(jnp.asarray, train)
    return lambda: jax.block_until_ready(loop(start, data, jax.random.key(1)))


def timed(works):
    """Median milliseconds a step of each function, in turns."""
    for work in works:
        work()
    found = [[] for _ in works]
    for _ in range(ROUNDS):
        for work, times in zip(works, found, strict=True):
            begin = time.perf_counter()
            work()
            times.append((time.perf_counter() - begin) / STEPS * 1e3)
    return [statistics.median(times) for times in found]


def main():
    cases = [
        ("mlp 64-64-10, batch 16", mlp.MLP(), 16),
        ("mlp 64-64-10, batch 64", mlp.MLP(), 64),
        ("mlp 64-64-10, batch 256", mlp.MLP(), 256),
        ("mlp 64-512-10, batch 256", mlp.MLP(hidden=512), 256),
        ("vit 24, batch 64", vit.ViT(), 64),
    ]
    for name, module, batch in cases:
        plan, trainable, frozen, start, train = plan_of(module, batch)
        one, state = coefficients(plan, trainable, frozen, train, 1)
        numbers, kept = steps.count(trainable), sum(x.size for x in jax.tree.leaves(state.optimizer))
        alone, own = timed([passes(plan, start, train), one])
        weights = sum(w.size for w in start.values())
        print(f"{name}: {weights} weights, {numbers} coefficients, optimizer state {kept} numbers")
        print(f"  step {own:.3f} ms, forward and backward {alone:.3f} ms: {own / alone:.2f} times", flush=True)
        if batch <= 64:
            many, _ = coefficients(plan, trainable, frozen, train, 100)
            alike, _ = coefficients(plan, trainable, frozen, train, 100, is_shared=True)
            first, hundred, same = timed([one, many, alike])
            print(f"  100 runs on batches of their own {hundred:.2f} ms: {hundred / first:.1f} times one")
            print(f"  100 runs on the same batches {same:.2f} ms: {same / first:.1f} times one", flush=True)


if __name__ == "__main__":
    main()
