"""Bundles: what comes back is what went in, bytes are counted as they lie on the disk, and no damage goes unseen."""

import json
import os
import shutil

import numpy as np
import pytest

import jaxsub
from jaxsub import errors, plugins
from jaxsub.bundle import files
from jaxsub.formats import peft, safetensors
from jaxsub.pipelines import project

BIAS = np.linspace(-1, 1, 7, dtype=np.float32)


def collection(folder, count=12, *, scale=1.0, dtype=np.float32, seed=0):
    """Models of a planted plane plus noise, one layer without structure, a common bias and an integer of their own."""
    rng = np.random.default_rng(seed)
    mean, basis = rng.standard_normal((10, 8)), rng.standard_normal((2, 10, 8))
    os.makedirs(folder)
    for n in range(count):
        planted = mean + np.tensordot(rng.standard_normal(2), basis, 1) + 1e-3 * rng.standard_normal((10, 8))
        tensors = {
            "a.weight": (scale * planted).astype(dtype),
            "b.weight": (scale * rng.standard_normal((6, 5))).astype(dtype),
            "a.bias": BIAS,
            "steps": np.array([n], np.int32),
        }
        safetensors.write(os.path.join(folder, f"m{n:02d}.safetensors"), tensors)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return collection(tmp_path_factory.mktemp("bundle") / "models")


@pytest.fixture(scope="module")
def saved(folder, tmp_path_factory):
    path = str(tmp_path_factory.mktemp("saved") / "bundle")
    jaxsub.fit(folder, path, rank=2, exclude_layers=["bias"])
    return path


def weights(folder, layer):
    names = sorted(os.listdir(folder))
    return np.stack([safetensors.read(os.path.join(folder, n))[layer] for n in names])


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n == "gram" else pytest.mark.slow) for n in plugins.available("decompositions")],
)
def test_what_is_loaded_is_what_was_fitted(folder, tmp_path, name):
    made = jaxsub.fit(folder, tmp_path / "b", rank=2, decomposition=name, layers=["weight"])
    found = jaxsub.load(tmp_path / "b")
    assert files.verify(tmp_path / "b") == []
    assert found.model_ids == made.model_ids and found.provenance == json.loads(json.dumps(made.provenance))
    for a, b in zip(made.layers, found.layers, strict=True):
        assert (a.name, a.shape, a.model_ids, a.dtypes) == (b.name, b.shape, b.model_ids, b.dtypes)
        np.testing.assert_array_equal(a.values, b.values)
        assert a.subspace.procedure == b.subspace.procedure and a.subspace.certificate == b.subspace.certificate
        assert {k: v.dtype for k, v in a.tensors().items()} == {k: v.dtype for k, v in b.tensors().items()}
        for key, value in a.tensors().items():
            np.testing.assert_array_equal(value, b.tensors()[key])
    again = found.reconstruct(found.coefficients())
    for key, value in made.reconstruct(made.coefficients()).items():
        np.testing.assert_array_equal(again[key], value)


def test_members_come_back_within_the_stated_error(folder, saved):
    bundle = jaxsub.load(saved)
    rebuilt = bundle.reconstruct(bundle.coefficients())
    for layer in bundle.layers:
        x = weights(folder, layer.name).astype(np.float64)
        error = np.linalg.norm((rebuilt[layer.name] - x).reshape(12, -1), axis=1)
        relative = error / np.linalg.norm(x.reshape(12, -1), axis=1)
        assert layer.figures["error_max"] == pytest.approx(relative.max(), rel=1e-5)
        assert layer.figures["error_mean"] == pytest.approx(relative.mean(), rel=1e-5)
        centred = x - x.mean(0)
        assert layer.figures["energy_kept"] == pytest.approx(1 - np.square(error).sum() / np.square(centred).sum())
    assert bundle.layers[0].figures["error_max"] < 2e-3  # the plane was planted
    assert bundle.layers[1].figures["held_out"] > 0.8  # and here there is none


