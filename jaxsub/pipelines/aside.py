"""Models set aside while their weights are read: how many may be, and going on without them."""

import json
import logging
import os

from jaxsub import bundle as bundles, collection, errors, lineup, reading
from jaxsub.formats import _files
from jaxsub.pipelines import workdir
from jaxsub.report import _write

RECORD = "set_aside.json"
log = logging.getLogger("jaxsub")


def open_collection(config, **options):
    """The Collection that a program's config names, with as many models set aside as it allows."""
    return collection.open_collection(
        list(config.collection),
        allow_roots=config.allow_roots,
        max_quarantined=None if config.max_quarantined < 0 else config.max_quarantined,
        strict=config.strict,
        **options,
    )


def sharing(opened, bundle, config):
    """The collection without the models that have no layer of a bundle, which are set aside by name.

    Raises:
        ConfigError: none has one.
        InputError: too many had to be set aside.
    """
    pairs = bundle.pairs(opened)
    if not pairs:
        raise errors.ConfigError(bundles.NOTHING_SHARED)
    having = {member for group, _ in pairs for member in group.members}
    for position, (ref, model) in enumerate(zip(opened.refs, opened.models, strict=True)):
        if position not in having:
            reason = "has no layer of the bundle (by name, shape and kind)"
            error = errors.InputError(model.path, reason, hint="leave it out, or fit it with models like it", rule="N2")
            opened = without(opened, ref.id, error, config, least=1)
    return opened


def without(opened, identifier, error, config, least=lineup.SMALLEST_GROUP):
    """The collection without a model, which is set aside because of the InputError `error`; `least` that are needed.

    Raises:
        InputError: too many had to be set aside.
    """
    opened = opened.without([identifier], {identifier: error.message()})
    total = len(opened.refs) + len(opened.quarantined)
    require_few(error, len(opened.quarantined), total, len(opened.refs), config, least)
    return opened


def require_few(error, aside, total, left, config, least=lineup.SMALLEST_GROUP):
    """Raises InputError where `aside` of `total` models are too many for `config`, or fewer than `least` are `left`.

    Args:
        error: NonFiniteError of the last one.
        aside, total, left: numbers of models.
        config: with `strict` and `max_quarantined`.
        least: models that the run needs.
    """
    limit = config.max_quarantined if config.max_quarantined >= 0 else max(1, total // 20)
    if config.strict or aside > limit or left < least:
        others = " (`jaxsub inspect` lists those that cannot be read)" if aside > 1 else ""
        hint = f"remove them{others}, or allow more with --max_quarantined={aside}"
        raise errors.InputError(
            error.file,
            f"{aside} of {total} models set aside, the last because it {error.reason}",
            key=error.key,
            hint=hint if left >= least else "too few are left",
            rule="N2",
        )


def keep(folder, dropped, opened, config):
    """Writes down which models turned out to be faulty: the next run in the folder need not find them again.

    Args:
        folder: of the statistics; None writes nothing.
        dropped: [{"id", "member", "layer", "reason"}], `member` a position in the Collection `opened`.
        opened: Collection.
        config: the program's; with other options other layers might be read.
    """
    if folder is not None:
        _files.make_folder(folder)
        found = [{**d, "digest": collection.digest(opened.models[d["member"]])} for d in dropped]
        _write.write_sealed(os.path.join(folder, RECORD), {"options": workdir.options(config), "models": found})


def kept(folder, opened, config):
    """What `keep` wrote with the same options of those models that are still as they were, as it was given."""
    try:
        record = _write.read_sealed(os.path.join(folder or "", RECORD))
        position, dropped = {ref.id: i for i, ref in enumerate(opened.refs)}, []
        is_same = folder is not None and record["options"] == json.loads(json.dumps(workdir.options(config)))
        for one in record["models"] if is_same else ():
            member, wanted = position.get(one["id"]), one.pop("digest")
            if member is not None and collection.digest(opened.models[member]) == wanted:
                dropped.append({**one, "member": member})
    except (OSError, ValueError, KeyError, TypeError):  # none, or damaged: they are found again
        return []
    for one in dropped:
        log.warning("set aside %s: %s", errors.quote(one["id"]), one["reason"])
    return dropped


def error_of(one, opened):
    """An InputError of a model that `kept` gave."""
    return errors.InputError(opened.models[one["member"]].path, "holds NaN or Inf", key=one["layer"])


def going_on(work, opened, config, least=lineup.SMALLEST_GROUP):
    """work(opened), begun again without each model that turns out to hold NaN or Inf.

    Raises:
        InputError: too many had to be set aside.
    """
    while True:
        try:
            return work(opened)
        except reading.NonFiniteError as error:
            pairs = zip(opened.refs, opened.models, strict=True)
            name = next(ref.id for ref, model in pairs if model.path == error.file)
            log.warning("set aside %s: %s", errors.quote(name), error.message())
            opened = without(opened, name, error, config, least)


def listed(records):
    """One line a model set aside, for the terminal; `records` as in `Collection.quarantined`."""
    return "".join(f"set aside {errors.quote(r['id'])}: {r['reason']}\n" for r in records)
