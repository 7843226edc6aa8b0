"""Scores of merge methods as shares of the individual models', and which differences are real: text, Markdown, page.

Every score is divided by that of the task's own model. Intervals are of a bootstrap that draws zoos, and within each
the tasks, of differences task by task; a method beats another where theirs leaves out zero.
"""

import textwrap

import numpy as np

from jaxsub import errors, lineup
from jaxsub.pipelines import intervals

WIDTH = 100  # columns
COLOURS = "Blue: better than the mean. Orange: worse. Both by the interval of the difference, not by those drawn."
BETTER, WORSE, UNCLEAR, SAME = "better", "worse", "unclear", "identical"


def collected(title, each, methods, own):
    """The record of a collection from what was found of its zoos.

    Args:
        title: of the world or collection.
        each: [{"baselines", "methods": {label: what `tried` gave}}] of the zoos.
        methods: `merge_bench_space.Method`s.
        own: the bench's Config.
    """
    base = [one["baselines"] for one in each]
    individual = np.array([b["individual"]["test"] for b in base])
    found = {"name": title, "zoos": len(each), "tasks": [b["tasks"] for b in base], "individual": individual.tolist()}
    found["kept"] = base[0]["kept"]
    found["baselines"] = {
        label: _row(scores, individual) for label, scores in _baselines(base).items() if scores is not None
    }
    found["methods"] = {}
    for method in methods:
        runs = [one["methods"][method.label] for one in each]
        refused = [run["refused"] for run in runs if "refused" in run]
        if refused:
            found["methods"][method.label] = {"refused": refused[0]}
            continue
        row = _row([run["scores"] for run in runs], individual)
        row |= {"evaluations": len(runs[0]["tuning"]), "loss_steps": _loss_steps(method)}
        row |= {
            "options": [run["candidates"][run["chosen"]] for run in runs],
            "tuning": [run["tuning"] for run in runs],
        }
        found["methods"][method.label] = row
    found["comparisons"] = _comparisons(found["methods"], own)
    return found


def _baselines(base):
    """Label -> scores (zoos, tasks), or None."""
    tuning = [np.divide(b["models"]["tuning"], b["individual"]["tuning"]) for b in base]
    best = [int(np.argmax(np.mean(shares, axis=1))) for shares in tuning]
    models = [np.array(b["models"]["test"]) for b in base]
    votes = [b["ensemble"] for b in base]
    return {
        "individual models": [b["individual"]["test"] for b in base],
        f"ensemble of {len(models[0])}": None if None in votes else votes,
        "best single model": [m[n] for m, n in zip(models, best, strict=True)],
        "single model, mean": [m.mean(axis=0) for m in models],
        "base": None if None in [b["base"] for b in base] else [b["base"] for b in base],
    }


def _row(scores, individual):
    share = np.asarray(scores, np.float64) / individual
    mean, low, high = interval(share)
    scores = np.asarray(scores, np.float64).tolist()
    return {"scores": scores, "normalised": share.tolist(), "mean": mean, "low": low, "high": high}


def _loss_steps(method):
    if not getattr(method.module, "NEEDS_LOSS", False):
        return 0
    return method.candidates(1, 0)[0].steps


def _comparisons(methods, own):
    done = {label: row for label, row in methods.items() if "refused" not in row}
    wanted = [(label, other) for label in done for other in own.against if label != other]
    wanted += [tuple(pair.split()) for pair in own.pairs]
    return [
        compared(of, to, done[of]["normalised"], done[to]["normalised"])
        for of, to in dict.fromkeys(wanted)
        if of in done and to in done
    ]


def interval(scores):
    """(mean, low, high) of scores (zoos, tasks); of a single zoo, or the user's collection, tasks are what is drawn."""
    return intervals.interval(np.transpose(scores) if len(scores) == 1 else scores)


def compared(of, to, first, second):
    """{"of", "with", "difference", "low", "high", "verdict"} of normalised scores (zoos, tasks) of two methods."""
    difference = np.subtract(first, second)
    mean, low, high = interval(difference)
    if not difference.any():
        verdict = SAME
    elif low is None or low <= 0 <= high:
        verdict = UNCLEAR
    else:
        verdict = BETTER if mean > 0 else WORSE
    return {"of": of, "with": to, "difference": mean, "low": low, "high": high, "verdict": verdict}


