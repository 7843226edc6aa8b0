"""`jaxsub update`: equal to a recompute where the bundle holds its models, bounds where it does not, and said so."""

import importlib
import os
import shutil

import numpy as np
import pytest

import jaxsub
from jaxsub import errors
from jaxsub.bundle import files, refit
from jaxsub.cli import flags
from jaxsub.formats import peft, safetensors
from jaxsub.pipelines import update, verify
from tests.bundle import test_lora_bundle
from tests.selected import first

COUNT, NEW = 12, 3


def models(folder, numbers, *, dtype=np.float32, novel=1.0, bias=True):
    """Models by number: three common directions of falling strength, noise, late ones a direction of their own."""
    os.makedirs(folder)
    mean, basis, own = (np.random.default_rng(5).standard_normal(s) for s in ((9, 7), (3, 9, 7), (9, 7)))
    for n in numbers:
        rng = np.random.default_rng(100 + n)
        weight = mean + np.tensordot(rng.standard_normal(3) * (3, 2, 1), basis, 1) + 0.05 * rng.standard_normal((9, 7))
        weight = weight + novel * (n >= COUNT) * own
        tensors = {"w": weight.astype(dtype)}
        if bias:
            tensors["bias"] = np.full(4, n % 2, dtype)
        safetensors.write(os.path.join(folder, f"m{n:02d}.safetensors"), tensors)
    return str(folder)


def matrices(folder, numbers):
    """Models whose rows and columns lie in three directions, and in a fourth for late ones."""
    os.makedirs(folder)
    left, right = (np.random.default_rng(8).standard_normal((d, 4)) for d in (9, 7))
    for n in numbers:
        k = 4 if n >= COUNT else 3
        core = np.random.default_rng(200 + n).standard_normal((k, k)) * 0.6 ** np.arange(k)
        weight = left[:, :k] @ core @ right[:, :k].T
        safetensors.write(os.path.join(folder, f"m{n:02d}.safetensors"), {"w": weight.astype(np.float32)})
    return str(folder)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    top = tmp_path_factory.mktemp("update")
    every = range(COUNT + NEW)
    return {
        "old": models(top / "old", every[:COUNT]),
        "new": models(top / "new", every[COUNT:]),
        "all": models(top / "all", every),
        "known": models(top / "known", every[COUNT:], novel=0.0),
        "old of rank 3": matrices(top / "old3", every[:COUNT]),
        "new of rank 4": matrices(top / "new4", every[COUNT:]),
        "all of rank 4": matrices(top / "all4", every),
    }


def stack(folder):
    names = sorted(os.listdir(folder))
    return np.stack([safetensors.read(os.path.join(folder, n))["w"] for n in names]).astype(np.float64)


def same_subspace(a, b, tolerance=1e-5):
    if hasattr(a, "basis"):
        pairs = [(a.basis, b.basis)]
    else:
        pairs = [(a.factors[axis], b.factors[axis]) for axis in a.factors]
    for x, y in pairs:
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert x.shape == y.shape
        np.testing.assert_allclose(np.linalg.norm(x @ y.T, 2), 1.0, atol=1e-5)
        assert np.linalg.svd(x @ y.T, compute_uv=False).min() > 1 - tolerance


def call(*arguments):
    program = importlib.import_module("jaxsub.cli.update")
    program.main(flags.Flags("update", program.config_class(), ["update", *arguments]))


TUCKER = [pytest.param(n, marks=pytest.mark.slow) for n in ("hosvd", "sthosvd", "hooi")]


