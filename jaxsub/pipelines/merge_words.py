"""What a merge says in the end."""

import textwrap

from jaxsub import errors, lineup, plugins
from jaxsub.pipelines import merge_store, plan
from jaxsub.report import words


def beside(template, layers, wanted):
    """What to know of an adapter's full values, where programs do not load them from the layout it is written in."""
    if not template.format == "peft" or not template.tensors:
        return
    if merge_store.layout_of(template, layers, wanted) == "portable":
        names = lineup.listed([*template.tensors], 3)
        yield (
            f"{len(template.tensors)} tensors are no updates (saved modules, biases), and lie beside them in "
            f"other_tensors.safetensors, which programs do not load: {names}"
        )


def notes(records, method, weights=None, *, has_statistics=False):
    """What the user should know of the method, or of what it made of these models; `weights` (N,) or None."""
    module = plugins.load("merges", method)
    said = [note for note in [getattr(module, "NOTE", "")] if note]
    if hasattr(module, "TAKES_STATISTICS") and not has_statistics:
        said.append(f"no statistics were given: without them {method} is the mean; give --config.statistics=FOLDER")
    means = [r for r in records if r["method"] == "mean" and method != "mean"]
    if means:
        said.append(
            f"{len(means)} layers are no updates, and are the mean: {lineup.listed([r['name'] for r in means], 3)}"
        )
    if hasattr(module, "leaves_base"):
        left = [r["name"] for r in records if r["method"] == method and module.leaves_base(r["shape"], r["num_models"])]
        if left:
            names = lineup.listed(left, 3)
            said.append(f"{len(left)} layers have too many models for {method}, and are the base's: {names}")
    centred = [r for r in records if r.get("sum_of_coefficients_is_zero")]
    is_equal = weights is None or len({*weights.tolist()}) == 1
    if centred and is_equal and getattr(module, "IS_LINEAR", False):
        said.append(
            f"the coefficients of these models sum to zero in {len(centred)} layers: any merge that adds them up with "
            "equal weights is the plain mean, for every rank and every scaling (E33)"
        )
    return said


def table(found):
    """What was merged, as text of at most 100 columns."""
    count = len(found["models"])
    lines = [f"{count} models merged by {found['method']}, {len(found['layers'])} layers"]
    cut = [r for r in found["layers"] if "rank" in r]
    if cut:
        lines.append(f"{'layer':56} {'shape':>16} {'rank':>5} {'cut away':>9}")
        names = words.columns([one["name"] for one in cut[: plan.LISTED]], 56)
        for name, one in zip(names, cut[: plan.LISTED], strict=True):
            shape = "x".join(map(str, one["shape"]))
            lines.append(f"{name} {shape:>16} {one['rank']:>5} {one['truncation_error']:>9.2e}")
        if len(cut) > plan.LISTED:
            lines.append(f"... and {len(cut) - plan.LISTED} more, in merge.json")
        lines.append("cut away: norm lost by the rank, relative to the merged update")
    if "models_worth_of_weights" in found["fit"]:
        fit = found["fit"]
        lines.append(
            f"together they take {fit['models_worth_of_weights']:.2f} models' worth of weights; layers that are one "
            f"for all: {len(fit['shared_by_all'])}, kept apart: {len(fit['kept_apart'])}"
        )
    if found["copied"]:
        names = lineup.listed(list(found["copied"]), 3)
        template = errors.quote(found["template"], 40)
        are = "tensor is" if len(found["copied"]) == 1 else "tensors are"
        lines.append(f"{len(found['copied'])} {are} as in {template}: {names}")
    return "\n".join([*lines, *(textwrap.fill(one, 100) for one in found["said"])])
