"""LoRA folders in the one layout that PEFT, vLLM, LoRAX, mergekit and llama.cpp all read: one rank, a scale of 1.

    B = Q_B R_B,  A^T = Q_A R_A,  s R_B R_A^T = U S V^T:   s B A = B' A',  B' = Q_B U sqrt(S),  A' = sqrt(S) V^T Q_A^T

Servers know neither rank patterns nor alpha patterns nor saved modules. Only thin factors are formed, never (o, i).
"""

import dataclasses
import json
import os
import re

import numpy as np

from jaxsub import descriptors, errors
from jaxsub.formats import _factors, _files, _peft, _rewrite, _sniff, safetensors

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # MaxLoRARanks of vLLM 0.26, without 1
CONFIG, WEIGHTS = "adapter_config.json", _sniff.ADAPTER_FILES[0]
OTHER = "other_tensors.safetensors"  # full values beside the updates, which no server takes with an adapter
LINEAR, FAN_IN_FAN_OUT, EMBEDDING = "linear", "fan_in_fan_out", "embedding"
_KEY = re.compile(re.escape(_peft.PREFIX) + r".+\.(lora_(?P<side>[AB])\.weight|lora_embedding_(?P<other>[AB]))")


@dataclasses.dataclass(frozen=True)
class Update:
    """A low-rank update, Delta-W = scale * b @ a in the orientation of the stored weight.

    Attributes:
        a, b: (k, i) and (o, k).
        scale: a number.
        orientation: "linear"; "fan_in_fan_out" (GPT-2's Conv1D) or "embedding", whose factors PEFT holds transposed.
        dtype: of the written factors.
    """

    a: np.ndarray
    b: np.ndarray
    scale: float = 1.0
    orientation: str = LINEAR
    dtype: str = "float32"


def orientation(pair):
    """How PEFT stores a LoraPair's factors: a word of `Update.orientation`."""
    if ".lora_embedding_" in pair.a.name:
        return EMBEDDING
    return FAN_IN_FAN_OUT if pair.transposed else LINEAR


def rank_for(ranks):
    """The smallest rank a server can be set to that holds all updates.

    Args:
        ranks: layer -> rank.

    Raises:
        ConfigError: an update of more than 512; names it.
    """
    layer, most = max(ranks.items(), key=lambda item: item[1])
    if most > RANKS[-1]:
        raise errors.ConfigError(
            f"layer {errors.quote(layer)}: an update of rank {most}, servers take {RANKS[-1]} at most; "
            "fit fewer components, or write the exact layout"
        )
    return next(r for r in RANKS if r >= most)


def target_modules(layers, known=()):
    """Names for `target_modules`: those of the original adapter if they name these layers, else the layers' full names.

    Last words that are made up here could also stand for modules of the base that were never adapted.

    Args:
        layers: names of the adapted modules.
        known: the original's list; names in it that none of the layers has are left out.
    """
    used = [word for word in known if any(_is_named(layer, word) for layer in layers)]
    is_whole = all(any(_is_named(layer, word) for word in used) for layer in layers)
    return sorted(used if is_whole else layers)


def _is_named(layer, word):
    return layer == word or layer.endswith(f".{word}")


