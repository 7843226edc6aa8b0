"""The bundle's folder: written whole or not at all, read strictly, checked to the byte.

    manifest.json             what it is, who made it, every file with its size and sha256; written last
    layers/00000.safetensors  mean, basis (k, *shape) or factor_<axis> (k, d), singular_values
    coefficients.safetensors  number of the layer -> (n, k...); of low-rank updates also number.left, number.right
    corrections.safetensors   number of the layer .counts, .places, ...: what is kept of models beside coefficients
    passthrough.safetensors   tensors that no subspace covers, each distinct one once

8-bit arrays have <name>_scale beside them.

Names of layers and models are data: files are numbered, names stand in the manifest alone.
"""

import dataclasses
import hashlib
import json
import math
import os
import re

import jax
import numpy as np

from jaxsub import errors, lineup, subspace
from jaxsub.bundle import checks, cores, corrections, members, storage
from jaxsub.formats import _files, _json, safetensors

SCHEMA = "jaxsub.bundle/1"
MANIFEST, COEFFICIENTS = "manifest.json", "coefficients.safetensors"
CORRECTIONS, PASSTHROUGH = "corrections.safetensors", "passthrough.safetensors"
HASHED = 2**32  # bytes of a bundle that are hashed whenever it is loaded: seconds
MAX_MANIFEST = 2**28  # bytes; a larger one is refused unread
PADDED = 64  # bytes more of a manifest whose size would not settle: more than its numbers' digits can add
_NAME = re.compile(r"(layers/[0-9]{5,}|coefficients|corrections|passthrough)\.safetensors")
_MISFIT = (KeyError, TypeError, ValueError, AttributeError, IndexError)


def save(bundle, path):
    """See `Bundle.save`."""
    with _files.new_folder(path) as folder:
        os.mkdir(os.path.join(folder, "layers"))
        known = {}
        for name, tensors in _contents(bundle):
            file = os.path.join(folder, name)
            safetensors.write(file, tensors)
            known[name] = identity(file)
        _files.write_atomic(os.path.join(folder, MANIFEST), [_text(_manifest_of(bundle, known))])


def headers(bundle):
    """Bytes of a saved bundle that are no numbers: its manifest and the headers of its files. Nothing is written."""
    known = {
        name: {"bytes": safetensors.header_bytes(tensors) + _array_bytes(tensors), "sha256": "0" * 64}
        for name, tensors in _contents(bundle)
    }
    return _manifest_of(bundle, known)["bytes"]["headers"]


def _array_bytes(tensors):
    return sum(a.nbytes for a in tensors.values())


def _contents(bundle):
    """Yields (name, tensors) of each file but the manifest."""
    for number, layer in enumerate(bundle.layers):
        yield _layer_file(number), layer.tensors()
    found = {}
    for number, layer in enumerate(bundle.layers):
        found |= {f"{number:05d}{ending}": array for ending, array in layer.coefficient_tensors().items()}
    yield COEFFICIENTS, found
    kept = {}
    for number, layer in enumerate(bundle.layers):
        if layer.corrections is not None:
            kept |= {f"{number:05d}.{name}": array for name, array in layer.corrections.tensors().items()}
    if kept:
        yield CORRECTIONS, kept
    stored, _ = bundle.distinct()
    if stored:
        yield PASSTHROUGH, stored


def _layer_file(number):
    return f"layers/{number:05d}.safetensors"


