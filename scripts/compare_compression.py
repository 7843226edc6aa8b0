"""Error against bytes of LoRA adapters kept by jaxsub and by what others do with them.

    jaxsub zoo --world=lora --workdir=runs --config.options=num_models=500
    python scripts/compare_compression.py --collection=runs/lora/models --out=compared

Writes compared/comparison.json, .txt and .png (matplotlib), prints the table. --collection may be repeated, with as
many --name. The error is sqrt(sum |W - rebuilt|^2 / sum |W|^2) over all adapters and layers, W = scale B A, from
factors. Bytes are 4 for every number that rebuilding needs (bases, means, coefficients), without headers, the same for
all. Each method gets a number of bytes and takes what fits: jaxsub its own choice of ranks, the others the best rank
for all layers.

    lorashare    ronantakizawa/lorashare 76a971d: A and B apart, all adapters' columns side by side, minus one mean a
                 row, leading k directions; factors are projected as they are, the mean is not added back; one k for all
    EigenLoRAx   arXiv 2502.04700: the same space; here with the mean as part of it, the PCA that the paper describes
                 (its code leaves it out as lorashare does, whose figures are also those of EigenLoRAx as released)
    JD-Full      arXiv 2407.00066: common U and V by alternating from the HOSVD, whole cores k x k
    SVD          of every adapter by itself, truncated
"""

import argparse
import json
import os

import numpy as np

FRACTIONS = (0.02, 0.03, 0.05, 0.08, 0.12, 0.18, 0.25, 0.35, 0.5, 0.7, 0.85, 1.0)  # of the bytes of all A and B
ITEM = 4
ROUNDING = 1e-6  # float32 numbers
PEERS = ("lorashare", "EigenLoRAx", "JD-Full", "SVD")
OURS = {"jaxsub hooi": "hooi", "jaxsub hosvd": "hosvd"}
STYLES = {
    "jaxsub hooi": ("#2f81f7", "o", "jaxsub"),
    "lorashare": ("#e0823d", "s", "lorashare"),
    "EigenLoRAx": ("#3fa45b", "^", "EigenLoRAx"),
    "JD-Full": ("#b565d8", "v", "JD-Full"),
    "SVD": ("#8b949e", "D", "truncated SVD"),
}
GREY = "#808890"  # readable on white and on black


def read(folder):
    """[(name, a (N, r, i), b (N, o, r)) ...] in float64, scales within b."""
    import jaxsub
    from jaxsub import bundle

    opened, found = jaxsub.open_collection(folder), []
    for group in opened.groups:
        if group.parametrisation != "lora" or len(group.members) != len(opened.refs):
            raise SystemExit(f"{group.name}: not a LoRA layer that all adapters have")
        a, b, scales = (np.asarray(x, np.float64) for x in bundle.read(group, opened))
        found.append((group.name, a, b * scales[:, None, None]))
    return opened, found


def inner(a, b, c, d):
    """sum_n <b_n a_n, d_n c_n>."""
    return float(np.einsum("nrs,nrs->", np.einsum("nor,nos->nrs", b, d), np.einsum("nri,nsi->nrs", a, c)))


def square(a, b, c, d):
    """sum_n |b_n a_n - d_n c_n|^2, without the products; right to 1e-15 of the norms."""
    return max(inner(a, b, a, b) - 2 * inner(a, b, c, d) + inner(c, d, c, d), 0.0)


# What others do: rank -> (bytes, squared error) of one layer ----------------------------------------------------------


def directions(columns):
    """Left singular vectors (d, .) of columns (d, n)."""
    return np.linalg.svd(columns, full_matrices=False)[0]


def lorashare(a, b):
    """A and B apart; fitted to centred columns, applied to the columns as they are."""
    tall = [np.moveaxis(a, 2, 0), np.moveaxis(b, 1, 0)]  # (i, N, r), (o, N, r)
    bases = []
    for factor in tall:
        columns = factor.reshape(len(factor), -1)
        bases.append(directions(columns - columns.mean(axis=1, keepdims=True)))

    def at(rank):
        u, v = (basis[:, :rank] for basis in bases)
        stored = u.size + v.size + len(a) * a.shape[1] * (u.shape[1] + v.shape[1])
        return ITEM * stored, square(a, b, a @ u @ u.T, v @ (v.T @ b))

    return at, max(basis.shape[1] for basis in bases)


