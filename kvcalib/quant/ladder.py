"""Codebooks of several sizes for the same sorted points out of one programme.

With more points than the programme can take, it runs over contiguous groups of them, and the splits of each
codebook are then moved among the points.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from kvcalib.quant.dynamic_programme import Floats, Ints, group_means, prefix_sums, refine, solve, trace


def codebooks(x: Floats, w: Floats, sizes: list[int], bins: int, out: Floats) -> None:
    """Optimal codebooks of all `sizes`, ascending, for sorted points: one after another into `out`.

    Kernels are called from here and not from each other's files, because numba's cache does not notice when a
    kernel of another file has changed.
    """
    cuts = coarse_cuts(x, w, bins)
    weight, moment = prefix_sums(x, w)
    back = solve(weight[cuts], moment[cuts], min(sizes[-1], len(cuts) - 1))
    begin = 0
    for size in sizes:
        groups = min(size, len(cuts) - 1)
        splits = cuts[trace(back, groups)]
        if len(x) > bins:
            refine(weight, moment, splits, 2 * len(x) // bins)
        out[begin : begin + groups] = group_means(x, w, splits)
        out[begin + groups : begin + size] = out[begin + groups - 1]
        begin += size


@njit(cache=True, nogil=True)
def coarse_cuts(x: Floats, w: Floats, groups: int) -> Ints:
    """About `groups` contiguous groups of sorted points, or n if that is less: cuts int64 from 0 to n.

    Optimal codebooks have a density of centres that goes with density(x)^(1/3) (Panter and Dite 1951), so
    each group gets an equal share of the sum of (w * width^2)^(1/3); no point counts for more than one share.
    """
    n = len(x)
    cuts = np.empty(n + 1, np.int64)
    cuts[0] = 0
    if n <= groups:
        for i in range(n):
            cuts[i + 1] = i + 1
        return cuts
    heaviest = 0.0
    for i in range(n):
        heaviest = max(heaviest, w[i])
    span = max(x[n - 1] / 2 - x[0] / 2, 1e-300)
    share = np.empty(n)
    for i in range(n):
        width = (x[min(i + 1, n - 1)] / 2 - x[max(i - 1, 0)] / 2) / span
        share[i] = np.cbrt(w[i] / heaviest * width * width)
    # What a group gets if no point gets more than that: found by lowering it until it is.
    one, lowered = math.inf, math.inf
    while lowered == math.inf or lowered < 0.99 * one:
        one = lowered
        lowered = 0.0
        for i in range(n):
            lowered += min(share[i], one)
        lowered /= groups
    one = lowered
    count, filled = 1, 0.5 * one
    for i in range(n - 1):
        filled += min(share[i], one)
        if filled >= one:
            filled -= one
            cuts[count] = i + 1
            count += 1
    cuts[count] = n
    return cuts[: count + 1]
