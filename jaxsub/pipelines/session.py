"""One analysis: the collection as it shrinks, the statistics as they grow, the record that becomes the report."""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import os
import time
from concurrent import futures

from jaxsub import errors, hostmemory, plugins, solvers
from jaxsub.pipelines import plan, provenance

MAX_NEAR_COPIES = 1000
log = logging.getLogger("jaxsub")


class Session:
    """One analysis; see `analyze.analyze`."""

    def __init__(self, opened, config, workdir, stream, started=None):
        import jax

        from jaxsub import formats, placement
        from jaxsub.pipelines import layers

        self.opened, self.config, self.workdir, self.stream = opened, config, workdir, stream
        self.folder = None if workdir is None else os.path.join(workdir, "statistics")
        self.started, self.meter = started or time.perf_counter(), layers.Meter()
        self.mesh = placement.make_mesh(config.devices)
        view = "difference" if config.base and config.view == "weights" else config.view
        self.view = plugins.load("views", view)
        self.base = formats.open_model(config.base, allow_roots=config.allow_roots) if config.base else None
        self.dropped = []  # models found not finite while reading
        self.copies = []
        # A block is shared by the processes: each reads as much of it as one would alone.
        self.options = layers.Options(precision=config.precision, seed=config.seed)
        whole = self.options.block_bytes * jax.process_count()
        self.options = dataclasses.replace(self.options, block_bytes=whole)
        self.bounds = config.max_host_bytes, config.max_device_bytes or plan.device_limit(self.mesh)
        while plan.exceeds(self.plans(), *self.bounds) and self.options.block_bytes > 2**12:
            self.options = dataclasses.replace(self.options, block_bytes=self.options.block_bytes // 2)
        self.ahead = layers.Ahead(self.mesh, self.options, self.base)

    # Models ---------------------------------------------------------------------------------------------------

    def groups(self):
        """Layer groups of the distinct models that are still in."""
        out = {m for c in self.copies for m in c[1:]} | {d["member"] for d in self.dropped}
        found = []
        for group in self.view.groups(self.opened):
            keep = [i for i, m in enumerate(group.members) if m not in out]
            if len(keep) >= 3:  # below that a layer is skipped, as one that few models have
                members, entries = (tuple(x[i] for i in keep) for x in (group.members, group.entries))
                found.append(dataclasses.replace(group, members=members, entries=entries))
        return found

    def skipped(self):
        """Layers of the view that fewer than three distinct readable models have."""
        from jaxsub import lineup

        kept = {_key(g) for g in self.groups()}
        reasons = {True: lineup.TOO_FEW, False: "fewer than 3 distinct models that can be read have it"}
        return [
            {
                "name": g.name,
                "shape": list(g.shape),
                "num_models": len(g.members),
                "reason": reasons[len(g.members) < lineup.SMALLEST_GROUP],
            }
            for g in self.view.groups(self.opened)
            if _key(g) not in kept
        ]

    def drop(self, error, group):
        """Sets a model aside whose weights are not finite; too many stop the run."""
        from jaxsub.pipelines import aside

        member = group.members[error.member]
        alike = next((c for c in self.copies if member in c), [member])  # its copies hold the same numbers
        self.copies = [c for c in self.copies if member not in c]
        for one in alike:
            ref = self.opened.refs[one]
            self.dropped.append({"id": ref.id, "member": one, "layer": error.key, "reason": error.message()})
            log.warning("set aside %s: %s", errors.quote(ref.id), error.message())
        aside.keep(self.folder, self.dropped, self.opened, self.config)
        self._require_few(error)

    def _require_few(self, error):
        from jaxsub.pipelines import aside

        total = len(self.opened.refs) + len(self.opened.quarantined)
        count = len(self.opened.quarantined) + len(self.dropped)
        aside.require_few(error, count, total, len(self.opened.refs) - len(self.dropped), self.config)

    # The pass -------------------------------------------------------------------------------------------------

    def run(self):
        """The Report; None but on process 0."""
        # BLAS threads spin against XLA's and the readers': an eigenproblem of 121 models took 8 ms instead of 0.6.
        # Layers, not their small matrices, are what is worked on in parallel.
        with hostmemory.one_blas_thread():
            return self._run_pass()

    def _run_pass(self):
        from jaxsub import distributed
        from jaxsub.pipelines import aside, copies, progress, tracing
        from jaxsub.report import Report

        solvers.retries()  # of a run before this one
        if self.stream is not None:
            self.stream.write(self.plan_text(most=plan.LISTED) + "\n")
        distributed.together(lambda: plan.require_memory(self.plans(), *self.bounds))
        distributed.together(self._require_disk)
        # Process 0 alone sees the workdir.
        self.dropped = distributed.gather_objects(aside.kept(self.folder, self.opened, self.config))[0]
        if self.dropped:
            self._require_few(aside.error_of(self.dropped[-1], self.opened))
        begun = time.perf_counter()
        self.meter.open_seconds += begun - self.started
        with tracing.stage("copies"):
            self.copies = distributed.together(lambda: copies.find(self.groups(), self.opened.models, self.meter))
        if self.config.preflight == "full":
            self._preflight()
        self.meter.read_seconds += time.perf_counter() - begun
        groups = self.groups()
        total = sum(g.num_bytes for g in groups)
        self.ahead.past_cache = plan.outgrows_cache(total)
        found = {}
        watchdog = distributed.Watchdog(self.config.stall_timeout)
        with contextlib.closing(self.ahead), progress.Progress(total, len(groups), stream=self.stream) as bar, watchdog:
            for group, following in itertools.pairwise([*groups, None]):
                before = self.meter.bytes_read
                self.ahead.following = functools.partial(self._begin, following)
                with tracing.stage(group.name):
                    found[_key(group)] = self.layer(group)
                watchdog.step()
                read = self.meter.bytes_read - before
                text = f"N={len(group.members)}{'' if read else ' as saved'}"
                bar.layer(group.name, group.num_bytes, text, read=read)
        self.ahead.following = None
        # A model that dropped out late is still in the layers before: those are read again without it.
        groups = self.groups()
        found = {_key(g): found.get(_key(g)) for g in groups}
        for group in groups:
            known = found[_key(group)]
            if known is None or known.model_ids != self._ids(group):
                found[_key(group)] = self.layer(group)
        if not distributed.is_main():
            return None
        return Report(self._record([s for s in found.values() if s is not None]))

    def _require_disk(self):
        from jaxsub.pipelines import memory

        if self.folder is not None:
            saved = plan.bytes_in(self.folder)  # by a run before this one, as far as it still fits
            plan.require_disk(self.workdir, sum(memory.written(self.plans(), len(self.opened.refs))) - saved)

    def _preflight(self):
        from jaxsub import collection, formats, reading

        for group in self.groups():
            for position, (member, entry) in enumerate(zip(group.members, group.entries, strict=True)):
                if any(d["member"] == member for d in self.dropped):
                    continue
                model = self.opened.models[member]
                try:
                    for tensor in collection.stored_tensors(entry):
                        reading.require_finite(formats.read(model, tensor), position, model, tensor)
                        self.meter.bytes_read += tensor.num_bytes
                except reading.NonFiniteError as error:
                    self.drop(error, group)

    def _ids(self, group):
        return tuple(self.opened.refs[m].id for m in group.members)

    def _without_dropped(self, group):
        """(group of the models not set aside, [(id, Model)]); None where too few are left."""
        out = {d["member"] for d in self.dropped}
        keep = [i for i, m in enumerate(group.members) if m not in out]
        members, entries = (tuple(x[i] for i in keep) for x in (group.members, group.entries))
        models = [(self.opened.refs[m].id, self.opened.models[m]) for m in members]
        group = dataclasses.replace(group, members=members, entries=entries)
        return (group, models) if len(members) >= 3 else None

    def _begin(self, group):
        """Starts to read the layer that comes next, if there is one."""
        left = group and self._without_dropped(group)
        if left:
            self.ahead.begin(*left)

    def layer(self, group):
        """Statistics of one layer: from the workdir if they are there, else read, dropping models not finite."""
        from jaxsub import distributed, reading
        from jaxsub.pipelines import layers

        while True:
            left = self._without_dropped(group)
            if left is None:
                return None
            group, models = left
            path, digest = self.saved_at(group)
            known = _load(path, digest)
            if distributed.gather_objects(known is not None)[0]:  # process 0 alone sees the workdir
                return known or layers.Statistics.empty(group.name, group.shape, "", self._ids(group), "", "")
            begun, meter = time.perf_counter(), self.meter
            counted = meter.read_seconds + meter.compute_seconds
            try:
                with solvers.of_layer(group.name):
                    stats = layers.statistics(group, models, self.mesh, self.options, ahead=self.ahead, meter=meter)
                    if not solvers.is_finite(stats.gram):
                        raise errors.SolverError("sums of products that are not finite")
            except reading.NonFiniteError as error:
                self.drop(error, group)
                continue
            computed = time.perf_counter()
            # What the loop over blocks did not see: spectra of weight axes, compiling.
            meter.compute_seconds += computed - begun - (meter.read_seconds + meter.compute_seconds - counted)
            stats.digest = digest
            distributed.together(lambda found=stats, place=path: _save(found, place))
            meter.write_seconds += time.perf_counter() - computed
            return stats

    def saved_at(self, group):
        """(path, digest) of a layer's statistics file; names come from a hash, never from a key."""
        from jaxsub import __version__
        from jaxsub.pipelines.workdir import identity_of, machine

        files = [identity_of(e, self.opened.models[m]) for m, e in zip(group.members, group.entries, strict=True)]
        base = (
            [self.base.path] + [identity_of(t, self.base) for n, t in self.base.tensors.items() if n == group.name]
            if self.base
            else []
        )
        record = [
            __version__, group.name, group.shape, self._ids(group), files, base, self.view.__name__,
            dataclasses.astuple(self.options), self.mesh.size, machine(),
        ]  # fmt: skip
        digest = hashlib.sha256(json.dumps(record, default=str).encode()).hexdigest()
        if self.folder is None:
            return None, digest
        name = hashlib.sha256(
            f"{group.name}\0{group.shape}\0{group.parametrisation}".encode("utf-8", "surrogatepass")
        ).hexdigest()[:16]
        return os.path.join(self.folder, f"layer_{name}.safetensors"), digest

    def plans(self):
        """LayerPlans of `groups`."""
        return plan.of(self.groups(), self.mesh, self.options, self.base)

    def plan_text(self, most=None):
        """The plan for people, `most` of its layers, with an estimate of the time; reads no weight whole."""
        from jaxsub.pipelines import estimate

        plans, groups, config = self.plans(), self.groups(), self.config
        drawn = {"nulls": config.nulls, "draws": config.draws}
        time = estimate.of(plans, groups, self.opened.models, self.mesh, self.options, **drawn)
        return plan.text(plans, len(self.opened.refs), self.mesh, time, workdir=self.workdir, most=most)

    # The report -----------------------------------------------------------------------------------------------

    def _record(self, all_stats):
        from jaxsub.pipelines import figures, kinship, tracing

        begun = time.perf_counter()
        kin = kinship.find(all_stats, [r.id for r in self.opened.refs], self.config.lineage_threshold)
        options = figures.Options(self.config.nulls, self.config.draws, self.config.splits, self.config.seed)

        def one(stats):
            position = {m: i for i, m in enumerate(stats.model_ids)}
            lineages = [[position[m] for m in g if m in position] for g in kin.lineages]
            with tracing.stage(f"figures of {stats.name}"), solvers.of_layer(stats.name):
                lineages, is_own = kinship.of_layer(stats, lineages, self.config.lineage_threshold)
                return figures.layer(stats, lineages, options, is_own)

        with futures.ThreadPoolExecutor(figures.threads(max((s.num_models for s in all_stats), default=1))) as pool:
            records = list(pool.map(one, all_stats))
        self.meter.figure_seconds += time.perf_counter() - begun
        duplicates = [[self.opened.refs[m].id for m in c] for c in self.copies]
        return {
            "schema": "jaxsub.report/1",
            "provenance": provenance.record(self.config, self.opened.fingerprint, self.mesh, self.meter, self.started),
            "collection": self._collection_record(kin, duplicates, records),
            "layers": records,
        }

    def _collection_record(self, kin, duplicates, records):
        opened = self.opened
        out = {d["member"] for d in self.dropped}
        refs = [r for i, r in enumerate(opened.refs) if i not in out]
        warnings = list(opened.warnings) + kin.warnings + solvers.retries()
        if duplicates:
            extra = sum(len(d) - 1 for d in duplicates)
            warnings.append(f"bit-identical copies of other models, left out of every figure: {extra}")
        for record in records:
            warnings += [f"{errors.quote(record['name'])}: {w}" for w in record["warnings"][:2]]
        return {
            "name": opened.name,
            "num_models": len(refs),
            "num_distinct": len(refs) - sum(len(d) - 1 for d in duplicates),
            "models": [{"id": r.id, "path": r.path, "format": r.format} for r in refs],
            "duplicates": duplicates,
            "near_duplicates": [[a, b, c] for a, b, c in kin.near_copies[:MAX_NEAR_COPIES]],
            "lineages": kin.lineages,
            "lineage_threshold": kin.threshold,
            "lineage_threshold_chance": kin.chance,
            "lora_starts": kin.lora_starts,
            "untrained": kin.untrained,
            "identical_layers": [r["name"] for r in records if "identical" in r["flags"]],
            "cosine": kin.picture,
            "quarantined": [dict(q) for q in opened.quarantined]
            + [{k: d[k] for k in ("id", "layer", "reason")} for d in self.dropped],
            "skipped_layers": [dict(s) for s in opened.skipped_layers] + self.skipped(),
            "warnings": warnings[:200],
        }


def _save(stats, path):
    from jaxsub.formats import _files

    if path:
        _files.make_folder(os.path.dirname(path))
        stats.save(path)


def _load(path, digest):
    from jaxsub.statistics import Statistics

    if not path or not os.path.exists(path):
        return None
    try:
        stats = Statistics.load(path)
    except errors.InputError as error:
        log.warning("statistics are read again: %s", error)
        return None
    return stats if stats.digest == digest else None


def _key(group):
    return group.name, group.shape, group.parametrisation
