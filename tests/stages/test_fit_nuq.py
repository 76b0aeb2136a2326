from dataclasses import replace

import pytest
import torch

from kvcalib.calibration.statistics import Calibration
from kvcalib.errors import CorruptFile, InputError
from kvcalib.files import write_tensors
from kvcalib.quant.basis import Basis
from kvcalib.quant.feedback import Feedback
from kvcalib.rundir import CALIBRATION, RunDir
from kvcalib.runtime.loader import load
from kvcalib.stages import build, fit_nuq, friendliness
from kvcalib.stages.fit_nuq import Choices, Codebooks, FitNuqSettings, Option
from tests.tiny import as_of, calibrate, make_run, tiny_llama


def test_loss_of_every_width_is_recorded_and_falls_with_bits(tmp_path):
    run = make_run(tmp_path, tiny_llama())
    codebooks = Codebooks.load(run)
    for layer in (0, 1):
        for role in fit_nuq.ROLES:
            loss = codebooks.get(layer, role, "loss")
            assert loss.shape == (9, 2, 16)
            total = loss.sum((1, 2))
            assert (total[1:7] < total[:6]).all()
            assert (total[1:] <= total[:-1]).all()
            assert total[0] > 0


@pytest.mark.parametrize("change", [{"granularity": "layer"}, {"format": "nf"}, {"qnorm": False}, {"outliers": 0.0},
                                    {"choices": Choices(outliers=(0.0,))},
                                    {"weights": "none"}, {"value_basis": "pca"}, {"value_scale": "head"},
                                    {"sinks": 3}])  # fmt: skip
def test_every_setting_changes_the_codebooks(tmp_path, change):
    model = tiny_llama()
    default, other = (Codebooks.load(make_run(tmp_path / n, model, **c)).tensors for n, c in (("a", {}), ("b", change)))
    assert set(default) != set(other) or any(not torch.equal(default[n], other[n]) for n in default)


def test_bits_alone_fit_nothing_anew_and_reach_the_artifact(tmp_path, capsys):
    run = make_run(tmp_path / "run", tiny_llama())
    before = Codebooks.load(run).tensors
    after = fit_nuq.run(run, FitNuqSettings(key_bits=2, value_bits=5, feedback=False, value_basis="none"))
    assert "up to date" in capsys.readouterr().err
    assert all(torch.equal(before[n], after.tensors[n]) for n in before)
    manifest = build.run(run, tmp_path / "artifact")
    assert manifest.mean_bits == (2, 5)


def test_error_feedback_reaches_the_artifact(tmp_path):
    run = make_run(tmp_path / "run", tiny_llama(), feedback=True)
    manifest = build.run(run, tmp_path / "artifact")
    assert manifest.feedback
    calibration, _ = Calibration.load(run.file(CALIBRATION))
    for layer, pair in load(tmp_path / "artifact").quantizers.items():
        for role, quantizer in pair.items():
            expected = Feedback.from_curvature(calibration.curvature(layer, role).float(), quantizer.layout.widths)
            assert torch.equal(quantizer.feedback.triangle, expected.triangle)


def test_values_along_their_axes_reach_the_artifact(tmp_path):
    """Axes of the sample without sinks; weights, losses and feedback are of what lies along them."""
    run = make_run(tmp_path / "run", tiny_llama(), feedback=True, value_basis="pca", sinks=2, outliers=0.0)
    assert build.run(run, tmp_path / "artifact").basis
    calibration, _ = Calibration.load(run.file(CALIBRATION))
    keep = calibration.tensors["sample.position"] >= 2
    for layer, pair in load(tmp_path / "artifact").quantizers.items():
        made, sample = pair["value"], calibration.layer(layer)
        x, gradient = sample["sample.value"][keep], sample["sample.value_gradient"][keep]
        assert pair["key"].basis is None
        assert not made.relative
        assert torch.equal(made.basis.matrix, Basis.principal(x).matrix)
        axes = made.basis.matrix.double()
        curvature = axes.transpose(1, 2) @ calibration.curvature(layer, "value") @ axes
        assert torch.allclose(made.weight.double(), curvature.diagonal(dim1=1, dim2=2), rtol=1e-5)
        expected = Feedback.from_curvature(curvature.float(), made.layout.widths).triangle
        assert torch.allclose(made.feedback.triangle, expected, atol=1e-4)
        turned, fisher = (torch.einsum("nhd,hde->nhe", t.double(), axes) for t in (x, gradient))
        nearest = replace(made, feedback=None)
        error = nearest.decode(nearest.encode(turned.float(), torch.float16)).double() - turned
        loss = (fisher.square() * error.square()).mean(0) / 2
        assert torch.allclose(loss, Codebooks.load(run).get(layer, "value", "loss")[3].double(), rtol=1e-3, atol=1e-12)


def test_values_along_their_axes_need_gradients_with_their_sign(tmp_path):
    run = make_run(tmp_path / "run", tiny_llama())
    info, tensors = as_of(6, Calibration.load(run.file(CALIBRATION))[0])
    write_tensors(run.file(CALIBRATION), tensors, {"info": info, "extra": None})
    with pytest.raises(InputError, match=r"version 6.*(?s:.*)--overwrite, or pass --value-basis none"):
        fit_nuq.run(run, FitNuqSettings())
    fit_nuq.run(run, FitNuqSettings(value_basis="none", sinks=1))


