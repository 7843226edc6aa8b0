"""What a bench merges: zoos of worlds, trained when they are first needed, or a collection of the user's."""

import glob
import hashlib
import os
import shutil

from jaxsub import collection, errors, formats, lineup, plugins
from jaxsub.pipelines import aside, hooks, merge_bench_case as cases, merge_kin, merge_rows, scoring, zoo

ZOOS = "zoo"  # in a workdir


def parse(text):
    """(text, module of `worlds`, its Options, texts of them) of "world option=value ..."."""
    name, *options = text.split() or [""]
    module = plugins.load("worlds", name)
    if not hasattr(module, "evaluation"):
        known = [w for w in plugins.available("worlds") if hasattr(plugins.load("worlds", w), "evaluation")]
        raise errors.ConfigError(f"worlds: models of {name} are not scored; those of {', '.join(known)} are")
    return text, module, zoo.parse_options(module.Options, options, f"world {name}"), tuple(options)


def sweep(place):
    """Removes what killed runs left of zoos that they were making; for the one who holds the workdir `place`."""
    for folder in glob.glob(os.path.join(glob.escape(place), ZOOS, "seed_*", "*", f"{zoo.UNFINISHED}*")):
        shutil.rmtree(folder, ignore_errors=True)


class World:
    """One zoo of a world, trained when it is first asked for."""

    def __init__(self, world, own, place, seed, stream):
        self.text, self.module, self.options, self.texts = world
        self.own, self.folder, self.seed, self.stream = own, os.path.join(place, ZOOS, f"seed_{seed}"), seed, stream
        self.title, self.key = self.text, f"{self.text} seed={seed}"
        self.identity = [self.key, own.tuning, own.loss_rows]

    def case(self):
        """The Zoo."""
        name = self.module.__name__.rpartition(".")[2]
        say = None if self.stream is None else lambda line: self.stream.write(line + "\n")
        # Options are in the folder's name: two worlds of a bench may differ in them alone.
        folder = os.path.join(self.folder, hashlib.sha256(self.text.encode()).hexdigest()[:8])
        models = zoo.run(zoo.Config(world=name, seed=self.seed, options=self.texts), folder, progress=say)
        evaluation = self.module.evaluation(self.options, self.seed)
        opened = collection.open_collection([models], smallest=1)
        base = formats.open_model(os.path.join(os.path.dirname(models), evaluation.base))
        return cases.Zoo(opened, base, evaluation, self.own.tuning, self.own.loss_rows)


class User:
    """A collection of the user's, opened already."""

    title = "collection"

    def __init__(self, case, digests, config):
        self._case, self.digests, self.seed = case, digests, config.seed
        self.key = "collection"
        given = ("score", "loss", "layers", "exclude_layers", "mismatched")
        self.identity = [digests, {name: getattr(config, name) for name in given}]

    @classmethod
    def open(cls, config):
        """Opens it, and refuses what no bench could use before anything is scored."""
        opened = aside.open_collection(config, smallest=1, odd=False)
        base = formats.open_model(config.base, allow_roots=config.allow_roots) if config.base else None
        chosen = lineup.layer_filter(config.layers or None, config.exclude_layers or None)
        function = scoring.load(config.score)
        loss = scoring.load(config.loss, "loss") if config.loss else None
        statistics = merge_rows.open_statistics(config.statistics, opened, config.allow_roots)
        case = cases.User(opened, base, chosen, config.mismatched, statistics, function, config.score, loss)
        merge_kin.require(case.found, case.sources, config)
        digests = {r.id: collection.digest(m) for r, m in zip(opened.refs, opened.models, strict=True)}
        specs = {"score": config.score, "loss": config.loss}
        digests |= {f"function of --{name}": hooks.digest(name, spec) for name, spec in specs.items() if spec}
        others = {"its base": base, **{f"statistics {n}": m for n, m in enumerate(statistics)}}
        digests |= {name: collection.digest(m) for name, m in others.items() if m is not None}
        return cls(case, digests, config)

    def case(self):
        """The User."""
        return self._case
