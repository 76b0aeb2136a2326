"""Quantizing a few new tokens on a CPU: what `Quantizer.encode` computes, in two compiled loops.

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

from kvcalib.quant.quantizer import Quantizer, Rows, saturate

MOST_TOKENS = 64
_TABLES: WeakKeyDictionary[Quantizer, tuple[Any, Any, Any, Any]] = WeakKeyDictionary()


def encode(quantizer: Quantizer, x: Tensor, exact_dtype: torch.dtype) -> Rows:
    """`Quantizer.encode` of `x [N, H, D]`, by the faster way for its size and device."""
    if x.device.type != "cpu" or x.shape[0] > MOST_TOKENS or not x.shape[0]:
        return quantizer.encode(x, exact_dtype)
    tokens, groups, count = x.shape[0], quantizer.groups, quantizer.outliers
    flat = np.ascontiguousarray(x.detach().float().numpy()).reshape(tokens, groups, -1)
    rows: Rows = {}
    index = np.zeros((tokens, groups, count), np.int64)
    zero = scale = np.zeros((tokens, groups), np.float32)
    if quantizer.relative:
        bounds = np.zeros((2, tokens, groups), np.float32)
        _shortest_window(flat, bounds, index)
        lower, upper = torch.from_numpy(bounds)
        rows["zero"] = saturate((lower + upper) / 2, exact_dtype)
        rows["scale"] = saturate((upper - lower) / 2, exact_dtype)
        zero, scale = rows["zero"].float().numpy(), rows["scale"].float().numpy()
    words = np.zeros((tokens, quantizer.layout.words), np.int32)
    _pack(flat, zero, scale, quantizer.relative, *_tables(quantizer), index, words)
    if count:
        chosen = torch.from_numpy(index)
        rows["outlier_value"] = saturate(torch.from_numpy(flat).gather(-1, chosen), exact_dtype)
        rows["outlier_index"] = chosen.to(quantizer.index_dtype)
    rows["words"] = torch.from_numpy(words)
    return rows


def _tables(quantizer: Quantizer) -> tuple[Any, Any, Any, Any]:
    if quantizer not in _TABLES:
        cpu = torch.device("cpu")
        centroids, middle = quantizer.codebook.tables(cpu)
        fields = np.stack([t.numpy().astype(np.int64) for t in quantizer.layout.tables(cpu)])
        _TABLES[quantizer] = (
            centroids.numpy(), middle.numpy(), fields.astype(np.uint32),
            np.ascontiguousarray(quantizer.weight.float().flatten().numpy()),
        )  # fmt: skip
    return _TABLES[quantizer]


@numba.njit(nogil=True, cache=True)
def _shortest_window(x: Any, bounds: Any, index: Any) -> None:
    """Range of all but n elements and who lies outside, as `outliers.shortest_window`; `x [N, G, E]`."""
    tokens, groups, elements = x.shape
    count = index.shape[2]
    size = elements - count
    for token in range(tokens):
        for group in range(groups):
            part = x[token, group]
            order = np.argsort(part, kind="mergesort")
            best, first = part[order[size - 1]] - part[order[0]], 0
            for i in range(1, count + 1):
                span = part[order[i + size - 1]] - part[order[i]]
                if span < best:
                    best, first = span, i
            bounds[0, token, group] = part[order[first]]
            bounds[1, token, group] = part[order[first + size - 1]]
            for i in range(count):
                index[token, group, i] = order[i if i < first else i + size]
            index[token, group].sort()


@numba.njit(nogil=True, cache=True)
def _pack(
    x: Any, zero: Any, scale: Any, relative: Any, centroids: Any, middle: Any, fields: Any, weight: Any, index: Any,
    words: Any,
) -> None:  # fmt: skip
    """Codes of `x [N, G, E]` into `words [N, W]`; for keys also the elements that save most error, into `index`."""
    tokens, groups, elements = x.shape
    count, levels = index.shape[2], middle.shape[1]
    error = np.empty(elements, np.float32)
    for token in range(tokens):
        for group in range(groups):
            for e in range(elements):
                c = group * elements + e
                value = x[token, group, e]
                if relative:
                    span = scale[token, group]
                    value = (value - zero[token, group]) / (span if span > 0 else np.float32(1.0))
                low, high = 0, levels
                while low < high:
                    half = (low + high) // 2
                    if middle[c, half] < value:
                        low = half + 1
                    else:
                        high = half
                error[e] = value - centroids[c, low]
                error[e] = error[e] * error[e] * weight[c]
                for plane in range(fields.shape[1]):
                    mask = fields[2, plane, c]
                    if mask:
                        code = (np.uint32(low) >> fields[3, plane, c]) & mask
                        words[token, fields[0, plane, c]] |= np.int32(code << fields[1, plane, c])
            if not relative:
                for i in range(count):
                    worst = 0
                    for e in range(1, elements):
                        if error[e] > error[worst]:
                            worst = e
                    index[token, group, i] = worst
                    error[worst] = np.float32(-1.0)
                index[token, group].sort()
