"""Writes docs/reliability.md from the figures that tests have recorded.

    JAXSUB_FIGURES=figures.jsonl pytest -m ""                 # or some of the files, as the page lists them
    python scripts/reliability_figures.py figures.jsonl [...] [--note="NUM-1: every third case"]

To be run where the tests ran: versions and processors are taken from here. A figure of several runs is their sum where
stops are counted, the number of different cases where cases are listed, else the largest.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import textwrap

PAGE = pathlib.Path(__file__).resolve().parents[1] / "docs" / "reliability.md"
TESTS = {  # name -> (what is promised, files that hold it)
    "CORPUS": (
        "Hostile, damaged and odd files get the verdict that is due, nothing else happens, refusals name their file.",
        "formats/test_hostile_corpus.py formats/test_hostile_files.py formats/test_orbax.py hostile/test_bundles.py "
        "hostile/test_collections.py hostile/test_corpus_commands.py programs/test_corpus_collections.py",
    ),
    "SWEEP": ("Good files cut at every byte, or with bytes after their end, are refused.", "formats/test_sweep.py"),
    "FUZZ": (
        "Mutants are judged at least as strictly as by safetensors 0.8; fuzzed parsers give a model or an error.",
        "formats/test_header_fuzz.py test_scripts.py",
    ),
    "AUDIT": ("Reading opens nothing but its inputs, runs nothing and imports nothing.", "hostile/test_audit.py"),
    "NAMES": ("Names are data on the terminal, in logs, files and pages, and in a browser.", "hostile/test_names.py"),
    "BUDGET": ("What memory does not hold is refused by its header.", "hostile/test_collections.py"),
    "BUDGET, plan": ("Planned memory is what an analysis takes.", "programs/test_memory_plan.py"),
    "CRASH-1": ("A run that is killed goes on; at most one layer is done again.", "programs/test_kills.py"),
    "CRASH-2": (
        "A fault at every single operation on files is mended by the next run.",
        "programs/test_disk_faults.py",
    ),
    "CRASH-3": ("No state that a power cut may leave is taken for a result.", "programs/test_disk_faults.py"),
    "ENOSPC": ("A full disk is said, and older results stay.", "programs/test_disk_faults.py"),
    "TOCTOU": ("An input that changes ends the run, or comes too late to be read.", "programs/test_changes.py"),
    "MUTATE": ("Every damage of a finished folder is found, and none is used.", "programs/test_changes.py"),
    "RESUME": ("A run does not go on with other options.", "programs/test_changes.py"),
    "LOCK": ("Of two runs in one folder one wins, and the other says whose it is.", "programs/test_locks.py"),
    "SIGNAL": ("SIGINT and SIGTERM end a run soon; it can go on.", "programs/test_kills.py programs/test_locks.py"),
    "DIST": (
        "Processes of one run end together, none waits for ever, and the next run gives the same bytes.",
        "programs/test_processes.py programs/test_process_kills.py",
    ),
    "PERM": ("Modes follow the umask; links planted in the output are not followed.", "programs/test_changes.py"),
    "DET-1": (
        "Other folder, zone, locale, hash seed and order of files: the same bytes.",
        "programs/test_determinism.py",
    ),
    "DET-2": ("One and several devices agree.", "programs/test_analyze.py programs/test_fit_devices.py"),
    "DET-4": ("The bits are those that are kept for this kind of machine.", "golden/test_hashes.py"),
    "NUM-1": (
        "LAPACK's test ratios stay under 30.",
        "linalg/test_ratios.py linalg/test_ratios_low_rank.py linalg/test_ratios_sharded.py programs/test_ratios.py",
    ),
    "NUM-2": ("Awkward collections of the corpus: values to 30 units.", "programs/test_corpus_collections.py"),
    "NUM-3": ("Relations that must hold between analyses, and between fits.", "programs/test_relations.py"),
    "NUM-4": ("A solver that fails is noticed; another one, or an error that names the layer.", "test_solvers.py"),
    "NUM-5": ("Random collections against float64 NumPy.", "programs/test_random_collections.py"),
    "NUM-6": ("Noise is called a finding as seldom as the documentation says.", "test_false_findings.py"),
}


def read(paths):
    """test -> figure -> values, in the order of the files."""
    found = {}
    for path in paths:
        for line in pathlib.Path(path).read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            found.setdefault(entry["test"], {}).setdefault(entry["figure"], []).append(entry["value"])
    return found


def merged(figure, values):
    """One value of the values of several runs, as text."""
    if any(figure.startswith(word) for word in ("verdicts", "refusals", "configurations refused", "relations")):
        return str(len({*map(str, values)}))
    if all(isinstance(v, int | float) for v in values):
        value = sum(values) if figure.endswith((": stops", ": kills")) else max(values)
        return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
    last = values[-1]
    if isinstance(last, str):
        return ", ".join(sorted({*values}))
    return ", ".join(f"{v:,}" if isinstance(v, int) else str(v) for v in last)


def grid(figures):
    """Lines of the table of NUM-1: one a test and method."""
    lines = ["| test, method | ratios' classes | largest ratio | of | over 30 |", "|---|---:|---:|---|---:|"]
    for figure, values in sorted(figures.items()):
        largest, label, _, _ = max(values, key=lambda v: v[0])
        classes, over = sum(v[2] for v in values), sum(v[3] for v in values)
        lines.append(
            f"| {plain(figure.removeprefix('test_'))} | {classes:,} | {largest:.3g} | {plain(label)} | {over} |"
        )
    every = [v for values in figures.values() for v in values]
    lines.append(
        f"| all | {sum(v[2] for v in every):,} | {max(v[0] for v in every):.3g} | | {sum(v[3] for v in every)} |"
    )
    return lines


def plain(text):
    return text.replace("|", "\\|").replace("_", " ")


def page(found, notes, measured, kept=None):
    """The whole page; `kept` is test -> lines of a page before, for tests without figures."""
    kept = kept or {}
    lines = [
        "# Reliability figures",
        "",
        f"What tests counted and measured on {measured}, written by `scripts/reliability_figures.py`. A figure is",
        "recorded after its test has held, so what is here has passed; NUM-1 records classes over its threshold too.",
        "Commands run in the repository; the corpus lies in `JAXSUB_SHARED`. Versions:",
        f"{versions()}.",
        "",
    ]
    for test, (promise, files) in TESTS.items():
        if test not in found and test in kept:
            lines += kept[test]
            continue
        commands = " ".join("tests/" + file for file in files.split())
        lines += [f"## {test}", "", promise, "", *textwrap.wrap(f'`pytest -m "" {commands}`', 118), ""]
        if test in notes:
            lines += [*textwrap.wrap(notes[test], 118), ""]
        if test not in found:
            lines += ["Not measured in this run.", ""]
            continue
        if test == "NUM-1":
            lines += [*grid(found[test]), ""]
            continue
        lines += ["| figure | value |", "|---|---:|"]
        lines += [f"| {plain(figure)} | {plain(merged(figure, values))} |" for figure, values in found[test].items()]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def sections(text):
    """test -> its lines of a page, heading included."""
    found, lines = {}, []
    for line in text.splitlines():
        if line.startswith("## "):
            lines = found[line[3:]] = []
        lines.append(line)
    for one in found.values():
        if one[-1]:
            one.append("")
    return found


def versions():
    import importlib.metadata

    names = ("jaxsub", "jax", "jaxlib", "numpy", "safetensors")
    parts = [f"{name} {importlib.metadata.version(name)}" for name in names]
    return ", ".join([*parts, f"Python {platform.python_version()}", f"{platform.machine()}, {os.cpu_count()} cores"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("figures", nargs="+")
    parser.add_argument("--note", action="append", default=[], help="TEST: a sentence about how it was run")
    parser.add_argument("--keep", action="store_true", help="keep the page's sections of tests without new figures")
    arguments = parser.parse_args()
    newest = max(os.path.getmtime(path) for path in arguments.figures)
    notes = dict(note.split(": ", 1) for note in arguments.note)
    measured = datetime.datetime.fromtimestamp(newest, datetime.UTC).date()
    PAGE.parent.mkdir(exist_ok=True)
    kept = sections(PAGE.read_text(encoding="utf-8")) if arguments.keep else {}
    PAGE.write_text(page(read(arguments.figures), notes, measured, kept), encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
