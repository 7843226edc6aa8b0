"""PEFT LoRA folders: adapter_config.json and adapter_model.safetensors (or .bin). The factors are kept apart.

Written in two layouts: exact, each update with the rank and scale of its own, and portable, which servers read too.
"""

import collections
import hashlib
import json
import os
import re

import numpy as np

from jaxsub import descriptors, errors
from jaxsub.formats import (
    _factors,
    _files,
    _header,
    _json,
    _model,
    _peft,
    _portable,
    _rewrite,
    _sniff,
    _torch,
    safetensors,
    subspaceadapter,
)
from jaxsub.formats._portable import Update as Update, orientation as orientation, write as write_portable

CONFIG = _portable.CONFIG
FIELDS = ("base_model_name_or_path", "task_type", "target_modules")  # what an adapter is for
MAX_CONFIG = 1 << 22  # bytes
ENDING = ""  # of a rewritten model: a folder


def claims(path):
    """Whether `path` is a folder with the files of an adapter."""
    return _sniff.kind(path) == "peft"


def open(path, *, root=None, allow_roots=()):
    """The Model of an adapter folder: `adapters` by layer name (without PEFT's prefix), saved modules as `tensors`.

    Raises:
        InputError: no configuration, or any fault that `_peft` finds (rule H13).
    """
    where = {"root": path if root is None else root, "allow_roots": allow_roots}
    names = _files.list_folder(path)
    config_path = os.path.join(path, CONFIG)
    if CONFIG not in names:
        raise errors.InputError(config_path, "is not there", hint="the scale of an adapter is in it", rule="H13")
    data = config_bytes(_files.identify(config_path, **where))
    weights = next((name for name in _sniff.ADAPTER_FILES if name in names), None)
    config = _peft.parse(data, config_path, others=subspaceadapter.TYPES)
    if weights is None:
        missing = os.path.join(path, _sniff.ADAPTER_FILES[0])
        raise errors.InputError(missing, "is not there", hint="fetch the adapter's weights", rule="H13")
    read = _header.content if weights.endswith(".safetensors") else _torch.content
    content = read(os.path.join(path, weights), **where)
    if config is None:
        return subspaceadapter.assemble(path, content)
    notes, key = content.notes if content.notes is not None else {}, hashlib.blake2b(data).digest()
    if key not in notes:
        notes[key] = _peft.plan(config, content, config_path)
    return assemble(path, content, notes[key])


def config_bytes(file):
    """The bytes of a FileId that should be a small JSON file."""
    if not 0 < file.size <= MAX_CONFIG:
        raise _files.damaged(file, f"has {file.size} bytes, 1 to {MAX_CONFIG} are possible", rule="H13")
    return _files.read_bytes(file, 0, file.size)


def assemble(path, content, plan, form="peft", files=()):
    """The Model of a Content whose `_peft.Plan` is known; `files` are FileIds beside the content's own."""
    adapters = dict(_peft.pair(content.tensors, entry) for entry in plan.pairs)
    named = {name: content.tensors[position] for position, name in plan.plain}
    kept = {name: tensor for name, tensor in named.items() if name not in plan.skipped}
    warnings = list(plan.warnings)
    if not _factors.have_effect(adapters.values(), content.load):
        warnings.append("every lora_B or its scale is zero: the adapter has no effect")
    metadata = {**content.metadata, **plan.metadata}
    more = {"adapters": adapters, "warnings": warnings, "metadata": metadata, "load": content.load}
    return _model.build(path, form, kept, plan.skipped, files=(content.file, *files), **more)


