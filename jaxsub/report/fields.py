"""The report dictionary with every optional part filled in, and the few figures derived from it.

The only place that knows what may be missing: everything that draws or prints reads plain keys. A figure that is
not finite, or not there, is None from here on.
"""

import math
from collections.abc import Mapping

_LAYER = {
    "parametrisation": "dense",
    "num_models": None,
    "num_distinct": None,
    "num_features": None,
    "mean_energy": None,
    "mean_energy_chance": None,
    "singular_values": [],
    "uncentred_singular_values": [],
    "floor": None,
    "rank_at": {},
    "energy_at": {},
    "held_out": {},
    "held_out_within": {},
    "held_out_lineage": {},
    "own_lineages": [],
    "lineage_energy": None,
    "lineage_energy_chance": None,
    "modes": [],
    "effective_rank": {},
    "mp_count": None,
    "nulls": {},
    "stability": {},
    "storage_dtype": None,
    "compute_dtype": None,
    "total_energy": None,
    "deciding_rank": None,
    "gain": None,
    "gain_within": None,
    "verdict": "undetermined",
    "why": "",
    "flags": [],
    "warnings": [],
}
_NULL = {
    "draws": None,
    "drawn_as": "",
    "mean_energy": None,
    "rank_at": {},
    "energy_at": {},
    "held_out": {},
    "held_out_sd": {},
    "held_out_within": {},
    "held_out_within_sd": {},
    "singular_values": [],
    "singular_values_sd": [],
}
_MODE = {"size": None, "rank_at": {}, "energy_at": {}, "sketched": False, "centred": None}
_COLLECTION = {
    "name": "",
    "num_models": None,
    "num_distinct": None,
    "models": [],
    "duplicates": [],
    "near_duplicates": [],
    "lineages": [],
    "quarantined": [],
    "groups": [],
    "skipped_layers": [],
    "identical_layers": [],
    "untrained": [],
    "lora_starts": [],
    "warnings": [],
    "lineage_threshold": None,
    "lineage_threshold_chance": None,
    "cosine": None,
    "summary": "",
}
_REPORT = {"schema": "", "provenance": {}, "collection": {}, "layers": []}


def complete(report):
    """A copy of `report` (a report.json dictionary) in which every optional key is present.

    Missing and null parts take the empty value of their kind; figures that are not finite become None.
    """
    report = _filled(_finite(report), _REPORT)
    report["collection"] = _filled(report["collection"], _COLLECTION)
    report["layers"] = [_complete_layer(layer) for layer in report["layers"]]
    return report


def _complete_layer(layer):
    layer = _filled(layer, _LAYER)
    layer["modes"] = [_filled(mode, _MODE) for mode in layer["modes"]]
    layer["nulls"] = {name: _filled(null, _NULL) for name, null in layer["nulls"].items()}
    return layer


def _filled(given, defaults):
    return {**defaults, **{key: value for key, value in given.items() if value is not None or key not in defaults}}


def _finite(value):
    """`value` in plain Python types, with NaN and infinities as None."""
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if hasattr(value, "tolist"):  # numpy scalars and arrays
        return _finite(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value)


def models_used(layer):
    """N: the distinct models behind the layer's figures, or None."""
    return layer["num_models"] if layer["num_distinct"] is None else layer["num_distinct"]


def deciding_rank(layer):
    """The k that the verdict looks at: as reported, else the largest of 1, 2, 4, 8, 16 not above (N - 2) / 2."""
    if layer["deciding_rank"] is not None:
        return layer["deciding_rank"]
    half = ((models_used(layer) or 0) - 2) / 2
    fitting = [k for k in (1, 2, 4, 8, 16) if k <= half and str(k) in layer["held_out"]]
    return max(fitting, default=None)


def deciding_null(layer):
    """(name, figures) of the null that decided: as reported, else permutation, else the first; empty without nulls."""
    nulls, named = layer["nulls"], (layer["gain"] or {}).get("null_name")
    name = next((n for n in (named, "permutation", *nulls) if n in nulls), "")
    return name, nulls[name] if name else dict(_NULL)


def within_null(layer):
    """(name, figures) of the null for the held-out errors within lineages; an empty one where there is none."""
    nulls, named = layer["nulls"], (layer["gain_within"] or {}).get("null_name")
    name = next((n for n in (named, *nulls) if n in nulls and nulls[n]["held_out_within"]), "")
    return name, nulls[name] if name else dict(_NULL)


def gains(layer):
    """(gain, null gain, sd of the null gain) at the deciding k; each None where unknown. gain = 1 - LOO(k)."""
    k = str(deciding_rank(layer))
    null = deciding_null(layer)[1]
    return _gain(layer["held_out"], k), _gain(null["held_out"], k), null["held_out_sd"].get(k)


def errors(layer):
    """(LOO(k), the null's) at the deciding k; each None where unknown."""
    k = str(deciding_rank(layer))
    return layer["held_out"].get(k), deciding_null(layer)[1]["held_out"].get(k)


def _gain(held_out, k):
    error = held_out.get(k)
    return None if error is None else 1 - error


def one_rank(layers):
    """The deciding k if all layers that have one have the same, else None."""
    ranks = {deciding_rank(layer) for layer in layers} - {None}
    return ranks.pop() if len(ranks) == 1 else None


def verdict_counts(layers, order):
    """[(verdict, number of layers)] for the verdicts that occur, those named in `order` first."""
    found = [layer["verdict"] for layer in layers]
    names = [name for name in order if name in found]
    names += sorted(set(found) - set(names))
    return [(name, found.count(name)) for name in names]


def by_count(figures):
    """[(k, value)] of a dictionary keyed by numbers as text, in increasing order, unknown values left out."""
    return sorted((float(key), value) for key, value in figures.items() if value is not None)
