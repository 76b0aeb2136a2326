"""Every bound against attention that really is disturbed, and the widths against a quantizer that really rounds."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcalib.allocation.qaq import (
    Published,
    allocate,
    bits,
    key_sigma,
    key_sigma_by_value,
    published_bits,
    published_key_error,
    published_value_error,
    score_target,
    shared_errors,
    shared_widths,
    token_widths,
    value_sigma,
)
from kvcalib.allocation.sensitivity import HeadStatistics, element_range
from kvcalib.calibration.statistics import norm_histogram, norm_quantile
from kvcalib.errors import InputError

DIM = 16
SCALING = DIM**-0.5


class Attention:
    """One query over T tokens; `sharp` is how far the keys lie apart, 0 for attention of 1/T on each."""

    def __init__(self, tokens, sharp, seed=0):
        self.g = torch.Generator().manual_seed(seed)
        self.tokens = tokens
        self.query = self.normal(DIM)
        self.key = sharp * self.normal(tokens, DIM) + self.normal(DIM)
        self.value = self.normal(tokens, DIM) * torch.linspace(0.2, 2, tokens)[:, None]
        self.weight = self.weights(self.key)
        self.out = self.weight @ self.value
        self.distance = (self.value - self.out).square().mean(-1).sqrt()
        self.squared_norm = self.query.square().sum()

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.g, dtype=torch.float64)

    def noise(self, sigma, draws):
        """Uniform, independent, of standard deviation `sigma` (one, or one per token): `[draws, T, D]`."""
        uniform = torch.rand(draws, self.tokens, DIM, generator=self.g, dtype=torch.float64) - 0.5
        return uniform * math.sqrt(12) * torch.as_tensor(sigma).expand(self.tokens)[:, None]

    def weights(self, key):
        return (key @ self.query * SCALING).softmax(-1)

    def outputs(self, key_noise):
        return torch.einsum("nt,td->nd", self.weights(self.key + key_noise), self.value)

    def by_value(self, target, distance):
        return key_sigma_by_value(target, self.weight, self.squared_norm, distance, self.tokens, SCALING)


def rms(x):
    return float(x.square().mean().sqrt())


# values


@pytest.mark.parametrize(("tokens", "sharp"), [(64, 0), (128, 2), (1, 0)])
@pytest.mark.parametrize("target", [1e-3, 0.7])
def test_values_at_their_bound_err_as_allowed(tokens, sharp, target):
    a = Attention(tokens, sharp)
    sigma = value_sigma(target, a.weight, tokens)
    errors = torch.einsum("t,ntd->nd", a.weight, a.noise(sigma, 2000))
    assert rms(errors) == pytest.approx(target, rel=0.02)
    assert errors.std(0).tolist() == pytest.approx([target] * DIM, rel=0.1)


def test_every_value_takes_an_equal_share():
    a = Attention(64, 2)
    noise = a.noise(value_sigma(0.1, a.weight, 64), 4000)
    share = (a.weight[:, None] * noise).square().mean((0, 2))
    assert share.tolist() == pytest.approx([0.1**2 / 64] * 64, rel=0.05)


# keys by the paper: all e^A of one distribution, which equal keys with equal errors have


@pytest.mark.parametrize("tokens", [64, 256])
@pytest.mark.parametrize("share", [0.01, 0.1])
def test_equal_keys_at_the_papers_bound_err_as_allowed(tokens, share):
    a = Attention(tokens, 0)
    target = share / tokens
    sigma = key_sigma(target, a.squared_norm, tokens, SCALING)
    assert rms(a.weights(a.key + a.noise(sigma, 2000)) - 1 / tokens) == pytest.approx(target, rel=0.02)


def test_the_paper_allows_too_little_for_errors_as_large_as_the_weights():
    """The Taylor series of the ratio ends before weights are kept from exceeding 1."""
    a = Attention(128, 0)
    for times, low, high in ((1, 0.9, 1), (6, 0.4, 0.6)):
        sigma = key_sigma(times / 128, a.squared_norm, 128, SCALING)
        assert low < rms(a.weights(a.key + a.noise(sigma, 2000)) - 1 / 128) * 128 / times < high


def test_the_papers_bound_fails_on_tokens_that_draw_attention():
    """By T S (1 - S) and what the other weights add, which is 1 only where attention is uniform."""
    a = Attention(128, 2)
    peak = int(a.weight.argmax())
    strength = float(a.weight[peak])
    others = float(a.weight.square().sum()) - strength**2
    expected = 128 * strength * math.sqrt((1 - strength) ** 2 + others)
    assert expected > 128 * strength * (1 - strength) > 10
    noise = a.noise(key_sigma(1e-5, a.squared_norm, 128, SCALING), 4000)
    measured = float(a.weights(a.key + noise)[:, peak].std())
    assert measured == pytest.approx(1e-5 * expected, rel=0.05)


def test_the_quantile_of_the_query_norm_serves_nine_queries_in_ten():
    a = Attention(64, 0)
    queries = a.normal(500, DIM) * (0.5 * a.normal(500, 1)).exp()
    squared = queries.square().sum(-1)
    counts = norm_histogram(squared[None].float())
    noise = a.noise(1.0, 300)

    def served(norm):
        sigma = key_sigma(2e-4, torch.tensor(norm), 64, SCALING)
        weights = torch.einsum("ntd,qd->nqt", noise * sigma, queries * SCALING).softmax(-1)
        return float(((weights - 1 / 64).square().mean((0, 2)).sqrt() <= 2e-4).double().mean())

    assert served(float(norm_quantile(counts, 0.9)[0])) == pytest.approx(0.9, abs=0.03)
    assert served(float(squared.median())) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("target", [1e-4, 1e-2])
def test_the_error_of_weights_that_an_error_of_the_output_comes_from(target):
    a = Attention(128, 0)
    weight_error = score_target(target, a.distance[:, None], 128)
    noise = a.noise(key_sigma(weight_error, a.squared_norm, 128, SCALING), 3000)
    assert rms(a.weights(a.key + noise) - a.weight) == pytest.approx(float(weight_error), rel=0.02)
    assert rms(a.outputs(noise) - a.out) == pytest.approx(target, rel=0.05)


# keys by what they do to the output


@pytest.mark.parametrize(("tokens", "sharp"), [(64, 0), (64, 0.5), (256, 0.5)])
def test_keys_at_the_bound_err_as_allowed_over_the_head(tokens, sharp):
    a = Attention(tokens, sharp)
    errors = a.outputs(a.noise(a.by_value(1e-3, a.distance), 4000)) - a.out
    assert rms(errors) == pytest.approx(1e-3, rel=0.03)


@pytest.mark.parametrize("component", [0, 7])
def test_keys_at_the_bound_err_as_allowed_in_one_component(component):
    a = Attention(64, 0.5)
    distance = (a.value - a.out)[:, component].abs()
    # Tokens whose component hardly differs from the output's may err more than a first order covers.
    sigma = a.by_value(1e-4, distance).where(distance > 0.1, 0)
    errors = (a.outputs(a.noise(sigma, 4000)) - a.out)[:, component]
    assert rms(errors) == pytest.approx(1e-4 * math.sqrt((distance > 0.1).double().mean()), rel=0.03)


def test_every_key_takes_an_equal_share():
    a = Attention(64, 1)
    sigma = a.by_value(1e-4, a.distance)
    for t in range(0, 64, 9):
        errors = a.outputs(a.noise(sigma.where(torch.arange(64) == t, 0), 1000)) - a.out
        assert rms(errors) == pytest.approx(1e-4 / 8, rel=0.1)


@pytest.mark.parametrize("sharp", [2, 4])
@pytest.mark.parametrize("target", [1e-2, 1e-1])
def test_scarce_attention_does_not_let_keys_run_away(sharp, target):
    """The first order alone lets the keys of hardly read tokens take all attention."""
    a = Attention(128, sharp)
    errors = a.outputs(a.noise(a.by_value(target, a.distance), 1000)) - a.out
    assert rms(errors) < 2.1 * target
    slope = math.sqrt(128) * a.weight * a.distance * SCALING * a.squared_norm.sqrt()
    assert rms(a.outputs(a.noise(target / slope, 1000)) - a.out) > 5 * target


# widths


def rounded(x, low, span, width):
    """To the midpoints of 2^width segments."""
    step = span / 2**width
    return low + step * (((x - low) / step).floor().clamp(min=0).minimum(torch.as_tensor(2.0**width - 1)) + 0.5)


@settings(max_examples=60, deadline=None)
@given(st.floats(0.01, 100), st.floats(1.1, 250), st.floats(-50, 50))
def test_a_quantizer_of_that_width_errs_as_allowed_and_one_bit_less_does_not(span, steps, low):
    sigma = span / steps / math.sqrt(12)
    width = int(bits(torch.tensor([span]), torch.tensor([sigma]))[0])
    x = low + span * (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    assert rms(rounded(x, low, span, width) - x) <= sigma * 1.001
    assert rms(rounded(x, low, span, width - 1) - x) > sigma * 0.999


def test_whole_powers_take_no_bit_too_many():
    for width in range(9):
        for span in (0.3, 1.0, 7.0):
            sigma = torch.tensor([span / 2**width / math.sqrt(12)], dtype=torch.float64)
            spans = torch.tensor([span], dtype=torch.float64)
            assert bits(spans, sigma * (1 + 1e-12)).item() == width
            assert bits(spans, sigma * (1 - 1e-12)).item() == min(8, width + 1)


@pytest.mark.parametrize("sharp", [0.5, 1.5])
@pytest.mark.parametrize("bound", ["output", "score"])
def test_tokens_rounded_to_their_widths_err_at_most_as_allowed(sharp, bound):
    """From statistics to X: rounding every value, or every key, at the width that its token was given."""
    target, value_errors, key_errors = 0.02, [], []
    for seed in range(20):
        a = Attention(96, 0 if bound == "score" else sharp, seed)
        spans = [element_range(x[:, None]) for x in (a.key, a.value)]
        head = HeadStatistics(*spans, a.weight[:, None], a.distance[:, None], a.squared_norm[None], 96, DIM, SCALING)
        widths = [w.double() for w in token_widths(head, target, bound)]
        key, value = (
            rounded(x, x.amin(-1, keepdim=True), span, w)
            for x, span, w in zip((a.key, a.value), spans, widths, strict=True)
        )
        value_errors.append(a.weight @ value - a.out)
        key_errors.append(a.weights(key) @ a.value - a.out)
    # At least a quarter of the variance that is allowed: rounding widths up wastes no more.
    assert 0.3 * target < rms(torch.stack(value_errors)) < 1.05 * target
    assert rms(torch.stack(key_errors)) < 1.3 * target


# one width for all tokens of a head


@pytest.mark.parametrize("sharp", [0, 0.5, 2])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_tokens_that_share_a_width_err_as_predicted(sharp, width):
    """Each token errs uniformly over its own step."""
    a = Attention(64, sharp)
    spans = [element_range(x[:, None]) for x in (a.key, a.value)]
    head = HeadStatistics(*spans, a.weight[:, None], a.distance[:, None], a.squared_norm[None], 64, DIM, SCALING)
    key, value = (math.sqrt(error.item() * 4.0**-width) for error in shared_errors(head))
    noise = [a.noise(span[:, 0] / 2**width / math.sqrt(12), 4000) for span in spans]
    assert rms(torch.einsum("t,ntd->nd", a.weight, noise[1])) == pytest.approx(value, rel=0.03)
    assert rms(a.outputs(noise[0]) - a.out) == pytest.approx(key, rel=0.05 if width == 4 else 0.25)


def test_the_shared_width_is_where_the_error_meets_the_target():
    error = 3 * torch.tensor([1.0, 16, 1e-9, 1e9], dtype=torch.float64)
    for target in (0.1, 0.02):
        for width, found in zip(shared_widths(error, target).tolist(), error.tolist(), strict=True):
            assert found * 4.0**-width == pytest.approx(target**2) or (width, found > target**2) in (
                (0, False),
                (8, True),
            )
    assert shared_widths(error, math.inf).tolist() == [0] * 4
    assert shared_widths(torch.zeros(2, dtype=torch.float64), 1e-9).tolist() == [0, 0]


def test_shared_widths_leave_less_error_than_means_of_token_widths():
    """Same budget, heads of which few tokens draw most attention: the error of the worst head's output."""
    g = torch.Generator().manual_seed(5)
    heads = [statistics(g, 200, 4) for _ in range(3)]
    worst = {}
    for bound in ("output", "shared"):
        plan = allocate(heads, 3 * 24 * DIM, bound)
        assert DIM * sum(int(w.sum()) for w in plan.key + plan.value) == 3 * 24 * DIM
        errors = [
            error * 4.0 ** -widths.double()
            for head, pair in zip(heads, zip(plan.key, plan.value, strict=True), strict=True)
            for error, widths in zip(shared_errors(head), pair, strict=True)
        ]
        worst[bound] = float(torch.cat(errors).max())
    assert worst["shared"] < worst["output"] / 2
    with pytest.raises(ValueError, match="expected one that gives widths to tokens"):
        token_widths(heads[0], 0.1, "shared")


