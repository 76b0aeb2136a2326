"""Shares against brute force over all divisions of the budget; curves against loops; minorants by their definition."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcalib.allocation.contexts import Contexts
from kvcalib.allocation.shares import SHARES, loss_curve, minorant, shares
from kvcalib.allocation.stakes import Stakes

GRID = [j / 4 for j in range(2, 13)]


def convex(generator, points):
    """A falling convex curve."""
    steps = torch.rand(points - 1, generator=generator, dtype=torch.float64) ** 3
    return 10 - torch.cat([torch.zeros(1), steps.sort(descending=True).values.cumsum(0)])


@pytest.mark.parametrize("seed", range(6))
def test_no_division_of_the_budget_loses_less(seed):
    generator = torch.Generator().manual_seed(seed)
    curves = [convex(generator, len(GRID)) for _ in range(3)]
    found = shares(curves, GRID)
    assert sum(found) == pytest.approx(3)
    lost = sum(float(c[GRID.index(s)]) for c, s in zip(curves, found, strict=True))
    divisions = [d for d in itertools.product(range(len(GRID)), repeat=3) if sum(GRID[n] for n in d) == 3]
    assert lost == pytest.approx(min(sum(float(c[n]) for c, n in zip(curves, d, strict=True)) for d in divisions))


def test_equal_layers_share_equally_and_flat_ones_get_the_least():
    curve = convex(torch.Generator().manual_seed(0), len(SHARES))
    flat = torch.ones(len(SHARES))
    assert shares([curve] * 4) == [1, 1, 1, 1]
    assert shares([curve]) == [1]
    assert shares([curve, flat]) == [1.5, 0.5]
    assert shares([flat] * 3) == [1, 1, 1]
    assert shares([curve, *[flat] * 9])[0] == 3
    assert (SHARES[0], SHARES[-1]) == (0.5, 3)


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=30))
def test_minorant_is_the_greatest_convex_function_below(values):
    curve = np.array(values)
    found = minorant(curve)
    assert (found <= curve + 1e-9).all()
    assert (np.diff(found, 2) >= -1e-9).all()
    # Greatest: every point lies on the lowest chord of the curve over it.
    for i in range(len(curve)):
        chords = [
            curve[a] + (curve[b] - curve[a]) * (i - a) / (b - a) if b > a else curve[a]
            for a in range(i + 1)
            for b in range(i, len(curve))
        ]
        assert found[i] == pytest.approx(min(chords), abs=1e-9)


def test_a_curve_is_the_loss_of_keeping_the_best():
    generator = torch.Generator().manual_seed(0)
    contexts = Contexts.find(torch.arange(80) // 40, torch.arange(80) % 40, 60)
    value, weight, rank = (torch.rand(2, 2, 40, *d, generator=generator) for d in ((5,), (), ()))
    stakes = Stakes(weight, weight.square(), value, 0 * weight, 0 * weight, 1)
    curve = loss_curve(contexts, rank, stakes)
    assert curve.shape == (len(SHARES),)
    for share in (0.5, 1.0, 3.0):
        kept = torch.zeros(2, 2, 40, dtype=torch.bool)
        for context, head in itertools.product((0, 1), (0, 1)):
            free = sorted(range(4, 40), key=lambda t: -rank[context, head, t])
            kept[context, head, free[: round(36 * 0.2 * share)]] = True
        expected = stakes.loss(contexts, kept).mean()
        assert float(curve[SHARES.index(share)]) == pytest.approx(float(expected), rel=1e-6)
