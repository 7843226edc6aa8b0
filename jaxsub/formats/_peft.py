"""What adapter_config.json means for the tensors beside it: pairs, scales and orientations of LoRA in PEFT.

    Delta-W = s * B @ A,   s = alpha / r,  or alpha / sqrt(r) with use_rslora

`r` and `alpha` may differ by module (rank_pattern, alpha_pattern); `r` must be that of the tensors. Everything here
follows from names, shapes and the configuration, so it is worked out once for all files that share them.
"""

import dataclasses
import json
import math

from jaxsub import descriptors, errors
from jaxsub.formats import _factors, _json, _names, _patterns

PREFIX = "base_model.model."
_SWITCHES = {  # field -> what to do when it is set
    "use_dora": "DoRA needs the base weights: merge the adapter and give the merged model",
    "lora_bias": "it also changes biases: merge the adapter and give the merged model",
    "target_parameters": "it adapts parameters of experts: merge the adapter and give the merged model",
    "layer_replication": "it adapts copies of layers: merge the adapter and give the merged model",
    "trainable_token_indices": "it replaces rows of the embedding: merge the adapter and give the merged model",
} | {
    name: "only plain LoRA is read: merge the adapter and give the merged model"
    for name in ("use_qalora", "use_bdlora", "alora_invocation_tokens", "kasa_config", "arrow_config")
    + ("velora_config", "monteclora_config")
}
_SAVE_AGAIN = "save the adapter again with PEFT"
_CHANGED_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
_KNOWN = frozenset(
    """peft_type r lora_alpha use_rslora rank_pattern alpha_pattern fan_in_fan_out target_modules bias task_type
    base_model_name_or_path init_lora_weights modules_to_save auto_mapping peft_version revision inference_mode
    exclude_modules lora_dropout layers_to_transform layers_pattern megatron_config megatron_core loftq_config
    eva_config corda_config lora_ga_config qalora_group_size ensure_weight_tying runtime_config""".split()
) | set(_SWITCHES)
_FOREIGN = (
    "lora_",
    "hada_",
    "lokr_",
    "vera_",
    "token_adapter",
    "tinylora_",
    "randlora_",
    "vblora_",
    "oft_",
    "ia3_",
    "ranknum",
)


@dataclasses.dataclass(frozen=True, slots=True)
class Config:
    """The checked configuration."""

    r: int
    alpha: float
    use_rslora: bool
    transposed: bool
    rank_pattern: dict
    alpha_pattern: dict
    targets: tuple | None
    metadata: dict
    unknown: tuple


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """What becomes of the tensors of a file, by their position in it.

    Attributes:
        pairs: (layer, position of A, position of B, scale, shape of Delta-W, transposed).
        plain: (position, name) of tensors that are full values.
        skipped: name -> reason.
        warnings, metadata: for the Model.
    """

    pairs: tuple
    plain: tuple
    skipped: dict
    warnings: tuple
    metadata: dict


def parse(data, path, others=()):
    """The Config in the bytes of an adapter_config.json; None for one of a `peft_type` in `others`.

    Raises:
        InputError: no LoRA of the plain kind, a wrong type, a number that is none (rule H13).
    """
    fields = _json.parse(data, path, rule="H13")
    if not isinstance(fields, dict):
        raise _refuse(path, None, "is no JSON object")
    return None if fields.get("peft_type") in others else configure(fields, path)


def configure(fields, path):
    """The Config of fields as PEFT names them; raises as `parse`."""
    kind = fields.get("peft_type")
    if kind != "LORA":
        raise _refuse(
            path, "peft_type", f"is {errors.quote(kind, 40)}, not LORA", "only LoRA adapters are read: merge it"
        )
    for name, cure in _SWITCHES.items():
        if fields.get(name):
            raise _refuse(path, name, "is set", cure)
    start = fields.get("init_lora_weights")
    for name, kinds in (("init_lora_weights", (bool, str)), ("bias", str)):
        if fields.get(name) is not None and not isinstance(fields[name], kinds):
            raise _refuse(path, name, f"is {errors.quote(repr(fields[name]), 40)}, which PEFT does not write")
    if isinstance(start, str) and start.lower().startswith(_CHANGED_BASE):
        cure = "convert it with PEFT (save_pretrained with path_initial_model_for_weight_conversion)"
        raise _refuse(
            path, "init_lora_weights", f"is {errors.quote(start, 40)}: the base weights were changed too", cure
        )
    return Config(
        r=_number(fields, "r", path, int),
        alpha=float(_number(fields, "lora_alpha", path, (int, float))),
        use_rslora=_flag(fields, "use_rslora", path),
        transposed=_flag(fields, "fan_in_fan_out", path),
        rank_pattern=_pattern(fields, "rank_pattern", path, int),
        alpha_pattern=_pattern(fields, "alpha_pattern", path, (int, float)),
        targets=_targets(fields.get("target_modules"), path),
        metadata=_metadata(fields, path),
        unknown=tuple(sorted(name for name, value in fields.items() if value and name not in _KNOWN)),
    )