# the paper's code


@pytest.mark.parametrize(
    ("tokens", "errors"),
    [
        (100, [0.020, 0.167, 0.430, 0.607, 0.676, 0.744, 0.801]),
        (1000, [0.167, 0.430, 0.607, 0.743, 0.800, 0.858, 0.908]),
        (4096, [0.339, 0.545, 0.694, 0.816, 0.868, 0.922, 0.968]),
    ],
)
def test_published_error_of_keys(tokens, errors):
    targets = (0.001, 0.01, 0.1, 1, 3, 10, 30)
    assert [round(published_key_error(t, tokens), 3) for t in targets] == errors


@pytest.mark.parametrize(("tokens", "error"), [(100, 0.346), (1000, 0.110), (4096, 0.054)])
def test_published_error_of_values(tokens, error):
    found = published_value_error(3, torch.tensor([1.0, 0.5]), tokens)
    assert found.tolist() == pytest.approx([3 * error, 6 * error], rel=0.01)


def test_published_widths():
    """By hand, E = 1; two thirds of them a bit less than the bound asks for, none of them 0."""
    span = torch.tensor([0, 1e-30, 0.5, 1, 2, 3, 5, 6, 7, 14, 15, 31])
    hand = [0, 1, 1, 1, 1, 2, 2, 2, 3, 3, 4, 5]
    right = [0, 0, 0, 0, 1, 2, 3, 3, 3, 4, 4, 5]
    assert published_bits(span, 1.0, 0, 16).tolist() == hand
    assert bits(span, torch.tensor([(1 + 1e-12) / math.sqrt(12)], dtype=torch.float64)).tolist() == right
    assert published_bits(span, 1.0, 2, 3).tolist() == [min(3, max(2, b)) for b in hand]


