"""The stage against the model itself; old calibrations; what reaches file, table and artifact."""

from functools import partial

import pytest
import torch

from kvcalib.allocation.shares import SHARES
from kvcalib.allocation.weights import ALPHAS
from kvcalib.artifact import store
from kvcalib.calibration.statistics import Calibration
from kvcalib.cli.tables import print_friendliness
from kvcalib.files import read_json, write_tensors
from kvcalib.rundir import CALIBRATION, FRIENDLINESS, RunDir
from kvcalib.stages import build, fit_nuq, friendliness
from kvcalib.stages.fit_nuq import Codebooks
from tests.tiny import as_of, calibrate, make_run, tiny_llama, tokens

LENGTH, MIDDLE, SEQUENCES = 96, 48, 6


def run_of(folder, model, **fit) -> RunDir:
    """A run whose calibration keeps every token."""
    run = RunDir(folder, create=True)
    calibrate(model, SEQUENCES, LENGTH, keep=SEQUENCES * LENGTH).save(run.file(CALIBRATION))
    run.finish("fisher", {"seed": 0}, [CALIBRATION])
    fit_nuq.run(run, fit_nuq.FitNuqSettings(**fit))
    return run


def attention_of(model, layer, quantizer=None):
    """Weights `[B, Hq, T, T]` of one layer, its keys before RoPE sent through `quantizer`."""

    def store_and_read(quantizer, _module, _args, out):
        x = out.flatten(0, 1).unflatten(-1, (2, 16))
        return quantizer.decode(quantizer.encode(x, torch.float16)).flatten(1).view_as(out)

    handles = []
    if quantizer is not None:
        projection = model.model.layers[layer].self_attn.k_proj
        handles.append(projection.register_forward_hook(partial(store_and_read, quantizer)))
    with torch.no_grad():
        weights = model(tokens(SEQUENCES, LENGTH, 1), output_attentions=True).attentions[layer]
    for handle in handles:
        handle.remove()
    return weights


@pytest.mark.parametrize("layer", [0, 1])
def test_overlap_is_what_the_model_with_quantized_keys_chooses(tmp_path, layer):
    model = tiny_llama()
    run = run_of(tmp_path, model)
    record, _ = Calibration.load(run.file(CALIBRATION))
    model.set_attn_implementation("eager")
    codebooks = Codebooks.load(run)
    for bits, within in ((2, 0.12), (4, 0.05)):
        (found,) = friendliness.measure(codebooks, record, {layer: {"key": bits, "value": bits}})
        free = range(4, MIDDLE - round(0.05 * MIDDLE))
        k = round(0.2 * len(free))
        tops = []
        for quantizer in (None, codebooks.quantizer(layer, "key", bits)):
            drawn = attention_of(model, layer, quantizer)[:, :, :MIDDLE, :MIDDLE].unflatten(1, (2, 2)).sum((2, 3))
            mean = drawn / (MIDDLE - torch.arange(MIDDLE))
            tops.append([[set(sorted(free, key=lambda t: -row[t])[:k]) for row in heads] for heads in mean.tolist()])
        for head in (0, 1):
            true = sum(len(a[head] & b[head]) / k for a, b in zip(*tops, strict=True)) / SEQUENCES
            assert found.selection.by_head[head] == pytest.approx(true, abs=within)
            assert true < 1 or bits == 4


def test_more_bits_keep_more_heavy_hitters_and_shares_average_to_one(tmp_path):
    # Error feedback spends plain accuracy of keys for a smaller loss, more so at few bits.
    table = friendliness.run(run_of(tmp_path, tiny_llama(), feedback=False))
    for layer in table["layers"]:
        overlaps = [layer["bits"][bits]["selection"]["overlap"] for bits in ("2", "3", "4", "8")]
        assert overlaps == sorted(overlaps)
        assert overlaps[0] < overlaps[-1]
        chosen = layer["chosen"]
        assert chosen["selection"]["alpha"] in ALPHAS
        assert chosen["selection"]["share"] in SHARES
        for role in ("key", "value"):
            assert sum(chosen[role]["by_head"]) / 2 == pytest.approx(chosen[f"{role}_error"])
            assert all(low < middle < high for low, middle, high in chosen[role]["quantiles"])
    assert sum(layer["chosen"]["selection"]["share"] for layer in table["layers"]) == pytest.approx(2)


def test_figures_of_the_chosen_bits_are_in_the_artifact(tmp_path):
    run = run_of(tmp_path / "run", tiny_llama(), key_bits=2, value_bits=4)
    table = friendliness.run(run)
    assert table["chosen"] == [2, 4]
    build.run(run, tmp_path / "artifact")
    for spec, row in zip(store.read_manifest(tmp_path / "artifact").layers, table["layers"], strict=True):
        chosen = row["chosen"]
        assert spec.friendliness.key_by_head == pytest.approx(row["bits"]["2"]["key"]["by_head"])
        assert spec.friendliness.value_by_head == pytest.approx(row["bits"]["4"]["value"]["by_head"])
        assert spec.friendliness.key_error == pytest.approx(chosen["key_error"])
        for name in ("overlap", "alpha", "share"):
            assert getattr(spec.friendliness, name) == chosen["selection"][name]


def test_widths_by_channel_and_exact_layers(tmp_path):
    run = run_of(tmp_path / "run", tiny_llama())
    record, _ = Calibration.load(run.file(CALIBRATION))
    codebooks = Codebooks.load(run)
    uniform = torch.full((2, 16), 3, dtype=torch.uint8)
    (found,) = friendliness.measure(codebooks, record, {1: {"key": uniform, "value": 3}})
    (same,) = friendliness.measure(codebooks, record, {1: {"key": 3, "value": 3}})
    assert found == same
    # The budget of the layers that are there.
    assert found.selection.share == 1
    widths = {
        (layer, role): uniform.clone() if layer else uniform * 0 + 16 for layer in (0, 1) for role in fit_nuq.ROLES
    }
    build.run(run, tmp_path / "artifact", widths=widths)
    (spec,) = store.read_manifest(tmp_path / "artifact").layers
    assert (spec.index, spec.friendliness.share) == (1, 1)


def test_a_calibration_of_before_leaves_the_weights_of_eviction_out(tmp_path, capsys):
    run = make_run(tmp_path / "run", tiny_llama(), feedback=False)
    record, _ = Calibration.load(run.file(CALIBRATION))
    info, tensors = as_of(3, record)
    write_tensors(run.file(CALIBRATION), tensors, {"info": info, "extra": None})
    friendliness.run(run)
    assert all(layer["chosen"]["selection"] is None for layer in read_json(run.file(FRIENDLINESS))["layers"])
    print_friendliness(run.path)
    shown = " ".join(capsys.readouterr().out.split())
    assert "run `kvcalib fisher` again with --overwrite" in shown
    build.run(run, tmp_path / "artifact")
    raw = (tmp_path / "artifact/manifest.json").read_text()
    assert '"key_by_head"' in raw
    for name in ("overlap", "alpha", "share"):
        assert f'"{name}"' not in raw


def test_too_few_sampled_tokens_give_errors_only(tmp_path):
    run = RunDir(tmp_path, create=True)
    calibrate(tiny_llama(), keep=20).save(run.file(CALIBRATION))
    run.finish("fisher", {"seed": 0}, [CALIBRATION])
    fit_nuq.run(run, fit_nuq.FitNuqSettings())
    table = friendliness.run(run)
    assert [layer["chosen"]["selection"] for layer in table["layers"]] == [None, None]
    assert table["layers"][0]["chosen"]["key_error"] > 0
