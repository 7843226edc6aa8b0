"""A collection whose models are merged again and again in memory, and how each merge is scored on every model's task.

Layers that are not merged (heads, layers of other shapes) are those of the model whose task is scored. Every score is
of one of two parts, rows without one in common: "tuning", by which options are chosen, and "test".
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxsub import descriptors, errors, formats, rows
from jaxsub.merges import _whole
from jaxsub.models import _trees
from jaxsub.pipelines import layers as layer_loop, merge_bench_fisher, merge_layers, merge_rows, merge_whole
from jaxsub.worlds import _evaluation, _training

TUNING, TEST = "tuning", "test"
IN_MEMORY = 2**28  # bytes of a collection that is kept in memory; larger ones are read again for every merge


class Case:
    """Models, their base, and what is merged of them; a subclass scores."""

    loss = None  # function(weights[, key]) that methods with a loss descend on
    can_vote = False  # whether models' predictions can be averaged

    def __init__(self, opened, base, chosen, policy="fail", statistics=()):
        """Reads headers, and small collections whole.

        Args:
            opened: Collection.
            base: Model that all were trained from, or None.
            chosen: function of a layer's name, whether it is merged.
            policy: see `merge_layers.line_up`.
            statistics: see `merge_rows.Sources`.
        """
        self.found = merge_layers.line_up(opened, base, policy, chosen)
        self.sources = merge_rows.Sources(opened=opened, base=base, statistics=statistics)
        self.ids = self.tasks = self.sources.ids
        self.rows = {layer.name: self.sources.of(layer) for layer in self.found.layers}
        if sum(layer.group.num_bytes for layer in self.found.layers) <= IN_MEMORY:
            self.rows = {name: _kept(own) for name, own in self.rows.items()}

    @functools.cached_property
    def models(self):
        """All layers at once, for methods with a loss."""
        return merge_whole.read(self.found, self.sources)

    def merge(self, name, module, options, seed):
        """{layer: array, or (a, b) of a low-rank update b @ a} of the models merged by a method.

        Raises:
            ConfigError, InputError: the method cannot merge these models.
        """
        if hasattr(module, "TAKES_STATISTICS"):
            self.require_statistics(name, seed)
        if getattr(module, "MANY", False):
            raise errors.ConfigError(f"method {name} gives several models, not one")
        if hasattr(module, "merge_models"):
            if self.loss is None:
                raise errors.ConfigError(f"method {name} needs a loss: give --loss=module:function")
            key = layer_loop.layer_key("", seed)
            results, _ = merge_whole.merge(self.models, module, self.loss, options, key)
            return {layer: _array(result, self.rows[layer].shape) for layer, result in results.items()}
        found = {}
        for layer, own in self.rows.items():
            result, _ = merge_rows.merged(own, module, options, layer_loop.layer_key(layer, seed))
            found[layer] = _array(result, own.shape)
        return found

    def combined(self, coefficients):
        """{layer: ...} of the base and the sum of updates times coefficients (N,): one model, or none."""
        c = np.asarray(coefficients, np.float64)
        with jax.enable_x64(True):
            return {layer: _array(own.combination(c), own.shape) for layer, own in self.rows.items()}

    def require_statistics(self, name, seed):
        """Sees to it that rows have the statistics that method `name` takes.

        Raises:
            ConfigError: there are none.
        """
        del seed
        if not self.sources.statistics:
            raise errors.ConfigError(f"method {name} needs statistics of your evaluator: --config.statistics=FOLDER")

    @property
    def has_base(self):
        """Whether a sum of no updates is a model."""
        return all(own.is_update for own in self.rows.values())

    @property
    def kept(self):
        """Names of the layers that stay each model's own."""
        first = self.sources.opened.models[self.found.template]
        return sorted({*first.tensors, *first.adapters} - self.found.merged)

    def scores(self, weights, part):
        """(T,) float64 scores of merged layers {layer: ...} on the tasks of all models, higher is better."""
        raise NotImplementedError


def _kept(own):
    """Rows in memory."""
    if own.factors() is not None or own.statistics is not None:
        return own
    x, base = (np.asarray(part) for part in _whole.stack(own))
    more = {"is_update": own.is_update, "base": base if own.is_update else None}
    return rows.ArrayRows(x, own.name, own.model_ids, **more)


def _array(result, shape):
    return (result.a, result.b) if isinstance(result, rows.Factors) else result.array(shape)


