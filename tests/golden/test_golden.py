"""Numbers that a correct program finds, from closed forms, simulations or published figures; no downloads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsub
from jaxsub import heldout, spectrum
from jaxsub.formats import peft, safetensors
from jaxsub.linalg import modes
from tests.programs import worlds
from tests.selected import first


@pytest.mark.slow
@pytest.mark.parametrize("draw", ["normal", "truncated"])
def test_iid_stack_of_100_square_layers(draw):
    """100 random 768 x 768 layers, plain noise or a vision transformer's initialiser: the published null spectra."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((100, 768 * 768), dtype=np.float32)
    if draw == "truncated":
        while (bad := np.abs(x) > 2).any():
            x[bad] = rng.standard_normal(int(bad.sum()), dtype=np.float32)
        x *= np.float32(0.02)
    y = x - x.mean(0)
    values = spectrum.energies((y @ y.T).astype(np.float64))
    shares = spectrum.energy_at(values)
    assert shares["1"] == pytest.approx(0.0103, abs=5e-4) and shares["16"] == pytest.approx(0.1648, abs=5e-4)
    with jax.enable_x64(True):
        k = np.asarray(modes.mode_gram(jnp.asarray(x), shape=(768, 768), axis=0, dtype="float32"))
    mode = spectrum.energy_at(np.linalg.eigvalsh(k)[::-1])
    assert mode["1"] == pytest.approx(0.00158, abs=5e-5) and mode["16"] == pytest.approx(0.02497, abs=5e-4)


@pytest.mark.slow
def test_shared_start_makes_untrained_factors_look_low_dimensional():
    """242 independent and 255 identical A factors, U(-1/64, 1/64), r = 16, d = 4096, rows stacked and centred."""
    rng = np.random.default_rng(0)
    alone = rng.uniform(-1 / 64, 1 / 64, (242 * 16, 4096)).astype(np.float32)
    start = rng.uniform(-1 / 64, 1 / 64, (16, 4096)).astype(np.float32)
    everyone = np.concatenate([alone, np.tile(start, (255, 1))])

    def figures(rows):
        y = rows - rows.mean(0)
        values = np.linalg.eigvalsh(y.T @ y)[::-1]
        return spectrum.energy_at(values)["16"], spectrum.rank_at(np.maximum(values, 0))["0.9"]

    top, k90 = figures(alone)
    assert top == pytest.approx(0.0156, abs=5e-4) and k90 == pytest.approx(2030, abs=10)
    top, k90 = figures(everyone)
    # One draw of the start: its energy varies by .35 % (sd), the share by f (1 - f) of that, .0009.
    assert top == pytest.approx(0.5057, abs=3e-3) and k90 == pytest.approx(1543, abs=10)


def adapters(num_models=14, r=4, o=24, i=20, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((num_models, r, i)), rng.standard_normal((num_models, o, r))


def write_adapters(folder, a, b, alpha=8):
    for n in range(len(a)):
        peft.write(
            str(folder / f"m{n:02d}"),
            {"q": (a[n].astype(np.float32), b[n].astype(np.float32), alpha, a.shape[1])},
        )
    return folder


def analyze(folder, **options):
    return jaxsub.analyze(str(folder), draws=4, splits=2, **options).layers


def unfold(x, axis):
    return np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1)


@pytest.mark.slow
def test_factored_lora_equals_the_dense_update(tmp_path):
    a, b = adapters()
    dense = {"q": (2.0 * b @ a).astype(np.float32)}  # alpha / r = 2
    (lora,) = analyze(write_adapters(tmp_path / "lora", a, b))
    (plain,) = analyze(worlds.write(tmp_path / "dense", dense))
    np.testing.assert_allclose(lora["singular_values"], plain["singular_values"], rtol=1e-5)
    assert lora["mean_energy"] == pytest.approx(plain["mean_energy"], rel=1e-5)
    assert lora["held_out"] == pytest.approx(plain["held_out"], abs=1e-5)
    assert lora["parametrisation"] == "lora" and lora["shape"] == [24, 20]
    for axis, mode in enumerate(lora["modes"]):  # uncentred by definition: centring factors depends on the gauge
        w = dense["q"].astype(np.float64)
        values = np.square(np.linalg.svd(unfold(w, axis + 1), compute_uv=False))
        assert mode["axis"] == axis and mode["size"] == w.shape[axis + 1]
        assert mode["energy_at"]["4"] == pytest.approx(values[:4].sum() / values.sum(), rel=1e-5)