def _manifest_of(bundle, known):
    """The manifest of files {name: {"bytes", "sha256"}}, which states its own size among the rest."""
    arrays = sum(_array_bytes(tensors) for _, tensors in _contents(bundle))
    other = sum(f["bytes"] for f in known.values()) - arrays
    manifest = {
        "schema": SCHEMA,
        "models": list(bundle.model_ids),
        "layers": [{**_record(layer, bundle), "file": _layer_file(i)} for i, layer in enumerate(bundle.layers)],
        "passthrough": {m: names for m, names in bundle.distinct()[1].items() if names},
        "originals": [bundle.originals[m] for m in bundle.model_ids],
        "bytes": {},
        "provenance": bundle.provenance,
        "members": members.packed(bundle.provenance.get("models"), bundle.model_ids),
        "files": known,
        "sha256": "0" * 64,
    }
    if manifest["members"] is not None:
        manifest["provenance"] = {name: v for name, v in bundle.provenance.items() if name != "models"}
    size, found = 0, None
    for _ in range(4):
        manifest["bytes"] = bundle.accounting(other + size)
        size, found = len(_text(manifest)), size
    if size != found:  # digits of the ratio come and go with the size: filled up to one that stays
        size += PADDED
        manifest |= {"bytes": bundle.accounting(other + size), "padding": ""}
        manifest["padding"] = " " * (size - len(_text(manifest)))
    return {**manifest, "sha256": _digest(manifest)}


def load(path):
    """The Bundle in a folder; its files are hashed, or if they are more than `HASHED` bytes, their sizes are checked.

    Args:
        path: of the bundle, or of the workdir that `jaxsub fit` wrote it in.

    Raises:
        InputError: no bundle, or a damaged one; names the file.
    """
    inner = os.path.join(path, "bundle")
    if not os.path.lexists(os.path.join(path, MANIFEST)) and os.path.lexists(os.path.join(inner, MANIFEST)):
        path = inner
    manifest = _manifest(path)
    total = sum(wanted["bytes"] for wanted in manifest["files"].values())
    for name, wanted in manifest["files"].items():
        _require(_size(path, name) == wanted["bytes"], path, name, "has another size than when it was written")
        if total <= HASHED:
            is_same = identity(os.path.join(path, name)) == wanted
            _require(is_same, path, name, "has another content than when it was written")
    try:
        return _bundle(path, manifest)
    except _MISFIT as error:  # a manifest that is whole, but no bundle's: someone else's making
        reason = f"does not fit its files ({type(error).__name__}: {errors.quote(error, 80)})"
        raise errors.InputError(os.path.join(path, MANIFEST), reason, hint="make the bundle again") from error
    except MemoryError as error:
        raise errors.ResourceError(f"{errors.quote(path)}: needs more memory than there is: {error}") from error


def _bundle(path, manifest):
    from jaxsub.bundle import Bundle, Layer

    checks.require_ids(manifest["models"], manifest["models"])
    checks.require_fields(manifest)
    if not {COEFFICIENTS, *(record["file"] for record in manifest["layers"])} <= manifest["files"].keys():
        raise ValueError("files of layers that are not listed")
    checks.require_room(manifest, path)
    coefficients, layers = _tensors(path, COEFFICIENTS), []
    corrected = _tensors(path, CORRECTIONS) if CORRECTIONS in manifest["files"] else {}
    for number, record in enumerate(manifest["layers"]):
        ids = manifest["models"] if record["models"] is None else record["models"]
        dtypes = [record["dtypes"]] * len(ids) if isinstance(record["dtypes"], str) else record["dtypes"]
        halves = tuple(
            _decoded(coefficients, f"{number:05d}{e}", -1) for e in cores.HALVES if f"{number:05d}{e}" in coefficients
        )
        checks.require_ids(ids, manifest["models"])
        if halves:  # joined, they could be much larger
            left, right = halves
            checks.require_ranks((*left.shape[:2], right.shape[2]), record)
        values = cores.joined(halves) if halves else _decoded(coefficients, f"{number:05d}", -1)
        checks.require_ranks(values.shape, record)
        space = _subspace(record, _tensors(path, record["file"]), values.dtype)
        checks.require_numbers(space, values, record["name"])
        if not len(values) == len(ids) == len(dtypes):
            raise ValueError(f"{len(values)} rows of coefficients for {len(ids)} models")
        layers.append(
            Layer(
                record["name"],
                space,
                tuple(ids),
                values,
                tuple(dtypes),
                record["figures"],
                record["parametrisation"],
                tuple(record["storage"]),
                _corrections(corrected, number, len(ids), space.shape, record),
                tuple(record["shape"]),
                record["orientation"],
                halves,
            )
        )
    stored = _tensors(path, PASSTHROUGH) if PASSTHROUGH in manifest["files"] else {}
    ids, named = tuple(manifest["models"]), manifest["passthrough"]
    if named.keys() - {*ids}:
        raise ValueError("passthrough tensors of models that are none")
    passthrough = {m: {n: stored[key] for n, key in named.get(m, {}).items()} for m in ids}
    provenance = manifest["provenance"]
    if manifest["members"] is not None:
        provenance = {**provenance, "models": members.unpacked(manifest["members"], ids)}
    return Bundle(ids, tuple(layers), passthrough, dict(zip(ids, manifest["originals"], strict=True)), provenance)