@pytest.mark.slow
def test_adding_to_a_whole_bundle_is_a_fit_of_all(places, tmp_path):
    """The bundle holds all of its models, the new ones bring a direction it lacks."""
    jaxsub.fit(places["old"], tmp_path / "b", energy=1.0, layers=["w"])
    rank = COUNT + NEW - 1
    made = update.run(
        update.Config(str(tmp_path / "b"), (places["new"],), captured=1.0, rank=rank), str(tmp_path / "made")
    )
    assert made.provenance["updates"][-1]["layers"]["w"] == {"how": "refitted", "exact": True}
    again, whole = jaxsub.load(tmp_path / "made"), jaxsub.fit(places["all"], layers=["w"], rank=rank)
    x, rebuilt = stack(places["all"]), again.reconstruct(again.coefficients())["w"]
    np.testing.assert_allclose(rebuilt, x, atol=1e-5 * np.abs(x).max())
    np.testing.assert_allclose(np.asarray(again.layers[0].subspace.mean).reshape(9, 7), x.mean(0), atol=1e-5)
    same_subspace(again.layers[0].subspace, whole.layers[0].subspace)
    found, wanted = (s.layers[0].subspace.spectrum.values for s in (again, whole))
    np.testing.assert_allclose(found[:rank], wanted[:rank], rtol=1e-5, atol=1e-5 * wanted[0])
    assert files.verify(tmp_path / "made") == []


@pytest.mark.parametrize("name", TUCKER)
def test_adding_to_whole_factors_is_a_fit_of_all(places, tmp_path, name):
    jaxsub.fit(places["old of rank 3"], tmp_path / "b", rank=3, decomposition=name)
    for rank, tolerance in ((4, 1e-5), (2, 1e-4)):
        made = update.run(update.Config(str(tmp_path / "b"), (places["new of rank 4"],), captured=1.0, rank=rank))
        assert made.provenance["updates"][-1]["layers"]["w"] == {"how": "refitted", "exact": True}
        whole = jaxsub.fit(places["all of rank 4"], rank=rank, decomposition=name)
        same_subspace(made.layers[0].subspace, whole.layers[0].subspace, tolerance)
        found, wanted = (b.reconstruct(b.coefficients())["w"] for b in (made, whole))
        np.testing.assert_allclose(found, wanted, atol=tolerance * np.abs(wanted).max())
        np.testing.assert_allclose(made.layers[0].subspace.mean, whole.layers[0].subspace.mean, atol=1e-5)


@pytest.mark.slow
def test_a_truncated_refit_of_a_whole_bundle_is_the_truncated_fit(places, tmp_path):
    jaxsub.fit(places["old"], tmp_path / "b", energy=1.0, layers=["w"])
    made = update.run(update.Config(str(tmp_path / "b"), (places["new"],), captured=1.0, rank=3))
    whole = jaxsub.fit(places["all"], layers=["w"], rank=3)
    same_subspace(made.layers[0].subspace, whole.layers[0].subspace)
    assert made.provenance["updates"][-1]["layers"]["w"]["exact"]
    found, wanted = (b.reconstruct(b.coefficients())["w"] for b in (made, whole))
    np.testing.assert_allclose(found, wanted, atol=1e-4)


@pytest.mark.slow
def test_removing_from_a_whole_bundle_is_a_fit_of_the_rest(places, tmp_path):
    jaxsub.fit(places["all"], tmp_path / "b", energy=1.0)
    gone = tuple(f"m{n:02d}" for n in range(COUNT, COUNT + NEW))
    made = update.run(update.Config(str(tmp_path / "b"), remove=gone, rank=4))
    whole = jaxsub.fit(places["old"], rank=4)
    assert made.model_ids == whole.model_ids and set(made.passthrough) == set(whole.passthrough)
    assert made.originals == whole.originals
    for a, b in zip(made.layers, whole.layers, strict=True):
        if a.name == "w":
            same_subspace(a.subspace, b.subspace, 1e-4)
            np.testing.assert_allclose(a.subspace.mean, b.subspace.mean, atol=1e-5)


@pytest.mark.slow
def test_models_that_the_basis_holds_are_only_projected(places, tmp_path):
    old = jaxsub.fit(places["old"], tmp_path / "b", rank=3, layers=["w"])
    made = update.run(update.Config(str(tmp_path / "b"), (places["known"],)))
    (layer,), (before,) = made.layers, old.layers
    assert made.provenance["updates"][-1]["layers"]["w"] == {"how": "projected", "exact": False}
    np.testing.assert_array_equal(layer.subspace.basis, before.subspace.basis)
    np.testing.assert_array_equal(layer.values[:COUNT], before.values)
    assert layer.model_ids == tuple(f"m{n:02d}" for n in range(COUNT + NEW))
    x, rebuilt = stack(places["known"]), made.reconstruct(made.coefficients())["w"][COUNT:]
    error = np.linalg.norm((rebuilt - x).reshape(NEW, -1), axis=1) / np.linalg.norm(x.reshape(NEW, -1), axis=1)
    assert layer.figures["error_max"] == pytest.approx(max(error.max(), before.figures["error_max"]), rel=1e-4)
    assert made.accounting()["originals"] > old.accounting()["originals"]


