"""`jaxsub demo`: trains collections whose truth is known, analyses them, and says whether the truth was found."""

import dataclasses
import os

WORLDS = ("same_start_same_task", "same_start_split_task", "own_start_same_task", "own_start_split_task")


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the demo."""

    worlds: tuple[str, ...] = WORLDS
    seed: int = 0
    draws: int = 20
    restart: bool = False


def run(config, workdir, *, stream=None):
    """Makes each world, analyses it, and writes its report to `workdir`/<world>.

    Args:
        config: Config.
        workdir: output folder.
        stream: text stream for progress, or None.

    Returns:
        text: one row a world and weight layer, and where the reports lie.
    """
    from jaxsub.pipelines import analyze, zoo

    rows = []
    for number, world in enumerate(config.worlds, 1):
        _say(stream, f"[{number}/{len(config.worlds)}] {world}: training its models")
        folder = zoo.make(world, workdir, seed=config.seed, restart=config.restart)
        options = analyze.Config(
            collection=(str(folder),), draws=config.draws, seed=config.seed, restart=config.restart
        )
        _say(stream, f"[{number}/{len(config.worlds)}] {world}: analysing them")
        # A world takes two seconds to analyse: its plan and layers would only bury what is found.
        report = analyze.run(options, os.path.join(workdir, world))
        rows += [_row(world, layer) for layer in report.layers if len(layer["shape"]) > 1]
    head = ("world", "layer", "mean", "k90", "unseen explained", "by chance", "verdict")
    widths = [max(len(r[c]) for r in [head, *rows]) for c in range(len(head))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]]
    reports = [f"  {os.path.join(workdir, world, 'report.html')}" for world in config.worlds]
    return "\n".join(
        [
            *lines,
            "",
            "unseen explained: the share of a model that so many components of the others explain, beyond the mean;",
            "by chance: that of the hardest null. A shared start gives a shared subspace, separate starts give none.",
            "Reports:",
            *reports,
        ]
    )


def _say(stream, line):
    if stream is not None:
        stream.write(line + "\n")
        stream.flush()


def _row(world, layer):
    gain = layer["gain"] or {"value": float("nan"), "null": float("nan")}
    return (
        world,
        layer["name"],
        f"{layer['mean_energy']:.1%}",
        str(layer["rank_at"]["0.9"]),
        f"{gain['value']:.1%} by {layer['deciding_rank']}",
        f"{gain['null']:.1%}",
        layer["verdict"],
    )
