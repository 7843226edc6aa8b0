"""`jaxsub analyze`: one pass over a collection's weights, then the truth about its joint subspace.

open (headers) -> distinct models -> plan -> layers (Statistics) -> figures -> report.json, report.html, table
"""

import contextlib
import dataclasses
import time

from jaxsub import errors, plugins

NULLS = ("permutation", "gaussian", "strength", "shuffle", "fresh_init")


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of an analysis; each can be set as --config.<field>=."""

    collection: tuple[str, ...] = ()  # folders, globs, text files of paths, or org/name of the hub cache
    layers: tuple[str, ...] = ()  # regular expressions; only layers that match one
    exclude_layers: tuple[str, ...] = ()
    base: str = ""  # a model to subtract from dense layers
    view: str = "weights"  # weights, lora_factors (A and B apart), difference (needs base)
    match: str = "exact"  # exact names, or order (run-numbered names)
    strict: bool = False  # any model set aside is fatal
    max_quarantined: int = -1  # models that may be set aside; -1: max(1, 5 %)
    allow_roots: tuple[str, ...] = ()  # folders that links may lead into
    preflight: str = "stream"  # stream: check while reading; full: read everything once before
    nulls: tuple[str, ...] = NULLS
    draws: int = 20  # null draws a layer, at most; 8 where they agree to a hundredth of the verdict's margin
    splits: int = 20  # random halves for the stability of the subspace
    precision: str = "auto"  # auto, float32, float64
    max_host_bytes: int = 0  # bound on the plan's peak; 0: blocks of 128 MiB
    max_device_bytes: int = 0  # bound on the plan's peak of each device: smaller blocks; 0: what the device has
    lineage_threshold: float = 0.15
    devices: int = 0  # 0: all
    coordinator: str = ""  # host:port of process 0, in a run of several processes; empty: as the launcher says, if any
    num_processes: int = 0  # of the run
    process_id: int = -1  # which of them this is
    stall_timeout: int = 0  # seconds without a finished layer that end a run of several processes; 0: half an hour
    seed: int = 0
    dry_run: bool = False
    profile: bool = False  # write a trace for xprof and Perfetto to WORKDIR/profile
    restart: bool = False
    break_lock: bool = False  # take over a workdir that a run on another host left; make sure that it has ended


def run(config, workdir=None, *, stream=None):
    """Analyses a collection and writes the report to `workdir` (nothing is written without one).

    Args:
        config: Config.
        workdir: output folder, or None.
        stream: text stream for progress, or None.

    Returns:
        report.Report; with `dry_run`, the plan as text. Of several processes the first alone: others get None.

    Raises:
        ConfigError, InputError, WorkdirError, ResourceError, PeerError: see `jaxsub.errors`.
    """
    from jaxsub import distributed
    from jaxsub.pipelines import aside, workdir as workdirs

    started = time.perf_counter()
    validate(config)
    if not config.collection:
        raise errors.ConfigError("no collection: give --collection=FOLDER (or a glob, or a .txt file of paths)")
    distributed.start(config.coordinator, config.num_processes, config.process_id)

    def open_here():
        if workdir is not None and not config.dry_run:
            workdirs.require_free(workdir)
        chosen = {"layers": config.layers or None, "exclude_layers": config.exclude_layers or None}
        return aside.open_collection(config, match=config.match, **chosen)

    return analyze(distributed.together(open_here), config, workdir, stream=stream, started=started)


def validate(config):
    """Raises ConfigError for values that no run could use, before anything is read."""
    for name in ("draws", "splits", "seed", "devices", "max_host_bytes", "max_device_bytes", "stall_timeout"):
        least = 1 if name in ("draws", "splits") else 0
        if getattr(config, name) < least:
            raise errors.ConfigError(f"{name}={getattr(config, name)}: must be at least {least}")
    for name, known in (("precision", ("auto", "float32", "float64")), ("preflight", ("stream", "full"))):
        errors.require_known(name, getattr(config, name), known)
    if config.seed >= 2**63:
        raise errors.ConfigError(f"seed={config.seed}: must be below 2**63")
    if config.base and (config.view == "lora_factors" or config.match == "order"):
        raise errors.ConfigError("base is subtracted by exact layer names from weights: not with lora_factors or order")
    if not 0 < config.lineage_threshold < 1:
        raise errors.ConfigError(f"lineage_threshold={config.lineage_threshold}: must lie between 0 and 1")
    for name in config.nulls:
        plugins.load("nulls", name)
    if plugins.load("views", config.view).NEEDS_BASE and not config.base:
        raise errors.ConfigError(f"view={config.view}: needs --base=MODEL")


def analyze(opened, config, workdir=None, *, stream=None, started=None):
    """`run` on a Collection that is open already; `started` is the time.perf_counter() at which it began to be."""
    validate(config)
    from jaxsub import distributed
    from jaxsub.pipelines import seal, session as sessions, tracing, workdir as workdirs

    distributed.require_same("collection", opened.fingerprint)
    main = distributed.is_main()
    trace = None if config.dry_run else tracing.folder_of(config, workdir)  # refuses on all processes alike
    here = (workdir, stream) if main else (None, None)
    session = distributed.together(lambda: sessions.Session(opened, config, *here, started))
    if config.dry_run:
        return session.plan_text() if main else None
    if not main and workdir is not None:
        distributed.together(lambda: None)  # process 0 holds the workdir now
    if not main or workdir is None:
        return session.run()
    identity = workdirs.identity("analyze", config, opened, session.base, session.mesh)
    with contextlib.ExitStack() as stack:
        held = workdirs.hold(workdir, identity, restart=config.restart, break_lock=config.break_lock)
        distributed.together(lambda: stack.enter_context(held))
        with tracing.traced(trace):
            report = session.run()
        report.save(workdir)
        seal.write(workdir)
    return report
