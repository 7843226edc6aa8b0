"""A posterior over coefficients with few that are not zero: mean-field normal on a sparse support that moves.

    q(c_j) = N(mu_j, sigma_j^2) on the support, 0 elsewhere;   loss = E_q[loss(c)] + weight KL(q | N(0, prior^2))

Every `every` steps the active coefficients of lowest signal-to-noise E|c| / sd|c| leave, and as many of the others with
the largest gradient enter, at mean zero and the mean scale. The support's size never changes.
"""

import dataclasses
import functools
import math
import typing

import jax
import jax.numpy as jnp
import optax

from jaxsub import errors

REFERENCE = "Li et al. 2024, Training Bayesian neural networks with sparse subspace variational inference"


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the inference."""

    density: float = 0.5  # share of the coefficients that are not zero
    steps: int = 1000
    learning_rate: float = 0.01
    prior: float = 1.0  # standard deviation of a coefficient beforehand
    start: float = 0.01  # standard deviation that it begins with
    weight: float = 1.0  # of the divergence from the prior, grown linearly over the first half
    every: int = 100  # steps between moves of the support
    share: float = 0.3  # of the support that moves at first; falls to zero as a cosine


class Posterior(typing.NamedTuple):
    """Means, logarithms of standard deviations, and which coefficients are not zero; (K,) each."""

    mean: jax.Array
    log_scale: jax.Array
    active: jax.Array  # bool


def folded(mean, scale):
    """(E|c|, E|c| / sd|c|) of normal c: the folded normal distribution's mean and signal-to-noise ratio."""
    ratio = mean / scale
    density = jnp.exp(-0.5 * jnp.square(ratio)) * math.sqrt(2 / math.pi)
    expected = scale * density + mean * jax.scipy.special.erf(ratio / math.sqrt(2))
    variance = jnp.square(mean) + jnp.square(scale) - jnp.square(expected)
    return expected, expected / jnp.sqrt(jnp.maximum(variance, 1e-12 * jnp.square(scale)))


def divergence(posterior, prior):
    """KL divergence of the active coefficients from N(0, prior^2), a scalar."""
    scale = jnp.exp(posterior.log_scale)
    each = (
        math.log(prior) - posterior.log_scale + (jnp.square(scale) + jnp.square(posterior.mean)) / (2 * prior**2) - 0.5
    )
    return jnp.where(posterior.active, each, 0).sum()


def sample(posterior, key, count):
    """(count, K) draws of the coefficients."""
    noise = jax.random.normal(key, (count, len(posterior.mean)), posterior.mean.dtype)
    return jnp.where(posterior.active, posterior.mean + jnp.exp(posterior.log_scale) * noise, 0)


def infer(loss, size, options, key, given):
    """The Posterior of `size` coefficients.

    Args:
        loss: function of (coefficients (K,), key, given) to minus the log-likelihood of all the data, or an unbiased
            estimate of it from a batch that it draws by the key; hashable.
        size: K.
        options: Options.
        key: typed key.
        given: tree of arrays that the loss needs.

    Raises:
        ConfigError: impossible options.
    """
    if not 0 < options.density <= 1 or not 0 <= options.share <= 1:
        raise errors.ConfigError(f"density={options.density}, share={options.share}: shares between 0 and 1")
    for name in ("steps", "every", "learning_rate", "prior", "start"):
        if not getattr(options, name) > 0:
            raise errors.ConfigError(f"{name}={getattr(options, name)}: expected more than 0")
    count = max(round(options.density * size), 1)
    order = jax.random.permutation(jax.random.fold_in(key, 0), size)
    active = jnp.zeros(size, bool).at[order[:count]].set(True)
    begun = Posterior(jnp.zeros(size, jnp.float32), jnp.full(size, math.log(options.start), jnp.float32), active)
    return _infer(begun, jax.random.fold_in(key, 1), given, loss=loss, options=options, count=count)


@functools.partial(jax.jit, static_argnames=("loss", "options", "count"))
def _infer(begun, key, given, *, loss, options, count):
    optimizer = optax.adam(options.learning_rate)

    def step(carry, number):
        posterior, state = carry
        step_key = jax.random.fold_in(key, number)
        noise_key, batch_key = jax.random.split(step_key)

        def total(numbers, extra):
            own = Posterior(*numbers, posterior.active)
            growth = jnp.minimum(2 * number / options.steps, 1.0)
            # The gradient by `extra` is that by every coefficient, those at zero among them.
            drawn = sample(own, noise_key, 1)[0] + extra
            return loss(drawn, batch_key, given) + growth * options.weight * divergence(own, options.prior)

        numbers = (posterior.mean, posterior.log_scale)
        gradient, slope = jax.grad(total, argnums=(0, 1))(numbers, jnp.zeros_like(posterior.mean))
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(gradient, state)
        mean, log_scale = (jnp.where(posterior.active, n + u, n) for n, u in zip(numbers, updates, strict=True))
        posterior = Posterior(mean, log_scale, posterior.active)
        is_time = ((number + 1) % options.every == 0) & (number + 1 < options.steps)
        moved = _moved(posterior, slope, number, options, count)
        return (jax.tree.map(lambda a, b: jnp.where(is_time, a, b), moved, posterior), state), None

    start = (begun, optimizer.init((begun.mean, begun.log_scale)))
    (posterior, _), _ = jax.lax.scan(step, start, jnp.arange(options.steps))
    return posterior._replace(mean=jnp.where(posterior.active, posterior.mean, 0))


def _moved(posterior, slope, number, options, count):
    """The Posterior with part of its support exchanged."""
    share = options.share * 0.5 * (1 + jnp.cos(jnp.pi * number / options.steps))
    size = len(posterior.mean)
    leaving = jnp.minimum(jnp.round(share * count).astype(jnp.int32), size - count)
    scale = jnp.exp(posterior.log_scale)
    _, signal = folded(posterior.mean, scale)
    weakest = jnp.argsort(jnp.argsort(jnp.where(posterior.active, signal, jnp.inf)))  # rank of each, weakest first
    steepest = jnp.argsort(jnp.argsort(jnp.where(posterior.active, -jnp.inf, jnp.abs(slope)), descending=True))
    leaves, enters = weakest < leaving, steepest < leaving
    mean_scale = jnp.where(posterior.active, scale, 0).sum() / count
    return Posterior(
        jnp.where(enters | leaves, 0, posterior.mean),
        jnp.where(enters, jnp.log(mean_scale), posterior.log_scale),
        (posterior.active & ~leaves) | enters,
    )


def intervals(outputs, posterior, key, given, *, draws=200, covered=0.95):
    """(mean, low, high) of the outputs' class probabilities over draws of the posterior.

    Args:
        outputs: function of (coefficients (K,), given) to logits (n, o); hashable.
        posterior: Posterior.
        key: typed key.
        given: tree of arrays.
        draws: number of draws.
        covered: share of them between low and high.
    """
    found = _drawn(sample(posterior, key, draws), given, outputs=outputs)
    edge = (1 - covered) / 2
    low, high = jnp.quantile(found, jnp.asarray([edge, 1 - edge]), axis=0)
    return found.mean(axis=0), low, high


@functools.partial(jax.jit, static_argnames="outputs")
def _drawn(coefficients, given, *, outputs):
    return jax.lax.map(lambda c: jax.nn.softmax(outputs(c, given)), coefficients, batch_size=16)
