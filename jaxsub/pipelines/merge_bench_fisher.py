"""Diagonal Fisher information of the models of a zoo, for methods that take statistics of the layer's shape.

    F_n = mean over rows x of model n's training data of (d log p(y | x) / d w)^2,   y drawn from the model's p(y | x)

Source: Matena and Raffel 2022, equation 2, with one draw of y a row in place of the sum over all classes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxsub.models import _trees

ROWS = 256  # of each model's training data


def of(case, seed):
    """{layer: (N, *shape) float32} of a `merge_bench_case.Zoo`; of low-rank updates those of the whole weight."""
    evaluation, found = case.evaluation, {}
    static = {"model": evaluation.model, "parameters": evaluation.parameters}
    for n in range(len(case.ids)):
        key = jax.random.fold_in(jax.random.key(seed), n)
        x = evaluation.train[n].used()[0][:ROWS]
        for name, array in _squares(case.member(n), case.own[n], case.base, x, key, **static).items():
            found.setdefault(name, []).append(np.asarray(array, np.float32))
    return {name: np.stack(each) for name, each in found.items()}


@functools.partial(jax.jit, static_argnames=("model", "parameters"))
def _squares(weights, own, base, x, key, /, *, model, parameters):
    """{layer: (*shape)} mean squared gradients by `weights`, on inputs x (n, ...)."""

    def outputs(weights, x):
        params = {name: array.astype(jnp.float32) for name, array in parameters(weights | own, base).items()}
        return model.apply({"params": _trees.nested(params)}, x)

    def likelihood(weights, row, target):
        return jax.nn.log_softmax(outputs(weights, row[None])[0])[target]

    y = jax.random.categorical(key, outputs(weights, x))
    gradients = jax.vmap(jax.grad(likelihood), (None, 0, 0))(weights, x, y)
    return jax.tree.map(lambda g: jnp.mean(jnp.square(g), axis=0), gradients)