def test_projection_of_members_gives_their_coefficients(folder, saved):
    bundle = jaxsub.load(saved)
    found = bundle.project(jaxsub.open_collection(folder))
    assert found.model_ids == bundle.model_ids
    for layer in bundle.layers:
        np.testing.assert_allclose(found.values[layer.name], layer.values, atol=1e-5)
    one = bundle.project({"a.weight": weights(folder, "a.weight")[:1]})
    np.testing.assert_allclose(one.values["a.weight"], bundle.coefficients(["m00"]).values["a.weight"], atol=1e-5)


def test_unseen_models_are_projected(saved, tmp_path):
    bundle = jaxsub.load(saved)
    rng = np.random.default_rng(0)
    mean, basis = rng.standard_normal((10, 8)), rng.standard_normal((2, 10, 8))  # as in `collection`
    unseen = (mean + np.tensordot([[3.0, -2.0]], basis, 1)).astype(np.float32)
    rebuilt = bundle.reconstruct(bundle.project({"a.weight": unseen}))["a.weight"]
    assert np.linalg.norm(rebuilt - unseen) < 5e-3 * np.linalg.norm(unseen)


def test_what_no_subspace_covers_is_kept_to_the_bit_and_once(folder, saved):
    bundle = jaxsub.load(saved)
    for n, model in enumerate(bundle.model_ids):
        kept = bundle.passthrough[model]
        assert set(kept) == {"a.bias", "steps"}
        np.testing.assert_array_equal(kept["a.bias"], BIAS)
        assert kept["steps"].dtype == np.int32 and kept["steps"][0] == n
    stored = safetensors.read(os.path.join(saved, files.PASSTHROUGH))
    assert len(stored) == 1 + len(bundle.model_ids)


def test_bytes_are_those_on_the_disk(folder, saved):
    with open(os.path.join(saved, files.MANIFEST), encoding="ascii") as file:
        counted = json.load(file)["bytes"]
    there = sum(os.path.getsize(os.path.join(d, n)) for d, _, names in os.walk(saved) for n in names)
    originals = sum(os.path.getsize(os.path.join(folder, n)) for n in os.listdir(folder))
    assert counted["total"] == there and counted["originals"] == originals
    assert counted["ratio"] == pytest.approx(originals / there)
    parts = ("mean", "basis", "coefficients", "passthrough", "headers")
    assert sum(counted[p] for p in parts) == there
    assert jaxsub.load(saved).accounting() == counted  # and it is known before anything is written
    assert counted["basis"] == sum(4 * 2 * d + 8 * 11 for d in (80, 30))  # k rows and N - 1 float64 singular values
    assert counted["coefficients"] == 2 * 12 * 2 * 4


@pytest.mark.parametrize("extra", [0, 1, 5, 8, 9, 13, 17, 21])
def test_bytes_are_those_on_the_disk_whatever_their_digits(saved, tmp_path, extra):
    """The manifest states its own size, and the ratio's digits change with it."""
    for step in range(4):
        one = jaxsub.load(saved)
        one.provenance["note"] = "x" * (4 * extra + step)
        path = tmp_path / str(step)
        one.save(path)
        there = sum(os.path.getsize(os.path.join(d, n)) for d, _, names in os.walk(path) for n in names)
        assert one.accounting()["total"] == there == jaxsub.load(path).accounting()["total"]
        assert json.loads((path / files.MANIFEST).read_text())["bytes"]["total"] == there


def test_break_even_is_the_smallest_number_of_models_that_gains(folder):
    count = jaxsub.fit(folder, rank=2, exclude_layers=["bias"]).accounting(headers=1000)
    number = count["break_even"]
    models = 12
    each = (count["coefficients"] + 4 * models) / models  # and the integer of each model's own
    fixed = count["total"] - models * each

    def gains(n):
        return fixed + n * each < n * count["originals"] / models

    assert gains(number) and not gains(number - 1)


