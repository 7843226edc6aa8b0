"""`jaxsub project`: errors beside those of a mean and a random subspace; reconstructions that load as the originals."""

import dataclasses
import errno
import importlib
import json
import os

import numpy as np
import pytest

import jaxsub
from jaxsub import errors, formats
from jaxsub.formats import _rewrite, peft, safetensors
from jaxsub.pipelines import project, update
from tests.selected import first


def weights(folder, *, count=9, dtype=np.float32, seed=0):
    rng, plane = np.random.default_rng(seed), np.random.default_rng(99)
    mean, basis = plane.standard_normal((8, 6)), plane.standard_normal((2, 8, 6))
    os.makedirs(folder)
    for n in range(count):
        w = mean + np.tensordot(rng.standard_normal(2), basis, 1) + 1e-3 * rng.standard_normal((8, 6))
        tensors = {
            "w": w.astype(dtype),
            "bias": rng.standard_normal(6).astype(dtype),
            "num_batches_tracked": np.array(n),
        }
        safetensors.write(folder / f"m{n}.safetensors", tensors, {"epoch": str(n)})
    return str(folder)


def adapters(folder, *, count=6, transposed=False, rslora=False):
    rng, plane = np.random.default_rng(0), np.random.default_rng(98)
    u, v = plane.standard_normal((11, 3)), plane.standard_normal((3, 7))
    products = {}
    for n in range(count):
        a, b = (
            (rng.standard_normal((2, 3)) @ v).astype(np.float32),
            (u @ rng.standard_normal((3, 2))).astype(np.float32),
        )
        peft.write(folder / f"a{n}", {"m.q": (a, b, 6.0, 2)}, base_model="some/base")
        path = folder / f"a{n}" / peft.CONFIG
        config = json.loads(path.read_text())
        path.write_text(json.dumps(config | {"fan_in_fan_out": transposed, "use_rslora": rslora, "revision": "main"}))
        (folder / f"a{n}" / "README.md").write_text(f"adapter {n}")
        products[f"a{n}"] = 6.0 / (2**0.5 if rslora else 2) * b.astype(np.float64) @ a
    return str(folder), products


def products_of(folder):
    """id -> B A with its scale, in PEFT's orientation, read from the files."""
    opened = jaxsub.open_collection(folder)
    found = {}
    for ref, model in zip(opened.refs, opened.models, strict=True):
        (pair,) = model.adapters.values()
        tensors = safetensors.read(os.path.join(model.path, "adapter_model.safetensors"))
        found[ref.id] = pair.scale * tensors[pair.b.name].astype(np.float64) @ tensors[pair.a.name]
    return found


