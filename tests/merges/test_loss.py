"""Methods that look at the merged model through a loss of the user's: AdaMerging, Concrete masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsub import errors, plugins, rows, subspace
from jaxsub.merges import _descent, _whole, concrete
from tests.merges import stacks, twins

KEY = jax.random.key(0)


def whole(layers, others=None):
    """A Whole of ArrayRows or LoraRows by name."""
    with jax.enable_x64(True):
        return _whole.Whole(layers, {n: _whole.stack(r) for n, r in layers.items()}, {}, others or {})


def problem(seed=0):
    """Two models of two layers about a base, and the weights that are wanted."""
    x = {"w": stacks.dense((6, 5), 2, seed), "b": stacks.dense((6,), 2, seed + 1)}
    base = {"w": stacks.dense((6, 5), 1, 5)[0], "b": stacks.dense((6,), 1, 6)[0]}
    own = {n: rows.ArrayRows(x[n], n, ["m0", "m1"], base=base[n]) for n in x}
    return x, base, whole(own, {"fixed": jnp.ones(3)})


def fit(name, models, loss, **options):
    module = plugins.load("merges", name)
    return module.merge_models(models, loss, module.Options(**options), KEY)


@pytest.mark.parametrize("per", ["layer", "model"])
def test_adamerging_finds_the_coefficients_that_the_loss_wants(per):
    x, base, models = problem()
    wanted = {"w": (0.8, 0.1), "b": (0.8, 0.1) if per == "model" else (0.2, 0.6)}
    target = {n: base[n] + np.tensordot(wanted[n], x[n], 1) for n in x}

    def loss(weights):
        assert {*weights} == {"w", "b", "fixed"}
        return sum(jnp.sum(jnp.square(weights[n] - target[n])) for n in target) * 1e3

    results, figures = fit("adamerging", models, loss, per=per, steps=800, rate=0.02)
    for n, c in wanted.items():
        np.testing.assert_allclose(figures["coefficients"][n], c, atol=2e-3)
        assert stacks.relative(results[n].array(x[n].shape[1:]), target[n].astype(float)) < 1e-3
    assert figures["losses"][-1] < 1e-4 * figures["losses"][0]


def test_coefficients_stay_between_0_and_1_unless_told_otherwise():
    x, base, models = problem()
    target = base["w"] + 1.5 * x["w"][0] - 0.5 * x["w"][1]
    loss = lambda weights: 1e3 * jnp.sum(jnp.square(weights["w"] - target))  # noqa: E731
    _, clamped = fit("adamerging", models, loss, steps=500, rate=0.02)
    _, free = fit("adamerging", models, loss, steps=800, rate=0.02, clamp=False)
    grid = np.stack(np.meshgrid(*[np.linspace(0, 1, 201)] * 2, indexing="ij"), -1).reshape(-1, 2)
    errors_ = np.square(np.tensordot(grid, x["w"], 1) + base["w"] - target).sum(axis=(1, 2))
    np.testing.assert_allclose(clamped["coefficients"]["w"], grid[errors_.argmin()], atol=0.02)
    assert 0 <= min(clamped["coefficients"]["w"]) and max(clamped["coefficients"]["w"]) <= 1
    np.testing.assert_allclose(free["coefficients"]["w"], (1.5, -0.5), atol=1e-2)


def test_adamerging_of_low_rank_updates_stays_factored():
    parts = stacks.factors(ranks=(2, 1))
    own = stacks.of_factors(*parts)
    target = np.tensordot((0.9, 0.2), stacks.products(*parts), 1)

    def loss(weights):
        a, b = weights["layer.weight"]
        assert a.shape == (4, 11) and b.shape == (14, 4)
        return jnp.mean(jnp.square(b @ a - target))

    results, figures = fit("adamerging", whole({"layer.weight": own}), loss, steps=600, rate=0.02)
    np.testing.assert_allclose(figures["coefficients"]["layer.weight"], (0.9, 0.2), atol=1e-2)
    assert isinstance(results["layer.weight"], rows.Factors)


def test_a_mask_of_ones_is_task_arithmetic():
    x, base, models = problem()
    results, figures = fit("concrete", models, lambda w: jnp.sum(w["w"]), steps=0)
    for n in x:
        wanted = base[n] + twins.task_arithmetic(x[n].astype(float))
        assert stacks.relative(results[n].array(x[n].shape[1:]), wanted) < 1e-6
    assert figures["kept"]["w"] == 0.5


def test_a_learned_mask_keeps_what_the_loss_wants_and_beats_its_inner_method():
    x, base, models = problem()
    mask = np.zeros((6, 5))
    mask[:, :2] = 1
    summed = 0.3 * x["w"].sum(axis=0)
    target = base["w"] + summed * mask / mask.mean()
    loss = lambda weights: 1e3 * jnp.mean(jnp.square(weights["w"] - target))  # noqa: E731
    results, figures = fit("concrete", models, loss, steps=600, rate=0.05)
    inner = 1e3 * np.mean((base["w"] + summed - target) ** 2)
    assert float(loss({"w": results["w"].array((6, 5))})) < 0.2 * inner
    found = (results["w"].array((6, 5)) - base["w"]) / summed
    assert found[:, :2].min() > 2 * found[:, 2:].max()


@pytest.mark.slow
def test_coefficients_can_be_learned_beside_the_mask():
    x, base, models = problem()
    target = {n: base[n] + np.tensordot((0.9, 0.1), x[n], 1) for n in x}
    loss = lambda weights: 1e3 * sum(jnp.mean(jnp.square(weights[n] - target[n])) for n in target)  # noqa: E731
    plain, _ = fit("concrete", models, loss, steps=300, rate=0.02)
    learned, _ = fit("concrete", models, loss, steps=300, rate=0.02, inner="layer")
    value = lambda found: float(loss({n: found[n].array(x[n].shape[1:]) for n in x}))  # noqa: E731
    assert value(learned) < 0.5 * value(plain)


def test_masks_are_those_of_torch_given_the_same_uniform_numbers():
    torch = pytest.importorskip("torch")
    logits = torch.linspace(-3, 3, 7)
    uniforms = torch.tensor([0.01, 0.2, 0.4, 0.5, 0.7, 0.9, 0.99])
    for temperature in (0.5, 1.5):
        own = torch.distributions.RelaxedBernoulli(torch.tensor(temperature), logits=logits)
        saved, torch.rand = torch.rand, lambda *a, **k: uniforms
        try:
            wanted = own.rsample().numpy()
        finally:
            torch.rand = saved
        found = concrete.relaxed(jnp.asarray(logits.numpy()), jnp.asarray(uniforms.numpy()), temperature)
        np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=1e-7)


def test_a_cold_mask_is_binary():
    rng = np.random.default_rng(0)
    m = concrete.relaxed(rng.standard_normal(1000).astype("f4"), rng.uniform(0.01, 0.99, 1000).astype("f4"), 1e-4)
    assert np.mean((np.asarray(m) < 1e-3) | (np.asarray(m) > 1 - 1e-3)) > 0.99


@pytest.mark.parametrize("origin", [None, stacks.dense((4, 3), 1, 8)[0]], ids=["mean", "base"])
@pytest.mark.parametrize("kind", ["linear", "tucker"])
def test_a_loss_sees_the_layer_that_coefficients_stand_for(kind, origin):
    rng = np.random.default_rng(0)
    mean, u, v = (rng.standard_normal(shape).astype("f4") for shape in ((4, 3), (2, 4), (2, 3)))
    if kind == "linear":
        basis, c = rng.standard_normal((2, 12)).astype("f4"), rng.standard_normal(2).astype("f4")
        space = subspace.LinearSubspace(jnp.asarray(mean.reshape(-1)), jnp.asarray(basis), None, (4, 3), None, None)
        update = (c @ basis).reshape(4, 3)
    else:
        c = rng.standard_normal((2, 2)).astype("f4")
        factors = {0: jnp.asarray(u), 1: jnp.asarray(v)}
        space = subspace.TuckerSubspace(jnp.asarray(mean), factors, {}, (4, 3), None, None)
        update = u.T @ c @ v
    found = jax.jit(_whole.rebuilder(space, (4, 3), None if origin is None else jnp.asarray(origin)))(c)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, update + (mean if origin is None else origin), atol=2e-6)


def test_a_mask_needs_entries():
    own = whole({"w": stacks.of_factors(*stacks.factors())})
    with pytest.raises(errors.ConfigError, match="masks entries.*--bundle"):
        fit("concrete", own, lambda w: 0.0)


@pytest.mark.slow
def test_a_loss_may_take_a_key_and_gets_a_new_one_every_step():
    _, _, models = problem()
    assert _descent.takes_key(lambda w, key: 0) and not _descent.takes_key(lambda w, factor=2: 0)
    noisy = lambda weights, key: jnp.sum(weights["w"]) + jax.random.normal(key)  # noqa: E731
    _, figures = fit("adamerging", models, noisy, steps=4, rate=0.0)
    assert len({*figures["losses"]}) == 4
    assert figures["losses"] == fit("adamerging", models, noisy, steps=4, rate=0.0)[1]["losses"]


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (lambda w: float(jnp.sum(w["w"])), "cannot be traced by JAX"),
        (lambda w: w["none"], "KeyError"),
        (lambda w: w["w"], r"returned shape \(6, 5\)"),
        (lambda w: jnp.log(jnp.sum(w["w"]) * 0 - 1), "not finite"),
    ],
)
def test_losses_that_are_none(loss, said):
    _, _, models = problem()
    with pytest.raises(errors.ConfigError, match=said):
        fit("adamerging", models, loss, steps=2)


@pytest.mark.slow
def test_descents_are_compiled_once_for_all_starts_and_never_taken_for_another():
    x, base, models = problem()
    target = {n: base[n] + np.tensordot((0.8, 0.1), x[n], 1) for n in x}
    traced = []

    def loss(weights):
        traced.append(1)
        return sum(jnp.sum(jnp.square(weights[n] - target[n])) for n in target)

    def other(weights):
        return 0.3 * loss(weights)

    runs = [("concrete", {"scaling": 0.3}), ("concrete", {"scaling": 0.6}), ("concrete", {"temperature": 0.9})]
    runs += [("adamerging", {"start": 0.1}), ("adamerging", {"start": 0.5}), ("adamerging", {"clamp": False})]
    new = []
    for own, (name, options) in [*((loss, run) for run in runs), (other, runs[0])]:
        before = len(traced)
        _, figures = fit(name, models, own, steps=3, **options)
        new.append(len(traced) > before)
        _, _, alone = problem()
        _, wanted = fit(name, alone, own, steps=3, **options)
        np.testing.assert_allclose(figures["losses"], wanted["losses"], rtol=1e-6)
    assert new == [True, False, True, True, False, True, True]