def test_published_keys_know_neither_attention_nor_queries():
    head = HeadStatistics(
        key_range=torch.tensor([[3.0], [3.0]]), value_range=torch.tensor([[3.0], [3.0]]),
        attention=torch.tensor([[0.9], [0.01]]), value_distance=torch.ones(2, 1),
        squared_query_norm=torch.tensor([7.0]), tokens=100, head_dim=DIM, scaling=SCALING,
    )  # fmt: skip
    key, value = token_widths(head, 0.1, "published")
    # 3 / (2 * .430) + 1 = 4.49 -> 3 bits; values 3 / (2 * .0346 / .9) + 1 = 40 -> 6, cut to 4; 1.43 -> 1
    assert key.tolist() == [[3], [3]]
    assert value.tolist() == [[4], [1]]
    assert token_widths(head, 0.1, "published", Published(lowest=2, highest=8))[1].tolist() == [[6], [2]]
    # 3 / (2 * .430 * sqrt 3) + 1 = 3.01 -> 2 bits
    assert token_widths(head, 0.1, "published", Published(q_norm=100))[0].tolist() == [[2], [2]]


# corner cases


def test_one_token_alone_needs_no_key():
    assert key_sigma(0.1, torch.tensor([4.0]), 1, 0.5).tolist() == [math.inf]
    assert published_key_error(0.1, 1) == math.inf
    assert value_sigma(0.1, torch.ones(1), 1).tolist() == pytest.approx([0.1])
    head = statistics(torch.Generator().manual_seed(0), 1, 2, tokens=1, distance=0.0)
    for bound in ("output", "score", "published"):
        key, value = token_widths(head, 0.01, bound)
        assert (key == 0).all()
        assert (value > 0).all()


