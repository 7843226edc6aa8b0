"""The corpus of hostile and damaged inputs: every verdict, every value, no side effect. Skipped where it is absent."""

import functools
import hashlib
import json
import os
import pathlib
import tarfile
import time

import numpy as np
import pytest

from jaxsub import errors, formats
from tests.figures_log import record

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
SHARED = pathlib.Path(os.environ.get("JAXSUB_SHARED", REPOSITORY.parent / "shared"))
ARCHIVE = SHARED / "tools" / "bad_inputs.tar.gz"
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
MAX_SECONDS = 5  # of the processor: a loaded machine is no fault of a file


@functools.cache
def cases():
    if not ARCHIVE.is_file():
        return []
    with tarfile.open(ARCHIVE) as archive:
        member = next(m for m in archive.getmembers() if m.name.endswith("manifest.json"))
        manifest = json.load(archive.extractfile(member))
    return [case for case in manifest["cases"] if case["scope"] in ("file", "model")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    target = tmp_path_factory.mktemp("corpus")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(target, filter="fully_trusted")  # it holds a pipe and links, in a temporary folder
    return next(target.rglob("manifest.json")).parent


def require_values(model, expected):
    assert set(model.tensors) == set(expected)
    for name, truth in expected.items():
        array = formats.read(model, model.tensors[name])
        assert (array.dtype.name, list(array.shape)) == (DTYPES[truth["dtype"]], truth["shape"])
        assert hashlib.sha256(array.tobytes()).hexdigest() == truth["sha256"]


def require_deltas(model, expected):
    assert {f"base_model.model.{layer}" for layer in model.adapters} == set(expected)
    for layer, pair in model.adapters.items():
        truth = expected[f"base_model.model.{layer}"]
        a, b = (formats.read(model, tensor).astype(np.float64) for tensor in (pair.a, pair.b))
        delta = pair.scale * b @ a
        assert list(delta.shape) == truth["shape"]
        np.testing.assert_allclose(delta[0], truth["row0"], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(delta), truth["fro"], rtol=1e-4)


@pytest.mark.skipif(not ARCHIVE.is_file(), reason="the corpus is not here")
@pytest.mark.parametrize("case", cases(), ids=lambda case: case["id"])
def test_case(folder, case, monkeypatch):
    monkeypatch.chdir(folder)
    start = time.process_time()
    try:
        model = formats.open_model(case["entry"])
    except errors.InputError as error:
        verdict, message = "reject", str(error)
        assert error.file and error.reason and error.rule and message.isascii() and message.isprintable()
        assert case["entry"].split("/")[0] in error.file
    else:
        verdict, message = "accept", " ".join(model.warnings)
        expected = case.get("expected") or {}
        if "delta" in expected:
            require_deltas(model, expected["delta"])
        elif expected:
            require_values(model, expected)
        assert not case["must_warn"] or model.warnings
    assert time.process_time() - start < MAX_SECONDS
    allowed = {case["expect"], *case["also_ok"]}
    assert verdict in allowed or (verdict == "reject" and "quarantine" in allowed)  # a refused model is set aside
    if verdict == "reject":
        assert all(name in message for name in case["must_name"])
        record("CORPUS", "refusals by open_model that name the file", case["id"])
    assert not list(folder.rglob("*.marker"))
    record("CORPUS", f"verdicts met by open_model, {case['cls']}", case["id"])
