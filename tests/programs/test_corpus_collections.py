"""Hostile and awkward collections: every case of the corpus, alone and through the whole analysis."""

import json
import os
import re
import tarfile

import numpy as np
import pytest

import jaxsub
from jaxsub import errors
from tests.conftest import shared_folder
from tests.figures_log import record


def corpus():
    folder = shared_folder()
    archive = folder / "tools" / "bad_inputs.tar.gz" if folder else None
    return archive if archive and archive.exists() else None


def cases():
    if corpus() is None:
        return []
    with tarfile.open(corpus()) as tar:
        manifest = json.load(tar.extractfile("bad_inputs/manifest.json"))
    return manifest["cases"]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    with tarfile.open(corpus()) as tar:
        tar.extractall(folder, filter="fully_trusted")
    return folder / "bad_inputs"


COLLECTIONS = [c for c in cases() if c["scope"] == "collection"]
SINGLES = [c for c in cases() if c["scope"] in ("file", "model")]


def run(folder, **options):
    """("accept", report) or ("reject", message)."""
    try:
        return "accept", jaxsub.analyze(str(folder), draws=2, splits=2, **options)
    except errors.InputError as error:
        return "reject", str(error)


@pytest.mark.skipif(not COLLECTIONS, reason="no corpus: set JAXSUB_SHARED")
@pytest.mark.parametrize("case", COLLECTIONS, ids=lambda c: c["id"])
def test_collection_gets_its_verdict(case, unpacked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    verdict, result = run(unpacked / case["entry"])
    text = result
    if verdict == "accept":
        aside = result["collection"]["quarantined"]
        text = json.dumps(aside)
        if aside:
            verdict = "quarantine"
            assert not case.get("bad_models") or {a["id"] for a in aside} == set(case["bad_models"])
        json.dumps(result.data, allow_nan=False)
        html, table = result.html(), result.table()
        assert not re.search(r"[^\x20-\x7e\n]", table)
        assert "<script>alert" not in html and "onerror=" not in re.sub(r"&[^;]+;", "", html.split("<body")[0])
        if case.get("must_warn"):
            warned = result["collection"]["warnings"] + [w for x in result.layers for w in x["warnings"]]
            assert warned, "a warning is due"
        check_values(case, result)
    assert verdict in {case["expect"], *case.get("also_ok", [])}, text
    for name in case["must_name"]:
        assert name in text
    assert sorted(os.listdir(tmp_path)) == []
    record("NUM-2" if case["cls"] == "numerics" else "CORPUS", "verdicts met by jaxsub.analyze", case["id"])


def check_values(case, report):
    """Centred singular values against the manifest's, in units of the last place; duplicates are left out there."""
    expected = (case.get("expected") or {}).get("layers") or {}
    layers = {x["name"]: x for x in report.layers}
    for name, values in expected.items():
        if name not in layers or report["collection"]["duplicates"]:
            continue
        layer = layers[name]
        want = np.array(values["sigma_centred"])
        got = np.array(layer["singular_values"])[: len(want)]
        # The corpus counts in the dtype of the stored weights, 16-bit as float32.
        eps = np.finfo(np.float64 if layer["storage_dtype"] == "float64" else np.float32).eps
        above = got > max(layer["floor"], 0)
        unit = eps * min(layer["num_models"], layer["num_features"]) * max(want[0], 1e-300)
        if layer["storage_dtype"] == "float64":
            # The weights' own rounding: values of 1e-9 among weights of 1 have eight good digits.
            unit = max(unit, eps * values["sigma_uncentred"][0])
        assert (np.abs(got - want[: len(got)])[above] < 30 * unit).all(), name


@pytest.mark.skipif(not SINGLES, reason="no corpus: set JAXSUB_SHARED")
@pytest.mark.parametrize("case", SINGLES, ids=lambda c: c["id"])
def test_bad_model_among_good_ones_is_set_aside(case, unpacked, tmp_path, monkeypatch):
    """Beside six good models of another architecture: named, set aside, and the run goes on."""
    import pathlib
    import shutil

    monkeypatch.chdir(tmp_path)
    lora = case["cls"] == "lora_config"
    collection = tmp_path.parent / f"{tmp_path.name}_c"
    good = unpacked / ("lora_good/adapter" if lora else "num_good")
    if lora:
        for n in range(6):
            shutil.copytree(good, collection / f"good{n}")
            edit(collection / f"good{n}" / "adapter_model.safetensors", n)
    else:
        shutil.copytree(good, collection)
    entry = pathlib.Path(case["entry"])

    root = unpacked / entry.parts[0]
    shutil.copytree(root, collection / "zz_case", symlinks=True, copy_function=copy_any)
    try:
        opened = jaxsub.open_collection(str(collection))
    except errors.InputError as error:
        opened, text = None, str(error)  # more than one bad model in the case's folder
    if opened is not None:
        aside = [dict(q) for q in opened.quarantined]
        text = json.dumps(aside)
        allowed = {case["expect"], *case.get("also_ok", [])}
        if any(r.id.startswith("zz_case") for r in opened.refs):
            assert "accept" in allowed
        elif "shares no layer" not in text:  # a readable model of another architecture is set aside for that
            assert allowed & {"reject", "quarantine"}
    if case["expect"] != "accept" and "accept" not in case.get("also_ok", []):
        assert "zz_case" in text
    record("CORPUS", "verdicts met among good models", case["id"])
    assert sorted(os.listdir(tmp_path)) == []


def copy_any(source, target):
    import shutil
    import stat

    if stat.S_ISFIFO(os.stat(source, follow_symlinks=False).st_mode):
        os.mkfifo(target)
    else:
        shutil.copy2(source, target, follow_symlinks=False)


def edit(path, seed):
    """Makes each copy of the good adapter another one."""
    from jaxsub import formats
    from jaxsub.formats import safetensors

    model = formats.open_model(str(path.parent))
    tensors = {t.name: formats.read(model, t) for p in model.adapters.values() for t in (p.a, p.b)}
    rng = np.random.default_rng(seed)
    noisy = {n: (v + rng.standard_normal(v.shape)).astype(v.dtype) for n, v in tensors.items()}
    safetensors.write(str(path), noisy, {"format": "pt"})
