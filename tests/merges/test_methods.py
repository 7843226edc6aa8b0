"""Every merge method against a NumPy twin written from its paper: dense layers, vectors, kernels, low-rank updates."""

import jax
import numpy as np
import pytest

from jaxsub import plugins, rows, solvers
from jaxsub.merges import _matrices, _select
from tests.merges import stacks, twins

KEY = jax.random.key(0)
WEIGHTS = np.array([0.7, 1.3, 0.4, 2.0, 0.6])


def run(name, own, **options):
    return stacks.array(merged(name, own, **options), own.shape)


def merged(name, own, **options):
    module = plugins.load("merges", name)
    with jax.enable_x64(True):
        return module.merge(own, module.Options(**options), KEY)


# name of the method, its options, the twin
CASES = [
    ("mean", {}, twins.mean),
    ("weighted", {}, twins.mean),
    ("weighted", {"normalize": False}, lambda x: x.sum(axis=0)),
    ("subspace_mean", {}, twins.mean),
    ("task_arithmetic", {}, twins.task_arithmetic),
    ("task_arithmetic", {"scaling": 1.1}, lambda x: twins.task_arithmetic(x, 1.1)),
    ("spherical", {}, twins.spherical),
    ("model_stock", {}, twins.model_stock),
    ("ties", {}, twins.ties),
    ("ties", {"density": 0.6, "scaling": 1.5, "function": "sum"}, lambda x: twins.ties(x, 0.6, 1.5, "sum")),
    ("ties", {"density": 1.0}, lambda x: twins.ties(x, 1.0)),
    ("magnitude", {"density": 0.3}, lambda x: twins.magnitude(x, 0.3)),
    ("breadcrumbs", {"density": 0.4, "gamma": 0.05}, lambda x: twins.breadcrumbs(x, 0.4, 0.05)),
    (
        "breadcrumbs",
        {"density": 0.4, "gamma": 0.05, "elect": True},
        lambda x: twins.breadcrumbs(x, 0.4, 0.05, elected=True),
    ),
    ("breadcrumbs", {"density": 0.98, "gamma": 0.05}, lambda x: twins.breadcrumbs(x, 0.98, 0.05)),
    ("pcb", {"ratio": 0.2, "scaling": 1.2}, lambda x: twins.pcb(x, 0.2, 1.2)),
    ("fisher", {}, twins.mean),
    ("regmean", {}, twins.mean),
    ("iso_c", {"scaling": 1.3}, lambda x: twins.iso_c(x, 1.3)),
    ("iso_cts", {"common": 0.5}, lambda x: twins.iso_cts(x, 0.5)),
    ("iso_cts", {"common": 0.8, "scaling": 1.5}, lambda x: twins.iso_cts(x, 0.8, 1.5)),
    ("tsv", {"scaling": 0.9}, lambda x: twins.tsv(x, 0.9)),
    ("knots_ties", {"density": 0.5}, lambda x: twins.knots(x, lambda r: twins.ties(r, 0.5, 0.6))),
    ("wudi", {}, twins.wudi),
    ("wudi", {"solver": "exact"}, lambda x: twins.wudi_exact(x) if x.ndim == 3 else twins.mean(x)),
    ("subspace_sum", {"rank": 4}, lambda x: twins.inside(x, 4, twins.task_arithmetic)),
    ("subspace_rescaled", {"rank": 4}, lambda x: twins.inside(x, 4, twins.rescaled)),
    ("subspace_iso", {"rank": 4}, lambda x: twins.inside(x, 4, twins.iso_c)),
    ("subspace_ties", {"rank": 4, "density": 0.5}, lambda x: twins.inside(x, 4, lambda c: twins.ties(c, 0.5))),
    ("subspace_sum", {"energy": 0.8}, lambda x: inside_energy(x, 0.8)),
]
IDS = [f"{name} {options}" for name, options, _ in CASES]
ONLY_MATRICES = ("subspace_sum", "subspace_rescaled", "subspace_iso", "subspace_ties")


def inside_energy(x, energy):
    left, right = twins.subspace(x, 0, energy)
    return left @ left.T @ twins.task_arithmetic(x) @ right @ right.T


@pytest.mark.parametrize(("name", "options", "twin"), CASES, ids=IDS)
def test_a_matrix_is_merged_as_in_the_paper(name, options, twin):
    for seed in range(3):
        x = stacks.dense(seed=seed)
        assert stacks.relative(run(name, stacks.of_arrays(x), **options), twin(x.astype(float))) < 1e-5


@pytest.mark.parametrize(("name", "options", "twin"), [c for c in CASES if c[0] not in ONLY_MATRICES])
@pytest.mark.parametrize("shape", [(150,), (6, 4, 3, 3)], ids=["vector", "kernel"])
def test_what_is_no_matrix_is_merged_as_published_code_does(name, options, twin, shape):
    x = stacks.dense(shape, seed=7)
    if name == "knots_ties":
        twin = lambda x: twins.ties(x, 0.5, 0.6)  # noqa: E731
    assert stacks.relative(run(name, stacks.of_arrays(x), **options), twin(x.astype(float))) < 1e-5


