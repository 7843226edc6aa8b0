"""Rules on tensor names that all readers share: what refuses a model, and what is not a weight."""

import re

from jaxsub import errors

MAX_NAME = 512  # characters; longer names are an attack on file names and terminals
MAX_TENSORS = 250_000  # a file with more is refused rather than read for minutes
# C0 and C1 controls, line separators, and the characters that reorder text on a screen.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_LAST = re.compile(r"[^./]+$")

_BUFFERS = {
    "num_batches_tracked": "a counter of batch norm, not a weight",
    "running_mean": "a running statistic of batch norm, not a weight",
    "running_var": "a running statistic of batch norm, not a weight",
    "moving_mean:0": "a running statistic of batch norm, not a weight",
    "moving_variance:0": "a running statistic of batch norm, not a weight",
    "moving_mean": "a running statistic of batch norm, not a weight",
    "moving_variance": "a running statistic of batch norm, not a weight",
    "inv_freq": "a fixed rotary frequency, not a weight",
    "position_ids": "a fixed index, not a weight",
    "masked_bias": "a fixed attention mask, not a weight",
}
_TOP = {
    **dict.fromkeys(
        ("optimizer", "optimizer_state_dict", "optimizer_states", "optimizer_weights", "opt_state"),
        "optimiser state, not a weight",
    ),
    **dict.fromkeys(
        ("scheduler", "lr_scheduler", "lr_schedulers", "scheduler_state_dict"), "learning rate schedule, not a weight"
    ),
    "batch_stats": "a running statistic of batch norm, not a weight",
}
_QUANTISED = re.compile(
    r"(^|[./])(qweight|qzeros|g_idx|absmax|nested_absmax|quant_map|nested_quant_map|quant_state[^/]*|SCB|CB|"
    r"weight_scale_inv|weight_scale|weight_packed|weight_format)$"
)

_FACTOR = re.compile(
    r"(^|[._/])(lora_(A|B|a|b|down|up|mid|embedding_A|embedding_B|magnitude_vector)|hada_[wt][12]|lokr_[wt][12]|"
    r"lora_linear_layer|vera_lambda_[bd]|vera_[AB]|ia3_l|dora_scale|oft_blocks|oft_diag|boft_[RS])"
    r"(_[ab])?([._/]|$)|[._/]lora[._/](up|down|a|b|A|B)([._/]|$)"
)


def check(name, file):
    """Refuses a tensor name that could forge a log line, reorder text or break a file name (rule H16)."""
    if not name:
        raise errors.InputError(
            file, "a tensor has an empty name", key=name, hint="rename it and save again", rule="H16"
        )
    if len(name) > MAX_NAME:
        reason = f"a tensor's name has {len(name)} characters, more than {MAX_NAME}"
        raise errors.InputError(file, reason, key=name, hint="rename it and save again", rule="H16")
    if not name.isascii() or not name.isprintable():
        bad = _UNSAFE.search(name)
        if bad:
            reason = f"a tensor's name holds the control character U+{ord(bad[0]):04X}"
            raise errors.InputError(file, reason, key=name, hint="rename it and save again", rule="H16")


def check_count(num_tensors, file):
    """Refuses more than MAX_TENSORS tensors in one file (rule H19)."""
    if num_tensors > MAX_TENSORS:
        raise errors.InputError(
            file,
            f"holds {num_tensors} tensors, more than {MAX_TENSORS}",
            hint="split the model into shards",
            rule="H19",
        )


def check_not_quantised(name, file):
    """Refuses the companions of quantised weights: their codes are not weights."""
    if _QUANTISED.search(name):
        raise errors.InputError(
            file,
            "belongs to quantised weights, which are codes and not numbers",
            key=name,
            hint="use the model before quantisation",
            rule="H6",
        )


def check_no_factor(name, file):
    """Refuses a LoRA factor among plain tensors: without its partner and its scale it means nothing."""
    if _FACTOR.search(name):
        raise errors.InputError(
            file,
            "is a factor of an adapter, and its scale is not given in a way that is read",
            key=name,
            hint="give a PEFT folder (adapter_config.json, adapter_model.safetensors), a .safetensors of kohya-ss or "
            "diffusers, or merge the adapter",
            rule="H13",
        )


def not_a_weight(name):
    """Why the tensor of this name is not a weight, or None."""
    reason = _BUFFERS.get(_LAST.search(name)[0]) if name[-1] not in "./" else None
    return reason or _TOP.get(re.split(r"[./]", name, maxsplit=1)[0])
