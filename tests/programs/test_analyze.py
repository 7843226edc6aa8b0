"""The whole analysis on files: verdicts of known worlds, copies, models that drop out, reuse, awkward numbers."""

import json
import os

import numpy as np
import pytest

import jaxsub
from jaxsub import errors
from jaxsub.formats import peft, safetensors
from tests.figures_log import record
from tests.programs import worlds
from tests.selected import first

QUICK = dict(draws=8, splits=4)


def analyze(folder, **options):
    return jaxsub.analyze(str(folder), **(QUICK | options))


@pytest.mark.parametrize(
    "stack, verdict, flag",
    first([
        (worlds.noise(), "chance", None),
        (worlds.planted(), "shared", None),
        (worlds.noise() + 0.6 * worlds.noise(1, seed=9), "common_mean", None),
        (worlds.families(), "lineage", None),
        (worlds.families(shared=2), "lineage+shared", None),
        (worlds.planted(seed=4) + 2 * worlds.noise(1, seed=9), "shared", "one_lineage"),
        (worlds.noise(7), "undetermined", None),
        (worlds.noise(24, (4, 4)), "undetermined", None),
        (np.repeat(worlds.noise(1), 12, axis=0), "undetermined", "identical"),
    ], 6),
)  # fmt: skip
def test_known_worlds_get_their_verdict(tmp_path, stack, verdict, flag):
    other = worlds.noise(len(stack), (8,), seed=5)  # so that equal rows are not copies
    report = analyze(worlds.write(tmp_path / "c", {"w": stack, "other": other}))
    layer = {x["name"]: x for x in report.layers}["w"]
    assert layer["verdict"] == verdict, layer["why"]
    assert flag is None or flag in layer["flags"]
    json.dumps(report.data, allow_nan=False)
    assert report.table() and report.html()


def test_figures_equal_plain_numpy(tmp_path):
    x = worlds.planted(16)
    report = analyze(worlds.write(tmp_path / "c", {"w": x}))
    flat = x.reshape(16, -1).astype(np.float64)
    y = flat - flat.mean(0)
    s = np.linalg.svd(y, compute_uv=False)[:15]
    layer = report.layers[0]
    np.testing.assert_allclose(layer["singular_values"], s, rtol=1e-9)
    np.testing.assert_allclose(layer["uncentred_singular_values"], np.linalg.svd(flat, compute_uv=False), rtol=1e-9)
    assert layer["mean_energy"] == pytest.approx(16 * np.square(flat.mean(0)).sum() / np.square(flat).sum())
    from jaxsub.linalg import reference

    for k in (1, 4, 8):
        assert layer["held_out"][str(k)] == pytest.approx(reference.leave_one_out(flat, k), abs=1e-6)
    for mode in layer["modes"]:
        energies = reference.mode_energies(x, mode["axis"])
        assert mode["energy_at"]["4"] == pytest.approx(energies[:4].sum() / energies.sum())


@pytest.mark.slow
def test_copies_leave_the_figures_as_they_are_without_them(tmp_path):
    x = worlds.planted(14)
    plain = analyze(worlds.write(tmp_path / "a", {"w": x}))
    folder = worlds.write(tmp_path / "b", {"w": x})
    for n in (0, 1, 2):
        safetensors.write(str(folder / f"x{n}.safetensors"), {"w": x[3]}, {"made": str(n)})
    copied = analyze(folder)
    assert copied["collection"]["duplicates"] == [["m003", "x0", "x1", "x2"]]
    assert copied["collection"]["num_distinct"] == 14 and copied["collection"]["num_models"] == 17
    assert copied.layers == plain.layers


def test_a_model_that_is_not_finite_leaves_no_trace(tmp_path):
    """Found in the second layer, after the first was done with it: the first is read again without it."""
    stacks = {"a": worlds.noise(20), "b": worlds.planted(20, seed=2)}
    good = {k: np.delete(v, 7, 0) for k, v in stacks.items()}
    plain = analyze(worlds.write(tmp_path / "a", good))
    bad = {k: v.copy() for k, v in stacks.items()}
    bad["b"][7, 3, 5] = np.nan
    for preflight in ("stream", "full"):
        report = analyze(worlds.write(tmp_path / "b", bad), preflight=preflight)
        (aside,) = report["collection"]["quarantined"]
        assert aside["id"] == "m007" and aside["layer"] == "b" and "53" in aside["reason"]
        for got, want in zip(report.layers, plain.layers, strict=True):
            assert got["singular_values"] == want["singular_values"] and got["held_out"] == want["held_out"]


