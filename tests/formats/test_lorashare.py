"""Folders of lorashare: every adapter comes back as lorashare rebuilds it, with PEFT's scale."""

import json
import os

import numpy as np
import pytest

import jaxsub
from jaxsub import errors, formats
from jaxsub.formats import peft, safetensors
from tests.formats.lora_files import delta

LAYERS = ("layer.0.query", "layer.1.query")
SIZES = {"A": 7, "B": 9}


def share(path, count=4, *, rank=3, components=5, config=None, change=lambda names: names):
    """A folder as lorashare writes it; returns {adapter: {layer: B A, without scale}}."""
    rng = np.random.default_rng(0)
    shape = {"A": (SIZES["A"], components), "B": (SIZES["B"], components)}
    basis = {f"{layer}:{s}": rng.standard_normal(shape[s], np.float32) for layer in LAYERS for s in "AB"}
    path.mkdir()
    (path / "share_config.json").write_text("{}")
    safetensors.write(path / "shared_components.safetensors", change(dict(basis)))
    fields = {"peft_type": "LORA", "r": rank, "lora_alpha": 12, "target_modules": ["query"]}
    found = {}
    for n in range(count):
        folder = path / "adapters" / f"task{n}"
        folder.mkdir(parents=True)
        loadings = {name: rng.standard_normal((components, rank), np.float32) for name in basis}
        safetensors.write(folder / "loadings.safetensors", change(dict(loadings)))
        config = fields if config is None else config
        (folder / "adapter_meta.json").write_text(json.dumps({"adapter_name": "x", "original_config": config}))
        wide = {name: basis[name].astype(np.float64) @ loadings[name] for name in basis}
        found[f"task{n}"] = {layer: wide[f"{layer}:B"] @ wide[f"{layer}:A"].T for layer in LAYERS}
    return found


def test_a_folder_is_a_collection_of_its_adapters(tmp_path):
    wanted = share(tmp_path / "shared")
    opened = jaxsub.open_collection(str(tmp_path / "shared"))
    assert [r.id for r in opened.refs] == [f"adapters/task{n}" for n in range(4)]
    assert {r.format for r in opened.refs} == {"lorashare"} and not opened.quarantined and not opened.warnings
    for ref, model in zip(opened.refs, opened.models, strict=True):
        for layer in LAYERS:
            np.testing.assert_allclose(delta(model, layer), 12 / 3 * wanted[ref.id[9:]][layer], rtol=1e-5, atol=1e-4)


def test_one_adapter_opens_alone_with_its_head_and_rslora(tmp_path):
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "use_rslora": True}
    wanted = share(tmp_path / "shared", config=config)
    folder = tmp_path / "shared" / "adapters" / "task2"
    head = np.arange(4, dtype=np.float32)
    safetensors.write(folder / "classifier_head.safetensors", {"base_model.model.classifier.bias": head})
    model = formats.open_model(folder)
    np.testing.assert_allclose(delta(model, LAYERS[0]), 6 / 3**0.5 * wanted["task2"][LAYERS[0]], rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(formats.read(model, model.tensors["classifier.bias"]), head)


def test_a_basis_that_changes_is_another_collection_and_is_not_read(tmp_path):
    share(tmp_path / "shared")
    opened = jaxsub.open_collection(str(tmp_path / "shared"))
    basis = tmp_path / "shared" / "shared_components.safetensors"
    before = os.stat(basis)
    os.utime(basis, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert jaxsub.open_collection(str(tmp_path / "shared")).fingerprint != opened.fingerprint
    with pytest.raises(errors.InputChangedError):
        formats.read(opened.models[0], opened.models[0].adapters[LAYERS[0]].a)


def test_models_are_written_as_peft_not_as_lorashare(tmp_path):
    share(tmp_path / "shared")
    with pytest.raises(errors.ConfigError, match="cannot be written"):
        formats.ending(formats.open_model(tmp_path / "shared" / "adapters" / "task0"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"config": {}}, "the scale is unknown"),
        ({"config": {"peft_type": "LORA", "r": 4, "lora_alpha": 1}}, "the tensors have 3"),
        ({"config": {"peft_type": "LORA", "r": 3, "lora_alpha": 1, "use_dora": True}}, "use_dora"),
        ({"change": lambda t: {k: v for k, v in t.items() if k != "layer.0.query:A"}}, "no lora_A"),
        ({"change": lambda t: {k: v[:4] if len(v) == 5 else v for k, v in t.items()}}, "do not fit"),
        ({"change": lambda t: {k.replace(":", "."): v for k, v in t.items()}}, "is no <layer>:A"),
    ],
)
def test_what_makes_no_adapter_is_refused(tmp_path, options, words):
    share(tmp_path / "shared", 1, **options)
    with pytest.raises(errors.InputError, match=words) as caught:
        formats.open_model(tmp_path / "shared" / "adapters" / "task0")
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("name", ["shared_components.safetensors", "adapters/task0/adapter_meta.json"])
def test_missing_files_are_named(tmp_path, name):
    share(tmp_path / "shared", 1)
    os.remove(tmp_path / "shared" / name)
    with pytest.raises(errors.InputError, match="is not there") as caught:
        formats.open_model(tmp_path / "shared" / "adapters" / "task0")
    assert os.path.basename(name) in str(caught.value)


def test_loadings_without_partner_in_the_basis_are_refused(tmp_path):
    share(tmp_path / "shared", 1)
    basis = safetensors.read(tmp_path / "shared" / "shared_components.safetensors")
    safetensors.write(tmp_path / "shared" / "shared_components.safetensors", {"other:A": basis["layer.0.query:A"]})
    with pytest.raises(errors.InputError, match="is not in shared_components"):
        formats.open_model(tmp_path / "shared" / "adapters" / "task0")


@pytest.mark.slow
def test_it_is_what_lorashare_rebuilds(tmp_path):
    lorashare = pytest.importorskip("lorashare")
    rng = np.random.default_rng(1)
    for n in range(5):
        pairs = {
            layer: (rng.standard_normal((4, 24), np.float32), rng.standard_normal((16, 4), np.float32), 8, 4)
            for layer in LAYERS
        }
        peft.write(tmp_path / f"t{n}", pairs, base_model="base")
    made = lorashare.SHAREModel.from_adapters([str(tmp_path / f"t{n}") for n in range(5)], num_components=6)
    made.save_pretrained(str(tmp_path / "shared"))
    made.reconstruct("t3", output_dir=str(tmp_path / "rebuilt"))
    ours = formats.open_model(tmp_path / "shared" / "adapters" / "t3")
    theirs = formats.open_model(tmp_path / "rebuilt")
    for layer in LAYERS:
        np.testing.assert_allclose(delta(ours, layer), delta(theirs, layer), atol=1e-5)


def test_a_packed_head_is_refused_when_it_is_read(tmp_path):
    """Four bits an entry have no array type: an error that names the file, not a crash."""
    share(tmp_path / "shared", 1)
    path = tmp_path / "shared" / "adapters" / "task0" / "classifier_head.safetensors"
    entry = {"base_model.model.score.weight": {"dtype": "F4", "shape": [2, 4], "data_offsets": [0, 4]}}
    header = json.dumps(entry).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    model = formats.open_model(path.parent)
    with pytest.raises(errors.InputError, match="under 8 bits"):
        formats.read(model, model.tensors["score.weight"])