@pytest.mark.slow
def test_no_number_of_models_is_enough_where_coefficients_outweigh_them(tmp_path):
    made = collection(tmp_path / "m", 12)
    bundle = jaxsub.fit(made, energy=1.0, layers=["b.weight"])
    heavy = bundle.layers[0].values.repeat(1000, axis=1)
    count = type(bundle)(
        bundle.model_ids, (type(bundle.layers[0])("b", bundle.layers[0].subspace, bundle.model_ids, heavy, ()),),
        {}, bundle.originals, {},
    ).accounting()  # fmt: skip
    assert count["break_even"] is None and count["ratio"] < 1


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_changes_nothing_but_the_scale(tmp_path, scale):
    power = 2.0 ** round(np.log2(scale))
    plain = jaxsub.fit(collection(tmp_path / "a", dtype=np.float64), rank=2)
    other = jaxsub.fit(collection(tmp_path / "b", dtype=np.float64, scale=power), rank=2)
    for a, b in zip(plain.layers, other.layers, strict=True):
        if a.name.endswith("weight"):
            np.testing.assert_allclose(b.values, a.values * power, rtol=1e-9, atol=1e-12 * power)
            np.testing.assert_allclose(b.subspace.spectrum.values, a.subspace.spectrum.values * power, rtol=1e-9)
            assert b.figures["error_max"] == pytest.approx(a.figures["error_max"], rel=1e-6)


def damages(path):
    """(name, function that damages the folder) for every kind of damage and file."""
    every = [os.path.relpath(os.path.join(d, n), path) for d, _, names in os.walk(path) for n in names]

    def rewritten(name, change):
        def damage(folder):
            full = os.path.join(folder, name)
            with open(full, "rb") as file:
                data = file.read()
            with open(full, "wb") as file:
                file.write(change(data))

        return damage

    def flipped(data, at):
        return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]

    for name in sorted(every):
        yield name + " deleted", lambda folder, name=name: os.unlink(os.path.join(folder, name))
        size = os.path.getsize(os.path.join(path, name))
        for what, change in {
            "emptied": lambda data: b"",
            "halved": lambda data: data[: len(data) // 2],
            "short": lambda data: data[:-1],
            "long": lambda data: data + b"\0",
            "zero tail": lambda data: data[:-64] + bytes(64),
        }.items():
            yield f"{name} {what}", rewritten(name, change)
        for at in np.random.default_rng(len(name)).integers(0, max(size, 1), 6):
            yield f"{name} bit {at}", rewritten(name, lambda data, at=int(at): flipped(data, at))
    yield "swapped", lambda folder: swap(folder, "layers/00000.safetensors", "layers/00001.safetensors")
    yield "stranger", lambda folder: open(os.path.join(folder, "layers", "x.bin"), "w").close()


def swap(folder, first, second):
    a, b = os.path.join(folder, first), os.path.join(folder, second)
    os.rename(a, a + "~")
    os.rename(b, a)
    os.rename(a + "~", b)


def test_verify_finds_every_damage(saved, tmp_path):
    missed = []
    for number, (what, damage) in enumerate(damages(saved)):
        copy = tmp_path / str(number)
        shutil.copytree(saved, copy)
        damage(copy)
        try:
            if not files.verify(copy):
                missed.append(what)
        except errors.InputError:
            pass
    assert not missed and number > 40


def test_a_manifest_that_is_written_otherwise_is_refused(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "b")
    path = tmp_path / "b" / files.MANIFEST
    path.write_text(path.read_text().replace("\n", "", 1))
    with pytest.raises(errors.InputError, match="not as it was written"):
        files.verify(tmp_path / "b")


def forged(saved, folder, change):
    """A copy with another manifest, its own digest made right: what a stranger could send."""
    shutil.copytree(saved, folder)
    path = os.path.join(folder, files.MANIFEST)
    with open(path, encoding="ascii") as file:
        manifest = json.load(file)
    change(manifest)
    manifest["sha256"] = files._digest(manifest)
    with open(path, "wb") as file:
        file.write(files._text(manifest))
    return folder


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["files"].update({"../../outside": {"bytes": 1, "sha256": ""}}),
        lambda m: m["layers"][0].update(file="../../outside.safetensors"),
        lambda m: m["layers"][0].update(file=7),
        lambda m: m["layers"][0].update(shape=[10**9, 10**9]),
        lambda m: m["layers"][0].update(kind="tucker"),
        lambda m: m["layers"][0].update(models=["m00"]),
        lambda m: m["layers"][0].update(models=[f"x{n}" for n in range(12)]),
        lambda m: m["models"].__setitem__(1, "m00"),
        lambda m: m["models"].__setitem__(1, 7),
        lambda m: m["layers"][0]["procedure"].update(evil=1),
        lambda m: m.update(layers={}, files=[]),
        lambda m: m.update(passthrough={"m00": {"x": "999999"}}),
        lambda m: m.update(schema="jaxsub.bundle/2"),
    ],
)
def test_forged_manifests_are_refused_in_words(saved, tmp_path, change):
    with pytest.raises(errors.InputError) as caught:
        jaxsub.load(forged(saved, tmp_path / "b", change))
    assert "manifest.json" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "key", "change"),
    [
        (files.COEFFICIENTS, "00000", lambda a: a.reshape(-1)),
        (files.COEFFICIENTS, "00000", lambda a: np.concatenate([a, a], 1)),
        (files.CORRECTIONS, "00000.places", lambda a: a.astype(np.int64) - 10**6),
        (files.CORRECTIONS, "00000.places", lambda a: a.astype(np.float32)),
        (files.CORRECTIONS, "00000.values", lambda a: np.stack([a, a], 1)),
    ],
)
def test_forged_arrays_are_refused_when_they_are_loaded(folder, tmp_path, name, key, change):
    jaxsub.fit(folder, tmp_path / "a", rank=6, max_error=0.3, layers=["b.weight"])

    def put(manifest):
        path = tmp_path / "b" / name
        tensors = safetensors.read(path)
        safetensors.write(path, {**tensors, key: change(tensors[key])})
        manifest["files"][name] = files.identity(path)

    with pytest.raises(errors.InputError, match="does not fit its files"):
        jaxsub.load(forged(tmp_path / "a", tmp_path / "b", put))


