"""PEFT's TINYLORA folders (PEFT 0.19 and later): members of a subspace of low-rank updates as a vector each.

    Delta-W = B (sum_j v_j P_j) A      A (r, in), B (out, r), P (u, r, r) the same in all members, v (u,) a member

By default one v holds for all layers (weight_tying 1): PEFT numbers separate ones by the order of the base's modules,
which no adapter says. Loading costs PEFT an SVD of every adapted weight, which it then replaces. Servers take none.
"""

import dataclasses
import os
import re

import numpy as np

from jaxsub import errors
from jaxsub.formats import _files, _json, _peft, _portable, _rewrite, safetensors

SHARED, MEMBERS = "shared", "members"  # folders of the layout in which members share A, B and P
_VECTOR = "base_model.tinylora_v."


@dataclasses.dataclass(frozen=True)
class Space:
    """A layer of a subspace and its members, Delta-W_n = left.T cores_n right.

    Attributes:
        left, right: (k_o, o) and (k_i, i) orthonormal rows, in the orientation of the stored weight.
        cores: (n, k_o, k_i), float64.
        orientation: a word of `_portable.Update.orientation`.
    """

    left: np.ndarray
    right: np.ndarray
    cores: np.ndarray
    orientation: str = _portable.LINEAR


def build(spaces, *, fields=None, modules=None):
    """What members share, and their vectors.

    Args:
        spaces: layer -> Space, of the same n members.
        fields: more of the configuration: base_model_name_or_path, task_type.
        modules: names of the base's modules in the order of `named_modules()`: every layer then has a v of its own.
            None: one v for all layers.

    Returns:
        (config, tensors, vectors): a mapping, key -> float32 array, and a member key -> (u,) float32.

    Raises:
        ConfigError: more directions on one side of a layer than its other side is wide, or `modules` lacks a layer.
    """
    r = max(size for space in spaces.values() for size in space.cores.shape[1:])
    for layer, space in spaces.items():
        narrow = min(space.left.shape[1], space.right.shape[1])
        if max(space.cores.shape[1:]) > narrow:  # PEFT cuts r to the width of the layer
            raise errors.ConfigError(
                f"layer {errors.quote(layer)}: {max(space.cores.shape[1:])} directions on one side, TINYLORA holds "
                f"{narrow} in a layer this narrow; fit fewer components, or write the portable layout"
            )
    groups = [[*spaces]] if modules is None else [[layer] for layer in _ordered(spaces, modules)]
    found = [_directions(np.concatenate([_flat(spaces[x]) for x in group], axis=1)) for group in groups]
    u = max(values.shape[1] for values, _ in found)
    tensors, vectors = {}, [{} for _ in found[0][0]]
    for number, (group, (values, slices)) in enumerate(zip(groups, found, strict=True)):
        start = 0
        for layer in group:
            part = slices[:, start : start + _flat(spaces[layer]).shape[1]]
            tensors |= _tensors(layer, spaces[layer], part, r, u)
            start += part.shape[1]
        for vector, row in zip(vectors, values, strict=True):
            name = f"{_VECTOR}{number}"
            vector[name] = _rounded(np.pad(row, (0, u - len(row))), name)
    config = {
        "peft_type": "TINYLORA",
        "task_type": None,
        "base_model_name_or_path": None,
        **(fields or {}),
        "r": r,
        "u": u,
        "weight_tying": 1.0 if modules is None else 0.0,
        "save_projection": True,
        # Whole names, as an expression: a module that only ends like one would get an update at random.
        "target_modules": "|".join(re.escape(layer) for layer in sorted(spaces)),
        "bias": "none",
        "fan_in_fan_out": any(one.orientation == _portable.FAN_IN_FAN_OUT for one in spaces.values()),
        "modules_to_save": None,
        "inference_mode": True,
    }
    return config, tensors, vectors


def _ordered(spaces, modules):
    for layer in spaces:
        if layer not in modules:
            raise errors.ConfigError(f"modules: no {errors.quote(layer)} in them{errors.nearest(layer, modules)}")
    return [name for name in modules if name in spaces]


def _flat(space):
    return np.asarray(space.cores, np.float64).reshape(len(space.cores), -1)


def _directions(flat):
    """(values (n, u), slices (u, K)) with values @ slices = flat (n, K).

    The slices are entries of the cores (one-hot) where there are no more of them than members, so that the values are
    the bundle's coefficients; else they are the orthonormal directions that the members' cores have.
    """
    if flat.shape[1] <= flat.shape[0]:
        return flat, np.eye(flat.shape[1])
    left, s, slices = np.linalg.svd(flat, full_matrices=False)
    rank = max(int(np.sum(s > max(flat.shape) * np.finfo(np.float64).eps * s[0])), 1)
    return left[:, :rank] * s[:rank], slices[:rank]


def _tensors(layer, space, slices, r, u):
    """A, B and P of a layer from its slices (m, k_o * k_i), padded with zeros as far as PEFT's shapes ask for."""
    slices = slices.reshape(len(slices), *space.cores.shape[1:])
    a, b = space.right, space.left
    if space.orientation == _portable.FAN_IN_FAN_OUT:  # embeddings are not turned here, unlike in LORA
        a, b, slices = b, a, slices.transpose(0, 2, 1)
    size = min(r, a.shape[1], b.shape[1])
    key = f"{_peft.PREFIX}{layer}.tinylora_"
    found = {
        "A": np.pad(a, ((0, size - len(a)), (0, 0))),
        "B": np.pad(b, ((0, size - len(b)), (0, 0))).T,
        "P": np.pad(slices, [(0, n - m) for n, m in zip((u, size, size), slices.shape, strict=True)]),
    }
    return {key + name: _rounded(array, layer) for name, array in found.items()}


def _rounded(array, name):
    return _rewrite.rounded(array, np.dtype(np.float32), SHARED, name)


def write(folder, config, tensors, vector):
    """Writes a folder that PEFT loads."""
    _files.make_folder(folder)
    _portable.save(folder, config, {**tensors, **vector})


def write_shared(folder, config, tensors, vectors):
    """Writes what members share, once, as an adapter without effect, and beside it a file with each member's vector.

    Args:
        folder: `shared/` and `members/<id>.safetensors` are made in it.
        config, tensors: of `build`.
        vectors: id -> vector of `build`.
    """
    nothing = {key: np.zeros_like(value) for key, value in next(iter(vectors.values())).items()}
    write(os.path.join(folder, SHARED), config, tensors, nothing)
    for model, vector in vectors.items():
        path = member(folder, model)
        _files.make_folder(os.path.dirname(path))
        safetensors.write(path, vector, {"format": "pt"})


def member(folder, model):
    """Path of a member's vector in a folder of `write_shared`."""
    return _rewrite.place(os.path.join(folder, MEMBERS), model) + ".safetensors"


def join(folder, model, path):
    """Writes one member of a folder of `write_shared` as a whole adapter in the new folder `path`.

    Raises:
        InputError: no such member, or a vector that does not fit.
        WorkdirError: `path` exists.
    """
    _files.require_new(path)
    base = os.path.join(folder, SHARED)
    tensors, source = safetensors.read(os.path.join(base, _portable.WEIGHTS)), member(folder, model)
    vector, known = safetensors.read(source), {k: v.shape for k, v in tensors.items() if k.startswith(_VECTOR)}
    if {key: array.shape for key, array in vector.items()} != known:
        raise errors.InputError(source, "does not fit what is shared", hint="take both from one export", rule="H13")
    config = os.path.join(base, _portable.CONFIG)
    write(path, _json.parse(_rewrite.read(config), config), tensors, vector)
