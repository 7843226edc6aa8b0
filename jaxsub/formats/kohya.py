"""LoRA files of kohya-ss, LyCORIS and older diffusers: one .safetensors, `<stem>.lora_down.weight` and the like.

    <stem>.lora_down.weight (r, i[, kh, kw])   <stem>.lora_up.weight (o, r[, 1, 1])   <stem>.alpha ()
    Delta-W = alpha / r * up @ down;   alpha absent or 0: r

The stem is the layer's name and is written back: which module it means is not in the file, since "." and "_" of the
module's path became one. Updates that are no product of two factors (`_lycoris`, `.diff`) are dense layers.
"""

import dataclasses
import functools
import hashlib
import os
import re

import numpy as np

from jaxsub import descriptors, errors
from jaxsub.formats import _factors, _files, _header, _lycoris, _model, _rewrite, safetensors

ENDING = ".safetensors"  # of a rewritten model
_SIDES = r"(?:\.lora_|[._]lora\.|\.lora_linear_layer\.)(?P<side>down|up)\.weight"
_PARTS = "|".join(("alpha", r"lora_mid\.weight", *sorted(_lycoris.NAMES - _lycoris.LOCON)))
_KEY = re.compile(rf"(?P<stem>.+?)(?:{_SIDES}|\.(?P<part>{_PARTS}))")
_DIRECT = re.compile(r"(?P<stem>.+)\.(?P<part>diff|diff_b|w_norm|b_norm)")
_OWN = (".lora_down.weight", ".lora_up.weight")  # kohya's spelling, which all its readers know with an alpha
_MERGE = "merge the adapter and give the merged model"
_REFUSED = (
    (r"\.(dora_scale|lora_magnitude_vector)$", "is of DoRA, which needs the base weights", _MERGE),
    (r"\.(oft_blocks|oft_diag|rescale)$", "is of OFT, which multiplies the base weights", _MERGE),
    (r"\.(a1|a2|b1|b2|bm)\.weight$", "is of GLoRA, which needs the base weights", _MERGE),
    (r"\.on_input$", "is of IA3, which multiplies the base weights", _MERGE),
    (r"\.(lambda_layer|(q|p)_layer\.weight)$", "is of T-LoRA, which is not read", _MERGE),
    (r"\.(reshape_weight|set_weight)$", "changes the base weights themselves", _MERGE),
    (r"\.lora_[AB]\.|\.lora_(embedding_)?[AB]$", "is of another family than its neighbours", "save one family a file"),
    (r"^bundle_emb\.", "is of a textual inversion", "save it in a file of its own"),
)
_LEGACY = (0x100000, 0x110000)  # bytes of a file that kohya's old hash is of


@dataclasses.dataclass(frozen=True, slots=True)
class _Plan:
    """What a header says: layer -> Factors, layer -> Recipe, layer -> position, all by position in the file.

    `alphas` is (layer, position) of those that belong to `pairs` or `recipes`.
    """

    pairs: dict
    recipes: dict
    direct: dict
    alphas: tuple


def claims(path):
    """No path by itself: files end as those of `safetensors`, which hands over those whose tensors are of a family."""
    return False


def open(path, *, root=None, allow_roots=()):
    """The Model of a file: `adapters` by stem, other updates as `tensors`.

    Raises:
        InputError: the file breaks the format of safetensors, or any fault of its tensors (rules H6, H13).
    """
    return assemble(path, _header.content(path, root=root, allow_roots=allow_roots))


def assemble(path, content):
    """The Model of a file whose header was read; see `open`."""
    plan, tensors = _plan(content), content.tensors
    values = _factors.read_alphas(content.file, [tensors[position] for _, position in plan.alphas])
    alphas = dict(zip((layer for layer, _ in plan.alphas), values, strict=True))
    adapters = {
        layer: descriptors.LoraPair(tensors[f.a], tensors[f.b], _factors.scale(alphas.get(layer), f.rank), f.shape)
        for layer, f in plan.pairs.items()
    }
    dense = {layer: tensors[position] for layer, position in plan.direct.items()}
    for layer, made in plan.recipes.items():
        dense[layer] = descriptors.Tensor(layer, made.shape, made.dtype)
    warnings = []
    if adapters and not dense and not _factors.have_effect(adapters.values(), content.load):
        warnings.append("every lora_up or its scale is zero: the adapter has no effect")
    load = functools.partial(_load, content, plan.recipes, alphas)
    more = {"adapters": adapters, "warnings": warnings, "metadata": content.metadata}
    return _model.build(path, "kohya", dense, content.skipped, load=load, files=(content.file,), **more)