@pytest.mark.slow
@pytest.mark.parametrize("decomposition", ["gram", "hosvd"])
@pytest.mark.parametrize("dtype", ["", "int8"])
def test_stated_errors_bound_the_true_ones(places, tmp_path, decomposition, dtype):
    """Two of three directions are kept: the rest of the old models is lost, the new ones have one of their own."""
    narrow = {"basis_dtype": dtype, "coefficient_dtype": dtype}
    jaxsub.fit(places["old"], tmp_path / "b", rank=2, layers=["w"], decomposition=decomposition, **narrow)
    config = update.Config(str(tmp_path / "b"), (places["new"],), captured=1.0, rank=3)
    made = update.run(config, str(tmp_path / "made"))
    (layer,) = made.layers
    assert made.provenance["updates"][-1]["layers"]["w"] == {"how": "refitted", "exact": False}
    assert layer.figures["bounds"] and layer.storage == (dtype, dtype)
    x, rebuilt = stack(places["all"]), jaxsub.load(tmp_path / "made").reconstruct(made.coefficients())["w"]
    error = np.linalg.norm((rebuilt - x).reshape(len(x), -1), axis=1) / np.linalg.norm(x.reshape(len(x), -1), axis=1)
    assert error.max() <= layer.figures["error_max"] < 4 * error.max()
    assert error.mean() <= layer.figures["error_mean"] < 4 * error.mean()
    kept = jaxsub.load(tmp_path / "b").project(jaxsub.open_collection(places["new"]))
    stale = jaxsub.load(tmp_path / "b").reconstruct(kept)["w"]
    if decomposition == "gram":  # it learnt: the old basis misses the new direction
        assert np.linalg.norm(rebuilt[COUNT:] - x[COUNT:]) < 0.9 * np.linalg.norm(stale - x[COUNT:])


