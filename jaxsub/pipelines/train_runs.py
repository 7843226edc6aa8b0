"""One method of a training: its runs (tasks x seeds x learning rates), trained in one program, resumed to the bit."""

import dataclasses
import json
import os
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from jaxsub import config as configs, errors, plugins
from jaxsub.formats import _files
from jaxsub.parametrisations import _spaces, _values
from jaxsub.pipelines import tracing, train_place
from jaxsub.pipelines.zoo import parse_options
from jaxsub.report import _write
from jaxsub.training import checkpoints, initial, network as networks, steps

LAST_LAYER = "^(head|output|classifier|lm_head)/"
BASELINES = ("random", "random_matched", "lora", "last_layer", "full")
RATES = (0.001, 0.003, 0.01, 0.03, 0.1)


@dataclasses.dataclass(frozen=True)
class Method:
    """What is trained, and in which subspaces: the bundle's ("given"), random ones of their sizes, or its own."""

    name: str
    parametrisation: object
    options: object
    spaces: str = "own"  # given, random, random_matched or own


def methods(config, setup):
    """The method that was asked for, and the baselines beside it.

    Raises:
        ConfigError: an unknown one, or options that do not fit.
    """
    module = plugins.load("parametrisations", config.parametrisation)
    own = {f.name for f in dataclasses.fields(module.Options)}
    rank = (f"rank={config.rank}",) if config.rank else ()
    if rank and "rank" not in own:
        raise errors.ConfigError(f"rank: parametrisation={config.parametrisation} has none")
    options = parse_options(module.Options, (*rank, *config.options))
    if hasattr(module, "require_optimizer"):
        module.require_optimizer(options, config.optimizer)
    if module.NEEDS_SPACES and not setup.spaces:
        raise errors.ConfigError(f"parametrisation={config.parametrisation}: give --bundle=FOLDER that fit wrote")
    if config.initial in initial.BY_EXAMPLES and not module.NEEDS_SPACES:
        raise errors.ConfigError(
            f"initial={config.initial}: what parametrisation={config.parametrisation} trains are no coefficients of "
            "the bundle; start from mean or base"
        )
    found = [Method(config.parametrisation, module, options, "given" if module.NEEDS_SPACES else "own")]
    full = plugins.load("parametrisations", "full")
    lora = plugins.load("parametrisations", "lora")
    for name in config.baselines:
        errors.require_known("baselines", name, BASELINES)
        if name == "random_matched" and all(space.basis is None for space in setup.spaces.values()):
            continue  # factors span an axis: there is no covariance along it to match
        if name.startswith("random") and module.NEEDS_SPACES:
            found.append(Method(name, module, options, name))
        elif name == "lora" and config.parametrisation != "lora":
            found.append(Method("lora", lora, lora.Options(config.lora_rank, 2.0 * config.lora_rank)))
        elif name == "last_layer":
            found.append(Method("last_layer", full, full.Options(_last_layer(config, setup, full))))
        elif name == "full" and config.parametrisation != "full":
            found.append(Method("full", full, full.Options()))
    return found


def _last_layer(config, setup, full):
    """Pattern of the layers of the baseline `last_layer`."""
    pattern = config.last_layer or LAST_LAYER
    try:
        full.chosen(setup.start, pattern)
    except errors.ConfigError as error:
        raise errors.ConfigError(f"last_layer: {error}; give another, or --config.baselines without it") from error
    return pattern


