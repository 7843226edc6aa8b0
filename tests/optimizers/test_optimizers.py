"""The DCT optimizer against scipy and optax, and descent along geodesics against eigenvectors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.fft

from jaxsub.optimizers import dct_adamw, riemannian_sgd


@pytest.mark.parametrize(("kind", "type_"), [("dct2", 2), ("dct3", 3)])
@pytest.mark.parametrize("n", [1, 2, 7, 32])
def test_basis_is_the_cosine_transform_of_scipy(kind, type_, n):
    q = dct_adamw.basis(kind, n)
    np.testing.assert_allclose(q.T @ q, np.eye(n), atol=1e-12)
    x = np.random.default_rng(0).standard_normal((5, n))
    np.testing.assert_allclose(x @ q, scipy.fft.dct(x, type=type_, norm="ortho", axis=1), atol=1e-12)


def test_columns_of_largest_norm_are_kept():
    s = np.zeros((4, 6), np.float32)
    s[0, 1], s[:, 4], s[:2, 2] = 3.0, 1.0, 1.9  # l1 norms 3, 4, 3.8; l2 norms 3, 2, 2.7
    assert dct_adamw.select_columns(s, 2).tolist() == [2, 4]
    assert dct_adamw.select_columns(s, 2, norm="l2").tolist() == [1, 2]


@pytest.mark.parametrize("seed", range(3))
def test_kept_columns_hold_at_least_their_share_of_energy(seed):
    g = np.random.default_rng(seed).standard_normal((20, 12))
    transformed = g @ dct_adamw.basis("dct2", 12)
    kept = dct_adamw.select_columns(transformed, 5, norm="l2")
    assert np.square(transformed[:, kept]).sum() >= 5 / 12 * np.square(g).sum()
    # A gradient whose right singular vectors are columns of the basis loses nothing that its SVD keeps.
    low = np.random.default_rng(seed).standard_normal((20, 3)) @ dct_adamw.basis("dct2", 12)[:, [1, 4, 9]].T
    assert dct_adamw.select_columns(low @ dct_adamw.basis("dct2", 12), 3).tolist() == [1, 4, 9]


def steps_of(optimizer, params, gradients):
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for g in gradients:
        moved, state = update(g, state, params)
        params = optax.apply_updates(params, moved)
    return params, state


def trees(count, seed=0, shape=(6, 9)):
    rng = np.random.default_rng(seed)
    return [
        {
            "w": jnp.asarray(rng.standard_normal(shape), jnp.float32),
            "b": jnp.asarray(rng.standard_normal(4), jnp.float32),
        }
        for _ in range(count)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (5, 5)])
def test_full_rank_is_adamw_in_the_basis(shape):
    params, *gradients = trees(6, shape=shape)
    decay = {"weight_decay": 0.1}
    wanted, _ = steps_of(optax.adamw(0.01, **decay), params, gradients)
    found, _ = steps_of(dct_adamw.make(0.01, rank=99, kind="identity", **decay), params, gradients)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    # With cosines: the weights that AdamW gives for turned weights and gradients, turned back.
    q = jnp.asarray(dct_adamw.basis("dct2", min(shape)), jnp.float32)

    def turned(tree, back=False):
        m = q.T if back else q
        w = tree["w"] @ m if shape[0] >= shape[1] else m.T @ tree["w"]
        return {**tree, "w": w}

    wanted, _ = steps_of(optax.adamw(0.01, **decay), turned(params), [turned(g) for g in gradients])
    found, _ = steps_of(dct_adamw.make(0.01, rank=99, **decay), params, gradients)
    np.testing.assert_allclose(found["w"], turned(wanted, back=True)["w"], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_moments_follow_their_columns_and_nothing_is_lost_with_feedback():
    """Two columns of three: the one that is left out is not forgotten, and comes with all of its gradient at once."""
    q = dct_adamw.basis("dct2", 3)
    gradients = [{"w": jnp.asarray(np.outer(np.ones(5), q[:, 0] * 3 + q[:, 1] * 2.5 + q[:, 2]), jnp.float32)}] * 3
    params = {"w": jnp.zeros((5, 3), jnp.float32)}
    _, state = steps_of(dct_adamw.make(0.01, rank=2), params, gradients[:2])
    own = state["leaves"][0]
    assert own.first.shape == (5, 2) and own.left_out.shape == (5, 3)
    # After two steps column 2 has waited twice: 1 + 1 = 2 of it is kept back.
    np.testing.assert_allclose(own.left_out @ q, np.outer(np.ones(5), [0, 0, 2.0]), atol=1e-5)
    _, state = steps_of(dct_adamw.make(0.01, rank=2), params, gradients)
    assert state["leaves"][0].kept.tolist() == [0, 2]  # 1 + 2 = 3 against 2.5
    np.testing.assert_allclose(state["leaves"][0].second[:, 0], (1 - 0.999**3) * 9, rtol=1e-4)
    _, plain = steps_of(dct_adamw.make(0.01, rank=2, error_feedback=False), params, gradients)
    assert plain["leaves"][0].kept.tolist() == [0, 1] and plain["leaves"][0].left_out.size == 0


def test_its_state_is_two_thin_moments_and_the_columns():
    params = {"w": jnp.zeros((300, 200))}
    state = dct_adamw.make(0.01, rank=10, error_feedback=False).init(params)
    assert sum(x.size for x in jax.tree.leaves(state)) == 2 * 300 * 10 + 10 + 1


@pytest.mark.slow
def test_no_decomposition_is_compiled():
    params, gradient = trees(2)
    optimizer = dct_adamw.make(0.01, rank=3)
    text = jax.jit(optimizer.update).lower(gradient, optimizer.init(params), params).as_text().lower()
    assert not any(word in text for word in ("svd", "geqrf", "householder", "eigh", "syevd", "gesdd"))
    known = jax.jit(lambda x: jnp.linalg.qr(x)[0]).lower(gradient["w"]).as_text().lower()
    assert "geqrf" in known or "householder" in known  # the words are those that are looked for


@pytest.mark.slow
def test_geodesics_lead_to_the_leading_eigenvectors_and_stay_on_the_manifold():
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.standard_normal((30, 30)))[0]
    m = jnp.asarray((q * np.linspace(2, 0.1, 30)) @ q.T, jnp.float32)
    optimizer = riemannian_sgd.make(0.05)
    params = {"frame": jnp.asarray(np.linalg.qr(rng.standard_normal((30, 3)))[0].T, jnp.float32), "c": jnp.ones(2)}
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        gradient = jax.grad(lambda p: -jnp.trace(p["frame"] @ m @ p["frame"].T) + jnp.sum(jnp.square(p["c"])))(params)
        moved, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, moved), state

    for _ in range(10_000):
        params, state = step(params, state)
    frame = np.asarray(params["frame"], np.float64)
    assert np.abs(frame @ frame.T - np.eye(3)).max() < 1e-5
    np.testing.assert_allclose(frame.T @ frame, q[:, :3] @ q[:, :3].T, atol=1e-4)
    np.testing.assert_allclose(params["c"], 0, atol=1e-6)  # plain descent beside it