def _load(content, recipes, alphas, name):
    if name not in recipes:
        return content.load(name)
    made = recipes[name]
    scale = _factors.scale(alphas.get(name), made.rank) if made.rank is not None else 1.0
    return _lycoris.delta(made, lambda position: _whole(content, position), scale)


def _whole(content, position):
    return _model.read(content.tensors[position], content.load)


# From names to layers ---------------------------------------------------------------------------------------------


def _plan(content):
    if "kohya" not in content.notes:
        content.notes["kohya"] = _make_plan(content)
    return content.notes["kohya"]


def _make_plan(content):
    file, tensors = content.file.path, content.tensors
    if _factors.METADATA in content.metadata:
        hint = "save it with one or the other"
        reason = "is there, where these tensors have alphas of their own"
        raise errors.InputError(file, reason, key=_factors.METADATA, hint=hint, rule="H13")
    stems, direct = _sort(content, file)
    pairs, recipes, alphas = {}, {}, []
    for stem, parts in stems.items():
        alpha = parts.pop("alpha", None)
        if not parts:
            raise _fail(file, stem, "has an alpha and nothing that it scales")
        if alpha is not None:
            _factors.check_alpha(tensors[alpha], file)
            alphas.append((stem, alpha))
        families = {name.split("_")[0] for name in parts}
        if len(families) > 1 or stem in direct:
            kinds = sorted({*families} | ({"diff"} if stem in direct else set()))
            raise _fail(file, stem, f"has {len(kinds)} kinds of update: {', '.join(kinds)}")
        if parts.keys() <= {"lora_down", "lora_up"}:
            names = ("lora_down", "lora_up")
            pairs[stem] = _factors.partners(stem, parts, tensors, file, names, _SAVE_AGAIN)
        else:
            recipes[stem] = _lycoris.recipe(stem, parts, tensors, file)
    return _Plan(pairs, recipes, direct, tuple(alphas))


_SAVE_AGAIN = "save the adapter again with its trainer"


def _fail(file, key, reason, hint=_SAVE_AGAIN):
    return errors.InputError(file, reason, key=key, hint=hint, rule="H13")


def _sort(content, file):
    """({stem: {part: position}}, {layer: position} of what is a delta as it is)."""
    stems, direct = {}, {}
    for position, tensor in enumerate(content.tensors):
        name = tensor.name
        if name in content.skipped:
            continue
        if whole := _DIRECT.fullmatch(name):
            _model.require_float(tensor, file)
            layer = whole["stem"] if whole["part"] in ("diff", "w_norm") else name  # a bias is a layer of its own
            if layer in direct:
                raise _fail(file, layer, "has an update twice", "save one adapter a file")
            direct[layer] = position
        elif found := _KEY.fullmatch(name):
            part = (found["part"] or f"lora_{found['side']}").removesuffix(".weight")
            parts = stems.setdefault(found["stem"], {})
            if part in parts:
                raise _fail(file, found["stem"], f"has {part} twice, spelled in two ways", "save one adapter a file")
            parts[part] = position
        else:
            raise _refusal(file, name)
    return stems, direct


def _refusal(file, name):
    for pattern, reason, cure in _REFUSED:
        if re.search(pattern, name):
            return _fail(file, name, reason, cure)
    return _fail(file, name, "is no part of an update that is known, in a file of LoRA factors", _MERGE)


# Writing ----------------------------------------------------------------------------------------------------------