THROUGH_GRAM = [c for c in CASES if c[0] in ("iso_c", "iso_cts", "tsv", "subspace_iso")]


def rotated(s, size, seed):
    """Symmetric matrix with eigenvalues s in a basis of no meaning."""
    turn = np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))[0]
    return turn * s @ turn.T


@pytest.mark.parametrize(("name", "options", "twin"), THROUGH_GRAM)
@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (30, 30)])
def test_large_matrices_through_their_gram_matrix(monkeypatch, name, options, twin, shape):
    """As in the paper; of steep spectra, whose weak directions hang on the last bits of the sum, as directly."""
    plain = stacks.dense(shape, seed=1)
    steep = (stacks.dense(shape, seed=2) @ rotated(10.0 ** np.linspace(0, -4, shape[1]), shape[1], 5)).astype("f4")
    directly = run(name, stacks.of_arrays(steep), **options)
    monkeypatch.setattr(_matrices, "DIRECT", 2)
    assert stacks.relative(run(name, stacks.of_arrays(plain), **options), twin(plain.astype(float))) < 1e-5
    assert stacks.relative(run(name, stacks.of_arrays(steep), **options), directly) < 1e-5


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_singular_vectors_of_both_ways(monkeypatch, shape):
    """What is more than rounding is found, orthonormal, and nothing else; in float32 a Gram matrix would not do."""
    rng, k = np.random.default_rng(6), min(shape)
    u, v = (np.linalg.qr(rng.standard_normal((size, k)))[0] for size in shape)
    s = np.concatenate([10.0 ** np.linspace(0, -4.5, k - 4), 1e-8 * np.ones(4)])
    w = ((u * s) @ v.T).astype(np.float32)
    for direct in (512, 2):
        monkeypatch.setattr(_matrices, "DIRECT", direct)
        for most in (None, 3):
            left, values, right = _matrices.svd(w, most)
            assert len(values) == (most or k - 4)
            np.testing.assert_allclose(values, s[: len(values)], rtol=1e-2)
            for side in (left, right):
                assert np.abs(side.T @ side - np.eye(len(values))).max() < 1e-6
            assert np.abs(left * values @ right.T - w).max() < (s[3] if most else 1e-6)
        assert _matrices.svd(np.zeros(shape, np.float32))[1].size == 0
        assert np.isnan(_matrices.svd(np.full(shape, np.inf, np.float32))[0]).all()
        assert _matrices.svd(np.full(shape, np.inf, np.float32), 0)[0].shape == (shape[0], 0)

    def narrow(total, part, weight=1.0):
        total += weight * (part.T @ part)

    monkeypatch.setattr(solvers, "add_square", narrow)
    values = _matrices.svd(w)[1]
    assert len(values) != k - 4 or np.abs(values / s[: k - 4] - 1).max() > 0.1


WEIGHTED = ["task_arithmetic", "ties", "magnitude", "breadcrumbs", "mean", "spherical", "subspace_sum"]


@pytest.mark.parametrize("name", WEIGHTED)
def test_weights_of_the_models(name):
    x = stacks.dense(seed=3)
    found = run(name, stacks.of_arrays(x, weights=WEIGHTS))
    twin = {
        "mean": twins.mean, "spherical": twins.spherical, "ties": twins.ties, "magnitude": twins.magnitude,
        "breadcrumbs": twins.breadcrumbs, "task_arithmetic": twins.task_arithmetic,
        "subspace_sum": lambda x, weights: _summed(x, weights),
    }[name]  # fmt: skip
    assert stacks.relative(found, twin(x.astype(float), weights=WEIGHTS)) < 1e-5
    assert stacks.relative(found, twin(x.astype(float), weights=np.ones(5))) > 1e-2


def _summed(x, weights):
    left, right = twins.subspace(x, 0, 0.9)
    return left @ left.T @ twins.task_arithmetic(x, weights=weights) @ right @ right.T


@pytest.mark.parametrize("t", [0.5, 0.2])
def test_slerp_of_two(t):
    x = stacks.dense(count=2, seed=5)
    assert stacks.relative(run("slerp", stacks.of_arrays(x), t=t), twins.slerp(x.astype(float), t)) < 1e-5
    near = np.stack([x[0], x[0] + 1e-4 * x[1]])
    assert stacks.relative(run("slerp", stacks.of_arrays(near), t=t), twins.slerp(near.astype(float), t)) < 1e-6
    assert stacks.relative(run("slerp", stacks.of_arrays(x), t=0.0), x[0].astype(float)) < 1e-6


def statistics(x, square):
    rng = np.random.default_rng(8)
    if not square:
        return rng.uniform(0, 2, x.shape).astype(np.float32) ** 4
    inputs = rng.standard_normal((len(x), 40, x.shape[-1])) * rng.uniform(0.2, 3, (len(x), 1, x.shape[-1]))
    return np.einsum("nti,ntj->nij", inputs, inputs).astype(np.float32)