def test_what_nobody_reads_shares_no_bits():
    g = torch.Generator().manual_seed(0)
    for head in (
        statistics(g, 9, 2, span=0.0),
        replace(statistics(g, 9, 2), attention=torch.zeros(9, 2)),
        replace(statistics(g, 1, 2, tokens=1), value_range=torch.zeros(1, 2), value_distance=torch.zeros(1, 2)),
    ):
        assert all(bool((error == 0).all()) for error in shared_errors(head))
        plan = allocate([head], 64, "shared")
        assert plan.key[0].tolist() == plan.value[0].tolist() == [0, 0]
    silent = replace(statistics(g, 9, 2), squared_query_norm=torch.zeros(2))
    assert bool((shared_errors(silent)[0] == 0).all())


@pytest.mark.parametrize("bound", ["output", "score", "published"])
def test_constant_rows_take_no_bits(bound):
    head = statistics(torch.Generator().manual_seed(0), 9, 2, span=0.0)
    assert [w.unique().tolist() for w in token_widths(head, 1e-9, bound)] == [[0], [0]]


def test_what_nobody_reads_takes_no_bits():
    zero, one = torch.zeros(1), torch.ones(1)
    assert value_sigma(0.1, zero, 64).tolist() == [math.inf]
    for attention, norm, distance in ((zero, one, one), (one, zero, one), (one, one, zero)):
        sigma = key_sigma_by_value(0.1, attention, norm, distance, 64, 0.25)
        assert sigma.tolist() == [math.inf]
        assert bits(one, sigma).tolist() == [0]
    assert key_sigma(0.1, zero, 64, 0.25).tolist() == [math.inf]
    assert published_bits(one, published_value_error(0.1, zero, 64), 0, 4).tolist() == [0]
    assert score_target(0.1, torch.zeros(3, 1), 64).tolist() == [math.inf]
    assert key_sigma(torch.tensor([math.inf]), one, 64, 0.25).tolist() == [math.inf]


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -1.0])
def test_figures_that_cannot_be_are_named(wrong):
    one, bad = torch.ones(2), torch.tensor([1.0, wrong])
    with pytest.raises(InputError, match=r"^attention holds"):
        value_sigma(0.1, bad, 64)
    with pytest.raises(InputError, match=r"^squared_query_norm holds"):
        key_sigma(0.1, bad, 64, 0.25)
    with pytest.raises(InputError, match=r"^attention holds"):
        key_sigma_by_value(0.1, bad, one, one, 64, 0.25)
    with pytest.raises(InputError, match=r"^squared_query_norm holds"):
        key_sigma_by_value(0.1, one, bad, one, 64, 0.25)
    with pytest.raises(InputError, match=r"^value_distance holds"):
        key_sigma_by_value(0.1, one, one, bad, 64, 0.25)
    with pytest.raises(InputError, match=r"^value_distance holds"):
        score_target(0.1, bad[:, None], 64)
    with pytest.raises(InputError, match=r"^range holds"):
        bits(bad, one)
    with pytest.raises(InputError, match=r"^range holds"):
        published_bits(bad, 1.0, 0, 4)


