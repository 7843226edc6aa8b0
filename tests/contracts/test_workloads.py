"""What `jaxsub bench` times: every workload computes what it says, as do its peers."""

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
    assert (tmp_path / "bench.json").exists()


def test_an_unknown_workload_is_refused_with_the_nearest_name():
    with pytest.raises(Exception, match="gram_pca"):
        bench.run(bench.Config(workloads=("gram_pc",)))
