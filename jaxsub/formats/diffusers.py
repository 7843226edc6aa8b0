"""LoRA files of diffusers with PEFT: one .safetensors, `<component>.<module>.lora_A.weight` and `lora_B.weight`.

Rank, alpha and their patterns are in the header, `lora_adapter_metadata`: JSON of PEFT's fields, each prefixed by its
component ("unet.r"). Of a component without them alpha is r, or `<layer>.alpha` as ComfyUI's trainers write it.
"""

import json
import os

from jaxsub import descriptors, errors
from jaxsub.formats import _factors, _files, _header, _json, _model, _peft, _rewrite, peft, safetensors

ENDING = ".safetensors"  # of a rewritten model
_SAVE_AGAIN = "save the adapter again with diffusers"
_ALPHA = ".alpha"


def claims(path):
    """No path by itself: files end as those of `safetensors`, which hands over those whose tensors are of a family."""
    return False


def open(path, *, root=None, allow_roots=()):
    """The Model of a file: `adapters` by layer, the component first.

    Raises:
        InputError: the file breaks the format of safetensors, or any fault of tensors or metadata (rules H6, H13).
    """
    return assemble(path, _header.content(path, root=root, allow_roots=allow_roots))


def assemble(path, content):
    """The Model of a file whose header was read; see `open`."""
    if "diffusers" not in content.notes:
        content.notes["diffusers"] = _plan(content)
    entries, warnings, alphas = content.notes["diffusers"]
    adapters = dict(_peft.pair(content.tensors, entry) for entry in entries)
    values = _factors.read_alphas(content.file, [content.tensors[position] for _, position in alphas])
    for (layer, _), alpha in zip(alphas, values, strict=True):
        pair = adapters[layer]
        scale = _factors.scale(alpha, pair.rank)
        adapters[layer] = descriptors.LoraPair(pair.a, pair.b, scale, pair.shape, pair.transposed)
    if not _factors.have_effect(adapters.values(), content.load):
        warnings = (*warnings, "every lora_B or its scale is zero: the adapter has no effect")
    more = {"adapters": adapters, "warnings": warnings, "metadata": content.metadata}
    return _model.build(path, "diffusers", {}, content.skipped, load=content.load, files=(content.file,), **more)


def _plan(content):
    """(entries for `_peft.pair`, warnings, (layer, position) of alphas) that follow from a header."""
    file, tensors = content.file.path, content.tensors
    numbered = [(p, t) for p, t in enumerate(tensors) if t.name not in content.skipped]
    alphas = {t.name.removesuffix(_ALPHA): p for p, t in numbered if t.name.endswith(_ALPHA)}
    factors, plain = _peft.sort([(p, t) for p, t in numbered if not t.name.endswith(_ALPHA)], file)
    if plain:
        reason, cure = "is no LoRA factor, in a file of LoRA factors", "merge the adapter and give the merged model"
        raise errors.InputError(file, reason, key=plain[0][1], hint=cure, rule="H13")
    found = _peft.partners(factors, tensors, file)
    table = _table(content.metadata, file)
    for layer, position in alphas.items():
        name = tensors[position].name
        if layer not in found:
            raise errors.InputError(file, "scales a layer that is not there", key=name, hint=_SAVE_AGAIN, rule="H13")
        if table:  # diffusers refuses this too
            reason = f"is there beside {_factors.METADATA}, which gives the scale too"
            raise errors.InputError(file, reason, key=name, hint="keep one of the two", rule="H13")
        _factors.check_alpha(tensors[position], file)
    entries, warnings = [], []
    for component, modules in _components(found).items():
        fields = _fields(table, component)
        if not fields:
            entries += [_peft.entry(f"{component}.{m}", f, 1.0, f.embedding) for m, f in modules.items()]
            continue
        try:
            config = _peft.configure(fields, file)
            placed, said = _peft.place(config, modules, file, f"{_factors.METADATA} of {component}")
        except errors.InputError as error:
            key = f"{component}.{error.key}"
            raise errors.InputError(file, error.reason, key=key, hint=_SAVE_AGAIN, rule=error.rule) from None
        entries += [(f"{component}.{entry[0]}", *entry[1:]) for entry in placed]
        warnings += said
    order = {layer: number for number, layer in enumerate(found)}
    return tuple(sorted(entries, key=lambda entry: order[entry[0]])), tuple(warnings), tuple(alphas.items())


