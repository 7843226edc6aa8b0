"""Solvers that fail: a second algorithm takes over and that is said, or the run ends naming the layer. Never a NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

import jaxsub
from jaxsub import errors, plugins, solvers, stacks
from jaxsub.bundle import cores
from jaxsub.decompositions import _again
from jaxsub.formats import peft, safetensors
from jaxsub.linalg import factored, svd
from tests.figures_log import record

DENSE = [name for name in plugins.available("decompositions") if not name.startswith("lora")]


def symmetric(*shape):
    x = np.random.default_rng(0).standard_normal(shape)
    return x @ np.swapaxes(x, -1, -2)


def gives_up(*_, **__):
    raise np.linalg.LinAlgError("Eigenvalues did not converge")


def not_numbers(whole):
    """The solver `whole` with NaN in its last results."""

    def broken(x, *args, **more):
        found = whole(x, *args, **more)
        parts = tuple(found) if isinstance(found, tuple) else (found,)
        parts = tuple(part * np.nan for part in parts)
        return parts if isinstance(found, tuple) else parts[0]

    return broken


FUNCTIONS = {
    "eigh": (solvers.eigh, np.linalg.eigh, symmetric(3, 5, 5)),
    "eigvalsh": (solvers.eigvalsh, np.linalg.eigvalsh, symmetric(4, 6, 6)),
    "svd": (solvers.svd, lambda x: np.linalg.svd(x, full_matrices=False), np.random.default_rng(1).random((7, 4))),
    "singular_values": (
        solvers.singular_values,
        lambda x: np.linalg.svd(x, compute_uv=False),
        np.random.default_rng(1).random((2, 7, 4)),
    ),
}


@pytest.mark.parametrize("fault", [gives_up, "nan"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_second_algorithm_takes_over(monkeypatch, name, fault):
    ours, theirs, matrix = FUNCTIONS[name]
    wanted = theirs(matrix)
    lapack = "svd" if "s" == name[0] else name
    monkeypatch.setattr(np.linalg, lapack, not_numbers(getattr(np.linalg, lapack)) if fault == "nan" else fault)
    solvers.retries()
    found = ours(matrix)
    assert len(solvers.retries()) == 1 and solvers.retries() == []
    if name in ("eigvalsh", "singular_values"):
        np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-12)
        return
    if name == "eigh":
        values, vectors = found
        again = vectors * values[..., None, :] @ np.swapaxes(vectors, -1, -2)
    else:
        again = found[0] * found[1] @ found[2]
    np.testing.assert_allclose(again, matrix, atol=1e-12)


@pytest.mark.parametrize("fault", [gives_up, "nan"])
def test_cores_of_updates_are_halved_by_the_second_algorithm(monkeypatch, fault):
    rng = np.random.default_rng(2)
    values = rng.random((3, 5, 2)) @ rng.random((3, 2, 6))
    a, b, scales = rng.random((3, 2, 6)), rng.random((3, 5, 2)), np.ones(3)
    wanted = cores.energies(a, b, scales)
    monkeypatch.setattr(np.linalg, "svd", not_numbers(np.linalg.svd) if fault == "nan" else fault)
    solvers.retries()
    np.testing.assert_allclose(cores.joined(cores.halves(values, 2)), values, atol=1e-12)
    np.testing.assert_allclose(cores.energies(a, b, scales), wanted, rtol=1e-10)
    assert len(solvers.retries()) == 1 + 3


def test_what_works_is_not_tried_twice(monkeypatch):
    monkeypatch.setattr(scipy.linalg, "eigh", gives_up)
    monkeypatch.setattr(scipy.linalg, "svd", gives_up)
    solvers.retries()
    for ours, theirs, matrix in FUNCTIONS.values():
        for a, b in zip(ours(matrix), theirs(matrix), strict=True):
            np.testing.assert_array_equal(a, b)
    assert solvers.retries() == []


@pytest.mark.parametrize("name", FUNCTIONS)
def test_errors_say_what_is_not_to_be_had(monkeypatch, name):
    ours, _, matrix = FUNCTIONS[name]
    with pytest.raises(errors.SolverError, match="holds NaN or Inf"):
        ours(matrix * np.nan)
    for module in (np.linalg, scipy.linalg):
        for function in ("eigh", "svd"):
            monkeypatch.setattr(module, function, gives_up)
    monkeypatch.setattr(np.linalg, "eigvalsh", gives_up)
    with pytest.raises(errors.SolverError, match="no algorithm converges"), solvers.of_layer("w\n"):
        ours(matrix)
    solvers.retries()


def test_leading_pairs_without_bisection(monkeypatch):
    matrix = symmetric(9, 9)
    values, vectors = solvers.leading(matrix, 3)
    whole = scipy.linalg.eigh
    monkeypatch.setattr(scipy.linalg, "eigh", lambda x, **more: gives_up() if "subset_by_index" in more else whole(x))
    solvers.retries()
    again = solvers.leading(matrix, 3)
    assert len(solvers.retries()) == 1
    np.testing.assert_allclose(again[0], values, rtol=1e-12)
    np.testing.assert_allclose(np.abs(again[1].T @ vectors), np.eye(3), atol=1e-10)


@pytest.mark.parametrize("fault", ["raises", "nan"])
@pytest.mark.parametrize("count", [2, None])
def test_the_largest_eigenvalues_of_a_matrix_that_is_made_again(monkeypatch, count, fault):
    matrix, calls = symmetric(9, 9), []
    values, vectors = np.linalg.eigh(matrix)

    def make():
        calls.append(0)
        return np.triu(matrix).copy(order="F")  # the rest is not looked at

    def check(times):
        found = solvers.descending(make, count)
        np.testing.assert_allclose(found[0], values[::-1][:count], rtol=1e-10)
        np.testing.assert_allclose(np.abs(found[1].T @ vectors[:, ::-1][:, :count]), np.eye(count or 9), atol=1e-10)
        assert len(calls) == times

    check(1)
    monkeypatch.setattr(scipy.linalg, "eigh", gives_up if fault == "raises" else not_numbers(scipy.linalg.eigh))
    solvers.retries()
    check(3)
    assert len(solvers.retries()) == 1
    assert [part.shape for part in solvers.descending(make, 0)] == [(0,), (9, 0)]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("place", [(2, 5), (3, 3), slice(None)])
def test_no_eigenvectors_of_what_is_not_finite(bad, place):
    """LAPACK would give zeros of an Inf, and no end of a NaN beside the diagonal."""
    matrix = np.triu(symmetric(9, 9))
    matrix[place] = bad
    with pytest.raises(errors.SolverError, match="holds NaN or Inf"):
        solvers.descending(lambda: np.asfortranarray(matrix))


def test_squares_are_added_a_panel_at_a_time(monkeypatch):
    x = np.random.default_rng(0).standard_normal((23, 5)).astype(np.float32)
    monkeypatch.setattr(solvers, "PANEL", 20)
    for one in (x, np.asfortranarray(x), x[::2]):
        total = np.zeros((5, 5), order="F")
        solvers.add_square(total, one, 0.5)
        solvers.add_square(total, one)
        wanted = one.astype(float)
        np.testing.assert_allclose(np.triu(total), np.triu(1.5 * wanted.T @ wanted), rtol=1e-12)


@pytest.fixture
def models(tmp_path):
    rng = np.random.default_rng(3)
    basis = rng.standard_normal((3, 12, 8))
    (tmp_path / "c").mkdir()
    for n in range(10):
        x = np.tensordot(rng.standard_normal(3), basis, 1) + 0.1 * rng.standard_normal((12, 8))
        safetensors.write(tmp_path / "c" / f"m{n}.safetensors", {"layer.w": x.astype(np.float32)})
    return str(tmp_path / "c")


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["raises", "nan"])
def test_an_analysis_goes_on_and_says_so(models, monkeypatch, fault):
    plain = jaxsub.analyze(models, draws=3, splits=2)
    assert not any("converge" in w for w in plain.data["collection"]["warnings"])
    for name in ("eigh", "eigvalsh"):
        monkeypatch.setattr(np.linalg, name, gives_up if fault == "raises" else not_numbers(getattr(np.linalg, name)))
    found = jaxsub.analyze(models, draws=3, splits=2)
    assert any("QR iterations" in w for w in found.data["collection"]["warnings"])
    a, b = plain.layers[0], found.layers[0]
    np.testing.assert_allclose(b["singular_values"], a["singular_values"], rtol=1e-9)
    assert b["verdict"] == a["verdict"]
    for k, value in a["held_out"].items():
        assert b["held_out"][k] == pytest.approx(value, abs=1e-9)
    record("NUM-4", "solver failures of an analysis caught, retried, reported", "all")


@pytest.mark.slow
def test_an_analysis_that_cannot_be_made_names_its_layer_and_writes_no_report(models, monkeypatch, tmp_path):
    for module in (np.linalg, scipy.linalg):
        monkeypatch.setattr(module, "eigh", gives_up)
    with pytest.raises(errors.SolverError, match=r"layer layer\.w: eigen.* nothing of it was written"):
        jaxsub.analyze(models, workdir=str(tmp_path / "w"), draws=3, splits=2)
    assert not (tmp_path / "w" / "report.json").exists()


@pytest.fixture
def broken(monkeypatch):
    """The solvers of jax.numpy give NaN; kernels are compiled anew for that, and again afterwards."""
    jax.clear_caches()
    for name in ("eigh", "eigvalsh", "svd", "qr"):
        monkeypatch.setattr(jnp.linalg, name, not_numbers(getattr(jnp.linalg, name)))
    # What `thin_svd` turns to by itself where LAPACK's first algorithm gives NaN.
    monkeypatch.setattr(svd, "_by_qr_iterations", not_numbers(svd._by_qr_iterations))
    yield monkeypatch
    monkeypatch.undo()
    jax.clear_caches()


@pytest.mark.slow
@pytest.mark.parametrize("rule", [{"rank": 3}, {"energy": 0.9}])
@pytest.mark.parametrize("method", DENSE)
def test_fits_are_made_again(models, broken, method, rule):
    if method in ("randomized", "col_svd", "flat_pca") and "energy" in rule:
        pytest.skip("takes a rank")
    made = jaxsub.fit(models, decomposition=method, **rule)
    (layer,) = made.layers
    assert layer.subspace.procedure.flags == (_again.FLAG,) and method in layer.subspace.procedure.reference
    opened = jaxsub.open_collection(models)
    x = np.stack([safetensors.read(m.path)["layer.w"] for m in opened.models]).astype(np.float64)
    rebuilt = made.reconstruct(made.coefficients())["layer.w"]
    off = np.linalg.norm((rebuilt - x).reshape(len(x), -1), axis=1) / np.linalg.norm(x.reshape(len(x), -1), axis=1)
    np.testing.assert_allclose(layer.figures["error_max"], off.max(), rtol=1e-4)
    broken.undo()
    jax.clear_caches()
    (plain,) = jaxsub.fit(models, decomposition=method, **rule).layers
    if method != "hooi" and not (method == "sthosvd" and "energy" in rule):  # which do not take every axis by itself
        assert layer.subspace.rank == plain.subspace.rank
        np.testing.assert_allclose(layer.figures["error_max"], plain.figures["error_max"], rtol=0.02)
    record("NUM-4", "fits whose solver fails made again, and flagged", method)


def spoilt(x):
    """An array as NaN; whole numbers as they are."""
    return x * np.nan if hasattr(x, "dtype") else x


@pytest.mark.slow
@pytest.mark.parametrize("method", ["hooi", "hosvd"])
def test_fits_of_updates_are_made_again(tmp_path, monkeypatch, method):
    whole = getattr(factored, method)
    monkeypatch.setattr(factored, method, lambda *a, **k: jax.tree.map(spoilt, whole(*a, **k)))
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((9, 3)), rng.standard_normal((3, 11))
    for n in range(6):
        a, b = rng.standard_normal((2, 3)) @ right, left @ rng.standard_normal((3, 2))
        peft.write(str(tmp_path / "c" / f"m{n}"), {"q": (a.astype(np.float32), b.astype(np.float32), 3.0, 2)})
    (layer,) = jaxsub.fit(str(tmp_path / "c"), decomposition=method, rank=3).layers
    assert layer.subspace.procedure.flags == (_again.FLAG,) and layer.figures["error_max"] < 1e-5


@pytest.mark.slow
def test_a_fit_that_cannot_be_made_names_its_layer_and_writes_nothing(models, broken, tmp_path):
    broken.setattr(np.linalg, "svd", gives_up)
    broken.setattr(scipy.linalg, "svd", gives_up)
    with pytest.raises(errors.SolverError, match=r"layer layer\.w: gram and NumPy's SVD: .* no algorithm"):
        jaxsub.fit(models, str(tmp_path / "b"), rank=3)
    assert not (tmp_path / "b").exists()
    record("NUM-4", "fits that cannot be made end naming the layer, nothing written", 1)


def test_a_gram_matrix_that_is_no_number_is_no_sign_of_equal_models(monkeypatch):
    """Equal models have no direction; of NaN, which compares with nothing, that must not be said."""
    x = np.random.default_rng(0).standard_normal((6, 5, 4)).astype(np.float32)
    made = stacks.kernels.dense_gram

    def broken(*given, **options):
        sums, mixed = made(*given, **options)
        return sums._replace(gram=sums.gram * np.nan), mixed

    monkeypatch.setattr(stacks.kernels, "dense_gram", broken)
    plugin = plugins.load("decompositions", "gram")
    found = _again.fit(plugin, stacks.DenseStack.create(x), plugin.Options(rank=2), jax.random.key(0))
    assert found.rank == 2 and _again.FLAG in found.procedure.flags
