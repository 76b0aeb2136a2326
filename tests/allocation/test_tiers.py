"""Thresholds of adaptive widths against the cheapest tier of each token, found by trying all."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcalib.allocation.tiers import NEVER, Choice, hull, mean_bits, meet, thresholds
from kvcalib.errors import InputError


def made(seed, tiers, tokens=300):
    generator = torch.Generator().manual_seed(seed)
    bits = (torch.randint(1, 60, (tiers,), generator=generator).cumsum(0) * 8).tolist()
    loss = (torch.rand(tiers, generator=generator).cumsum(0).flip(0) * 0.01).tolist()
    signal = torch.rand(tokens, generator=generator) ** 4
    return Choice(signal, bits, loss)


@given(seed=st.integers(0, 10_000), tiers=st.integers(2, 6), exponent=st.floats(-14, -4))
def test_thresholds_pick_each_tokens_cheapest_tier(seed, tiers, exponent):
    choice, price = made(seed, tiers), math.exp(exponent)
    limits = thresholds(choice, price)
    assert sorted(limits) == limits
    mean = float(choice.signal.double().mean())
    for signal in choice.signal.tolist():
        costs = [signal / mean * loss + price * bits for loss, bits in zip(choice.loss, choice.bits, strict=True)]
        tier = sum(signal >= limit for limit in limits)
        assert costs[tier] <= min(costs) * (1 + 1e-9)


def test_a_tier_that_is_never_worth_it_is_skipped():
    assert hull([10, 20, 30], [9.0, 8.9, 1.0]) == [0, 2]
    assert hull([10, 20, 30], [9.0, 3.0, 4.0]) == [0, 1]
    choice = Choice(torch.tensor([0.1, 0.3]), [10, 20, 30], [9.0, 8.9, 1.0])
    first, second = thresholds(choice, 0.1)
    assert first == second == pytest.approx(0.2 * 0.1 * 20 / 8)
    assert thresholds(choice, 1e9) == [NEVER, NEVER]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_budget_is_met(share):
    choices = [made(seed, 4) for seed in range(6)]
    low, high = (sum(choice.bits[i] for choice in choices) for i in (0, -1))
    budget = low + share * (high - low)
    found = [mean_bits(c, limits) for c, limits in zip(choices, meet(choices, budget), strict=True)]
    assert sum(found) <= budget
    # One token more in the next tier is what may be missing.
    assert sum(found) >= budget - 0.02 * (high - low) or share == 1.0


@pytest.mark.parametrize("outside", [-1, 1])
def test_a_budget_out_of_reach_is_refused(outside):
    choice = made(1, 3)
    budget = choice.bits[0] - 1 if outside < 0 else choice.bits[-1] + 1
    with pytest.raises(InputError, match=f"the tiers take {choice.bits[0]} to {choice.bits[-1]}"):
        meet([choice], budget)
