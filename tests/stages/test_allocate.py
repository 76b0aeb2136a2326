"""The stage `allocate`: budgets in every byte, and artifacts of many widths from it."""

import pytest
import torch

import kvcalib
from kvcalib.calibration.statistics import Calibration
from kvcalib.errors import InputError
from kvcalib.rundir import CALIBRATION, RunDir
from kvcalib.stages import allocate, build, fit_nuq, options
from kvcalib.stages.allocate import AllocateSettings
from kvcalib.stages.fit_nuq import Choices, Codebooks, Option
from tests.tiny import calibrate, make_run, tiny_llama, tokens


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
    build.run(run, tmp_path / "a", widths=widths)
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
    fit_nuq.run(heavy, fit_nuq.FitNuqSettings(outliers=0.0, choices=Choices(outliers=(0.0, 0.03), scopes=("token",))))
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
    """What the table says of an option is what its quantizer does to the sample, outliers included as exact."""
    codebooks = Codebooks.load(many)
    calibration, _ = Calibration.load(many.file(CALIBRATION))
    for role in ("key", "value"):
        there = codebooks.options(0, role)
        assert len(there) == (3 if role == "key" else 5)
        data = calibration.layer(0)
        x, fisher = data[f"sample.{role}"].float(), data[f"sample.{role}_fisher"].double()
        for option in there:
            under = codebooks.under({(0, role): option})
            quantizer = under.quantizer(0, role, 3)
            back = quantizer.decode(quantizer.encode(x, torch.float16))
            lost = float((fisher * (back - x).double().square()).sum(dim=(1, 2)).mean() / 2)
            assert fit_nuq.predicted_total(under, 0, role, 3) == pytest.approx(lost)
