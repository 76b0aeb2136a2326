"""Optimal codebooks: exact weighted k-means in one dimension.

`fit` gives the `levels` centres that minimise

    objective = sum_i w_i min_c (x_i - c)^2

over all choices of centres, not a local optimum: in one dimension the groups of an optimum are contiguous, so
dynamic programming finds it (`dynamic_programme.py`). `fit_ladder` gives the codebooks of all widths
0..max_bits out of one programme. KVQuant (arXiv 2401.18079) fits the same objective, weighted by Fisher
information, with Lloyd's algorithm of scikit-learn; that is `solver="lloyd"`.

Up to `bins` distinct values the optimum is exact, to 1e-14 of the variance (so an outlier may be 1e6 times
the spread of the others, but not 1e12 times). Above that the programme runs over about `bins` groups of
points, or of bins of a histogram (`histogram.py`) if there are many, and its splits are then moved point by
point. `tests/quant/test_kmeans.py` holds `fit` to 1e-4 of the optimum, and the ladder of a channel of 8192
tokens to 1e-4 up to 6 bits and 1e-3 at 7 and 8.

Edge rules of everything that fits:

- Entries with a NaN or infinite value or weight are left out, with a RuntimeWarning that says how many.
- A negative weight raises ValueError. If all weights are zero, every value counts 1.
- With fewer distinct values (of positive weight) than levels, all are centres and the last one is repeated.
- With no value at all the centres are zeros, with a RuntimeWarning.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np

from kvcalib.quant.dynamic_programme import Floats, Ints
from kvcalib.quant.histogram import fit_histogram
from kvcalib.quant.ladder import codebooks
from kvcalib.quant.points import (
    Values,
    as_array,
    as_floats,
    distinct_points,
    finite_points,
    same_shape,
    sorted_points,
    usable,
    warn,
    warn_left_out,
)

Solver = Literal["exact", "lloyd"]

SORTED = 1 << 15
"""Up to this many values sorting is as fast as a histogram."""
CHANNELS = 16
"""Channels per task of `fit_ladders`: a cache line of float32."""


def fit(
    values: Any,
    weights: Any = None,
    levels: int = 8,
    *,
    solver: Solver = "exact",
    bins: int = 4096,
    seed: int = 0,
) -> Floats:
    """Centres float64 `[levels]`, ascending, of the best codebook for `values` (array or tensor, any shape).

    `weights` has the shape of `values`; without it every value counts 1. `bins` trades time for precision
    (see above; at least 8 per level are used). `seed` is for solver "lloyd" only: scikit-learn's `KMeans`
    with at most 50 iterations from one k-means++ start.

    Raises:
        ValueError: levels or bins below 1, an unknown solver, shapes that differ, a negative weight.
    """
    if solver not in ("exact", "lloyd"):
        raise ValueError(f"solver is {solver!r}, expected 'exact' or 'lloyd'")
    _at_least("levels", levels, 1)
    _at_least("bins", bins, 1)
    bins = max(bins, 8 * levels)
    points, mass = finite_points(values, weights)
    if not len(points):
        warn("no finite value to fit; the centres are zeros")
        return np.zeros(levels)
    if len(mass) and not mass.any():
        mass = mass[:0]
    if solver == "lloyd":
        return _lloyd(points, mass, levels, seed)
    if len(points) > max(SORTED, bins):
        x, w = distinct_points(points, mass, bins)
        if len(x):
            points, mass = x, w
        elif (centres := fit_histogram(points, mass, levels, bins)) is not None:
            return centres
    out = np.empty(levels)
    if not len(mass):
        mass = np.ones(len(points))
    x, w = sorted_points(points.astype(np.float64), mass.astype(np.float64))
    codebooks(x, w, [levels], bins, out)
    return out


def fit_ladder(values: Any, weights: Any = None, max_bits: int = 8, *, bins: int = 2048) -> list[Floats]:
    """Optimal codebooks of the widths 0..max_bits: float64 `[1], [2], [4], ..., [2**max_bits]`.

    Made for thousands of values per call. `bins` as in `fit`, but at least 4 per level of the widest one.
    Arguments and errors otherwise as in `fit`.
    """
    x = as_floats(values)
    w = None if weights is None else same_shape("weights", as_floats(weights), x.shape).reshape(-1, 1)
    flat = fit_ladders(x.reshape(-1, 1), w, None, max_bits, bins)[0]
    return [flat[(1 << bits) - 1 : (2 << bits) - 1] for bits in range(max_bits + 1)]


def fit_ladders(
    values: Any,
    weights: Any = None,
    valid: Any = None,
    max_bits: int = 8,
    bins: int = 2048,
) -> Floats:
    """`fit_ladder` of every column of `values [n, C]`, on all cores: float64 `[C, 2**(max_bits+1) - 1]`.

    The codebook of width b begins at `2**b - 1`. `weights [n, C]` or None; entries with `valid [n, C]` False
    are left out, whatever they hold. The result does not depend on the number of cores.
    """
    _at_least("max_bits", max_bits, 0)
    _at_least("bins", bins, 1)
    bins = max(bins, 4 << max_bits)
    x = as_floats(values)
    if x.ndim != 2:
        raise ValueError(f"values has shape {x.shape}, expected two dimensions [n, channels]")
    w = None if weights is None else same_shape("weights", as_floats(weights), x.shape)
    use = None if valid is None else same_shape("valid", as_array(valid).astype(bool), x.shape)
    sizes = [1 << bits for bits in range(max_bits + 1)]
    out = np.zeros((x.shape[1], sum(sizes)))
    report = np.zeros((x.shape[1], 3), np.int64)

    def block(start: int) -> None:
        part = slice(start, start + CHANNELS)
        columns = np.ascontiguousarray(x[:, part].T, dtype=np.float64)
        mass = np.ones_like(columns) if w is None else np.ascontiguousarray(w[:, part].T, dtype=np.float64)
        valid = np.ones(columns.shape, np.bool_) if use is None else np.ascontiguousarray(use[:, part].T)
        for c, column in enumerate(columns):
            points, weight, left_out, negative = usable(column, mass[c], valid[c])
            report[start + c] = left_out, negative, len(points)
            if len(points) and not negative:
                codebooks(*sorted_points(points, weight), sizes, bins, out[start + c])

    starts = range(0, x.shape[1], CHANNELS)
    if len(starts) == 1:
        block(0)
    else:
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            list(pool.map(block, starts))
    left_out, negative, used = report.T
    if negative.any():
        at = int(negative.argmax())
        raise ValueError(f"weights has {negative[at]} negative entries in column {at}; expected all >= 0")
    warn_left_out(int(left_out.sum()), x.size)
    if not used.all():
        none = np.flatnonzero(used == 0)
        warn(f"no finite value to fit in {len(none)} of {len(used)} columns, first {none[0]}; they get zeros")
    return out


def objective(values: Any, weights: Any, centres: Any) -> float:
    """`sum_i w_i min_c (x_i - c)^2` in float64; `weights` may be None.

    Non-finite entries are left out with a RuntimeWarning; a negative weight raises ValueError.
    """
    points, mass = finite_points(values, weights)
    unique, _ = _distinct_centres(centres)
    total = 0.0
    for start in range(0, len(points), 1 << 20):  # bounds the memory
        x = points[start : start + (1 << 20)].astype(np.float64)
        below, above = _neighbours(x, unique)
        squares = np.minimum(np.abs(x - unique[below]), np.abs(x - unique[above])) ** 2
        total += float(np.dot(squares, mass[start : start + len(x)]) if len(mass) else squares.sum())
    return total


def assign(values: Any, centres: Any) -> Ints:
    """Index int64 of the nearest of `centres [k]`, in any order, for each value, in the shape of `values`.

    Ties go to the lower index. Raises ValueError for a value or centre that is not finite.
    """
    x = as_floats(values).astype(np.float64)
    if not np.isfinite(x).all():
        raise ValueError(f"values has {_non_finite(x)} non-finite entries, expected none; leave them out")
    unique, index = _distinct_centres(centres)
    below, above = _neighbours(x, unique)
    down, up = np.abs(x - unique[below]), np.abs(x - unique[above])
    tie = np.minimum(index[below], index[above])
    return np.where(down == up, tie, np.where(down < up, index[below], index[above]))


def _lloyd(points: Values, mass: Values, levels: int, seed: int) -> Floats:
    from sklearn.cluster import KMeans  # half a second to import, and seldom wanted

    distinct = np.unique(points[mass > 0] if len(mass) else points).astype(np.float64)
    if len(distinct) <= levels:
        return np.concatenate([distinct, np.full(levels - len(distinct), distinct[-1])])
    model = KMeans(levels, n_init="auto", max_iter=50, random_state=seed)
    model.fit(points[:, None], sample_weight=mass if len(mass) else None)
    return np.sort(model.cluster_centers_[:, 0].astype(np.float64))


def _neighbours(x: Floats, centres: Floats) -> tuple[Ints, Ints]:
    """Indices of the ascending `centres` below and above each value; twice the same outside all of them."""
    above = np.searchsorted(centres, x)
    return np.maximum(above - 1, 0), np.minimum(above, len(centres) - 1)


def _distinct_centres(centres: Any) -> tuple[Floats, Ints]:
    """Distinct centres ascending, and the first index of each among `centres`."""
    c = as_floats(centres).astype(np.float64)
    if c.ndim != 1 or not len(c):
        raise ValueError(f"centres has shape {c.shape}, expected [k] with k >= 1")
    if not np.isfinite(c).all():
        raise ValueError(f"centres has {_non_finite(c)} non-finite entries, expected none")
    return np.unique(c, return_index=True)


def _non_finite(x: Floats) -> int:
    return int((~np.isfinite(x)).sum())


def _at_least(name: str, found: int, least: int) -> None:
    if found < least:
        raise ValueError(f"{name} is {found}, expected at least {least}")
