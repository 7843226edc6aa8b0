"""Subspaces of a bundle as a network's layers hold them: flax kernels, (i, o) or (kh, kw, i, o).

Bundles of torch models and of adapters have matrices as (o, i) and kernels as (o, i, kh, kw): these are turned here,
once, by their names (`hidden.weight`, or `hidden` of a low-rank update, for the network's `hidden/kernel`).
"""

import math
import typing

import jax
import numpy as np

from jaxsub import errors, subspace
from jaxsub.linalg import orth


class Space(typing.NamedTuple):
    """The subspace of one layer, in the network's orientation; float32 on the host.

    Attributes:
        mean: (*shape), or None of low-rank updates, whose origin is the base.
        basis: (k, *shape) orthonormal, of a LinearSubspace, else None.
        factors: {axis: (k_m, d_m)} orthonormal rows, of a TuckerSubspace, else {}.
        members: (n, k...) coefficients of the bundle's models.
        values: {axis: (k_m,)} singular values of the factors; {-1: (k,)} of a basis.
        is_update: whether it is one of low-rank updates.
        order: axes of the bundle's layer that the network's are: network = bundle.transpose(order).
    """

    mean: typing.Any
    basis: typing.Any
    factors: typing.Any
    members: typing.Any
    values: typing.Any
    is_update: bool
    order: tuple


ORDERS = {2: (1, 0), 4: (2, 3, 1, 0)}  # from torch's axes to flax's


def flax_name(name, is_update=False):
    """(name in a flax network, whether its axes are torch's) of a layer of a bundle or a file."""
    slashed = name.replace(".", "/")
    if is_update:
        return (slashed if slashed.endswith("/kernel") else f"{slashed}/kernel"), True
    if slashed.endswith("/weight"):
        return slashed.removesuffix("weight") + "kernel", True
    return slashed, False


def of_bundle(bundle, shapes):
    """Spaces of a bundle's layers, by the network's names.

    Args:
        bundle: Bundle.
        shapes: {layer: shape} of the network.

    Raises:
        ConfigError: no layer of the bundle is one of the network; a shape that does not fit names the layer.
    """
    found = {}
    for layer in bundle.layers:
        is_update = layer.parametrisation == "lora"
        name, is_turned = flax_name(layer.name, is_update)
        if name in shapes:
            found[name] = _space(layer, name, tuple(shapes[name]), is_turned, is_update)
    if not found:
        theirs, own = (", ".join(errors.quote(n, 40) for n in [*names][:3]) for names in (
            [layer.name for layer in bundle.layers], shapes
        ))  # fmt: skip
        raise errors.ConfigError(f"the bundle has no layer of the network ({theirs}, ...; the network has {own}, ...)")
    return found


def with_directions(spaces):
    """Those of {layer: Space} that hold a direction: layers in which all of the bundle's models are equal have none.

    Raises:
        ConfigError: none does.
    """
    found = {n: s for n, s in spaces.items() if min(map(len, [s.basis] if s.basis is not None else s.factors.values()))}
    if spaces and not found:
        raise errors.ConfigError(
            "the bundle holds no directions: its models are equal in all layers of the network (are they copies?)"
        )
    return found


def turned(array, shape, name):
    """An array of a file, or of a bundle, in the network's orientation; `name` is what it is called there.

    Raises:
        ConfigError: it has another shape than the network's layer.
    """
    _, is_turned = flax_name(name)
    array = np.asarray(array)
    array = array.transpose(ORDERS[array.ndim]) if is_turned and array.ndim in ORDERS else array
    if array.shape != tuple(shape):
        raise errors.ConfigError(f"layer {errors.quote(name)}: shape {array.shape}, the network's has {tuple(shape)}")
    return array


def _space(layer, name, shape, is_turned, is_update):
    space, ndim = layer.subspace, len(layer.shape)
    order = ORDERS[ndim] if is_turned and ndim in ORDERS else tuple(range(ndim))
    if tuple(layer.shape[axis] for axis in order) != shape:
        raise errors.ConfigError(
            f"layer {errors.quote(name)}: shape {layer.shape} in the bundle, {shape} in the network"
        )
    if is_update and len(layer.subspace.shape) != ndim:
        raise errors.ConfigError(
            f"layer {errors.quote(name)}: updates of convolutions are not trained; fit the models' dense weights"
        )
    if isinstance(space, subspace.LinearSubspace):
        basis = np.asarray(space.basis, np.float32).reshape(-1, *layer.shape)
        basis = basis.transpose(0, *(axis + 1 for axis in order))
        mean = np.asarray(space.mean, np.float32).reshape(layer.shape).transpose(order)
        strengths = {-1: np.asarray(space.spectrum.values, np.float64)[: len(basis)]}
        return Space(mean, basis, {}, np.asarray(layer.values, np.float32), strengths, False, order)
    factors = {order.index(axis): np.asarray(f, np.float32) for axis, f in space.factors.items()}
    members = np.asarray(layer.values, np.float32).transpose(0, *(axis + 1 for axis in order))
    mean = None
    if not is_update:
        mean = np.broadcast_to(np.asarray(space.mean, np.float32), layer.shape).transpose(order)
    strengths = {order.index(axis): np.asarray(s.values, np.float64) for axis, s in space.spectra.items()}
    return Space(mean, None, dict(sorted(factors.items())), members, strengths, is_update, order)