def _table(metadata, file):
    """The fields of all components, {} where the file has none."""
    if _factors.METADATA not in metadata:
        return {}
    try:
        table = _json.parse(metadata[_factors.METADATA].encode("utf-8"), file, rule="H13")
    except errors.InputError as error:
        key = _factors.METADATA + (f", {error.key}" if error.key else "")
        raise errors.InputError(file, error.reason, key=key, hint=_SAVE_AGAIN, rule="H13") from None
    if not isinstance(table, dict):
        raise errors.InputError(file, "is no JSON object", key=_factors.METADATA, hint=_SAVE_AGAIN, rule="H13")
    return table


def _fields(table, component):
    """PEFT's fields of a component, by their own names."""
    start = component + "."
    fields = {key[len(start) :]: value for key, value in table.items() if key.startswith(start)}
    return {"peft_type": "LORA", **fields} if fields else {}


def _components(layers):
    """component -> {module: value} of a table by layer."""
    found = {}
    for layer, value in layers.items():
        component, _, module = layer.partition(".")
        found.setdefault(component, {})[module] = value
    return found


# Writing ----------------------------------------------------------------------------------------------------------


def rewrite(model, path, layers):
    """Writes a file again at `path` with other values in some layers; see `formats.rewrite`."""
    tensors, metadata = safetensors.read(model.path), dict(model.metadata)
    scaled = {name.removesuffix(_ALPHA) for name in tensors if name.endswith(_ALPHA)}
    ranks = {name: pair.rank for name, pair in model.adapters.items()}
    alphas = {name: pair.scale * pair.rank for name, pair in model.adapters.items()}
    for name, value in layers.items():
        pair = model.adapters[name]
        a, b, scale = _factors.written(value, pair)
        if pair.transposed:
            a, b = b.T, a.T
        ranks[name], alphas[name] = len(a), scale * len(a)
        shapes = (len(a), *pair.a.shape[1:]), (pair.b.shape[0], len(a), *pair.b.shape[2:])
        for tensor, array, shape in zip((pair.a, pair.b), (a, b), shapes, strict=True):
            dtype = descriptors.numpy_dtype(tensor.dtype)
            tensors[tensor.name] = _rewrite.cast(array.reshape(shape), dtype, model, name)
        if name in scaled:
            tensors[name + _ALPHA] = _factors.alpha_array(scale * len(a), tensors[name + _ALPHA])
    if layers and not scaled:
        _describe(metadata, ranks, alphas, model.path)
    _files.make_folder(os.path.dirname(os.path.abspath(path)))
    safetensors.write(path, tensors, metadata)


def _describe(metadata, ranks, alphas, file):
    """Puts ranks and alphas of all layers into `lora_adapter_metadata`.

    A file of a component that diffusers does not call so gets none where it had none: read with metadata of other
    components only, that component would have PEFT's default rank. Without metadata alpha is r, which is right.
    """
    table, modules = _table(metadata, file), _components(ranks)
    if not table and not all(_factors.COMPONENT.match(component + ".") for component in modules):
        return
    for component, own in modules.items():
        before = _fields(table, component)
        scales = {module: alphas[f"{component}.{module}"] for module in own}
        fields = {"peft_type": "LORA", "target_modules": sorted(own)} | before | peft.config_of(own, scales)
        if "init_lora_weights" in fields:
            fields["init_lora_weights"] = True  # PiSSA and its like would change the base on loading
        table |= {f"{component}.{key}": value for key, value in fields.items()}
    metadata[_factors.METADATA] = json.dumps(table, indent=2, sort_keys=True, allow_nan=False)