def eigenlorax(a, b):
    """A and B apart by jaxsub's `lora_cov`, the mean part of the subspace and of the bytes."""
    from jaxsub import stacks
    from jaxsub.decompositions import lora_cov

    most = max(a.shape[2], b.shape[1])
    spaces = []
    for factor in (a, b):
        stack = stacks.DenseStack.create(factor, "factor", ())
        found = lora_cov.fit(stack, lora_cov.Options(rank=most), None)
        ((axis, rows),) = found.factors.items()
        mean = np.asarray(found.mean, np.float64)
        spaces.append((axis, np.asarray(rows, np.float64), np.broadcast_to(mean, factor.shape[1:]), mean.size))

    def rebuilt(x, space, rank):
        axis, rows, mean, _ = space
        if axis == 1:
            return mean + (x - mean) @ rows[:rank].T @ rows[:rank]
        return mean + rows[:rank].T @ (rows[:rank] @ (x - mean))

    def at(rank):
        stored = 0
        for x, (_, rows, _, mean) in zip((a, b), spaces, strict=True):
            k = min(rank, len(rows))
            stored += k * rows.shape[1] + mean + len(x) * k * (x[0].size // rows.shape[1])
        return ITEM * stored, square(a, b, rebuilt(a, spaces[0], rank), rebuilt(b, spaces[1], rank))

    return at, most


def jd_full(a, b):
    """Whole cores of the spaces that alternate from the HOSVD (10 sweeps, as the paper)."""
    import jax

    from jaxsub.linalg import factored

    def at(rank):
        ranks = (min(rank, b.shape[1]), min(rank, a.shape[2]))
        with jax.enable_x64(True):
            found = factored.hooi(a, b, np.ones(len(a)), ranks=ranks, sweeps=10, dtype="float64")
        u, v = (np.asarray(f) for f in found.factors)
        stored = u.size + v.size + len(a) * ranks[0] * ranks[1]
        return ITEM * stored, square(a, b, a @ v.T @ v, u.T @ (u @ b))

    return at, max(b.shape[1], a.shape[2])


def truncated(a, b):
    """Every update by itself."""
    q, left = np.linalg.qr(b)
    p, right = np.linalg.qr(np.swapaxes(a, 1, 2))
    s = np.linalg.svd(left @ np.swapaxes(right, 1, 2), compute_uv=False)

    def at(rank):
        return ITEM * len(a) * rank * (a.shape[2] + b.shape[1]), float(np.square(s[:, rank:]).sum())

    return at, a.shape[1]


def peer_curve(method, layers):
    """[(bytes, relative error)] of one rank for all layers."""
    total = sum(inner(a, b, a, b) for _, a, b in layers)
    made = [method(a, b) for _, a, b in layers]
    found = []
    most = max(most for _, most in made)
    ranks = range(1, most + 1) if method is not jd_full else sorted({*range(1, 41), *range(41, most, 6), most})
    for rank in ranks:
        parts = [at(min(rank, most)) for at, most in made]
        found.append((sum(p[0] for p in parts), float(np.sqrt(sum(p[1] for p in parts) / total))))
    return found


# jaxsub ---------------------------------------------------------------------------------------------------------------


def numbers(bundle):
    """Bytes of all that rebuilding needs, counted as for the others."""
    kept = [x for one in bundle.layers for name, x in one.tensors().items() if not name.startswith("singular_values")]
    return ITEM * sum(
        x.size for x in (*kept, *(c for one in bundle.layers for c in one.coefficient_tensors().values()))
    )


def ours(opened, layers, decomposition, budget):
    """(bytes, relative error) of a bundle whose numbers take at most `budget` bytes; None if none is so small."""
    import jaxsub
    from jaxsub import errors

    rest, found = jaxsub_rest(opened) + 256, None  # the manifest grows a little with the ranks
    for _ in range(8):
        try:
            bundle = jaxsub.fit(opened, decomposition=decomposition, budget_bytes=budget + rest)
        except errors.ConfigError:
            return None
        if numbers(bundle) <= budget:
            found = bundle
            break
        rest -= max(min(numbers(bundle) - budget, 64), 16)
    if found is None:
        return None
    rebuilt = found.reconstruct_factors(found.coefficients())
    total = sum(inner(a, b, a, b) for _, a, b in layers)
    left = sum(square(a, b, *(x.astype(np.float64) for x in rebuilt[name])) for name, a, b in layers)
    return numbers(found), float(np.sqrt(left / total)), {o.name: rank_text(o) for o in found.layers}


def rank_text(layer):
    halves = f"/{layer.halves[0].shape[2]}" if layer.halves else ""
    return "x".join(str(k) for k in layer.subspace.rank.values()) + halves


def jaxsub_rest(opened):
    """Bytes of a bundle that are not counted here: manifest, headers, spectra."""
    import jaxsub

    bundle = jaxsub.fit(opened, rank=1)
    return bundle.accounting()["total"] - numbers(bundle)


# Comparison -----------------------------------------------------------------------------------------------------------


def compare(folder):
    opened, layers = read(folder)
    factors = ITEM * sum(a.size + b.size for _, a, b in layers)
    methods = dict(zip(PEERS, (lorashare, eigenlorax, jd_full, truncated), strict=True))
    curves = {name: peer_curve(method, layers) for name, method in methods.items()}
    rows = []
    for fraction in FRACTIONS:
        budget = round(fraction * factors)
        row = {"fraction": fraction, "budget": budget, "errors": {}, "bytes": {}}
        for name, decomposition in OURS.items():
            found = ours(opened, layers, decomposition, budget)
            row["errors"][name], row["bytes"][name] = (found[1], found[0]) if found else (None, None)
            row["ranks"] = found[2] if found and name == "jaxsub hooi" else row.get("ranks")
        for name, curve in curves.items():
            fits = [point for point in curve if point[0] <= budget]
            best = min(fits, key=lambda point: point[1]) if fits else (None, None)
            row["bytes"][name], row["errors"][name] = best
        rows.append(row)
    return {
        "collection": folder,
        "adapters": len(opened.refs),
        "layers": {name: [b.shape[1], a.shape[2], a.shape[1]] for name, a, b in layers},
        "factor_bytes": factors,
        "rows": rows,
        "curves": curves,
    }


def verdict(found):
    """What the table says of the two claims, one line each."""
    lines = []
    for peer in PEERS:
        pairs = [(r["errors"]["jaxsub hooi"], r["errors"][peer], r["fraction"]) for r in found["rows"]]
        worse = [
            f"{f:g}" for mine, other, f in pairs if other is not None and (mine is None or mine > other + ROUNDING)
        ]
        lines.append(f"jaxsub <= {peer}: " + (f"not at {', '.join(worse)}" if worse else "everywhere"))
    pairs = [(r["errors"]["jaxsub hooi"], r["errors"]["jaxsub hosvd"], r["fraction"]) for r in found["rows"]]
    worse = [f"{f:g}" for one, other, f in pairs if one is not None and one > other + ROUNDING]
    lines.append("hooi <= hosvd: " + (f"not at {', '.join(worse)}" if worse else "everywhere"))
    return lines


def table(found, name):
    heads = [*OURS, *PEERS]
    shapes = ", ".join(f"{n} {o} x {i}" for n, (o, i, _) in found["layers"].items())
    lines = [f"{name}: {found['adapters']} adapters, {shapes}; A and B {found['factor_bytes']} bytes"]
    lines.append(f"{'of A, B':>8} {'bytes':>9}" + "".join(f" {h:>12}" for h in heads) + "  ranks of jaxsub hooi")
    for row in found["rows"]:
        cells = [row["errors"][h] for h in heads]
        text = "".join(f" {'-' if c is None else format(c, '.4f'):>12}" for c in cells)
        ranks = " ".join((row["ranks"] or {}).values())
        lines.append(f"{row['fraction']:>8.0%} {row['budget']:>9}{text}  {ranks}")
    return "\n".join([*lines, *verdict(found)])


def draw(results, names, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    look = {"text.color": GREY, "axes.edgecolor": GREY, "axes.labelcolor": GREY, "xtick.color": GREY}
    pyplot.rcParams.update(look | {"ytick.color": GREY, "font.size": 11, "axes.linewidth": 0.8})
    figure, panels = pyplot.subplots(1, len(results), figsize=(8.4, 3.7), sharey=True, squeeze=False)
    for panel, found, name in zip(panels[0], results, names, strict=True):
        for method, (colour, marker, label) in STYLES.items():
            points = [(r["fraction"], r["errors"][method]) for r in found["rows"] if r["errors"][method] is not None]
            width = 2.4 if label == "jaxsub" else 1.4
            panel.plot(*zip(*points, strict=True), color=colour, marker=marker, ms=4.5, lw=width, label=label)
        panel.set_xscale("log")
        panel.set_xticks([0.02, 0.05, 0.12, 0.25, 0.5, 1.0], ["2", "5", "12", "25", "50", "100"])
        panel.minorticks_off()
        panel.set_xlabel("bytes, % of all A and B")
        panel.set_title(name, fontsize=11, color=GREY)
        panel.set_ylim(0, 1.02)
        panel.grid(color=GREY, alpha=0.25, lw=0.6)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    panels[0][0].set_ylabel("relative error")
    panels[0][0].legend(frameon=False, fontsize=10, loc="lower left")
    figure.tight_layout()
    figure.savefig(path, dpi=130, transparent=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collection", action="append", required=True, help="folder of LoRA adapters; may be repeated")
    parser.add_argument("--name", action="append", default=[], help="what to call it in table and picture")
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    names = arguments.name or arguments.collection
    if len(names) != len(arguments.collection):
        parser.error("as many --name as --collection, or none")
    results = [compare(folder) for folder in arguments.collection]
    os.makedirs(arguments.out, exist_ok=True)
    text = "\n\n".join(table(found, name) for found, name in zip(results, names, strict=True))
    with open(os.path.join(arguments.out, "comparison.json"), "w", encoding="utf-8") as file:
        json.dump(dict(zip(names, results, strict=True)), file, indent=1)
    with open(os.path.join(arguments.out, "comparison.txt"), "w", encoding="utf-8") as file:
        file.write(text + "\n")
    print(text)
    draw(results, names, os.path.join(arguments.out, "comparison.png"))


if __name__ == "__main__":
    main()
