"""What must not change an analysis, or change it in one known way: relations after scikit-learn's estimator checks.

Order of the models, powers of two, a zero model, copies, a wider dtype, a second run, fewer layers, files that cannot
be written, turned features.
"""

import os

import numpy as np
import pytest

import jaxsub
from jaxsub.formats import safetensors
from tests.figures_log import record
from tests.folders import contents
from tests.programs import worlds
from tests.selected import first

SHAPES = {"wide": (9, 7), "narrow": (4,), "kernel": (3, 2, 2, 2)}
FIGURES = ("singular_values", "uncentred_singular_values", "floor", "total_energy")


@pytest.fixture
def stacks():
    """layer -> (11, *shape) float32 with a shared part; integers over 64, which every scale here keeps exactly."""
    found = {name: worlds.planted(11, shape, k=2, seed=n) for n, (name, shape) in enumerate(SHAPES.items())}
    return {name: np.round(x * 64).astype(np.float32) / 64 for name, x in found.items()}


def analyse(folder, stacks, **options):
    return jaxsub.analyze(str(worlds.write(folder, stacks)), draws=2, splits=1, **options)


def require_equal(a, b, but=()):
    """The same layers, bit for bit; nested figures too."""
    assert len(a.layers) == len(b.layers) > 0
    for one, other in zip(a.layers, b.layers, strict=True):
        assert {k: v for k, v in one.items() if k not in but} == {k: v for k, v in other.items() if k not in but}


def require_close(a, b, tolerance):
    """The same values over the floor, verdicts and held-out errors."""
    for one, other in zip(a.layers, b.layers, strict=True):
        s, t = (np.array(layer["singular_values"]) for layer in (one, other))
        over = s > one["floor"]
        np.testing.assert_allclose(t[over], s[over], atol=tolerance * s[0], rtol=0)
        assert other["verdict"] == one["verdict"] and other["num_models"] == one["num_models"]
        np.testing.assert_allclose([*other["held_out"].values()], [*one["held_out"].values()], atol=1e-6)


def done(name):
    record("NUM-3", "relations that hold", name)


@pytest.mark.slow
def test_a_second_run_is_the_same(tmp_path, stacks):
    once = analyse(tmp_path / "c", stacks)
    require_equal(once, jaxsub.analyze(str(tmp_path / "c"), draws=2, splits=1))
    done("a second analysis")
    jaxsub.fit(str(tmp_path / "c"), tmp_path / "a", rank=2)
    jaxsub.fit(str(tmp_path / "c"), tmp_path / "b", rank=2)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    done("a second fit")


@pytest.mark.slow
def test_the_order_of_models(tmp_path, stacks):
    order = np.random.default_rng(2).permutation(11)
    turned = {name: x[order] for name, x in stacks.items()}
    require_close(analyse(tmp_path / "a", stacks), analyse(tmp_path / "b", turned), 1e-13)
    done("order of the models")


@pytest.mark.slow
@pytest.mark.parametrize("power", [5, -20])
def test_a_power_of_two(tmp_path, stacks, power):
    a = analyse(tmp_path / "a", stacks)
    b = analyse(tmp_path / "b", {name: np.ldexp(x, power) for name, x in stacks.items()})
    for one, other in zip(a.layers, b.layers, strict=True):
        for key in ("singular_values", "uncentred_singular_values"):
            assert np.array_equal(np.ldexp(one[key], power), other[key]), key
        assert one["floor"] * 2.0**power == other["floor"] and one["verdict"] == other["verdict"]
        assert one["held_out"] == other["held_out"] and one["energy_at"] == other["energy_at"]
    done(f"a factor of 2**{power}, to the bit")


@pytest.mark.slow
def test_a_zero_model(tmp_path, stacks):
    """Uncentred values stay; nothing is divided by its norm."""
    a = analyse(tmp_path / "a", stacks)
    b = analyse(tmp_path / "b", {name: np.concatenate([x, 0 * x[:1]]) for name, x in stacks.items()})
    for one, other in zip(a.layers, b.layers, strict=True):
        s, t = (np.array(layer["uncentred_singular_values"]) for layer in (one, other))
        np.testing.assert_allclose(t[: len(s)], s, atol=max(one["floor"], other["floor"]))
        assert other["num_models"] == 12
    assert np.isfinite([v for layer in b.layers for v in layer["held_out"].values()]).all()
    done("a zero model")


def test_a_copy_of_a_model(tmp_path, stacks):
    a = analyse(tmp_path / "a", stacks)
    b = analyse(tmp_path / "b", {name: np.concatenate([x, x[4:5]]) for name, x in stacks.items()})
    require_equal(a, b)
    assert b["collection"]["duplicates"] == [["m004", "m011"]]
    done("a copy of a model")


