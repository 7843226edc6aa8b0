"""What is changed under a run, before it goes on, or after it: inputs, options, results, links, permissions."""

import dataclasses
import os
import stat

import numpy as np
import pytest

import jaxsub
from jaxsub import errors
from jaxsub.formats import _files
from jaxsub.pipelines import analyze, aside, fit, layers, verify, workdir
from tests.bundle.test_bundle import damages
from tests.figures_log import record
from tests.folders import contents
from tests.formats.test_input_files import append, overwrite, remove, replace, shorten, touch
from tests.programs.test_disk_faults import Analysis, Fit
from tests.programs.test_resume import QUICK, dense, report_of
from tests.selected import first

CHANGES = [replace, overwrite, append, touch, shorten, remove]


# Inputs that change under a run


class Opens:
    """Does something to a file before the n-th time that an input of an open collection is opened, or while it is."""

    def __init__(self, patch, at=0, change=None, path=None, within=False):
        self.count, self.at, self.change, self.path, self.within = 0, at, change, path, within
        opened, fill, collected, self.is_on = _files._opened, _files._fill, aside.open_collection, False

        def collect(*arguments, **options):
            found = collected(*arguments, **options)
            self.is_on = True
            return found

        def counted(path):
            if self.is_on and os.fspath(path).startswith(os.fspath(self.path.parent)):
                self.count += 1
                if self.count == self.at and not self.within:
                    self.change(self.path)
            return opened(path)

        def filled(fd, position, view, file, *rest):
            fill(fd, position, view, file, *rest)
            if self.count == self.at and self.within and file.path == os.fspath(self.path):
                self.at = 0
                self.change(self.path)

        patch.setattr(aside, "open_collection", collect)
        patch.setattr(_files, "_opened", counted)
        patch.setattr(_files, "_fill", filled)


def changed(program, folder, monkeypatch, change, points):
    """How many of `points` instants were refused; none gives another result than the models as they were."""
    models = folder / "c"
    dense(models)
    path = models / "m004.safetensors"
    with monkeypatch.context() as patch:
        opens = Opens(patch, path=path)
        program(str(models)).run(folder / "whole")
    wanted, total, refused, data = program(str(models)).result(folder / "whole"), opens.count, 0, path.read_bytes()
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    for number, at in enumerate(np.linspace(1, total, points).astype(int)):
        root = folder / f"out{number}"
        with monkeypatch.context() as patch:
            Opens(patch, int(at), change, path, within=number % 2 == 1)
            try:
                program(str(models)).run(root)
            except errors.InputError as error:
                assert "m004.safetensors" in str(error)
                refused += 1
                assert not (root / "report.json").exists() and not (root / "bundle").exists()
        is_there = root.exists()
        if is_there:
            program(str(models)).check(root, wanted)
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        os.utime(path, ns=times)
        made = program(str(models))
        made.config = dataclasses.replace(made.config, restart=True)  # it is another file, with the same bytes
        made.run(root)
        assert made.result(root) == wanted
    return refused


@pytest.mark.parametrize(
    ("program", "change"), [pytest.param(Analysis, replace, marks=pytest.mark.slow), (Fit, overwrite)]
)
def test_an_input_that_changes_ends_the_run_or_comes_too_late(tmp_path, quick, monkeypatch, program, change):
    assert changed(program, tmp_path, monkeypatch, change, 5) >= 1  # later it is not read


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("program", [Analysis, Fit])
def test_every_change_of_an_input_at_any_instant(tmp_path, quick, monkeypatch, program, change):
    refused = changed(program, tmp_path, monkeypatch, change, 15)
    record("TOCTOU", f"{program.__name__.lower()}, {change.__name__}: refused of 15", refused)
    assert refused >= 5


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("program", [Analysis, Fit])
def test_every_change_of_an_input_at_five_points_of_a_real_run(tmp_path, monkeypatch, program, change):
    assert changed(program, tmp_path, monkeypatch, change, 5) >= 2


# What must be the same for a run to go on


def values(config):
    """Another value of every option that is part of what a run is."""
    other = {
        "collection": lambda v: (*v, *v), "layers": lambda _: ("a",), "exclude_layers": lambda _: ("c",),
        "allow_roots": lambda _: ("/",), "nulls": lambda _: ("permutation",), "view": lambda _: "lora_factors",
        "match": lambda _: "order", "preflight": lambda _: "full", "precision": lambda _: "float64",
        "decomposition": lambda _: "randomized", "energy": lambda _: 0.5, "lineage_threshold": lambda _: 0.3,
        "max_error": lambda _: 0.4, "basis_dtype": lambda _: "bfloat16", "coefficient_dtype": lambda _: "int8",
        "budget_bytes": lambda _: 10**6, "base": lambda _: "elsewhere",
    }  # fmt: skip
    for field in dataclasses.fields(config):
        if field.name not in workdir.NEUTRAL:
            value = getattr(config, field.name)
            yield field.name, other.get(field.name, lambda v: v + 1)(value)


