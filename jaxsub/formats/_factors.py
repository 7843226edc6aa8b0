"""LoRA in one .safetensors file: whose file it is, and what the readers of such files share.

    kohya-ss, LyCORIS, older diffusers   <stem>.lora_down.weight, <stem>.hada_w1_a, <stem>.lora.up.weight   `kohya`
    diffusers with PEFT                  <component>.<module>.lora_A.weight, lora_B.weight                  `diffusers`
    the paper's code                     <layer>.subspaceadapter_A.components, loadings             `subspaceadapter`

The names in the header decide, all of them together, so a file has one reader whatever their order.
"""

import dataclasses
import math
import re

import ml_dtypes
import numpy as np

from jaxsub import descriptors, errors
from jaxsub.formats import _files, _model

METADATA = "lora_adapter_metadata"  # where diffusers keeps PEFT's configurations, as JSON
COMPONENT = re.compile(r"(unet|transformer|text_encoder|prior|connectors|text_conditioner)(_\d+|_ref)?\.")
_COMFY = "diffusion_model."  # what ComfyUI calls the one component it trains; no name in the metadata
_KOHYA = re.compile(
    r"[._](lora_(down|up|mid)|hada_[wt][12]|lokr_[wt][12]|lora_linear_layer|dora_scale|oft_blocks|oft_diag)([._]|$)|"
    r"[._]lora\.(up|down)\."
)
_PEFT = re.compile(r"\.lora_[AB](\.[^.]+)?\.weight$")
_SUBSPACE = re.compile(r"\.(subspaceadapter|eigenflux)_[AB]\.(.+\.)?(components|loadings)$")
_DELTA = re.compile(r".\.(diff|diff_b|w_norm|b_norm)$")
MAX_SCALE = 2.0**700  # products are made with powers of two kept apart; beyond it they would leave float64
ROUNDING = 4 * float(np.finfo(np.float32).eps)  # share of an update's norm that factors in float32 lose anyway
_SCALARS = ((), (1,))  # shapes of an alpha; older scripts saved it with one axis


def family(content):
    """Name of the reader for a .safetensors Content; None for plain tensors."""
    if "family" not in content.notes:
        content.notes["family"] = _family([t.name for t in content.tensors])
    return content.notes["family"]


def _family(names):
    if (
        any(_KOHYA.search(name) for name in names)
        or _has_other_kinds(names)
        or (names and all(_DELTA.search(name) for name in names))
    ):
        return "kohya"
    if any(_SUBSPACE.search(name) for name in names):
        return "subspaceadapter"
    factors = [name for name in names if _PEFT.search(name)]
    # Of other names the scale is nowhere: PEFT keeps it in adapter_config.json, and its prefix is no component.
    known = all(COMPONENT.match(name) or name.startswith(_COMFY) for name in factors)
    return "diffusers" if factors and known else None


def _has_other_kinds(names):
    """Whether some are of LyCORIS' GLoRA or IA3, which the reader of its files refuses by name."""
    known = {*names}
    stems = {name.removesuffix(".a1.weight") for name in names if name.endswith(".a1.weight")}
    glora = any(known >= {f"{stem}.{part}.weight" for part in ("a1", "a2", "b1", "b2")} for stem in stems)
    return glora or any(name.endswith(".on_input") for name in names)


@dataclasses.dataclass(frozen=True, slots=True)
class Factors:
    """Two tensors that make Delta-W = B @ A of `shape`: their positions in the file, A's first."""

    a: int
    b: int
    rank: int
    shape: tuple[int, ...]
    embedding: bool = False


def partners(layer, sides, tensors, file, names, hint, embedding=False):
    """The Factors of a layer.

    Args:
        layer: its name.
        sides: name of a factor -> position.
        tensors: those of the file.
        file: its path.
        names: how this family calls A and B.
        hint: what to do about faults.
        embedding: whether A and B are those of an embedding.

    Raises:
        InputError: one of the two is missing, is no float, or does not fit the other (rules H6, H13).
    """

    def fail(reason, hint=hint):
        raise errors.InputError(file, reason, key=layer, hint=hint, rule="H13")

    for side, other in (names, names[::-1]):
        if side not in sides:
            fail(f"has {other} and no {side}")
    a, b = (tensors[sides[name]] for name in names)
    for factor in (a, b):
        _model.require_float(factor, file)
    if len(a.shape) < 2 or len(a.shape) != len(b.shape) or 0 in a.shape + b.shape:
        fail(f"has factors of shapes {a.shape} and {b.shape}, which make no matrix")
    if a.shape[0] != b.shape[1]:
        first, second = (f"{name} {factor.shape}" for name, factor in zip(names, (a, b), strict=True))
        fail(f"has {first} and {second}: the inner sizes {a.shape[0]} and {b.shape[1]} differ")
    if any(size != 1 for size in b.shape[2:]):
        cure = "merge the adapter and give the merged model"
        fail(f"has {names[1]} {b.shape}, a convolution wider than one", cure)
    return Factors(sides[names[0]], sides[names[1]], a.shape[0], (b.shape[0], *a.shape[1:]), embedding)


