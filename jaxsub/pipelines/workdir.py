"""The output folder: one run at a time, atomic files, a record of whose it is."""

import contextlib
import dataclasses
import fcntl
import json
import os
import socket

from jaxsub import collection, config as configs, errors
from jaxsub.formats import _files
from jaxsub.report import _write

LOCK, RECORD = ".jaxsub.lock", "run.json"
OWN_FOLDERS = ("", "statistics", "parts")  # in which runs write, and may leave a write unfinished
# Options that say whether a run goes on and where, not what it finds: its own advice may change them.
NEUTRAL = {
    "restart": False, "dry_run": False, "max_host_bytes": 0, "strict": False, "max_quarantined": -1, "coordinator": "",
    "num_processes": 0, "process_id": -1, "stall_timeout": 0, "profile": False, "max_device_bytes": 0,
}  # fmt: skip
MOST_SHOWN = 3  # differences in one message


def options(config):
    """The options of a Config that decide what a run finds, as JSON holds them."""
    own = {f.name for f in dataclasses.fields(config)}
    return configs.to_dict(dataclasses.replace(config, **{k: v for k, v in NEUTRAL.items() if k in own}))


def identity(program, config, opened, base=None):
    """What a run is: its program, version, options, and its models' files as they are.

    Args:
        program: name.
        config: the program's Config.
        opened: Collection.
        base: Model that is subtracted, or None.
    """
    from jaxsub import __version__

    models = {ref.id: collection.digest(model) for ref, model in zip(opened.refs, opened.models, strict=True)}
    return {
        "program": program,
        "jaxsub_version": __version__,
        **{f"config.{name}": value for name, value in options(config).items()},
        "base_digest": base and collection.digest(base),
        "models": models,
    }


def identity_of(entry, model):
    """What must be the same for a layer's result to be used again: the tensor, and its files as they were."""
    if hasattr(entry, "a"):
        return (identity_of(entry.a, model), identity_of(entry.b, model), entry.scale, entry.transposed, entry.shape)
    files = [(f.path, f.size, f.mtime_ns) for f in collection.files_of(entry, model)]
    return (entry.name, entry.dtype, files, -1 if entry.extent is None else entry.extent.offset)


@contextlib.contextmanager
def hold(path, identity, *, restart=False):
    """Makes `path` if missing and holds it for this run; what killed runs left half-written in it is removed.

    Args:
        path: folder.
        identity: dict of what the run is, with its "program"; another run of the program found there is refused,
            naming the difference.
        restart: start over whatever is there; layers whose digests still match are used again.

    Raises:
        WorkdirError: another process holds it, or it belongs to a different run.
    """
    try:
        os.makedirs(path, exist_ok=True)
        fd = os.open(os.path.join(path, LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise errors.WorkdirError(f"{errors.quote(path)}: cannot be used as workdir: {error.strerror}") from error
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = errors.quote(os.pread(fd, 200, 0).decode("utf-8", "replace").strip() or "unknown")
            raise errors.WorkdirError(f"{errors.quote(path)}: in use by another run ({holder})") from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"host {socket.gethostname()}, pid {os.getpid()}".encode(), 0)
        record, program = os.path.join(path, RECORD), identity.get("program", "")
        known = _known(path, record, restart)
        if program in known and not restart:
            _require_same(path, known[program], json.loads(json.dumps(identity)))
        for folder in OWN_FOLDERS:
            if not os.path.islink(os.path.join(path, folder)):
                _files.sweep(os.path.join(path, folder))
        _write.write_json(record, known | {program: identity})
        try:
            yield
        except errors.JaxsubError as error:
            if error.exit_code in (errors.ConfigError.exit_code, errors.WorkdirError.exit_code):  # of a peer, too
                known.pop(program, None)  # no run came of these options: the next ones may differ
                _write.write_json(record, known)
            raise
    finally:
        os.close(fd)


def _known(path, record, restart):
    """Program -> identity of its last run in a workdir."""
    if not os.path.exists(record):
        return {}
    try:
        with open(record, encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError):
        found = None
    if isinstance(found, dict) and all(isinstance(one, dict) for one in found.values()):
        return found
    if restart:
        return {}
    raise errors.WorkdirError(f"{errors.quote(path)}: its {RECORD} is damaged; use another --workdir, or --restart")


def _require_same(path, found, wanted):
    """Raises WorkdirError where two identities differ; names models, and options with both their values."""
    models, said = _models(found.pop("models", {}), wanted.pop("models", {})), []
    for key in sorted({*found, *wanted}):
        was, now = found.get(key), wanted.get(key)
        if key == "base_digest" and was and now and was != now:
            said.append("the base changed")
        elif was != now and key != "base_digest":  # one that came or went is an option already
            said.append(f"{key} was {errors.quote(was, 60)}, is {errors.quote(now, 60)}")
    said += models
    if said:
        more = f", and {len(said) - MOST_SHOWN} more" if len(said) > MOST_SHOWN else ""
        raise errors.WorkdirError(
            f"{errors.quote(path)}: belongs to a different run ({'; '.join(said[:MOST_SHOWN])}{more}); use another "
            "--workdir, or --restart (layers that still fit are used again)"
        )


def _models(found, wanted):
    said = []
    for name in sorted({*found, *wanted}):
        what = "is new" if name not in found else "is gone" if name not in wanted else "changed"
        if found.get(name) != wanted.get(name):
            said.append(f"model {errors.quote(name, 60)} {what}")
    return said
