"""The training loop against a plain one, its parts, its devices, and what is kept of it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsub import errors, plugins
from jaxsub.models import mlp
from jaxsub.parametrisations import _spaces, _values
from jaxsub.pipelines import train_place
from jaxsub.tasks import _data, digits
from jaxsub.training import checkpoints, events, network as networks, steps

SIZE = digits.Options(batch_size=16)


@functools.cache
def example():
    rng = np.random.default_rng(0)
    inputs, targets = rng.random((200, 64), np.float32), rng.integers(0, 10, 200).astype(np.int32)
    network, shapes = networks.of(mlp.MLP(hidden=8, activation="tanh"), inputs[:2])
    start = {n: jnp.asarray(0.3 * rng.standard_normal(s), jnp.float32) for n, s in shapes.items()}
    return network, start, _data.whole(inputs, targets)


def plan_of(name="lora", **more):
    network, _, _ = example()
    module = plugins.load("parametrisations", name)
    options = {"network": network, "task": digits, "task_options": SIZE, "parametrisation": module}
    return steps.Plan(**{**options, "options": module.Options(), "optimizer": steps.optimizer("adam"), **more})


def runs_of(plan, count=3, rates=None):
    _, start, data = example()
    pairs = [plan.parametrisation.init(jax.random.key(n), start, {}, plan.options) for n in range(count)]
    frozen, frozen_axes = steps.stacked([{**p[1], "start": start} for p in pairs])
    stacked, axes = steps.stacked([data] * count)
    keys = jax.random.split(jax.random.key(7), count)
    rates = jnp.asarray(rates or [0.01] * count, jnp.float32)
    trainable = jax.tree.map(lambda *x: jnp.stack(x), *(p[0] for p in pairs))
    return steps.Runs(frozen, stacked, keys, rates), (frozen_axes, axes), trainable


def trained(plan, num_steps=5, chunks=1, **more):
    runs, axes, trainable = runs_of(plan, **more)
    state = steps.begin(trainable, runs.rates, plan)
    losses = []
    for _ in range(chunks):
        state, own = steps.advance(state, runs, plan=plan, axes=axes, num_steps=num_steps // chunks)
        losses.append(np.asarray(own))
    return state, np.concatenate(losses)


def close(a, b, tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
def test_runs_are_those_of_a_plain_loop():
    """One run after another, optax by hand, dense weights, batches by their rule."""
    network, start, data = example()
    plan = plan_of()
    state, losses = trained(plan, rates=[0.01, 0.03, 0.003])
    module, keys = plan.parametrisation, jax.random.split(jax.random.key(7), 3)
    for n, rate in enumerate([0.01, 0.03, 0.003]):
        own, _ = module.init(jax.random.key(n), start, {}, module.Options())
        optimizer = optax.adam(rate)
        moments = optimizer.init(own)
        for t in range(5):
            rows = data.rows[jax.random.randint(jax.random.fold_in(keys[n], t), (16,), 0, 200)]

            def loss(own, rows=rows):
                weights = dict(start)
                for name, pair in own.items():
                    weights[name] = weights[name] + 2.0 * pair["a"].T @ pair["b"].T
                h = jnp.tanh(data.inputs[rows] @ weights["hidden/kernel"] + weights["hidden/bias"])
                logs = jax.nn.log_softmax(h @ weights["output/kernel"] + weights["output/bias"])
                return -logs[jnp.arange(16), data.targets[rows]].mean()

            value, gradient = jax.value_and_grad(loss)(own)
            np.testing.assert_allclose(losses[t, n], value, rtol=1e-5)
            updates, moments = optimizer.update(gradient, moments)
            own = optax.apply_updates(own, updates)
        close(jax.tree.map(lambda x, n=n: x[n], state.trainable), own, 2e-5)


@pytest.mark.slow
def test_chunks_and_parts_of_a_batch_change_rounding_alone():
    whole, losses = trained(plan_of(), num_steps=6)
    chunked, same = trained(plan_of(), num_steps=6, chunks=3)
    np.testing.assert_array_equal(losses, same)
    close(whole.trainable, chunked.trainable, 0)
    parts, about = trained(plan_of(accumulate=4), num_steps=6)
    np.testing.assert_allclose(losses, about, rtol=1e-5)
    close(whole.trainable, parts.trainable, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["batch", "runs", "features"])
def test_eight_devices_train_what_one_does(shard):
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("models",))
    one, losses = trained(plan_of(), count=8)
    plan = plan_of(batch_axis="models" if shard == "batch" else "")
    runs, axes, trainable = runs_of(plan, count=8)
    runs = train_place.runs(runs, axes, mesh, shard)
    state = train_place.state(steps.begin(trainable, runs.rates, plan), mesh, shard)
    with jax.set_mesh(mesh):
        state, own = steps.advance(state, runs, plan=plan, axes=axes, num_steps=5)
    np.testing.assert_allclose(losses, own, rtol=1e-5)
    close(one.trainable, state.trainable, 1e-4)
    leaf = state.trainable["hidden/kernel"]["a"] if shard == "runs" else runs.frozen["start"]["hidden/kernel"]
    assert (leaf.sharding.shard_shape(leaf.shape) != leaf.shape) == (shard != "batch")


@pytest.mark.slow
def test_memory_of_a_state_is_that_of_its_coefficients():
    """Adam: what is trained, its best, and two moments, whatever the network's size."""
    plan = plan_of("random_subspace")
    plan = dataclasses.replace(plan, options=plan.parametrisation.Options(rank=3))
    runs, _, trainable = runs_of(plan, count=2)
    state = steps.begin(trainable, runs.rates, plan)
    numbers = steps.count(trainable)
    assert numbers == 2 * 4 * 3
    assert sum(x.size for x in jax.tree.leaves(state)) < 4 * numbers + 24


