"""Shares against brute force over all divisions of the budget; curves against loops; majorants by their definition."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcalib.allocation.contexts import Contexts
from kvcalib.allocation.shares import POINTS, kept_curve, majorant, shares


def concave(generator, steps):
    """A concave curve from 0 to some height."""
    gains = torch.rand(steps, generator=generator, dtype=torch.float64) ** 3
    return torch.cat([torch.zeros(1), gains.sort(descending=True).values.cumsum(0)])


@pytest.mark.parametrize("seed", range(6))
def test_no_division_of_the_budget_keeps_more(seed):
    generator = torch.Generator().manual_seed(seed)
    curves = [concave(generator, 20) for _ in range(3)]
    found = shares(curves, keep=0.3, least=0.5, most=2.0)
    assert sum(found) == pytest.approx(3)
    assert all(0.5 <= s <= 2 for s in found)
    kept = sum(float(c[round(6 * s)]) for c, s in zip(curves, found, strict=True))
    # A mean of 6 of 20 steps, each layer 3 .. 12.
    divisions = [d for d in itertools.product(range(3, 13), repeat=3) if sum(d) == 18]
    assert kept == pytest.approx(max(sum(float(c[n]) for c, n in zip(curves, d, strict=True)) for d in divisions))


def test_equal_layers_share_equally_and_flat_ones_get_the_least():
    generator = torch.Generator().manual_seed(0)
    curve = concave(generator, POINTS)
    assert shares([curve] * 4) == [1, 1, 1, 1]
    assert shares([curve]) == [1]
    found = shares([curve, torch.zeros(POINTS + 1)])
    assert found == [1.5, 0.5]
    assert shares([torch.zeros(POINTS + 1)] * 3) == [1, 1, 1]


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=30))
def test_majorant_is_the_least_concave_function_above(values):
    curve = np.array(values)
    found = majorant(curve)
    assert (found >= curve - 1e-9).all()
    assert (np.diff(found, 2) <= 1e-9).all()
    # Least: every point is a mean of points of the curve on either side of it.
    for i in range(len(curve)):
        chords = [
            curve[a] + (curve[b] - curve[a]) * (i - a) / (b - a) if b > a else curve[a]
            for a in range(i + 1)
            for b in range(i, len(curve))
        ]
        assert found[i] == pytest.approx(max(chords), abs=1e-9)


def test_a_curve_is_what_a_loop_keeps():
    generator = torch.Generator().manual_seed(0)
    contexts = Contexts.find(torch.arange(80) // 40, torch.arange(80) % 40, 60)
    score, worth = torch.rand(80, 2, generator=generator), torch.rand(80, 2, generator=generator)
    curve = kept_curve(contexts, contexts.gather(score), contexts.gather(worth))
    assert curve.shape == (POINTS + 1,)
    for point in (0, 50, 100, POINTS):
        kept = []
        for of, head in itertools.product((0, 1), (0, 1)):
            # 36 free tokens, of which a multiple is kept here.
            free = [i for i in range(80) if i // 40 == of and 4 <= i % 40]
            best = sorted(free, key=lambda i: -score[i, head])[: 36 * point // POINTS]
            kept.append(sum(float(worth[i, head]) for i in best))
        assert float(curve[point]) == pytest.approx(sum(kept) / 4, rel=1e-6)
