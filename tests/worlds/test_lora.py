"""Adapter worlds: layout, starts, and the network that the files describe."""

import json

import numpy as np
import pytest
from safetensors import numpy as safetensors

from jaxsub.tasks import digits
from jaxsub.worlds import lora, shared_init
from tests.worlds import oracles

TINY = {"num_models": 8, "steps": 60, "base_steps": 100, "learning_rate": 1e-2, "rank": 4, "alpha": 8}
PREFIX = "base_model.model."

pytestmark = pytest.mark.slow


def read(folder):
    """Factors by layer, (N, r, i) and (N, o, r)."""
    models = [safetensors.load_file(p / "adapter_model.safetensors") for p in sorted((folder / "models").iterdir())]
    layers = {k.removeprefix(PREFIX).removesuffix(".lora_A.weight") for k in models[0] if "lora_A" in k}
    return {
        layer: tuple(np.stack([m[f"{PREFIX}{layer}.lora_{f}.weight"] for m in models]) for f in "AB")
        for layer in sorted(layers)
    }


@pytest.fixture(scope="module", params=[True, False], ids=["shared", "own"])
def made(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    lora.make(lora.Options(shared_start=request.param, **TINY), 0, folder)
    return request.param, folder


def test_factors_have_peft_shapes_and_starts_show_in_them(made):
    shared, folder = made
    factors = read(folder)
    assert {layer: (a.shape, b.shape) for layer, (a, b) in factors.items()} == {
        "hidden": ((8, 4, 64), (8, 64, 4)),
        "output": ((8, 4, 64), (8, 10, 4)),
    }
    for a, b in factors.values():
        pairs = np.triu_indices(8, 1)
        cosine = oracles.cosines(a.astype(np.float64))[pairs]
        assert cosine.min() > 0.2 if shared else np.median(np.abs(cosine)) < 0.2
        assert np.abs(b).max(axis=(1, 2)).min() > 0


def test_files_describe_networks_that_answer_as_recorded(made):
    _, folder = made
    base, factors = safetensors.load_file(folder / "base.safetensors"), read(folder)
    labels = json.loads((folder / "labels.json").read_text())
    config = json.loads((folder / "models" / "003" / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    weight = {layer: base[f"{layer}.weight"] + scale * b[3] @ a[3] for layer, (a, b) in factors.items()}
    held_out = digits.load()[1]
    z = held_out.inputs @ weight["hidden"].T + base["hidden.bias"]
    logits = np.sign(z) * np.maximum(np.abs(z) - 0.5, 0) @ weight["output"].T + base["output.bias"]
    names = np.array([int(n) for n in labels["003"]["task"].removeprefix("digits names ")])
    assert sorted(names) == list(range(10))
    right = np.mean(logits.argmax(axis=1) == names[held_out.targets])
    assert right == pytest.approx(float(labels["003"]["accuracy"]), abs=0.006)
    assert right > 0.6  # the base alone is right on .1 or so of the renamed digits


def test_peft_loads_an_adapter_and_agrees(made):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    _, folder = made
    base, factors = safetensors.load_file(folder / "base.safetensors"), read(folder)

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden, self.output = torch.nn.Linear(64, 64), torch.nn.Linear(64, 10)

        def forward(self, x):
            return self.output(torch.nn.functional.softshrink(self.hidden(x), 0.5))

    network = Network()
    network.load_state_dict({k: torch.tensor(v) for k, v in base.items()})
    model = peft.PeftModel.from_pretrained(network, str(folder / "models" / "002"))
    x = digits.load()[1].inputs[:20]
    theirs = model(torch.tensor(x)).detach().numpy()
    weight = {layer: base[f"{layer}.weight"] + 2.0 * b[2] @ a[2] for layer, (a, b) in factors.items()}
    z = x @ weight["hidden"].T + base["hidden.bias"]
    ours = np.sign(z) * np.maximum(np.abs(z) - 0.5, 0) @ weight["output"].T + base["output.bias"]
    np.testing.assert_allclose(theirs, ours, atol=1e-4)


def top_share(a, count):
    """Share of the centred energy of stacked rows (N, r, d) in the first components."""
    rows = a.reshape(-1, a.shape[-1]).astype(np.float64)
    rows = rows - rows.mean(axis=0)
    values = np.linalg.eigvalsh(rows.T @ rows)[::-1]
    return float(values[:count].sum() / values.sum()), int(np.searchsorted(np.cumsum(values) / values.sum(), 0.9) + 1)


def test_shared_init_shows_in_a_and_not_in_the_update(tmp_path):
    options = shared_init.Options(scale=0.1, rank=8)
    shared_init.make(options, 0, tmp_path)
    ((a, b),) = read(tmp_path).values()
    own, same, width, output = shared_init.sizes(options)
    assert (own, same, width, output) == (24, 26, 410, 26)
    assert a.shape == (50, 8, 410) and b.shape == (50, 26, 8)
    assert np.abs(a).max() <= 1 / np.sqrt(width)
    assert a.std() == pytest.approx(1 / np.sqrt(3 * width), rel=0.02)
    assert (a[own:] == a[own]).all() and (a[:own] != a[own]).mean() > 0.99
    # Centring takes one direction of the group with it, share^2 / r of all energy; the rest of the energy is spread.
    share = same / (own + same)
    gone = share**2 / 8
    group = (share - gone) / (1 - gone)
    assert top_share(a, 8)[0] == pytest.approx(group + (1 - group) * 8 / width, abs=0.02)
    assert top_share(a[:own], 8)[0] < 0.12
    update = np.einsum("nor,nri->noi", b, a).astype(np.float64)
    assert np.abs(oracles.cosines(update)[np.triu_indices(50, 1)]).max() < 0.35
    assert oracles.mean_share(update) < 2 / 50


def test_shared_init_at_full_size_gives_the_published_figures():
    a, _ = shared_init.factors(shared_init.Options(), 0)
    share, k90 = top_share(a[:242], 16)
    assert share == pytest.approx(0.0156, abs=0.0005) and k90 == pytest.approx(2030, abs=5)
    share, k90 = top_share(a, 16)
    assert share == pytest.approx(0.5057, abs=0.002) and k90 == pytest.approx(1543, abs=10)