def balanced(a, b, scale=1.0):
    """(a (r, i), b (o, r)) float64 with the product scale * b @ a and equal singular values, r the rank of it.

    Left out are the last directions that together hold less than ROUNDING of the norm.

    Raises:
        ValueError: the product is not finite.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    left, inner = np.linalg.qr(b)
    right, outer = np.linalg.qr(a.T)
    core = scale * (inner @ outer.T)
    if not np.isfinite(core).all():
        raise ValueError("the update is not finite")
    u, s, vt = np.linalg.svd(core, full_matrices=False)
    shares = s / s[0] if s.size and s[0] > 0 else s
    tails = np.sqrt(np.cumsum(np.square(shares[::-1])))[::-1]  # norm of what is lost by stopping before each
    rank = int(np.sum(tails > ROUNDING * tails[0])) if s.size else 0
    root = np.sqrt(s[:rank])
    return (root[:, None] * vt[:rank]) @ right.T, (left @ u[:, :rank]) * root


def written(value, pair):
    """(a (r, i), b (o, r), scale) of a low-rank update as a file takes it, r >= 1.

    Args:
        value: (a, b), the update b @ a, or (a, b, scale), factors that are to stay as they are; see `formats.rewrite`.
        pair: LoraPair in whose place and dtypes it is written. Factors of a product of which 16 bits would lose more
            than they round, as of numbers near the smallest they have, go balanced.
    """
    (a, b), scale = (np.asarray(x) for x in value[:2]), float(value[2]) if len(value) > 2 else 1.0
    if not len(a):  # programs refuse adapters without any direction
        return np.zeros((1, *a.shape[1:]), a.dtype), np.zeros((b.shape[0], 1), b.dtype), scale
    is_finite = np.isfinite(a).all() and np.isfinite(b).all()
    if len(value) > 2 or not is_finite or (_holds(pair.a.dtype, a) and _holds(pair.b.dtype, b)):
        return a, b, scale
    even_a, even_b = balanced(a, b)
    room = len(a) - len(even_a)
    return np.pad(even_a, ((0, room), (0, 0))), np.pad(even_b, ((0, 0), (0, room))), scale


def _holds(dtype, x):
    """Whether a dtype holds an array but for its rounding."""
    dtype, x = descriptors.numpy_dtype(dtype), x.astype(np.float64)
    with np.errstate(over="ignore"):
        lost = np.linalg.norm(x.astype(dtype).astype(np.float64) - x)
    return lost <= float(ml_dtypes.finfo(dtype).eps) * np.linalg.norm(x)


def have_effect(pairs, load):
    """Whether any LoraPair has a B with an entry that is not zero; reads 4 KiB as a rule, all of it if it is zero."""
    return any(pair.scale != 0 and any(x.any() for x in _model.blocks(pair.b, load)) for pair in pairs)


def check_alpha(tensor, file):
    """Refuses an alpha that is no single real number by its header."""
    if tensor.shape not in _SCALARS:
        raise _bad_alpha(file, tensor.name, f"has shape {list(tensor.shape)}, a single number was expected")
    if descriptors.numpy_dtype(tensor.dtype).kind not in "iu" and not tensor.is_float:
        raise _bad_alpha(file, tensor.name, f"has dtype {tensor.dtype}, a real number was expected")


def read_alphas(file, tensors):
    """Values of the alphas in a file, in order; all through one descriptor.

    Raises:
        InputError: one that is negative or not finite (rule H13).
    """
    found = []
    if not tensors:
        return found
    dtypes = {name: descriptors.numpy_dtype(name) for name in {t.dtype for t in tensors}}
    with _files.reader(file) as opened:
        for tensor in tensors:
            dtype = dtypes[tensor.dtype]
            value = float(np.frombuffer(opened.read(tensor.extent.offset, dtype.itemsize), dtype)[0])
            if not math.isfinite(value) or value < 0:
                raise _bad_alpha(file.path, tensor.name, f"is {value}, a finite number from 0 on was expected")
            if not is_usual(value):
                raise _bad_alpha(file.path, tensor.name, f"is {value:.3g}, which no training gives")
            found.append(value)
    return found


def _bad_alpha(file, name, reason):
    return errors.InputError(file, reason, key=name, hint="save the adapter again with its trainer", rule="H13")


def is_usual(scale):
    """Whether updates of this scale can be computed: zero, or one that leaves room to factors."""
    return scale == 0 or 1 / MAX_SCALE <= abs(scale) <= MAX_SCALE


def scale(alpha, rank):
    """alpha / r; without an alpha, or with one of 0, alpha is r, as in kohya-ss and LyCORIS."""
    return alpha / rank if alpha else 1.0


def alpha_array(value, like):
    """An alpha as a tensor: dtype and shape of `like`, or a 0-d float32 where that dtype would round it."""
    array = np.asarray(value).astype(like.dtype).reshape(like.shape if like.shape in _SCALARS else ())
    return array if float(array.reshape(-1)[0]) == float(value) else np.float32(value).reshape(array.shape)