@pytest.mark.parametrize("dtype", first(["float32", "float16"]))
def test_reconstructions_are_files_like_the_originals(tmp_path, dtype):
    folder = weights(tmp_path / "m", dtype=dtype)
    jaxsub.fit(folder, tmp_path / "b", rank=2, layers=["w"])
    config = project.Config(bundle=str(tmp_path / "b"), collection=(folder,), write_models=str(tmp_path / "new"))
    found = project.run(config, str(tmp_path / "out"))
    (layer,) = found["layers"]
    for n, error in enumerate(layer["error"]):
        old, new = (safetensors.read(tmp_path / f / f"m{n}.safetensors") for f in ("m", "new"))
        assert {k: (v.dtype, v.shape) for k, v in new.items()} == {k: (v.dtype, v.shape) for k, v in old.items()}
        assert all(np.array_equal(new[k], old[k]) for k in ("bias", "num_batches_tracked"))
        assert safetensors.open_metadata(tmp_path / "new" / f"m{n}.safetensors") == {"epoch": str(n)}
        w = old["w"].astype(np.float64)
        assert np.linalg.norm(new["w"] - w) / np.linalg.norm(w) == pytest.approx(error, rel=0.3, abs=3e-4)
        assert 0 < error < 2e-3 < layer["error_of_mean"][n]
        assert layer["error_of_random"][n] == pytest.approx(layer["error_of_mean"][n] * (1 - 2 / 48) ** 0.5)
    assert json.loads((tmp_path / "out" / project.RECORD).read_text())["layers"] == found["layers"]
    saved = safetensors.read(tmp_path / "out" / project.COEFFICIENTS)
    bundle = jaxsub.load(tmp_path / "b")
    np.testing.assert_allclose(saved["w"], bundle.coefficients().values["w"], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("transposed", [False, True])
def test_rebuilt_adapters_keep_scale_orientation_and_sidecars(tmp_path, transposed):
    folder, products = adapters(tmp_path / "m", transposed=transposed, rslora=True)
    jaxsub.fit(folder, tmp_path / "b", rank=3)
    config = project.Config(bundle=str(tmp_path / "b"), collection=(folder,), write_models=str(tmp_path / "new"))
    found = project.run(config)
    assert max(found["layers"][0]["error"]) < 1e-5 and found["layers"][0]["error_of_mean"] == pytest.approx([1.0] * 6)
    again = products_of(str(tmp_path / "new"))
    assert again.keys() == products.keys()
    for name, product in products.items():
        np.testing.assert_allclose(again[name], product, atol=1e-4)
        made = json.loads((tmp_path / "new" / name / peft.CONFIG).read_text())
        assert (made["r"], made["lora_alpha"], made["use_rslora"]) == (2, 2.0, False)
        assert (made["fan_in_fan_out"], made["revision"]) == (transposed, "main")
        assert made["base_model_name_or_path"] == "some/base"
        assert (tmp_path / "new" / name / "README.md").read_text() == f"adapter {name[1:]}"


@pytest.mark.slow
def test_peft_loads_a_rebuilt_adapter(tmp_path):
    torch, library = pytest.importorskip("torch"), pytest.importorskip("peft")
    folder, products = adapters(tmp_path / "m", rslora=True)
    jaxsub.fit(folder, tmp_path / "b", rank=3)
    config = project.Config(bundle=str(tmp_path / "b"), collection=(folder,), write_models=str(tmp_path / "new"))
    project.run(config)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.m = torch.nn.Module()
            self.m.q = torch.nn.Linear(7, 11, bias=False)

        def forward(self, x):
            return self.m.q(x)

    net = Net()
    base = net.m.q.weight.detach().clone().numpy()
    merged = library.PeftModel.from_pretrained(net, str(tmp_path / "new" / "a3")).merge_and_unload()
    np.testing.assert_allclose(merged.m.q.weight.detach().numpy() - base, products["a3"], atol=1e-4)


def test_unseen_models_show_what_the_subspace_misses(tmp_path):
    jaxsub.fit(weights(tmp_path / "m"), tmp_path / "b", rank=2, layers=["w"])
    unseen = weights(tmp_path / "unseen", count=4, seed=7)
    strange = tmp_path / "strange"
    os.makedirs(strange)
    for n in range(3):
        w = np.random.default_rng(n).standard_normal((8, 6)).astype(np.float32)
        safetensors.write(strange / f"s{n}.safetensors", {"w": w})
    near, far = (
        project.run(project.Config(bundle=str(tmp_path / "b"), collection=(str(c),)))["layers"][0]
        for c in (unseen, strange)
    )
    assert max(near["error"]) < 3e-3
    assert np.mean(far["error"]) > 0.9 * np.mean(far["error_of_random"])  # no better than chance


@pytest.mark.slow
def test_numbers_without_axes_come_back_as_such(tmp_path):
    os.makedirs(tmp_path / "m")
    for n in range(5):
        safetensors.write(
            tmp_path / "m" / f"m{n}.safetensors", {"scale": np.float32(n), "w": np.full((3, 2), n**2, "f4")}
        )
    jaxsub.fit(str(tmp_path / "m"), tmp_path / "b", rank=1)
    config = {"bundle": str(tmp_path / "b"), "collection": (str(tmp_path / "m"),)}
    found = project.run(project.Config(**config, write_models=str(tmp_path / "new")))
    assert [one["name"] for one in found["layers"]] == ["scale", "w"]
    for n in range(5):
        new = safetensors.read(tmp_path / "new" / f"m{n}.safetensors")
        assert new["scale"].shape == () and new["scale"] == pytest.approx(n, abs=1e-5)
        np.testing.assert_allclose(new["w"], n**2, atol=1e-4)


def test_values_that_the_stored_dtype_cannot_hold_are_refused(tmp_path):
    os.makedirs(tmp_path / "m")
    for n in range(4):
        w = np.zeros((2, 4), np.float16)
        w[0, n], w[1, n] = 65000, 1
        safetensors.write(tmp_path / "m" / f"m{n}.safetensors", {"w": w})
    opened = jaxsub.open_collection(str(tmp_path / "m"))
    with pytest.raises(errors.InputError, match="more than float16 holds"):
        formats.rewrite(opened.models[0], str(tmp_path / "x.safetensors"), {"w": np.full((2, 4), 7e4)})
    assert not os.path.exists(tmp_path / "x.safetensors")


def test_one_model_is_enough(tmp_path):
    jaxsub.fit(weights(tmp_path / "m"), tmp_path / "b", rank=2, layers=["w"])
    one = weights(tmp_path / "one", count=1, seed=5)
    (layer,) = project.run(project.Config(bundle=str(tmp_path / "b"), collection=(one,)))["layers"]
    assert layer["models"] == ["m0"] and layer["error"][0] < 3e-3
    found = jaxsub.load(tmp_path / "b").project(jaxsub.open_collection(one, smallest=1))
    assert found.values["w"].shape == (1, 2)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"bundle": ""}, "--bundle"),
        ({"collection": ()}, "--collection"),
        ({"write_models": "EXISTING"}, "exists already"),
    ],
)
def test_wrong_usage_is_said(tmp_path, change, words):
    folder = weights(tmp_path / "m", count=3)
    jaxsub.fit(folder, tmp_path / "b", rank=1)
    change = {k: str(tmp_path) if v == "EXISTING" else v for k, v in change.items()}
    with pytest.raises((errors.ConfigError, errors.WorkdirError), match=words):
        project.run(project.Config(**({"bundle": str(tmp_path / "b"), "collection": (folder,)} | change)))