class Training:
    """The runs of one method.

    Attributes:
        plan: steps.Plan.
        runs: steps.Runs, with the rows to fit.
        count: numbers that one run trains.
        rates: learning rates tried; runs are ordered by task, seed, rate.
    """

    def __init__(self, method, setup, config, mesh=None):
        self.method, self.setup, self.config, self.mesh = method, setup, config, mesh
        self.rates = config.learning_rates or RATES
        self.seeds = [config.seed + s for s in range(config.seeds)]
        module, options = method.parametrisation, method.options
        self.plan = steps.Plan(
            network=setup.network,
            task=setup.task,
            task_options=setup.variations[0].options,
            parametrisation=module,
            options=options,
            optimizer=steps.optimizer(config.optimizer, _optimizer_options(config)),
            schedule=steps.schedule(config.schedule, config.steps, config.warmup),
            accumulate=config.accumulate,
            batch_axis=mesh.axis_names[0] if mesh is not None and config.shard == "batch" else "",
        )
        pairs, first, drawn = [], None, {seed: self._drawn(seed) for seed in self.seeds}
        for number, variation in enumerate(setup.variations):
            for seed in self.seeds:
                pair = self._begin(variation, number, seed, *drawn[seed])
                first = first or pair
                pairs.append((pair[0], steps.shared(first[1], pair[1])))
        each = [pair for pair in pairs for _ in self.rates]
        frozen, frozen_axes = steps.stacked([pair[1] for pair in each])
        self.count = steps.count(each[0][0])
        self.trainable = jax.tree.map(lambda *x: jnp.stack(x), *(pair[0] for pair in each))
        self._try_optimizer(each[0][0])
        keys = jnp.stack([
            self._key("batches", number, seed)
            for number in range(len(setup.variations)) for seed in self.seeds for _ in self.rates
        ])  # fmt: skip
        keys = keys[0] if config.same_batches else keys
        rates = jnp.asarray(np.tile(np.float32(self.rates), len(pairs)))
        self._frozen, self._keys, self._rates, self._frozen_axes = frozen, keys, rates, frozen_axes
        self.runs, self.axes = self._given("fit")

    def _try_optimizer(self, trainable):
        """Raises ConfigError where the optimizer cannot make a step with its options."""

        def step(trainable):
            with jax.numpy_dtype_promotion("standard"):
                return self.plan.optimizer.update(trainable, self.plan.optimizer.init(trainable), trainable)

        try:
            jax.eval_shape(step, trainable)
        except (TypeError, ValueError) as error:
            said = errors.quote(error, 200)
            raise errors.ConfigError(
                f"optimizer_options: optimizer={self.config.optimizer} fails with them: {said}"
            ) from error

    @property
    def scores_shape(self):
        """(tasks, seeds, rates)."""
        return len(self.setup.variations), len(self.seeds), len(self.rates)

    def _key(self, stream, number, seed):
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(stream.encode()))
        return jax.random.fold_in(key, number)

    def _drawn(self, seed):
        """(spaces, start) of one seed, the same for all tasks; a fresh start is the same for all methods too."""
        method, setup = self.method, self.setup
        spaces, start = setup.spaces, setup.start
        if method.spaces.startswith("random"):
            key, is_matched = self._key("random subspaces", 0, seed), method.spaces == "random_matched"
            spaces = {
                name: _spaces.random_like(space, jax.random.fold_in(key, i), is_matched=is_matched)
                for i, (name, space) in enumerate(setup.spaces.items())
            }
        if self.config.initial == "fresh":
            example = setup.variations[0].fit.inputs[:2]
            start = networks.fresh(setup.network.module, example, self._key("fresh", 0, seed))
        return spaces, start

    def _begin(self, variation, number, seed, spaces, start):
        """(trainable, frozen) of one task and seed."""
        method, kind, key = self.method, self.config.initial, self._key("initial", number, seed)
        if kind in initial.BY_EXAMPLES and method.spaces != "given":
            start = self._weights_by_examples(variation, number, seed)
        trainable, frozen = method.parametrisation.init(key, start, spaces, method.options)
        if kind in initial.BY_EXAMPLES and method.spaces == "given":
            trainable = self._by_examples(self.plan, trainable, frozen, variation, seed)
        return trainable, frozen

    def _weights_by_examples(self, variation, number, seed):
        """Where the coefficients that examples give begin, for the other methods: all start from the same weights."""
        first, setup = methods(self.config, self.setup)[0], self.setup
        key = self._key("initial", number, seed)
        trainable, frozen = first.parametrisation.init(key, setup.start, setup.spaces, first.options)
        plan = dataclasses.replace(self.plan, parametrisation=first.parametrisation, options=first.options)
        trainable = self._by_examples(plan, trainable, frozen, variation, seed)
        return {name: _values.dense(w) for name, w in plan.weights(trainable, frozen).items()}

    def _by_examples(self, plan, trainable, frozen, variation, seed):
        kind, candidates = self.config.initial, initial.members(self.setup.spaces, trainable)
        count = int(variation.fit.num_rows)
        chosen = np.random.RandomState(seed).permutation(count)[: self.config.examples]
        rows = np.asarray(variation.fit.rows)[:count][chosen]
        given = {
            "frozen": frozen,
            "inputs": jnp.asarray(variation.fit.inputs[rows]),
            "targets": jnp.asarray(variation.fit.targets[rows]),
        }
        back = initial.unflattener(trainable)
        answers = _answers(plan, trainable)
        if kind == "nearest":
            return back(initial.nearest(answers, given, self.setup.task.loss, candidates))
        solve = initial.ridge if kind == "ridge" else initial.posterior
        return back(solve(answers, given, candidates))

    def _given(self, part):
        """(Runs, axes) with the rows of `part` of every task."""
        each = [
            v
            for v in (getattr(v, part) for v in self.setup.variations)
            for _ in range(len(self.seeds) * len(self.rates))
        ]
        data, axes = steps.stacked(each)
        runs = steps.Runs(self._frozen, data, self._keys, self._rates)
        return self._placed(runs, (self._frozen_axes, axes)), (self._frozen_axes, axes)

    def _placed(self, runs, axes):
        return runs if self.mesh is None else train_place.runs(runs, axes, self.mesh, self.config.shard)

    def begin(self):
        """The State before the first step."""
        state = steps.begin(self.trainable, self._rates, self.plan)
        return state if self.mesh is None else train_place.state(state, self.mesh, self.config.shard)

    def train(self, folder, bar=None):
        """Trains all runs; goes on from the last checkpoint in `folder` (None: nothing is kept).

        Returns:
            (State, [one dict of metrics an evaluation]).
        """
        config, state = self.config, self.begin()
        place = folder and os.path.join(folder, "checkpoints", self.method.name)
        kept = checkpoints.restore(place, state) if place else None
        state = state if kept is None else self._like(kept, state)
        log = Metrics(folder and os.path.join(folder, "metrics", f"{self.method.name}.jsonl"), int(state.step))
        choose, axes = self._given("choose")
        if (
            not int(state.step)
            and not np.isfinite(steps.scores(state.trainable, choose, plan=self.plan, axes=axes)).all()
        ):
            raise errors.ConfigError(
                f"{self.method.name}: outputs are no numbers where training begins: look at its start"
            )
        while int(state.step) < config.steps and not bool(state.is_stopped.all()):
            size = min(config.evaluate_every, config.steps - int(state.step))
            with tracing.stage(f"training {self.method.name}"):
                state, losses = steps.advance(state, self.runs, plan=self.plan, axes=self.axes, num_steps=size)
                found = steps.scores(state.trainable, choose, plan=self.plan, axes=axes)
                state = steps.judged(state, found, patience=config.patience)
            found = np.asarray(found, np.float64)
            record = {
                "method": self.method.name,
                "step": int(state.step),
                "loss": float(losses[-1].mean()),
                "validation": float(np.mean(found[np.isfinite(found)])) if np.isfinite(found).any() else None,
                "stopped": int(state.is_stopped.sum()),
            }
            if not np.isfinite(record["loss"]):
                bad = int((~np.isfinite(np.asarray(losses))).any(axis=0).sum())
                record |= {"loss": None, "not_finite": bad}
            log.write(record)
            if place:
                checkpoints.save(place, state)
            if bar is not None:
                bar(record)
        return state, log.records

    def kernel_bytes(self):
        """Bytes on one device that the largest kernel takes beside its arguments; compiles them."""
        config, state, found = self.config, self.begin(), []
        size = min(config.evaluate_every, config.steps)
        found.append(steps.advance.lower(state, self.runs, plan=self.plan, axes=self.axes, num_steps=size))
        for part in ("choose", "held_out"):
            runs, axes = self._given(part)
            found.append(steps.scores.lower(state.trainable, runs, plan=self.plan, axes=axes))
        analyses = [one.compile().memory_analysis() for one in found]
        return max((int(one.temp_size_in_bytes) for one in analyses if one is not None), default=0)

    def _like(self, kept, state):
        """A restored State on the devices of a new one."""
        return jax.tree.map(lambda a, b: jax.device_put(a, b.sharding), kept, state)

    def scores(self, trainable, part="held_out"):
        """(tasks, seeds, rates) scores on rows of `part`, float64."""
        runs, axes = self._given(part)
        found = np.asarray(steps.scores(trainable, runs, plan=self.plan, axes=axes), np.float64)
        return found.reshape(self.scores_shape)

    def answers(self, trainable):
        """Outputs as a function of a vector of all that one run trains; see `initial`."""
        return _answers(self.plan, trainable)

    def frozen_of(self, run):
        """What one run keeps as it is."""
        pairs = zip(jax.tree.leaves(self._frozen), self._frozen_axes, strict=True)
        leaves = [x if axis is None else x[run] for x, axis in pairs]
        return jax.tree.unflatten(jax.tree.structure(self._frozen), leaves)

    def _values(self, trainable, run):
        return self.plan.weights(jax.tree.map(lambda x: x[run], trainable), self.frozen_of(run))

    def weights(self, trainable, run):
        """{layer: array} of one run, multiplied out, on the host."""
        return {name: np.asarray(_values.dense(w)) for name, w in self._values(trainable, run).items()}

    def factors(self, trainable, run):
        """{layer: (left (i, q), right (q, o))} of the layers of one run that have low-rank updates, on the host."""
        found = self._values(trainable, run)
        kept = {n: w for n, w in found.items() if isinstance(w, _values.Factored)}
        return {name: (np.asarray(w.left), np.asarray(w.right)) for name, w in kept.items()}