@pytest.mark.parametrize(("program", "name"), [(Analysis, "analyze"), (Fit, "fit")])
def test_each_option_that_changes_is_named(tmp_path, quick, program, name):
    made = program(dense(tmp_path / "c"))
    made.run(tmp_path / "out")
    before, opened = contents(tmp_path / "out"), jaxsub.open_collection(str(tmp_path / "c"))
    seen = 0
    for option, value in values(made.config):
        identity = workdir.identity(name, dataclasses.replace(made.config, **{option: value}), opened, None, Mesh())
        if program is Fit:
            identity = {k: v for k, v in identity.items() if k not in ("devices", "processes")}
        with pytest.raises(errors.WorkdirError, match=rf"belongs to a different run \(config\.{option} was .*, is "):
            with workdir.hold(str(tmp_path / "out"), identity):
                pytest.fail("it went on")
        seen += 1
    assert contents(tmp_path / "out") == before
    record("RESUME", f"{name}: options refused", seen)


class Mesh:
    """As many devices as an analysis has in the tests."""

    size = 8


ENVIRONMENT = (
    "version.jaxlib", "version.numpy", "platform", "device_kind", "random_numbers", "jaxsub_version", "devices",
)  # fmt: skip


@pytest.mark.parametrize("program", [Analysis, Fit])
@pytest.mark.parametrize("item", first(["version.jax", *ENVIRONMENT]))
def test_another_version_or_machine_is_named(tmp_path, quick, monkeypatch, program, item):
    made, known = program(dense(tmp_path / "c")), workdir.machine()
    made.run(tmp_path / "out")
    if item == "jaxsub_version":
        monkeypatch.setattr(jaxsub, "__version__", "0.0.0")
    elif item == "devices":
        if program is Fit:
            return  # one device a layer
        made.config = dataclasses.replace(made.config, devices=4)
        item = "config.devices was 0, is 4; devices"
    else:
        monkeypatch.setattr(workdir, "machine", lambda: {**known, item: "another"})
    with pytest.raises(errors.WorkdirError, match=rf"{item} was .*, is "):
        made.run(tmp_path / "out")
    made.config = dataclasses.replace(made.config, restart=True)
    calls = []
    with monkeypatch.context() as patch:
        real = layers.statistics
        patch.setattr(layers, "statistics", lambda *a, **o: calls.append(1) or real(*a, **o))
        made.run(tmp_path / "out")
    assert program is Fit or len(calls) == 3  # nothing of the other machine is used again


# Results that are damaged


@pytest.mark.slow
def test_verify_finds_every_damage_of_a_workdir_and_no_run_takes_it(tmp_path, quick):
    made = Analysis(dense(tmp_path / "c"))
    made.run(tmp_path / "out")
    wanted, whole = made.result(tmp_path / "out"), contents(tmp_path / "out")
    verify.run(verify.Config(), str(tmp_path / "out"), write=lambda _: None)
    done = again = 0
    for name, damage in damages(tmp_path / "out"):
        if name.startswith(".jaxsub.lock") or name in ("swapped", "stranger"):
            continue
        damage(tmp_path / "out")
        if contents(tmp_path / "out") == whole:  # a tail that was zero before
            continue
        with pytest.raises(errors.InputError):
            verify.run(verify.Config(bundle=str(tmp_path / "out")), write=lambda _: None)
        done += 1
        if done % 4 == 0:
            again += 1
            try:
                made.run(tmp_path / "out")
            except errors.WorkdirError as error:
                assert name.startswith("run.json") and "run.json is damaged" in str(error)
            else:
                assert made.result(tmp_path / "out") == wanted, name
        restored(tmp_path / "out", whole)
    record("MUTATE", "analyze: damages found", done)
    assert done > 90 and again > 20


def restored(root, whole):
    for name in contents(root).keys() - whole.keys():
        os.unlink(root / name)
    for name, data in whole.items():
        (root / name).write_bytes(data)


@pytest.mark.slow
def test_no_damage_of_a_fit_is_taken(tmp_path, quick):
    made = Fit(dense(tmp_path / "c"))
    made.run(tmp_path / "out")
    wanted, whole = made.result(tmp_path / "out"), contents(tmp_path / "out")
    verify.run(verify.Config(), str(tmp_path / "out"), write=lambda _: None)
    done = 0
    for name, damage in damages(tmp_path / "out"):
        if name.startswith(".jaxsub.lock") or name in ("swapped", "stranger"):
            continue
        damage(tmp_path / "out")
        if contents(tmp_path / "out") == whole:
            continue
        said = []
        with pytest.raises(errors.InputError):
            verify.run(verify.Config(), str(tmp_path / "out"), write=said.append)
        if name.startswith("bundle"):
            with pytest.raises(errors.InputError):  # what project and update load
                jaxsub.load(tmp_path / "out" / "bundle")
        if not name.startswith("run.json deleted"):
            with pytest.raises(errors.WorkdirError):
                made.run(tmp_path / "out")
        done += 1
        restored(tmp_path / "out", whole)
    assert made.result(tmp_path / "out") == wanted
    record("MUTATE", "fit: damages found", done)
    assert done > 60


