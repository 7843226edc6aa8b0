"""Diagonal Fisher information of the models of a zoo, for methods that take statistics of the layer's shape.

    F_n = mean over rows x of model n's training data of (d log p(y | x) / d w)^2,   y drawn from the model's p(y | x)

Source: Matena and Raffel 2022, equation 2, with one draw of y a row in place of the sum over all classes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxsub.worlds import _evaluation

ROWS = 256  # of each model's training data


def of(case, seed):
    """{layer: (N, *shape) float32} of a `merge_bench_case.Zoo`; of low-rank updates those of the whole weight."""
    found = {}
    for n in range(len(case.ids)):
        data, key = case.evaluation.train[n], jax.random.fold_in(jax.random.key(seed), n)
        x = jnp.asarray(data.used()[0][:ROWS])
        weights = {name: jnp.asarray(array) for name, array in case.member(n).items()}
        outputs = functools.partial(_outputs, case, n)
        y = jax.random.categorical(key, outputs(weights, x))
        squares = jax.jit(functools.partial(_squares, outputs))(weights, x, y)
        for name, array in squares.items():
            found.setdefault(name, []).append(np.asarray(array, np.float32))
    return {name: np.stack(each) for name, each in found.items()}


def _outputs(case, n, weights, x):
    params = case.evaluation.parameters(weights | case.own[n], case.base)
    params = {name: jnp.asarray(array, jnp.float32) for name, array in params.items()}
    return case.evaluation.model.apply({"params": _evaluation.nested(params)}, x)


def _squares(outputs, weights, x, y):
    def likelihood(weights, row, target):
        return jax.nn.log_softmax(outputs(weights, row[None])[0])[target]

    gradients = jax.vmap(jax.grad(likelihood), (None, 0, 0))(weights, x, y)
    return jax.tree.map(lambda g: jnp.mean(jnp.square(g), axis=0), gradients)