def _answers(plan, trainable):
    return _Answers(plan, tuple(sorted((name, tuple(c.shape)) for name, c in trainable.items())))


@dataclasses.dataclass(frozen=True)
class _Answers:
    """Outputs as a function of all coefficients in one vector; hashable: tasks and seeds share a compilation."""

    plan: steps.Plan
    shapes: tuple

    def __call__(self, c, given):
        back = initial.unflattener({n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in self.shapes})
        return self.plan.network(self.plan.weights(back(c), given["frozen"]), given["inputs"])


class Metrics:
    """One JSON line an evaluation; lines behind the step that a run goes on from are dropped."""

    def __init__(self, path, step):
        self.path, self.records = path, []
        if path is None:
            return
        _files.make_folder(os.path.dirname(path))
        if step and os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                lines = [line for line in file if line.endswith("\n")]
            self.records = [r for r in map(json.loads, lines) if r["step"] <= step]
        _write.write_text(path, "".join(json.dumps(r) + "\n" for r in self.records))

    def write(self, record):
        """Adds a record."""
        self.records.append(record)
        if self.path is not None:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


def _optimizer_options(config):
    found = {}
    for text in config.optimizer_options:
        name, _, value = text.partition("=")
        try:
            found[name] = configs.parse(configs.Field(name, float, 0.0), value)
            found[name] = int(found[name]) if found[name].is_integer() and "." not in value else found[name]
        except errors.ConfigError:
            found[name] = {"true": True, "false": False}.get(value, value)
    return tuple(found.items())