def test_models_that_cannot_be_written_are_named_before_any_is_read(tmp_path, monkeypatch):
    h5py = pytest.importorskip("h5py")
    folder = weights(tmp_path / "m", count=3)
    jaxsub.fit(folder, tmp_path / "b", rank=1, layers=["w"])
    for n in range(3):
        with h5py.File(tmp_path / f"n{n}.h5", "w") as file:
            file["w"] = np.full((8, 6), n, np.float32)
    monkeypatch.setattr(project.bundles, "read", None)
    config = project.Config(
        bundle=str(tmp_path / "b"), collection=(str(tmp_path / "n*.h5"),), write_models=str(tmp_path / "new")
    )
    with pytest.raises(errors.ConfigError, match="keras cannot be written yet"):
        project.run(config)
    assert not os.path.exists(tmp_path / "new")


@pytest.mark.parametrize("program", ["project", "fit", "update"])
def test_a_place_where_nothing_can_be_made_is_refused_before_any_model_is_read(tmp_path, monkeypatch, program):
    """Here under a file; permissions would not stop the superuser."""
    folder, found = weights(tmp_path / "m", count=4), str(tmp_path / "b")
    jaxsub.fit(folder, found, rank=1, layers=["w"])
    (tmp_path / "file").write_text("")
    place, before = str(tmp_path / "file" / "new" / "one"), sorted(os.listdir(tmp_path))
    calls = {
        "project": lambda: project.run(project.Config(bundle=found, collection=(folder,), write_models=place)),
        "fit": lambda: jaxsub.fit(folder, place, rank=1),
        "update": lambda: update.run(update.Config(bundle=found, collection=(folder,)), place),
    }
    for reads in ("reading.read_stack", "formats.read", "bundle.read"):
        monkeypatch.setattr(f"jaxsub.{reads}", None)
    with pytest.raises(errors.WorkdirError, match="cannot be made: Not a directory"):
        calls[program]()
    assert sorted(os.listdir(tmp_path)) == before