@pytest.mark.slow
def test_forged_halves_are_refused_before_they_are_multiplied(tmp_path):
    """Of a few bytes they would make an array that no memory holds."""
    for n in range(4):
        rng = np.random.default_rng(n)
        a, b = rng.standard_normal((2, 9)).astype(np.float32), rng.standard_normal((8, 2)).astype(np.float32)
        peft.write(tmp_path / "m" / f"a{n}", {"q": (a, b, 2, 2)})
    jaxsub.fit(str(tmp_path / "m"), tmp_path / "a", energy=1.0)

    def put(manifest):
        path = tmp_path / "b" / files.COEFFICIENTS
        large = np.zeros((4, 10**6, 1), np.float32)
        assert {*safetensors.read(path)} == {"00000.left", "00000.right"}
        safetensors.write(path, {"00000.left": large, "00000.right": large.transpose(0, 2, 1)})
        manifest["files"][files.COEFFICIENTS] = files.identity(path)

    with pytest.raises(errors.InputError, match="does not fit its files"):
        jaxsub.load(forged(tmp_path / "a", tmp_path / "b", put))


def test_the_workdir_of_a_fit_stands_for_its_bundle(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "work" / "bundle")
    found, wanted = jaxsub.load(tmp_path / "work"), jaxsub.load(saved)
    np.testing.assert_array_equal(found.layers[0].values, wanted.layers[0].values)
    with pytest.raises(errors.InputError, match="manifest.json"):
        jaxsub.load(tmp_path)


