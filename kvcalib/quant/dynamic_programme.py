"""Best split of sorted weighted points into contiguous groups: the programme under `kmeans.py`.

For points x_1 < ... < x_n with weights w_i > 0 and prefix sums W_j = sum_{i<=j} w_i, S_j = sum_{i<=j} w_i
(x_i - mean), the squared error of the group (i, j] around its own mean is

    sum w (x - mean)^2  -  (S_j - S_i)^2 / (W_j - W_i)

and the first terms add up to a constant, so 1-D k-means is the choice of k-1 splits that maximises the gain

    D[k][j] = max_{i<j}  D[k-1][i] + (S_j - S_i)^2 / (W_j - W_i)       (Wang and Song 2011, Ckmeans.1d.dp)

The gain obeys the quadrangle inequality, so the best last split `opt` is monotone (Knuth 1971; Yao 1980):

    opt[k-1][j] <= opt[k][j] <= opt[k][j+1].

All kernels are compiled by numba, hold no GIL and work in float64. D is known to about 1e-14 of the total
variance, so splits whose costs differ by less than that are ties.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from numba import njit

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Pointers = npt.NDArray[np.int32]

KEPT = 4


@njit(cache=True, nogil=True)
def prefix_sums(x: Floats, w: Floats) -> tuple[Floats, Floats]:
    """`(W, S)` of sorted `x [n]` and weights `w [n]`: float64 `[n+1]` each.

    In units of the largest weight and half the range of x: that keeps squares from overflowing and moves no
    split.
    """
    n = len(x)
    largest = 0.0
    for i in range(n):
        largest = max(largest, w[i])
    # Halved before subtracting: the range of two finite numbers can overflow.
    middle, scale = x[0] / 2 + x[n - 1] / 2, 1 / max(x[n - 1] / 2 - x[0] / 2, 1e-300)
    weight, moment = np.zeros(n + 1), np.zeros(n + 1)
    for i in range(n):
        mass = w[i] / largest
        weight[i + 1] = weight[i] + mass
        moment[i + 1] = moment[i] + mass * ((x[i] - middle) * scale)
    mean = moment[n] / weight[n]
    for i in range(n):
        moment[i + 1] = moment[i] + w[i] / largest * ((x[i] - middle) * scale - mean)
    return weight, moment


@njit(cache=True, nogil=True)
def _gain(weight: Floats, moment: Floats, i: int, j: int) -> float:
    """What the group (i, j] takes off the total error; nothing if its weight is lost in rounding."""
    mass = weight[j] - weight[i]
    step = moment[j] - moment[i]
    return step * step / mass if mass > 0 else 0.0


@njit(cache=True, nogil=True)
def solve(weight: Floats, moment: Floats, levels: int) -> Pointers:
    """Back pointers int32 `[levels+1, n+1]`: where the last of k groups over the first j points begins.

    Row k answers for k groups of all n points, so one call serves every number of groups up to `levels`;
    other entries are filled only where such an answer can need them. Requires 1 <= levels <= n.
    """
    n = len(weight) - 1
    back = np.zeros((levels + 1, n + 1), np.int32)
    # KEPT entries more than needed, because _knuth_row reads that far ahead.
    before, after = np.zeros(n + KEPT), np.zeros(n + KEPT)
    kept, kept_for = np.empty((n + 1, KEPT)), np.full(n + 1, -1, np.int32)
    for j in range(1, n + 1):
        before[j] = _gain(weight, moment, 0, j)
    few = math.sqrt(n / (2 * math.log2(n + 1)))
    for k in range(2, levels + 1):
        # Pointers grow with k, so following today's from n never falls below a split that a later row needs.
        first = n
        for _ in range(levels - k):
            first = back[k - 1, first]
        first = max(first, k)
        if k <= few or k == levels:
            _bisect_row(before, after, weight, moment, back, k, first)
        else:
            _knuth_row(before, after, weight, moment, back, k, first, kept, kept_for)
        before, after = after, before
    return back


@njit(cache=True, nogil=True)
def _bisect_row(
    before: Floats, after: Floats, weight: Floats, moment: Floats, back: Pointers, k: int, first: int
) -> None:
    """Row k for j in [first, n] by divide and conquer, O(n log n): entries lie between their neighbours'."""
    count = len(weight) - first
    step = 1
    while 2 * step <= count:
        step *= 2
    while step:
        for p in range(step, count + 1, 2 * step):
            j = first - 1 + p
            low = max(k - 1, back[k - 1, j])
            if p > step:
                low = max(low, back[k, j - step])
            high = min(j - 1, back[k, j + step]) if p + step <= count else j - 1
            best, chosen = -1.0, low
            for i in range(low, high + 1):
                value = before[i] + _gain(weight, moment, i, j)
                if value > best:
                    best, chosen = value, i
            back[k, j], after[j] = chosen, best
        step //= 2


