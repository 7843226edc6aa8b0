"""LoRA files to test on: kohya's and LyCORIS' tensors, and the Delta-W that LyCORIS defines for them."""

import numpy as np

import jaxsub
from jaxsub import formats
from jaxsub.formats import safetensors
from jaxsub.pipelines import project

RNG = np.random.default_rng(0)
STEM = "lora_unet_down_blocks_0_attn1_to_q"
DOWN, UP, ALPHA = f"{STEM}.lora_down.weight", f"{STEM}.lora_up.weight", f"{STEM}.alpha"


def factor(*shape):
    """Small integers: products are exact in float32."""
    return RNG.integers(-3, 4, shape).astype(np.float32)


def pair(stem=STEM, r=2, i=5, o=3, alpha=None):
    found = {f"{stem}.lora_down.weight": factor(r, i), f"{stem}.lora_up.weight": factor(o, r)}
    return found if alpha is None else {**found, f"{stem}.alpha": np.float32(alpha)}


def opened(tmp_path, arrays, metadata=None, name="m.safetensors"):
    safetensors.write(tmp_path / name, arrays, metadata)
    return formats.open_model(tmp_path / name)


def delta(model, layer):
    """Delta-W of any layer, float64."""
    if layer in model.tensors:
        return formats.read(model, model.tensors[layer]).astype(np.float64)
    own = model.adapters[layer]
    a, b = (formats.read(model, t).astype(np.float64) for t in (own.a, own.b))
    product = own.scale * (b.reshape(len(b), -1) @ a.reshape(len(a), -1))
    return product.reshape(own.shape)


# Dense updates: LyCORIS 4.1, functional/{locon,loha,lokr,general}.py.


def rebuild(t, wa, wb):
    """`rebuild_tucker` of LyCORIS."""
    return np.einsum("ij...,ip,jr->pr...", t, wa, wb)


def locon(r=2, alpha=3):
    up, down, mid = factor(4, r, 1, 1), factor(r, 5, 1, 1), factor(r, r, 3, 2)
    parts = {"lora_up.weight": up, "lora_down.weight": down, "lora_mid.weight": mid}
    return parts, alpha / r * rebuild(mid, up[:, :, 0, 0].T, down[:, :, 0, 0])


def loha(r=2, alpha=3, core=(), kernel=()):
    if core:
        a, b, c, d = factor(r, 4), factor(r, 5), factor(r, 4), factor(r, 5)
        s, t = factor(r, r, *core), factor(r, r, *core)
        more, product = {"hada_t1": s, "hada_t2": t}, rebuild(s, a, b) * rebuild(t, c, d)
    else:
        a, b, c, d = factor(4, r), factor(r, 5, *kernel), factor(4, r), factor(r, 5, *kernel)
        first, second = (np.einsum("or,ri...->oi...", x, y) for x, y in ((a, b), (c, d)))
        more, product = {}, first * second
    return {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d, **more}, alpha / r * product


def lokr(r=2, alpha=3, first=False, second=False, core=(), kernel=()):
    """kron(w1, w2) entry by entry: W[a * K + b, c * N + d] = w1[a, c] w2[b, d]; `first`, `second`: in two factors."""
    parts = {}
    if first:
        a, b = factor(2, r), factor(r, 3)
        parts |= {"lokr_w1_a": a, "lokr_w1_b": b}
        w1 = a @ b
    else:
        w1 = parts["lokr_w1"] = factor(2, 3)
    if second and core:
        a, b, t = factor(r, 4), factor(r, 5), factor(r, r, *core)
        parts |= {"lokr_w2_a": a, "lokr_w2_b": b, "lokr_t2": t}
        w2 = rebuild(t, a, b)
    elif second:
        a, b = factor(4, r), factor(r, 5, *kernel)
        parts |= {"lokr_w2_a": a, "lokr_w2_b": b}
        w2 = np.einsum("or,ri...->oi...", a, b)
    else:
        w2 = parts["lokr_w2"] = factor(4, 5, *kernel)
    product = np.zeros((8, 15, *w2.shape[2:]))
    for a, c in np.ndindex(2, 3):
        product[a * 4 : a * 4 + 4, c * 5 : c * 5 + 5] = w1[a, c] * w2
    return parts, (alpha / r if first or second else 1) * product


DENSE = {
    "locon": locon, "loha": loha, "loha_conv": lambda **k: loha(kernel=(3, 2), **k),
    "loha_core": lambda **k: loha(core=(3, 2), **k), "lokr": lokr, "lokr_conv": lambda **k: lokr(kernel=(3, 2), **k),
    "lokr_first": lambda **k: lokr(first=True, **k), "lokr_second": lambda **k: lokr(second=True, **k),
    "lokr_both": lambda **k: lokr(first=True, second=True, **k),
    "lokr_second_conv": lambda **k: lokr(second=True, kernel=(3, 2), **k),
    "lokr_core": lambda **k: lokr(second=True, core=(3, 2), **k),
}  # fmt: skip


def stored(parts, stem=STEM, alpha=None):
    found = {f"{stem}.{name}": array for name, array in parts.items()}
    return found if alpha is None else {**found, f"{stem}.alpha": np.float32(alpha)}


def rebuilt(tmp_path):
    """The collection in tmp_path / "m" fitted with two components, its reconstructions written, and opened again."""
    bundle, old, new = (str(tmp_path / name) for name in ("b", "m", "new"))
    jaxsub.fit(old, bundle, rank=2)
    project.run(project.Config(bundle=bundle, collection=(old,), write_models=new))
    return jaxsub.open_collection(new)