def rewrite(model, path, layers):
    """Writes a file again at `path` with other values in some layers; see `formats.rewrite`.

    Rebuilt pairs have alpha = r. Layers of LoKr and Tucker factors become `.diff`, in the dtype of the factors; those
    whose factors do not say whether they are of a convolution become LoHa, which holds for both.
    """
    content = _header.content(model.path)
    plan, tensors, metadata = _plan(content), safetensors.read(model.path), dict(model.metadata)
    own, ranks = dict(plan.alphas), {name: pair.rank for name, pair in model.adapters.items()}
    alphas = {name: pair.scale * pair.rank for name, pair in model.adapters.items()}
    for name, value in layers.items():
        pair, alpha = model.adapters.get(name), content.tensors[own[name]].name if name in own else None
        if pair is not None:
            ranks[name], alphas[name] = _put_pair(tensors, model, name, pair, value, alpha)
        elif name in plan.recipes:
            used = [content.tensors[position].name for position in plan.recipes[name].parts.values()]
            dtypes = {tensors[key].dtype for key in used}
            dtype = dtypes.pop() if len(dtypes) == 1 else descriptors.numpy_dtype(plan.recipes[name].dtype)
            for key in filter(None, (*used, alpha)):
                del tensors[key]
            value = np.reshape(value, plan.recipes[name].shape)
            made = _lycoris.as_loha(value) if value.ndim == 2 else {"diff": value}
            for part, x in made.items():  # narrow numbers do not hold every alpha
                tensors[f"{name}.{part}"] = _rewrite.cast(
                    x, np.dtype("float32") if part == "alpha" else dtype, model, name
                )
        else:
            stored = tensors[model.tensors[name].name]
            tensors[model.tensors[name].name] = _rewrite.cast(
                np.reshape(value, stored.shape), stored.dtype, model, name
            )
    if any(name in ranks for name in layers):
        _describe(metadata, {*ranks.values()}, {*alphas.values()})
    _hash(metadata, tensors)
    _files.make_folder(os.path.dirname(os.path.abspath(path)))
    safetensors.write(path, tensors, metadata)


def _put_pair(tensors, model, name, pair, value, alpha):
    """Writes factors in a pair's place; their rank and alpha."""
    a, b, scale = _factors.written(value, pair)
    rank = len(a)
    shapes = (rank, *pair.a.shape[1:]), (pair.b.shape[0], rank, *pair.b.shape[2:])
    for tensor, array, shape in zip((pair.a, pair.b), (a, b), shapes, strict=True):
        dtype = descriptors.numpy_dtype(tensor.dtype)
        tensors[tensor.name] = _rewrite.cast(array.reshape(shape), dtype, model, name)
    # Other spellings are read by tools that take no alpha; without one it is r for all.
    if alpha is not None or pair.a.name.endswith(_OWN):
        alpha = alpha or f"{name}.alpha"
        tensors[alpha] = _factors.alpha_array(scale * rank, tensors.get(alpha, tensors[pair.b.name]))
    return rank, scale * rank


def _describe(metadata, ranks, alphas):
    """Rank and alpha as kohya-ss writes them: a number for all layers, or "Dynamic"."""
    for key, values in (("ss_network_dim", ranks), ("ss_network_alpha", alphas)):
        if key in metadata:
            metadata[key] = f"{values.pop():g}" if len(values) == 1 else "Dynamic"


def _hash(metadata, tensors):
    """The hashes that kohya-ss keeps in a file, of the tensors and of its own metadata only, where there are some."""
    keys = {"sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"} & metadata.keys()
    if not keys:
        return
    whole, part, position = hashlib.sha256(), hashlib.sha256(), 0
    chunks = safetensors.chunks(tensors, {k: v for k, v in metadata.items() if k.startswith("ss_")})
    for number, chunk in enumerate(chunks):
        if number:
            whole.update(chunk)
        start, end = (min(max(0, edge - position), len(chunk)) for edge in _LEGACY)
        part.update(memoryview(chunk)[start:end])
        position += len(chunk)
    found = {
        "sshs_model_hash": whole.hexdigest(),
        "sshs_legacy_hash": part.hexdigest()[:8],
        "modelspec.hash_sha256": "0x" + whole.hexdigest(),
    }
    metadata.update({key: found[key] for key in keys})