@njit(cache=True, nogil=True)
def _knuth_row(
    before: Floats,
    after: Floats,
    weight: Floats,
    moment: Floats,
    back: Pointers,
    k: int,
    first: int,
    kept: Floats,
    kept_for: Pointers,
) -> None:
    """Row k for j in [first, n] within Knuth's bounds, O(n^2 / k) together with all further rows.

    In these rows the lower bound seldom changes with k and the answer is mostly near it, so the gains of the
    first KEPT candidates, `kept [n+1, KEPT]`, are kept from row to row: no division and no unpredictable loop
    in most entries.
    """
    n = len(weight) - 1
    high = n - 1
    for j in range(n, first - 1, -1):
        low = max(k - 1, back[k - 1, j])
        if kept_for[j] != low:
            kept_for[j] = low
            for t in range(KEPT):
                kept[j, t] = _gain(weight, moment, low + t, j) if low + t < j else -np.inf
        # A tree of selects, not a loop: the compiler makes it free of branches.
        left, right = before[low] + kept[j, 0], before[low + 1] + kept[j, 1]
        chosen, best = (low + 1, right) if right > left else (low, left)
        left, right = before[low + 2] + kept[j, 2], before[low + 3] + kept[j, 3]
        other, value = (low + 3, right) if right > left else (low + 2, left)
        if value > best:
            chosen, best = other, value
        for i in range(low + KEPT, min(j - 1, high) + 1):
            value = before[i] + _gain(weight, moment, i, j)
            if value > best:
                chosen, best = i, value
        back[k, j], after[j], high = chosen, best, chosen


@njit(cache=True, nogil=True)
def trace(back: Pointers, groups: int) -> Ints:
    """Splits int64 `[groups+1]`, from 0 to n, of the best division of all points into `groups`."""
    splits = np.zeros(groups + 1, np.int64)
    splits[groups] = back.shape[1] - 1
    for k in range(groups, 1, -1):
        splits[k - 1] = back[k, splits[k]]
    return splits


@njit(cache=True, nogil=True)
def refine(weight: Floats, moment: Floats, splits: Ints, reach: int) -> None:
    """Improve `splits [k+1]` in place by moving all inner splits at once, by 0, 1, 2, 4 ... `reach` points.

    Each round is a programme over these moves; it ends when no joint move gains anything.
    """
    groups, n = len(splits) - 1, len(weight) - 1
    sides = 1
    while 1 << sides <= reach:
        sides += 1
    wide = 2 * sides + 1
    place = np.empty((groups + 1, wide), np.int64)
    score = np.zeros((groups + 1, wide))
    origin = np.empty((groups + 1, wide), np.int64)
    while groups > 1:
        place[0, :], place[groups, :] = 0, n
        current = 0.0
        for k in range(1, groups + 1):
            current += _gain(weight, moment, splits[k - 1], splits[k])
            for t in range(wide):
                if k < groups:
                    away = 1 << (abs(t - sides) - 1) if t != sides else 0
                    place[k, t] = min(max(splits[k] + (away if t > sides else -away), k), n - groups + k)
                score[k, t], origin[k, t] = -1.0, 0
                for s in range(wide):
                    if score[k - 1, s] < 0 or place[k - 1, s] >= place[k, t]:
                        continue
                    value = score[k - 1, s] + _gain(weight, moment, place[k - 1, s], place[k, t])
                    if value > score[k, t]:
                        score[k, t], origin[k, t] = value, s
        if score[groups, 0] <= current:  # strict gains only, so this ends
            return
        t = origin[groups, 0]
        for k in range(groups - 1, 0, -1):
            splits[k] = place[k, t]
            t = origin[k, t]


@njit(cache=True, nogil=True)
def group_means(x: Floats, w: Floats, splits: Ints) -> Floats:
    """Weighted mean of each group of sorted points: float64 `[k]` for `splits [k+1]`."""
    means = np.empty(len(splits) - 1)
    for k in range(len(means)):
        # Relative to the first point, so that a group of one point keeps its value to the last bit.
        mass = away = 0.0
        for i in range(splits[k], splits[k + 1]):
            mass += w[i]
            away += w[i] * (x[i] - x[splits[k]])
        means[k] = x[splits[k]] + away / mass
    return means