def test_what_all_runs_have_in_common_stands_once():
    shared = jnp.arange(3.0)
    found, axes = steps.stacked([{"a": shared, "b": jnp.full(2, float(n))} for n in range(4)])
    assert axes == (None, 0) and found["a"].shape == (3,) and found["b"].shape == (4, 2)


@pytest.mark.slow
def test_rows_with_a_nan_are_told_in_trees_of_outputs_too():
    a = jnp.zeros((3, 2, 4)).at[1, 0, 2].set(jnp.nan)
    assert steps._have_nan(a).tolist() == [False, True, False]
    tree = {"logits": a, "spare": jnp.zeros(3).at[2].set(jnp.nan), "count": jnp.arange(3)}
    assert steps._have_nan(tree).tolist() == [False, True, True]
    assert steps._have_nan({"labels": jnp.arange(3)}).tolist() == [False] * 3
    assert not steps._have_nan(jnp.full((3, 1), -jnp.inf)).any()  # a class that is ruled out


def test_a_run_stops_where_nothing_better_comes_and_keeps_its_best():
    plan = plan_of()
    runs, axes, trainable = runs_of(plan, count=2)
    state = steps.begin(trainable, runs.rates, plan)
    for found in ([0.5, 0.5], [0.4, 0.6], [0.45, 0.7]):
        state, _ = steps.advance(state, runs, plan=plan, axes=axes, num_steps=1)
        before = jax.tree.map(np.asarray, state.trainable)
        state = steps.judged(state, jnp.asarray(found), patience=2)
        if found[0] == 0.5:
            best = jax.tree.map(lambda x: x[0], before)
    assert state.is_stopped.tolist() == [True, False]
    close(jax.tree.map(lambda x: x[0], state.best), best, 0)
    close(jax.tree.map(lambda x: x[1], state.best), jax.tree.map(lambda x: x[1], before), 0)
    state, _ = steps.advance(state, runs, plan=plan, axes=axes, num_steps=3)
    after = jax.tree.map(np.asarray, state.trainable)
    close(jax.tree.map(lambda x: x[0], before), jax.tree.map(lambda x: x[0], after), 0)
    assert any(
        np.abs(a[1] - b[1]).max() > 0 for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    )


@pytest.mark.slow
def test_a_state_comes_back_from_disk_to_the_bit(tmp_path):
    plan = plan_of()
    runs, axes, trainable = runs_of(plan)
    state = steps.begin(trainable, runs.rates, plan)
    assert checkpoints.restore(str(tmp_path), state) is None
    for _ in range(3):
        state, _ = steps.advance(state, runs, plan=plan, axes=axes, num_steps=2)
        checkpoints.save(str(tmp_path), state)
    (tmp_path / "00000008.orbax-checkpoint-tmp-1").mkdir()  # of a killed run
    found = checkpoints.restore(str(tmp_path), steps.begin(trainable, runs.rates, plan))
    close(found, state, 0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000004", "00000006"]
    assert jax.tree.structure(found) == jax.tree.structure(state)
    other = plan_of("full")
    with pytest.raises(errors.WorkdirError, match="no checkpoint of this training"):
        checkpoints.restore(str(tmp_path), steps.begin(runs_of(other)[2], runs.rates, other))


@pytest.mark.slow
def test_narrow_products_and_wide_coefficients():
    network, start, data = example()
    narrow = dataclasses.replace(network, compute="bfloat16")
    state, losses = trained(plan_of(network=narrow))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state.trainable))
    wide, about = trained(plan_of())
    np.testing.assert_allclose(losses, about, rtol=0.03)
    assert np.abs(losses - about).max() > 1e-6  # it is another arithmetic
    assert narrow(start, data.inputs).dtype == jnp.float32


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("adm", (), "did you mean 'adam'"),
        ("adam", (("b9", 1.0),), "no option 'b9'"),
        ("dct_adamw", (("rnk", 2),), "rank"),
    ],
)
def test_unknown_optimizers_and_options_are_named(name, options, said):
    with pytest.raises(errors.ConfigError, match=said):
        steps.optimizer(name, options)