def _refuse(path, key, reason, hint="correct the configuration, or save the adapter again with PEFT"):
    return errors.InputError(path, reason, key=key, hint=hint, rule="H13")


def _number(fields, name, path, kinds):
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise _refuse(path, name, f"is {errors.quote(repr(value), 40)}, a number was expected")
    if kinds is int and value < 1:
        raise _refuse(path, name, f"is {value}, at least 1 was expected")
    return value


def _flag(fields, name, path):
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise _refuse(path, name, f"is {errors.quote(repr(value), 40)}, true or false was expected")
    return bool(value)


def _pattern(fields, name, path, kinds):
    value = fields.get(name)
    if value is not None and not isinstance(value, dict):
        raise _refuse(path, name, f"is {errors.quote(value, 40)}, a table was expected")
    return {key: _number(value, key, path, kinds) for key in value or {}}


def _targets(value, path):
    if value is None or isinstance(value, str):  # one text is a regular expression over the base model's modules
        return None
    if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
        raise _refuse(path, "target_modules", "is neither a text nor a list of texts")
    return tuple(value)


def _metadata(fields, path):
    found = {"r": str(fields.get("r"))}
    for name in ("base_model_name_or_path", "task_type"):
        value = fields.get(name)
        if value is not None and not isinstance(value, str):
            raise _refuse(path, name, f"is {errors.quote(value, 40)}, a text was expected")
        if value:
            found[name] = value
    is_plain = not any(fields.get(name) for name in ("layers_to_transform", "layers_pattern", "exclude_modules"))
    targets = fields.get("target_modules")
    # Always set: what the weights' own header says under this name is not meant.
    found["target_modules"] = json.dumps(targets if is_plain and isinstance(targets, list) else [])
    return found


def plan(config, content, path):
    """The Plan for the tensors of `content` (a Content) under `config`; `path` is that of the configuration.

    Raises:
        InputError: factors without partner, ranks that differ from the configuration, variants that are no LoRA.
    """
    file = content.file.path
    factors, plain = sort(enumerate(content.tensors), file, PREFIX)
    if not factors:
        raise errors.InputError(file, "holds no LoRA factors", hint="is this the adapter's file?", rule="H13")
    pairs, warnings = place(config, partners(factors, content.tensors, file), path, "adapter_config.json")
    skipped = {name: reason for _, name in plain if (reason := _names.not_a_weight(name))}
    return Plan(pairs, tuple(plain), skipped, warnings, config.metadata)


def place(config, found, path, where):
    """(entries of `Plan.pairs`, warnings) of the factors `found` under a Config.

    Args:
        config: a Config.
        found: what `partners` gives, by the name that patterns and targets are about.
        path: of the configuration, for messages.
        where: what a user calls the configuration.

    Raises:
        InputError: ranks that differ from the configuration, targets without factors.
    """
    ranks = _patterns.table(config.rank_pattern, found, path, "rank_pattern")
    alphas = _patterns.table(config.alpha_pattern, found, path, "alpha_pattern")
    pairs = []
    for layer, factors in found.items():
        r, alpha = ranks.get(layer, config.r), float(alphas.get(layer, config.alpha))
        if factors.rank != r:
            reason = f"says rank {r} for {errors.quote(layer)}, the tensors have {factors.rank}"
            raise _refuse(path, "rank_pattern" if layer in ranks else "r", reason)
        scale = alpha / math.sqrt(r) if config.use_rslora else alpha / r
        if not _factors.is_usual(scale):
            raise _refuse(path, "lora_alpha", f"makes a scale of {scale:.3g} for {errors.quote(layer)}")
        transposed = factors.embedding or (config.transposed and len(factors.shape) == 2)
        pairs.append(entry(layer, factors, scale, transposed))
    warnings = [*_target_faults(config, found, path)]
    if config.unknown:
        shown = ", ".join(errors.quote(n, 40) for n in config.unknown[:5])
        warnings.append(f"{where} sets {shown}, unknown here and not applied")
    return tuple(pairs), tuple(warnings)


