"""Merge methods in NumPy float64, written from the papers and released scripts, without jaxsub's code.

Each takes updates x (N, *shape), differences to a base, and gives the merged update (*shape).
"""

import numpy as np

EPS32 = float(np.finfo(np.float32).eps)


def ones(x):
    return np.ones(len(x))


def mean(x, weights=None):
    a = ones(x) if weights is None else np.asarray(weights)
    return sum(w * row for w, row in zip(a, x, strict=True)) / a.sum()


def task_arithmetic(x, scaling=0.3, weights=None):
    a = ones(x) if weights is None else np.asarray(weights)
    return scaling * sum(w * row for w, row in zip(a, x, strict=True))


def slerp(x, t=0.5):
    p, q = x
    cosine = np.sum(p * q) / np.linalg.norm(p) / np.linalg.norm(q)
    if abs(cosine) > 0.9995:
        return (1 - t) * p + t * q
    angle = np.arccos(cosine)
    return (np.sin((1 - t) * angle) * p + np.sin(t * angle) * q) / np.sin(angle)


def spherical(x, weights=None, steps=200):
    """In all D coordinates, not in the span."""
    a = ones(x) if weights is None else np.asarray(weights)
    a = a / a.sum()
    flat = x.reshape(len(x), -1)
    norms = np.linalg.norm(flat, axis=1)
    units = flat / norms[:, None]
    m = a @ units
    m /= np.linalg.norm(m)
    for _ in range(steps):
        dots = np.clip(units @ m, -1, 1)
        angles = np.arccos(dots)
        logs = np.where(angles > 1e-9, angles / np.sin(np.maximum(angles, 1e-9)), 1)[:, None] * (
            units - dots[:, None] * m
        )
        step = a @ logs
        length = np.linalg.norm(step)
        if length < 1e-14:
            break
        m = np.cos(length) * m + np.sin(length) * step / length
        m /= np.linalg.norm(m)
    return ((a @ norms) * m).reshape(x.shape[1:])


def model_stock(x):
    count, flat = len(x), x.reshape(len(x), -1)
    pairs = [
        flat[i] @ flat[j] / max(np.linalg.norm(flat[i]) * np.linalg.norm(flat[j]), 1e-300)
        for i in range(count)
        for j in range(i + 1, count)
    ]
    cosine = np.mean(pairs)
    t = count * cosine / (1 + (count - 1) * cosine)
    return t * x.mean(axis=0)


def trim(row, density):
    """The int(density D) entries of largest magnitude."""
    kept = max(1, int(density * row.size))
    order = np.argsort(-np.abs(row).reshape(-1), kind="stable")[:kept]
    out = np.zeros(row.size)
    out[order] = row.reshape(-1)[order]
    return out.reshape(row.shape)


def elect(x, weights, function):
    weighted = x * weights.reshape(-1, *[1] * (x.ndim - 1))
    sign = np.where(weighted.sum(axis=0) >= 0, 1.0, -1.0)
    agree = np.sign(weighted) == sign
    total = (weighted * agree).sum(axis=0)
    if function == "sum":
        return total
    share = (agree * weights.reshape(-1, *[1] * (x.ndim - 1))).sum(axis=0)
    return total / np.where(share == 0, 1, share)


def ties(x, density=0.2, scaling=1.0, function="mean", weights=None):
    a = ones(x) if weights is None else np.asarray(weights, float)
    return scaling * elect(np.stack([trim(row, density) for row in x]), a, function)


def magnitude(x, density=0.2, scaling=0.3, weights=None):
    return task_arithmetic(np.stack([trim(row, density) for row in x]), scaling, weights)


def without_ends(row, density, gamma):
    size = row.size
    kept = int(density * size)
    below = max(0, size - kept - int(gamma * size))
    order = np.argsort(np.abs(row).reshape(-1), kind="stable")[below : below + kept]
    out = np.zeros(size)
    out[order] = row.reshape(-1)[order]
    return out.reshape(row.shape)


def breadcrumbs(x, density=0.14, gamma=0.01, scaling=0.3, elected=False, weights=None):
    a = ones(x) if weights is None else np.asarray(weights, float)
    masked = np.stack([without_ends(row, density, gamma) for row in x])
    return scaling * elect(masked, a, "sum") if elected else task_arithmetic(masked, scaling, weights)


def pcb(x, ratio=0.1, scaling=1.0):
    """The released script."""

    def normalize(v):
        low, high = v.min(axis=1, keepdims=True), v.max(axis=1, keepdims=True)
        return (v - low) / (high - low)

    def clamp(v, below, above):
        s = np.sort(v, axis=1)
        d = v.shape[1]
        return np.clip(v, s[:, [int(d * below)]], s[:, [int(d * (1 - above) - 1)]])

    flat = x.reshape(len(x), -1)
    size = clamp(np.abs(flat), 1e-4, 1e-4)
    cut = np.sign(flat) * size
    score = np.exp(len(x) * normalize(size) ** 2) * np.tanh(flat * flat.sum(axis=0))
    share = normalize(clamp(score, 1 - ratio, 0))
    merged = (cut * share).sum(axis=0) / np.maximum(share.sum(axis=0), 1e-12)
    return scaling * merged.reshape(x.shape[1:])


