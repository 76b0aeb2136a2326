"""The stage `allocate`: budgets in every byte, and artifacts of many widths from it."""

import pytest
import torch

import kvcalib
from kvcalib.errors import InputError
from kvcalib.stages import allocate, build, fit_nuq
from kvcalib.stages.allocate import AllocateSettings
from tests.tiny import make_run, tiny_llama, tokens


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
    assert budget - 0.6 < found.effective_bits <= budget
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