def test_too_many_bad_models_stop_the_run_and_say_how_to_go_on(tmp_path):
    x = worlds.noise(12)
    x[3, 0, 0], x[8, 0, 0] = np.inf, np.nan
    folder = worlds.write(tmp_path / "c", {"w": x})
    with pytest.raises(errors.InputError, match="--max_quarantined=2"):
        analyze(folder)
    assert len(analyze(folder, max_quarantined=2)["collection"]["quarantined"]) == 2
    with pytest.raises(errors.InputError):
        analyze(folder, max_quarantined=2, strict=True)


def test_a_run_that_stopped_goes_on_in_its_workdir_as_it_advised(tmp_path):
    x = worlds.noise(12)
    x[3, 0, 0], x[8, 0, 0] = np.inf, np.nan
    folder, workdir = worlds.write(tmp_path / "c", {"w": x}), str(tmp_path / "out")
    with pytest.raises(errors.InputError, match="--max_quarantined=2"):
        analyze(folder, workdir=workdir)
    assert analyze(folder, workdir=workdir, max_quarantined=2).layers


@pytest.mark.slow
def test_models_beside_one_of_1e30_are_neither_zero_nor_kin_nor_a_bug(tmp_path):
    """float64, as one model of them: float32 would make the others underflow."""
    x = worlds.noise(12).astype(np.float64)
    x[4] *= 1e30
    x[7] = 0
    report = analyze(worlds.write(tmp_path / "c", {"w": x}))
    assert report["collection"]["untrained"] == ["m007"] and not report["collection"]["lineages"]
    small, zero = "10 models too small beside the others", "1 model zero in this layer, 'm007'"
    assert all(any(text in w for w in report.layers[0]["warnings"]) for text in (small, zero))
    json.dumps(report.data, allow_nan=False)


def test_one_broken_file_is_named_and_the_run_goes_on(tmp_path):
    folder = worlds.write(tmp_path / "c", {"w": worlds.noise(21)})
    path = folder / "m004.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    (aside,) = analyze(folder)["collection"]["quarantined"]
    assert aside["id"] == "m004" and "m004.safetensors" in aside["reason"]


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e-41, 1e-30, 1e30])
def test_scale_changes_nothing_but_the_scale(tmp_path, scale):
    # Powers of two, so that float32 subnormals are exact multiples.
    power = 2.0 ** np.round(np.log2(scale))
    x = np.round(worlds.noise(9) * 64).astype(np.float32)
    scaled = np.ldexp(x, int(np.log2(power)))
    a, b = (analyze(worlds.write(tmp_path / n, {"w": v})).layers[0] for n, v in (("a", x), ("b", scaled)))
    np.testing.assert_allclose(np.array(b["singular_values"]) / power, a["singular_values"], rtol=1e-12)
    assert b["held_out"] == pytest.approx(a["held_out"]) and b["warnings"]


def test_float64_differences_of_1e_10_are_kept(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((8, 16)) + 1e-10 * rng.standard_normal((6, 8, 16))
    layer = analyze(worlds.write(tmp_path / "c", {"w": x})).layers[0]
    exact = np.linalg.svd((x - x.mean(0)).reshape(6, -1), compute_uv=False)[:5]
    np.testing.assert_allclose(layer["singular_values"], exact, rtol=1e-5)
    assert layer["compute_dtype"] == "float64"
    narrowed = x.astype(np.float32).astype(np.float64)
    weak = np.linalg.svd((narrowed - narrowed.mean(0)).reshape(6, -1), compute_uv=False)[0]
    assert abs(weak - exact[0]) > 0.5 * exact[0]  # float32 loses them


def small_blocks(monkeypatch, num_bytes, **options):
    """Makes every analysis read its layers in blocks of about `num_bytes`."""
    import functools

    from jaxsub.pipelines import layers

    monkeypatch.setattr(layers, "Options", functools.partial(layers.Options, block_bytes=num_bytes, **options))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(64, 48), (48, 64), (300, 5), (6, 5, 3, 3)])
