"""Intervals against a loop, against what a known distribution must give, and against the normal approximation."""

import math

import numpy as np
import pytest

from kvcalib.evaluation import bootstrap
from kvcalib.evaluation.bootstrap import interval, resampled


def test_equals_a_loop():
    generator = np.random.default_rng(3)
    sums, counts = generator.gamma(2, size=7), generator.integers(1, 9, 7)
    found = resampled(sums, counts, replicates=50, seed=11)
    drawing, expected = np.random.default_rng(11), []
    for _ in range(50):
        total, size = 0.0, 0
        for place in drawing.integers(0, 7, 7):
            total += sums[place]
            size += counts[place]
        expected.append(total / size)
    assert found.tolist() == pytest.approx(expected, rel=1e-12)
    got = interval(sums, counts, replicates=50, seed=11, level=0.8)
    ordered = sorted(expected)
    assert got.value == pytest.approx(sums.sum() / counts.sum())
    assert ordered[4] <= got.low <= ordered[5]  # a tenth of 50 lies below
    assert ordered[44] <= got.high <= ordered[45]


def test_parts_of_a_long_draw_are_the_whole(monkeypatch):
    sums, counts = np.arange(10.0), np.ones(10)
    whole = resampled(sums, counts, 101, seed=5)
    monkeypatch.setattr(bootstrap, "_AT_ONCE", 70)
    assert resampled(sums, counts, 101, seed=5).tolist() == whole.tolist()


def test_covers_the_mean_of_a_known_distribution():
    """Means of 40 gamma(2, 1) variables: the mean, 2, lies in 95 % of the intervals, a little less as n is finite."""
    generator = np.random.default_rng(0)
    hits, missed_below = 0, 0
    for seed in range(400):
        found = interval(generator.gamma(2, size=40), np.ones(40), replicates=1000, seed=seed)
        hits += found.low <= 2 <= found.high
        missed_below += found.low > 2
    assert 0.90 <= hits / 400 <= 0.97
    assert missed_below < 400 - hits  # a skewed mean is missed above more often


def test_width_is_that_of_the_normal_approximation():
    values = np.random.default_rng(1).normal(5, 2, 400)
    found = interval(values, np.ones(400))
    error = values.std() / math.sqrt(400)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.05)


def test_a_ratio_weighs_sequences_by_their_counts():
    assert interval([1.0, 30.0], [1, 10]).value == pytest.approx(31 / 11)
    assert (interval([2.0, 4.0], [1, 2]).low, interval([2.0, 4.0], [1, 2]).high) == (2.0, 2.0)


def test_pairing_takes_out_what_sequences_share():
    generator = np.random.default_rng(2)
    hard = generator.normal(3, 1, 50)
    a, b = hard + 0.01, hard + generator.normal(0, 0.005, 50)
    paired = interval(a - b, np.ones(50))
    apart = interval(a, np.ones(50))
    assert 0 < paired.low < 0.01 < paired.high
    assert paired.high - paired.low < (apart.high - apart.low) / 50


@pytest.mark.parametrize(
    ("sums", "counts", "message"),
    [
        ([], [], "expected two vectors of one length"),
        ([1.0], [1, 2], "expected two vectors of one length"),
        ([[1.0]], [[1]], "expected two vectors of one length"),
        ([math.nan], [1], "not finite"),
        ([1.0], [0], "not above 0"),
    ],
)
def test_what_is_no_sample_is_refused(sums, counts, message):
    with pytest.raises(ValueError, match=message):
        interval(sums, counts)


def test_levels_and_replicates_are_checked():
    with pytest.raises(ValueError, match=r"level is 1.0, expected a share"):
        interval([1.0], [1], level=1.0)
    with pytest.raises(ValueError, match="replicates is 0"):
        interval([1.0], [1], replicates=0)
