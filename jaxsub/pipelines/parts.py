"""Fitted layers of a run that is not finished: each a bundle of one layer, in a folder named by what it depends on."""

import hashlib
import json
import logging
import os
import shutil

from jaxsub import bundle, errors
from jaxsub.bundle import files
from jaxsub.formats import _files
from jaxsub.pipelines import fit_layer, tracing, workdir as workdirs

log = logging.getLogger("jaxsub")
WHOLE_RUN = ("collection", "layers", "exclude_layers", "allow_roots", "budget_bytes")  # options of no layer by itself


class Parts:
    """The parts in a folder; without one, every layer is fitted and nothing is written."""

    def __init__(self, folder, config):
        self.folder, self.config = folder, config

    def require_shared(self):
        """Refuses a folder that not all processes see; there is one."""

    def own(self, groups):
        """The groups that this process fits: all of them."""
        return groups

    def fit_all(self, groups, ranks, opened, done):
        """(bundle.Layer, ...) of groups at their ranks; done(group, whether it was kept from before) after each."""
        found = []
        for group, rank in zip(groups, ranks, strict=True):
            with tracing.stage(group.name):
                layer, is_known = self.fit(group, opened, rank)
            found.append(layer)
            done(group, is_known)
        return tuple(found)

    def fit(self, group, opened, rank):
        """(bundle.Layer, whether it was kept from before) of a group at a rank as `fit_layer.fit` takes it."""
        if self.folder is None:
            return fit_layer.fit(group, opened, self.config, rank), False
        digest = self._digest(group, opened, rank)
        known = self._kept(digest)
        if known is not None:
            return known, True
        layer = fit_layer.fit(group, opened, self.config, rank)
        ids = layer.model_ids
        bundle.Bundle(ids, (layer,), {}, dict.fromkeys(ids, 1), {"digest": digest}).save(
            os.path.join(self.folder, digest)
        )
        return layer, False

    def remove(self):
        """Removes all parts."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _kept(self, digest):
        return _load(os.path.join(self.folder, digest), digest)

    def _digest(self, group, opened, rank):
        from jaxsub import __version__

        pairs = zip(group.members, group.entries, strict=True)
        options = {k: v for k, v in workdirs.options(self.config).items() if k not in WHOLE_RUN}
        options |= workdirs.machine()
        options["max_host_bytes"] = self.config.max_host_bytes  # how a layer is read, and so its last bits
        record = [
            __version__, group.name, group.shape, group.parametrisation, [opened.refs[m].id for m in group.members],
            [workdirs.identity_of(e, opened.models[m]) for m, e in pairs], options, rank,
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(record, default=str).encode()).hexdigest()[:32]


def _load(path, digest):
    """The Layer of a part, or None where there is none, or one that is not as it was written."""
    if not os.path.lexists(path):
        return None
    try:
        found = files.load(path) if not files.verify(path) else None
    except errors.InputError:
        found = None
    if found is not None and found.provenance.get("digest") == digest and len(found.layers) == 1:
        return found.layers[0]
    log.warning("fitted again, since it is damaged: %s", errors.quote(path))
    _files.remove(path)
    return None


def commit(result, path):
    """Saves a Bundle at `path`; one that is there stays until the new one is whole."""
    if not os.path.lexists(path):
        result.save(path)
        return
    fresh, old = (_files.temporary_in(os.path.dirname(path)) for _ in range(2))
    result.save(fresh)
    os.rename(path, old)
    try:
        os.rename(fresh, path)
    except OSError:
        os.rename(old, path)
        raise
    _files.sync_folder(os.path.dirname(path))
    shutil.rmtree(old, ignore_errors=True)  # it is out of the way; the next run removes what is left of it
