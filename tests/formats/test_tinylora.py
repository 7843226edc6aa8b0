"""TINYLORA folders by their definition, B (sum_j v_j P_j) A, without PEFT."""

import re

import numpy as np
import pytest

from jaxsub import errors
from jaxsub.formats import _tinylora

RNG = np.random.default_rng(0)
PREFIX = "base_model.model."


def space(o, i, ranks, count, orientation="linear"):
    """A Space with orthonormal factors and cores of any size."""
    left, right = (np.linalg.qr(RNG.standard_normal((d, k)))[0].T for d, k in zip((o, i), ranks, strict=True))
    return _tinylora.Space(left, right, RNG.standard_normal((count, *ranks)), orientation)


def products(one):
    return np.einsum("ko,nkl,li->noi", one.left, one.cores, one.right)


def deltas(config, tensors, vector, layer, number, turned=False):
    v = vector[f"base_model.tinylora_v.{0 if config['weight_tying'] == 1 else number}"].astype(np.float64)
    a, b, p = (tensors[f"{PREFIX}{layer}.tinylora_{x}"].astype(np.float64) for x in "ABP")
    r = min(config["r"], a.shape[1], b.shape[0])  # as PEFT makes them
    assert (a.shape[0], b.shape[1], p.shape, v.shape) == (r, r, (config["u"], r, r), (config["u"],))
    delta = b @ np.tensordot(v, p, 1) @ a
    return delta.T if turned else delta


def check(spaces, modules=None):
    config, tensors, vectors = _tinylora.build(spaces, modules=modules)
    order = modules or sorted(spaces)
    for number, layer in enumerate(n for n in order if n in spaces):
        one = spaces[layer]
        for vector, wanted in zip(vectors, products(one), strict=True):
            found = deltas(config, tensors, vector, layer, number, one.orientation == "fan_in_fan_out")
            assert np.linalg.norm(found - wanted) <= 1e-6 * np.linalg.norm(wanted)
    return config, tensors, vectors


@pytest.mark.parametrize("modules", [None, ["m", "m.v", "m.q", "m.e"]])
@pytest.mark.parametrize("count", [1, 5, 40])
def test_every_member_comes_back(count, modules):
    spaces = {
        "m.q": space(9, 7, (3, 2), count),
        "m.v": space(4, 20, (1, 4), count, "fan_in_fan_out"),
        "m.e": space(30, 6, (2, 2), count, "embedding"),
    }
    config, tensors, vectors = check(spaces, modules)
    widths = [6 + 4 + 4] if modules is None else [6, 4, 4]
    assert (config["r"], config["u"]) == (4, max(min(count, width) for width in widths))
    assert len(vectors[0]) == len(widths) and config["weight_tying"] == (modules is None)
    assert {array.dtype.name for array in tensors.values()} == {"float32"}
    shapes = {key.removeprefix(PREFIX): array.shape for key, array in tensors.items()}
    assert shapes["m.v.tinylora_A"] == (4, 4) and shapes["m.v.tinylora_B"] == (20, 4)
    assert shapes["m.e.tinylora_A"] == (4, 6) and shapes["m.e.tinylora_B"] == (30, 4)


def test_members_of_very_different_size_come_back_alike():
    one = space(9, 7, (3, 3), 5)
    sizes = np.array([1.0, 1e-4, 1e3, 1e-6, 1.0])[:, None, None]
    small = space(8, 6, (3, 3), 5)
    check(
        {
            "q": _tinylora.Space(one.left, one.right, one.cores * sizes),
            "v": _tinylora.Space(small.left, small.right, small.cores * sizes * 1e-5),
        }
    )


def test_with_many_members_and_the_order_of_modules_vectors_are_coefficients():
    spaces = {"m.q": space(9, 7, (3, 2), 12), "m.v": space(9, 7, (3, 2), 12)}
    for modules in (["m.q", "m.v"], ["m.v", "x", "m.q"]):
        _, _, vectors = check(spaces, modules)
        for number, layer in enumerate(n for n in modules if n in spaces):
            wanted = spaces[layer].cores[4].reshape(-1).astype(np.float32)
            np.testing.assert_array_equal(vectors[4][f"base_model.tinylora_v.{number}"], wanted)
    with pytest.raises(errors.ConfigError, match=r"modules: no m\.q in them; did you mean"):
        _tinylora.build(spaces, modules=["m.p", "m.v"])


def test_cores_of_few_directions_need_few_numbers():
    one = space(9, 7, (3, 3), 8)
    planes = RNG.standard_normal((8, 2)) @ RNG.standard_normal((2, 9))
    config, _, _ = check({"q": _tinylora.Space(one.left, one.right, planes.reshape(8, 3, 3))})
    assert config["u"] == 2
    zero = _tinylora.build({"q": _tinylora.Space(one.left, one.right, 0 * one.cores)})
    assert zero[0]["u"] == 1 and not any(v.any() for vector in zero[2] for v in vector.values())


def test_a_member_without_a_layer_has_nothing_there():
    one, other = space(9, 7, (3, 3), 4), space(9, 7, (3, 3), 4)
    other.cores[2] = 0
    config, tensors, vectors = _tinylora.build({"q": one, "v": other})
    assert np.abs(deltas(config, tensors, vectors[2], "v", 1)).max() < 1e-6 * np.abs(products(one)[2]).max()


def test_only_whole_names_are_targets():
    config, _, _ = _tinylora.build({"h.0.q": space(5, 5, (2, 2), 3), "h.1.q": space(5, 5, (2, 2), 3)})
    names = ("h.0.q", "h.1.q", "h.2.q", "x.h.0.q", "hx0.q", "h.0.q.x")
    assert [n for n in names if re.fullmatch(config["target_modules"], n)] == ["h.0.q", "h.1.q"]


def test_more_directions_than_a_layer_is_wide_are_refused():
    with pytest.raises(errors.ConfigError, match="q: 5 directions on one side, TINYLORA holds 3 in a layer"):
        _tinylora.build({"q": space(3, 20, (2, 5), 6)})
    config, tensors, _ = check({"q": space(3, 20, (2, 3), 6), "w": space(9, 9, (5, 4), 6)})
    assert config["r"] == 5 and tensors[f"{PREFIX}q.tinylora_P"].shape == (6, 3, 3)
