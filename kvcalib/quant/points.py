"""Sorted weighted points out of raw values: what `dynamic_programme.py` is fed with.

The kernels are compiled by numba and hold no GIL.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
from numba import njit

from kvcalib.quant.dynamic_programme import Floats

Values = npt.NDArray[np.float32] | npt.NDArray[np.float64]
Array = TypeVar("Array", bound=npt.NDArray[Any])
Flags = npt.NDArray[np.bool_]
Words = npt.NDArray[np.uint64]

DIGIT = 11
"""Bits per pass of the radix sort: counts that fit the first-level cache, and few passes."""


def finite_points(values: Any, weights: Any) -> tuple[Values, Values]:
    """Finite values and their weights, flat and contiguous, float32 or float64; no weights have length 0.

    Raises ValueError for a negative weight or a shape that differs, and warns of entries left out.
    """
    x: npt.NDArray[Any] = as_floats(values)
    w: npt.NDArray[Any] = same_shape("weights", x if weights is None else as_floats(weights), x.shape)
    x, w = np.ascontiguousarray(x.reshape(-1)), np.ascontiguousarray(w.reshape(-1))
    if weights is None:
        w = w[:0]
    # Minimum and maximum hand on NaN, and cost far less than a mask.
    if not all(np.isfinite([a.min(), a.max()]).all() for a in (x, w) if len(a)):
        finite = np.isfinite(x) & np.isfinite(w) if len(w) else np.isfinite(x)
        warn_left_out(len(x) - int(finite.sum()), len(x))
        x, w = x[finite], w[finite] if len(w) else w
    if len(w) and w.min() < 0:
        count = int((w < 0).sum())
        raise ValueError(f"weights has {count} negative entries, lowest {w.min()}; expected all >= 0")
    return x, w


def as_array(x: Any) -> npt.NDArray[Any]:
    """A numpy view of an array-like or a torch tensor, without importing torch."""
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        if x.dtype.is_floating_point and x.element_size() < 4:  # numpy has no bfloat16
            x = x.float()
        x = x.numpy()
    return np.asarray(x)


def as_floats(x: Any) -> Values:
    """The same as float32 or float64, copied only if it is neither."""
    x = as_array(x)
    if x.dtype in (np.float32, np.float64):
        return cast(Values, x)
    return cast(Values, x.astype(np.float32 if x.dtype == np.float16 else np.float64))


def same_shape(name: str, array: Array, shape: tuple[int, ...]) -> Array:
    """`array`, or a ValueError that names it."""
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}, expected {shape} like values")
    return array


def warn_left_out(count: int, total: int) -> None:
    """Say how many entries take no part, if any."""
    if count:
        warn(f"{count} of {total} entries have a non-finite value or weight and are left out")


def warn(message: str) -> None:
    """A RuntimeWarning in the name of `kmeans`."""
    warnings.warn(f"kmeans: {message}", RuntimeWarning, stacklevel=4)


@njit(cache=True, nogil=True)
def usable(values: Floats, weights: Floats, valid: Flags) -> tuple[Floats, Floats, int, int]:
    """The valid entries whose value and weight are finite; how many are not; how many weigh less than 0.

    If no weight is above 0, all become 1. All arguments are `[n]`.
    """
    x, w = np.empty(len(values)), np.empty(len(values))
    n = left_out = negative = 0
    heaviest = 0.0
    for i in range(len(values)):
        if not valid[i]:
            continue
        if not (math.isfinite(values[i]) and math.isfinite(weights[i])):
            left_out += 1
            continue
        if weights[i] < 0:
            negative += 1
        x[n], w[n] = values[i], weights[i]
        heaviest = max(heaviest, w[n])
        n += 1
    if heaviest == 0:
        for i in range(n):
            w[i] = 1.0
    return x[:n], w[:n], left_out, negative


@njit(cache=True, nogil=True)
def sorted_points(values: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """Distinct `values [n]` ascending and the sum of `weights [n]` of each; values of weight 0 are left out.

    All must be finite and no weight negative. A radix sort: each pass orders by 11 bits, and passes in which
    all digits agree (the lower 29 bits of what was float32) are skipped.
    """
    keys, mass = np.empty(len(values), np.uint64), np.empty(len(values))
    n = 0
    bits = values.view(np.uint64)
    sign = np.uint64(1 << 63)
    for i in range(len(values)):
        if weights[i] > 0:
            word = bits[i] if values[i] != 0 else np.uint64(0)  # -0.0 is 0.0
            # The unsigned order of the keys is the order of the numbers: negative numbers count backwards.
            keys[n] = ~word if word & sign else word | sign
            mass[n] = weights[i]
            n += 1
    keys, mass = _radix_sort(keys[:n], mass[:n])
    unique = 0
    for i in range(n):
        if unique and keys[i] == keys[unique - 1]:
            mass[unique - 1] += mass[i]
        else:
            keys[unique], mass[unique] = keys[i], mass[i]
            unique += 1
    for i in range(unique):
        keys[i] = keys[i] & ~sign if keys[i] & sign else ~keys[i]
    return keys[:unique].view(np.float64), mass[:unique]


@njit(cache=True, nogil=True)
def _radix_sort(keys: Words, mass: Floats) -> tuple[Words, Floats]:
    """Both arrays in the order of `keys`; least significant digit first."""
    n = len(keys)
    passes = (64 + DIGIT - 1) // DIGIT
    mask = np.uint64((1 << DIGIT) - 1)
    counts = np.zeros((passes, 1 << DIGIT), np.int64)
    for i in range(n):
        for p in range(passes):
            counts[p, (keys[i] >> np.uint64(p * DIGIT)) & mask] += 1
    other_keys, other_mass = np.empty_like(keys), np.empty_like(mass)
    for p in range(passes):
        shift = np.uint64(p * DIGIT)
        if n == 0 or counts[p, (keys[0] >> shift) & mask] == n:
            continue
        place = 0
        for digit in range(1 << DIGIT):
            counts[p, digit], place = place, place + counts[p, digit]
        for i in range(n):
            digit = (keys[i] >> shift) & mask
            to = counts[p, digit]
            other_keys[to], other_mass[to] = keys[i], mass[i]
            counts[p, digit] = to + 1
        keys, other_keys = other_keys, keys
        mass, other_mass = other_mass, mass
    return keys, mass


@njit(cache=True, nogil=True)
def distinct_points(values: Values, weights: Values, limit: int) -> tuple[Floats, Floats]:
    """The distinct `values [n]` of positive weight, in any order, float64, with their summed weights.

    Two empty arrays as soon as there are more than `limit` of them, so continuous values are turned away at
    once. `weights` of length 0 counts every value once.
    """
    slots = 16
    while slots < 4 * limit:
        slots *= 2
    table, mass = np.empty(slots), np.zeros(slots)
    number = np.empty(1)
    bits = number.view(np.uint64)
    found = 0
    for i in range(len(values)):
        w = np.float64(weights[i]) if len(weights) else 1.0
        if w == 0:
            continue
        number[0] = np.float64(values[i])
        scrambled = bits[0] * np.uint64(0x9E3779B97F4A7C15)  # Fibonacci hashing (Knuth, TAOCP 6.4)
        slot = np.int64(scrambled >> np.uint64(40)) % slots
        while mass[slot] > 0 and table[slot] != number[0]:
            slot = (slot + 1) & (slots - 1)
        if mass[slot] == 0:
            found += 1
            if found > limit:
                return table[:0], mass[:0]
            table[slot] = number[0]
        mass[slot] += w
    n = 0
    for i in range(slots):
        if mass[i] > 0:
            table[n], mass[n] = table[i], mass[i]
            n += 1
    return table[:n], mass[:n]
