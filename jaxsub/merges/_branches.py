"""Which models share which layers, learned on a loss of the user's: one logit for every layer, model and branch.

    p_lt = softmax((a_lt + g) / T) over branches, g Gumbel noise;   branch b of layer l is sum_t p_ltb w_t / sum_t p_ltb
    minimise  sum_t loss(sum_b p_ltb branch_b, t)  +  price * sum_l d_l E(branches used in l),   d_l the layer's share

Groups that then take more than the budget are joined, two at a time: those whose joining costs least loss a weight
saved or, where there are too many ways to try, least squared distance.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxsub.merges import _descent, _partitions

TRIED = 256  # ways to join two groups whose loss is looked at


def soft_choice(logits, uniforms, temperature):
    """Gumbel-softmax over the last axis, from uniform numbers of the logits' shape."""
    return jax.nn.softmax((logits - jnp.log(-jnp.log(uniforms))) / temperature, axis=-1)


def expected_branches(p):
    """() expected number of branches that some model uses, of independent choices p (N, B)."""
    return jnp.sum(1 - jnp.prod(1 - p, axis=0))


class Learner:
    """Models, and a loss of each resulting one."""

    def __init__(self, whole, model_ids, sizes, loss, options):
        """Looks at nothing yet; arguments as in `branched`, `whole` a `_whole.Whole`."""
        self.whole, self.model_ids, self.loss, self.options = whole, tuple(model_ids), loss, options
        self.shares = jnp.asarray(np.asarray(sizes, float) / np.sum(sizes), jnp.float32)
        self.evaluate = jax.jit(self.total)

    def total(self, mixed):
        """() sum of the models' losses, model t taking mixed[l, t, s] of model s in layer l."""
        found = 0.0
        for t, model in enumerate(self.model_ids):
            updates = {name: self.whole.combined(name, mixed[n, t]) for n, name in enumerate(self.whole.layers)}
            found = found + self.loss(self.whole.weights(updates), model)
        return found

    def of(self, groups):
        """Loss of groups, one partition a layer."""
        count = len(self.model_ids)
        mixed = np.zeros((len(groups), count, count), np.float32)
        for number, own in enumerate(groups):
            for members in own:
                mixed[number][np.ix_(members, members)] = 1 / len(members)
        return float(self.evaluate(mixed))

    def learn(self, key):
        """[groups] of each layer, tuples of positions of models, after Adam on the logits.

        Raises:
            ConfigError: the loss cannot be traced, or is no number.
        """
        import optax

        options, count, names = self.options, len(self.model_ids), list(self.whole.layers)
        adam = optax.adam(options.rate)

        def cost(logits, key, temperature):
            p = soft_choice(logits, _descent.uniforms(key, logits.shape), temperature)
            branches = p / jnp.sum(p, axis=1, keepdims=True)  # (L, N, B): what each model gives to a branch
            price = options.price * jnp.sum(self.shares * jax.vmap(expected_branches)(p))
            return price + self.total(jnp.einsum("ltb,lsb->lts", p, branches))

        def step(state, number):
            logits, moments = state
            temperature = options.temperature * 0.1 ** (number / max(options.steps - 1, 1))
            gradient = jax.grad(cost)(logits, jax.random.fold_in(key, number), temperature)
            change, moments = adam.update(gradient, moments, logits)
            return (optax.apply_updates(logits, change), moments), None

        start = jnp.broadcast_to(jnp.eye(count, dtype=jnp.float32), (len(names), count, count))
        run = jax.jit(lambda logits: jax.lax.scan(step, (logits, adam.init(logits)), jnp.arange(options.steps))[0][0])
        try:
            logits = np.asarray(run(start))
        except Exception as error:  # the user's own code: anything may come
            raise _descent.untraceable("function(weights, model) ", error) from error
        _descent.require_finite(logits)
        return [_grouped(layer.argmax(axis=1)) for layer in logits]


def _grouped(choices):
    """Groups of the models that chose one branch, in the order of their first models."""
    found = {}
    for model, branch in enumerate(choices):
        found.setdefault(int(branch), []).append(model)
    return tuple(sorted(tuple(members) for members in found.values()))


def within(groups, grams, sizes, budget, value=None):
    """Groups joined, two at a time, until they fit the budget.

    Args:
        groups: one partition a layer.
        grams: (N, N) inner products of each layer.
        sizes: what one version of each layer takes.
        budget: what all may take.
        value: function of such groups, the loss that joining should raise least; None for squared distances.
    """
    groups = [tuple(one) for one in groups]
    while sum(len(one) * size for one, size in zip(groups, sizes, strict=True)) > budget:
        ways = list(_joins(groups, grams, sizes))
        if value is not None and len(ways) <= TRIED:
            now = value(groups)
            ways = [
                ((value([*groups[:layer], joined, *groups[layer + 1 :]]) - now) / sizes[layer], layer, joined)
                for _, layer, joined in ways
            ]
        _, layer, joined = min(ways, key=lambda way: way[:2])
        groups[layer] = joined
    return groups


def _joins(groups, grams, sizes):
    """(distance a weight saved, layer, its groups) of all ways to join two groups."""
    for number, (own, gram, size) in enumerate(zip(groups, grams, sizes, strict=True)):
        for more, i, j in _partitions.joins(own, gram):
            yield more / size, number, _partitions.joined(own, i, j)
