"""A sparse posterior over a bundle's coefficients on each task, and what it says of predictions on held-out rows.

Coefficients are measured by the members' spread, so that the prior is N(0, 1) for each; what is inferred is a normal
distribution of some of them, the others are zero (`training.variational`).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxsub import errors
from jaxsub.training import initial, variational


@dataclasses.dataclass(frozen=True)
class _Outputs:
    """Outputs as a function of scaled coefficients; hashable."""

    answers: object

    def __call__(self, u, given):
        return self.answers(u * given["spread"], given)


@dataclasses.dataclass(frozen=True)
class _Loss:
    """Minus the log-likelihood of all rows, estimated from a batch; hashable."""

    outputs: _Outputs
    task: object
    options: object

    def __call__(self, u, key, given):
        data = given["data"]
        rows = self.task.batches(data.rows, data.num_rows, self.options, key)
        found = self.outputs(u, {**given, "inputs": data.inputs[rows]})
        return data.num_rows * self.task.loss(found, data.targets[rows])


def run(training, config):
    """[one dict a task]: how many coefficients are active, the score of the mean prediction, and widths of intervals.

    Args:
        training: train_runs.Training of a method in the bundle's subspaces.
        config: train.Config.

    Raises:
        ConfigError: what is trained are no coefficients of the bundle, or answers are sequences.
    """
    setup, found = training.setup, []
    options = variational.Options(density=config.density, steps=config.posterior_steps)
    for number, variation in enumerate(setup.variations):
        if np.ndim(variation.held_out.targets) != 1:
            raise errors.ConfigError("posterior: predictions of one class a row are needed")
        run_number = number * len(training.seeds) * len(training.rates)
        trainable = jax.tree.map(lambda x, n=run_number: x[n], training.trainable)
        spread = initial.spread_of(initial.members(setup.spaces, trainable))
        given = {
            "frozen": training.frozen_of(run_number),
            "spread": jnp.asarray(spread),
            "data": jax.tree.map(jnp.asarray, variation.fit),
        }
        outputs = _Outputs(training.answers(trainable))
        loss = _Loss(outputs, setup.task, variation.options)
        key = jax.random.fold_in(jax.random.key(config.seed), number)
        posterior = variational.infer(loss, len(spread), options, key, given)
        inputs, targets = variation.held_out.used()
        asked = {**given, "inputs": jnp.asarray(inputs)}
        mean, low, high = (np.asarray(x) for x in variational.intervals(outputs, posterior, key, asked))
        chosen = mean.argmax(axis=1)
        pick = functools.partial(np.take_along_axis, indices=chosen[:, None], axis=1)
        width, is_right = (pick(high) - pick(low))[:, 0], chosen == targets
        found.append({
            "task": variation.name,
            "numbers": len(spread),
            "active": int(posterior.active.sum()),
            "score": float(is_right.mean()),
            "width_right": float(width[is_right].mean()) if is_right.any() else None,
            "width_wrong": float(width[~is_right].mean()) if not is_right.all() else None,
        })  # fmt: skip
    return found


def table(found):
    """The posteriors as text: means over tasks."""

    def mean(name):
        values = [one[name] for one in found if one[name] is not None]
        return f"{np.mean(values):.3f}" if values else "-"

    first, widths = found[0], f"{mean('width_right')} wide where it is right, {mean('width_wrong')} where it is wrong"
    return (
        f"posterior: {first['active']} of {first['numbers']} coefficients active, score {mean('score')}\n"
        f"95 % intervals of the chosen class's probability are {widths}"
    )