def write(folder, adapters, *, base_model=None, labels=None):
    """Writes a LoRA folder that PEFT loads.

    Args:
        folder: made if missing.
        adapters: layer -> (a, b, alpha, r) with a (r, i) and b (o, r); Delta-W = alpha / r * b @ a. A convolution has
            a (r, i, kh, kw) and b (o, r, 1, 1).
        base_model: name for `base_model_name_or_path`.
        labels: strings for the header of the weights.

    Raises:
        ValueError: shapes that do not fit `r`.
    """
    tensors = {}
    for layer, (a, b, _, r) in adapters.items():
        a, b = np.asarray(a), np.asarray(b)
        if a.ndim < 2 or b.ndim != a.ndim or a.shape[0] != r or b.shape[1:] != (r, *[1] * (b.ndim - 2)):
            raise ValueError(f"layer {layer!r}: factors of shapes {a.shape} and {b.shape} are not of rank {r}")
        tensors[f"{_peft.PREFIX}{layer}.lora_A.weight"] = a
        tensors[f"{_peft.PREFIX}{layer}.lora_B.weight"] = b
    _files.make_folder(folder)
    safetensors.write(os.path.join(folder, _sniff.ADAPTER_FILES[0]), tensors, {"format": "pt", **(labels or {})})
    ranks = {layer: int(entry[3]) for layer, entry in adapters.items()}
    fields = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model,
        **config_of(ranks, {layer: entry[2] for layer, entry in adapters.items()}),
        "target_modules": sorted(adapters),
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "inference_mode": True,
    }
    config = json.dumps(fields, indent=2, allow_nan=False)
    _files.write_atomic(os.path.join(folder, CONFIG), [config.encode("utf-8") + b"\n"])


def stored_name(layer):
    """What the tensor of a full value is called in an adapter's file."""
    return _peft.PREFIX + layer


def can_rewrite(model):
    """Whether `rewrite` can write an adapter in its own layout."""
    return os.path.lexists(os.path.join(model.path, _sniff.ADAPTER_FILES[0]))


def rewrite(model, path, layers):
    """Writes an adapter again in a new folder with other values in some layers; see `formats.rewrite`."""
    source = os.path.join(model.path, _sniff.ADAPTER_FILES[0])
    if not can_rewrite(model):
        raise errors.ConfigError(f"{errors.quote(model.path)}: its weights are a torch file: not written yet")
    tensors, metadata = safetensors.read(source), safetensors.open_metadata(source)
    ranks = {name: pair.rank for name, pair in model.adapters.items()}
    alphas = {name: _alpha(model.adapters[name]) for name in ranks}
    for name, value in layers.items():
        pair = model.adapters.get(name)
        if pair is None:
            tensor = model.tensors[name]
            dtype = descriptors.numpy_dtype(tensor.dtype)
            tensors[tensor.name] = _rewrite.cast(np.reshape(value, tensor.shape), dtype, model, name)
            continue
        a, b, scale = _factors.written(value, pair)
        if pair.transposed:
            a, b = b.T, a.T
        ranks[name], alphas[name] = len(a), scale * len(a)
        for tensor, array in ((pair.a, a), (pair.b, b)):
            array = np.reshape(array, _shape_like(tensor.shape, array))
            tensors[tensor.name] = _rewrite.cast(array, descriptors.numpy_dtype(tensor.dtype), model, name)
    original = os.path.join(model.path, CONFIG)
    config = _json.parse(_rewrite.read(original), original)
    config |= config_of(ranks, alphas)
    if "init_lora_weights" in config:
        config["init_lora_weights"] = True  # PiSSA and its like would change the base on loading
    text = json.dumps(config, indent=2, allow_nan=False)
    with _files.new_folder(path) as folder:
        _rewrite.copy_sidecars(model.path, folder, without=(CONFIG, *_sniff.ADAPTER_FILES))
        safetensors.write(os.path.join(folder, _sniff.ADAPTER_FILES[0]), tensors, metadata)
        _files.write_atomic(os.path.join(folder, CONFIG), [text.encode("utf-8") + b"\n"])


def _shape_like(shape, array):
    """The shape of a factor of another rank: (k, c, h, w) or (o, k, 1, 1) for convolutions."""
    return array.shape if len(shape) == 2 else (*array.shape[:1], -1, *shape[2:])