def test_a_convolution_has_modes_of_every_axis(tmp_path):
    rng = np.random.default_rng(3)
    a, b = rng.standard_normal((9, 2, 6, 3, 1)).astype("f4"), rng.standard_normal((9, 8, 2)).astype("f4")
    a[:, :, 4:] = a[:, :, :2]  # six input channels, four distinct
    for n in range(9):
        peft.write(str(tmp_path / f"m{n}"), {"conv": (a[n], b[n][:, :, None, None], 4, 2)})
    (layer,) = analyze(tmp_path)
    updates = 2.0 * np.einsum("nor,nrchw->nochw", b, a, dtype=np.float64)
    assert layer["shape"] == [8, 6, 3, 1]
    assert [m["axis"] for m in layer["modes"]] == [0, 1, 2]
    for mode in layer["modes"]:
        values = np.square(np.linalg.svd(unfold(updates, mode["axis"] + 1), compute_uv=False))
        assert mode["size"] == updates.shape[mode["axis"] + 1]
        for k in ("1", "2", "4"):
            if k in mode["energy_at"]:
                assert mode["energy_at"][k] == pytest.approx(values[: int(k)].sum() / values.sum(), rel=1e-5)
    assert layer["modes"][1]["energy_at"]["4"] == pytest.approx(1.0, abs=1e-6)


@pytest.mark.slow
def test_a_change_of_gauge_moves_the_factors_and_nothing_else(tmp_path):
    a, b = adapters()
    rng = np.random.default_rng(1)
    gauge = rng.standard_normal((len(a), 4, 4)) + 3 * np.eye(4)
    moved = np.linalg.solve(gauge, a), b @ gauge
    one, other = write_adapters(tmp_path / "one", a, b), write_adapters(tmp_path / "other", *moved)
    (x,), (y,) = analyze(one), analyze(other)
    np.testing.assert_allclose(x["singular_values"], y["singular_values"], rtol=1e-5)
    for p, q in zip(x["modes"], y["modes"], strict=True):
        assert p["energy_at"] == pytest.approx(q["energy_at"], rel=1e-4)
    factors = [analyze(f, view="lora_factors")[0]["singular_values"] for f in (one, other)]
    assert abs(factors[0][0] / factors[1][0] - 1) > 0.05


def test_mixed_ranks_and_scales_are_exact(tmp_path):
    a, b = adapters(10)
    rows = []
    for n in range(10):
        r, alpha = (2, 6) if n % 2 else (4, 4)
        peft.write(str(tmp_path / "c" / f"m{n}"), {"q": (a[n, :r].astype("f4"), b[n, :, :r].astype("f4"), alpha, r)})
        rows.append(alpha / r * b[n, :, :r] @ a[n, :r])
    flat = np.stack(rows).reshape(10, -1)
    (layer,) = analyze(tmp_path / "c")
    want = np.linalg.svd(flat - flat.mean(0), compute_uv=False)[:9]
    np.testing.assert_allclose(layer["singular_values"], want, rtol=1e-5)


@pytest.mark.slow
def test_stability_of_a_planted_subspace_improves_as_one_over_root_n():
    """Davis-Kahan: the angle between the subspaces of two halves falls with slope -1/2 in the number of models."""
    d, k, counts, angles = 300, 3, (40, 80, 160, 320, 640), []
    for count in counts:
        found = []
        for seed in range(4):
            rng = np.random.default_rng(seed)
            basis = np.linalg.qr(rng.standard_normal((d, k)))[0].T
            x = 20 * rng.standard_normal((count, k)) @ basis + rng.standard_normal((count, d))
            split = heldout.split_half(spectrum.centred(x @ x.T), [k], d, num_splits=4, rng=rng)
            found.append(1 - split[k]["overlap"])
        angles.append(np.sqrt(np.mean(found)))
    slope = np.polyfit(np.log(counts), np.log(angles), 1)[0]
    assert slope == pytest.approx(-0.5, abs=0.08)


@pytest.mark.slow
def test_a_common_offset_changes_the_mean_alone(tmp_path):
    x = worlds.planted(16)
    offset = 3 * worlds.noise(1, seed=5)
    (plain,), (moved,) = (analyze(worlds.write(tmp_path / n, {"w": v})) for n, v in (("a", x), ("b", x + offset)))
    np.testing.assert_allclose(moved["singular_values"], plain["singular_values"], rtol=1e-5)
    assert moved["held_out"] == pytest.approx(plain["held_out"], abs=1e-5)
    assert moved["mean_energy"] > 0.8 > plain["mean_energy"]


