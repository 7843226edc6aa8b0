"""What `jaxsub bench` times: every workload computes what it says, as do its peers."""

import dataclasses
import types

import numpy as np
import pytest

from jaxsub import plugins
from jaxsub.pipelines import bench

NAMES = plugins.available("workloads")
# What float32 allows at the quick sizes; the randomized methods have a few passes only.
WORST = {
    "gram_pca": 2e-5,
    "gram_pca_basis": 2e-5,
    "incremental": 1e-3,
    "lora_gram": 2e-6,
    "lora_gram_bfloat16": 4e-6,  # where no tiles multiply bfloat16: 2.0e-6, NumPy 1.4e-6
    "orthonormalise": 1e-5,
    "tall_pca": 1e-4,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_results_are_right_and_peers_agree(name):
    module = plugins.load("workloads", name)
    problem = module.problem(module.QUICK, np.random.default_rng(0))
    error = module.error(problem, module.QUICK, module.ours(problem, module.QUICK)())
    assert -1e-3 < error < WORST.get(name, 0.02)
    for call in module.peers(problem, module.QUICK).values():
        assert module.error(problem, module.QUICK, call()) < 0.5
    flops, num_bytes = module.work(module.QUICK)
    assert flops > 0 and num_bytes > 0


@pytest.mark.slow
def test_the_record_and_its_table(tmp_path):
    record = bench.run(bench.Config(workloads=("orthonormalise",), peers=True, quick=True, rounds=1), tmp_path)
    row = record["workloads"][0]
    assert row["seconds"] > 0 and row["error"] < 1e-5 and row["peers"][0]["ratio"] > 0
    text = bench.table(record)
    assert max(map(len, text.splitlines())) <= 100 and "numpy.linalg.qr" in text
    assert row["communication"]["collectives"] == 2
    assert (tmp_path / "bench.json").exists()


def test_an_unknown_workload_is_refused_with_the_nearest_name():
    with pytest.raises(Exception, match="gram_pca"):
        bench.run(bench.Config(workloads=("gram_pc",)))


@dataclasses.dataclass(frozen=True)
class Empty:
    """Options of a workload that does nothing."""


def workload(communication):
    return types.SimpleNamespace(
        Options=Empty,
        QUICK=Empty(),
        problem=lambda options, rng: None,
        work=lambda options: (6e9, 1e9),
        communication=lambda options: communication,
        ours=lambda problem, options: lambda: np.zeros(1),
        peers=lambda problem, options: {"a peer of a name that is longer than its column": lambda: np.zeros(1)},
        error=lambda problem, options, result: -1.25e-10,
    )


@pytest.fixture
def quickly(monkeypatch):
    monkeypatch.setattr(bench, "SAMPLE_SECONDS", 0)


@pytest.mark.parametrize("flops, num_bytes, seconds", [(1e9, 1e9, 6.0), (6e9, 0.1e9, 10.0)])
def test_the_model_is_the_longer_of_arithmetic_and_memory(quickly, flops, num_bytes, seconds):
    config = bench.Config(quick=True, rounds=1)
    exchanged = [("all-reduce", 800), ("all-reduce", 8)]
    row = bench._measure(workload(exchanged), config, {"flops": flops, "bytes": num_bytes})
    assert row["model_seconds"] == seconds
    assert row["communication"] == {"devices": 8, "collectives": 2, "bytes_sent": 1400 + 14}
    assert bench._measure(workload(None), config, {"flops": 1, "bytes": 1})["communication"] is None


def test_the_widest_table_has_100_columns(quickly):
    config = bench.Config(quick=True, rounds=1, peers=True)
    limits = {"flops": 6e6, "bytes": 1e9}
    widest = {"workload": "w" * 20, "seconds": 9999.9, "first_call_seconds": 9999.9, "gflops": 9.9e7}
    exchanged = [("all-reduce", 2**28)], None
    rows = [bench._measure(workload(e), config, limits) | widest for e in exchanged]
    machine = {"num_devices": 8, "device": "cpu", "cores": 64}
    record = {"machine": machine, "limits": limits, "config": dataclasses.asdict(config), "workloads": rows}
    lines = bench.table(record).splitlines()
    assert max(map(len, lines)) <= 100
    (first, second) = (line.split() for line in lines if line.startswith("w" * 20))
    assert "1000000.0" in first and first[-2] == "458752.0" and second[-2] == "-"