def test_a_folder_that_exists_is_not_touched(saved, folder):
    before = files._manifest(saved)
    with pytest.raises(errors.WorkdirError, match="exists already"):
        jaxsub.fit(folder, saved, rank=1)
    assert files._manifest(saved) == before


@pytest.mark.slow
def test_nothing_is_left_where_writing_fails(folder, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    bundle = jaxsub.fit(folder, rank=1)
    monkeypatch.setattr(safetensors, "write", full)
    with pytest.raises(errors.ResourceError, match="No space left"):
        bundle.save(tmp_path / "b")
    assert os.listdir(tmp_path) == []


def test_strangers_are_named(saved):
    bundle = jaxsub.load(saved)
    with pytest.raises(errors.ConfigError, match="did you mean 'm03'"):
        bundle.coefficients(["m033"])
    with pytest.raises(errors.ConfigError, match="no layer"):
        bundle.project({"a.weigth": np.zeros((1, 10, 8), np.float32)})
    with pytest.raises(errors.ConfigError, match="shape"):
        bundle.project({"a.weight": np.zeros((1, 8, 10), np.float32)})
    wrong = jaxsub.load(saved).coefficients()
    wrong.values["a.weight"] = wrong.values["a.weight"][:, :1]
    with pytest.raises(errors.ConfigError, match="coefficients of shape"):
        bundle.reconstruct(wrong)


def test_numbers_beside_vectors_of_one_are_not_mixed_up(tmp_path):
    """Both have the shape (1,) in a bundle."""
    (tmp_path / "m").mkdir()
    wanted = {}
    for n in range(8):
        wanted[f"m{n}"] = np.float32(n + 1) if n < 4 else np.array([10.0 * n], np.float32)
        safetensors.write(tmp_path / "m" / f"m{n}.safetensors", {"s": np.asarray(wanted[f"m{n}"])})
    jaxsub.fit(str(tmp_path / "m"), tmp_path / "b", energy=1.0)
    bundle = jaxsub.load(tmp_path / "b")
    for model, value in wanted.items():
        found = bundle.reconstruct(bundle.coefficients([model])) or bundle.passthrough[model]
        np.testing.assert_allclose(found["s"].reshape(-1), np.reshape(value, -1), rtol=1e-6)
    project.run(project.Config(str(tmp_path / "b"), (str(tmp_path / "m"),), write_models=str(tmp_path / "new")))
    for model, value in wanted.items():
        again = safetensors.read(tmp_path / "new" / f"{model}.safetensors")["s"]
        np.testing.assert_allclose(again, value, rtol=1e-6)


@pytest.mark.slow
def test_products_and_whole_updates_of_one_name_and_shape_are_two_layers(tmp_path):
    (tmp_path / "m").mkdir()
    wanted = {}
    for n in range(6):
        rng = np.random.default_rng(n)
        down, up, whole = (rng.standard_normal(s).astype(np.float32) for s in ((2, 6), (5, 2), (5, 6)))
        factors = {"k.lora_down.weight": down, "k.lora_up.weight": up, "k.alpha": np.float32(2)}
        safetensors.write(tmp_path / "m" / f"m{n}.safetensors", factors if n < 3 else {"k.diff": whole})
        wanted[f"m{n}"] = up @ down if n < 3 else whole
    jaxsub.fit(str(tmp_path / "m"), tmp_path / "b", energy=1.0)
    bundle = jaxsub.load(tmp_path / "b")
    for model, value in wanted.items():
        (found,) = bundle.reconstruct(bundle.coefficients([model])).values()
        np.testing.assert_allclose(found[0], value, atol=1e-5)
    done = project.run(project.Config(str(tmp_path / "b"), (str(tmp_path / "m"),)))["layers"]
    assert sorted(one["key"] for one in done) == ["k[5,6,dense]", "k[5,6,lora]"]
    assert max(max(one["error"]) for one in done) < 1e-5