@pytest.mark.slow
def test_low_rank_updates_are_added_by_their_factors(tmp_path):
    folder, updates = test_lora_bundle.adapters(tmp_path / "m", count=10)
    (tmp_path / "new").mkdir()
    for n in (8, 9):
        shutil.move(tmp_path / "m" / f"a{n}", tmp_path / "new" / f"a{n}")
    jaxsub.fit(folder, tmp_path / "b", rank=2)  # of three common directions: the new ones do not fit in
    made = update.run(update.Config(str(tmp_path / "b"), (str(tmp_path / "new"),), rank=5), str(tmp_path / "made"))
    (layer,) = jaxsub.load(tmp_path / "made").layers
    assert layer.parametrisation == "lora" and layer.values.shape[0] == 10
    rebuilt = made.reconstruct(made.coefficients())["layer.q"]
    error = np.sqrt(np.square(rebuilt - updates).sum((1, 2)) / np.square(updates).sum((1, 2)))
    assert error[8:].max() < 1e-4 and error.max() <= layer.figures["error_max"] + 1e-6
    # Exact where the bundle holds its models.
    jaxsub.fit(folder, tmp_path / "whole", rank=3)
    made = update.run(update.Config(str(tmp_path / "whole"), (str(tmp_path / "new"),), captured=1.0))
    assert made.provenance["updates"][-1]["layers"]["layer.q"]["exact"]
    np.testing.assert_allclose(made.reconstruct(made.coefficients())["layer.q"], updates, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("new", [(1, 4), (2,)])
def test_low_rank_updates_are_fitted_again_without_their_products(tmp_path, monkeypatch, new):
    """64 of rank 16 fill a frame of 1024 directions: as cores there they were as large as their products."""
    old, updates = test_lora_bundle.adapters(tmp_path / "m", count=6)
    more, others = test_lora_bundle.adapters(tmp_path / "n", count=8, ranks=new, seed=5)
    for n in range(8):
        shutil.move(tmp_path / "n" / f"a{n}", tmp_path / "n" / f"b{n}")
    jaxsub.fit(old, tmp_path / "b", rank=2, decomposition="hosvd")
    given, fit = [], refit._again.fit
    monkeypatch.setattr(refit._again, "fit", lambda plugin, stack, *a: given.append(stack) or fit(plugin, stack, *a))
    made = update.run(update.Config(str(tmp_path / "b"), (more,), captured=1.0, rank=3))
    (stack,) = given
    assert stack.a.shape == (14, max(2, *new), 9) and stack.b.shape == (14, 11, max(2, *new))
    rebuilt = made.reconstruct(made.coefficients())["layer.q"]
    error = np.linalg.norm(rebuilt[6:] - others, axis=(1, 2)) / np.linalg.norm(others, axis=(1, 2))
    assert error.max() < 1e-5  # three common directions
    assert np.linalg.norm(rebuilt[:6] - updates) <= made.layers[0].figures["error_max"] * np.linalg.norm(updates)


@pytest.mark.slow
def test_adding_reads_the_new_models_alone(places, tmp_path):
    shutil.copytree(places["old"], tmp_path / "gone")
    jaxsub.fit(str(tmp_path / "gone"), tmp_path / "b", rank=2)
    shutil.rmtree(tmp_path / "gone")
    made = update.run(update.Config(str(tmp_path / "b"), (places["new"],)))
    assert len(made.model_ids) == COUNT + NEW
    with pytest.raises((errors.InputError, errors.ConfigError)):
        update.run(update.Config(str(tmp_path / "b"), (places["new"],), exact=True))


@pytest.mark.slow
def test_exact_is_a_fit_from_the_start(places, tmp_path):
    jaxsub.fit(places["old"], tmp_path / "b", rank=2)
    made = update.run(update.Config(str(tmp_path / "b"), (places["new"],), remove=("m03",), exact=True))
    left = shutil.copytree(places["all"], tmp_path / "left")
    os.remove(left / "m03.safetensors")
    whole = jaxsub.fit(str(left), rank=2)
    for a, b in zip(made.layers, whole.layers, strict=True):
        if a.name == "w":
            same_subspace(a.subspace, b.subspace, 1e-6)
        np.testing.assert_allclose(np.abs(a.values), np.abs(b.values), atol=1e-4)
    assert all(one == {"how": "fitted", "exact": True} for one in made.provenance["updates"][-1]["layers"].values())


@pytest.mark.slow
def test_a_bound_on_errors_holds_for_new_members(places, tmp_path):
    jaxsub.fit(places["old"], tmp_path / "b", rank=2, layers=["w"], max_error=0.2)
    made = update.run(update.Config(str(tmp_path / "b"), (places["new"],), captured=0.0), str(tmp_path / "made"))
    again = jaxsub.load(tmp_path / "made")
    x, rebuilt = stack(places["all"]), again.reconstruct(again.coefficients())["w"]
    error = np.linalg.norm((rebuilt - x).reshape(len(x), -1), axis=1) / np.linalg.norm(x.reshape(len(x), -1), axis=1)
    assert error.max() <= 0.2 and made.layers[0].corrections.counts[COUNT:].any()
    for config in (
        update.Config(str(tmp_path / "b"), (places["new"],), captured=1.0),
        update.Config(str(tmp_path / "b"), remove=("m01",)),
    ):
        with pytest.raises(errors.ConfigError, match="max_error=0.2 cannot be promised"):
            update.run(config)


@pytest.mark.slow
def test_update_from_the_command_line(places, tmp_path, capsys):
    jaxsub.fit(places["old"], tmp_path / "b", rank=2)
    wanted = (f"--bundle={tmp_path / 'b'}", f"--collection={places['new']}", "--remove=m00")
    call(*wanted, f"--workdir={tmp_path / 'out'}")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "3 added, 1 removed, 14 members" and max(map(len, lines[:-1])) <= 100
    assert any("mean and basis fitted again" in line for line in lines)
    made = jaxsub.load(tmp_path / "out" / "bundle")
    assert "m00" not in made.model_ids and files.verify(tmp_path / "out" / "bundle") == []
    with pytest.raises(errors.WorkdirError, match="exists already"):
        call(*wanted, f"--workdir={tmp_path / 'out'}")
    with pytest.raises(errors.ConfigError, match="--workdir"):
        call(*wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "--collection=FOLDER to add"),
        ({"remove": ("m99",)}, "no member m99"),
        ({"collection": "old"}, "is a member already"),
        ({"remove": tuple(f"m{n:02d}" for n in range(COUNT - 2))}, "3 are needed"),
        ({"remove": ("m01",), "captured": 1.5}, "captured"),
    ],
)
def test_what_cannot_be_is_refused(places, tmp_path, options, message):
    jaxsub.fit(places["old"], tmp_path / "b", rank=1)
    given = {k: (places[v],) if k == "collection" else v for k, v in options.items()}
    with pytest.raises(errors.ConfigError, match=message):
        update.run(update.Config(str(tmp_path / "b"), **given))