def verify(path):
    """[(file, what is wrong), ...] of a bundle: every byte of every file is hashed; nothing found is an empty list.

    Raises:
        InputError: no manifest that can be read.
    """
    manifest, problems = _manifest(path), []
    for name, wanted in manifest["files"].items():
        full = os.path.join(path, name)
        if not os.path.lexists(full):
            problems.append((name, "is missing"))
            continue
        try:
            found = identity(full)
        except errors.InputError as error:
            problems.append((name, error.reason))
            continue
        if found != wanted:
            what = "size" if found["bytes"] != wanted["bytes"] else "content"
            problems.append((name, f"has another {what} than when it was written"))
    known = {MANIFEST, *manifest["files"]}
    for folder, _, names in os.walk(path):
        for name in sorted(names):
            relative = os.path.relpath(os.path.join(folder, name), path).replace(os.sep, "/")
            if relative not in known:
                problems.append((relative, "does not belong to the bundle"))
    return problems


def identity(path):
    """{"bytes", "sha256"} of a file."""
    digest, file = hashlib.sha256(), _files.identify(path)
    with _files.reader(file) as reader:
        for block in reader.blocks(0, file.size):
            digest.update(block)
    return {"bytes": file.size, "sha256": digest.hexdigest()}


def _record(layer, bundle):
    space = layer.subspace
    spectra = {"models": space.spectrum} if layer.is_linear else space.spectra
    is_one = len({*layer.dtypes}) == 1
    return {
        "name": layer.name,
        "shape": list(layer.shape),
        "kind": "linear" if layer.is_linear else "tucker",
        "parametrisation": layer.parametrisation,
        "orientation": layer.orientation,
        "rank": space.rank if layer.is_linear else {str(axis): k for axis, k in space.rank.items()},
        "models": None if layer.model_ids == bundle.model_ids else list(layer.model_ids),  # None: all of them
        "dtypes": layer.dtypes[0] if is_one else list(layer.dtypes),
        "storage": list(layer.storage),
        "procedure": dataclasses.asdict(space.procedure),
        "certificate": dataclasses.asdict(space.certificate),
        "spectra": {str(a): {"total_energy": _known(s.total_energy), "floor": s.floor} for a, s in spectra.items()},
        "figures": layer.figures,
    }


def _decoded(tensors, name, component):
    arrays = {ending: tensors[name + ending] for ending in ("", "_scale") if name + ending in tensors}
    return storage.decode(arrays, component=component)


def _corrections(tensors, number, count, shape, record):
    prefix = f"{number:05d}."
    own = {name.removeprefix(prefix): array for name, array in tensors.items() if name.startswith(prefix)}
    if not own:
        return None
    found = corrections.of_tensors(own)
    if isinstance(found, corrections.Factors) != (record["parametrisation"] == lineup.LORA):
        raise ValueError(f"corrections of another kind of layer than {record['parametrisation']}")
    found.check(count, shape)
    return found


def _known(value):
    """`value`, or None where JSON cannot hold it: energies of enormous float64 weights."""
    return value if math.isfinite(value) else None


