"""The output folder: one run at a time, atomic files, a record of whose it is."""

import contextlib
import dataclasses
import fcntl
import fnmatch
import json
import os
import secrets
import socket
import time

from jaxsub import collection, config as configs, errors
from jaxsub.formats import _files
from jaxsub.pipelines import hooks
from jaxsub.report import _write

LOCK, RECORD = ".jaxsub.lock", "run.json"
OWN_FOLDERS = ("", "statistics", "parts")  # in which runs write, and may leave a write unfinished
NO_LINKS = ("statistics", "parts", "bundle", "profile")  # through one a run would write outside of its workdir
HOLDER = ("host", "pid", "run", "started")
# Options that say whether a run goes on and where, not what it finds: its own advice may change them.
NEUTRAL = {
    "restart": False, "break_lock": False, "dry_run": False, "max_host_bytes": 0, "strict": False,
    "max_quarantined": -1, "coordinator": "", "num_processes": 0, "process_id": -1, "stall_timeout": 0,
    "profile": False, "max_device_bytes": 0,
}  # fmt: skip
HOOKS = ("task", "model", "loss", "score", "calibrate", "calibrate_model")  # may name code of the user's own
MOST_SHOWN = 3  # differences in one message


def options(config):
    """The options of a Config that decide what a run finds, as JSON holds them."""
    own = {f.name for f in dataclasses.fields(config)}
    found = configs.to_dict(dataclasses.replace(config, **{k: v for k, v in NEUTRAL.items() if k in own}))
    code = {name: found[name] for name in HOOKS if ":" in (found.get(name) or "")}
    return found | {f"{name} (code)": hooks.digest(name, spec) for name, spec in code.items()}


def machine():
    """What the last bits of a result hang on beside inputs and options: versions, device, random numbers."""
    import jax
    import jaxlib
    import numpy

    device = jax.devices()[0]
    return {
        "version.jax": jax.__version__,
        "version.jaxlib": jaxlib.__version__,
        "version.numpy": numpy.__version__,
        "platform": device.platform,
        "device_kind": device.device_kind,
        "random_numbers": f"{jax.config.jax_default_prng_impl}, partitionable {jax.config.jax_threefry_partitionable}",
    }


