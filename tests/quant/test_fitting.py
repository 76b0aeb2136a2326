import numpy as np
import pytest
import torch

from kvcalib.quant import kmeans
from kvcalib.quant.codebook import ladder_slice
from kvcalib.quant.fitting import FitOptions, fit_absolute, fit_relative, predicted_loss, uniform_quantizer
from tests.runtime.simulated import simulate

PLAIN = FitOptions(outlier_share=0.0)


def sample(tokens=400, heads=2, head_dim=8, seed=0):
    rng = np.random.default_rng(seed)
    spread = rng.uniform(0.2, 5, (heads, head_dim))
    x = rng.standard_t(4, (tokens, heads, head_dim)) * spread + rng.normal(size=(heads, head_dim))
    return x, rng.gamma(0.5, 1, (tokens, heads, head_dim)) ** 2


def test_a_channels_codebook_is_the_weighted_optimum_of_its_keys():
    x, fisher = sample()
    ladders = fit_absolute(x, fisher, "channel", "token", PLAIN)
    for bits in (1, 3):
        expected = kmeans.fit(x[:, 1, 3], fisher[:, 1, 3], 1 << bits)
        assert np.allclose(ladders[1, 3, ladder_slice(bits)], expected, rtol=1e-6)


@pytest.mark.parametrize("granularity", ["layer", "head"])
@pytest.mark.parametrize("weights", ["fisher_scale", "fisher", "none"])
def test_shared_codebooks_weight_normalised_values_as_asked(granularity, weights):
    x, fisher = sample()
    ladders = fit_absolute(x, fisher, granularity, "token", FitOptions(outlier_share=0.0, weights=weights))
    low, high = x.min(0), x.max(0)
    zero, scale = (low + high) / 2, (high - low) / 2
    normal = (x - zero) / scale
    weight = {"fisher_scale": fisher * scale**2, "fisher": fisher, "none": np.ones_like(fisher)}[weights]
    part = (slice(None), slice(None)) if granularity == "layer" else (slice(None), 1)
    expected = kmeans.fit(normal[part].ravel(), weight[part].ravel(), 8)
    found = (ladders[1, :, ladder_slice(3)].numpy() - zero[1][:, None]) / scale[1][:, None]
    best = kmeans.objective(normal[part].ravel(), weight[part].ravel(), expected)
    for row in found:
        assert kmeans.objective(normal[part].ravel(), weight[part].ravel(), row) <= best * (1 + 1e-3)
    assert np.allclose(found, found[0])


def test_eq7_weights_cost_less_predicted_loss_than_none():
    x, fisher = sample()
    losses = {}
    for weights in ("fisher_scale", "none"):
        ladders = fit_absolute(x, fisher, "channel", "token", FitOptions(outlier_share=0.0, weights=weights))
        q = uniform_quantizer(ladders, 2, False, "token", 0.0, torch.ones(2, 8))
        losses[weights] = float(predicted_loss(q, torch.tensor(x), torch.tensor(fisher), torch.float16).sum())
    assert losses["fisher_scale"] < 0.8 * losses["none"]


def test_predicted_loss_equals_the_formula_on_the_plain_simulation():
    x, fisher = sample(60)
    for relative, fit in ((False, fit_absolute), (True, fit_relative)):
        q = uniform_quantizer(
            fit(x, fisher, "head", "token", FitOptions()), 3, relative, "token", 0.1, torch.ones(2, 8)
        )
        wide = torch.tensor(x).float()
        expected = 0.5 * (torch.tensor(fisher) * (simulate(wide, q) - wide).double() ** 2).mean(0)
        found = predicted_loss(q, torch.tensor(x), torch.tensor(fisher), torch.float16)
        assert torch.allclose(found, expected, rtol=1e-4)


def test_outliers_are_left_out_of_the_fit():
    x, fisher = sample()
    x[7, 0, 0] = 1e6
    with_it = fit_absolute(x, fisher, "channel", "token", PLAIN)
    without = fit_absolute(x, fisher, "channel", "token", FitOptions(outlier_share=0.05))
    assert with_it[0, 0, ladder_slice(3)].max() > 1e5
    assert without[0, 0, ladder_slice(3)].max() < 1e3


def test_a_channel_that_is_always_the_outlier_is_still_fitted():
    x, fisher = np.full((400, 2, 8), 0.5), np.ones((400, 2, 8))
    values = x[:, 1, 5] = np.random.default_rng(0).normal(size=400)
    ladders = fit_absolute(x, fisher, "channel", "token", FitOptions(outlier_share=0.05))
    levels = ladders[1, 5, ladder_slice(3)].numpy()
    assert kmeans.objective(values, None, levels) < 0.1 * values.var() * len(values)


def test_values_are_relative_to_their_tokens_range():
    x, fisher = sample()
    ladders = fit_relative(x * np.geomspace(1e-3, 1e3, 400)[:, None, None], fisher, "head", "token", PLAIN)
    assert ladders.abs().max() <= 1 + 1e-9
    assert torch.equal(ladders[0, 0], ladders[0, 7])


def test_qnorm_keeps_weighted_mean_and_spread():
    x, fisher = sample()
    ladders = fit_absolute(x, fisher, "channel", "token", FitOptions(outlier_share=0.0, qnorm=True))
    plain = fit_absolute(x, fisher, "channel", "token", PLAIN)
    values, weight = x[:, 0, 2], fisher[:, 0, 2]

    def moments(v):
        mean = np.average(v, weights=weight)
        return mean, np.sqrt(np.average((v - mean) ** 2, weights=weight))

    before = plain[0, 2, ladder_slice(2)].numpy()
    codes = kmeans.assign(values, before)
    assert moments(before[codes])[1] < moments(values)[1]
    after = ladders[0, 2, ladder_slice(2)].numpy()[codes]
    assert np.allclose(moments(after), moments(values), rtol=1e-6)


@pytest.mark.parametrize("fit", [fit_absolute, fit_relative])
def test_constant_channels_and_zero_weights_do_not_break_a_fit(fit):
    x, fisher = sample()
    x[:, 0, 0] = 2.5
    fisher[:, 0, 1] = 0
    ladders = fit(x, fisher, "channel", "token", FitOptions())
    assert torch.isfinite(ladders).all()
    assert (ladders[..., ladder_slice(4)].diff(dim=-1) >= 0).all()


def test_lloyd_is_never_better_than_exact():
    x, fisher = sample(200, 1, 2)
    exact = fit_absolute(x, fisher, "channel", "token", PLAIN)
    lloyd = fit_absolute(x, fisher, "channel", "token", FitOptions(outlier_share=0.0, solver="lloyd"))
    for d in range(2):
        a, b = (kmeans.objective(x[:, 0, d], fisher[:, 0, d], t[0, d, ladder_slice(3)].numpy()) for t in (exact, lloyd))
        assert a <= b * (1 + 1e-9)
