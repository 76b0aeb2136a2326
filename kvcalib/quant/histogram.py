"""k-means of very many values: over the bins of a weighted histogram, which are split where it matters.

A bin stands for its values with its weight and weighted mean, so k-means on bins loses the squared error
inside them, and mistakes a partition only where a boundary falls inside a bin. Those are split until they are
small enough.

The first bins are equally wide in the bulk and wider with the distance beyond, so that the bulk keeps fine
bins even if outliers stretch the range a thousandfold: they are equally wide in

    u = z  if |z| <= 6  else  sign(z) 6 (1 + log(|z| / 6)),      z = (x - median) / (interquartile range).
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from kvcalib.quant.dynamic_programme import (
    Floats,
    Ints,
    Pointers,
    group_means,
    prefix_sums,
    refine,
    solve,
    trace,
)
from kvcalib.quant.points import Values

BULK = 6.0
"""Where the logarithm begins: far enough out that few values of a bell-shaped density pay for one."""
TOLERANCE = 1e-3
"""Squared error inside the bins, relative to the total, below which only bins at the splits are split."""
NEAR, FINE = 2, 16
"""How many bins to either side of a split are split, and into how many."""


def fit_histogram(points: Values, mass: Values, levels: int, bins: int) -> Floats | None:
    """Optimal centres float64 `[levels]` of finite `points [n]`, not all equal, with weights `mass [n]`.

    `mass` of length 0 means weight 1 each. None if even split bins are too coarse for values so unevenly
    spread, or their squares overflow.
    """
    histogram = Histogram(points, mass, bins)
    span = float(histogram.high[-1] - histogram.low[0])
    if span * span * float(histogram.mass.sum()) == math.inf:
        return None
    for _ in range(3):
        used = np.flatnonzero(histogram.mass)
        lost = histogram.lost()
        if len(used) > levels:
            x, w = histogram.mean[used], histogram.mass[used]
            splits = trace(solve(*prefix_sums(x, w), levels), levels)
            error = w * (x - np.repeat(group_means(x, w, splits), np.diff(splits))) ** 2
            if lost.sum() <= TOLERANCE * error.sum():
                return _refined(histogram, used, splits)
        # The sum of lost / parts^2, for a given number of parts, is least with parts ~ lost^(1/3).
        share = np.cbrt(lost)
        histogram.split(1 + (share * (bins / share.sum())).astype(np.int64))
    return None


def _refined(histogram: Histogram, used: Ints, splits: Ints) -> Floats:
    """Means of the groups, once the bins around the splits are split and the splits have moved within them.

    `splits` are positions among the `used` bins, those with any weight. A split that moves away is followed.
    """
    fine = np.zeros(len(histogram.mass), np.bool_)
    while True:
        borders = splits[1:-1]
        if fine[used[borders - 1]].all() and fine[used[borders]].all():
            return group_means(histogram.mean[used], histogram.mass[used], splits)
        near = used[np.clip(borders[:, None] + np.arange(-NEAR, NEAR), 0, len(used) - 1)]
        parts = np.ones(len(fine), np.int64)
        parts[near] = np.where(fine[near], 1, FINE)
        first_bin = (np.cumsum(parts) - parts)[used[borders]]
        histogram.split(parts)
        fine = np.repeat(fine | (parts > 1), parts)
        used = np.flatnonzero(histogram.mass)
        splits = np.concatenate([[0], np.searchsorted(used, first_bin), [len(used)]])
        weight, moment = prefix_sums(histogram.mean[used], histogram.mass[used])
        refine(weight, moment, splits, NEAR * FINE)


class Histogram:
    """Bins over finite, not all equal `values [n]` with `weights [n]`, or of length 0 for weight 1 each.

    Attributes, per bin in ascending order:
        mass: total weight, float64; may be 0.
        mean: weighted mean (0 where there is no mass).
        low, high: borders.
    """

    def __init__(self, values: Values, weights: Values, bins: int) -> None:
        self._values, self._weights = values, weights
        sample = np.sort(values[:: max(1, len(values) // 4096)]).astype(np.float64)
        self._centre = float(sample[len(sample) // 2])
        least, most = float(values.min()), float(values.max())
        quartiles = sample[len(sample) * 3 // 4] - sample[len(sample) // 4]
        # Mostly equal values have no interquartile range.
        scale = max(float(quartiles or np.abs(sample - self._centre).mean()), 1e-12 * (most - least))
        start, stop = stretch((np.array([least, most]) - self._centre) / scale)
        borders = self._centre + scale * shrink(np.linspace(start, stop, bins + 1))
        borders[0], borders[-1] = least, most
        self.low, self.high = borders[:-1], borders[1:]
        self._bin = np.empty(len(values), np.int32)
        sums = np.zeros((bins, 2))
        _tally(values, weights, self._centre, 1 / scale, start, bins / (stop - start), self._bin, sums)
        self._names = np.arange(bins)
        self.mass, self.mean = self._moments(sums)

    def split(self, parts: Ints) -> None:
        """Split bin i into `parts[i]` equally wide ones by one pass over the values; 1 leaves it as it is."""
        grown = parts > 1
        # A bin keeps its name for life, new ones get the next names: `_bin` changes only for what is split.
        named = int(self._names.max()) + 1
        old = self._names[grown]
        size, first = np.zeros(named, np.int32), np.zeros(named, np.int32)
        low, inverse = np.zeros(named), np.zeros(named)
        size[old] = parts[grown]
        first[old] = np.cumsum(parts[grown]) - parts[grown]
        low[old] = self.low[grown]
        inverse[old] = parts[grown] / np.maximum(self.high[grown] - self.low[grown], 1e-300)
        sums = np.zeros((int(parts[grown].sum()), 2))
        _tally_split(self._values, self._weights, self._centre, self._bin, size, first, low, inverse, sums)

        of = np.repeat(np.arange(len(parts)), parts)
        nth = np.arange(len(of)) - np.repeat(np.cumsum(parts) - parts, parts)
        width = (self.high - self.low) / parts
        new = grown[of]
        after = parts[of] - 1 - nth
        self.low, self.high = self.low[of] + nth * width[of], self.high[of] - after * width[of]
        self._names = self._names[of]
        self._names[new] = named + np.arange(len(sums))
        self.mass, self.mean = self.mass[of], self.mean[of]
        self.mass[new], self.mean[new] = self._moments(sums)

    def lost(self) -> Floats:
        """Bound on the squared error inside each bin: mass (mean - low) (high - mean) (Bhatia, Davis)."""
        return self.mass * np.maximum(self.mean - self.low, 0) * np.maximum(self.high - self.mean, 0)

    def _moments(self, sums: Floats) -> tuple[Floats, Floats]:
        mass = sums[:, 0]
        return mass, np.where(mass > 0, self._centre + sums[:, 1] / np.where(mass > 0, mass, 1), 0)


def stretch(z: Floats) -> Floats:
    """u(z)."""
    away = np.abs(z)
    return np.where(away <= BULK, z, np.copysign(BULK * (1 + np.log(np.maximum(away, BULK) / BULK)), z))


def shrink(u: Floats) -> Floats:
    """z(u), the inverse of `stretch`."""
    away = np.abs(u)
    return np.where(away <= BULK, u, np.copysign(BULK * np.exp(np.maximum(away, BULK) / BULK - 1), u))


@njit(cache=True, nogil=True)
def _tally(
    values: Values,
    weights: Values,
    centre: float,
    inverse: float,
    start: float,
    bins_per_u: float,
    bin_of: Pointers,
    sums: Floats,
) -> None:
    """Bin of every value; weight and weighted sum of (value - centre) of every bin into `sums [bins, 2]`."""
    last = np.uint64(len(sums) - 1)  # unsigned, or every index is checked for being negative
    for i in range(len(values)):
        x = float(values[i]) - centre
        u = x * inverse
        if abs(u) > BULK:
            u = math.copysign(BULK * (1 + math.log(abs(u) / BULK)), u)
        # Rounding can leave the least value a little below the first bin: the signed cast makes that 0.
        b = min(np.uint64(np.int64((u - start) * bins_per_u)), last)
        w = np.float64(weights[i]) if len(weights) else 1.0
        bin_of[i] = b
        sums[b, 0] += w
        sums[b, 1] += w * x


@njit(cache=True, nogil=True)
def _tally_split(
    values: Values,
    weights: Values,
    centre: float,
    bin_of: Pointers,
    size: Pointers,
    first: Pointers,
    low: Floats,
    inverse: Floats,
    sums: Floats,
) -> None:
    """The same for bins b that are split: their `size[b]` parts are the rows of `sums` from `first[b]` on."""
    for i in range(len(values)):
        b = np.uint32(bin_of[i])
        if size[b] == 0:
            continue
        x = np.float64(values[i])
        part = first[b] + min(max(int((x - low[b]) * inverse[b]), 0), size[b] - 1)
        w = np.float64(weights[i]) if len(weights) else 1.0
        bin_of[i] = len(size) + part
        sums[part, 0] += w
        sums[part, 1] += w * (x - centre)