def test_what_could_not_be_written_whole_is_not_there(tmp_path, monkeypatch):
    """A folder with some of its models would pass for all of them, and stop the same command from going on."""
    folder = weights(tmp_path / "m", count=4)
    jaxsub.fit(folder, str(tmp_path / "b"), rank=1, layers=["w"])
    config = project.Config(bundle=str(tmp_path / "b"), collection=(folder,), write_models=str(tmp_path / "new"))
    real, written = formats.rewrite, []

    def full(model, path, layers):
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        real(model, path, layers)

    before = sorted(os.listdir(tmp_path))
    monkeypatch.setattr(formats, "rewrite", full)
    with pytest.raises(errors.ResourceError, match="new: cannot be written: No space left"):
        project.run(config)
    assert sorted(os.listdir(tmp_path)) == before
    monkeypatch.setattr(formats, "rewrite", real)
    project.run(config)
    assert len(os.listdir(tmp_path / "new")) == 4
    monkeypatch.setattr("jaxsub.pipelines.plan._files.free_bytes", lambda _: 100)
    with pytest.raises(errors.ResourceError, match="are to be written"):
        project.run(dataclasses.replace(config, write_models=str(tmp_path / "other")))


def test_ids_do_not_lead_out_of_the_folder(tmp_path):
    for name in ("../x", "/etc/x", "..", "a/../../x"):
        with pytest.raises(errors.InputError, match="no place inside"):
            _rewrite.place(tmp_path / "new", name)
    assert _rewrite.place(tmp_path, "owner/name") == str(tmp_path / "owner" / "name")


def test_the_program_prints_a_table(tmp_path, capsys):
    from jaxsub.cli import flags

    folder = weights(tmp_path / "m", count=4)
    jaxsub.fit(folder, tmp_path / "b", rank=1)
    program = importlib.import_module("jaxsub.cli.project")
    arguments = ["project", f"--bundle={tmp_path / 'b'}", f"--collection={folder}"]
    program.main(flags.Flags("project", program.config_class(), arguments))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines[0]) <= 100 and len(lines[1]) <= 100 and lines[-1].endswith("keeps them")


def test_names_that_end_alike_do_not_collide(tmp_path):
    """Two owners, the same names of models: the released scripts kept one of the two."""
    for owner, count in (("ann", 5), ("bob", 4)):
        weights(tmp_path / "m" / owner, count=count)
    path = tmp_path / "m" / "bob" / "m0.safetensors"
    changed = safetensors.read(path)
    changed["w"] = -changed["w"]
    safetensors.write(path, changed)
    bundle = jaxsub.fit(str(tmp_path / "m"), tmp_path / "b", rank=3, layers=["w"])
    assert {"ann/m0", "bob/m0"} < set(bundle.model_ids)
    config = project.Config(
        bundle=str(tmp_path / "b"), collection=(str(tmp_path / "m"),), write_models=str(tmp_path / "new")
    )
    project.run(config)
    for owner in ("ann", "bob"):
        old, new = (safetensors.read(tmp_path / f / owner / "m0.safetensors")["w"] for f in ("m", "new"))
        assert np.linalg.norm(new - old) < 0.2 * np.linalg.norm(old)


def test_the_base_is_set_beside_the_reconstruction(tmp_path, capsys):
    folder = weights(tmp_path / "m")
    jaxsub.fit(folder, tmp_path / "b", rank=2, layers=["w"])
    base = safetensors.read(tmp_path / "m" / "m0.safetensors")
    safetensors.write(tmp_path / "base.safetensors", base)
    config = project.Config(bundle=str(tmp_path / "b"), collection=(folder,), base=str(tmp_path / "base.safetensors"))
    found = project.run(config)
    (layer,) = found["layers"]
    x = np.stack([safetensors.read(tmp_path / "m" / f"m{n}.safetensors")["w"] for n in range(9)]).astype(np.float64)
    wanted = np.linalg.norm((x - x[0]).reshape(9, -1), axis=1) / np.linalg.norm(x.reshape(9, -1), axis=1)
    np.testing.assert_allclose(layer["error_of_base"], wanted, rtol=1e-6)
    table = project.table(found)
    assert "base" in table.splitlines()[0] and max(map(len, table.splitlines())) <= 100
    safetensors.write(tmp_path / "base.safetensors", {"w": np.zeros((3, 3), np.float32)})
    with pytest.raises(errors.InputError, match="the base has shape"):
        project.run(config)


