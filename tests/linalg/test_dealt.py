"""Tucker fits of models dealt to devices: those of one device, and devices exchange squares of small sides alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from jaxsub import errors, placement, stacks
from jaxsub.linalg import centring, dealt, factored, mode_gram, rebuild, tucker, unfold
from jaxsub.pipelines import sharing
from tests.linalg.compiled import executed
from tests.selected import first

pytestmark = pytest.mark.usefixtures("x64")
N, D, R = 10, (40, 30, 3), 4


def placed(x, devices):
    return sharing.placed(x, placement.make_mesh(devices), by_rows=False)


def shape(dims, devices=8, spec=None):
    sharding = NamedSharding(placement.make_mesh(devices), P("features") if spec is None else spec)
    return jax.ShapeDtypeStruct(dims, jnp.float32, sharding=sharding)


@pytest.fixture(scope="module")
def x():
    rng = np.random.default_rng(0)
    core, factors = rng.standard_normal((N, 4, 3, 2)), [rng.standard_normal(s) for s in zip((4, 3, 2), D, strict=True)]
    x = np.einsum("nabc,ai,bj,ck->nijk", core, *factors)
    return (x + 0.5 * rng.standard_normal(x.shape)).astype(np.float32)


def test_an_array_says_what_its_first_axis_is_dealt_to(x):
    mesh = placement.make_mesh(5)
    there = placed(x, 5)
    assert dealt.mesh_of(there) == dealt.mesh_of(there * 2) == dealt.mesh_of(jnp.swapaxes(there, 1, 2)) == mesh
    others = [x, jnp.asarray(x), placed(x, 1), sharing.placed(x, placement.make_mesh(8), by_rows=True)]
    assert [dealt.mesh_of(y) for y in others] == [None] * 4
    assert dealt.mesh_of(others[3], 1) == placement.make_mesh(8)
    assert jax.jit(lambda y: y * (dealt.mesh_of(y) is None))(there).sum() != 0


FITS = [(tucker.hosvd, {"ranks": (None, 4, None, None), "certify": "norms"}, 4)]
FITS += [
    (fit, rule, devices)
    for fit in (tucker.hosvd, tucker.sthosvd, tucker.hooi)
    for rule in ({"ranks": (None, 4, 3, 2)}, {"energy": 0.8, "axes": (1, 2)}, {"error": 0.3, "axes": (1, 2, 3)})
    for devices in (2, 4, 8)
]


@pytest.mark.slow
@pytest.mark.parametrize("fit, rule, devices", FITS)
def test_a_fit_is_that_of_one_device(x, fit, rule, devices):
    one, many = fit(jnp.asarray(x), **rule), fit(placed(x, devices), **rule)
    assert dealt.mesh_of(many.core) is not None and one.core.shape[1:] == many.core.shape[1:]
    for a, b in zip(one.factors, many.factors, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            a, b = np.asarray(a), np.asarray(b)
            np.testing.assert_allclose(b.T @ b, a.T @ a, atol=2e-4)
    assert float(many.error) == pytest.approx(float(one.error), abs=1e-6)
    assert float(many.certificate) == pytest.approx(float(one.certificate), rel=1e-3)
    assert many.num_passes == one.num_passes or fit is tucker.hooi  # which stops by the last digits of an error
    whole = np.asarray(tucker.reconstruct(many._replace(core=jnp.asarray(np.asarray(many.core)))))
    left = np.linalg.norm(x - whole[:N]) / np.linalg.norm(x)  # by norms the error is right to 1e-3
    assert left == pytest.approx(float(many.error), abs=1e-3) and not np.abs(whole[N:]).max(initial=0)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4, 8])
@pytest.mark.parametrize("fit", [factored.hosvd, factored.hooi])
def test_a_fit_of_low_rank_updates_is_that_of_one_device(fit, devices):
    rng = np.random.default_rng(1)
    shapes = (N, R, 40), (N, 30, R), (N,)
    parts = [rng.standard_normal(s).astype(np.float32) for s in shapes]
    stack = sharing.updates(stacks.LoraStack(*parts), placement.make_mesh(devices))
    assert dealt.mesh_of(stack.a) is not None and stack.num_models == N
    one, many = (fit(*given, ranks=(5, 6)) for given in (parts, (stack.a, stack.b, stack.scales)))
    for a, b in zip(one.factors, many.factors, strict=True):
        np.testing.assert_allclose(np.asarray(b).T @ np.asarray(b), np.asarray(a).T @ np.asarray(a), atol=2e-4)
    assert float(many.error) == pytest.approx(float(one.error), abs=1e-6)
    np.testing.assert_allclose(many.energies[0], one.energies[0], rtol=1e-5, atol=1e-5 * float(one.energies[0][0]))
    with pytest.raises(errors.ConfigError, match="centred"):
        fit(stack.a, stack.b, stack.scales, ranks=(5, 6), centred=True)


def test_the_axis_that_is_dealt_stays_free(x):
    there = placed(x, 5)
    for call in (
        lambda: tucker.hosvd(there, ranks=(3, 4, 3, 2)),
        lambda: mode_gram.mode_gram(there, axis=0, dtype="float32"),
        lambda: unfold.mode_product(there, jnp.ones((3, N)), -4),
    ):
        with pytest.raises(errors.ConfigError, match="axis 0 is dealt"):
            call()


# What is sent -----------------------------------------------------------------------------------------------------


def sent(lowered):
    return executed(lowered.compile().as_text())


@pytest.mark.parametrize("axis", first([2, 1, 3]))
@pytest.mark.parametrize("devices", first([8, 2, 4]))
def test_mode_grams_are_summed_and_products_send_nothing(axis, devices):
    mesh, y = placement.make_mesh(devices), shape((16, *D), devices)
    size = y.shape[axis]
    found = mode_gram._mode_gram.lower(y, axis=axis, dtype="float32", mesh=mesh)
    assert sent(found) == [("all-reduce", 8 * size**2)]
    factor = shape((2, size), devices, P())
    products = unfold._mode_products.lower(y, [factor], axes=(axis,), dtype=jnp.dtype("float32"), mesh=mesh)
    assert sent(products) == []


def test_errors_are_numbers():
    mesh, y, core = placement.make_mesh(8), shape((16, *D)), shape((16, 4, 3, 3))
    factors = None, shape((4, 40), spec=P()), shape((3, 30), spec=P()), None
    assert sent(tucker._residual_square.lower(y, core, factors, dtype="float32", mesh=mesh)) == [("all-reduce", 8)]
    assert sent(tucker._one_minus.lower(core, jnp.ones(()), mesh=mesh)) == [("all-reduce", 8)]


def test_a_shrunk_unfolding_that_comes_together_is_smaller_than_its_gram_matrix():
    """40 rows of 8 x 1 columns: a fifth of 40 x 40."""
    y = shape((8, 40, 1))
    assert sent(tucker._thin.lower(y, axis=1, dtype="float32", mesh=placement.make_mesh(8))) == [
        ("all-gather", 4 * 8 * 40)
    ]


def test_low_rank_updates_exchange_the_same():
    mesh, parts = placement.make_mesh(8), (shape((16, R, 40)), shape((16, 30, R)), shape((16,)))
    u, v = shape((5, 30), spec=P()), shape((6, 40), spec=P())
    found = factored._gram.lower(*parts, side="in", centred=False, dtype="float32", mesh=mesh)
    assert sent(found) == [("all-reduce", 8 * 40**2)]
    assert sent(factored._cores.lower(*parts, u, v, centred=False, mesh=mesh)) == []
    assert sent(factored._residual_square.lower(*parts, u, v, centred=False, mesh=mesh)) == [("all-reduce", 8)]


def test_means_of_columns_are_small_sums_and_rebuilds_send_nothing():
    mesh, y, present = placement.make_mesh(8), shape((16, *D)), np.ones(16, bool)
    given = shape((2, 1, *D), spec=P())
    assert sent(centring.centred.lower(y, present, 16, given, mesh=mesh)) == []
    columns = centring.centred.lower(y, present, 16, by="columns", axis=0, mesh=mesh)
    assert sent(columns) == [("all-reduce", 8 * 40)] * 2
    assert sent(centring.centred.lower(y, present, 16, by="none", mesh=mesh)) == []
    assert sent(centring.energy.lower(y, present, given, mesh=mesh)) == [("all-reduce", 8)]
    of_features = shape((16, 40, 24), spec=P(None, "features"))
    assert sent(centring.centred.lower(of_features, present, 16, shared=mesh)) == []
    assert sent(centring.energy.lower(of_features, present, shared=mesh)) == [("all-reduce", 8)]
    factors = {0: shape((4, 40), spec=P()), 1: shape((3, 30), spec=P())}
    core, zero = shape((16, 4, 3, 3)), shape((1, 1, 1), spec=P())
    assert sent(rebuild.missed_models.lower(y, core, zero, factors, mesh=mesh)) == []


# Stacks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "centring, axis", [("models", None), pytest.param("columns", 1, marks=pytest.mark.slow), ("none", None)]
)
def test_a_dealt_stack_is_centred_as_one_on_one_device(x, centring, axis):
    x = x + 100
    chosen = [0, 3, 4, 8]
    one, many = stacks.DenseStack.create(x), stacks.DenseStack.create(placed(x, 8), host=x)
    assert many.num_models == N and len(many.x) == 16
    for a, b, rows in ((one, many, np.arange(N)), (one.take(chosen), many.take(chosen), np.asarray(chosen))):
        (y, mean), (z, other) = a.centred(centring, axis), b.centred(centring, axis)
        np.testing.assert_allclose(other, mean, rtol=1e-6)
        z = np.asarray(z)
        np.testing.assert_allclose(z[rows], y, atol=3e-5)
        assert not np.delete(z, rows, axis=0).any()
        assert centring != "models" or np.abs(z[rows].mean(axis=0, dtype=float)).max() < 1e-6  # 4e-6 is half a digit
        assert b.centred_energy() == pytest.approx(a.centred_energy(), rel=1e-6)


def test_a_nan_in_a_dealt_stack_is_named(x):
    bad = x.copy()
    bad[7, 0, 0, 0] = np.nan
    with pytest.raises(errors.InputError, match="c7"):
        stacks.DenseStack.create(placed(bad, 4), "w", tuple(f"c{n}" for n in range(N)), host=bad)