def fisher(x, f, floor=1e-6, weights=None):
    a = ones(x) if weights is None else np.asarray(weights)
    a = a.reshape(-1, *[1] * (x.ndim - 1))
    return (a * (f + floor) * x).sum(axis=0) / (a * (f + floor)).sum(axis=0)


def regmean(x, g, shrink=0.9, weights=None):
    a = ones(x) if weights is None else np.asarray(weights)
    g = np.stack([w * (shrink * one + (1 - shrink) * np.diag(np.diag(one))) for w, one in zip(a, g, strict=True)])
    return sum(row @ one for row, one in zip(x, g, strict=True)) @ np.linalg.inv(g.sum(axis=0))


def rank_of(s, shape, eps=EPS32):
    return int(np.sum(s > max(shape) * eps * s[0]))


def polar(x):
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    k = rank_of(s, x.shape)
    return u[:, :k] @ vt[:k]


def iso_c(x, scaling=1.0):
    if x.ndim != 3:
        return scaling * x.mean(axis=0)
    u, s, vt = np.linalg.svd(x.sum(axis=0), full_matrices=False)
    k = rank_of(s, x.shape[1:])
    return scaling * s[:k].mean() * u[:, :k] @ vt[:k]


def iso_cts(x, common=0.8, scaling=1.0, size=None):
    if x.ndim != 3:
        return scaling * x.mean(axis=0)
    size = min(x.shape[1:]) if size is None else size
    each = round((size - int(size * common)) / len(x))
    shared = size - each * len(x)
    u, s, vt = np.linalg.svd(x.sum(axis=0), full_matrices=False)
    k = min(shared, rank_of(s, x.shape[1:]))
    left, values, right = [u[:, :k]], [s[:k]], [vt[:k]]
    for w in x:
        own = np.linalg.svd(w - u[:, :k] @ (u[:, :k].T @ w), full_matrices=False)
        r = min(each, rank_of(own[1], x.shape[1:]))
        left.append(own[0][:, :r])
        values.append(own[1][:r])
        right.append(own[2][:r])
    return scaling * np.concatenate(values).mean() * polar(np.hstack(left)) @ polar(np.vstack(right).T).T


def tsv(x, scaling=1.0):
    if x.ndim != 3:
        return scaling * x.mean(axis=0)
    each = min(x.shape[1:]) // len(x)
    left, values, right = [], [], []
    for w in x:
        u, s, vt = np.linalg.svd(w, full_matrices=False)
        r = min(each, rank_of(s, w.shape))
        left.append(u[:, :r])
        values.append(s[:r])
        right.append(vt[:r])
    return scaling * polar(np.hstack(left)) @ np.diag(np.concatenate(values)) @ polar(np.vstack(right).T).T


def knots(x, inner):
    if x.ndim != 3:
        return inner(x)
    u, s, vt = np.linalg.svd(np.hstack(list(x)), full_matrices=False)
    k = rank_of(s, u.shape, eps=1e-9)
    parts = np.stack(np.split(np.diag(s[:k]) @ vt[:k], len(x), axis=1))
    return u[:, :k] @ inner(parts)


def wudi(x, steps=300, rate=1e-5, scaling=1.0):
    if x.ndim != 3:
        return scaling * x.mean(axis=0)
    t = x.sum(axis=0)
    m, v = np.zeros_like(t), np.zeros_like(t)
    squares = np.square(x).sum(axis=(1, 2))
    for step in range(1, steps + 1):
        gradient = 2 * sum((t - w) @ w.T @ w / q for w, q in zip(x, squares, strict=True))
        m = 0.9 * m + 0.1 * gradient
        v = 0.999 * v + 0.001 * gradient**2
        t = t - rate * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
    return scaling * t


def wudi_exact(x, scaling=1.0):
    """The least-squares problem as one: all rows of (T - W_n) W_n.T / |W_n|, the solution nearest to the sum."""
    norms = np.linalg.norm(x.reshape(len(x), -1), axis=1)
    stacked = np.vstack([w / q for w, q in zip(x, norms, strict=True)])
    wanted = np.hstack([w @ w.T / q for w, q in zip(x, norms, strict=True)])
    start = x.sum(axis=0)
    return scaling * (start + np.linalg.lstsq(stacked, (wanted - start @ stacked.T).T, rcond=1e-6)[0].T)


def subspace(x, rank, energy=0.9):
    """(U_1, U_2) by singular value decompositions of the unfoldings."""
    found = []
    for unfolding in (np.hstack(list(x)), np.hstack([w.T for w in x])):
        u, s, _ = np.linalg.svd(unfolding, full_matrices=False)
        share = np.cumsum(s**2) / np.sum(s**2)
        found.append(u[:, : rank or int(np.argmax(share >= energy * (1 - 1e-12))) + 1])
    return found


def inside(x, rank, function):
    """U_1 function(U_1.T x_n U_2) U_2.T."""
    left, right = subspace(x, rank)
    return left @ function(np.stack([left.T @ w @ right for w in x])) @ right.T


def rescaled(c):
    mean = c.mean(axis=0)
    return mean * np.mean([np.linalg.norm(one) for one in c]) / np.linalg.norm(mean)
