"""A flax network, or any function of {layer: array}, with weights that may stay factored.

    network(weights, inputs) -> outputs

Of a flax network, `nn.Dense` layers whose weights are a product of factors get `x @ W` by the factors; so do
combinations of directions in a layer that takes the inputs themselves, where many runs share them. Other weights are
multiplied out. A plain function gets arrays only, unless it has TAKES_FACTORED and uses `linear` of
`parametrisations._values`.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxsub import errors
from jaxsub.models import _trees
from jaxsub.parametrisations import _values


@dataclasses.dataclass(frozen=True)
class Network:
    """A network to train; hashable, and static in jitted functions.

    Attributes:
        module: flax module, or a function (weights {layer: array}, inputs) -> outputs.
        dense: names of the kernels that `nn.Dense` multiplies with.
        compute: dtype of weights and inputs while they are multiplied: "float32" or "bfloat16".
    """

    module: object
    dense: tuple[str, ...] = ()
    compute: str = "float32"

    def __call__(self, weights, inputs, sharing=1):
        """Outputs (n, ...) float32 of {layer: array or a value of `_values`} on inputs (n, ...).

        `sharing` runs have these inputs, and all that they do not train, in common.
        """
        if self.compute != "float32":
            weights = {name: _values.cast(w, self.compute) for name, w in weights.items()}
            inputs = _values.cast(inputs, self.compute)
        if isinstance(self.module, nn.Module):
            found = self._flax(weights, inputs, sharing)
        else:
            takes = getattr(self.module, "TAKES_FACTORED", False)
            found = self.module(weights if takes else _formed(weights), inputs)
        return found.astype(jnp.float32)

    def _flax(self, weights, inputs, sharing):
        factored = {n for n in self.dense if isinstance(weights.get(n), (_values.Factored, _values.Sparse))}
        num_rows = math.prod(inputs.shape[:-1])
        combined = {
            name
            for name in self.dense
            if isinstance(weights.get(name), _values.Combination)
            and _values.is_shared_cheaper(weights[name], num_rows, sharing)
        }

        def product(following, args, kwargs, context):
            name = _kernel(context.module)
            # Inputs that no weight has touched are the same in all runs.
            is_shared = name in combined and _inputs(args, kwargs) is inputs
            if not (name in factored or is_shared) or context.method_name != "__call__":
                return following(*args, **kwargs)
            x, w, bias = _inputs(args, kwargs), weights[name], weights.get(name.removesuffix("kernel") + "bias")
            if context.module.dtype is not None:
                x, w, bias = _values.cast((x, w, bias), context.module.dtype)
            found = _values.linear(x, w)
            return found if bias is None else found + _values.dense(bias)

        rest = _formed({name: w for name, w in weights.items() if name not in factored})
        with nn.intercept_methods(product):
            return self.module.apply({"params": _trees.nested(rest)}, inputs)


def _inputs(args, kwargs):
    return args[0] if args else kwargs["inputs"]


def _formed(weights):
    return {name: _values.dense(w) for name, w in weights.items()}


def _kernel(module):
    return "/".join((*module.path, "kernel"))


def of(module, example, compute="float32"):
    """(Network, {layer: shape}) of a flax module for inputs like `example` (n, ...).

    Raises:
        ConfigError: a network that keeps more than parameters (batch statistics), or that fails on these inputs.
    """
    seen = []

    def look(following, args, kwargs, context):
        if type(context.module) is nn.Dense and context.method_name == "__call__":
            seen.append(_kernel(context.module))
        return following(*args, **kwargs)

    def start(key):
        with nn.intercept_methods(look):
            return module.init(key, example)

    try:
        variables = jax.eval_shape(start, jax.random.key(0))
    except Exception as error:  # the network may be the user's own: anything may come
        said = f"{type(error).__name__}: {errors.quote(error)}"
        raise errors.ConfigError(f"the network fails on inputs of shape {tuple(example.shape)}: {said}") from error
    if {*variables} != {"params"}:
        more = ", ".join(sorted({*variables} - {"params"}))
        raise errors.ConfigError(f"the network keeps more than parameters ({more}), which is not trained here")
    shapes = {name: tuple(x.shape) for name, x in _trees.flat(variables["params"]).items()}
    once = tuple(name for name in dict.fromkeys(seen) if seen.count(name) == 1)
    return Network(module, once, compute), shapes


def fresh(module, example, key):
    """{layer: array} as the flax module starts."""
    return _trees.flat(module.init(key, example)["params"])
