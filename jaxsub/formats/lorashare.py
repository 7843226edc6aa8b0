"""Adapters in the format of lorashare: one basis for all, loadings in it for each, PEFT's configuration beside them.

    <folder>/share_config.json, shared_components.safetensors      <layer>:A (i, K), <layer>:B (o, K)
    <folder>/adapters/<name>/loadings.safetensors                  <layer>:A (K, r), <layer>:B (K, r)
    <folder>/adapters/<name>/adapter_meta.json                     {"original_config": {...}, ...}
    <folder>/adapters/<name>/classifier_head.safetensors           what was no factor, if anything was

    A = (C_A L_A).T, B = C_B L_B, Delta-W = alpha / r * B A by the rules of PEFT

To move over, read the folder as any collection; its members are not written in this format again. They are what was
kept, not the originals: lorashare takes a mean off before it fits the basis, and neither stores it nor puts it back.

Source: lorashare 0.1.3.
"""

import os

from jaxsub import errors
from jaxsub.formats import _files, _header, _json, _loadings, _model, _peft, _sniff, peft

META, HEAD = "adapter_meta.json", "classifier_head.safetensors"
_HINT = "compress the adapters again, or give the originals"


def claims(path):
    """Whether `path` is a folder with the loadings of one adapter."""
    return _sniff.kind(path) == "lorashare"


def open(path, *, root=None, allow_roots=()):
    """The Model of one adapter's folder, from headers alone; names and scales as PEFT's own folder would have them.

    Raises:
        InputError: the basis or the configuration is missing, parts do not fit (rule H13), or what `_peft` finds.
    """
    where = {"root": path if root is None else root, "allow_roots": allow_roots}
    above = os.path.dirname(os.path.dirname(os.path.abspath(path)))
    basis = _content(os.path.join(above, _sniff.SHARED_BASIS), allow_roots=allow_roots)  # not in `path`, by design
    loadings = _content(os.path.join(path, _sniff.LOADINGS), **where)
    config, meta = _config(os.path.join(path, META), where)
    file, products = loadings.file.path, _loadings.Products(loadings.file.path, _HINT, loadings.load)
    components, tensors = {t.name: t for t in basis.tensors}, []
    for tensor in loadings.tensors:
        layer, mark, side = tensor.name.rpartition(":")
        if not (layer and mark and side in ("A", "B")):
            raise _fail(file, tensor.name, "is no <layer>:A or <layer>:B")
        if tensor.name not in components:
            raise _fail(file, tensor.name, f"is not in {_sniff.SHARED_BASIS}")
        name = f"{_peft.PREFIX}{layer}.lora_{side}.weight"
        tensors.append(products.factor(name, layer, side, components[tensor.name], tensor))
    files = [basis.file, meta]
    if os.path.lexists(os.path.join(path, HEAD)):
        head = _content(os.path.join(path, HEAD), **where)
        tensors, files = tensors + head.tensors, [*files, head.file]
    content = _model.Content(loadings.file, tensors, {}, {}, products.load)
    return peft.assemble(path, content, _peft.plan(config, content, meta.path), "lorashare", files)


def _content(path, **where):
    if not os.path.lexists(path):
        raise errors.InputError(path, "is not there", hint="it lies beside adapters/; get it again", rule="H13")
    return _header.content(path, **where)


def _config(path, where):
    """(Config, FileId) of an adapter's metadata."""
    if not os.path.lexists(path):
        raise errors.InputError(path, "is not there", hint="the scale of an adapter is in it", rule="H13")
    file = _files.identify(path, **where)
    fields = _json.parse(peft.config_bytes(file), file.path, rule="H13")
    config = fields.get("original_config") if isinstance(fields, dict) else None
    if not isinstance(config, dict) or not config:
        raise _fail(file.path, "original_config", "is no table of PEFT's fields: the scale is unknown")
    return _peft.configure(config, file.path), file


def _fail(file, key, reason):
    return errors.InputError(file, reason, key=key, hint=_HINT, rule="H13")