def notes(found):
    """Sentences that belong to every table of a bench."""
    config, collections = found["config"], found["collections"]
    said = [
        f"Tuned methods: {config['evaluations']} candidates each, the first with the published defaults, the best on "
        "tuning rows scored on test rows; methods without a range have one. Shares are of the individual models."
    ]
    many, tasks = max(c["zoos"] for c in collections), max(len(c["individual"][0]) for c in collections)
    drawn = f"{many} zoos and of the {tasks} tasks of each" if many > 1 else f"the {tasks} tasks"
    said.append(f"Intervals (95 %) are of a bootstrap of {drawn}, widened for so few; '{UNCLEAR}': it holds 0.")
    count = sum(c["verdict"] != SAME for one in collections for c in one["comparisons"])
    said.append(
        f"{count} differences were looked at, none corrected for that: about {round(count / 20)} would leave out 0 if "
        "no method differed."
    )
    if any("mean" in one["methods"].get("fisher", {}) for one in collections):
        said.append("fisher has Fisher information of each model on training rows beside, which the others do not see.")
    steps = {
        label: m["loss_steps"] for one in collections for label, m in one["methods"].items() if m.get("loss_steps")
    }
    if steps:
        shown = ", ".join(f"{label} ({count} steps)" for label, count in steps.items())
        said.append(f"With a loss beside, which the others do not see, for every candidate: {shown}.")
    if any("mean" in one["methods"].get("joint_training", {}) for one in collections):
        said.append("joint_training is no merge: the mean, all its weights trained on that loss, for as many steps.")
    if any("ensemble" in label for one in collections for label in one["baselines"]):
        said.append("The ensemble averages the predictions of all models: N times the cost of a merged one.")
    same = [label for label in collections[0]["methods"] if all(_is_mean(c, label) for c in collections)]
    if "subspace_mean" in same:
        said.append("subspace_mean is the mean, whatever the rank (centred coefficients sum to 0): identical here too.")
    return said


def _is_mean(collection, label):
    return any(c["of"] == label and c["with"] == "mean" and c["verdict"] == SAME for c in collection["comparisons"])


def table(found):
    """A bench's record as text of at most 100 columns."""
    if "plan" in found:
        lines = [f"{label:28} {count:>4} candidates a zoo" for label, count in found["plan"].items()]
        return "\n".join([*lines, f"{', '.join(found['collections'])}; {found['zoos']} zoos each"])
    lines = []
    for one in found["collections"]:
        lines += [*_collection(one, found["config"]["against"], found["config"]["pairs"]), ""]
    lines += [line for note in found["notes"] for line in textwrap.wrap(note, WIDTH)]
    return "\n".join([*lines, f"{found['seconds']:.0f} s"])


def heading(one):
    """What a collection is, in a sentence."""
    score, zoos, tasks = np.mean(one["individual"]), one["zoos"], len(one["individual"][0])
    many = f"{tasks} tasks" + (f" x {zoos} zoos" if zoos > 1 else "")
    kept = f"; own layers of each task: {lineup.listed(one['kept'], 3)}" if one["kept"] else ""
    return f"{errors.quote(one['name'], 60)}: {many}, individual models score {score:.3f}{kept}"


def _collection(one, against, pairs):
    lines = [
        heading(one),
        f"{'':18} {'tried':>5} {'score':>6} {'share':>6}" + "".join(f"  {'- ' + a:30}" for a in against),
    ]
    for label, row in one["baselines"].items():
        lines.append(f"{label:18} {'':>5} {np.mean(row['scores']):>6.3f} {row['mean']:>6.3f}")
    ordered = sorted(_done(one), key=lambda item: -item[1]["mean"])
    for label, row in ordered:
        shown = "".join(f"  {_difference(one, label, other):30}" for other in against)
        score = np.mean(row["scores"])
        line = f"{errors.quote(label, 18):18} {row['evaluations']:>5} {score:>6.3f} {row['mean']:>6.3f}{shown}"
        lines.append(line.rstrip())
    for label, row in one["methods"].items():
        if "refused" in row:
            lines.append(f"{errors.quote(label, 18):18} not run: {errors.quote(row['refused'], 70)}")
    return lines + [sentence(c) for c in _pairs(one, pairs)]


def _pairs(one, pairs):
    """The comparisons that the bench's `pairs` ask for."""
    return [c for c in one["comparisons"] if [c["of"], c["with"]] in [pair.split() for pair in pairs]]


def _done(one):
    return [(label, row) for label, row in one["methods"].items() if "refused" not in row]


def _found(one, of, to):
    return next((c for c in one["comparisons"] if c["of"] == of and c["with"] == to), None)


