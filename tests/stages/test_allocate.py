"""The stage `allocate`: budgets in every byte, and artifacts of many widths from it."""

import xml.etree.ElementTree as ET

import pytest
import torch

import kvcalib
from kvcalib.allocation import qaq
from kvcalib.allocation.sensitivity import head_statistics
from kvcalib.calibration.statistics import Calibration, norm_quantile
from kvcalib.errors import InputError
from kvcalib.evaluation.perplexity import evaluate
from kvcalib.files import write_tensors
from kvcalib.rundir import CALIBRATION, RunDir
from kvcalib.stages import allocate, build, fit_nuq, options
from kvcalib.stages.allocate import AllocateSettings
from kvcalib.stages.fit_nuq import Choices, Codebooks, Option
from tests.tiny import as_of, calibrate, make_run, tiny_family, tiny_llama, tokens


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("allocate") / "run", model, outliers=0.05)


@pytest.mark.parametrize("group", [0, 16])
@pytest.mark.parametrize("budget", [3.5, 4.75, 6.0])
def test_a_budget_counts_every_byte(model, run, tmp_path, budget, group):
    found, widths = allocate.run(run, AllocateSettings(budget=budget, group=group))
    assert budget - 0.3 < found.effective_bits <= budget
    build.run(run, tmp_path / "a", widths=widths, options=found.options)
    artifact = kvcalib.load(tmp_path / "a")
    kvcalib.attach(model, artifact)
    cache = artifact.new_cache(model)
    with torch.no_grad():
        model(tokens(1, 400), past_key_values=cache)
    kvcalib.detach(model)
    assert cache.effective_bits() == pytest.approx(found.effective_bits, abs=1e-9)
    for layer, pair in artifact.quantizers.items():
        for role, quantizer in pair.items():
            assert torch.equal(quantizer.layout.widths, widths[layer, role])
    spec = artifact.manifest.layers[0].key
    assert spec.group == (16 if group else spec.group)


def test_mean_widths_and_the_curve(run):
    found, widths = allocate.run(run, AllocateSettings(widths=2.0, group=0))
    assert found.mean_width == 2.0
    assert sum(int(w.sum()) for w in widths.values()) == 2 * sum(w.numel() for w in widths.values())
    losses = [loss for _, loss in found.curve]
    assert losses == sorted(losses, reverse=True)
    again, same = allocate.load(run)
    assert again == found
    assert all(torch.equal(same[name], w) for name, w in widths.items())


@pytest.mark.parametrize("budget", [0.5, 12.0])
def test_budgets_that_cannot_be_met_say_which_can(run, budget):
    with pytest.raises(InputError, match=rf"budget is {budget:g} effective bits; .* the smallest plan has .* largest"):
        allocate.run(run, AllocateSettings(budget=budget))


def test_widths_of_other_codebooks_are_refused(run, model, tmp_path):
    mine = make_run(tmp_path / "run", model)
    with pytest.raises(InputError, match=r"allocate"):
        allocate.load(mine)
    allocate.run(mine, AllocateSettings(widths=3.0))
    fit_nuq.run(mine, fit_nuq.FitNuqSettings(outliers=0.05))
    with pytest.raises(InputError, match=r"other codebooks .* run `kvcalib allocate`"):
        allocate.load(mine)


def test_exactly_one_target():
    for wrong in ({}, {"budget": 2.5, "widths": 2.0}):
        with pytest.raises(ValueError, match="one of --budget"):
            AllocateSettings(**wrong)


def live_bits(model, artifact, length=400):
    kvcalib.attach(model, artifact)
    cache = artifact.new_cache(model)
    with torch.no_grad():
        model(tokens(1, length), past_key_values=cache)
    kvcalib.detach(model)
    return cache


