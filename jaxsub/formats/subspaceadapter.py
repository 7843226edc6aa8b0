"""Adapters of the paper's own code and of EigenLoRAx: a subspace and loadings in it for every factor.

    <prefix><layer>.subspaceadapter_A.components (i, K), .loadings (K, r); the same of B (o, K), (K, r)
    Delta-W = (C_B L_B) (C_A L_A).T    "eigenflux" in older files

Read as LoRA with a scale of 1: the released layers apply neither alpha nor r, and their files hold neither. A and B are
multiplied out when they are read; what was subtracted before the basis was fitted is not in these files. To move over,
read a folder of them as any collection; they are not written.

Source: released code of arXiv 2512.05117 (tuner `subspaceadapter`) and of arXiv 2502.04700; E26.
"""

import itertools
import re

from jaxsub import descriptors, errors
from jaxsub.formats import _header, _loadings, _model

TYPES = ("SUBSPACEADAPTER", "EIGENFLUX")  # `peft_type` in adapter_config.json
PART = re.compile(
    r"(?:base_model\.model\.)?(?P<layer>.+)\.(?P<kind>subspaceadapter|eigenflux)_(?P<side>[AB])"
    r"(?:\.(?!components$|loadings$)[^.]+)?\.(?P<part>components|loadings)"
)
_AGAIN = "save the adapter again with the code that trained it"


def claims(path):
    """No path by itself: `safetensors` and `peft` hand over files whose tensors are of this kind."""
    return False


def open(path, *, root=None, allow_roots=()):
    """The Model of a file: `adapters` by layer, other tensors as they are.

    Raises:
        InputError: the file breaks the format of safetensors, or parts are missing or do not fit (rule H13).
    """
    return assemble(path, _header.content(path, root=root, allow_roots=allow_roots))


def assemble(path, content):
    """The Model of a file whose header was read; see `open`."""
    file, parts, rest = content.file.path, {}, {}
    for tensor in content.tensors:
        match = PART.fullmatch(tensor.name)
        if match is None:
            if tensor.name not in content.skipped:
                rest[tensor.name] = tensor
            continue
        key = match["side"], match["part"]
        if key in parts.setdefault(match["layer"], {}):
            raise _fail(file, match["layer"], f"has two {key[1]} of {key[0]}")
        parts[match["layer"]][key] = tensor
    adapters, products = {}, _loadings.Products(file, _AGAIN, content.load)
    for layer, found in parts.items():
        for side, part in itertools.product(_loadings.SIDES, ("components", "loadings")):
            if (side, part) not in found:
                raise _fail(file, layer, f"has no {part} of {side}")
        factors = []
        for side in _loadings.SIDES:
            components, loadings = found[side, "components"], found[side, "loadings"]
            name = components.name.removesuffix(".components")
            factors.append(products.factor(name, layer, side, components, loadings))
        if factors[0].shape[0] != factors[1].shape[1]:
            raise _fail(file, layer, f"has loadings of ranks {factors[0].shape[0]} and {factors[1].shape[1]}")
        adapters[layer] = descriptors.LoraPair(*factors, 1.0, (factors[1].shape[0], factors[0].shape[1]))
    more = {"adapters": adapters, "metadata": content.metadata, "load": products.load}
    return _model.build(path, "subspaceadapter", rest, content.skipped, files=(content.file,), **more)


def _fail(file, layer, reason):
    return errors.InputError(file, reason, key=layer, hint=_AGAIN, rule="H13")