def test_a_folder_that_is_no_result_is_no_result(tmp_path):
    for place in (None, tmp_path):
        with pytest.raises((errors.InputError, errors.ConfigError)):
            verify.run(verify.Config(), place, write=lambda _: None)


# Permissions and links


@pytest.mark.parametrize("umask", first([0o027, 0o022, 0o077]))
def test_modes_follow_the_umask(tmp_path, quick, umask):
    models = dense(tmp_path / "c")
    before = os.umask(umask)
    try:
        for program in (Analysis, Fit):
            program(models).run(tmp_path / "out" / program.__name__)
    finally:
        os.umask(before)
    found = list((tmp_path / "out").rglob("*"))
    assert len(found) > 15
    for path in found:
        assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~umask, path
    record("PERM", f"umask {umask:03o}: files and folders looked at", len(found))


LINKS = ("report.json", "report.html", "log.txt", "quarantine.json", "files.json")


@pytest.mark.parametrize("name", [*LINKS, "run.json"])
def test_a_link_in_place_of_a_result_is_replaced_not_followed(tmp_path, quick, name):
    target, out = tmp_path / "precious", tmp_path / "out"
    target.write_bytes(b"precious")
    out.mkdir()
    (out / name).symlink_to(target)
    made = Analysis(dense(tmp_path / "c"))
    if name == "run.json":
        with pytest.raises(errors.WorkdirError, match="damaged"):
            made.run(out)
        made.config = dataclasses.replace(made.config, restart=True)
    made.run(out)
    assert target.read_bytes() == b"precious" and not (out / name).is_symlink()


@pytest.mark.parametrize("name", ["statistics", "parts", "bundle", "profile", ".jaxsub.lock"])
@pytest.mark.parametrize("program", [Analysis, Fit])
def test_a_link_in_place_of_a_folder_is_refused(tmp_path, quick, program, name):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).symlink_to(tmp_path / "elsewhere")
    made = program(dense(tmp_path / "c"))
    with pytest.raises(errors.WorkdirError, match="is a link|cannot be used"):
        made.run(tmp_path / "out")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_links_under_names_of_unfinished_writes_are_removed_not_followed(tmp_path, quick):
    elsewhere, out = tmp_path / "elsewhere", tmp_path / "out"
    for place in (elsewhere, out / "parts", out / "statistics"):
        place.mkdir(parents=True)
    (elsewhere / "kept").write_bytes(b"kept")
    dead = ".tmp-999999999-0123456789ab"
    for place in (out, out / "parts", out / "statistics"):
        (place / dead).symlink_to(elsewhere)
    made = Fit(dense(tmp_path / "c"))
    made.run(out)
    assert not list(out.rglob(".tmp-*")) and contents(elsewhere) == {"kept": b"kept"}


def test_a_damaged_part_that_is_a_link_is_fitted_again_and_not_followed(tmp_path, quick, monkeypatch):
    made, out, real = Fit(dense(tmp_path / "c")), tmp_path / "out", os.rename
    with monkeypatch.context() as patch:
        patch.setattr(fit.parts, "commit", lambda *_: stopped())
        with pytest.raises(KeyboardInterrupt):
            made.run(out)
    part = sorted((out / "parts").iterdir())[0]
    real(part, tmp_path / "elsewhere")
    part.symlink_to(tmp_path / "elsewhere")
    os.truncate(tmp_path / "elsewhere" / "coefficients.safetensors", 100)
    before = contents(tmp_path / "elsewhere")
    made.run(out)
    assert contents(tmp_path / "elsewhere") == before and not (out / "parts").exists()


def stopped():
    raise KeyboardInterrupt


def test_readers_do_not_see_unfinished_writes(tmp_path, quick):
    """In a collection, in a bundle's place, in a workdir."""
    models = dense(tmp_path / "c")
    dead = tmp_path / "c" / ".tmp-999999999-0123456789ab"
    dead.mkdir()
    (dead / "model.safetensors").write_bytes((tmp_path / "c" / "m000.safetensors").read_bytes()[:100])
    assert len(jaxsub.open_collection(models).refs) == 9
    report = analyze.run(analyze.Config(collection=(models,), **QUICK), str(tmp_path / "out"))
    (tmp_path / "out" / "statistics" / dead.name).write_bytes(b"half")
    verify.run(verify.Config(), str(tmp_path / "out"), write=lambda _: None)
    assert report["collection"]["num_models"] == report_of(tmp_path / "out")["collection"]["num_models"] == 9