def test_a_layer_kept_exact_counts_in_plan_eval_and_cache(model, run, tmp_path):
    found, widths = allocate.run(run, AllocateSettings(budget=10.0, exact_layers=(1,)))
    assert [layer.exact for layer in found.layers] == [False, True]
    assert found.layers[1].key_loss == found.layers[1].value_loss == 0
    assert 9.4 < found.effective_bits <= 10.0
    assert found.mean_width == pytest.approx(float(torch.cat([widths[0, r] for r in fit_nuq.ROLES]).float().mean()))
    manifest = build.run(run, tmp_path / "a", widths=widths, options=found.options)
    assert [layer.index for layer in manifest.layers] == [0]
    artifact = kvcalib.load(tmp_path / "a")
    cache = live_bits(model, artifact)
    assert cache.effective_bits() == pytest.approx(found.effective_bits, abs=1e-9)
    # Of its own count: bytes of layer 0 and positions, and layer 1 at two bytes an element.
    held = sum(t.nbytes for name, t in cache.tensors().items() if "layers.1" not in name)
    elements = 400 * 2 * 2 * 16
    assert cache.effective_bits() == pytest.approx((held + 2 * elements) * 8 / (2 * elements))
    result = evaluate(model, [artifact], tokens(1, 400).numpy())[0]
    assert result.effective_bits == pytest.approx(found.effective_bits, abs=1e-9)
    # 8 bits instead are nearly exact.
    eight = {name: w.clamp(max=8) for name, w in widths.items()}
    build.run(run, tmp_path / "b", widths=eight, options=found.options)
    nearly = evaluate(model, [kvcalib.load(tmp_path / "b")], tokens(1, 400).numpy())[0]
    assert result.kld == pytest.approx(nearly.kld, rel=0.1)


def test_sliding_layers_that_nobody_calibrated_do_not_count(tmp_path):
    """gemma3 by default: only its full layers are packed, and an exact one is one of these."""
    model = tiny_family("gemma3_text")
    run = make_run(tmp_path / "run", model)
    bits = allocate.run(run, AllocateSettings(widths=3.0))[0].effective_bits
    build.run(run, tmp_path / "a", widths=allocate.load(run)[1])
    assert live_bits(model, kvcalib.load(tmp_path / "a")).effective_bits() == pytest.approx(bits, abs=1e-9)


def test_exact_layers_that_cannot_be_are_named(run):
    with pytest.raises(InputError, match=r"--exact-layers names \[2, 7\], the run has layers \[0, 1\]"):
        allocate.run(run, AllocateSettings(widths=2.0, exact_layers=(7, 0, 2)))
    with pytest.raises(InputError, match="names every layer"):
        allocate.run(run, AllocateSettings(widths=2.0, exact_layers=(0, 1)))
    with pytest.raises(InputError, match=r"layers \[1\] exact the smallest plan has"):
        allocate.run(run, AllocateSettings(budget=5.0, exact_layers=(1,)))


@pytest.mark.parametrize("per", ["head", "layer"])
@pytest.mark.parametrize("as_published", [False, True])
def test_qaq_meets_a_budget_with_one_width_per_unit(model, run, tmp_path, per, as_published):
    found, widths = allocate.run(run, AllocateSettings(budget=6.0, method="qaq", per=per, as_published=as_published))
    # One head more would be 16 channels of the 128 of a token.
    assert 6.0 - 16 / 128 - 0.5 < found.effective_bits <= 6.0
    for chosen in widths.values():
        assert bool((chosen == chosen[:, :1]).all())
        assert per == "head" or len(chosen.unique()) == 1
    assert found.bound is None
    best = allocate.run(run, AllocateSettings(widths=found.mean_width, per=per))[0]
    assert best.loss <= found.loss, "no plan of these units is better than the solver's"
    build.run(run, tmp_path / "a", widths=widths)
    assert live_bits(model, kvcalib.load(tmp_path / "a")).effective_bits() == pytest.approx(found.effective_bits)