class Zoo(Case):
    """Models of a world, scored on their own held-out rows."""

    can_vote = True

    def __init__(self, opened, base, evaluation, share, batch_size):
        """Takes a world.

        Args:
            opened, base: see `Case`.
            evaluation: the world's Evaluation.
            share: of the held-out rows by which options are chosen; of all tasks the same ones.
            batch_size: rows of every task in a step of methods with a loss.
        """
        import re

        own = re.compile(evaluation.own) if evaluation.own else None
        super().__init__(opened, base, lambda name: own is None or not own.search(name))
        self.evaluation, self.batch_size, self.tasks = evaluation, batch_size, evaluation.names
        self.base = {name: np.asarray(formats.read(base, tensor)) for name, tensor in base.tensors.items()}
        self.own = [self._own(n) for n in range(len(self.ids))]
        inputs, targets, used = _evaluation.stacked(evaluation.held_out)
        cut = round(inputs.shape[1] * share)
        self.parts = {
            TUNING: (inputs[:, :cut], targets[:, :cut], used[:, :cut]),
            TEST: (inputs[:, cut:], targets[:, cut:], used[:, cut:]),
        }
        for part, (*_, rows_used) in self.parts.items():
            if not rows_used.any(axis=1).all():
                raise errors.ConfigError(f"tuning={share}: a task has no {part} rows")

    def _own(self, n):
        """{layer: ...} of a model's layers that are not merged."""
        model = self.sources.opened.models[n]
        found = {t: formats.read(model, tensor) for t, tensor in model.tensors.items() if t not in self.rows}
        pairs = {layer: pair for layer, pair in model.adapters.items() if layer not in self.rows}
        return found | {layer: _product(_factors(model, pair)) for layer, pair in pairs.items()}

    def _parameters(self, weights, stack):
        """{name: (T, ...)} of the network on every task."""
        merged = {layer: _product(array) for layer, array in weights.items()}
        each = [self.evaluation.parameters(merged | own, self.base) for own in self.own]
        return {name: stack([one[name] for one in each]) for name in each[0]}

    def member(self, n):
        """{layer: array} of the merged layers of a model, low-rank updates as products."""
        found = self.combined(np.arange(len(self.ids)) == n)
        return {layer: np.asarray(_product(array), np.float32) for layer, array in found.items()}

    def require_statistics(self, name, seed):
        """See `Case`: Fisher information, of training rows."""
        if name != "fisher":
            raise errors.ConfigError(f"method {name}: its statistics of a zoo's models are not collected")
        if any(own.statistics is None for own in self.rows.values()):
            for layer, found in merge_bench_fisher.of(self, seed).items():
                self.rows[layer].statistics = rows.ArrayRows(found, layer, self.ids)

    def outputs(self, weights, part):
        """(T, n, o) outputs of merged layers on the rows of a part."""
        found = _trees.nested({k: v.astype(np.float32) for k, v in self._parameters(weights, np.stack).items()})
        return np.asarray(_training.outputs(found, {}, self.parts[part][0], model=self.evaluation.model, axis=0))

    def scores(self, weights, part):
        """See `Case`."""
        return self.score_outputs(self.outputs(weights, part), part)

    def score_outputs(self, outputs, part):
        """(T,) scores of outputs (T, n, o), or of averaged predictions of that shape."""
        _, targets, used = self.parts[part]
        each = np.where(used, np.asarray(self.evaluation.task.score(outputs, targets), np.float64), 0)
        return each.sum(axis=1) / used.sum(axis=1)

    def loss(self, weights, key):
        """() mean over the tasks of the loss on a batch of each one's training rows; traceable."""
        task, model = self.evaluation.task, self.evaluation.model
        params = self._parameters({layer: weights[layer] for layer in self.rows}, jnp.stack)
        inputs, targets, places, counts = self._train
        options = task.Options(batch_size=self.batch_size)
        keys = jax.random.split(key, len(self.ids))

        def one(own, x, y, place, count, key):
            chosen = task.batches(place, count, options, key)
            return task.loss(model.apply({"params": own}, x[chosen]), y[chosen])

        return jnp.mean(jax.vmap(one)(_trees.nested(params), inputs, targets, places, counts, keys))

    @functools.cached_property
    def _train(self):
        parts = [(d.inputs, d.targets, d.rows, d.num_rows) for d in self.evaluation.train]
        return tuple(np.stack([np.asarray(x) for x in leaves]) for leaves in zip(*parts, strict=True))


def _factors(model, pair):
    """(a (r, i), b (o, r)) of a stored low-rank update, the scale in b."""
    a, b = formats.read(model, pair.a), formats.read(model, pair.b)
    return (b.T, a.T * pair.scale) if pair.transposed else (a, b * pair.scale)


def _product(array):
    return array[1] @ array[0] if isinstance(array, tuple) else array


class User(Case):
    """Models of a user, scored by a function of theirs: function(weights, model_id, part) -> number."""

    def __init__(self, opened, base, chosen, policy, statistics, function, spec, loss=None):
        """Takes a collection; `function` is what `spec` names, other arguments as in `Case`."""
        super().__init__(opened, base, chosen, policy, statistics)
        self.function, self.spec, self.loss = function, spec, loss

    def scores(self, weights, part):
        """See `Case`; the function gets every tensor of the model, in its stored dtype."""
        pairs = zip(self.ids, self.sources.opened.models, strict=True)
        return np.array([self._call(self._whole(model, weights), name, part) for name, model in pairs])

    def _whole(self, model, weights):
        twins = {t: layer.name for layer in self.found.layers for t in layer.twins}
        found = {}
        for name, tensor in model.tensors.items():
            source = twins.get(name, name)
            merged = weights.get(source)
            if merged is None:
                found[name] = formats.read(model, tensor)
            else:
                found[name] = merged.astype(descriptors.numpy_dtype(tensor.dtype))
        for name, pair in model.adapters.items():
            found[name] = _factors(model, pair) if name not in weights else weights[name]
        for layer in self.found.layers:
            if layer.is_lora and layer.name not in found:
                found[layer.name] = weights[layer.name]
        return found

    def _call(self, weights, name, part):
        try:
            value = float(self.function(weights, name, part))
        except Exception as error:  # the user's own code: anything may come
            reason = f"score={self.spec} failed on {part} data: {type(error).__name__}: {errors.quote(error)}"
            hint = "it takes (weights, model_id, part) and returns a number, higher is better; --debug shows where"
            raise errors.InputError(name, reason, hint=hint) from error
        if not np.isfinite(value):
            raise errors.InputError(name, f"score={self.spec} returned {value} on {part} data")
        return value
