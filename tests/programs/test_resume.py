"""Runs that stop between layers and go on: at most one layer is done again, the result is the same to the bit."""

import json
import os

import numpy as np
import pytest

import jaxsub
from jaxsub import errors
from jaxsub.bundle import files
from jaxsub.formats import peft, safetensors
from jaxsub.pipelines import fit, fit_layer, layers
from tests.folders import contents
from tests.programs import worlds

QUICK = dict(draws=2, splits=2, nulls=("gaussian",))


class Killed(BaseException):
    """Nothing catches it, as nothing catches a kill."""


@pytest.fixture
def killed(monkeypatch):
    """killed(function, n, run) runs `run` until the layer function has done n layers; gives how many it had begun."""

    def stop(module, name, allowed, run):
        real, calls = getattr(module, name), []

        def counted(*arguments, **options):
            calls.append(arguments[0].name)
            if len(calls) > allowed:
                raise Killed
            return real(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(module, name, counted)
            if allowed < 10**6:
                with pytest.raises(Killed):
                    run()
                return calls, None
            return calls, run()

    return stop


EVERY = 10**6


def report_of(folder):
    """report.json without what differs from run to run."""
    with open(os.path.join(folder, "report.json"), encoding="utf-8") as file:
        return {k: v for k, v in json.load(file).items() if k != "provenance"}


def adapters(folder, count=6, modules=("k", "q", "v")):
    rng = np.random.default_rng(1)
    for n in range(count):
        pairs = {m: (rng.standard_normal((2, 7)), rng.standard_normal((9, 2)), 4.0, 2) for m in modules}
        peft.write(folder / f"a{n}", {m: (a.astype("f4"), b.astype("f4"), s, r) for m, (a, b, s, r) in pairs.items()})
    return str(folder)


def dense(folder, count=9):
    return str(worlds.write(folder, {n: worlds.planted(count, (12, 9), seed=i) for i, n in enumerate("abc")}))


# analyze


@pytest.mark.slow
@pytest.mark.parametrize("make", [dense, adapters])
def test_an_analysis_goes_on_where_it_was_stopped(tmp_path, killed, make):
    folder = make(tmp_path / "c")

    def run(place):
        return lambda: jaxsub.analyze(folder, str(tmp_path / place), **QUICK)

    run("whole")()
    assert len(killed(layers, "statistics", 2, run("out"))[0]) == 3
    (tmp_path / "out" / "statistics" / ".tmp-999999999-0123456789ab").write_bytes(b"half")
    again, _ = killed(layers, "statistics", EVERY, run("out"))
    assert len(again) == 1
    assert contents(tmp_path / "out" / "statistics") == contents(tmp_path / "whole" / "statistics")
    assert report_of(tmp_path / "out") == report_of(tmp_path / "whole")


def test_a_model_found_faulty_before_the_stop_is_not_read_again(tmp_path, killed, quick):
    stacks = {n: worlds.planted(12, (12, 9), seed=i) for i, n in enumerate("abc")}
    stacks["b"][4, 3, 3] = np.nan
    folder = str(worlds.write(tmp_path / "c", stacks))

    def run(place, **options):
        return lambda: jaxsub.analyze(folder, str(tmp_path / place), **(QUICK | options))

    run("whole")()
    assert killed(layers, "statistics", 4, run("out"))[0] == ["a", "b", "b", "c", "a"]
    again, report = killed(layers, "statistics", EVERY, run("out"))
    assert again == ["a"] and report["collection"]["quarantined"][0]["layer"] == "b"
    assert report_of(tmp_path / "out") == report_of(tmp_path / "whole")
    assert contents(tmp_path / "out" / "statistics") == contents(tmp_path / "whole" / "statistics")
    alone = run("out", layers=("a",), restart=True)()  # in this layer the model is sound
    assert alone["collection"]["num_models"] == 12
    with pytest.raises(errors.InputError, match="1 of 12 models set aside"):
        run("whole", strict=True)()


def test_what_changed_between_two_runs_is_named(tmp_path, quick):
    folder, out = dense(tmp_path / "c"), str(tmp_path / "out")
    kept = os.path.join(folder, "m003.safetensors")

    def refused(words, **options):
        with pytest.raises(errors.WorkdirError, match=words):
            jaxsub.analyze(folder, out, **(QUICK | options))

    jaxsub.analyze(folder, out, **QUICK)
    refused("config.draws was 2, is 3; config.seed was 0, is 7", draws=3, seed=7)
    size = os.path.getsize(kept)
    safetensors.write(kept, {n: worlds.noise(1, (12, 9), seed=50)[0] for n in "abc"})
    assert os.path.getsize(kept) == size
    refused("model m003 changed")
    os.rename(kept, os.path.join(folder, "n.safetensors"))
    refused("model m003 is gone; model n is new")
    with open(os.path.join(out, "run.json"), "r+b") as file:
        file.truncate(20)
    refused("run.json is damaged")
    assert jaxsub.analyze(folder, out, restart=True, **QUICK)["provenance"]["bytes_read"]
    assert not jaxsub.analyze(folder, out, **QUICK)["provenance"]["bytes_read"]


def test_a_changed_base_is_named(tmp_path, quick):
    folder, out, base = dense(tmp_path / "c"), str(tmp_path / "out"), str(tmp_path / "base.safetensors")
    for value, words in ((1.0, None), (2.0, "the base changed")):
        safetensors.write(base, {n: np.full((12, 9), value, np.float32) for n in "abc"})
        if words is None:
            jaxsub.analyze(folder, out, base=base, **QUICK)
        else:
            with pytest.raises(errors.WorkdirError, match=words):
                jaxsub.analyze(folder, out, base=base, **QUICK)


def test_statistics_with_a_changed_number_are_read_again(tmp_path, quick):
    folder, out = dense(tmp_path / "c"), tmp_path / "out"
    first = jaxsub.analyze(folder, str(out), **QUICK)
    path = sorted((out / "statistics").iterdir())[0]
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    again = jaxsub.analyze(folder, str(out), **QUICK)
    assert again.layers == first.layers and again["provenance"]["bytes_read"] == 9 * 12 * 9 * 4


# fit

REAL = [
    (dense, {"rank": 2}, 1),
    (dense, {"rank": 2, "max_error": 0.2, "coefficient_dtype": "int8", "basis_dtype": "bfloat16"}, 1),
    (dense, {"budget_bytes": 14_000}, 4),
    (dense, {"decomposition": "hosvd", "energy": 0.8, "layers": ("a", "b")}, 1),
    (adapters, {"rank": 3}, 1),
    (adapters, {"rank": 1, "max_error": 0.1, "basis_dtype": "int8"}, 2),
]


@pytest.mark.parametrize("options, stop", [({"rank": 2}, 1), ({"budget_bytes": 14_000}, 4)])
def test_a_fit_goes_on_where_it_was_stopped(tmp_path, killed, quick, options, stop):
    stopped_and_whole(tmp_path, killed, dense, options, stop)


@pytest.mark.slow
@pytest.mark.parametrize("make, options, stop", REAL)
def test_every_kind_of_layer_comes_back_from_its_part_to_the_bit(tmp_path, killed, make, options, stop):
    stopped_and_whole(tmp_path, killed, make, options, stop)


def stopped_and_whole(tmp_path, killed, make, options, stop):
    """A fit that is stopped when `stop` layers are done, and begun again, gives the bundle of one in one piece."""
    config = fit.Config(collection=(make(tmp_path / "c"),), **options)

    def run(place):
        return lambda: fit.run(config, workdir=str(tmp_path / place))

    every, whole = killed(fit_layer, "fit", EVERY, run("whole"))
    killed(fit_layer, "fit", stop, run("out"))
    for place in (tmp_path / "out", tmp_path / "out" / "parts"):
        os.makedirs(place / ".tmp-999999999-0123456789ab" / "layers")
    again, result = killed(fit_layer, "fit", EVERY, run("out"))
    assert again == every[stop:]
    assert sorted(os.listdir(tmp_path / "out")) == [".jaxsub.lock", "bundle", "run.json"]
    assert contents(tmp_path / "out" / "bundle") == contents(tmp_path / "whole" / "bundle")
    assert result.accounting() == whole.accounting() == files.load(str(tmp_path / "out" / "bundle")).accounting()


def test_a_fit_meets_its_own_remains_and_those_of_others(tmp_path, killed, quick):
    folder, out = dense(tmp_path / "c"), tmp_path / "out"
    config = fit.Config(collection=(folder,), rank=2)

    def run(**changes):
        options = {"collection": (folder,), "rank": 2} | changes
        return lambda: fit.run(fit.Config(**options), workdir=str(out))

    killed(fit_layer, "fit", 2, run())
    part = next((out / "parts").iterdir())
    path = part / "layers" / "00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(errors.WorkdirError, match="config.rank was 2, is 1"):
        run(rank=1)()
    assert len(killed(fit_layer, "fit", EVERY, run())[0]) == 2  # the damaged one, and the one that was missing
    first = contents(out / "bundle")
    os.makedirs(out / "parts" / "left")  # killed between the bundle and the end
    assert killed(fit_layer, "fit", EVERY, run())[0] == [] and not (out / "parts").exists()
    with pytest.raises(errors.ConfigError, match="no layer"):
        run(layers=("nothing",), restart=True)()
    run(rank=1, restart=True)()
    assert contents(out / "bundle") != first and not list(out.glob(".tmp-*"))
    run(restart=True)()
    assert contents(out / "bundle") == first
    jaxsub.analyze(folder, str(out), **QUICK)  # another program in the same folder
    run()()
    damaged = out / "bundle" / "coefficients.safetensors"
    data = damaged.read_bytes()
    damaged.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(errors.WorkdirError, match="exists already"):
        run()()
    damaged.write_bytes(data)
    (out / "run.json").unlink()
    jaxsub.fit(folder, tmp_path / "b", rank=1)
    os.rename(tmp_path / "b", out / "other")
    os.rename(out / "bundle", tmp_path / "b")
    os.rename(out / "other", out / "bundle")
    with pytest.raises(errors.WorkdirError, match="exists already"):
        fit.run(config, workdir=str(out))


def test_a_workdir_among_the_models_is_none_of_them(tmp_path, killed, quick):
    folder = dense(tmp_path / "c")
    os.rename(folder, tmp_path / "d")
    os.makedirs(folder)
    os.rename(tmp_path / "d", os.path.join(folder, "models"))  # so that what the run makes are folders beside one

    def run(place, collection):
        return lambda: fit.run(fit.Config(collection=(str(collection),), rank=2), workdir=str(place))

    killed(fit_layer, "fit", 2, run(folder, folder))
    assert killed(fit_layer, "fit", EVERY, run(folder, folder))[0] == ["c"]
    first = killed(fit_layer, "fit", EVERY, run(folder, folder))[1]
    # The same files under other ids are other members.
    killed(fit_layer, "fit", 2, run(tmp_path / "out", folder))
    other = fit.Config(collection=(os.path.join(folder, "models"),), rank=2, restart=True)
    assert fit.run(other, workdir=str(tmp_path / "out")).layers[0].model_ids[0] == "m000"
    assert first.model_ids[0] == "models/m000"


def test_options_that_no_run_could_use_do_not_claim_the_folder(tmp_path, quick):
    folder, out = dense(tmp_path / "c"), str(tmp_path / "out")
    with pytest.raises(errors.ConfigError):
        fit.run(fit.Config(collection=(folder,), rank=99), workdir=out)
    assert fit.run(fit.Config(collection=(folder,), rank=1), workdir=out).layers


def test_a_fit_without_a_model_that_is_not_finite_goes_on_without_it(tmp_path, killed, quick):
    stacks = {n: worlds.planted(12, (12, 9), seed=i) for i, n in enumerate("abc")}
    stacks["b"][4, 3, 3] = np.nan
    config = fit.Config(collection=(str(worlds.write(tmp_path / "c", stacks)),), rank=2)

    def run(place):
        return lambda: fit.run(config, workdir=str(tmp_path / place))

    run("whole")()
    assert killed(fit_layer, "fit", 4, run("out"))[0] == ["a", "b", "a", "b", "c"]
    assert killed(fit_layer, "fit", EVERY, run("out"))[0] == ["b", "c"]  # b until the model is found again
    assert contents(tmp_path / "out" / "bundle") == contents(tmp_path / "whole" / "bundle")
    assert killed(fit_layer, "fit", EVERY, run("out"))[0] == []


def test_the_second_of_two_fits_is_refused(tmp_path, monkeypatch, quick):
    config = fit.Config(collection=(dense(tmp_path / "c"),), rank=2)
    real, seen = fit_layer.fit, []

    def meanwhile(*arguments):
        if not seen:
            seen.append(1)
            with pytest.raises(errors.WorkdirError, match="in use by another run"):
                fit.run(config, workdir=str(tmp_path / "out"))
        return real(*arguments)

    monkeypatch.setattr(fit_layer, "fit", meanwhile)
    assert fit.run(config, workdir=str(tmp_path / "out")).layers


def test_writes_of_living_processes_are_left_alone(tmp_path):
    from jaxsub.formats import _files

    (tmp_path / f".tmp-{os.getppid()}-0123456789ab").write_bytes(b"")
    (tmp_path / ".tmp-zoo-0123456789ab").write_bytes(b"")
    (tmp_path / f".tmp-{os.getpid()}-0123456789ab").mkdir()
    _files.sweep(tmp_path)
    assert len(os.listdir(tmp_path)) == 2