@pytest.mark.slow
def test_a_basis_with_another_centring_is_not_updated(places, tmp_path):
    jaxsub.fit(places["old"], tmp_path / "b", rank=2, layers=["w"], decomposition="row_pca")
    with pytest.raises(errors.ConfigError, match="row-pca cannot be updated"):
        update.run(update.Config(str(tmp_path / "b"), remove=("m01",)))


def test_the_share_that_a_basis_captures(places):
    bundle = jaxsub.fit(places["old"], rank=2, layers=["w"])
    (layer,), x = bundle.layers, stack(places["new"])
    basis, mean = (np.asarray(v, np.float64) for v in (layer.subspace.basis, layer.subspace.mean))
    y = x.reshape(NEW, -1) - mean
    wanted = np.square(y @ basis.T).sum(1) / np.square(y).sum(1)
    np.testing.assert_allclose(refit.captured(layer, x.astype(np.float32)), wanted, rtol=1e-5)


@pytest.mark.slow
def test_a_bound_on_low_rank_updates_holds_for_new_members(tmp_path):
    folder, updates = test_lora_bundle.adapters(tmp_path / "m", count=10, noise=0.4)
    (tmp_path / "new").mkdir()
    for n in (7, 8, 9):
        shutil.move(tmp_path / "m" / f"a{n}", tmp_path / "new" / f"a{n}")
    jaxsub.fit(folder, tmp_path / "b", rank=3, max_error=0.3)
    new = (str(tmp_path / "new"),)
    made = update.run(update.Config(str(tmp_path / "b"), new, captured=0.0), str(tmp_path / "made"))
    again = jaxsub.load(tmp_path / "made")
    rebuilt = again.reconstruct(again.coefficients())["layer.q"]
    error = np.sqrt(np.square(rebuilt - updates).sum((1, 2)) / np.square(updates).sum((1, 2)))
    own = again.layers[0].corrections.positions
    assert error.max() <= 0.3 and (own >= 7).any() and (own < 7).any()
    assert made.layers[0].orientation == "linear" and made.provenance["models"][-1]["target_modules"] == ["layer.q"]


def relative(folders, made):
    x, rebuilt = np.concatenate([stack(f) for f in folders]), made.reconstruct(made.coefficients())["w"]
    return np.linalg.norm((rebuilt - x).reshape(len(x), -1), axis=1) / np.linalg.norm(x.reshape(len(x), -1), axis=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("basis", "coefficients", "captured"), [("", "int8", 0.0), ("int8", "", 1.0), ("int8", "int8", 1.0)]
)
def test_what_larger_models_do_to_members_in_8_bits_is_counted(tmp_path, basis, coefficients, captured):
    """Their scales grow: members are rounded again, and in a basis fitted again that is rounded too."""
    old, new = models(tmp_path / "old", range(5)), tmp_path / "new"
    new.mkdir()
    large = safetensors.read(tmp_path / "old" / "m00.safetensors")["w"] * np.float32(100)
    safetensors.write(new / "m99.safetensors", {"w": large, "bias": np.zeros(4, np.float32)})
    jaxsub.fit(old, tmp_path / "b", rank=3, layers=["w"], basis_dtype=basis, coefficient_dtype=coefficients)
    made = update.run(update.Config(str(tmp_path / "b"), (str(new),), captured=captured), str(tmp_path / "made"))
    error, figures = relative([old, new], jaxsub.load(tmp_path / "made")), made.layers[0].figures
    assert error[:5].max() > 0.1  # of members, which were within 0.02
    assert error.max() <= figures["error_max"] < 2 * error.max()
    assert error.mean() <= figures["error_mean"]


