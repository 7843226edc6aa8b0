"""`jaxsub fit` and `jaxsub verify` as a user runs them."""

import importlib
import os

import numpy as np
import pytest

import jaxsub
from jaxsub import errors, reading
from jaxsub.bundle import Bundle
from jaxsub.cli import flags
from jaxsub.formats import peft, safetensors
from jaxsub.pipelines import fit_layer, verify
from tests.selected import first


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path, rng = tmp_path_factory.mktemp("fit") / "models", np.random.default_rng(3)
    os.makedirs(path)
    basis = rng.standard_normal((2, 12, 9))
    for n in range(8):
        weight = np.tensordot(rng.standard_normal(2), basis, 1).astype(np.float32)
        tensors = {"w": weight, "bias": np.full(9, n, np.float32)}
        safetensors.write(path / f"m{n}.safetensors", tensors)
    return str(path)


def call(name, *arguments):
    """Runs a program in this process, as its command would after parsing."""
    program = importlib.import_module(f"jaxsub.cli.{name}")
    program.main(flags.Flags(name, program.config_class(), [name, *arguments]))


def test_fit_and_verify_from_the_command_line(folder, tmp_path, capsys):
    place = str(tmp_path / "out")
    wanted = (f"--collection={folder}", f"--workdir={place}", "--rank=2", "--exclude_layers=bias")
    call("fit", *wanted)
    lines = capsys.readouterr().out.splitlines()
    assert any("smaller than the files from" in line for line in lines)
    assert max(map(len, lines[:-1])) <= 100 and lines[-1] == f"bundle: {place}/bundle"
    path = os.path.join(place, "bundle")
    assert jaxsub.load(path).layers[0].figures["energy_kept"] == pytest.approx(1.0, abs=1e-6)
    call("fit", *wanted)  # finished: says the same again
    assert capsys.readouterr().out.splitlines() == lines
    with pytest.raises(errors.WorkdirError, match="config.rank was 2, is 1"):
        call("fit", *wanted[:2], "--rank=1", wanted[3])
    call("verify", f"--bundle={path}")
    assert capsys.readouterr().out == "whole: every file is as it was written\n"
    with open(os.path.join(path, "coefficients.safetensors"), "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    with pytest.raises(errors.InputError, match="damaged: 1 file"):
        call("verify", f"--bundle={path}")
    assert "coefficients.safetensors: has another content" in capsys.readouterr().out
    with pytest.raises(errors.ConfigError, match="--workdir"):
        call("fit", f"--collection={folder}")


@pytest.mark.slow
def test_a_bundle_larger_than_its_files_is_said_before_it_is_written(folder, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(Bundle, "save", lambda *_: caplog.records or pytest.fail("written before it was said"))
    jaxsub.fit(folder, tmp_path / "b", rank=6)
    assert "more than the files" in caplog.text
    caplog.clear()
    many = tmp_path / "many"
    os.makedirs(many)
    for n in range(60):
        safetensors.write(many / f"m{n}.safetensors", {"w": np.full((40, 40), n % 7, np.float32)})
    jaxsub.fit(str(many), rank=1)
    assert not caplog.records


def test_a_plan_reads_no_weights_and_writes_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "read_stack", None)
    text = jaxsub.fit(folder, tmp_path / "b", dry_run=True)
    assert "to read" in text and "12x9" in text and not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"rank": 9}, "rank"),
        ({"rank": -1}, "rank of 1 or more"),
        ({"energy": 1.5}, "energy"),
        ({"decomposition": "grm"}, "did you mean 'gram'"),
        ({"decomposition": "col_svd"}, "give --rank"),
        ({"layers": ["nothing"]}, "no layer"),
        ({"view": "difference"}, "a base with it"),
    ],
)
def test_what_no_run_could_do_is_refused_in_words(folder, tmp_path, options, words):
    with pytest.raises(errors.ConfigError, match=words):
        jaxsub.fit(folder, tmp_path / "b", **options)
    assert not os.listdir(tmp_path)


@pytest.mark.slow
def test_a_budget_is_kept_and_spent_where_energy_is(tmp_path):
    rng, models = np.random.default_rng(0), tmp_path / "m"
    os.makedirs(models)
    plane = rng.standard_normal((4, 20, 10))
    for n in range(30):
        planted = np.tensordot(10 * rng.standard_normal(4), plane, 1)
        tensors = {"a": planted, "b": rng.standard_normal((20, 10)), "norm": np.full(3, n)}
        safetensors.write(models / f"m{n}.safetensors", {k: v.astype(np.float32) for k, v in tensors.items()})
    budget = 24_000
    bundle = jaxsub.fit(str(models), tmp_path / "b", budget_bytes=budget, exclude_layers=["norm"])
    size = sum(os.path.getsize(os.path.join(d, n)) for d, _, names in os.walk(tmp_path / "b") for n in names)
    assert 0.8 * budget < size <= budget
    ranks = {layer.name: layer.subspace.rank for layer in bundle.layers}
    assert ranks["a"] == 4 and ranks["b"] >= 1
    with pytest.raises(errors.ConfigError, match="one component a layer take"):
        jaxsub.fit(str(models), budget_bytes=2000)
    with pytest.raises(errors.ConfigError, match="a budget chooses"):
        jaxsub.fit(str(models), budget_bytes=2000, rank=2)


