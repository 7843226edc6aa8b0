"""Merges that look at the whole model: all layers of all models in memory, and a loss of the user's.

    --loss=module:function      function(weights) -> number, or function(weights, key); traceable by JAX

`weights` has every tensor of the merged model, {layer: array}, merged ones in float32, the others as they are stored;
of low-rank updates (a, b), the update b @ a. Only the module that is named is run.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxsub import errors, formats
from jaxsub.merges import _whole
from jaxsub.pipelines import merge_rows, scoring


def load_loss(config, module):
    """The user's loss, or None where the method needs none.

    Raises:
        ConfigError: one is needed and not given, or given and not taken; or it cannot be loaded.
    """
    needs = getattr(module, "NEEDS_LOSS", False)
    if needs and not config.loss:
        raise errors.ConfigError(f"method {config.method} needs a loss of yours: give --loss=module:function")
    if config.loss and not (needs or getattr(module, "TAKES_LOSS", False)):
        raise errors.ConfigError(f"loss: method {config.method} takes none; adamerging, concrete and branched do")
    return scoring.load(config.loss, "loss") if config.loss else None


@dataclasses.dataclass(frozen=True)
class Models:
    """A `_whole.Whole` and what its rows were made of.

    Attributes:
        whole: the Whole.
        spaces: name -> CoefficientRows of layers that are coefficients of a bundle.
        means: name -> Rows of layers that are no updates, and are the mean: full values beside low-rank updates.
    """

    whole: _whole.Whole
    spaces: dict
    means: dict


def read(found, sources):
    """The Models of a `merge_layers.Lineup`, all in memory.

    Raises:
        NonFiniteError: naming the first model with a NaN or an Inf.
    """
    layers, stacks, rebuild, spaces, means = {}, {}, {}, {}, {}
    with jax.enable_x64(True):
        for layer in found.layers:
            space = merge_rows.coefficients(sources, layer)
            own = sources.of(layer) if space is None else space
            if not own.is_update:
                means[layer.name] = own
                continue
            layers[layer.name], stacks[layer.name] = own, _whole.stack(own)
            if space is not None:
                spaces[layer.name] = space
                origin = None if space.origin is None else jnp.asarray(space.origin)
                rebuild[layer.name] = _whole.rebuilder(space.layer.subspace, layer.group.shape, origin)
    template = sources.opened.models[found.template]
    merged = found.merged
    others = {n: np.asarray(formats.read(template, t)) for n, t in template.tensors.items() if n not in merged}
    others |= {name: _mean(own).array(own.shape) for name, own in means.items()}
    return Models(_whole.Whole(layers, stacks, rebuild, _traceable(others)), spaces, means)


def _mean(own):
    return own.combination(np.full(own.num_models, 1 / own.num_models))


def _traceable(others):
    """Tensors that JAX takes as they are: small floats and numbers."""
    return {name: jnp.asarray(x) for name, x in others.items() if x.dtype.kind in "fiub" or x.dtype.name == "bfloat16"}


def merge(models, module, loss, options, key):
    """{layer: result} and what the method says of its fit."""
    results, figures = module.merge_models(models.whole, loss, options, key)
    for name, space in models.spaces.items():
        results[name] = space.rebuilt(results[name])
    return results | {name: _mean(own) for name, own in models.means.items()}, figures
