"""A report dictionary of any size with plausible figures, and the names that attack whoever prints them."""

import numpy as np
import pytest

HOSTILE = [
    '"><script>alert(1)</script>',
    "'><img src=x onerror=alert(1)>",
    "</title></style></svg><h1>x</h1>",
    "javascript:alert(1)",
    "a" * 500,
    "\u202egnp.live\u2066\x00\x1b[31m\r\n\t",
    "\ud800 lone surrogate \u2028\u2029\ufeff\u200b",
    "{{7*7}}${7*7}<%= 7 %>",
    "Z" + "\u0301" * 40,
    "&lt;b&gt; &amp; ]]> <!-- -->",
    "日本語.重み",
]


def _figures(values, scale=1.0):
    energy = np.cumsum(np.square(values)) / np.sum(np.square(values))
    shares = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
    ks = [k for k in (1, 2, 4, 8, 16, 32) if k <= len(values) - 1]
    return {
        "singular_values": list(map(float, values)),
        "rank_at": {f"{share:g}": int(np.searchsorted(energy, share - 1e-12) + 1) for share in shares},
        "energy_at": {str(k): float(energy[k - 1]) for k in (1, 4, 8, 16, 32, 64) if k <= len(values)},
        "held_out": {str(k): float(1 - scale * energy[k - 1]) for k in ks},
    }


def make_layer(name="fc1/kernel", num_models=40, verdict="lineage+shared", slope=0.8, full=True):
    """One layer; `full` adds every optional part."""
    i = np.arange(1, num_models)
    layer = {
        "name": name,
        "shape": [64, 32],
        "parametrisation": "dense",
        "num_models": num_models,
        "num_features": 2048,
        "mean_energy": 0.4712,
        "mean_energy_chance": 1 / num_models,
        "floor": 1e-6,
        "lineage_energy": None,
        "lineage_energy_chance": None,
        "held_out_within": None,
        "held_out_lineage": None,
        "modes": [],
        "effective_rank": {},
        "mp_count": 5,
        "nulls": {},
        "verdict": verdict,
        "why": "8 components of the others explain 41.0% of an unseen model against 0.4%",
        "flags": [],
        **_figures(5 * i**-slope, 0.7),
    }
    if not full:
        return layer
    null = _figures(1.5 * np.sqrt(1 - 0.5 * i / num_models), 0.02)
    spread = dict.fromkeys(null["held_out"], 0.002)
    null |= {"draws": 20, "mean_energy": 1 / num_models, "held_out_sd": spread}
    null |= {"singular_values_sd": [0.01] * len(i), "held_out_within": null["held_out"], "held_out_within_sd": spread}
    mode = {"axis": 0, "size": 64, "centred": True, "sketched": {"columns": 512}}
    mode |= {"rank_at": layer["rank_at"], "energy_at": layer["energy_at"]}
    return layer | {
        "lineage_energy": 0.71,
        "lineage_energy_chance": 0.03,
        "held_out_within": {k: min(1.0, v + 0.2) for k, v in layer["held_out"].items()},
        "held_out_lineage": dict.fromkeys(layer["held_out"], 1.01),
        "modes": [mode, mode | {"axis": 1, "size": 32}],
        "effective_rank": {"stable_rank": 4.2},
        "nulls": {"permutation": null, "gaussian": null},
        "stability": {"1": {"overlap": 0.9, "low": 0.8, "high": 0.95, "chance": 0.001}},
        "uncentred_singular_values": [9.0, *layer["singular_values"]],
        "compute_dtype": "float32",
        "flags": ["one_lineage", "unheard_of"],
        "warnings": ["2 models are zero in this layer"],
    }


def make_report(layers, num_models=40, full=True):
    """A report around `layers`; `full` adds every optional part of the collection."""
    ids = [f"run/{i:03d}" for i in range(num_models)]
    collection = {
        "num_models": num_models + 2,
        "num_distinct": num_models,
        "models": [{"id": i, "path": f"{i}.npz", "format": "npz"} for i in ids],
        "duplicates": [],
        "near_duplicates": [],
        "lineages": [],
        "quarantined": [],
    }
    if full:
        same = np.arange(num_models)[:, None] // 10 == np.arange(num_models) // 10
        collection |= {
            "duplicates": [[ids[0], "copy/a", "copy/b"]],
            "near_duplicates": [[ids[1], ids[2], 0.9961]],
            "lineages": [ids[:10], ids[10:20]],
            "quarantined": [{"id": "broken", "layer": None, "reason": "cut short"}],
            "skipped_layers": [{"name": "head", "shape": [3], "num_models": 2, "reason": "fewer than 3 models"}],
            "identical_layers": ["embed"],
            "untrained": [ids[3]],
            "lora_starts": [ids[4:6]],
            "warnings": ["something to know"],
            "lineage_threshold": 0.12,
            "lineage_threshold_chance": 0.01,
            "cosine": {"ids": ids, "order": list(range(num_models)), "matrix": np.where(same, 0.6, 0.0).tolist()},
        }
    provenance = {"command": ["jaxsub", "analyze"], "config": {"seed": 0}, "seconds": {"total": 1.5}, "seed": 0}
    return {"schema": "jaxsub.report/1", "provenance": provenance, "collection": collection, "layers": layers}


def make_hostile():
    """A report in which every text that comes from models carries an attack."""
    report = make_report([make_layer(name) for name in HOSTILE])
    for text, layer in zip(HOSTILE, report["layers"], strict=True):
        layer |= {"why": text, "flags": [text], "warnings": [text], "compute_dtype": text, "parametrisation": text}
        layer |= {"effective_rank": {text: 1.0}, "nulls": {text: layer["nulls"]["gaussian"]}}
    collection = report["collection"]
    collection |= {
        "duplicates": [HOSTILE],
        "near_duplicates": [[a, b, 0.999] for a, b in zip(HOSTILE, HOSTILE[1:], strict=False)],
        "lineages": [HOSTILE],
        "quarantined": [{"id": text, "layer": text, "reason": text} for text in HOSTILE],
        "skipped_layers": [{"name": t, "shape": [1], "num_models": 1, "reason": t} for t in HOSTILE],
        "identical_layers": HOSTILE,
        "untrained": HOSTILE,
        "lora_starts": [HOSTILE],
        "warnings": HOSTILE,
        "summary": HOSTILE[0],
        "name": HOSTILE[2],
    }
    collection["cosine"]["ids"] = (HOSTILE * 4)[: len(collection["cosine"]["ids"])]
    report["layers"][0]["verdict"] = HOSTILE[0]
    report["provenance"] = {"command": HOSTILE, "config": {text: text for text in HOSTILE}, HOSTILE[0]: HOSTILE[1]}
    return report


@pytest.fixture
def layer():
    """`make_layer`."""
    return make_layer


@pytest.fixture
def report():
    """`make_report`."""
    return make_report


@pytest.fixture
def hostile():
    """`make_hostile()`."""
    return make_hostile()


@pytest.fixture
def hostile_names():
    """The attacking names."""
    return list(HOSTILE)