def test_too_little_memory_is_said_before_reading(folder):
    with pytest.raises(errors.ResourceError, match="max_host_bytes"):
        jaxsub.fit(folder, rank=1, max_host_bytes=100)


def test_a_model_that_is_not_finite_is_named(folder, tmp_path):
    models = tmp_path / "m"
    os.makedirs(models)
    for n in range(4):
        weight = np.full((3, 2), np.nan if n == 2 else n, np.float32)
        safetensors.write(models / f"m{n}.safetensors", {"w": weight})
    with pytest.raises(errors.InputError, match="m2.safetensors"):
        jaxsub.fit(str(models), rank=1, strict=True)
    bundle = jaxsub.fit(str(models), rank=1)  # and the run goes on without it
    assert bundle.model_ids == ("m0", "m1", "m3")
    assert [one["id"] for one in bundle.provenance["quarantined"]] == ["m2"]
    (models / "m1.safetensors").unlink()
    with pytest.raises(errors.InputError, match="too few are left"):
        jaxsub.fit(str(models), rank=1)


@pytest.mark.slow
def test_low_rank_updates_are_fitted_by_factor_if_asked(tmp_path):
    rng = np.random.default_rng(0)
    for n in range(5):
        factors = {"q": (rng.standard_normal((2, 6)), rng.standard_normal((5, 2)), 4.0, 2)}
        adapters = {
            k: (a.astype(np.float32), b.astype(np.float32), alpha, r) for k, (a, b, alpha, r) in factors.items()
        }
        peft.write(tmp_path / "m" / f"a{n}", adapters)
    with pytest.raises(errors.ConfigError, match="lora_factors"):
        jaxsub.fit(str(tmp_path / "m"), rank=2, decomposition="gram")
    bundle = jaxsub.fit(str(tmp_path / "m"), rank=2, view="lora_factors", layers=["lora_A"])
    assert [layer.name for layer in bundle.layers] == ["q.lora_A"]
    assert all(len(kept) == 1 for kept in bundle.passthrough.values())  # B, as it was


def test_verify_needs_a_bundle(tmp_path):
    for path, error in (("", errors.ConfigError), (str(tmp_path), errors.InputError)):
        with pytest.raises(error):
            verify.run(verify.Config(bundle=path), write=lambda _: None)


def test_models_that_are_equal_in_a_layer_are_their_mean(tmp_path):
    rng = np.random.default_rng(0)
    frozen = rng.standard_normal((7, 6)).astype(np.float32)
    for n in range(6):
        tensors = {"frozen": frozen, "few": frozen[0, :3], "w": rng.standard_normal((5, 4)).astype(np.float32)}
        safetensors.write(str(tmp_path / f"m{n}.safetensors"), tensors)
    bundle = jaxsub.fit(str(tmp_path), rank=2)
    assert {one.name: one.subspace.rank for one in bundle.layers} == {"few": 0, "frozen": 0, "w": 2}
    again = bundle.reconstruct(bundle.coefficients())["frozen"]
    np.testing.assert_array_equal(again, np.broadcast_to(frozen, (6, 7, 6)))


def test_a_rank_that_no_stack_has_is_refused_before_reading_and_small_layers_take_what_they_can(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for n in range(6):
        tensors = {"scale": np.float32(rng.standard_normal()), "w": rng.standard_normal((5, 4)).astype(np.float32)}
        safetensors.write(str(tmp_path / f"m{n}.safetensors"), {k: np.asarray(v) for k, v in tensors.items()})
    bundle = jaxsub.fit(str(tmp_path), rank=3)
    assert {one.name: one.subspace.rank for one in bundle.layers} == {"scale": 1, "w": 3}
    monkeypatch.setattr(fit_layer, "fit", lambda *_: pytest.fail("read"))
    with pytest.raises(errors.ConfigError, match="rank=6: layer scale has 6 models, which have at most 5 components"):
        jaxsub.fit(str(tmp_path), rank=6)


@pytest.mark.parametrize("decomposition", first(["sthosvd", "hooi", "hosvd"]))
@pytest.mark.parametrize("is_lora", first([False, True]))
def test_a_fit_keeps_the_share_of_the_energy_that_was_asked_for(tmp_path, decomposition, is_lora):
    """A share on every axis would keep less of the whole: of the first stack here under .85."""
    if is_lora and decomposition == "sthosvd":
        pytest.skip("takes no low-rank updates")
    rng, decay = np.random.default_rng(0), 0.8 ** np.arange(16)
    for n in range(8):
        a, b = (rng.standard_normal(s).astype(np.float32) for s in ((16, 20), (24, 16)))
        if is_lora:
            peft.write(str(tmp_path / f"m{n}"), {"q": (decay[:, None].astype(np.float32) * a, b, 16, 16)})
        else:
            safetensors.write(str(tmp_path / f"m{n}.safetensors"), {"w": (b * decay.astype(np.float32)) @ a})
    (layer,) = jaxsub.fit(str(tmp_path), decomposition=decomposition, energy=0.9).layers
    assert 0.9 - 1e-6 <= layer.figures["energy_kept"] < 0.97
