"""Rounding with error feedback, compiled: one head of one token, and many tokens.

`round_head` is the definition, operation by operation in float32; the cache's encoder on a CPU calls it too, and the
Triton kernel and the tensor operations of `feedback.py` give the same bits.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np


@numba.njit(nogil=True, cache=True)
def nearest(middle: Any, x: Any) -> Any:
    """How many of the ascending `middle [S - 1]` lie below `x`: the code of the nearest centroid, the lower of two."""
    lower, upper = 0, middle.shape[0]
    while lower < upper:
        half = (lower + upper) // 2
        if middle[half] < x:
            lower = half + 1
        else:
            upper = half
    return lower


@numba.njit(nogil=True, cache=True)
def round_head(
    x: Any, exact: Any, relative: Any, zero: Any, scale: Any, centroids: Any, middle: Any, order: Any, matrix: Any,
    target: Any, codes: Any,
) -> None:  # fmt: skip
    """Codes of one head `x [D]` of one token.

    Args:
        exact: `[D]`, not 0 where the element is kept exact: it has no error, and its code stays as `codes` has it.
        relative: whether the codebook is relative to `zero` and `scale`, as they are stored.
        centroids, middle: `[D, S]`, `[D, S - 1]`, the codebook's tables. order, matrix: see `Feedback`.
        target: `[D]` float32, overwritten.
        codes: `[D]`, overwritten but for exact elements.
    """
    channels = x.shape[0]
    divisor = scale if scale > 0 else np.float32(1.0)
    for place in range(channels):
        target[place] = x[order[place]]
    for place in range(channels):
        c = order[place]
        if exact[c]:
            continue
        if relative:
            code = nearest(middle[c], (target[place] - zero) / divisor)
            error = (zero + scale * centroids[c, code]) - x[c]
        else:
            code = nearest(middle[c], target[place])
            error = centroids[c, code] - x[c]
        codes[c] = code
        for later in range(place + 1, channels):
            target[later] -= matrix[place, later] * error


@numba.njit(nogil=True, cache=True)
def round_tokens(
    x: Any, exact: Any, relative: Any, zero: Any, scale: Any, centroids: Any, middle: Any, order: Any, matrix: Any,
    codes: Any,
) -> None:  # fmt: skip
    """`round_head` of all heads of `x [N, H, D]`; `zero` and `scale` are `[N, H]`, tables have H before what they had.

    `exact` and `codes` are `[N, H, D]`.
    """
    target = np.empty(x.shape[2], np.float32)
    for n in range(x.shape[0]):
        for h in range(x.shape[1]):
            round_head(x[n, h], exact[n, h], relative, zero[n, h], scale[n, h], centroids[h], middle[h], order[h],
                       matrix[h], target, codes[n, h])  # fmt: skip