@pytest.mark.slow
def test_the_mean_error_of_those_that_stay_is_bound(tmp_path):
    """Members that come back whole are removed: the mean error of the others is larger."""
    folder = tmp_path / "m"
    folder.mkdir()
    eye = np.eye(8, dtype=np.float32)
    for n in range(12):
        weight = 10 * eye[min(n, 3)] + (n == 11) * eye[7]
        safetensors.write(folder / f"m{n:02d}.safetensors", {"w": weight})
    jaxsub.fit(str(folder), tmp_path / "b", rank=3)
    gone = tuple(f"m{n:02d}" for n in range(4, 9))
    made = update.run(update.Config(str(tmp_path / "b"), remove=gone, rank=5))
    for name in gone:
        (folder / f"{name}.safetensors").unlink()
    assert relative([folder], made).mean() <= made.layers[0].figures["error_mean"]


@pytest.mark.slow
def test_halves_of_members_stay_as_they_are(tmp_path):
    """A model is added to a bundle in narrow halves with a bound on errors: no member changes."""
    rng = np.random.default_rng(0)
    for n in range(5):
        a, b = (rng.standard_normal(s).astype(np.float32) for s in ((2, 30), (24, 2)))
        peft.write(tmp_path / ("m" if n < 4 else "new") / f"a{n}", {"q": (a, b, 2, 2)})
    jaxsub.fit(str(tmp_path / "m"), tmp_path / "b", energy=1.0, coefficient_dtype="bfloat16", max_error=0.05)
    old = jaxsub.load(tmp_path / "b").layers[0]
    made = update.run(update.Config(str(tmp_path / "b"), (str(tmp_path / "new"),), captured=0.0)).layers[0]
    assert old.halves and made.halves
    np.testing.assert_array_equal(made.values[:4], old.values)
    assert made.figures["error_max"] <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e-27, 1e25])
def test_scale_changes_nothing_of_a_refit(tmp_path, scale):
    """Squares of such weights leave the range of float32."""
    found = []
    for factor in (1.0, scale):
        top = tmp_path / str(factor)
        for name, numbers in (("old", range(6)), ("new", range(COUNT, COUNT + 2))):
            models(top / "plain" / name, numbers, bias=False)
            (top / name).mkdir()
            for file in (top / "plain" / name).iterdir():
                large = safetensors.read(file)["w"].astype(np.float64) * factor
                safetensors.write(top / name / file.name, {"w": large.astype(np.float32)})
        jaxsub.fit(str(top / "old"), top / "b", rank=2)
        made = update.run(update.Config(str(top / "b"), (str(top / "new"),), captured=1.0))
        error = relative([top / "old", top / "new"], made)
        assert error.max() <= made.layers[0].figures["error_max"]
        found.append(error)
    np.testing.assert_allclose(*found, rtol=1e-3)


@pytest.mark.slow
def test_exact_leaves_out_what_was_removed_before(places, tmp_path):
    jaxsub.fit(places["old"], tmp_path / "b", rank=2)
    update.run(update.Config(str(tmp_path / "b"), remove=("m01",)), str(tmp_path / "less"))
    made = update.run(update.Config(str(tmp_path / "less"), (places["new"],), exact=True))
    assert "m01" not in made.model_ids and len(made.model_ids) == COUNT - 1 + NEW
    assert made.provenance["updates"][-1]["added"] == [f"m{n:02d}" for n in range(COUNT, COUNT + NEW)]