def test_targets_and_counts_that_cannot_be_are_named():
    one = torch.ones(1)
    for target in (0.0, -1.0, math.nan):
        with pytest.raises(InputError, match="the target error is"):
            value_sigma(target, one, 64)
    for sigma in (0.0, math.nan):
        with pytest.raises(InputError, match="sigma is 0, negative or NaN"):
            bits(one, torch.tensor([sigma]))
    with pytest.raises(InputError, match="tokens is 0"):
        key_sigma(0.1, one, 0, 0.25)


# allocation


def statistics(g, n, heads, tokens=64, span=1.0, distance=1.0, dim=DIM):
    """Heads that differ by orders of magnitude, and tokens within them."""

    def spread(*shape):
        return (1.5 * torch.randn(*shape, generator=g)).exp()

    return HeadStatistics(
        key_range=span * spread(n, heads) * spread(heads),
        value_range=span * spread(n, heads) * spread(heads),
        attention=torch.rand(n, heads, generator=g) ** 4,
        value_distance=distance * spread(n, heads),
        squared_query_norm=30 * spread(heads),
        tokens=tokens,
        head_dim=dim,
        scaling=dim**-0.5,
    )


bounds = st.sampled_from(["output", "score", "published"])
FREE = Published(lowest=0, highest=8)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 999), bounds, st.floats(1e-6, 1e3), st.floats(1.001, 10))
def test_widths_fall_as_the_target_rises(seed, bound, target, times):
    head = statistics(torch.Generator().manual_seed(seed), 20, 3)
    for fine, coarse in zip(token_widths(head, target, bound), token_widths(head, target * times, bound), strict=True):
        assert (fine >= coarse).all()
        assert 0 <= coarse.min() <= fine.max() <= 8


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 999), bounds, st.floats(0, 8), st.integers(1, 3), st.integers(1, 40))
def test_the_budget_is_met(seed, bound, mean, layers, n):
    g = torch.Generator().manual_seed(seed)
    # The paper's code gives at least 1 bit, and more to keys of a wide range whatever the target.
    published = bound == "published"
    heads = [statistics(g, n, 2, span=1e-6 if published else 1.0) for _ in range(layers)]
    budget = int(max(mean, float(published)) * layers * 2 * 2 * DIM)
    plan = allocate(heads, budget, bound, FREE)
    spent = DIM * sum(int(w.sum()) for w in plan.key + plan.value)
    # Within one head's step: no head's mean is raised for nothing, none lowered.
    assert budget - DIM < spent <= budget
    for head, key, value in zip(heads, plan.key, plan.value, strict=True):
        assert key.shape == value.shape == (2,)
        assert key.dtype == torch.uint8
        # Each width is its mean at the plan's target, rounded; means jump where many tokens change at one target.
        near = [min(plan.target * (1 - 1e-6), 2.0**299), plan.target * (1 + 1e-6)]
        widths = [token_widths(head, target, bound, FREE) for target in near]
        for role, width in enumerate((key, value)):
            high, low = (x[role].double().mean(0) for x in widths)
            assert (low - 1 < width).all()
            assert (width < high + 1).all()


