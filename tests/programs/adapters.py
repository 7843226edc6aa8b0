"""Collections of adapters that PEFT itself trained the configuration of, and what PEFT makes of folders."""

import warnings

import numpy as np


def linear_base(torch):
    """Two blocks of two Linear layers, one square."""
    block = lambda: torch.nn.ModuleDict(  # noqa: E731
        {"v": torch.nn.Linear(12, 7, bias=False), "q": torch.nn.Linear(12, 12, bias=False)}
    )
    return torch.nn.ModuleDict({"blocks": torch.nn.ModuleDict({n: block() for n in "01"})})


def gpt2_base(torch):
    """A GPT-2 of two blocks: Conv1D layers, one square, and an embedding."""
    transformers = __import__("transformers")
    config = transformers.GPT2Config(
        n_layer=2, n_embd=8, n_head=2, vocab_size=20, n_positions=6, tie_word_embeddings=False
    )
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config)


BASES = {"linear": (linear_base, ["q", "v"]), "gpt2": (gpt2_base, ["c_attn", "attn.c_proj", "wte"])}
FIRST = {"linear": "q", "gpt2": "c_attn"}
RULES = {
    "plain": {"r": 2, "lora_alpha": 6},
    "rslora": {"r": 3, "lora_alpha": 5, "use_rslora": True},
    "ranks": {"r": 2, "lora_alpha": 3, "rank_pattern": 4},
    "alphas": {"r": 2, "lora_alpha": 3, "alpha_pattern": 7},
    "all": {"r": 1, "lora_alpha": 2, "use_rslora": True, "rank_pattern": 3, "alpha_pattern": 5},
}


def collection(folder, family, torch, library):
    """Saves one adapter a rule; id -> {layer: Delta-W by PEFT}."""
    make, targets = BASES[family]
    found = {}
    for number, (name, rule) in enumerate(RULES.items()):
        patterns = {k: {FIRST[family]: v} for k, v in rule.items() if k.endswith("pattern")}
        base = make(torch)
        torch.manual_seed(number)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Conv1D and Linear in one model: PEFT says that it sets fan_in_fan_out
            config = library.LoraConfig(**{**rule, **patterns}, target_modules=targets, init_lora_weights=False)
            model = library.get_peft_model(base, config)
            model.save_pretrained(folder / name, save_embedding_layers=False)
        found[name] = deltas(model)
    return found


def load(folder, family, torch, library):
    """The PeftModel of a folder on a fresh base; a key that is missing or left over is a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")
        return library.PeftModel.from_pretrained(BASES[family][0](torch), str(folder))


def deltas(model):
    """{layer: Delta-W} of the adapted modules of a PeftModel."""
    found = {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight"):
            found[name] = module.get_delta_weight("default").detach().numpy().astype(np.float64)
    return found


def relative(found, wanted):
    """Distance of two arrays, relative to the norm of the second."""
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
