"""What a manifest must say before anything is made of it: types, ranges, ranks of what lies beside it, room for it.

A bundle may be someone else's making: its hashes are right, and what it says is not. Misfits are ValueError, TypeError
or KeyError, which `files.load` turns into one InputError.
"""

import math

import numpy as np

from jaxsub import descriptors, errors, hostmemory, lineup, subspace
from jaxsub.bundle import storage

KINDS, PARAMETRISATIONS = ("linear", "tucker"), (lineup.DENSE, lineup.LORA)
MAX_DIMS, MAX_DIM = 32, 2**48 - 1  # as the tensor files have them


def require_fields(manifest):
    """Every field that is read later is of its type, and in its range."""
    originals = manifest["originals"]
    _require(_are(originals, _is_count) and len(originals) == len(manifest["models"]), "originals")
    _require(isinstance(manifest["provenance"], dict), "provenance")
    _require(_are(manifest["provenance"].get("models", []), lambda value: isinstance(value, dict)), "provenance")
    for record in manifest["layers"]:
        for name in ("name", "kind", "parametrisation", "orientation", "file"):
            _require(isinstance(record[name], str), name)
        _require(record["kind"] in KINDS and record["parametrisation"] in PARAMETRISATIONS, "kind")
        shape, dtypes = record["shape"], record["dtypes"]
        _require(
            _are(shape, lambda value: _is_count(value) and 0 < value <= MAX_DIM) and len(shape) <= MAX_DIMS, "shape"
        )
        _require(_are([dtypes] if isinstance(dtypes, str) else dtypes, _is_float), "dtypes")
        _require(len(record["storage"]) == 2 and _are(record["storage"], storage.DTYPES.__contains__), "storage")
        _procedure(record["procedure"])
        certificate = record["certificate"]
        _require(_are([*certificate.values()], _is_measure), "certificate")
        for spectrum in record["spectra"].values():
            total, floor = spectrum["total_energy"], spectrum["floor"]
            _require((total is None or _is_measure(total)) and _is_measure(floor), "spectra")
        for name, value in record["figures"].items():
            values = value if isinstance(value, list) else [value]
            is_so = all(v is None or isinstance(v, str) or _is_number(v) for v in values)
            _require(is_so and (name not in ("error_mean", "error_max", "energy_kept") or _is_number(value)), "figures")


def _procedure(said):
    _require(_are([said["name"], said.get("reference", "")], lambda value: isinstance(value, str)), "procedure")
    _require(said["centring"] in subspace.CENTRINGS and _is_count(said["cap"]), "procedure")
    _require(_are([*said["axes"], *said.get("flags", [])], lambda value: isinstance(value, str)), "procedure")
    _require(_are([said.get("reached", True), said.get("faithful", False)], lambda v: isinstance(v, bool)), "procedure")


def _require(is_so, field):
    if not is_so:
        raise ValueError(f"its {field} are none")


def _are(values, rule):
    return isinstance(values, list) and all(map(rule, values))


def _is_count(value):
    return type(value) is int and value >= 0


def _is_number(value):
    return isinstance(value, int | float) and abs(value) < math.inf


def _is_measure(value):
    return _is_number(value) and value >= 0


def _is_float(name):
    return isinstance(name, str) and name.isidentifier() and descriptors.numpy_dtype(name).kind in "fV"


def require_ids(ids, known):
    """Refuses ids that are no text, or not those of `known`, each once."""
    if not all(isinstance(i, str) for i in ids) or len({*ids}) < len(ids) or not {*ids} <= {*known}:
        raise ValueError("models that are no distinct names of members")


def require_ranks(shape, record):
    """Refuses coefficients of another shape than (n, k...) with the ranks of the record."""
    wanted = [record["rank"]]
    if record["kind"] != "linear":
        sizes = lineup.flat_shape(record["shape"]) if record["parametrisation"] == lineup.LORA else record["shape"]
        wanted = [record["rank"].get(str(axis), size) for axis, size in enumerate(sizes)]
    if list(shape[1:]) != wanted:
        raise ValueError(f"coefficients of shape {shape}, ranks {wanted}")


def require_room(manifest, path):
    """Refuses what is larger in memory than on the disk, and than memory: unit factors, and cores kept as halves.

    Raises:
        ResourceError: naming the layer up to which it is too much.
    """
    wanted, free = 0, hostmemory.available()
    for record in manifest["layers"]:
        ranks = [] if record["kind"] == "linear" else [*record["rank"].values()]
        if not all(map(_is_count, ranks)):
            raise ValueError(f"ranks {ranks}")
        members = len(manifest["models"] if record["models"] is None else record["models"])
        wanted += 4 * (sum(k * k for k in ranks) + members * math.prod(ranks) * bool(ranks))
        if free and wanted > free:
            raise errors.ResourceError(
                f"{errors.quote(path)}: the layers up to {errors.quote(record['name'])} need {wanted >> 20} MiB, "
                f"{free >> 20} are free"
            )


def require_numbers(space, values, name):
    """Refuses a layer whose arrays are no floats, or hold NaN or Inf."""
    is_linear = isinstance(space, subspace.LinearSubspace)
    spectra = [space.spectrum] if is_linear else [*space.spectra.values()]
    arrays = [values, space.mean, *([space.basis] if is_linear else space.factors.values())]
    for array in map(np.asarray, (*arrays, *(s.values for s in spectra))):
        if array.dtype.kind != "f":
            raise ValueError(f"layer {errors.quote(name)} holds {array.dtype}")
        if not np.isfinite(array).all():
            raise ValueError(f"layer {errors.quote(name)} holds NaN or Inf")
    if any(np.ndim(s.values) != 1 for s in spectra):
        raise ValueError(f"layer {errors.quote(name)}: a spectrum that is none")
