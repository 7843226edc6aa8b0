"""Results beside fusion-bench's functions, on random stacks and on real ones, where it is installed by itself."""

import os
import subprocess

import jax
import numpy as np
import pytest

import jaxsub
from jaxsub import formats, plugins, rows
from tests.merges import stacks

PYTHON = os.environ.get("JAXSUB_FUSION_BENCH", "")  # python of an environment that has fusion-bench
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="set JAXSUB_FUSION_BENCH to a python with fusion-bench"),
]
SCRIPT = """
import sys, types, numpy as np, torch
name, source, target = sys.argv[1:]
x = {k: torch.tensor(v) for k, v in np.load(source).items()}
w = x["x"]
dicts = [{"w": one} for one in w]
if name == "iso_c":
    from fusion_bench.method.isotropic_merging.iso_utils import iso_c
    y = iso_c(dicts, accelerator="cpu")["w"]
elif name == "iso_cts":
    from fusion_bench.method.isotropic_merging.iso_utils import iso_cts
    y = iso_cts(dicts, 0.8, accelerator="cpu")["w"]
elif name == "tsv":
    from fusion_bench.method.task_singular_vector.utils import TSVM_utils
    y = TSVM_utils.compute_and_sum_svd_mem_reduction(dicts, accelerator="cpu")["w"]
elif name == "wudi":
    from fusion_bench.method.wudi.wudi import wudi_merging
    y = wudi_merging(dicts, accelerator="cpu")["w"]
elif name in ("ties", "ties_sum"):
    from fusion_bench.method.ties_merging.ties_merging_utils import ties_merging
    d = w[0].numel()
    share = (int(0.3 * d) - 0.5) / d  # it keeps one entry more than the share says
    y = ties_merging(w.reshape(len(w), -1), share, "mean" if name == "ties" else "sum").reshape(w[0].shape)
elif name == "regmean":
    from fusion_bench.method.regmean.regmean import merging_with_regmean_weights
    y = merging_with_regmean_weights({"m.weight": list(w)}, [{"m": g} for g in x["g"]], 0.9)["m.weight"]
elif name == "fisher":
    from fusion_bench.method.fisher_merging.fisher_merging import merging_with_fisher_weights
    y = merging_with_fisher_weights({"w": list(w)}, [{"w": f} for f in x["f"]], torch.ones(len(w)), False)["w"]
elif name == "slerp":
    from fusion_bench.method.slerp.slerp_utils import slerp
    y = slerp(0.3, w[0], w[1])
elif name == "knots":
    from fusion_bench.method.knots.knots_utils import subspace_alignment
    from fusion_bench.method.ties_merging.ties_merging_utils import ties_merging
    u, s, vs = subspace_alignment(list(w.double()), eps=1e-9)
    parts = torch.stack([torch.diag(s) @ v for v in vs])
    d = parts[0].numel()
    merged = ties_merging(parts.reshape(len(w), -1), (int(0.3 * d) - 0.5) / d, "mean")
    y = u @ merged.reshape(parts[0].shape)
np.save(target, y.detach().numpy())
"""
OPTIONS = {
    "ties": {"density": 0.3}, "ties_sum": {"density": 0.3, "function": "sum"}, "slerp": {"t": 0.3},
    "knots": {"density": 0.3, "scaling": 1.0},
}  # fmt: skip
METHOD = {"ties_sum": "ties", "knots": "knots_ties"}
NAMES = ["iso_c", "iso_cts", "tsv", "wudi", "ties", "ties_sum", "regmean", "fisher", "slerp", "knots"]


def theirs(folder, name, **arrays):
    np.savez(folder / "in.npz", **arrays)
    command = [PYTHON, "-c", SCRIPT, name, str(folder / "in.npz"), str(folder / "out.npy")]
    done = subprocess.run(
        command, capture_output=True, text=True, env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return np.load(folder / "out.npy").astype(float)


def compare(folder, name, x):
    rng, more, given = np.random.default_rng(0), {}, {}
    if name == "slerp":
        x = x[:2]
    if name == "regmean":
        inputs = rng.standard_normal((len(x), 3 * x.shape[2], x.shape[2])).astype("f4")
        given["g"] = np.einsum("nti,ntj->nij", inputs, inputs) / inputs.shape[1]
    if name == "fisher":
        given["f"] = rng.uniform(0, 1, x.shape).astype("f4") ** 3
    if given:
        more["statistics"] = rows.ArrayRows(next(iter(given.values())))
    module = plugins.load("merges", METHOD.get(name, name))
    with jax.enable_x64(True):
        result = module.merge(stacks.of_arrays(x, **more), module.Options(**OPTIONS.get(name, {})), jax.random.key(0))
    found = result.array(x.shape[1:])
    # Leading vectors hang on gaps, which their float32 does not tell to 1e-5.
    exact = x.astype(np.float64) if name in ("iso_c", "iso_cts", "tsv") else x
    assert stacks.relative(found, theirs(folder, name, x=exact, **given)) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_random_stacks(tmp_path, name):
    compare(tmp_path, name, stacks.dense((40, 24), 4, seed=11))


@pytest.mark.parametrize("name", NAMES)
def test_real_stacks(tmp_path, name, shared):
    """Hidden layers of the wake-word detectors of one start, less their mean: nearly a base."""
    opened = jaxsub.open_collection(str(shared / "data" / "wakewords"))
    group = next(g for g in opened.groups if g.shape == (32, 32))
    kin = jaxsub.analyze(opened, layers=["fc2"], draws=2)["collection"]["lineages"][0][:6]
    at = [i for i, m in enumerate(group.members) if opened.refs[m].id in kin]
    x = np.stack([formats.read(opened.models[group.members[i]], group.entries[i]) for i in at])
    compare(tmp_path, name, (x - x.mean(axis=0) + 0.1 * x[0]).astype("f4"))