def entry(layer, factors, scale, transposed=False):
    """One entry of `Plan.pairs`."""
    shape = factors.shape[::-1] if transposed else factors.shape
    return (layer, factors.a, factors.b, scale, shape, transposed)


def sort(numbered, file, prefix=""):
    """({layer: {'A': position, 'B': position, ...}}, [(position, name) of the other tensors]), without the prefix."""
    factors, plain = {}, []
    for position, tensor in numbered:
        if not tensor.name.startswith(prefix):
            hint = "save the adapter again with PEFT"
            raise errors.InputError(file, f"does not start with {prefix}", key=tensor.name, hint=hint, rule="H13")
        name = tensor.name[len(prefix) :]
        layer, side, embedding = split(name)
        if layer is None:
            if any(f".{mark}" in f".{name}" for mark in _FOREIGN):
                cure = "only plain LoRA is read: merge the adapter and give the merged model"
                raise errors.InputError(
                    file, "belongs to another kind of adapter", key=tensor.name, hint=cure, rule="H13"
                )
            plain.append((position, name))
            continue
        sides = factors.setdefault(layer, {})
        side = f"lora_{side}"
        if side in sides or sides.setdefault("embedding", embedding) != embedding:
            raise errors.InputError(file, "has a factor twice", key=layer, hint="save one adapter a file", rule="H13")
        sides[side] = position
    return factors, plain


def split(name):
    """(layer, 'A' or 'B', embedding?) of a factor's key, or (None, '', False).

    The adapter's own name may have been left in the key: `.lora_A.default.weight`.
    """
    for side in "AB":
        layer, mark, rest = name.rpartition(f".lora_{side}.")
        if mark and layer and (rest == "weight" or (rest.endswith(".weight") and rest.count(".") == 1)):
            return layer, side, False
        layer, mark, rest = name.rpartition(f".lora_embedding_{side}")
        if mark and layer and (not rest or (rest[0] == "." and rest.count(".") == 1 and len(rest) > 1)):
            return layer, side, True
    return None, "", False


def partners(factors, tensors, file):
    """layer -> Factors, for factors as `sort` gives them.

    Raises:
        InputError: a factor without its partner, shapes that do not fit each other.
    """
    found = {}
    for layer, sides in factors.items():
        embedding = sides.pop("embedding")
        found[layer] = _factors.partners(layer, sides, tensors, file, ("lora_A", "lora_B"), _SAVE_AGAIN, embedding)
    return found


def _target_faults(config, layers, path):
    """Refuses targets that have nothing to do with the file; yields warnings about some, and layers that are no target.

    One list for several architectures is common: PEFT keeps what a model has no module for.
    """
    if config.targets is None:
        return
    wanted, missing, strangers = set(config.targets), set(config.targets), []
    for layer in layers:
        parts = layer.split(".")
        endings = {".".join(parts[i:]) for i in range(max(0, len(parts) - 32), len(parts))} | {layer}
        missing -= endings
        if not endings & wanted:
            strangers.append(layer)
    name = min(missing, default="")
    if missing and len(missing) == len(wanted):
        raise _refuse(path, "target_modules", f"lists {errors.quote(name)!r}, and the file has no factors for it")
    if missing:
        yield f"target_modules lists {errors.quote(name)}, and the file has no factors for it"
    if strangers:
        yield f"{len(strangers)} adapted modules are not in target_modules, the first is {errors.quote(strangers[0])}"


def pair(tensors, entry):
    """(layer, LoraPair) for one entry of `Plan.pairs`."""
    layer, a, b, scale, shape, transposed = entry
    return layer, descriptors.LoraPair(tensors[a], tensors[b], scale, shape, transposed)