def test_a_network_with_running_statistics_is_refused():
    import flax.linen as nn

    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=False)(x)

    with pytest.raises(errors.ConfigError, match="more than parameters .batch_stats"):
        networks.of(Normed(), np.zeros((2, 4), np.float32))


def test_events_are_records_of_protocol_buffers(tmp_path):
    """Read back by hand: lengths, checksums (crc32c of '123456789' is e3069283), tags and values."""
    import struct

    events.write(str(tmp_path), [(50, "loss", 0.25), (300, "validation", 0.5)])
    data = (tmp_path / "events.out.tfevents.jaxsub").read_bytes()
    found = []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        found.append(data[12 : 12 + length])
        assert struct.unpack("<I", data[8:12])[0] == events._masked(data[:8])
        assert struct.unpack("<I", data[12 + length : 16 + length])[0] == events._masked(found[-1])
        data = data[16 + length :]
    assert b"brain.Event:2" in found[0] and len(found) == 3
    assert found[1].endswith(b"\x0a\x04loss\x15" + struct.pack("<f", 0.25)) and b"\x10\x32" in found[1]
    assert b"\x10\xac\x02" in found[2]  # 300 as a varint
    crc = 0xE3069283
    assert events._masked(b"123456789") == ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


@functools.cache
def combined():
    """Plan and runs of coefficients in subspaces of three directions."""
    network, start, data = example()
    bases = {n: np.random.default_rng(3).standard_normal((3, *w.shape)) for n, w in start.items() if w.ndim > 1}
    spaces = {
        n: _spaces.Space(np.asarray(start[n]), b.astype(np.float32), {}, np.zeros((2, 3)), {-1: np.ones(3)}, False, ())
        for n, b in bases.items()
    }
    plan = plan_of("scalar")
    trainable, frozen = plan.parametrisation.init(jax.random.key(0), start, spaces, plan.options)
    fixed, fixed_axes = steps.stacked([frozen] * 7)
    given, axes = steps.stacked([data] * 7)
    many = jax.tree.map(lambda c: 0.1 * jax.random.normal(jax.random.key(c.size), (7, *c.shape)), trainable)
    runs = steps.Runs(fixed, given, jax.random.key(7), jnp.linspace(0.001, 0.1, 7))
    return plan, runs, (fixed_axes, axes), many


def apart(runs):
    """The same runs, with a key of its own for each."""
    return runs._replace(keys=jnp.stack([runs.keys] * 7))


@pytest.mark.slow
def test_runs_on_the_same_batches_are_those_of_batches_of_their_own():
    plan, runs, axes, many = combined()
    both = [
        steps.advance(steps.begin(many, runs.rates, plan), given, plan=plan, axes=axes, num_steps=5)
        for given in (runs, apart(runs))
    ]
    np.testing.assert_allclose(both[0][1], both[1][1], rtol=1e-5)
    close(both[0][0].trainable, both[1][0].trainable, 1e-5)


@pytest.mark.slow
def test_runs_on_the_same_batches_form_no_weights_of_their_own():
    plan, runs, axes, many = combined()
    state = steps.begin(many, runs.rates, plan)

    def compiled(given):
        return steps.advance.lower(state, given, plan=plan, axes=axes, num_steps=5).compile().as_text()

    assert "f32[7,64,8]" in compiled(apart(runs))
    assert "f32[7,64,8]" not in compiled(runs)


def test_layers_called_by_keyword_are_multiplied_by_their_factors():
    import flax.linen as nn

    class Net(nn.Module):
        by_name: bool

        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(3, name="a")
            return layer(inputs=x) if self.by_name else layer(x)

    x = jnp.asarray(np.random.RandomState(0).randn(5, 4), jnp.float32)
    update = _values.Factored(jnp.ones((4, 3)), jnp.ones((4, 2)), jnp.ones((2, 3)))
    nets = [networks.of(Net(by_name), x)[0] for by_name in (True, False)]
    found, other = (net({"a/kernel": update, "a/bias": jnp.ones(3)}, x) for net in nets)
    close(found, other, 1e-6)
    close(found, x @ _values.dense(update) + 1, 1e-5)


def test_the_dtype_of_a_layer_is_that_of_its_products_of_factors_too():
    import flax.linen as nn

    x = jnp.asarray(np.random.RandomState(0).randn(50, 4), jnp.float32)
    parts = jax.random.normal(jax.random.key(0), (4, 3)), jnp.ones((4, 2)), jnp.full((2, 3), 0.3)
    net, _ = networks.of(nn.Sequential([nn.Dense(3, dtype=jnp.bfloat16)]), x)
    bias = {"layers_0/bias": jnp.ones(3)}
    found = net({"layers_0/kernel": _values.Factored(*parts), **bias}, x)
    wanted = net({"layers_0/kernel": _values.dense(_values.Factored(*parts)), **bias}, x)
    close(found, found.astype(jnp.bfloat16).astype(jnp.float32), 0)
    close(found, wanted, 0.02)