def rewrite_portable(model, path, layers, pairs=None):
    """Writes an adapter again in the portable layout, with other values in some layers as `formats.rewrite` takes them.

    Updates that are not in `layers` are kept, as are sidecars; full values (saved modules, biases) go beside them.

    Args:
        model: of a PEFT folder.
        path: the new folder.
        layers: layer -> values.
        pairs: layer -> LoraPair of the updates to write, the model's own by default; what others have beyond these is
            in `layers`.

    Returns:
        dict, as `write_portable`.

    Raises:
        ConfigError, InputError: see `write_portable`.
    """
    other, names = {}, {pair.a.name for pair in model.adapters.values()} | {p.b.name for p in model.adapters.values()}
    source = os.path.join(model.path, _sniff.ADAPTER_FILES[0])
    if os.path.lexists(source):
        other = {name: array for name, array in safetensors.read(source).items() if name not in names}
    else:
        other = {tensor.name: _model.read(tensor, model.load) for tensor in model.tensors.values()}
    for layer, value in layers.items():
        if layer in model.tensors:
            tensor = model.tensors[layer]
            dtype = descriptors.numpy_dtype(tensor.dtype)
            other[tensor.name] = _rewrite.cast(np.reshape(value, tensor.shape), dtype, model, layer)
    updates = {}
    for layer, pair in (model.adapters if pairs is None else pairs).items():
        if len(pair.shape) != 2:  # rebuilt ones are flat
            raise _portable.convolution(layer)
        dtype = max((pair.a.dtype, pair.b.dtype), key=lambda name: descriptors.numpy_dtype(name).itemsize)
        if layer in layers:
            a, b, scale = (*layers[layer], 1.0)[:3]
        else:
            (a, b), scale = (_model.read(t, model.load) for t in (pair.a, pair.b)), pair.scale
            a, b = (b.T, a.T) if pair.transposed else (a, b)
        updates[layer] = Update(a, b, scale, orientation(pair), dtype)
    done = write_portable(path, updates, fields=fields_of(model), other=other)
    without = (CONFIG, *_sniff.ADAPTER_FILES, _portable.OTHER)
    _rewrite.copy_sidecars(model.path, path, without=without)
    return done


def fields_of(model):
    """The fields of a PEFT model's configuration that say what it is for; nothing for models of other formats."""
    if model.format != "peft":
        return {}
    found = {k: model.metadata[k] for k in FIELDS if k in model.metadata}
    return {k: json.loads(v) if k == "target_modules" else v for k, v in found.items()}


def is_factor(key):
    """Whether a tensor's key is that of a LoRA factor."""
    return _peft.split(key)[0] is not None


def served_problems(folder, max_rank=_portable.RANKS[-1]):
    """What vLLM refuses in an adapter folder, or would read with another scale; see `_portable.problems`."""
    config_path = os.path.join(folder, CONFIG)
    config = _json.parse(_rewrite.read(config_path), config_path)
    weights = os.path.join(folder, _portable.WEIGHTS)
    if not os.path.lexists(weights):
        return [f"{_portable.WEIGHTS} is missing"]
    shapes = {tensor.name: tensor.shape for tensor in _header.content(weights).tensors}
    return _portable.problems(config, shapes, max_rank)


def _alpha(pair):
    """alpha with which scale = alpha / r, whatever rule gave the scale."""
    return pair.scale * pair.rank


def config_of(ranks, alphas):
    """The fields of a configuration that scale updates, as every PEFT since 0.3 knows them.

    Ranks and alphas (layer -> number) that are not the commonest go into patterns.
    """
    r = collections.Counter(ranks.values()).most_common(1)[0][0]
    alpha = collections.Counter(alphas.values()).most_common(1)[0][0]
    return {
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(layer)}": v for layer, v in sorted(ranks.items()) if v != r},
        "alpha_pattern": {f"^{re.escape(layer)}": v for layer, v in sorted(alphas.items()) if v != alpha},
        "use_rslora": False,
    }
