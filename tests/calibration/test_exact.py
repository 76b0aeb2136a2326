"""Exact sums against rational arithmetic: orders, groupings, wild magnitudes, cancellation."""

import itertools
import math
import random
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvcalib.calibration.exact import BITS, LIMBS, LOWEST, MOST, ExactSum

DENORMAL, LARGEST = 5e-324, 1.7976931348623157e308
FINITE = st.floats(allow_nan=False, allow_infinity=False)
WILD = st.builds(math.ldexp, st.floats(-1, 1), st.integers(-1080, 1000))
CLOSE = st.builds(math.ldexp, st.floats(-1, 1), st.integers(-60, 60))
NUMBERS = st.one_of(*(st.lists(kind, min_size=1, max_size=12) for kind in (FINITE, WILD, CLOSE)))


def added(numbers):
    total = ExactSum.zeros(())
    for x in numbers:
        total.add(torch.tensor(x, dtype=torch.float64))
    return total


def state(total):
    return total.limbs.tolist(), total.top.tolist(), total.count


def grouped(numbers, generator):
    """The numbers in random order, added in random groups that are merged in random order."""
    numbers = generator.sample(numbers, len(numbers))
    parts = [[] for _ in range(generator.randint(1, 4))]
    for x in numbers:
        generator.choice(parts).append(x)
    sums = [added(part) for part in parts]
    while len(sums) > 1:
        a = sums.pop(generator.randrange(len(sums)))
        sums[generator.randrange(len(sums))].merge(a)
    return sums[0]


@settings(max_examples=60, deadline=None)
@given(NUMBERS, st.randoms(use_true_random=False))
@example([1e300, 1.0, -1e300, DENORMAL], random.Random(0))
def test_any_order_and_grouping_ends_in_the_same_limbs(numbers, generator):
    expected = state(added(numbers))
    for _ in range(3):
        assert state(grouped(numbers, generator)) == expected


@settings(max_examples=60, deadline=None)
@given(NUMBERS)
@example([DENORMAL] * 3)
@example([DENORMAL, -DENORMAL])
@example([LARGEST])
@example([1.0, 2.0**-53, 2.0**-107])
@example([2.0**40, -(2.0**40 - 1)])
@example([1e16, 1.0, -1e16])
def test_limbs_are_the_pieces_of_rational_arithmetic(numbers):
    """The definition, by integers of any length: pieces by floor and remainder, added in the window of the top."""
    total = added(numbers)
    tops = [
        max(j for j in range(LOWEST, 30) if Fraction(abs(x)) >= Fraction(2) ** (BITS * j)) for x in numbers if x != 0
    ]
    top = max(tops, default=LOWEST)
    limbs = [0] * LIMBS
    for x, k in itertools.product(numbers, range(LIMBS)):
        limbs[k] += int(math.copysign(1, x)) * (Fraction(abs(x)) // Fraction(2) ** (BITS * (top - k)) % 2**BITS)
    assert (total.top.item(), total.limbs.tolist()) == (top, limbs)


@settings(max_examples=80, deadline=None)
@given(NUMBERS)
@example([1.0, 2.0**-53, 2.0**-107])
@example([-1.0, -(2.0**-53), -(2.0**-60)])
@example([2.0**39, 2.0**40 - 2.0**-12])
def test_values_are_nearer_than_float64_sums(numbers):
    exact = sum(map(Fraction, numbers))
    if abs(exact) >= Fraction(LARGEST):
        return
    found = added(numbers).value().item()
    dropped = len(numbers) * Fraction(2) ** -80 * max(abs(Fraction(x)) for x in numbers)
    rounding = Fraction(math.ulp(found)) * Fraction(100001, 200000)
    assert abs(Fraction(found) - exact) <= rounding + dropped


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1e30), min_size=1, max_size=40))
def test_sums_of_positive_numbers_are_as_exact_as_math_fsum(numbers):
    found, expected = added(numbers).value().item(), math.fsum(numbers)
    assert found == expected or abs(found - expected) <= math.ulp(expected)


def test_many_elements_of_any_shape_at_once():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 3, 4, generator=generator, dtype=torch.float64)
    x = x * 2.0 ** torch.randint(-90, 90, x.shape, generator=generator)
    total = ExactSum.zeros((3, 4))
    for row in x:
        total.add(row)
    expected = [[math.fsum(x[:, i, j].tolist()) for j in range(4)] for i in range(3)]
    assert torch.allclose(total.value(), torch.tensor(expected, dtype=torch.float64), rtol=1e-15, atol=0)
    assert total.value()[1, 2].item() == added(x[:, 1, 2].tolist()).value().item()


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused(wrong):
    total = ExactSum.zeros((2,))
    with pytest.raises(ValueError, match="finite"):
        total.add(torch.tensor([1.0, wrong], dtype=torch.float64))
    assert state(total) == state(ExactSum.zeros((2,)))


def test_the_most_contributions_fit_and_one_more_is_refused():
    largest_piece = math.ldexp(2**BITS - 1, 0)
    total = added([largest_piece])
    for _ in range(int(math.log2(MOST))):
        total.merge(ExactSum(total.limbs.clone(), total.top.clone(), total.count))
    assert total.count == MOST
    assert total.value().item() == largest_piece * MOST
    with pytest.raises(OverflowError, match=f"takes {MOST} contributions"):
        total.add(torch.tensor(1.0, dtype=torch.float64))
