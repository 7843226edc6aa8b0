"""Intrinsic dimension: the score that d trained numbers reach, in random subspaces and in the joint one.

    d_int90    fewest numbers with which a run reaches 90 % of what full training does, between sizes on a log scale

Random subspaces are of all weights at once, about a fresh start (Li et al. 2018), by three kinds of projection, and
about the bundle's mean; the joint one is that of the components with the largest singular values, about the mean.
"""

import dataclasses
import math
import os

import numpy as np

from jaxsub import errors, plugins
from jaxsub.pipelines import intervals, train_runs, train_table
from jaxsub.report import _write

SHARE, PARTS = 0.9, "sweep_parts.json"
CURVES = {
    "dense": ("fresh", "dense"),
    "sparse": ("fresh", "sparse"),
    "fastfood": ("fresh", "fastfood"),
    "random about the mean": ("mean", "dense"),
}


def run(config, setup, stream=None, folder=None):
    """What a sweep finds; sizes that are done are kept in `folder`, where a run that was stopped goes on.

    {"dimensions", "full", "curves": {name: {"scores": (sizes, seeds), "d_int90": ...}}}.

    Raises:
        ConfigError: sizes larger than the network.
        WorkdirError: what was kept is damaged.
    """
    sizes = list(config.sweep)
    fresh, has_mean, kept = dataclasses.replace(config, initial="fresh"), bool(setup.spaces), _Kept(folder)
    full = kept.scores("full", lambda: _scores(_method("full", "full"), setup, fresh))
    goal = SHARE * float(full.mean())
    found = {"share": SHARE, "dimensions": sizes, "full": full.tolist(), "goal": goal, "curves": {}}
    curves = {name: (start, _random(kind)) for name, (start, kind) in CURVES.items() if start == "fresh" or has_mean}
    if has_mean:
        curves["joint subspace"] = ("mean", lambda d: _method("scalar", "joint", "given", dimension=d))
    for name, (start, made) in curves.items():
        scores, held = [], 0
        for d in sizes:
            if name == "joint subspace" and d > _most(setup):
                break  # the bundle holds no more
            own = fresh if start == "fresh" else dataclasses.replace(config, initial="mean")
            scores.append(kept.scores(f"{name} {d}", lambda made=made, d=d, own=own: _scores(made(d), setup, own)))
            held = d
            if stream is not None:
                stream.write(f"{name}: {d} numbers, {scores[-1].mean():.4f}\n")
        each = [crossing(sizes[: len(scores)], [s[seed] for s in scores], goal) for seed in range(config.seeds)]
        own = _interval(each, is_bound=bool((scores[0] >= goal).any()) if scores else False)
        found["curves"][name] = {"scores": np.array(scores).tolist(), "largest": held, "d_int90": own}
    return found


class _Kept:
    """Scores of what was trained before, in a sealed file of a folder; with None nothing is kept."""

    def __init__(self, folder):
        self._path = folder and os.path.join(folder, PARTS)
        self._found = {}
        try:
            self._found = _write.read_sealed(self._path) if self._path else {}
        except FileNotFoundError:
            pass
        except ValueError as error:
            raise errors.WorkdirError(f"{errors.quote(self._path)}: is {error}; start over with --restart") from error

    def scores(self, name, train):
        """(seeds,) float64 under this name, from `train` where it is not there."""
        if name not in self._found:
            self._found[name] = train().tolist()
            if self._path:
                _write.write_sealed(self._path, self._found)
        return np.array(self._found[name])


def _most(setup):
    return sum(len(s.basis) for s in setup.spaces.values() if s.basis is not None)


def _method(module, name, spaces="own", **options):
    module = plugins.load("parametrisations", module)
    return train_runs.Method(name, module, module.Options(**options), spaces)


def _random(kind):
    return lambda d: _method("random_subspace", kind, dimension=d, kind=kind)


