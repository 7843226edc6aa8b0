"""Members of a bundle of low-rank updates as adapter folders for other programs; the originals are not needed.

Layouts: "portable", LoRA of one rank and a scale of 1, what PEFT and servers load (`formats._portable`).
"""

import contextlib
import os
import secrets
import shutil

import numpy as np

from jaxsub import errors
from jaxsub.formats import _rewrite, peft

LAYOUTS = ("portable",)


def write(bundle, path, model_ids=None, layout="portable"):
    """See `Bundle.export`."""
    errors.require_known("layout", layout, LAYOUTS)
    ids, layers = bundle.known(model_ids), adapted(bundle)
    beside = {model: _passthrough(bundle, model) for model in ids}
    fields = {record["id"]: _fields(record) for record in bundle.provenance.get("models", ())}
    found = []
    with appearing(path) as folder:
        for model in ids:
            updates, place = _updates(layers, model), _rewrite.place(folder, model)
            done = peft.write_portable(place, updates, fields=fields.get(model), other=beside[model])
            found.append({"model": model, "folder": place, **done})
    return [{key: _moved(value, folder, path) for key, value in one.items()} for one in found]


def _fields(record):
    return {k: record[k] for k in peft.FIELDS if k in record}


def _moved(value, folder, path):
    is_inside = isinstance(value, str) and value.startswith(folder + os.sep)
    return os.path.join(path, os.path.relpath(value, folder)) if is_inside else value


@contextlib.contextmanager
def appearing(path):
    """A temporary folder beside `path` that takes its name once all is written, and is gone if that fails.

    Raises:
        WorkdirError: `path` exists, or its folder cannot be written.
    """
    path = os.path.abspath(path)
    head, tail = os.path.split(path)
    if os.path.lexists(path):
        raise errors.WorkdirError(f"{errors.quote(path)}: exists already; give another folder")
    folder = os.path.join(head, f".tmp-{tail}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        os.makedirs(folder)
    except OSError as error:
        raise errors.WorkdirError(f"{errors.quote(path)}: cannot be made: {error.strerror}") from error
    try:
        yield folder
        os.rename(folder, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # gone already where all went well


def adapted(bundle):
    """The Layers of a bundle whose members were PEFT adapters.

    Raises:
        ConfigError: other layers, models of another format, or factors whose orientation is not known.
    """
    for record in bundle.provenance.get("models", ()):
        if record["format"] != "peft":
            raise errors.ConfigError(
                f"member {errors.quote(record['id'])} was a model of format {record['format']}: only members that were "
                "PEFT folders are written from a bundle alone; give --collection for the others"
            )
    for layer in bundle.layers:
        if layer.parametrisation != "lora":
            raise errors.ConfigError(
                f"layer {errors.quote(layer.name)} is no low-rank update but full values: no adapter holds it"
            )
        if not layer.orientation:
            raise errors.ConfigError(
                f"layer {errors.quote(layer.name)}: the bundle does not say how PEFT stores its factors; fit it again, "
                "or give --collection"
            )
    return bundle.layers


def _updates(layers, model):
    """Layer -> peft.Update of one member."""
    found = {}
    for layer in layers:
        if model in layer.model_ids:
            n = layer.model_ids.index(model)
            a, b = (np.asarray(x)[0] for x in layer.subspace.reconstruct_factors(layer.values[n : n + 1]))
            found[layer.name] = peft.Update(a, b, 1.0, layer.orientation, layer.dtypes[n])
    return found


def _passthrough(bundle, model):
    """Tensors of a member that were kept whole, by name.

    Raises:
        ConfigError: a factor, whose scale the bundle does not have.
    """
    kept = bundle.passthrough.get(model, {})
    for name in kept:
        if peft.is_factor(name):
            raise errors.ConfigError(
                f"member {errors.quote(model)}: {errors.quote(name)} was kept whole, its scale is not in the bundle; "
                "give --collection, or fit that layer too"
            )
    return kept