# What a bundle keeps of its members -------------------------------------------------------------------------------


@pytest.mark.parametrize("narrow", first([{}, {"basis_dtype": "int8", "coefficient_dtype": "int8"}]))
@pytest.mark.parametrize("bound", first([0.0, 0.1]))
def test_members_come_back_within_the_bound_of_the_fit_and_strangers_as_projected(tmp_path, bound, narrow):
    folder = weights(tmp_path / "m", count=9)
    jaxsub.fit(folder, tmp_path / "b", rank=1, layers=["w"], max_error=bound, **narrow)
    tensors = safetensors.read(tmp_path / "m" / "m3.safetensors")
    safetensors.write(
        tmp_path / "m" / "m3.safetensors", tensors | {"w": np.roll(tensors["w"], 1, 0)}, None
    )  # another now
    safetensors.write(tmp_path / "m" / "new.safetensors", tensors, None)
    found = project.run(project.Config(str(tmp_path / "b"), (folder,), write_models=str(tmp_path / "out")))
    (layer,) = found["layers"]
    assert set(layer["kept"]) <= {f"m{n}" for n in range(9)} - {"m3"} and len(layer["kept"]) > 5
    assert "of the bundle with what it keeps of them" in project.table(found)
    for name, stated in zip(layer["models"], layer["error"], strict=True):
        x, again = (
            safetensors.read(tmp_path / place / f"{name}.safetensors")["w"].astype(np.float64) for place in ("m", "out")
        )
        error = np.linalg.norm(again - x) / np.linalg.norm(x)
        assert stated == pytest.approx(error, rel=1e-4, abs=1e-7)
        assert error <= bound or name in ("m3", "new")
    assert layer["error"][layer["models"].index("m3")] > 0.1


def test_updates_come_back_by_the_factors_that_a_bundle_keeps_and_each_with_its_own_rank(tmp_path):
    rng = np.random.default_rng(0)
    ranks = {f"a{n}": 2 for n in range(6)} | {"a6": 5}
    for name, rank in ranks.items():
        a, b = (rng.standard_normal(s).astype(np.float32) for s in ((rank, 12), (14, rank)))
        peft.write(tmp_path / "m" / name, {"m.q": (a, b, 2.0 * rank, rank)})
    jaxsub.fit(str(tmp_path / "m"), tmp_path / "b", rank=3, max_error=0.0)
    jaxsub.fit(str(tmp_path / "m"), tmp_path / "free", rank=3)
    before = products_of(str(tmp_path / "m"))
    for bundle, is_kept in (("b", True), ("free", False)):
        out = tmp_path / f"out_{bundle}"
        found = project.run(project.Config(str(tmp_path / bundle), (str(tmp_path / "m"),), write_models=str(out)))
        after = products_of(str(out))
        assert (max(found["layers"][0]["error"]) == 0) == is_kept
        for name, rank in ranks.items():
            assert json.loads((out / name / peft.CONFIG).read_text())["r"] == (rank if is_kept else min(rank, 3))
            close = np.allclose(after[name], before[name], rtol=0, atol=1e-6 * np.abs(before[name]).max())
            assert close == is_kept


@pytest.mark.slow
@pytest.mark.parametrize("transposed", first([True, False]))
def test_a_bundle_of_factors_takes_and_rebuilds_adapters_by_their_factors(tmp_path, transposed):
    folder, _ = adapters(tmp_path / "m", transposed=transposed, count=6)
    jaxsub.fit(folder, tmp_path / "b", view="lora_factors", energy=1.0)
    out = str(tmp_path / "out")
    found = project.run(project.Config(str(tmp_path / "b"), (folder,), write_models=out))
    assert [one["name"] for one in found["layers"]] == ["m.q.lora_A", "m.q.lora_B"]
    assert max(max(one["error"]) for one in found["layers"]) < 1e-5
    before, after = products_of(folder), products_of(out)
    for name in before:
        np.testing.assert_allclose(after[name], before[name], atol=1e-4)
    with pytest.raises(errors.ConfigError, match="A and B apart"):
        project.run(project.Config(str(tmp_path / "b"), members=True, write_models=str(tmp_path / "no")))


