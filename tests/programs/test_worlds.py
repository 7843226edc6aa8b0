"""Every world of the zoo, made at full size, written as files, analysed: the truth it declares must be found."""

import json

import pytest

import jaxsub
from jaxsub import plugins
from jaxsub.pipelines import zoo


@pytest.mark.slow
@pytest.mark.parametrize("world", plugins.available("worlds"))
def test_analysis_finds_the_declared_truth(world, tmp_path):
    folder = zoo.make(world, str(tmp_path))
    truth = json.loads((tmp_path / world / "zoo.json").read_text())["truth"]
    report = jaxsub.analyze(str(folder))
    layers = {x["name"]: x for x in report.layers}
    for name in truth["layers"]:
        assert layers[name]["verdict"] == truth["verdict"], layers[name]["why"]
        assert set(truth.get("flags", ())) <= set(layers[name]["flags"])
    collection = report["collection"]
    groups = collection["lora_starts"] if world == "shared_init" else collection["lineages"]
    if "lineages" in truth:
        assert sorted(map(len, groups)) == sorted(truth["lineages"])
    if "duplicates" in truth:
        assert sum(len(d) - 1 for d in collection["duplicates"]) == truth["duplicates"]
