"""Paired bootstrap over sequences: how far a mean may be off because these sequences were taken and not others.

A measure is a ratio of sums over sequences, such as nats over tokens. Sequences are drawn again with replacement, as
many as there are, and the ratio is taken anew; the interval holds the middle 95 % of these ratios (Efron and
Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13: the percentile interval). Tokens of one sequence depend
on each other and are drawn together.

Paired: the same seed draws the same sequences for every contender, and a difference of two is taken sequence by
sequence before anything is drawn. What is hard about a text is hard for all contenders and cancels.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvcalib.evaluation.comparison import Interval

REPLICATES = 10_000
LEVEL = 0.95
FEWEST = 10
"""With fewer sequences the percentile interval is clearly too narrow: `docs/measures.md`."""
_AT_ONCE = 4_000_000

Floats = npt.NDArray[np.float64]


def resampled(sums: npt.ArrayLike, counts: npt.ArrayLike, replicates: int = REPLICATES, seed: int = 0) -> Floats:
    """The ratio of each replicate, `[replicates]`: sum of `sums [N]` over sum of `counts [N]` of N drawn sequences.

    Raises:
        ValueError: the shapes differ or are no vectors, there is no sequence, a value is not finite, a count is not
            above 0, or there is no replicate.
    """
    of, per = _checked(sums, counts)
    if replicates < 1:
        raise ValueError(f"replicates is {replicates}, expected at least 1")
    generator = np.random.default_rng(seed)
    size = max(1, _AT_ONCE // len(of))
    parts = []
    for start in range(0, replicates, size):
        drawn = generator.integers(0, len(of), (min(size, replicates - start), len(of)))
        parts.append(of[drawn].sum(1) / per[drawn].sum(1))
    return np.concatenate(parts)


def interval(
    sums: npt.ArrayLike,
    counts: npt.ArrayLike,
    replicates: int = REPLICATES,
    seed: int = 0,
    level: float = LEVEL,
) -> Interval:
    """The ratio of `sums [N]` to `counts [N]`, and its percentile interval.

    Args:
        sums: of each sequence; of differences where two contenders are compared. counts: what they are sums of, such
            as tokens.

    Raises:
        ValueError: as `resampled`; `level` is not within 0 and 1.
    """
    if not 0 < level < 1:
        raise ValueError(f"level is {level}, expected a share between 0 and 1")
    of, per = _checked(sums, counts)
    value = float(of.sum() / per.sum())
    low, high = np.quantile(resampled(of, per, replicates, seed), [(1 - level) / 2, (1 + level) / 2])
    # Where all sequences agree, rounding must not put the value outside.
    return Interval(value=value, low=min(float(low), value), high=max(float(high), value))


def _checked(sums: npt.ArrayLike, counts: npt.ArrayLike) -> tuple[Floats, Floats]:
    of, per = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    if of.ndim != 1 or of.shape != per.shape or not len(of):
        raise ValueError(f"sums have shape {of.shape} and counts {per.shape}, expected two vectors of one length")
    if not (np.isfinite(of).all() and np.isfinite(per).all() and (per > 0).all()):
        raise ValueError("sums or counts are not finite, or a count is not above 0")
    return of, per