def test_qaqs_statistics_are_those_of_the_run(run):
    """The widths of the stage, from the calibration's tensors read here once more."""
    calibration, _ = Calibration.load(run.file("calibration.safetensors"))
    for shape in calibration.info.layers:
        assert shape.scaling == 0.25
    heads = []
    for layer in (0, 1):
        data = calibration.layer(layer)
        key = data["sample.key"].double() - data["key.sum"] / calibration.info.tokens
        value, drawn = data["sample.value"].double(), data["sample.attention_sum"].double()
        output = (drawn[..., None] * value).sum(0) / drawn.sum(0)[:, None]
        value = value / (value - output).square().mean().sqrt()
        quantile = norm_quantile(data["query.norm_histogram"], 0.9).reshape(2, 2).max(1)
        heads.append(
            head_statistics(
                key,
                value,
                data["sample.attention_sum"],
                data["sample.attention_peak"],
                torch.from_numpy(quantile),
                48,
                0.25,
                1,
            )
        )
    expected = qaq.allocate(heads, 3 * 128, "shared")
    _, widths = allocate.run(run, AllocateSettings(widths=3.0, method="qaq"))
    for layer in (0, 1):
        assert widths[layer, "key"][:, 0].tolist() == expected.key[layer].tolist()
        assert widths[layer, "value"][:, 0].tolist() == expected.value[layer].tolist()


def test_a_calibration_without_the_scaling_serves_all_but_qaq(model, tmp_path):
    """A file of version 2, as written before scaling was recorded."""
    run = make_run(tmp_path / "run", model)
    info, tensors = as_of(2, Calibration.load(run.file("calibration.safetensors"))[0])
    write_tensors(run.file("calibration.safetensors"), tensors, {"info": info, "extra": None})
    allocate.run(run, AllocateSettings(widths=3.0))
    with pytest.raises(InputError, match=r"scaling of layer 0.*version 2.*fisher` again with --overwrite"):
        allocate.run(run, AllocateSettings(widths=3.0, method="qaq"))
    write_tensors(run.file("calibration.safetensors"), tensors, {"info": info | {"version": 1}, "extra": None})
    with pytest.raises(
        InputError, match=r"version is 1, expected one of \(2, 3, 4, 5, 6, 7\); run `kvcalib fisher` again"
    ):
        allocate.run(run, AllocateSettings(widths=2.0))


def test_settings_that_do_not_go_together():
    assert AllocateSettings(widths=2.0).per == "channel"
    assert AllocateSettings(widths=2.0, method="qaq").per == "head"
    with pytest.raises(ValueError, match=r"--per is channel, but qaq.*--per head or --per layer"):
        AllocateSettings(widths=2.0, method="qaq", per="channel")
    with pytest.raises(ValueError, match=r"--as-published is about qaq, --method is kl"):
        AllocateSettings(widths=2.0, method="kl", as_published=True)


def test_the_plot_is_beside_the_plan(run, tmp_path):
    found, _ = allocate.run(run, AllocateSettings(budget=5.0), plot=tmp_path / "p.svg")
    texts = [t.text for t in ET.parse(tmp_path / "p.svg").getroot().iter("{http://www.w3.org/2000/svg}text")]
    assert "Allocation by fisher per channel" in texts
    assert any(f"{found.effective_bits:.3f} effective bits" in t for t in texts)
    assert "nats per token" in texts
    allocate.run(run, AllocateSettings(budget=5.0))
    assert run.file("allocation.svg").read_text() == (tmp_path / "p.svg").read_text()


@pytest.fixture(scope="module")
def many(model, tmp_path_factory):
    """A run with several options; base: one outlier of 32 elements, per token."""
    folder = tmp_path_factory.mktemp("choices") / "run"
    return make_run(folder, model, outliers=0.03, choices=Choices(outliers=(0.0, 0.05)))


def measured_bits(model, folder):
    artifact = kvcalib.load(folder)
    kvcalib.attach(model, artifact)
    cache = artifact.new_cache(model)
    with torch.no_grad():
        model(tokens(1, 400), past_key_values=cache)
    kvcalib.detach(model)
    return cache.effective_bits()