def test_a_larger_budget_gives_a_smaller_target_and_spends_more():
    g = torch.Generator().manual_seed(3)
    heads = [statistics(g, 50, 4), statistics(g, 50, 2, dim=32)]
    plans = [allocate(heads, budget) for budget in range(0, 2049, 64)]
    targets = [p.target for p in plans]
    assert targets == sorted(targets, reverse=True)
    spent = [
        sum(h.head_dim * int(k.sum() + v.sum()) for h, k, v in zip(heads, p.key, p.value, strict=True)) for p in plans
    ]
    assert spent == sorted(spent)
    assert spent[-1] == 2 * 8 * (4 * 16 + 2 * 32)


def test_heads_alike_share_what_is_left():
    row = torch.ones(6, 4)
    alike = HeadStatistics(row, row, row / 2, row, torch.ones(4), 64, DIM, SCALING)
    for heads_up in range(33):
        plan = allocate([alike], heads_up * DIM)
        key, value = plan.key[0], plan.value[0]
        assert int(key.sum() + value.sum()) == heads_up
        assert int(key.max() - key.min()) <= 1
        assert int(value.max() - value.min()) <= 1


def test_bits_go_where_attention_queries_and_ranges_are_large():
    row = torch.ones(6, 4)
    attention, distance, span = row / 4, row.clone(), row.clone()
    attention[:, 1] *= 4
    span[:, 3] *= 16
    head = HeadStatistics(span, span, attention, distance, torch.tensor([1.0, 1, 64, 1]), 64, DIM, SCALING)
    plan = allocate([head], DIM * 24)
    key, value = plan.key[0].tolist(), plan.value[0].tolist()
    assert key[1] > key[0]
    assert key[2] > key[0]
    assert key[3] > key[0]
    assert value[3] > value[1] > max(value[0], value[2])


def test_heads_of_constant_tokens_leave_their_budget_unspent():
    head = statistics(torch.Generator().manual_seed(0), 9, 2, span=0.0)
    plan = allocate([head], 4 * DIM)
    assert plan.key[0].tolist() == plan.value[0].tolist() == [0, 0]


def test_budgets_that_no_plan_has_are_named():
    head = statistics(torch.Generator().manual_seed(0), 9, 2)
    with pytest.raises(InputError, match=r"the budget is 513 code bits per token, qaq's plans take 0 to 512"):
        allocate([head], 8 * 4 * DIM + 1)
    with pytest.raises(InputError, match="the budget is -1 "):
        allocate([head], -1)
    # The paper's code gives at least 1 bit to what has a range, and at most 4.
    head = statistics(torch.Generator().manual_seed(0), 9, 2, span=1e-3)
    with pytest.raises(InputError, match="the budget is 63 code bits per token, qaq's plans take 64 to 256"):
        allocate([head], 4 * DIM - 1, "published")
    assert allocate([head], 4 * DIM, "published").key[0].tolist() == [1, 1]
    with pytest.raises(InputError, match="no layers"):
        allocate([], 0)