def write(folder, updates, *, fields=None, other=None):
    """Writes a LoRA folder in the portable layout: scale folded in, one rank padded with zeros, no patterns.

    Args:
        folder: made if missing.
        updates: layer -> Update of a matrix.
        fields: more of the configuration: base_model_name_or_path, task_type; the original's target_modules.
        other: name -> array of full values (saved modules, biases); they go into a file of their own beside the
            adapter, which programs do not load.

    Returns:
        dict: "r", and "other_tensors", the path of that file or None.

    Raises:
        ConfigError: no update, a convolution, or a rank over 512.
        InputError: values that are not finite, or that the dtype cannot hold.
    """
    if not updates:
        raise errors.ConfigError(f"{errors.quote(folder)}: no low-rank update to write")
    factors = {layer: _balanced(layer, update, folder) for layer, update in updates.items()}
    r = rank_for({layer: len(a) for layer, (a, _) in factors.items()})
    tensors = {}
    for layer, (a, b) in factors.items():
        one = updates[layer]
        dtype, middle = descriptors.numpy_dtype(one.dtype), "embedding_" if one.orientation == EMBEDDING else ""
        ends = ("A", "B") if middle else ("A.weight", "B.weight")
        room = r - len(a)
        padded = np.pad(a, ((0, room), (0, 0))), np.pad(b, ((0, 0), (0, room)))
        for end, array in zip(ends, padded, strict=True):
            key = f"{_peft.PREFIX}{layer}.lora_{middle}{end}"
            tensors[key] = _rewrite.rounded(array, dtype, folder, layer)
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        **(fields or {}),
        # Of a task with a head PEFT looks for the head among the adapter's own tensors, where servers want none.
        **({"task_type": None} if other else {}),
        "r": r,
        "lora_alpha": r,
        "target_modules": target_modules(updates, (fields or {}).get("target_modules", ())),
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": any(one.orientation == FAN_IN_FAN_OUT for one in updates.values()),
        "modules_to_save": None,
        "inference_mode": True,
    }
    faults = problems(config, {name: array.shape for name, array in tensors.items()})
    if faults:
        raise errors.ConfigError(f"{errors.quote(folder)}: servers would refuse it: {faults[0]}")
    _files.make_folder(folder)
    beside = os.path.join(folder, OTHER) if other else None
    if beside:
        safetensors.write(beside, other, {"format": "pt"})
    save(folder, config, tensors)
    return {"r": r, "other_tensors": beside}


def save(folder, config, tensors):
    """Writes the two files of a PEFT folder; the configuration last."""
    safetensors.write(os.path.join(folder, WEIGHTS), tensors, {"format": "pt"})
    text = json.dumps(config, indent=2, allow_nan=False).encode("utf-8") + b"\n"
    _files.write_atomic(os.path.join(folder, CONFIG), [text])


def _balanced(layer, update, folder):
    """(lora_A (r, in), lora_B (out, r)) of an Update, as PEFT orients them."""
    if np.ndim(update.a) != 2 or np.ndim(update.b) != 2:
        raise convolution(layer)
    try:
        a, b = _factors.balanced(update.a, update.b, update.scale)
    except ValueError as error:
        raise errors.InputError(folder, str(error), key=layer, rule="N1") from error
    return (a, b) if update.orientation == LINEAR else (b.T, a.T)


def convolution(layer):
    """What to raise for an update of a convolution, which servers do not take."""
    return errors.ConfigError(
        f"layer {errors.quote(layer)}: an update of a convolution has no place in the portable layout; "
        "write the exact one"
    )


def problems(config, shapes, max_rank=RANKS[-1]):
    """What vLLM refuses in an adapter, or would read with another scale, one sentence each; nothing is an empty list.

    Source: vllm/lora/peft_helper.py and parse_fine_tuned_lora_name of vllm/lora/utils.py (0.26). It reads r,
    lora_alpha, target_modules, bias, modules_to_save, use_rslora and use_dora, and has no patterns: one scale for all.

    Args:
        config: the mapping in adapter_config.json.
        shapes: key -> shape of the tensors beside it.
        max_rank: the server's --max-lora-rank.
    """
    found = [f"{key} is missing" for key in ("r", "lora_alpha", "target_modules") if not config.get(key)]
    r = config.get("r") or 0
    if r > max_rank:
        found.append(f"r is {r}, more than {max_rank}")
    if config.get("bias", "none") != "none":
        found.append(f"bias is {errors.quote(config['bias'], 40)}, none is taken")
    found += [f"{key} is set" for key in ("modules_to_save", "use_dora", "lora_bias") if config.get(key)]
    found += [f"{key} is not read: its layers get another scale" for key in _PATTERNS if config.get(key)]
    for key, shape in shapes.items():
        match = _KEY.fullmatch(key)
        if match is None or len(shape) != 2:
            found.append(f"{errors.quote(key)} is an unsupported LoRA weight")
            continue
        rank = shape[0] if (match["side"] or match["other"]) == "A" else shape[1]
        if rank != r:
            found.append(f"{errors.quote(key)} has rank {rank}, not {r}: its scale is another")
    return found


_PATTERNS = ("rank_pattern", "alpha_pattern")