@pytest.mark.parametrize("name", ["fisher", "regmean"])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_statistics_of_the_users_evaluator(name, weights):
    x = stacks.dense(seed=4)
    s = statistics(x, name == "regmean")
    own = stacks.of_arrays(x, statistics=rows.ArrayRows(s), weights=weights)
    twin = getattr(twins, name)
    assert stacks.relative(run(name, own), twin(x.astype(float), s.astype(float), weights=weights)) < 1e-5
    assert stacks.relative(run(name, own), twins.mean(x.astype(float))) > 0.05


# Low-rank updates: the same as the twin on the products, cut at no less than the rank of the result.


@pytest.mark.parametrize(("name", "options", "twin"), CASES, ids=IDS)
def test_low_rank_updates_are_merged_as_their_products(name, options, twin):
    parts = stacks.factors()
    x = stacks.products(*parts)
    if name in ("iso_cts",):
        size = 8  # of the span: four models of ranks 2, 3, 2, 1
        twin = lambda x: twins.iso_cts(x, options["common"], options.get("scaling", 1.0), size=size)  # noqa: E731
    if name == "wudi":
        twin = twins.wudi_exact
    own = stacks.of_factors(*parts)
    own.cut = type(own.cut)(rank=11)  # all there is: nothing is cut away
    assert stacks.relative(run(name, own, **options), twin(x)) < 1e-5


@pytest.mark.parametrize("name", ["fisher", "regmean"])
def test_statistics_of_low_rank_updates(name):
    parts = stacks.factors()
    x = stacks.products(*parts)
    s = statistics(x, name == "regmean")
    own = stacks.of_factors(*parts, statistics=rows.ArrayRows(s))
    own.cut = type(own.cut)(rank=11)
    assert stacks.relative(run(name, own), getattr(twins, name)(x, s.astype(float))) < 1e-5


def test_the_cut_of_a_low_rank_result_is_stated():
    parts = stacks.factors()
    wanted = twins.task_arithmetic(stacks.products(*parts), 1.0)
    own = stacks.of_factors(*parts)
    s = np.linalg.svd(wanted, compute_uv=False)
    for rank in (1, 3, 8):
        own.cut = type(own.cut)(rank=rank)
        found = merged("task_arithmetic", own, scaling=1.0)
        best = np.sqrt(np.sum(s[rank:] ** 2) / np.sum(s**2))
        assert len(found.a) == min(rank, 8)
        assert stacks.relative(found.b @ found.a, wanted) == pytest.approx(best, abs=1e-6)
        assert found.error == pytest.approx(best, abs=1e-6)
    own.cut = type(own.cut)(energy=0.7)
    found = merged("task_arithmetic", own, scaling=1.0)
    shares = np.cumsum(s**2) / np.sum(s**2)
    assert len(found.a) == int(np.argmax(shares >= 0.7)) + 1


def test_order_statistics_are_those_of_a_sort():
    rng = np.random.default_rng(0)
    for dtype in (np.float32, np.float64):
        x = rng.standard_normal((3, 5000)).astype(dtype)
        x[0, :100] = 0.25  # equal ones
        x[1] = np.round(x[1], 1)
        x[2, :3] = (0.0, -0.0, 1e-42)
        own = rows.ArrayRows(x)
        ranks = (0, 17, 2500, 4998, 4999)
        assert np.array_equal(_select.magnitudes(own, ranks), np.sort(np.abs(x), axis=1)[:, ranks])
        values = lambda own=own: (b.x[:, : b.count] for b in own.blocks())  # noqa: E731
        assert np.array_equal(_select.order_statistics(values, own, ranks), np.sort(x, axis=1)[:, ranks])


@pytest.mark.parametrize("direct", [512, 2])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_iso_cts_takes_no_rounding_for_directions(monkeypatch, direct, dtype):
    """Of three updates of rank 4 there are 12 directions; two more that cancel but for rounding add theirs alone."""
    monkeypatch.setattr(_matrices, "DIRECT", direct)
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((3, 60, 4)) @ rng.standard_normal((3, 4, 48)) * 1e-25).astype(dtype)
    spans = np.linalg.svd(np.concatenate(list(x), axis=1).astype(float) * 1e25, full_matrices=False)[0][:, :12]
    for own in (x, np.concatenate([x, -x[:1], x[:1] * (1 + 1e-7)])):
        found = run("iso_cts", stacks.of_arrays(own)).astype(float) * 1e25
        s = np.linalg.svd(found, compute_uv=False)
        assert np.sum(s > 1e-3 * s[0]) == 12
        assert np.linalg.norm(found - spans @ (spans.T @ found)) < 1e-3 * np.linalg.norm(found)


@pytest.mark.parametrize("shape", [(64, 64), (24, 16), (4000,)])
def test_an_update_of_zero_has_no_angle_to_others(shape):
    x = stacks.dense(shape, count=3, seed=4) + np.float32(0.01)
    x[2] = 0
    gram = stacks.of_arrays(x).gram()
    assert not gram[2].any() and not gram[:, 2].any() and gram[:2, :2].all()
    assert stacks.relative(run("model_stock", stacks.of_arrays(x)), twins.model_stock(x.astype(float))) < 1e-5