@pytest.mark.parametrize("budget", [2.6, 4.0, 7.0])
def test_options_and_widths_come_out_of_one_budget(model, many, tmp_path, budget):
    found, _ = allocate.run(many, AllocateSettings(budget=budget))
    assert found.effective_bits <= budget
    alone = Codebooks.load(many)
    alone.settings = alone.settings.model_copy(update={"choices": None})
    calibration, _ = Calibration.load(many.file(CALIBRATION))
    base = options.within(alone, calibration, alone.layers, budget, "channel", 16)
    assert found.bound <= found.loss < base.loss
    again, same = allocate.load(many)
    assert again == found
    manifest = build.run(many, tmp_path / "a", widths=same, options=again.options)
    for layer in manifest.layers:
        for role, spec in (("key", layer.key), ("value", layer.value)):
            option = found.options[layer.index, role]
            elements = 16 if option.scope == "head" else 32
            assert (spec.scope, spec.outliers) == (
                option.scope,
                {0.0: 0, 0.03: 1, 0.05: elements // 16}[option.outliers],
            )
    assert measured_bits(model, tmp_path / "a") == pytest.approx(found.effective_bits, abs=1e-9)
    predicted = sum(spec.predicted_loss for layer in manifest.layers for spec in (layer.key, layer.value))
    assert predicted == pytest.approx(found.loss)


def test_outliers_go_where_the_tails_are_heavy(model, tmp_path):
    """One value of every token made 20 times as large, in layer 1 only: it would stretch the scale of all others."""
    record = calibrate(model)
    place = torch.randint(32, (160, 1), generator=torch.Generator().manual_seed(0))
    flat = record.tensors["layers.1.sample.value"].view(160, 32)
    flat.scatter_(1, place, 20 * flat.gather(1, place))
    heavy = RunDir(tmp_path / "run", create=True)
    record.save(heavy.file(CALIBRATION))
    heavy.finish("fisher", {"seed": 0}, [CALIBRATION])
    choices = Choices(outliers=(0.0, 0.03), scopes=("token",))
    fit_nuq.run(heavy, fit_nuq.FitNuqSettings(value_basis="none", outliers=0.0, choices=choices))
    found, _ = allocate.run(heavy, AllocateSettings(budget=4.0))
    assert {name: option.outliers for name, option in found.options.items()} == {
        (0, "key"): 0.0, (0, "value"): 0.0, (1, "key"): 0.0, (1, "value"): 0.03,
    }  # fmt: skip


def test_layers_left_out_count_at_16_bits(many):
    codebooks = Codebooks.load(many)
    calibration, _ = Calibration.load(many.file(CALIBRATION))
    found = options.within(codebooks, calibration, [1], 10.0, "channel", 16)
    assert set(found.widths) == set(found.options) == {(1, "key"), (1, "value")}
    rows = sum(options.row_bits(found.codebooks.quantizer(1, role, found.widths[1, role])) for role in ("key", "value"))
    assert found.effective_bits == pytest.approx((rows + 64 * 16 + 32) / 128)
    assert 9.5 < found.effective_bits <= 10
    with pytest.raises(InputError, match=r"5 % outliers and layers \[0\] exact the smallest plan has"):
        options.within(codebooks, calibration, [1], 5.0, "channel", 16)


def test_a_mean_width_leaves_the_options_alone(many):
    found, _ = allocate.run(many, AllocateSettings(widths=2.0))
    assert {str(option) for option in found.options.values()} == {"3 % outliers per token"}


def test_options_that_were_not_fitted_are_refused(many, run, tmp_path):
    wanted = Option(outliers=0.02, scope="head")
    with pytest.raises(InputError, match=r"layer 1 has no values with 2 % outliers per head, .* one of 3 % .*fit"):
        build.run(many, tmp_path / "a", options={(1, "value"): wanted})
    assert not (tmp_path / "a").exists()


def test_losses_of_options_are_of_all_elements(many):
    """What the table says of an option is what nearest rounding does to the sample, outliers included as exact."""
    codebooks = Codebooks.load(many)
    calibration, _ = Calibration.load(many.file(CALIBRATION))
    for role in ("key", "value"):
        there = codebooks.options(0, role)
        assert len(there) == (3 if role == "key" else 5)
        data = calibration.layer(0)
        x, fisher = data[f"sample.{role}"].float(), data[f"sample.{role}_fisher"].double()
        for option in there:
            under = codebooks.under({(0, role): option})
            quantizer = under.quantizer(0, role, 3, feedback=False)
            back = quantizer.decode(quantizer.encode(x, torch.float16))
            lost = float((fisher * (back - x).double().square()).sum(dim=(1, 2)).mean() / 2)
            assert fit_nuq.predicted_total(under, 0, role, 3) == pytest.approx(lost)