def _difference(one, of, to):
    found = _found(one, of, to)
    if found is None:
        return ""
    return SAME if found["verdict"] == SAME else f"{found['difference']:+.3f}{_span(found)} {found['verdict']}"


def _span(found):
    return "" if found["low"] is None else f" ({found['low']:+.3f} {found['high']:+.3f})"


def sentence(found):
    """What a comparison says."""
    verdict = {UNCLEAR: "not distinguishable"}.get(found["verdict"], found["verdict"])
    return f"{found['of']} against {found['with']}: {found['difference']:+.3f}{_span(found)}: {verdict}"


def markdown(found):
    """The record as Markdown: shares of the individual models' scores, methods by collections."""
    collections = found["collections"]
    names = [one["name"].split()[0] for one in collections]
    lines = [f"| method | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    for label in dict.fromkeys(label for one in collections for label in one["baselines"]):
        cells = [
            f"{100 * one['baselines'][label]['mean']:.1f}" if label in one["baselines"] else "-" for one in collections
        ]
        lines.append(f"| *{label}* | {' | '.join(cells)} |")
    labels = list(collections[0]["methods"])
    done = {
        label: [one["methods"][label]["mean"] for one in collections if label in dict(_done(one))] for label in labels
    }
    labels.sort(key=lambda label: -np.mean(done[label] or [0]))
    lines += [f"| {label} | {' | '.join(_cell(one, label) for one in collections)} |" for label in labels]
    lines.append("")
    for one, name in zip(collections, names, strict=True):
        lines += [f"- {name}: {sentence(c)}" for c in _pairs(one, found["config"]["pairs"])]
    return "\n".join([*lines, "", *[f"- {note}" for note in found["notes"]]]) + "\n"


def _cell(one, label):
    row = one["methods"][label]
    if "refused" in row:
        return "-"
    against = _found(one, label, "mean")
    mark = {BETTER: " ▲", WORSE: " ▼"}.get(against["verdict"], "") if against else ""
    return f"{100 * row['mean']:.1f}{mark}"


def page(found):
    """The record as a self-contained HTML page: a chart and the scores of all tasks for every collection."""
    from jaxsub.report import html, markup

    parts = [markup.tag("h1", "Merge methods, tuned with the same number of evaluations")]
    for one in found["collections"]:
        parts += [markup.tag("h2", heading(one)), _chart(one), markup.tag("div", _tasks(one), class_="figures scroll")]
    parts += [
        markup.tag("h2", "How to read this"),
        markup.tag("p", COLOURS),
        *[markup.tag("p", note) for note in found["notes"]],
    ]
    parts.append(markup.tag("pre", table(found)))
    return html.page(markup.tag("main", parts), "merge bench")


def _chart(one):
    from jaxsub.report import svg

    rows = [(label, row["mean"], row["low"], row["high"], "null") for label, row in one["baselines"].items()][1:]
    for label, row in _done(one):
        verdict = (_found(one, label, "mean") or {"verdict": ""})["verdict"]
        style = {BETTER: "observed", WORSE: "within"}.get(verdict, "faint" if label != "mean" else "null")
        rows.append((label, row["mean"], row["low"], row["high"], style))
    rows.sort(key=lambda row: -row[1])
    high = 1.05 * max(1.0, *[row[1] for row in rows])  # bars end there
    rules = [svg.Rule("x", dict(_done(one))["mean"]["mean"], "mean")] if "mean" in dict(_done(one)) else []
    x = svg.linear("share of the individual models' score, with 95 % interval", 0, high, count=5)
    frame = svg.Frame(width=760, left=170, right=24, top=26, bottom=40)
    return svg.ranking(f"{one['name']}: shares of the individual models", x, rows, rules=rules, frame=frame)


def _tasks(one):
    """A table of shares: methods by tasks, means over zoos."""
    from jaxsub.report.markup import tag

    tasks = one["tasks"]
    same = all(names == tasks[0] for names in tasks)
    heads = [name.split(" ", 1)[-1] if same else f"task {n + 1}" for n, name in enumerate(tasks[0])]
    rows = [tag("thead", tag("tr", [tag("th", head) for head in ["", *heads, "mean"]]))]
    ordered = sorted([*one["baselines"].items(), *_done(one)], key=lambda item: -item[1]["mean"])
    for label, row in ordered:
        cells = [*np.mean(row["normalised"], axis=0), row["mean"]]
        rows.append(tag("tr", [tag("th", label), *[tag("td", f"{100 * cell:.1f}") for cell in cells]]))
    return tag("table", rows)
