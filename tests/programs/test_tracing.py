"""The trace of a run, and where a report says that its time went."""

import gzip
import json

import numpy as np
import pytest

import jaxsub
from jaxsub import errors
from jaxsub.pipelines import tracing
from jaxsub.report import words
from tests.programs import worlds

PARTS = ("open", "read", "compute", "figures", "write")


def events(folder):
    """Names of the events in the one trace under a folder."""
    (file,) = folder.glob("plugins/profile/*/perfetto_trace.json.gz")
    assert list(file.parent.glob("*.xplane.pb"))
    return {e.get("name") for e in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]}


def test_a_trace_has_its_stages_under_their_names(tmp_path):
    with tracing.traced(str(tmp_path / "t")), tracing.stage("layer \udcff 7"):
        np.asarray(np.ones(3) + 1)
    assert "layer \\udcff 7" in events(tmp_path / "t")
    with tracing.traced(None), tracing.stage("nothing"):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["t"]


@pytest.mark.slow
def test_profile_writes_the_layers_of_a_run(tmp_path):
    folder, workdir = worlds.write(tmp_path / "c", {"layer.3": worlds.noise(9)}), tmp_path / "out"
    jaxsub.analyze(str(folder), str(workdir), draws=2, splits=2, profile=True)
    assert {"copies", "layer.3", "figures of layer.3"} <= events(workdir / "profile")
    jaxsub.analyze(str(folder), str(tmp_path / "other"), draws=2, splits=2)
    assert not (tmp_path / "other" / "profile").exists()


def test_a_trace_needs_a_place(tmp_path):
    folder = worlds.write(tmp_path / "c", {"w": worlds.noise(9)})
    with pytest.raises(errors.ConfigError, match="--workdir"):
        jaxsub.analyze(str(folder), profile=True)


@pytest.mark.slow
def test_the_parts_of_the_time_make_its_total(tmp_path):
    folder, workdir = worlds.write(tmp_path / "c", {"a": worlds.noise(12), "b": worlds.noise(12)}), tmp_path / "out"
    report = jaxsub.analyze(str(folder), str(workdir), draws=4, splits=2)
    spent = report["provenance"]["seconds"]
    assert set(spent) == {*PARTS, "total"} and all(spent[part] > 0 for part in PARTS)
    assert 0.8 * spent["total"] < sum(spent[part] for part in PARTS) <= spent["total"] + 0.01
    line = words.time_line(report["provenance"])
    assert line in report.html() and line in " ".join(report.table(200).split())
    again = jaxsub.analyze(str(folder), str(workdir), draws=4, splits=2)["provenance"]["seconds"]
    assert again["compute"] == again["write"] == 0  # found in the workdir


def test_the_line_names_the_largest_part_first_and_leaves_out_what_is_nothing():
    seconds = {"open": 0.001, "read": 2.0, "compute": 6.0, "figures": 1.0, "write": 0.0, "total": 10.0}
    assert words.time_line({"seconds": seconds}) == "10.0 s: compute 60%, read 20%, figures 10%, other 10%"
    assert words.time_line({"seconds": {"total": 3}}) == "3.0 s"
    assert words.time_line({}) == words.time_line({"seconds": None}) == ""