@pytest.mark.slow
def test_sixteen_bits_are_their_upcast(tmp_path, stacks):
    import ml_dtypes

    narrow = {name: x.astype(ml_dtypes.bfloat16) for name, x in stacks.items()}
    wide = {name: x.astype(np.float32) for name, x in narrow.items()}
    a, b = analyse(tmp_path / "a", narrow), analyse(tmp_path / "b", wide)
    for one, other in zip(a.layers, b.layers, strict=True):
        for key in ("singular_values", "uncentred_singular_values", "held_out", "verdict", "energy_at"):
            assert one[key] == other[key], key
    done("bfloat16 and its float32 upcast, to the bit")


@pytest.mark.parametrize("layer", first(["wide", "narrow", "kernel"]))
def test_fewer_layers_are_the_same_layers(tmp_path, stacks, layer):
    whole = {one["name"]: one for one in analyse(tmp_path / "c", stacks).layers}
    (alone,) = jaxsub.analyze(str(tmp_path / "c"), draws=2, splits=1, layers=(layer,)).layers
    assert alone == whole[layer]
    done(f"{layer} alone")


@pytest.mark.slow
def test_inputs_that_cannot_be_written(tmp_path, stacks):
    a = analyse(tmp_path / "c", stacks)
    for path in (tmp_path / "c").iterdir():
        os.chmod(path, 0o444)
    os.chmod(tmp_path / "c", 0o555)
    require_equal(a, jaxsub.analyze(str(tmp_path / "c"), draws=2, splits=1))
    made = jaxsub.fit(str(tmp_path / "c"), rank=2)
    os.chmod(tmp_path / "c", 0o755)
    x = {name: np.array(stack) for name, stack in stacks.items()}
    for stack in x.values():
        stack.flags.writeable = False
    for name, values in made.project(x).values.items():
        np.testing.assert_array_equal(values, made.project(stacks).values[name])
    done("files and arrays that cannot be written")


@pytest.mark.slow
def test_turned_features(tmp_path, stacks):
    """An orthogonal map of a layer's entries changes no distance between models: float64, to its rounding."""
    rng = np.random.default_rng(5)
    wide = {name: x.astype(np.float64) for name, x in stacks.items()}
    turned = {}
    for name, x in wide.items():
        q = np.linalg.qr(rng.standard_normal((x[0].size, x[0].size)))[0]
        turned[name] = (x.reshape(len(x), -1) @ q).reshape(x.shape)
    a, b = analyse(tmp_path / "a", wide), analyse(tmp_path / "b", turned)
    for one, other in zip(a.layers, b.layers, strict=True):
        s, t = (np.array(layer["singular_values"]) for layer in (one, other))
        np.testing.assert_allclose(t, s, atol=100 * 2.0**-52 * s[0])
        np.testing.assert_allclose([*other["held_out"].values()], [*one["held_out"].values()], atol=1e-9)
    done("turned features")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gram", "hosvd"])
def test_relations_of_a_fit(tmp_path, stacks, method):
    """Powers of two and fewer layers, to the bit; the order of models, to rounding."""
    options = {"decomposition": method, "rank": 2}
    plain = jaxsub.fit(str(worlds.write(tmp_path / "a", stacks)), **options)
    scaled = jaxsub.fit(str(worlds.write(tmp_path / "b", {n: np.ldexp(x, 7) for n, x in stacks.items()})), **options)
    order = np.random.default_rng(2).permutation(11)
    turned = jaxsub.fit(str(worlds.write(tmp_path / "d", {n: x[order] for n, x in stacks.items()})), **options)
    (alone,) = jaxsub.fit(str(tmp_path / "a"), layers=("wide",), **options).layers
    for one, two, three in zip(plain.layers, scaled.layers, turned.layers, strict=True):
        assert np.array_equal(np.ldexp(one.values, 7), two.values)
        if one.name == "wide":
            assert np.array_equal(alone.values, one.values)
        again = [np.asarray(layer.subspace.reconstruct(layer.values)) for layer in (one, three)]
        np.testing.assert_allclose(again[1], again[0][order], atol=1e-4)
    done(f"powers of two, fewer layers and order in fits of {method}")


def test_a_broken_relation_is_seen(tmp_path, stacks):
    """The comparisons above notice one changed entry in one of 11 models."""
    other = {name: np.array(x) for name, x in stacks.items()}
    for x in other.values():
        x[3].reshape(-1)[0] += 1 / 64
    a, b = analyse(tmp_path / "a", stacks), analyse(tmp_path / "b", other)
    with pytest.raises(AssertionError):
        require_equal(a, b)
    with pytest.raises(AssertionError):
        require_close(a, b, 1e-13)
    assert len(os.listdir(tmp_path / "a")) == 11 and safetensors.read(tmp_path / "a" / "m000.safetensors")