@pytest.mark.slow
def test_a_member_that_is_replaced_is_one_that_was_added(places, tmp_path):
    jaxsub.fit(places["old"], tmp_path / "b", rank=2)
    (tmp_path / "new").mkdir()
    shutil.copy(os.path.join(places["old"], "m02.safetensors"), tmp_path / "new" / "m01.safetensors")
    made = update.run(update.Config(str(tmp_path / "b"), (str(tmp_path / "new"),), remove=("m01",)))
    last = made.provenance["updates"][-1]
    assert last["added"] == last["removed"] == ["m01"] and made.model_ids[-1] == "m01"


def test_models_set_aside_are_listed_and_the_rest_is_added(places, tmp_path, capsys):
    """A file cut short, one of another architecture, one that is not finite; one good one beside them."""
    jaxsub.fit(places["old"], tmp_path / "b", rank=2)
    new = shutil.copytree(places["known"], tmp_path / "new")
    (new / "cut.safetensors").write_bytes((new / "m12.safetensors").read_bytes()[:-20])
    safetensors.write(new / "other.safetensors", {"conv": np.ones((3, 3), np.float32)})
    bad = safetensors.read(new / "m13.safetensors")
    bad["w"][0, 0] = np.nan
    safetensors.write(new / "m13.safetensors", bad)
    call(f"--bundle={tmp_path / 'b'}", f"--collection={new}", f"--workdir={tmp_path / 'o'}", "--max_quarantined=3")
    lines = capsys.readouterr().out.splitlines()
    assert {line.split(": ")[0] for line in lines[:3]} == {"set aside cut", "set aside other", "set aside m13"}
    assert lines[3] == "2 added, 0 removed, 14 members"
    made = jaxsub.load(tmp_path / "o" / "bundle")
    assert "other" not in made.passthrough and made.model_ids[-2:] == ("m12", "m14")
    with pytest.raises(errors.InputError, match="other"):
        update.run(update.Config(str(tmp_path / "b"), (str(new),), max_quarantined=1))


@pytest.mark.parametrize("decomposition", first(["gram", "hosvd"]))
@pytest.mark.parametrize("captured", first([0.0, 1.0]))  # projected, fitted again
def test_the_stated_share_of_the_energy_is_no_larger_than_the_true_one(places, tmp_path, decomposition, captured):
    jaxsub.fit(places["old"], tmp_path / "b", rank=2, decomposition=decomposition, layers=["w"])
    last, x = tmp_path / "b", stack(places["all"])
    for step in ({"collection": (places["new"],)}, {"remove": ("m00", "m01", "m13")}):
        config = update.Config(str(last), captured=captured, **step)
        last = tmp_path / f"after{len(step.get('remove', ()))}"
        update.run(config, str(last))
        bundle = jaxsub.load(last)
        (layer,), own = bundle.layers, x[[int(m[1:]) for m in bundle.model_ids]]
        mean = np.asarray(layer.subspace.mean, np.float64).reshape(9, 7)
        left = np.square(bundle.reconstruct(bundle.coefficients())["w"] - own).sum()
        true, stated = 1 - left / np.square(own - mean).sum(), layer.figures["energy_kept"]
        assert stated <= true + 1e-6
        if captured == 0 and "remove" not in step:
            assert stated == pytest.approx(true, abs=1e-5)


@pytest.mark.slow
def test_a_layer_of_equal_models_is_its_mean_until_another_comes(tmp_path):
    rng = np.random.default_rng(0)
    frozen = rng.standard_normal((30, 20))
    for n in range(10):
        other = rng.standard_normal((30, 20)) if n == 9 else 0
        tensors = {
            "frozen": (frozen + other).astype(np.float32),
            "wide": frozen + other,
            "w": rng.standard_normal((6, 5)).astype(np.float32),
        }
        folder = tmp_path / ("new" if n > 7 else "old")
        os.makedirs(folder, exist_ok=True)
        safetensors.write(str(folder / f"m{n}.safetensors"), tensors)
    for options in ({"energy": 0.5}, {"rank": 2}, {"budget_bytes": 16000}):
        bundle = jaxsub.fit(str(tmp_path / "old"), **options)
        again = bundle.reconstruct(bundle.coefficients())
        assert [bundle.layer(n, (30, 20)).subspace.rank for n in ("frozen", "wide")] == [0, 0]
        np.testing.assert_array_equal(again["frozen"], np.broadcast_to(frozen.astype(np.float32), (8, 30, 20)))
        np.testing.assert_allclose(again["wide"], np.broadcast_to(frozen, (8, 30, 20)), rtol=1e-15)
    jaxsub.fit(str(tmp_path / "old"), tmp_path / "b", rank=2)
    assert files.verify(tmp_path / "b") == []
    update.run(update.Config(str(tmp_path / "b"), (str(tmp_path / "new"),)), str(tmp_path / "u"))
    bundle = jaxsub.load(tmp_path / "u")
    for n in ("m8", "m9"):
        own = safetensors.read(str(tmp_path / "new" / f"{n}.safetensors"))
        for name in ("frozen", "wide"):
            again = bundle.reconstruct(bundle.coefficients([n]))[name][0]
            np.testing.assert_allclose(again, own[name], atol=1e-5)