def _scores(method, setup, config):
    """(seeds,) held-out scores, mean over tasks, at the rate that the validation rows choose."""
    training = train_runs.Training(method, setup, config)
    state, _ = training.train(None)
    chosen = train_table.chosen(np.asarray(state.best_score).reshape(training.scores_shape))
    return training.scores(state.best)[:, :, chosen].mean(axis=0)


def crossing(sizes, scores, goal):
    """Fewest numbers that reach the goal, by straight lines between sizes on a log scale; None if none does.

    Args:
        sizes: increasing.
        scores: one a size.
        goal: the score to reach.
    """
    for number, (size, score) in enumerate(zip(sizes, scores, strict=True)):
        if score >= goal:
            if not number:
                return float(size)
            before, low = sizes[number - 1], scores[number - 1]
            share = (goal - low) / (score - low)
            return float(math.exp(math.log(before) + share * (math.log(size) - math.log(before))))
    return None


def _interval(each, *, is_bound=False):
    """{"seeds": values, "mean", "low", "high", "at_most"}; None where a run never reaches the goal.

    With `is_bound` a run reached it with the fewest numbers that were tried: a mean is then one that is not exceeded.
    """
    nothing = {"seeds": each, "mean": None, "low": None, "high": None, "at_most": None}
    if any(one is None for one in each):
        return nothing
    mean, low, high = (one if one is None else float(math.exp(one)) for one in intervals.interval(np.log([each])))
    if is_bound:
        return nothing | {"at_most": mean}
    return nothing | {"mean": mean, "low": low, "high": high}


def table(found):
    """The sweep as text."""
    sizes = found["dimensions"]
    lines = [f"{'numbers':24}" + "".join(f" {d:>7}" for d in sizes) + f" {'d_int90':>8}  95 % interval"]
    for name, curve in found["curves"].items():
        means = [float(np.mean(s)) for s in curve["scores"]]
        own, cells = curve["d_int90"], "".join(f" {m:>7.4f}" for m in means).ljust(8 * len(sizes))
        shown = "-" if own["mean"] is None else f"{own['mean']:.0f}"
        shown = shown if own["at_most"] is None else f"<={own['at_most']:.0f}"
        span = "" if own["low"] is None else f"{own['low']:.0f} to {own['high']:.0f}"
        lines.append(f"{name:24}{cells} {shown:>8}  {span}")
    seeds = len(found["full"])
    said = f"full training {np.mean(found['full']):.4f}; d_int90: fewest numbers that reach {found['share']:.0%} of it"
    lines.append(f"{said}; {seeds} seeds" if seeds > 1 else f"{said}; a single seed, of which no interval follows")
    if any(curve["d_int90"]["at_most"] is not None for curve in found["curves"].values()):
        lines.append("<=: reached with the fewest numbers tried; smaller ones in --config.sweep would tell")
    return "\n".join(lines)


def page(found):
    """The curves as a self-contained HTML page, with the range of seeds as bands."""
    from jaxsub.report import html, markup, svg

    styles = ("observed", "within", "family", "null", "faint")
    lines = []
    for (name, curve), style in zip(reversed(found["curves"].items()), styles, strict=False):
        sizes = found["dimensions"][: len(curve["scores"])]
        points = [(d, float(np.mean(s))) for d, s in zip(sizes, curve["scores"], strict=True)]
        spans = [intervals.interval([s])[1:] for s in curve["scores"]]
        band = [(d, *span) for d, span in zip(sizes, spans, strict=True) if span[0] is not None]
        lines.append(svg.Line(points, style, name, band, dots=True))
    x = svg.doubling("numbers trained (log scale)", found["dimensions"])
    y = svg.linear("held-out score", 0, 1, count=5)
    frame = svg.Frame(width=640, height=380, right=160)
    title = "Held-out score against the numbers trained"
    chart = svg.chart(title, x, y, lines, rules=[svg.Rule("y", found["goal"], "90 % of full")], frame=frame)
    seeds = f"{len(found['full'])} seeds; bands are 95 % intervals of their mean."
    body = markup.tag("main", markup.tag("h1", title), markup.tag("p", seeds), chart, markup.tag("pre", table(found)))
    return html.page(body, "intrinsic dimension")
