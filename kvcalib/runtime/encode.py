"""Quantizing a few new tokens on a CPU: what `Quantizer.encode` computes, compiled, written straight into the cache.

Decoding brings one token per step; there, forty small tensor operations per layer cost more than their arithmetic. The
results are the same bits: float32 throughout, no operation reordered, ties to the lower code and the earlier element.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import numba
import numpy as np
import torch
from torch import Tensor

from kvcalib.quant.quantizer import Quantizer
from kvcalib.runtime.storage import Flat

MOST_TOKENS = 64
_TABLES: WeakKeyDictionary[Quantizer, tuple[Any, Any, Any, Any, Any]] = WeakKeyDictionary()
_NOTHING: Flat = (np.zeros(0, np.uint16), 0, 0, 0)


def store(quantizer: Quantizer, x: Tensor, exact_dtype: torch.dtype, places: dict[str, Flat]) -> None:
    """Write the rows of new tokens `x [B, t, H, D]` to `places`, one for each name of `Quantizer.row_spec`."""
    flat = np.ascontiguousarray(x.detach().float().numpy())
    flat = flat.reshape(x.shape[0], x.shape[1], quantizer.groups, -1)
    index = places.get("outlier_index", _NOTHING)
    _store(
        flat, quantizer.relative, exact_dtype == torch.bfloat16, quantizer.outliers, *_tables(quantizer),
        places["words"], index, places.get("outlier_value", _NOTHING), places.get("zero", _NOTHING),
        places.get("scale", _NOTHING),
    )  # fmt: skip


def _tables(quantizer: Quantizer) -> tuple[Any, Any, Any, Any, Any]:
    if quantizer not in _TABLES:
        cpu = torch.device("cpu")
        centroids, middle = quantizer.codebook.tables(cpu)
        fields = np.stack([t.numpy().astype(np.int64) for t in quantizer.layout.tables(cpu)]).astype(np.uint32)
        weight = np.ascontiguousarray(quantizer.weight.float().flatten().numpy())
        _TABLES[quantizer] = (quantizer.layout.words, centroids.numpy(), middle.numpy(), fields, weight)
    return _TABLES[quantizer]


@numba.njit(nogil=True, cache=True)
def _narrow(x: Any, bfloat: Any) -> Any:
    """The bits of float32 `x` in bfloat16 or float16, to the nearest even, at the largest number where it overflows."""
    if x != x:
        return np.uint16(0x7FC0) if bfloat else np.uint16(0x7E00)
    limit = np.float32(3.3895313892515355e38) if bfloat else np.float32(65504.0)
    x = min(max(x, -limit), limit)
    bits = np.int64(np.float32(x).view(np.int32)) & 0xFFFFFFFF
    if bfloat:
        return np.uint16((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
    sign, size = (bits >> 16) & 0x8000, bits & 0x7FFFFFFF
    if size < 0x38800000:  # below 2^-14 float16 counts in steps of 2^-24
        return np.uint16(sign | np.int64(np.rint(np.float64(abs(x)) * 16777216.0)))
    return np.uint16(sign | ((size + 0xFFF + ((size >> 13) & 1) - 0x38000000) >> 13))


@numba.njit(nogil=True, cache=True)
def _widen(bits: Any, bfloat: Any) -> Any:
    """The float32 of `_narrow`'s bits."""
    number = np.int64(bits)
    if bfloat:
        return np.int32(np.uint32(number << 16)).view(np.float32)
    exponent, fraction = (number >> 10) & 31, number & 1023
    size = np.float64(fraction) * 2.0**-24 if exponent == 0 else (1.0 + fraction / 1024.0) * 2.0 ** (exponent - 15.0)
    return np.float32(-size if number & 0x8000 else size)


@numba.njit(nogil=True, cache=True)
def _store(
    x: Any, relative: Any, bfloat: Any, count: Any, width: Any, centroids: Any, middle: Any, fields: Any, weight: Any,
    words: Any, index: Any, exact: Any, zeros: Any, scales: Any,
) -> None:  # fmt: skip
    batch, tokens, groups, elements = x.shape
    levels, planes = middle.shape[1], fields.shape[1]
    error, chosen = np.empty(elements, np.float32), np.empty(max(1, count), np.int64)
    size = elements - count
    for b in range(batch):
        for t in range(tokens):
            row = words[0][words[3] + b * words[1] + t * words[2] :]
            for w in range(width):
                row[w] = np.uint32(0)
            for group in range(groups):
                part = x[b, t, group]
                zero, scale = np.float32(0.0), np.float32(1.0)
                if relative:
                    # The narrowest range of all but `count` elements, as `outliers.shortest_window`.
                    order = np.argsort(part, kind="mergesort")
                    best, first = part[order[size - 1]] - part[order[0]], 0
                    for i in range(1, count + 1):
                        span = part[order[i + size - 1]] - part[order[i]]
                        if span < best:
                            best, first = span, i
                    low, high = part[order[first]], part[order[first + size - 1]]
                    for i in range(count):
                        chosen[i] = order[i if i < first else i + size]
                    middle_bits = _narrow((low + high) / np.float32(2.0), bfloat)
                    scale_bits = _narrow((high - low) / np.float32(2.0), bfloat)
                    zeros[0][zeros[3] + b * zeros[1] + t * zeros[2] + group] = middle_bits
                    scales[0][scales[3] + b * scales[1] + t * scales[2] + group] = scale_bits
                    zero, scale = _widen(middle_bits, bfloat), _widen(scale_bits, bfloat)
                    scale = scale if scale > 0 else np.float32(1.0)
                for e in range(elements):
                    c = group * elements + e
                    value = (part[e] - zero) / scale if relative else part[e]
                    lower, upper = 0, levels
                    while lower < upper:
                        half = (lower + upper) // 2
                        if middle[c, half] < value:
                            lower = half + 1
                        else:
                            upper = half
                    error[e] = value - centroids[c, lower]
                    error[e] = error[e] * error[e] * weight[c]
                    for plane in range(planes):
                        mask = fields[2, plane, c]
                        if mask:
                            code = (np.uint32(lower) >> fields[3, plane, c]) & mask
                            row[fields[0, plane, c]] |= np.uint32(code << fields[1, plane, c])
                if not relative:
                    for i in range(count):
                        worst = 0
                        for e in range(1, elements):
                            if error[e] > error[worst]:
                                worst = e
                        chosen[i] = worst
                        error[worst] = np.float32(-1.0)
                if count:
                    chosen[:count].sort()
                    to_index = index[3] + b * index[1] + t * index[2] + group * count
                    to_exact = exact[3] + b * exact[1] + t * exact[2] + group * count
                    for i in range(count):
                        index[0][to_index + i] = chosen[i]
                        exact[0][to_exact + i] = _narrow(part[chosen[i]], bfloat)
