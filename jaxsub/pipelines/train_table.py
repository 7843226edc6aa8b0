"""Scores of methods with intervals, and whether joint subspaces beat random ones.

Intervals draw tasks, and within each of them seeds.
"""

import numpy as np

from jaxsub import errors
from jaxsub.pipelines.intervals import interval


def chosen(scores):
    """Number of the learning rate with the best mean of scores (tasks, seeds, rates).

    Runs that never had a finite score count before all others: of rates with as few of them, the best mean wins.
    """
    is_finite = np.isfinite(scores)
    lost = (~is_finite).sum(axis=(0, 1))
    means = np.where(is_finite, scores, 0).sum(axis=(0, 1)) / np.maximum(is_finite.sum(axis=(0, 1)), 1)
    return int(np.where(lost == lost.min(), means, -np.inf).argmax())


def comparisons(methods):
    """[{"of", "with", "difference", "low", "high", "better"}]: the first method beside each other one, run by run.

    `better` is True or False where the interval leaves out zero, None where it does not, or where there is one run.
    """
    first, *others = methods
    found = []
    for other in others:
        difference, low, high = interval(np.subtract(first["scores"], other["scores"]))
        better = None if low is None or low <= 0 <= high else difference > 0
        names = {"of": first["name"], "with": other["name"]}
        found.append({**names, "difference": difference, "low": low, "high": high, "better": better})
    return found


def table(found):
    """A training's record as text of at most 100 columns."""
    if "sweep" in found:
        from jaxsub.pipelines import train_sweep

        return train_sweep.table(found["sweep"])
    lines = [f"{'method':16} {'numbers':>9} {'rate':>7} {'start':>7} {'held out':>9} {'95 % interval':>17}"]
    for one in found["methods"]:
        mean, low, high = interval(one["scores"])
        span = "-" if low is None else f"{low:.4f} to {high:.4f}"
        lines.append(
            f"{errors.quote(one['name'], 16):16} {one['numbers']:>9} {one['learning_rate']:>7.3g} "
            f"{np.mean(one['start']):>7.4f} {mean:>9.4f} {span:>17}"
        )
        if one["not_finite"]:
            lines.append(f"  {one['not_finite']} of its runs were not finite: their rates are too high")
    tasks = len(found["tasks"])
    lines.append(
        f"{tasks} task{'s' * (tasks > 1)} x {found['seeds']} seed{'s' * (found['seeds'] > 1)}"
        + (
            f"; {found['skipped']} more left out: members of the bundle were trained on them"
            if found["skipped"]
            else ""
        )
    )
    if found.get("blind"):
        lines.append(
            "no labels of the bundle's members: some may have been trained on these tasks (--config.labels=FILE)"
        )
    if found.get("fixed"):
        more = f" and {len(found['fixed']) - 1} more" if len(found["fixed"]) > 1 else ""
        lines.append(
            f"{errors.quote(found['fixed'][0], 40)}{more}: the bundle's models are equal there; not trained in it"
        )
    for layer, count, models in found.get("saturated", ())[:3]:
        lines.append(
            f"{errors.quote(layer, 40)}: {count} components of {models} models are all there can be: saturated, "
            "members lie in it by construction"
        )
    tried = found["methods"][:2]
    if all(one["scores"] == one["start"] and not one["not_finite"] for one in tried):
        lines.append("no coefficient moved: the loss has no gradient where they start; try another --initial")
    if found["seeds"] == 1:
        lines.append("a single seed: intervals say nothing of how runs differ")
    lines += [sentence(one) for one in found["comparisons"]]
    if "posterior" in found:
        from jaxsub.pipelines import train_posterior

        lines.append(train_posterior.table(found["posterior"]))
    return "\n".join(lines)


def sentence(one):
    """What a comparison says, in words."""
    what = f"{one['of']} against {one['with']}: {one['difference']:+.4f}"
    if one["low"] is None:
        return f"{what}, of one run, or of seeds that all give the same: no claim"
    span = f"{what} ({one['low']:+.4f} to {one['high']:+.4f})"
    if one["better"] is None:
        return f"{span}: no better, no worse"
    return f"{span}: {'better' if one['better'] else 'worse'}"


def planned(found):
    """The plan of a dry run as text."""
    from jaxsub.pipelines import plan

    lines = [f"{'method':16} {'runs':>6} {'numbers':>9} {'memory':>10}"]
    lines += [f"{p['method']:16} {p['runs']:>6} {p['numbers']:>9} {plan.size(p['bytes']):>10}" for p in found["plan"]]
    lines.append(f"tasks: {', '.join(errors.quote(name, 40) for name in found['tasks'])}")
    return "\n".join(lines)
