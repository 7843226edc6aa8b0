"""Updates of LyCORIS that are no plain product of two factors: their shape from headers, their Delta-W when read.

    Tucker LoCon   up x (mid x down)         mid (r, r, kh, kw)
    LoHa           (w1_a w1_b) * (w2_a w2_b)   entry by entry; a half with a core t (r, r, kh, kw) is a Tucker product
    LoKr           kron(w1, w2)                each whole, or w_a w_b, w2 also with a core t2

All times alpha / r (LoKr of two whole matrices: 1). Source: LyCORIS 4.1, modules/{locon,loha,lokr}.py; its
`get_diff_weight` applies the scale twice where its forward pass applies it once, as here.
"""

import dataclasses
import math

import numpy as np

from jaxsub import descriptors, errors
from jaxsub.formats import _model

LOCON = frozenset({"lora_down", "lora_up", "lora_mid"})
LOHA = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})
LOHA_CORES = frozenset({"hada_t1", "hada_t2"})
_LOKR = ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"}), ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"})
_LOKR_CORE = "lokr_t2"
NAMES = LOCON | LOHA | LOHA_CORES | {name for half in _LOKR for way in half for name in way} | {_LOKR_CORE, "lokr_t1"}


@dataclasses.dataclass(frozen=True, slots=True)
class Recipe:
    """How a layer's Delta-W is made: `parts` by name -> position in the file; `rank` is None where no scale applies."""

    parts: dict
    shape: tuple[int, ...]
    dtype: str
    rank: int | None


def recipe(layer, parts, tensors, file):
    """The Recipe of a layer's tensors.

    Args:
        layer: its name.
        parts: name, such as "hada_w1_a" -> position.
        tensors: those of the file.
        file: its path.

    Raises:
        InputError: a part is missing, is no float, or does not fit the others (rules H6, H13).
    """
    found = {name: tensors[position] for name, position in parts.items()}
    for tensor in found.values():
        _model.require_float(tensor, file)
    shapes = {name: tensor.shape for name, tensor in found.items()}
    try:
        shape, rank = _shape(shapes)
    except _Misfit as fault:
        hint = "save the adapter again with its trainer"
        raise errors.InputError(file, str(fault), key=layer, hint=hint, rule="H13") from None
    dtype = "float64" if any(t.dtype == "float64" for t in found.values()) else "float32"
    return Recipe(dict(parts), shape, dtype, rank)


class _Misfit(Exception):
    """Raised with the reason; `recipe` adds file and layer."""


def _shape(shapes):
    names = shapes.keys()
    for name, shape in shapes.items():
        if len(shape) < 2 or 0 in shape:
            raise _Misfit(f"has {name} {shape}, which is no matrix")
    if "lora_mid" in names:
        _require(names, LOCON)
        down, up, mid = (shapes[n] for n in ("lora_down", "lora_up", "lora_mid"))
        if any(size != 1 for size in down[2:] + up[2:]):
            raise _Misfit(f"has lora_down {down} and lora_up {up} beside lora_mid: wider than one")
        return _tucker((up[1], up[0]), down[:2], mid, "lora_mid"), down[0]
    if names & (LOHA | LOHA_CORES):
        _require(names, LOHA | (LOHA_CORES if names & LOHA_CORES else set()))
        halves = [_loha_half(shapes, number) for number in "12"]
        if halves[0] != halves[1]:
            raise _Misfit(f"has halves of shapes {halves[0]} and {halves[1]}, which differ")
        ranks = [shapes[f"hada_w{number}_b"][0] for number in "12"]
        if ranks[0] != ranks[1]:
            raise _Misfit(f"has halves of ranks {ranks[0]} and {ranks[1]}: the scale is of one")
        return halves[0], ranks[0]
    return _lokr(shapes)


def _require(names, wanted):
    if missing := sorted(wanted - names):
        raise _Misfit(f"has {sorted(names)[0]} and no {missing[0]}")
    if extra := sorted(names - wanted):
        raise _Misfit(f"has {extra[0]}, which does not belong to {sorted(wanted)[0]}")


def _loha_half(shapes, number):
    a, b, core = shapes[f"hada_w{number}_a"], shapes[f"hada_w{number}_b"], shapes.get(f"hada_t{number}")
    if core is not None:
        return _tucker(a, b, core, f"hada_t{number}")
    return _product(a, b, f"hada_w{number}")


