"""Parameters of a merge found by descent on a loss of the user's: Adam on whatever makes a model of the updates.

The loss is the user's own function of the merged weights. If it looks at inputs of the test set, even without labels,
as the entropy of predictions does, the result is transductive: it is fitted to them.
"""

import collections.abc
import functools
import inspect

import jax
import jax.numpy as jnp

from jaxsub import errors


def minimise(build, parameters, loss, *, steps, rate, key, programs=None, name=None):
    """Parameters after `steps` steps of Adam on loss(build(parameters, key)), and the losses on the way.

    Args:
        build: function (parameters, key) -> {layer: array} of merged weights, traceable; the key is new in every step.
        parameters: pytree of float32 arrays to start from.
        loss: the user's function of the weights, or of weights and a key (for batches of its own), traceable.
        steps: number of steps.
        rate: of Adam.
        key: typed PRNG key.
        programs: dict in which the compiled descent is kept, or None.
        name: hashable, what it hangs on beside the loss, `steps` and the parameters' shapes: a descent of the same
            name is the same function of parameters, key and rate, and is not compiled again.

    Returns:
        (parameters, (steps,) losses before each step).

    Raises:
        ConfigError: the loss is no scalar, or cannot be traced.
    """
    programs = {} if programs is None else programs
    shapes = tuple((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(parameters))
    own = loss if isinstance(loss, collections.abc.Hashable) else id(loss)  # held by its program: the id stays its own
    known = (name, own, steps, shapes)
    if known not in programs:
        descent = _descent(functools.partial(_loss, build, loss), steps)
        programs[known] = _Compiled(descent, parameters, key, jnp.float32(rate))
    (found, _), values = programs[known](parameters, key, jnp.float32(rate))
    require_finite((found, values))
    return found, values


def require_finite(found):
    """Raises ConfigError where arrays that a descent found are not finite."""
    if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(found)):
        raise errors.ConfigError("loss: it, or its gradient, was not finite on the way; a smaller rate may help")


def untraceable(what, error):
    """ConfigError of a loss that failed when it was traced; `what` it is called with, or ""."""
    said = f"{type(error).__name__}: {errors.quote(error, 300)}"
    return errors.ConfigError(f"loss: {what}cannot be traced by JAX: {said}")


def uniforms(key, shape):
    """Uniform float32 numbers above 0 and below 1, whose logarithms, and those of what is left to 1, are finite."""
    return jax.random.uniform(key, shape, jnp.float32, float(jnp.finfo(jnp.float32).tiny), 1 - 2**-24)


def _descent(loss, steps):
    """((parameters, moments), (steps,) losses) as a function of parameters, key and rate."""
    import optax

    adam = optax.scale_by_adam()

    def run(parameters, key, rate):
        try:
            shape = jax.eval_shape(loss, parameters, key)
        except Exception as error:  # the user's own code: anything may come
            raise untraceable("", error) from error
        if shape.shape != ():
            raise errors.ConfigError(f"loss: returned shape {shape.shape}; one number is needed")

        def step(state, number):
            parameters, moments = state
            value, gradient = jax.value_and_grad(loss)(parameters, jax.random.fold_in(key, number))
            change, moments = adam.update(gradient, moments, parameters)
            parameters = jax.tree.map(lambda p, c: p - rate * c, parameters, change)
            return (parameters, moments), value

        return jax.lax.scan(step, (parameters, adam.init(parameters)), jnp.arange(steps))

    return run


class _Compiled:
    """A function, jitted with the arrays that it closes over as arguments.

    As constants they would be part of the program: other models of the same shapes would be compiled for again.
    """

    def __init__(self, function, *example):
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*example)
        self.constants, self.structure = closed.consts, jax.tree.structure(shape)
        self.run = jax.jit(lambda constants, leaves: jax.core.eval_jaxpr(closed.jaxpr, constants, *leaves))

    def __call__(self, *arguments):
        return jax.tree.unflatten(self.structure, self.run(self.constants, jax.tree.leaves(arguments)))


def _loss(build, loss, parameters, key):
    draw, batch = jax.random.split(key)
    weights = build(parameters, draw)
    return loss(weights, batch) if takes_key(loss) else loss(weights)


def takes_key(loss):
    """Whether a loss takes a PRNG key beside the weights."""
    try:
        kinds = [p for p in inspect.signature(loss).parameters.values() if p.default is p.empty]
    except (TypeError, ValueError):
        return False
    return len([p for p in kinds if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]) > 1