def identity(program, config, opened, base=None, mesh=None):
    """What a run is: its program, version, options, and its models' files as they are.

    Args:
        program: name.
        config: the program's Config.
        opened: Collection.
        base: Model that is subtracted, or None.
        mesh: devices whose number shows in the last bits, or None where it does not.
    """
    import jax

    from jaxsub import __version__

    models = {ref.id: collection.digest(model) for ref, model in zip(opened.refs, opened.models, strict=True)}
    return {
        "program": program,
        "jaxsub_version": __version__,
        **machine(),
        **({} if mesh is None else {"devices": mesh.size, "processes": jax.process_count()}),
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
def hold(path, identity, *, restart=False, break_lock=False, flag="--workdir"):
    """Makes `path` if missing and holds it for this run; what killed runs left half-written in it is removed.

    The system's lock on a file in it ends with the process, however that ends. The file says who holds it: that stays
    there after a kill, and is all that is known of a run on another host, whose lock may not be seen from here.

    Args:
        path: folder.
        identity: dict of what the run is, with its "program"; another run of the program found there is refused,
            naming the difference.
        restart: start over whatever is there; layers whose digests still match are used again.
        break_lock: hold it although a run on another host did not say that it ended.
        flag: that names the folder, for messages.

    Raises:
        WorkdirError: another process holds it, or it belongs to a different run.
        ResourceError: it cannot be written.
    """
    _files.make_folder(path)
    with _locked(path, break_lock):
        for folder in NO_LINKS:
            if os.path.islink(os.path.join(path, folder)):
                raise errors.WorkdirError(
                    f"{errors.quote(os.path.join(path, folder))}: is a link, and a run writes in its own folder only; "
                    "remove it"
                )
        record, program = os.path.join(path, RECORD), identity.get("program", "")
        known = _known(path, record, restart)
        if program in known and not restart:
            _require_same(path, known[program], json.loads(json.dumps(identity)), flag)
        for folder in OWN_FOLDERS:
            _files.sweep(os.path.join(path, folder))
        _write.write_sealed(record, known | {program: identity})
        try:
            yield
        except errors.JaxsubError as error:
            if error.exit_code in (errors.ConfigError.exit_code, errors.WorkdirError.exit_code):  # of a peer, too
                known.pop(program, None)  # no run came of these options: the next ones may differ
                _write.write_sealed(record, known)
            raise


def require_outside(path, collection, flag="--workdir"):
    """Raises ConfigError where an output folder would lie in the collection: the next run would take it for a model.

    Args:
        path: the folder, or None.
        collection: folders, globs and files as the user gave them.
        flag: that names the folder, for messages.
    """
    place = os.path.realpath(path) if path else ""
    for text in collection if path else ():
        folder = os.path.realpath(text)
        inside = os.path.isdir(folder) and os.path.commonpath([folder, place]) == folder
        if inside or fnmatch.fnmatchcase(os.path.abspath(path), os.path.abspath(text)):
            raise errors.ConfigError(
                f"{errors.quote(path)} lies in, or is, the collection {errors.quote(text)}, and would be one of its "
                f"models next time; give {flag} elsewhere"
            )


def require_free(path):
    """Refuses a workdir that another run on this machine holds, before anything is read; `hold` alone is safe.

    Raises:
        WorkdirError: naming the holder.
    """
    try:
        fd = os.open(os.path.join(path, LOCK), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:  # none yet, or `hold` says what is wrong with it
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _in_use(path, fd) from None
    except OSError:
        return
    finally:
        os.close(fd)


def _in_use(path, fd):
    return errors.WorkdirError(f"{errors.quote(path)}: in use by another run ({_living(fd)})")


@contextlib.contextmanager
def _locked(path, break_lock):
    """Holds the lock of a folder and says in its file who does."""
    try:
        fd = os.open(os.path.join(path, LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno in _files.DISK:
            raise _files.failed(path, error) from error
        raise errors.WorkdirError(f"{errors.quote(path)}: cannot be used as workdir: {error.strerror}") from error
    try:
        try:
            _take(fd)
        except BlockingIOError:
            raise _in_use(path, fd) from None
        except OSError as error:  # a file system without locks
            raise errors.WorkdirError(f"{errors.quote(path)}: cannot be locked: {error.strerror}") from error
        left = _holder(fd)
        if left.get("host") not in (None, socket.gethostname()) and not break_lock:
            raise errors.WorkdirError(
                f"{errors.quote(path)}: in use by a run on another host, or it was killed there ({_text(left)}); if it "
                "has ended, --break_lock takes the folder over"
            )
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        values = (socket.gethostname(), os.getpid(), secrets.token_hex(4), now)
        said = json.dumps(dict(zip(HOLDER, values, strict=True))).encode()
        try:
            os.ftruncate(fd, 0)
            os.pwrite(fd, said, 0)
        except OSError as error:
            raise _files.failed(path, error, len(said)) from error
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                os.ftruncate(fd, 0)
    finally:
        os.close(fd)


def _take(fd):
    """Locks a file; another run may be asking whether it is locked, which takes no time."""
    for left in reversed(range(5)):
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not left:
                raise
            time.sleep(0.02)


def _holder(fd):
    """What a lock file says of its holder; nothing if that is not to be read."""
    try:
        found = json.loads(os.pread(fd, 1000, 0))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _living(fd):
    """Text on the holder of a lock that is held; it may not have written yet who it is."""
    for _ in range(50):
        found = _holder(fd)
        is_here = found.get("host") == socket.gethostname()
        if found and not (is_here and isinstance(found.get("pid"), int) and not _files.is_alive(found["pid"])):
            break
        time.sleep(0.02)
    return _text(found)


def _text(holder):
    return errors.quote(", ".join(f"{name} {holder.get(name, 'unknown')}" for name in HOLDER))


def is_whole(path):
    """Whether the record of runs in a workdir is as it was written."""
    try:
        return isinstance(_write.read_sealed(os.path.join(path, RECORD)), dict)
    except (OSError, ValueError):
        return False


def _known(path, record, restart):
    """Program -> identity of its last run in a workdir."""
    if not os.path.exists(record):
        return {}
    try:
        found = _write.read_sealed(record)
    except (OSError, ValueError):
        found = None
    if isinstance(found, dict) and all(isinstance(one, dict) for one in found.values()):
        return found
    if restart:
        return {}
    raise errors.WorkdirError(f"{errors.quote(path)}: its {RECORD} is damaged; use another --workdir, or --restart")


def _require_same(path, found, wanted, flag):
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
            f"{flag}, or --restart (what still fits is used again)"
        )


def _models(found, wanted):
    said = []
    for name in sorted({*found, *wanted}):
        what = "is new" if name not in found else "is gone" if name not in wanted else "changed"
        if found.get(name) != wanted.get(name):
            said.append(f"model {errors.quote(name, 60)} {what}")
    return said
