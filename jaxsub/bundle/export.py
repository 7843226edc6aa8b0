"""Members of a bundle of low-rank updates as adapter folders for other programs; the originals are not needed.

Layouts, all of which PEFT loads:

- portable: DIR/<member>/, LoRA of one rank and a scale of 1, which servers load too (`formats._portable`).
- tinylora: DIR/<member>/, the subspace and a vector of coefficients, to be trained further (`formats._tinylora`).
- tinylora_shared: the same with the subspace once, DIR/shared/, and DIR/members/<member>.safetensors; `join` makes one.
"""

import os

import numpy as np

from jaxsub import descriptors, errors, lineup, subspace
from jaxsub.formats import _files, _portable, _rewrite, _tinylora, peft, safetensors

LAYOUTS = ("portable", "tinylora", "tinylora_shared")
join = _tinylora.join


def write(bundle, path, model_ids=None, layout="portable", modules=None):
    """See `Bundle.export`."""
    errors.require_known("layout", layout, LAYOUTS)
    ids, layers = bundle.known(model_ids), adapted(bundle)
    beside = {model: {**_passthrough(bundle, model), **_full(bundle, model)} for model in ids}
    fields = {record["id"]: _fields(record) for record in bundle.provenance.get("models", ())}
    if layout != "portable":
        first = fields.get(ids[0], {}) if ids else {}
        config, tensors, vectors = _tinylora.build(_spaces(layers, ids), fields=_base(first), modules=modules)
        vectors = dict(zip(ids, vectors, strict=True))
    found = []
    with _files.new_folder(path) as folder:
        if layout == "tinylora_shared":
            _tinylora.write_shared(folder, config, tensors, vectors)
        for model in ids:
            place = _rewrite.place(folder, model)
            if layout == "portable":
                updates = _updates(bundle, model)
                done = peft.write_portable(place, updates, fields=fields.get(model), other=beside[model])
            elif layout == "tinylora":
                _tinylora.write(place, {**config, **_base(fields.get(model, {}))}, tensors, vectors[model])
                done = _beside(os.path.join(place, _portable.OTHER), beside[model], config)
            else:
                place = os.path.join(folder, _tinylora.SHARED)
                done = _beside(_other(folder, model), beside[model], config)
            found.append({"model": model, "folder": place, **done})
    return [{key: _moved(value, folder, path) for key, value in one.items()} for one in found]


def _fields(record):
    found = {k: record[k] for k in peft.FIELDS if k in record}
    modules = found.get("target_modules", [])
    texts = [value for name, value in found.items() if name != "target_modules"]
    if not isinstance(modules, list) or not all(isinstance(value, str) for value in (*texts, *modules)):
        reason = "is a member whose adapter's configuration is no text and names of modules"
        raise errors.InputError(record["id"], reason, hint="make the bundle again", rule="H13")
    return found


def _base(fields):
    """The fields without the names of modules: every layer is named in full."""
    return {k: v for k, v in fields.items() if k != "target_modules"}


def _other(folder, model):
    return _rewrite.place(os.path.join(folder, "other_tensors"), model) + ".safetensors"


def _beside(path, tensors, config):
    """Writes full values of a member, if it has any; what is said of the member."""
    if tensors:
        _files.make_folder(os.path.dirname(path))
        safetensors.write(path, tensors, {"format": "pt"})
    return {"r": config["r"], "u": config["u"], "other_tensors": path if tensors else None}


def _spaces(layers, ids):
    """Layer -> Space of these members; one that lacks a layer has a core of zeros there.

    Raises:
        ConfigError: no member, or a layer that is not of one shape.
    """
    names = [layer.name for layer in layers]
    for name in names:
        if names.count(name) > 1:
            raise errors.ConfigError(
                f"layer {errors.quote(name)} has several shapes in this bundle: its members share no adapter; "
                "write the portable layout"
            )
    if not ids:
        raise errors.ConfigError("no member to write")
    found = {}
    for layer in layers:
        own = () if layer.corrections is None else layer.corrections.positions
        for model in {layer.model_ids[p] for p in own} & {*ids}:
            raise errors.ConfigError(
                f"layer {errors.quote(layer.name)} of member {errors.quote(model)} is kept by its own factors "
                "(max_error), which no vector in the subspace gives; write the portable layout"
            )
        rows = {model: row for row, model in enumerate(layer.model_ids)}
        cores = np.zeros((len(ids), *layer.values.shape[1:]))
        for n, model in enumerate(ids):
            if model in rows:
                cores[n] = layer.values[rows[model]]
        left, right = (np.asarray(layer.subspace.factors[axis], np.float64) for axis in (0, 1))
        found[layer.name] = _tinylora.Space(left, right, cores, layer.orientation)
    return found


def _moved(value, folder, path):
    is_inside = isinstance(value, str) and value.startswith(folder + os.sep)
    return os.path.join(path, os.path.relpath(value, folder)) if is_inside else value


def adapted(bundle):
    """The Layers of low-rank updates of a bundle whose members were PEFT adapters.

    Raises:
        ConfigError: none, models of another format, or factors whose orientation is not known.
    """
    for record in bundle.provenance.get("models", ()):
        if record["format"] != "peft":
            raise errors.ConfigError(
                f"member {errors.quote(record['id'])} was a model of format {record['format']}: only members that were "
                "PEFT folders are written from a bundle alone; give --collection for the others"
            )
    if bundle.is_of_factors:
        raise errors.ConfigError(
            "the bundle holds LoRA's A and B apart (--view=lora_factors), of which no adapter is written without its "
            "own files: give --collection"
        )
    updates = [layer for layer in bundle.layers if layer.parametrisation == lineup.LORA]
    if not updates:
        raise errors.ConfigError("the bundle holds no low-rank update, but full values alone, which no adapter holds")
    for layer in updates:
        if len(layer.shape) != 2:
            raise errors.ConfigError(
                f"layer {errors.quote(layer.name)}: an update of a convolution has no place in these layouts; give "
                "--collection, and write the exact one"
            )
        if not layer.orientation:
            raise errors.ConfigError(
                f"layer {errors.quote(layer.name)}: the bundle does not say how PEFT stores its factors; fit it again, "
                "or give --collection"
            )
    return updates


def _updates(bundle, model):
    """Layer -> peft.Update of one member."""
    found, rebuilt = {}, bundle.reconstruct_factors(bundle.coefficients([model]))
    for layer in adapted(bundle):
        if model in layer.model_ids:
            a, b = (x[0] for x in rebuilt[bundle.key(layer)])
            dtype = layer.dtypes[layer.model_ids.index(model)]
            found[layer.name] = peft.Update(a, b, 1.0, layer.orientation, dtype)
    return found


def _full(bundle, model):
    """Full values of a member that have a subspace (saved modules, biases), rebuilt, by the names of their tensors."""
    kinds = {bundle.key(layer): layer for layer in bundle.layers if layer.parametrisation != lineup.LORA}
    known = bundle.coefficients([model])
    own, kept = ({k: v for k, v in part.items() if k in kinds} for part in (known.values, known.corrections))
    found = {}
    for key, value in bundle.reconstruct(subspace.Coefficients((model,), own, kept)).items():
        layer = kinds[key]
        dtype = descriptors.numpy_dtype(layer.dtypes[layer.model_ids.index(model)])
        found[peft.stored_name(layer.name)] = _rewrite.rounded(value[0], dtype, model, layer.name)
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
