"""Fitted layers of a run of several processes: each fits whole layers of its own, and they meet in the parts.

    headers -> deal -> every process: its layers into parts, on its own devices -> meet -> process 0: all parts

Nothing is exchanged within a layer, so a layer has the bits that one process gives it.
"""

import contextlib
import os
import secrets

import jax

from jaxsub import distributed, errors, reading
from jaxsub.pipelines import fit_plan, parts, tracing


class Parts(parts.Parts):
    """The parts in a folder that all processes see."""

    def own(self, groups):
        """The groups that are dealt to this process."""
        owners = fit_plan.deal(groups, jax.process_count())
        return [g for g, owner in zip(groups, owners, strict=True) if owner == jax.process_index()]

    def fit_all(self, groups, ranks, opened, done):
        """The Layers of all groups on process 0, () on the others; `done` is told of the own ones.

        Raises:
            JaxsubError: on all processes, of the first of `groups` that fails; as one process would find it.
        """
        owners, notes, failure, at = fit_plan.deal(groups, jax.process_count()), distributed.Notes(), None, 0
        with distributed.Watchdog(self.config.stall_timeout) as watchdog:
            for index, (group, rank) in enumerate(zip(groups, ranks, strict=True)):
                if owners[index] != jax.process_index():
                    continue
                if min(notes.read(), default=index) < index:  # an earlier one has failed: this would be for nothing
                    break
                try:
                    with tracing.stage(group.name):
                        _, is_known = self.fit(group, opened, rank)
                except errors.JaxsubError as error:
                    failure, at = error, index
                    notes.leave(index)
                    break
                done(group, is_known)
                watchdog.step()
        distributed.meet()
        _raise_first(failure, at)
        pairs = list(zip(groups, ranks, strict=True)) if distributed.is_main() else []
        return distributed.together(lambda: tuple(self._finished(g, opened, r) for g, r in pairs), is_long=True)

    def require_shared(self):
        """Refuses a folder that not all processes see and write.

        Raises:
            ConfigError: naming a process.
        """
        own, count = jax.process_index(), jax.process_count()
        name = distributed.gather_objects(f".seen-{secrets.token_hex(8)}")[0]
        marks = [os.path.join(self.folder, f"{name}-{process}") for process in range(count)]

        def mark():
            if own == 0:
                os.makedirs(self.folder, exist_ok=True)
            elif not os.path.exists(marks[0]):
                raise _unseen(own, 0, self.folder)
            with open(marks[own], "xb"):
                pass

        def look():
            missing = [process for process in range(count) if own == 0 and not os.path.exists(marks[process])]
            if missing:
                raise _unseen(0, missing[0], self.folder)

        try:
            distributed.together(lambda: _written(mark) if own == 0 else None)
            distributed.together(lambda: _written(mark) if own > 0 else None)
            distributed.together(look)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(marks[own])

    def _finished(self, group, opened, rank):
        """The Layer that its process has finished."""
        found = self._kept(self._digest(group, opened, rank))
        if found is None:
            raise errors.WorkdirError(
                f"{errors.quote(self.folder)}: layer {errors.quote(group.name)} was finished by another process, "
                "and is not whole here; the same command goes on with what is"
            )
        return found


def _unseen(process, writer, folder):
    return errors.ConfigError(
        f"process {process} does not see what process {writer} wrote in {errors.quote(folder)}: several processes need "
        "a --workdir on a file system that all of them see"
    )


def _written(call):
    try:
        call()
    except OSError as error:
        place = errors.quote(error.filename or "workdir")
        raise errors.WorkdirError(f"{place}: cannot be written: {error.strerror}") from error


def _raise_first(failure, at):
    """Raises on all processes what failed in the first layer; `failure` a JaxsubError of layer `at` here, or None."""
    said = None
    if failure is not None:
        is_bad = isinstance(failure, reading.NonFiniteError)
        said = {"layer": at, "text": str(failure), "exit_code": failure.exit_code, "bad": None}
        said["bad"] = [failure.member, failure.file, failure.key, *failure.found[1:]] if is_bad else None
    every = distributed.gather_objects(said)
    faults = [one for one in every if one is not None]
    if not faults:
        return
    first = min(faults, key=lambda one: one["layer"])
    if failure is not None and first["layer"] == at:
        raise failure
    if first["bad"]:  # the model is set aside by all
        raise reading.NonFiniteError(*first["bad"])
    raise errors.PeerError(f"process {every.index(first)} of {len(every)}: {first['text']}", first["exit_code"])
