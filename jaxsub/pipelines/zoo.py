"""`jaxsub zoo`: makes a collection whose truth is known, `workdir`/<world>/models, and says what the truth is.

<world>/models/...      the collection, one file or folder a model
<world>/labels.json     task, seed, start and accuracy of each model
<world>/zoo.json        world, seed, options and truth; written last: its presence means the world is whole
"""

import contextlib
import dataclasses
import json
import os
import secrets
import shutil

from jaxsub import config as configuration, errors, plugins
from jaxsub.report import _write

SCHEMA, RECORD, MODELS = "jaxsub.zoo/1", "zoo.json", "models"
UNFINISHED = ".tmp-zoo-"  # how folders of zoos that are being made begin


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the zoo program."""

    world: str = "same_start_same_task"  # name of a module of jaxsub.worlds
    seed: int = 0  # of everything that is drawn
    options: tuple[str, ...] = ()  # of the world, as name=value
    restart: bool = False  # replace the world that lies there


def worlds():
    """Name -> one sentence about it, for every world."""
    return {name: plugins.load("worlds", name).DESCRIPTION for name in plugins.available("worlds")}


def make(world, workdir, *, seed=0, restart=False, **overrides):
    """Makes one world; see `run`. Keyword arguments are the world's options."""
    options = tuple(f"{name}={value}" for name, value in overrides.items())
    return run(Config(world=world, seed=seed, options=options, restart=restart), workdir)


def run(config, workdir, progress=None):
    """Makes a world, or finds it made already.

    Args:
        config: Config.
        workdir: output folder, made if missing.
        progress: called with a line of text when a world is begun; None for silence.

    Returns:
        path of the collection, `workdir`/<world>/models.

    Raises:
        ConfigError: no such world or option.
        WorkdirError: another world, seed or choice of options lies there.
        ResourceError: it cannot be written.
    """
    module = plugins.load("worlds", config.world)
    options = parse_options(module.Options, config.options)
    if config.seed < 0:
        raise errors.ConfigError(f"seed={config.seed}: expected 0 or more")
    identity = {"schema": SCHEMA, "world": config.world, "seed": config.seed, "options": dataclasses.asdict(options)}
    target = os.path.join(os.fspath(workdir), config.world)
    models = os.path.join(target, MODELS)
    if not config.restart and _is_made(target, identity):
        return models
    if progress is not None:
        progress(f"{config.world}: {module.DESCRIPTION}")
    try:
        with _temporary_beside(target) as temporary:
            module.make(options, config.seed, temporary)
            record = {**identity, "num_models": len(os.listdir(os.path.join(temporary, MODELS)))}
            record |= {"description": module.DESCRIPTION, "truth": module.TRUTH}
            _write.write_json(os.path.join(temporary, RECORD), record)
            _install(temporary, target, restart=config.restart)
    except OSError as error:
        reason = error.strerror or str(error)
        raise errors.ResourceError(f"{errors.quote(target)}: cannot be written: {reason}") from error
    return models


def parse_options(cls, texts, whose="this world"):
    """The Options `cls` of a world, or of what `whose` names, from texts 'name=value'.

    Raises:
        ConfigError: not of that form, unknown, given twice, or of the wrong type.
    """
    known, values = configuration.fields(cls), {}
    for text in texts:
        name, found, value = text.partition("=")
        if not found:
            raise errors.ConfigError(f"options: name=value expected, {errors.quote(text, 60)!r} found")
        if name not in known:
            near = errors.nearest(name, known) or f" (there are: {', '.join(known) or 'none'})"
            raise errors.ConfigError(f"unknown option {errors.quote(name, 60)!r} of {whose}{near}")
        if name in values:
            raise errors.ConfigError(f"options: {name!r} is given twice")
        values[name] = configuration.parse(known[name], value)
    return configuration.freeze(cls, values)


def _is_made(target, identity):
    """Whether exactly this world lies at `target`; False if nothing does.

    Raises:
        WorkdirError: something else lies there.
    """
    if not os.path.lexists(target) or (os.path.isdir(target) and not os.listdir(target)):
        return False
    try:
        with open(os.path.join(target, RECORD), encoding="utf-8") as file:
            record = json.load(file)
        found = {key: record.get(key) for key in identity}
        whole = len(os.listdir(os.path.join(target, MODELS))) == record.get("num_models")
    except (OSError, ValueError, AttributeError):
        raise errors.WorkdirError(
            f"{errors.quote(target)}: is there but holds no whole world; use another --workdir, or --restart"
        ) from None
    was, now = _flat(found), _flat(identity)
    for key in sorted(was.keys() | now.keys()):
        if was.get(key) != now.get(key):
            shown = f"{errors.quote(key, 60)} was {errors.quote(was.get(key), 60)}, is {errors.quote(now.get(key), 60)}"
            raise errors.WorkdirError(
                f"{errors.quote(target)}: holds another world ({shown}); use another --workdir, or --restart"
            )
    if not whole:
        raise errors.WorkdirError(
            f"{errors.quote(target)}: models have been added or removed; use another --workdir, or --restart"
        )
    return True


def _flat(identity):
    """The identity with its options beside it, so that a difference names one option."""
    options = identity["options"] if isinstance(identity["options"], dict) else {}
    return {**options, **{key: value for key, value in identity.items() if key != "options"}}


@contextlib.contextmanager
def _temporary_beside(target):
    """An empty folder on the same file system as `target`, removed at the end if it is still there."""
    os.makedirs(os.path.dirname(target) or ".", exist_ok=True)
    temporary = os.path.join(os.path.dirname(target), f"{UNFINISHED}{secrets.token_hex(6)}")
    os.mkdir(temporary)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _install(temporary, target, *, restart):
    """Puts what was made where it belongs; on a restart only the world's own entries are replaced.

    Raises:
        WorkdirError: something appeared at `target` meanwhile.
    """
    try:
        os.rename(temporary, target)
        return
    except OSError:
        if not restart or not os.path.isdir(target):
            raise errors.WorkdirError(
                f"{errors.quote(target)}: is in use; use another --workdir, or --restart"
            ) from None
    made = sorted(os.listdir(temporary), key=lambda name: name == RECORD)  # the record last
    for name in [RECORD, *made]:
        path = os.path.join(target, name)
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        elif os.path.lexists(path):
            os.unlink(path)
    for name in made:
        os.rename(os.path.join(temporary, name), os.path.join(target, name))