def test_blocks_give_the_figures_of_one_block(tmp_path, monkeypatch, shape):
    folder = worlds.write(tmp_path / "c", {"w": worlds.planted(20, shape)})
    (a,) = analyze(folder).layers
    small_blocks(monkeypatch, a["num_features"] * 20 * 4 // 5)
    (b,) = analyze(folder).layers
    np.testing.assert_allclose(a["singular_values"], b["singular_values"], rtol=1e-10)
    exact = [m for m in b["modes"] if not m["sketched"]]
    assert len(exact) >= len(shape) - 1
    for mode in exact:
        assert mode["energy_at"] == pytest.approx(a["modes"][mode["axis"]]["energy_at"], rel=1e-9)
    if shape[1] <= shape[0]:
        assert b["nulls"].keys() == a["nulls"].keys()


def test_blocks_of_very_different_scale(tmp_path, monkeypatch):
    x = np.random.default_rng(0).standard_normal((9, 40, 8)) * np.array([1e-300, 1e60, 0.0, 1e50]).repeat(10)[:, None]
    folder = worlds.write(tmp_path / "c", {"w": x})
    small_blocks(monkeypatch, 9 * 8 * 8 * 10)
    (layer,) = analyze(folder).layers
    scaled = (x * 1e-60).reshape(9, -1)
    want = np.linalg.svd(scaled - scaled.mean(0), compute_uv=False)[:8]
    np.testing.assert_allclose(np.array(layer["singular_values"]) / 1e60, want, rtol=1e-9)
    assert all(m["rank_at"]["0.9"] for m in layer["modes"])


@pytest.mark.slow
def test_a_sketch_of_a_wide_axis_sees_every_direction(tmp_path, monkeypatch):
    """One axis of 5000 with a single column: a sketch by mixtures alone would have rank 8."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((60, 20)) @ rng.standard_normal((20, 5000))).astype(np.float32).reshape(60, 5000, 1)
    small_blocks(monkeypatch, 60 * 4 * 1000)
    (layer,) = analyze(worlds.write(tmp_path / "c", {"w": x})).layers
    (mode,) = layer["modes"]
    assert mode["rank_at"]["0.99"] <= 20 and mode["energy_at"]["32"] == pytest.approx(1.0, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "scale, dtype", [(1e-39, "bfloat16"), (1e200, "float64"), (1e30, "bfloat16"), (6e4, "float16")]
)
def test_awkward_scales_of_every_dtype(tmp_path, scale, dtype):
    from jaxsub import descriptors

    x = (worlds.noise(9).clip(-1, 1).astype(np.float64) * scale).astype(descriptors.numpy_dtype(dtype))
    flat = x.reshape(9, -1).astype(np.float64) / scale
    folder = worlds.write(tmp_path / "c", {"w": x})
    for precision in ("auto", "float32"):
        (layer,) = analyze(folder, precision=precision).layers
        want = np.linalg.svd(flat - flat.mean(0), compute_uv=False)[:8]
        np.testing.assert_allclose(np.array(layer["singular_values"]) / scale, want, rtol=2e-6)


@pytest.mark.slow
def test_rounding_of_eight_bit_weights_sets_the_floor(tmp_path):
    from jaxsub import descriptors

    base = worlds.noise(1, seed=3)
    for dtype, least in (("float8_e4m3fn", 0.01), ("bfloat16", 0.0005), ("float32", 0.0)):
        x = (base + 0.5 * worlds.noise(9)).astype(descriptors.numpy_dtype(dtype))
        (layer,) = analyze(worlds.write(tmp_path / dtype, {"w": x})).layers
        relative = layer["floor"] / layer["singular_values"][0]
        assert least <= relative < 0.3 and (least or relative < 1e-6)


@pytest.mark.slow
def test_base_is_subtracted_in_the_wider_dtype_and_keeps_its_rounding(tmp_path):
    from jaxsub import descriptors

    rng = np.random.default_rng(0)
    base = rng.standard_normal((40, 30))
    models = (base + 1e-3 * rng.standard_normal((12, 40, 30))).astype(descriptors.numpy_dtype("bfloat16"))
    safetensors.write(str(tmp_path / "base.safetensors"), {"w": base.astype(np.float32)}, None)
    folder = worlds.write(tmp_path / "c", {"w": models})
    (layer,) = analyze(folder, base=str(tmp_path / "base.safetensors")).layers
    rows = (models.astype(np.float64) - base.astype(np.float32)).reshape(12, -1)
    want = np.linalg.svd(rows - rows.mean(0), compute_uv=False)[:11]
    np.testing.assert_allclose(layer["singular_values"], want, rtol=1e-6)
    # What is left of differences of 1e-3 in bfloat16 is rounding, and is not called anything else.
    assert layer["verdict"] == "undetermined" and "saturated" in layer["flags"]
    base[3, 4] = np.nan
    safetensors.write(str(tmp_path / "base.safetensors"), {"w": base.astype(np.float32)}, None)
    with pytest.raises(errors.InputError, match=r"base\.safetensors.*NaN"):
        analyze(folder, base=str(tmp_path / "base.safetensors"))


@pytest.mark.slow
def test_copies_of_a_model_that_is_not_finite_go_with_it(tmp_path):
    x = worlds.noise(60)
    x[7, 0, 0] = np.nan
    folder = worlds.write(tmp_path / "c", {"w": x})
    for n in (1, 2):
        (folder / f"copy{n}.safetensors").write_bytes((folder / "m007.safetensors").read_bytes())
    collection = analyze(folder)["collection"]
    assert sorted(q["id"] for q in collection["quarantined"]) == ["copy1", "copy2", "m007"]
    assert collection["num_models"] == collection["num_distinct"] == 59 and collection["duplicates"] == []


@pytest.mark.slow
def test_a_layer_left_with_two_models_is_skipped_and_listed(tmp_path):
    x, rare = worlds.noise(9), worlds.noise(3, (6, 5))
    rare[1, 2, 2] = np.inf
    folder = worlds.write(tmp_path / "c", {"w": x[:6]})
    for n in range(3):
        safetensors.write(str(folder / f"z{n}.safetensors"), {"w": x[6 + n], "rare": rare[n]}, None)
    report = analyze(folder)
    assert [v["name"] for v in report.layers] == ["w"] and report.layers[0]["num_models"] == 8
    assert [s["name"] for s in report["collection"]["skipped_layers"]] == ["rare"]


def test_statistics_are_reused_and_a_changed_file_is_read_again(tmp_path):
    folder, workdir = worlds.write(tmp_path / "c", {"w": worlds.noise(12)}), str(tmp_path / "out")
    first = analyze(folder, workdir=workdir)
    again = analyze(folder, workdir=workdir)
    assert first["provenance"]["bytes_read"] == 12 * 24 * 16 * 4 and again["provenance"]["bytes_read"] == 0
    assert again.layers == first.layers
    assert sorted(os.listdir(workdir))[:1] == [".jaxsub.lock"] and os.path.exists(f"{workdir}/report.html")
    safetensors.write(str(folder / "m003.safetensors"), {"w": worlds.noise(1, seed=77)[0]}, None)
    with pytest.raises(errors.WorkdirError, match="model m003 changed"):
        analyze(folder, workdir=workdir)
    changed = analyze(folder, workdir=workdir, restart=True)
    assert changed["provenance"]["bytes_read"] > 0 and changed.layers != first.layers


def test_damaged_statistics_are_read_again(tmp_path):
    folder, workdir = worlds.write(tmp_path / "c", {"w": worlds.noise(12)}), tmp_path / "out"
    first = analyze(folder, workdir=str(workdir))
    (file,) = (workdir / "statistics").iterdir()
    file.write_bytes(file.read_bytes()[:-9])
    assert analyze(folder, workdir=str(workdir)).layers == first.layers


def test_layers_do_not_depend_on_one_another(tmp_path):
    stacks = {"a": worlds.noise(12), "b": worlds.noise(12, seed=3)}
    folder = worlds.write(tmp_path / "c", stacks)
    both, alone = analyze(folder), analyze(folder, layers=("b",))
    for key in ("singular_values", "held_out", "nulls", "modes", "stability", "verdict"):
        assert alone.layers[0][key] == both.layers[1][key], key


def test_base_is_subtracted(tmp_path):
    base = worlds.noise(1, seed=8)[0]
    x = worlds.planted(12)
    folder = worlds.write(tmp_path / "c", {"w": base + x})
    safetensors.write(str(tmp_path / "base.safetensors"), {"w": base}, None)
    layer = analyze(folder, base=str(tmp_path / "base.safetensors")).layers[0]
    plain = analyze(worlds.write(tmp_path / "d", {"w": x})).layers[0]
    np.testing.assert_allclose(layer["uncentred_singular_values"], plain["uncentred_singular_values"], rtol=1e-5)


def test_dry_run_reads_no_weights(tmp_path):
    folder = worlds.write(tmp_path / "c", {"w": worlds.noise(12)})
    plan = analyze(folder, dry_run=True, workdir=str(tmp_path / "out"))
    assert "18.0 KiB" in plan and not (tmp_path / "out").exists()


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    from jaxsub.pipelines import workdir

    with workdir.hold(str(tmp_path / "out"), {"a": 1}):
        with pytest.raises(errors.WorkdirError, match="in use by another run .*pid"):
            with workdir.hold(str(tmp_path / "out"), {"a": 1}):
                pass
    with workdir.hold(str(tmp_path / "out"), {"a": 1}):
        pass  # a finished run holds nothing


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4, 8])
def test_the_whole_report_agrees_across_devices(tmp_path, devices):
    folder = worlds.write(tmp_path / "c", {"w": worlds.planted(18), "v": worlds.noise(18, (5, 7, 3))})
    one, many = analyze(folder, devices=1), analyze(folder, devices=devices)
    for a, b in zip(one.layers, many.layers, strict=True):
        np.testing.assert_allclose(a["singular_values"], b["singular_values"], rtol=1e-10)
        assert a["verdict"] == b["verdict"] and a["held_out"] == pytest.approx(b["held_out"], abs=1e-9)
        s, t = (np.array(layer["singular_values"]) for layer in (a, b))
        ratio = float(np.abs(s - t).max() / (s[0] * len(s) * 2.0**-23))
        record("DET-2", f"analysis on {devices} devices and on one: largest difference of values, ratio", ratio)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4, 8])
def test_the_report_of_low_rank_updates_agrees_across_devices(tmp_path, devices):
    """Ranks 2 and 3 of 19 models: on eight devices blocks of models that are none."""
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((30, 4)), rng.standard_normal((4, 40))
    for n in range(19):
        b, a = left @ rng.standard_normal((4, 2 + n % 2)), rng.standard_normal((2 + n % 2, 4)) @ right
        b, a = ((x + rng.standard_normal(x.shape)).astype(np.float32) for x in (b, a))
        peft.write(tmp_path / f"m{n:02d}", {"q": (a, b, 4, 2 + n % 2)})
    one, many = (analyze(str(tmp_path), devices=d).layers[0] for d in (1, devices))
    np.testing.assert_allclose(one["singular_values"], many["singular_values"], rtol=1e-6)
    assert one["verdict"] == many["verdict"] and one["held_out"] == pytest.approx(many["held_out"], abs=1e-6)
    for a, b in zip(one["modes"], many["modes"], strict=True):
        assert a["energy_at"] == pytest.approx(b["energy_at"], abs=1e-5)


def test_values_that_no_run_could_use_are_refused_before_anything_is_read(tmp_path):
    folder = worlds.write(tmp_path / "c", {"w": worlds.noise(12)})
    for options in ({"draws": 0}, {"nulls": ("foo",)}, {"view": "difference"}, {"view": "lora_factors"}, {"seed": -1}):
        with pytest.raises(errors.ConfigError):
            analyze(folder, workdir=str(tmp_path / "out"), **options)
    assert not (tmp_path / "out" / "run.json").exists()


def test_a_workdir_in_the_collection_is_not_read_as_models(tmp_path):
    folder = worlds.write(tmp_path / "c", {"w": worlds.noise(12)})
    first = analyze(folder, workdir=str(folder))
    assert analyze(folder, workdir=str(folder)).layers == first.layers
    assert jaxsub.open_collection(str(folder)).fingerprint == first["provenance"]["collection_fingerprint"]


def test_a_workdir_beside_models_that_are_folders_is_none_of_them(tmp_path):
    folder, rng = tmp_path / "c", np.random.default_rng(0)
    for n in range(9):
        (folder / f"m{n}").mkdir(parents=True)
        tensors = {"w": rng.standard_normal((6, 5)).astype(np.float32)}
        safetensors.write(str(folder / f"m{n}" / "model.safetensors"), tensors)
    first = analyze(folder, workdir=str(folder / "out"))
    again = analyze(folder, workdir=str(folder / "out"))
    assert again.layers == first.layers and not again["collection"]["quarantined"]
    assert again["provenance"]["bytes_read"] == 0


@pytest.mark.slow
def test_models_of_another_kind_change_no_figure_and_are_mentioned(tmp_path):
    x = worlds.planted(30, k=8, seed=6)
    alone = analyze(worlds.write(tmp_path / "a", {"w": x}))
    worlds.write(tmp_path / "b" / "first", {"w": x})
    worlds.write(tmp_path / "b" / "second", {"other": worlds.noise(40, (9, 7))})
    mixed = analyze(tmp_path / "b")
    layer = next(v for v in mixed.layers if v["name"] == "w")
    assert (layer["verdict"], layer["lineages"]) == (alone.layers[0]["verdict"], 0)
    (warning,) = [w for w in mixed["collection"]["warnings"] if "share no layer" in w]
    assert "40 like second/m000, 30 like first/m000" in warning


@pytest.mark.slow
def test_factors_that_few_models_have_are_listed_as_skipped(tmp_path):
    rng = np.random.default_rng(0)
    for n, r in enumerate([4] * 8 + [2] * 2):
        a, b = rng.standard_normal((r, 20)), rng.standard_normal((24, r))
        peft.write(str(tmp_path / f"m{n}"), {"q": (a.astype("f4"), b.astype("f4"), 8, r)})
    report = analyze(tmp_path, view="lora_factors")
    assert {v["name"]: (v["shape"], v["num_models"]) for v in report.layers} == {
        "q.lora_A": ([4, 20], 8),
        "q.lora_B": ([24, 4], 8),
    }
    reason = "fewer than 3 models have it in this shape"
    assert report["collection"]["skipped_layers"] == [
        {"name": "q.lora_A", "shape": [2, 20], "num_models": 2, "reason": reason},
        {"name": "q.lora_B", "shape": [24, 2], "num_models": 2, "reason": reason},
    ]


def test_the_report_bears_the_name_of_the_folder(tmp_path):
    report = analyze(worlds.write(tmp_path / "wake & <words>", {"w": worlds.noise(12)}))
    assert report["collection"]["name"] == "wake & <words>"
    assert "<title>wake &amp; &lt;words&gt; · jaxsub report</title>" in report.html()


@pytest.mark.slow
def test_models_that_differ_in_one_entry_are_no_copies(tmp_path):
    """The samples that tell models apart are from the middle of a layer; the one entry is not."""
    x = worlds.noise(10, (64, 64))
    x[1], x[2], x[3] = x[0], x[0], x[0]
    x[6] = x[5]
    x[2, 0, 0] += 1
    x[6, 0, 1] += 1
    collection = analyze(worlds.write(tmp_path / "c", {"w": x}))["collection"]
    assert collection["duplicates"] == [["m000", "m001", "m003"]] and collection["num_distinct"] == 8
    assert sorted(sorted(p[:2]) for p in collection["near_duplicates"]) == [["m000", "m002"], ["m005", "m006"]]