def test_the_workdir_of_an_update_is_whole_and_one_of_a_fit_without_its_record_is_not(places, tmp_path):
    call_fit = importlib.import_module("jaxsub.cli.fit")
    call_fit.main(
        flags.Flags(
            "fit",
            call_fit.config_class(),
            ["fit", f"--collection={places['old']}", "--rank=2", f"--workdir={tmp_path / 'a'}"],
        )
    )
    call(f"--bundle={tmp_path / 'a' / 'bundle'}", "--remove=m00", f"--workdir={tmp_path / 'b'}")
    for place in "ab":
        verify.run(verify.Config(str(tmp_path / place)), write=print)
    os.remove(tmp_path / "a" / "run.json")
    with pytest.raises(errors.InputError, match="damaged"):
        verify.run(verify.Config(str(tmp_path / "a")), write=print)


@pytest.mark.slow
@pytest.mark.parametrize("narrow", first(["", "int8"]))
def test_members_of_a_layer_of_equal_models_go_and_equal_ones_come(tmp_path, narrow):
    """float64, of which the mean of seven is off by a rounding."""
    rng = np.random.default_rng(0)
    frozen = rng.standard_normal((6, 5))
    for n in range(9):
        folder = tmp_path / ("new" if n > 6 else "old")
        os.makedirs(folder, exist_ok=True)
        safetensors.write(str(folder / f"m{n}.safetensors"), {"frozen": frozen, "w": rng.standard_normal((6, 5))})
    jaxsub.fit(str(tmp_path / "old"), tmp_path / "b", rank=2, basis_dtype=narrow)
    update.run(update.Config(str(tmp_path / "b"), remove=("m0",)), str(tmp_path / "less"))
    update.run(update.Config(str(tmp_path / "less"), (str(tmp_path / "new"),)), str(tmp_path / "more"))
    for place, count in (("less", 6), ("more", 8)):
        bundle = jaxsub.load(tmp_path / place)
        (layer,) = (one for one in bundle.layers if one.name == "frozen")
        assert (layer.subspace.rank, layer.values.shape) == (0, (count, 0))
        again = bundle.reconstruct(bundle.coefficients())["frozen"]
        bound = layer.figures["error_max"] * np.linalg.norm(frozen) * (1 + 1e-6) + 1e-14
        assert (np.linalg.norm((again - frozen).reshape(count, -1), axis=1) <= bound).all()


@pytest.mark.slow
def test_the_workdir_of_an_update_among_models_is_none_of_them(tmp_path):
    rng = np.random.default_rng(0)
    for n in range(6):
        (tmp_path / "c" / f"m{n}").mkdir(parents=True)
        tensors = {"w": rng.standard_normal((6, 5)).astype(np.float32)}
        safetensors.write(str(tmp_path / "c" / f"m{n}" / "model.safetensors"), tensors)
    jaxsub.fit(str(tmp_path / "c"), tmp_path / "b", rank=2)
    update.run(update.Config(str(tmp_path / "b"), remove=("m0",)), str(tmp_path / "c" / "upd" / "bundle"))
    opened = jaxsub.open_collection(str(tmp_path / "c"))
    assert [ref.id for ref in opened.refs] == [f"m{n}" for n in range(6)] and not opened.quarantined