def test_layouts_of_the_other_kind_say_what_they_are_written_with(tmp_path):
    for given, layout in (({"members": True}, "exact"), ({"collection": ("c",)}, "tinylora")):
        config = project.Config("b", write_models=str(tmp_path / "o"), peft_layout=layout, **given)
        with pytest.raises(errors.ConfigError, match=f"peft_layout={layout} is written with --"):
            project.run(config)


def test_long_names_of_layers_are_told_apart_in_the_table():
    layers = [f"model.layers.{n}.self_attn.q_proj.weight.of.a.long.name" for n in range(3)]
    one = {"shape": [2, 2], "rank": [1], "models": ["a"], "kept": [], "error": [0.1]}
    one |= {"error_of_mean": [0.1], "error_of_random": [0.1]}
    rows = project.table({"layers": [{"name": name, **one} for name in layers]}).splitlines()[1:4]
    assert len({row[:21] for row in rows}) == 3 and all(len(row) <= 100 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("layout", first(["portable", "tinylora", "tinylora_shared"]))
def test_saved_modules_with_a_subspace_are_written_beside_the_updates_of_members(tmp_path, layout):
    folder, _ = adapters(tmp_path / "m", count=6)
    rng, name = np.random.default_rng(0), "base_model.model.head.weight"
    for n in range(6):
        file = tmp_path / "m" / f"a{n}" / "adapter_model.safetensors"
        head = rng.standard_normal((5, 4)).astype(np.float16)
        safetensors.write(str(file), safetensors.read(str(file)) | {name: head}, None)
    jaxsub.fit(folder, tmp_path / "b", rank=3, max_error=0.0 if layout == "portable" else -1.0)
    out, bundle = tmp_path / "out", jaxsub.load(tmp_path / "b")
    found = project.run(project.Config(str(tmp_path / "b"), members=True, write_models=str(out), peft_layout=layout))
    again = bundle.reconstruct(bundle.coefficients())["head.weight"]
    for n, one in enumerate(found["written"]):
        (other,) = safetensors.read(one["other_tensors"]).items()
        assert other[0] == name and other[1].dtype == np.float16
        np.testing.assert_array_equal(other[1], again[n].astype(np.float16))
        if layout == "portable":
            np.testing.assert_array_equal(
                other[1], safetensors.read(str(tmp_path / "m" / f"a{n}" / "adapter_model.safetensors"))[name]
            )


def test_another_model_of_tiny_weights_by_the_name_of_a_member_is_projected(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "m").mkdir()
    for n in range(6):
        safetensors.write(str(tmp_path / "m" / f"m{n}.safetensors"), {"w": 1e-170 * rng.standard_normal((6, 5))})
    jaxsub.fit(str(tmp_path / "m"), tmp_path / "b", rank=1, max_error=0.0)
    other = {"w": 1e-170 * rng.standard_normal((6, 5))}
    safetensors.write(str(tmp_path / "m" / "m3.safetensors"), other)
    found = project.run(project.Config(str(tmp_path / "b"), (str(tmp_path / "m"),), write_models=str(tmp_path / "o")))
    (layer,) = found["layers"]
    again = 1e170 * safetensors.read(str(tmp_path / "o" / "m3.safetensors"))["w"]
    error = np.linalg.norm(again - 1e170 * other["w"]) / np.linalg.norm(1e170 * other["w"])
    assert "m3" not in layer["kept"] and layer["error"][3] == pytest.approx(error, rel=1e-6) and error > 0.1
    assert max(layer["error"][n] for n in (0, 1, 2, 4, 5)) == 0
