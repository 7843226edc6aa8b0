"""Collections of full checkpoints: fitted, projected, and written again in the format they came in."""

import json
import os

import ml_dtypes
import numpy as np
import pytest

import jaxsub
from jaxsub import formats
from jaxsub.formats import safetensors
from jaxsub.pipelines import project

COUNT = 5


def models():
    """Trees of models that lie in a plane, but for a buffer and a little noise."""
    rng, plane = np.random.default_rng(0), np.random.default_rng(99)
    mean, basis = plane.standard_normal((16, 12)), plane.standard_normal((2, 16, 12))
    for _ in range(COUNT):
        w = mean + np.tensordot(rng.standard_normal(2), basis, 1) + 1e-3 * rng.standard_normal((16, 12))
        half = (w[:4] * 2).astype(ml_dtypes.bfloat16)
        yield {"params": {"w": w.astype(np.float32), "half": half}, "batch_stats": {"mean": rng.standard_normal(3)}}


def as_folder(path, tree):
    os.makedirs(path)
    parts = {"w": tree["params"]["w"], "half": tree["params"]["half"], "inv_freq": tree["batch_stats"]["mean"]}
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    for name, (key, array) in zip(names, parts.items(), strict=True):
        safetensors.write(path / name, {key: array}, {"format": "pt"})
    size = sum(array.nbytes for array in parts.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(zip(parts, names, strict=True))}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text("{}")


def as_msgpack(path, tree):
    serialization = pytest.importorskip("flax.serialization")
    path.with_suffix(".msgpack").write_bytes(serialization.to_bytes(tree))


def as_orbax(path, tree):
    checkpoint = pytest.importorskip("orbax.checkpoint")
    with checkpoint.StandardCheckpointer() as writer:
        writer.save(path, tree)


FORMATS = {
    "folder": (as_folder, lambda path: safetensors.read(path / "model-00003-of-00003.safetensors")["inv_freq"]),
    "msgpack": (as_msgpack, lambda path: flax_tree(path.with_suffix(".msgpack"))["batch_stats"]["mean"]),
    "orbax": (as_orbax, lambda path: formats.open_model(path).load("batch_stats/mean")),
}


def flax_tree(path):
    return pytest.importorskip("flax.serialization").msgpack_restore(path.read_bytes())


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
def test_models_come_back_near_the_originals_in_their_format(tmp_path, form):
    save, buffer = FORMATS[form]
    os.makedirs(tmp_path / "zoo")
    for n, tree in enumerate(models()):
        save(tmp_path / "zoo" / f"m{n}", tree)
    opened = jaxsub.open_collection(tmp_path / "zoo")
    assert len(opened.groups) == 2
    jaxsub.fit(opened, tmp_path / "b", rank=2)
    new = tmp_path / "new"
    config = project.Config(
        bundle=str(tmp_path / "b"), collection=(str(tmp_path / "zoo"),), write_models=str(new), strict=True
    )
    project.run(config)
    again = jaxsub.open_collection(new)
    assert [r.id for r in again.refs] == [r.id for r in opened.refs] == [f"m{n}" for n in range(COUNT)]
    for old, model in zip(opened.models, again.models, strict=True):
        assert (model.format, model.skipped, model.warnings) == (old.format, old.skipped, ())
        assert model.tensors.keys() == old.tensors.keys()
        for name, tensor in old.tensors.items():
            found, wanted = formats.read(model, model.tensors[name]), formats.read(old, tensor)
            assert found.dtype == wanted.dtype
            error = np.linalg.norm(found.astype(float) - wanted.astype(float)) / np.linalg.norm(wanted.astype(float))
            assert 0 < error < (4e-3 if found.dtype == ml_dtypes.bfloat16 else 2e-3), (name, error)
    for n, tree in enumerate(models()):
        np.testing.assert_array_equal(buffer(new / f"m{n}"), tree["batch_stats"]["mean"])


@pytest.mark.slow
def test_transformers_loads_the_reconstructions(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    for n in range(3):
        transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "zoo" / f"m{n}", max_shard_size="8KB")
    jaxsub.fit(str(tmp_path / "zoo"), tmp_path / "b", rank=2)  # of three centred models: exact
    zoo = str(tmp_path / "zoo")
    project.run(project.Config(bundle=str(tmp_path / "b"), collection=(zoo,), write_models=str(tmp_path / "new")))
    for n in range(3):
        before, after = (
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f / f"m{n}", local_files_only=True).eval()
            for f in ("zoo", "new")
        )
        with torch.no_grad():
            logits = [model(torch.arange(8)[None]).logits.numpy() for model in (before, after)]
        np.testing.assert_allclose(logits[1], logits[0], atol=1e-4)
        assert sorted(os.listdir(tmp_path / "new" / f"m{n}")) == sorted(os.listdir(tmp_path / "zoo" / f"m{n}"))