def test_error_feedback_needs_a_calibration_with_second_moments(tmp_path):
    run = make_run(tmp_path / "run", tiny_llama())
    record, _ = Calibration.load(run.file(CALIBRATION))
    info, tensors = as_of(5, record)
    write_tensors(run.file(CALIBRATION), tensors, {"info": info, "extra": None})
    with pytest.raises(InputError, match=r"version 5.*(?s:.*)fisher` again with --overwrite, or pass --no-feedback"):
        fit_nuq.run(run, FitNuqSettings(value_basis="none"))
    fit_nuq.run(run, FitNuqSettings(value_basis="none", feedback=False, sinks=1))


def test_codebooks_of_another_version_are_not_used(tmp_path):
    run = make_run(tmp_path / "run", tiny_llama())
    record = run.settings("fit-nuq")
    run.finish("fit-nuq", record | {"stage_version": fit_nuq.STAGE_VERSION - 1}, ["codebooks.safetensors"])
    with pytest.raises(
        InputError, match=f"stage version {fit_nuq.STAGE_VERSION - 1}, expected {fit_nuq.STAGE_VERSION}"
    ):
        build.run(run, tmp_path / "artifact")
    assert not (tmp_path / "artifact").exists()


def test_codebooks_of_another_calibration_are_not_used(tmp_path):
    run = make_run(tmp_path / "run", tiny_llama())
    calibrate(tiny_llama(), seed=1).save(run.file(CALIBRATION))
    run.finish("fisher", {"seed": 1}, [CALIBRATION])
    for stage in (lambda: build.run(run, tmp_path / "artifact"), lambda: friendliness.run(run)):
        with pytest.raises(InputError, match="fitted on another calibration"):
            stage()
    assert not (tmp_path / "artifact").exists()


def test_the_layers_predicted_loss_and_friendliness_reach_the_manifest(tmp_path):
    run = make_run(tmp_path / "run", tiny_llama())
    table = friendliness.run(run)
    manifest = build.run(run, tmp_path / "artifact")
    for layer, row in zip(manifest.layers, table["layers"], strict=True):
        figures = row["bits"]["3"]
        assert layer.friendliness.key_error == pytest.approx(figures["key_error"])
        assert layer.key.predicted_loss + layer.value.predicted_loss == pytest.approx(figures["predicted_loss"])
        assert row["bits"]["2"]["friendliness"] < figures["friendliness"] < row["bits"]["8"]["friendliness"]


def test_nan_in_a_calibration_names_layer_and_stage(tmp_path):
    run = RunDir(tmp_path, create=True)
    record = calibrate(tiny_llama())
    record.tensors["layers.1.sample.value"][0, 0, 0] = float("nan")
    record.save(run.file(CALIBRATION))
    run.finish("fisher", {"seed": 0}, [CALIBRATION])
    with pytest.raises(CorruptFile, match=r"layers\.1\.sample\.value holds NaN or infinity"):
        fit_nuq.run(run, FitNuqSettings())
    assert run.record("fit-nuq") is None


def test_sinks_that_leave_no_tokens_are_refused(tmp_path):
    run = make_run(tmp_path, tiny_llama())
    with pytest.raises(InputError, match="--sinks 48"):
        fit_nuq.run(run, FitNuqSettings(sinks=48))


def test_lloyd_fits_only_nuq(tmp_path):
    run = make_run(tmp_path, tiny_llama())
    with pytest.raises(InputError, match="--solver lloyd"):
        fit_nuq.run(run, FitNuqSettings(solver="lloyd", format="int"))


def named(*options):
    return [Option(outliers=share, scope=scope) for share, scope in options]


def test_options_that_are_stored_alike_are_one():
    """128 elements: 1 % is 2 of a token and 1 of a head; ranks per head only for scales or shorter indices."""
    settings = FitNuqSettings(choices=Choices(), value_basis="none")
    token = [(0.01, "token"), (0.0, "token"), (0.005, "token"), (0.02, "token")]
    assert settings.options("key", 2, 64) == named(*token)
    assert settings.options("value", 2, 64) == named(*token, (0.0, "head"), (0.005, "head"), (0.02, "head"))
    assert settings.options("key", 8, 128) == named(*token, (0.005, "head"), (0.01, "head"), (0.02, "head"))
    turned = FitNuqSettings(choices=Choices())
    for shape in ((2, 64), (8, 128)):
        assert turned.options("value", *shape) == settings.options("key", *shape)
    ranked = FitNuqSettings(key_outlier_scope="head")
    assert ranked.options("key", 2, 64) == named((0.01, "head"), (0.0, "token"))
    assert ranked.model_copy(update={"choices": None}).options("key", 2, 64) == named((0.01, "head"))


def test_an_option_is_what_a_fit_of_it_alone_gives(tmp_path):
    model = tiny_llama()
    many = Codebooks.load(make_run(tmp_path / "many", model, choices=Choices(outliers=(0.0, 0.05))))
    alone = Codebooks.load(make_run(tmp_path / "alone", model, outliers=0.05, value_scale="head"))
    chosen = many.under({(1, "value"): Option(outliers=0.05, scope="head")})
    for name in ("ladder", "loss", "weight"):
        assert torch.equal(chosen.get(1, "value", name), alone.get(1, "value", name))
    assert not torch.equal(many.get(1, "value", "ladder"), alone.get(1, "value", "ladder"))
    quantizer = chosen.quantizer(1, "value", 3)
    assert (quantizer.scope, quantizer.outliers) == ("head", 1)