def _lokr(shapes):
    names, wholes, ranks, sizes = shapes.keys(), [], [], []
    core = {_LOKR_CORE} & names
    for number, ways in zip("12", _LOKR, strict=True):
        whole, pair = ways
        if bool(whole & names) == bool(pair & names):
            raise _Misfit(f"has {'two' if whole & names else 'no'} kinds of lokr_w{number}")
        wholes.append(whole <= names)
        a, b = (shapes.get(f"lokr_w{number}_{side}") for side in "ab")
        if not wholes[-1]:
            _require(names & pair, pair)
            ranks.append(b[0])
        if wholes[-1]:
            sizes.append(shapes[f"lokr_w{number}"])
        elif number == "2" and core:
            sizes.append(_tucker(a, b, shapes[_LOKR_CORE], _LOKR_CORE))
        else:
            sizes.append(_product(a, b, f"lokr_w{number}"))
    if core and wholes[1] or "lokr_t1" in names:
        raise _Misfit("has a core that no factors belong to")
    if len(set(ranks)) > 1:
        raise _Misfit(f"has factors of ranks {ranks[0]} and {ranks[1]}: the scale is of one")
    first, second = sizes
    if len(first) > len(second):
        raise _Misfit(f"has lokr_w1 {first} with more axes than lokr_w2 {second}")
    padded = first + (1,) * (len(second) - len(first))
    return tuple(map(math.prod, zip(padded, second, strict=True))), ranks[0] if ranks else None


def _product(a, b, name):
    """Shape of a (o, r, 1...) times b (r, i, ...)."""
    if a[1] != b[0] or any(size != 1 for size in a[2:]):
        raise _Misfit(f"has {name}_a {a} and {name}_b {b}, which do not fit")
    return (a[0], *b[1:])


def _tucker(a, b, core, name):
    """Shape of a core (r, r, ...) with a (r, o) on its first and b (r, i) on its second axis."""
    if len(a) != 2 or len(b) != 2 or core[:2] != (a[0], b[0]) or a[0] != b[0]:
        raise _Misfit(f"has {name} {core}, which does not fit factors of {a} and {b}")
    return (a[1], b[1], *core[2:])


def as_loha(value):
    """Tensors, by part, of a matrix (o, i) as LoHa: its factors, entry by entry times ones.

    A `.diff` has the shape of the weight, which factors do not tell: (o, i k k) may be a convolution of (o, i, k, k).
    """
    if not np.isfinite(value).all():
        return {"diff": value}  # to be refused
    u, s, vt = np.linalg.svd(np.asarray(value, np.float64), full_matrices=False)
    rank = max(1, int((s > np.finfo(np.float32).eps / 4 * s[0]).sum()))
    ones = np.zeros((len(u), rank)), np.zeros((rank, vt.shape[1]))
    ones[0][:, 0], ones[1][0] = 1.0, 1.0
    root = np.sqrt(s[:rank])
    parts = u[:, :rank] * root, root[:, None] * vt[:rank], *ones, np.float32(rank)
    return dict(zip(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"), parts, strict=True))


def delta(made, read, scale):
    """Delta-W of a Recipe, in its shape and dtype.

    Args:
        made: the Recipe.
        read: reads the tensor at a position of the file.
        scale: what its factors are multiplied by.
    """
    # Products beyond the dtype are infinite, and set the model aside as any weight that is not finite.
    with np.errstate(over="ignore", invalid="ignore"):
        return _delta(made, read, scale, descriptors.numpy_dtype(made.dtype))


def _delta(made, read, scale, dtype):
    parts = {name: read(position).astype(dtype) for name, position in made.parts.items()}
    if "lora_mid" in parts:
        up, down = (parts[n].reshape(parts[n].shape[:2]) for n in ("lora_up", "lora_down"))
        found = _rebuild(parts["lora_mid"], up.T, down)
    elif "hada_w1_a" in parts:
        found = _half(parts, "hada_w1", "hada_t1")
        found *= _half(parts, "hada_w2", "hada_t2")
    else:
        first, second = _half(parts, "lokr_w1", None), _half(parts, "lokr_w2", _LOKR_CORE)
        found = np.kron(first.reshape(first.shape + (1,) * (second.ndim - first.ndim)), second)
    found *= dtype.type(scale)
    return found.reshape(made.shape)


def _half(parts, name, core):
    if name in parts:
        return parts[name]
    a, b = parts[name + "_a"], parts[name + "_b"]
    if core in parts:
        return _rebuild(parts[core], a, b)
    return (a.reshape(a.shape[:2]) @ b.reshape(len(b), -1)).reshape(len(a), *b.shape[1:])


def _rebuild(core, a, b):
    """sum over i, j of core[i, j, ...] a[i, p] b[j, q], as (p, q, ...); the smaller product first."""
    inner = np.tensordot(b, core, (0, 1))  # (q, i, ...)
    return np.ascontiguousarray(np.tensordot(a, inner, (0, 1)))  # (p, q, ...)
