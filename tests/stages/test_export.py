"""Stage `export` on a small run: scales hold the model's own rotated keys, formats are the best plan."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import DynamicCache

from kvcalib.artifact import store
from kvcalib.errors import InputError
from kvcalib.quant import floats
from kvcalib.rundir import RunDir
from kvcalib.stages import build, export
from kvcalib.stages.export import ExportSettings, bits_of, of_artifact, of_run, with_formats
from tests.tiny import make_run, tiny_llama, tokens


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A run of three layers, the middle one left out, and its artifact."""
    folder = tmp_path_factory.mktemp("export")
    run = make_run(folder / "run", tiny_llama(num_hidden_layers=4), layers=[0, 2, 3])
    build.run(run, folder / "artifact")
    return folder


@pytest.fixture(scope="module")
def measured(home):
    return of_run(RunDir(home / "run"))


def test_scales_hold_what_the_model_caches(home, measured):
    model = tiny_llama(num_hidden_layers=4)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens(4, 48, 1), past_key_values=cache)  # the calibration's own tokens, keys rotated
    for layer in measured.layers:
        stored = cache.layers[layer.index]
        for x, scale in ((stored.keys, layer.key_scale), (stored.values, layer.value_scale)):
            assert float(x.abs().max()) <= floats.E4M3_MAX * scale
            error = (floats.fp8(x, scale) - x).norm() / x.norm()
            assert 0.01 < error < 0.04
        assert layer.shared_scale * floats.E4M3_MAX >= max(
            float(stored.keys.abs().max()), float(stored.values.abs().max())
        )


def test_losses(measured):
    for layer in measured.layers:
        assert 0 < layer.losses["FP8"] < layer.losses["NVFP4"]
        assert 5 < layer.losses["NVFP4"] / layer.losses["FP8"] < 40


def test_formats_are_the_best_plan(measured):
    sizes = {"NVFP4": 4.5, "FP8": 8.0, None: 16.0}
    for budget in (4.5, 5.7, 6.0, 8.0, 9.5, 12.0, 16.0):
        chosen = with_formats(measured, budget)
        assert bits_of(chosen) <= budget + 1e-9
        loss = sum(layer.losses[layer.format] if layer.format else 0.0 for layer in chosen.layers)
        best = min(
            sum(layer.losses[f] if f else 0.0 for layer, f in zip(measured.layers, plan, strict=True))
            for plan in itertools.product(sizes, repeat=3)
            if sum(sizes[f] for f in plan) <= 3 * budget + 1e-9
        )
        assert loss == pytest.approx(best)
    assert {layer.format for layer in with_formats(measured, 4.5).layers} == {"NVFP4"}
    assert {layer.format for layer in with_formats(measured, 16).layers} == {None}


def test_an_artifacts_losses_are_estimated(home):
    facts = of_artifact(home / "artifact")
    manifest = store.read_manifest(home / "artifact")
    weights = [
        sum(part.predicted_loss * 4**part.mean_bits for part in (spec.key, spec.value)) for spec in manifest.layers
    ]
    for layer, weight in zip(facts.layers, weights, strict=True):
        assert layer.losses["NVFP4"] / layer.losses["FP8"] == pytest.approx(8.9e-3 / 6.9e-4)
        assert layer.losses["FP8"] / facts.layers[0].losses["FP8"] == pytest.approx(weight / weights[0])


def test_every_target_from_where_it_can_be_made(home, tmp_path):
    for source, target in (
        ("run", "modelopt"), ("artifact", "modelopt"), ("run", "vllm-scales"), ("run", "sglang-scales"),
        ("artifact", "hf"),
    ):  # fmt: skip
        first = export.run(home / source, target, tmp_path / source / target)
        assert all(path.is_file() for path in first.paths)
        again = export.run(home / source, target, tmp_path / "again" / source / target)
        assert [p.read_bytes() for p in first.paths] == [p.read_bytes() for p in again.paths]
    scales = load_file(tmp_path / "run/vllm-scales/kv_scales.safetensors")
    assert {int(name.split(".")[2]) for name in scales} == {0, 2, 3}
    ranks = json.loads((tmp_path / "run/sglang-scales/kv_cache_scales.json").read_bytes())["kv_cache"]["scaling_factor"]
    assert ranks["0"]["1"] == 1.0


def test_exports_of_an_artifact_lie_inside_it(home, tmp_path):
    build.run(RunDir(home / "run"), tmp_path / "a")
    done = export.run(tmp_path / "a", "hf")
    assert done.paths == [tmp_path / "a/exports/cache_config.json"]
    assert set(store.contents(tmp_path / "a")[1]) == {
        "manifest.json", "tensors.safetensors", "README.md", "exports/cache_config.json",
    }  # fmt: skip


def test_what_cannot_be_exported_is_refused(home, tmp_path):
    for source, target, message in (
        (home / "run", "gguf", "--to is 'gguf', expected one of modelopt, vllm-scales, sglang-scales, hf"),
        (home / "artifact", "vllm-scales", r"holds no sample.*give --to vllm-scales the run"),
        (home / "run", "hf", r"is a run.*kvcalib build"),
        (tmp_path, "hf", "neither a run"),
        (tmp_path / "nothing", "hf", "no such folder"),
    ):
        with pytest.raises(InputError, match=message):
            export.run(source, target, tmp_path / "out")
    with pytest.raises(InputError, match="every layer stays unquantized"):
        export.run(home / "run", "modelopt", tmp_path / "out", ExportSettings(effective_bits=16))
    assert not (tmp_path / "out").exists()