def _subspace(record, tensors, dtype):
    shape = lineup.flat_shape(record["shape"]) if record["parametrisation"] == lineup.LORA else tuple(record["shape"])
    lists = {key: tuple(v) if isinstance(v, list) else v for key, v in record["procedure"].items()}
    procedure, certificate = subspace.Procedure(**lists), subspace.Certificate(**record["certificate"])

    def spectrum(axis, name):
        known = record["spectra"][axis]
        total = math.inf if known["total_energy"] is None else known["total_energy"]
        return subspace.Spectrum(tensors[name], total, known["floor"])

    with jax.enable_x64(True):
        if record["kind"] == "linear":
            mean, basis = _decoded(tensors, "mean", 0).reshape(-1), _decoded(tensors, "basis", 0)
            if basis.shape[1:] != shape or mean.size != math.prod(shape):
                raise ValueError(f"basis of shape {basis.shape}, layer of shape {shape}")
            rows = jax.numpy.asarray(basis.reshape(-1, math.prod(shape)))
            known = spectrum("models", "singular_values")
            return subspace.LinearSubspace(jax.numpy.asarray(mean), rows, known, shape, procedure, certificate)
        axes = sorted(int(axis) for axis in record["rank"])
        factors = {}
        for axis in axes:  # one that is not there has unit vectors
            is_there = f"factor_{axis}" in tensors
            rows = _decoded(tensors, f"factor_{axis}", 0) if is_there else np.eye(shape[axis], dtype=dtype)
            factors[axis] = jax.numpy.asarray(rows)
        for axis, factor in factors.items():
            if factor.shape != (record["rank"][str(axis)], shape[axis]):
                raise ValueError(f"factor {axis} of shape {factor.shape}, layer of shape {shape}")
        spectra = {axis: spectrum(str(axis), f"singular_values_{axis}") for axis in axes}
        mean = _decoded(tensors, "mean", 0) if "mean" in tensors else np.zeros((1,) * len(shape), dtype)
        if np.broadcast_shapes(mean.shape, shape) != shape:
            raise ValueError(f"mean of shape {mean.shape}, layer of shape {shape}")
        mean = jax.numpy.asarray(mean)
        return subspace.TuckerSubspace(mean, factors, spectra, shape, procedure, certificate)


def is_updated(path):
    """Whether the bundle in a folder is one that `update` made; False also where that cannot be said."""
    try:
        return "updates" in _manifest(path)["provenance"]
    except (errors.InputError, KeyError, TypeError):
        return False


def _manifest(path):
    file = os.path.join(os.fspath(path), MANIFEST)
    if not os.path.isdir(path) or not os.path.lexists(file):
        raise errors.InputError(path, "is no bundle: it has no manifest.json", hint="give the folder that fit wrote")
    known = _files.identify(file)
    _require(known.size <= MAX_MANIFEST, path, MANIFEST, "is too large to be one")
    data = _files.read_bytes(known, 0, known.size)
    manifest = _json.parse(data, file)
    is_ours = isinstance(manifest, dict) and manifest.get("schema") == SCHEMA
    _require(is_ours, path, MANIFEST, f"is not of schema {SCHEMA}")
    is_whole = manifest.get("sha256") == _digest(manifest) and data == _text(manifest)
    _require(is_whole, path, MANIFEST, "is not as it was written")
    named = manifest.get("files")
    is_named = isinstance(named, dict) and all(map(_NAME.fullmatch, named)) and all(map(_is_identity, named.values()))
    _require(is_named, path, MANIFEST, "names files that no bundle has")
    return manifest


def _is_identity(value):
    return isinstance(value, dict) and type(value.get("bytes")) is int and type(value.get("sha256")) is str


def _digest(manifest):
    """sha256 of a manifest without its own digest."""
    rest = {k: v for k, v in manifest.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, allow_nan=False).encode("ascii")).hexdigest()


def _text(manifest):
    return json.dumps(manifest, indent=1, allow_nan=False).encode("ascii") + b"\n"


def _require(is_so, path, name, reason):
    if not is_so:
        raise errors.InputError(os.path.join(path, name), reason, hint="make the bundle again, or get it again")


def _size(path, name):
    return _files.identify(os.path.join(path, name)).size


def _tensors(path, name):
    if not _NAME.fullmatch(name):
        raise ValueError(f"no file of a bundle is called {errors.quote(name)}")
    return safetensors.read(os.path.join(path, name))