def cap(space):
    """Most components there can be: members less one about a mean, at most the numbers of a weight."""
    return min(len(space.members) - (space.mean is not None), math.prod(space.basis.shape[1:]))


def augmented(rows, count, key):
    """Rows with `count` more: Gaussian ones made orthogonal to them and each other, twice.

    Args:
        rows: (k, D) orthonormal.
        count: rows to add; k + count <= D.
        key: typed key.

    Returns:
        (k + count, D) float32 orthonormal rows, the first k as they were.

    Raises:
        ConfigError: more rows than dimensions.

    Source: EigenLoRAx (Kaushik et al. 2025), which draws positive numbers, without a seed, and subtracts once.
    """
    k, size = rows.shape
    if not 0 <= count <= size - k:
        raise errors.ConfigError(f"augment={count}: {k} directions of {size}, at most {size - k} more are orthogonal")
    more = np.asarray(jax.random.normal(key, (count, size)), np.float64)
    known = np.asarray(rows, np.float64)
    for _ in range(2):
        more = more - (more @ known.T) @ known
        more = np.linalg.qr(more.T)[0].T
    return np.concatenate([rows, more.astype(np.float32)]) if count else np.asarray(rows, np.float32)


def orthonormal(key, k, size):
    """(k, D) orthonormal rows drawn uniformly, float32."""
    return np.asarray(orth.qr(jax.random.normal(key, (size, k)))[0]).T


def random_like(space, key, *, is_matched=False):
    """A Space of the same sizes about the same mean, with random directions.

    Args:
        space: Space.
        key: typed key.
        is_matched: whether directions have the covariance along every weight axis that the bundle's have, by their
            singular values, before they are made orthonormal: x_1 A_1^(1/2) x_2 A_2^(1/2) ... of Gaussian entries.
            What then still differs is which of such directions they are. Factors of weight axes have none to match,
            nor has an axis that is longer than the components are many and wide, as of a bias: in their covariance
            along it nothing but themselves could be drawn.
    """
    if space.basis is not None:
        k, shape = len(space.basis), space.basis.shape[1:]
        if not is_matched:
            return space._replace(basis=orthonormal(key, k, math.prod(shape)).reshape(space.basis.shape))
        strengths = np.zeros(k)
        strengths[: len(space.values[-1])] = space.values[-1][:k]
        own = strengths.reshape(-1, *[1] * len(shape)) * np.asarray(space.basis, np.float64)
        drawn = np.asarray(jax.random.normal(key, (k, *shape)), np.float64)
        for axis in (axis for axis, size in enumerate(shape, 1) if own.size >= size**2):
            drawn = _coloured(drawn, own, axis)
        rows = np.linalg.qr(drawn.reshape(k, -1).T)[0].T
        return space._replace(basis=rows.reshape(space.basis.shape).astype(np.float32))
    factors = {}
    for axis, f in space.factors.items():
        whole = len(f) == f.shape[1]
        factors[axis] = f if whole else orthonormal(jax.random.fold_in(key, axis), *f.shape)
    return space._replace(factors=factors)


def _coloured(drawn, own, axis):
    """Gaussian entries with the covariance that `own` has along an axis."""
    flat = np.moveaxis(own, axis, 0).reshape(own.shape[axis], -1)
    w, u = np.linalg.eigh(flat @ flat.T)
    root = (u * np.sqrt(np.maximum(w, 0))) @ u.T
    return np.moveaxis(np.tensordot(root, drawn, (1, axis)), 0, axis)


def leading(spaces, count):
    """{layer: components} of the `count` components with the largest singular values of all layers.

    Raises:
        ConfigError: more than the bundle holds.
    """
    ranked = sorted(
        ((-value, name) for name, space in spaces.items() if space.basis is not None
         for value in space.values[-1][: len(space.basis)])
    )  # fmt: skip
    if count > len(ranked):
        raise errors.ConfigError(f"dimension={count}: the bundle holds {len(ranked)} components in all; fit more")
    names = [name for _, name in ranked[:count]]
    return {name: names.count(name) for name in spaces}


def chosen(space, rank, name):
    """The first `rank` components (k, *shape) of a Space; all of them for 0.

    Raises:
        ConfigError: more than the bundle holds, or a subspace of another kind.
    """
    if space.basis is None:
        raise errors.ConfigError(
            f"layer {errors.quote(name)}: the bundle holds factors of its axes, no components; train its cores "
            "(parametrisation=core)"
        )
    if rank > len(space.basis):
        raise errors.ConfigError(
            f"layer {errors.quote(name)}: rank={rank}, but the bundle holds {len(space.basis)} components "
            f"({len(space.members)} models give {cap(space)} at most); fit more, or add random ones (augment)"
        )
    rows = space.basis[: rank or None]
    real = int((np.linalg.norm(np.reshape(rows, (len(rows), -1)), axis=1) > 0.5).sum())
    if real < len(rows) or not (space.values[-1][: len(rows)] > 0).all():
        raise errors.ConfigError(
            f"layer {errors.quote(name)}: of {len(rows)} components {len(rows) - real or 'some'} are no directions: "
            "the bundle's models do not differ in so many (are they copies?); ask for a smaller rank"
        )
    return rows


def saturated(spaces):
    """[(layer, components, models)] of bases with as many components as models allow: members lie in them anyway."""
    linear = {n: s for n, s in spaces.items() if s.basis is not None}
    return [(n, len(s.basis), len(s.members)) for n, s in linear.items() if len(s.basis) >= cap(s)]