@pytest.mark.parametrize("collection", first(["sb3", "wakewords", "megnet"]))
def test_real_collections(shared, collection):
    """Figures computed in NumPy float64 from the files themselves: mean share, k90, k95, LOO at 4, 8, 16."""
    options = {"match": "order"} if collection == "megnet" else {}
    report = jaxsub.analyze(str(shared / "data" / collection), **options)
    expected = {
        "wakewords": [
            ((1536, 32), 0.094, 67, 92, {"4": 0.772, "8": 0.768, "16": 0.765}),
            ((32, 32), 0.024, 90, 104, {"4": 0.974, "8": 0.968, "16": 0.957}),
        ],
        "sb3": [((64, 64), 0.021, 35, 40, {"4": 0.996, "8": 0.993, "16": 0.990})],
        "megnet": [((128, 64), 0.079, 11, 12, {"4": 0.998, "8": 0.996})],
    }
    for shape, mean, k90, k95, held_out in expected[collection]:
        layer = next(x for x in report.layers if tuple(x["shape"]) == shape)
        assert layer["mean_energy"] == pytest.approx(mean, abs=0.002)
        assert abs(layer["rank_at"]["0.9"] - k90) <= 1 and abs(layer["rank_at"]["0.95"] - k95) <= 1
        for k, value in held_out.items():
            assert layer["held_out"][k] == pytest.approx(value, abs=0.002)
    verdicts = {x["verdict"] for x in report.layers if len(x["shape"]) == 2 and min(x["shape"]) >= 32}
    if collection == "wakewords":
        null = report.layers[1]["nulls"]["permutation"]
        assert null["mean_energy"] == pytest.approx(0.009, abs=0.005)
        assert null["held_out"]["16"] == pytest.approx(0.998, abs=0.005) and abs(null["rank_at"]["0.9"] - 66) <= 1
        assert [len(g) for g in report["collection"]["lineages"]] == [35]
    else:
        assert verdicts <= {"chance", "common_mean"}
        assert report["collection"]["lineages"] == []


@pytest.mark.slow
def test_copies_of_one_file_under_other_names(tmp_path):
    folder = worlds.write(tmp_path / "c", {"w": worlds.noise(10)})
    for n in (1, 2):
        (folder / f"again{n}.safetensors").write_bytes((folder / "m004.safetensors").read_bytes())
    safetensors.write(str(folder / "odd.safetensors"), {"w": worlds.noise(1, seed=3)[0]}, None)
    report = jaxsub.analyze(str(folder), draws=2, splits=2)
    assert report["collection"]["duplicates"] == [["again1", "again2", "m004"]]
    assert report.layers[0]["num_models"] == 11


def test_a_common_part_of_adapters_is_not_read_as_a_subspace(tmp_path):
    """Updates equal to 1e-6: what their products lose to rounding is under the floor, not a shared direction."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((1, 4, 40)), rng.standard_normal((1, 50, 4))
    a, b = (v + 1e-6 * rng.standard_normal((14, *v.shape[1:])) for v in (a, b))
    folder = write_adapters(tmp_path / "c", a, b)
    (layer,) = analyze(folder, precision="float32")
    assert layer["verdict"] == "undetermined"


def test_orientation_and_kind_of_a_layer_are_part_of_its_identity(tmp_path):
    import json

    a, b = adapters(10, o=16, i=16)
    folder, workdir = write_adapters(tmp_path / "c", a, b), str(tmp_path / "out")
    jaxsub.analyze(str(folder), workdir=workdir, draws=2, splits=2)
    for path in folder.glob("*/adapter_config.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"fan_in_fan_out": True}))
    turned = jaxsub.analyze(str(folder), workdir=workdir, draws=2, splits=2, restart=True).layers[0]
    fresh = jaxsub.analyze(str(folder), draws=2, splits=2).layers[0]
    assert turned["modes"] == fresh["modes"]


@pytest.mark.parametrize("alpha", [1e200, 1e-90])
def test_scales_that_no_square_can_hold(tmp_path, alpha):
    a, b = adapters(10)
    (layer,) = analyze(write_adapters(tmp_path / "c", a, b, alpha=alpha))
    rows = (b @ a).reshape(10, -1)
    want = np.linalg.svd(rows - rows.mean(0), compute_uv=False)[:9]
    np.testing.assert_allclose(np.array(layer["singular_values"]) / (alpha / 4), want, rtol=1e-5)
    assert layer["modes"][0]["energy_at"]["1"] > 0
