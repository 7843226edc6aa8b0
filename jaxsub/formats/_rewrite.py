"""A model written again with some layers replaced: same format, names, dtypes; all else is copied to the bit.

Formats that can be written so: raw safetensors files and PEFT folders (their weights as safetensors).
"""

import json
import math
import os

import numpy as np

from jaxsub import descriptors, errors
from jaxsub.formats import _files, _json, _sniff, peft, safetensors

MAX_SIDECAR = 1 << 26  # bytes of a file beside the weights that is still copied


def ending(model):
    """What a rewritten model's path ends with: ".safetensors", or nothing for a folder.

    Raises:
        ConfigError: models of this format cannot be written yet.
    """
    if model.format == "peft":
        return ""
    if model.format == "safetensors":
        return ".safetensors"
    raise errors.ConfigError(
        f"{errors.quote(model.path)}: models of format {model.format} cannot be written yet; "
        "safetensors files and PEFT folders can"
    )


def rewrite(model, path, layers):
    """Writes `model` to a new `path` with other values in some layers.

    Args:
        model: descriptors.Model, of a format that `ending` knows.
        path: file or folder, made here.
        layers: layer -> array of the weight's shape; for low-rank updates (a (k, i), b (o, k)), Delta-W = b @ a in the
            orientation of `LoraPair.shape`, written with alpha = r = k.

    Raises:
        InputError: values that the stored dtype cannot hold.
        InputChangedError: the original is not as it was.
    """
    if ending(model):
        tensors = safetensors.read(model.path)
        for name, array in layers.items():
            stored = tensors[name]
            tensors[name] = _cast(np.reshape(array, stored.shape), stored.dtype, model, name)
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        safetensors.write(path, tensors, dict(model.metadata))
        return
    _rewrite_adapter(model, path, layers)


def _rewrite_adapter(model, path, layers):
    source = os.path.join(model.path, _sniff.ADAPTER_FILES[0])
    if not os.path.lexists(source):
        raise errors.ConfigError(f"{errors.quote(model.path)}: its weights are a torch file: not written yet")
    tensors, metadata = safetensors.read(source), safetensors.open_metadata(source)
    ranks = {name: pair.rank for name, pair in model.adapters.items()}
    alphas = {name: _alpha(model, name) for name in ranks}
    for name, value in layers.items():
        pair = model.adapters.get(name)
        if pair is None:
            tensor = model.tensors[name]
            dtype = descriptors.numpy_dtype(tensor.dtype)
            tensors[tensor.name] = _cast(np.reshape(value, tensor.shape), dtype, model, name)
            continue
        a, b = (np.asarray(x) for x in value)
        if pair.transposed:
            a, b = b.T, a.T
        ranks[name], alphas[name] = len(a), float(len(a))
        for tensor, array in ((pair.a, a), (pair.b, b)):
            tensors[tensor.name] = _cast(array, descriptors.numpy_dtype(tensor.dtype), model, name)
    os.makedirs(path)
    config = _json.parse(_read(os.path.join(model.path, peft.CONFIG)), os.path.join(model.path, peft.CONFIG))
    config |= peft.config_of(ranks, alphas)
    if "init_lora_weights" in config:
        config["init_lora_weights"] = True  # PiSSA and its like would change the base on loading
    for name in sorted(_files.list_folder(model.path)):
        full = os.path.join(model.path, name)
        if name in (peft.CONFIG, *_sniff.ADAPTER_FILES) or not os.path.isfile(full):
            continue
        if os.path.getsize(full) <= MAX_SIDECAR:
            _files.write_atomic(os.path.join(path, name), [_read(full)])
    safetensors.write(os.path.join(path, _sniff.ADAPTER_FILES[0]), tensors, metadata)
    text = json.dumps(config, indent=2, allow_nan=False)
    _files.write_atomic(os.path.join(path, peft.CONFIG), [text.encode("utf-8") + b"\n"])


def _alpha(model, name):
    """alpha with which scale = alpha / r, whatever rule gave the scale."""
    pair = model.adapters[name]
    return pair.scale * pair.rank


def _read(path):
    file = _files.identify(path)
    return _files.read_bytes(file, 0, file.size)


def _cast(array, dtype, model, name):
    """The array in the stored dtype, rounded once; what does not fit is refused."""
    with np.errstate(over="ignore"):
        cast = np.asarray(array).astype(dtype)
    wide = cast if dtype.itemsize >= 4 else cast.astype(np.float32)
    if not np.isfinite(wide).all():
        largest = float(np.abs(np.asarray(array)).max())
        what = f"rebuilt entries reach {largest:.3g}" if math.isfinite(largest) else "rebuilt entries are not finite"
        raise errors.InputError(model.path, f"{what}: more than {dtype.name} holds", key=name, rule="N1")
    return cast
