"""Quantizing a few new tokens on a CPU: what `Quantizer.encode` computes, compiled, written straight into the cache.

Decoding brings one token per step; there, forty small tensor operations per layer cost more than their arithmetic. The
results are the same bits: float32 throughout, no operation reordered, ties to the lower code and the earlier element.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import numba
import numpy as np
import torch
from torch import Tensor

from kvcalib.quant.feedback_loop import nearest, round_head
from kvcalib.quant.quantizer import Quantizer
from kvcalib.runtime.native import place
from kvcalib.runtime.native_loops import PLACE, pointer

MOST_TOKENS = 64
FEW = 16
"""Outliers per group up to which the extremes are found by insertion, without sorting the token."""
DYNAMIC = ("x", "batch", "tokens", "bfloat", "heads", "copies", "residue",
           *(f"{name}{part}" for name in ("words", "index", "exact", "zero", "level") for part in PLACE))  # fmt: skip
TABLES = ("relative", "count", "width", "groups", "elements", "centroids", "step", "middle", "levels", "fields",
          "planes", "weight", "short", "order", "matrix")  # fmt: skip
CALL = np.dtype([(name, np.int64) for name in DYNAMIC + TABLES])
"""One call: counts, addresses, and steps in elements; "level" is the values' scale, "order" 0 without feedback."""
_NAMES = {"words": "words", "index": "outlier_index", "exact": "outlier_value", "zero": "zero", "level": "scale"}
_TABLES: WeakKeyDictionary[Quantizer, tuple[list[int], set[str], tuple[Tensor, ...]]] = WeakKeyDictionary()


def store(
    quantizer: Quantizer,
    x: Tensor,
    exact_dtype: torch.dtype,
    rows: Mapping[str, Tensor],
    role: str = "",
    residue: Tensor | None = None,
) -> None:
    """Write the rows of new tokens `x [B, t, H, D]` to `rows`, whose names are those of `Quantizer.row_spec`.

    Zero and scale of scope "token", without outliers, may go to rows that have one for each head: all get the same.

    Args:
        role: what stands before the names, "key." or "value.".
        residue: overwritten with the squared error of what was stored, `|x - decode(rows)|^2`, and with `|x|^2`, per
            token and head: float32 `[B, t, H, 2]`, contiguous.

    Raises:
        ValueError: `residue` has another shape or type or is not contiguous; rows of zero and scale fit neither scope.
    """
    tables, names, _ = _tables(quantizer)
    flat = x.detach().float().contiguous()
    heads = x.shape[2]
    copies = _copies(quantizer, rows[f"{role}zero"].shape[-1]) if "zero" in names else 1
    if residue is not None and (
        residue.shape != (*x.shape[:3], 2) or residue.dtype != torch.float32 or not residue.is_contiguous()
    ):
        raise ValueError(
            f"residue is {residue.dtype} {tuple(residue.shape)} with steps {residue.stride()}, expected contiguous "
            f"float32 {(*x.shape[:3], 2)}: batch, tokens, kv heads, error and norm"
        )
    numbers = [flat.data_ptr(), x.shape[0], x.shape[1], int(exact_dtype == torch.bfloat16), heads, copies,
               0 if residue is None else residue.data_ptr()]  # fmt: skip
    for name in _NAMES.values():
        numbers += place(rows, role + name) if name in names else (0, 0, 0)
    call = array("q", numbers + tables)
    _store(call.buffer_info()[0])


def _copies(quantizer: Quantizer, groups: int) -> int:
    """How often each zero and scale is written where the rows have `groups` of them for a token."""
    if groups == quantizer.groups:
        return 1
    if groups == quantizer.layout.widths.shape[0] and not quantizer.outliers:
        return groups
    raise ValueError(
        f"rows have {groups} zeros and scales for a token, the quantizer of scope {quantizer.scope!r} with "
        f"{quantizer.outliers} outliers has {quantizer.groups}; one for each head is taken too, without outliers"
    )


def _tables(quantizer: Quantizer) -> tuple[list[int], set[str], tuple[Tensor, ...]]:
    kept = _TABLES.get(quantizer)
    if kept is None:
        cpu = torch.device("cpu")
        centroids, middle = (t.float().contiguous() for t in quantizer.codebook.tables(cpu))
        fields = torch.stack([t.to(torch.int32) for t in quantizer.layout.tables(cpu)]).contiguous()
        weight = quantizer.weight.float().flatten().contiguous()
        feedback = () if quantizer.feedback is None else quantizer.feedback.tables(cpu)
        numbers = [
            int(quantizer.relative), quantizer.outliers, quantizer.layout.words, quantizer.groups,
            quantizer.layout.widths.numel() // quantizer.groups, centroids.data_ptr(), centroids.shape[1],
            middle.data_ptr(), middle.shape[1], fields.data_ptr(), fields.shape[1], weight.data_ptr(),
            int(quantizer.index_dtype == torch.uint8), *(t.data_ptr() for t in feedback or (torch.empty(0),) * 2),
        ]  # fmt: skip
        held = (centroids, middle, fields, weight, *feedback)
        kept = (numbers, set(quantizer.row_spec(exact_dtype=torch.float16)), held)
        _TABLES[quantizer] = kept
    return kept


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
def _extremes(part: Any, count: Any, first: Any, last: Any) -> None:
    """The `count + 1` least elements of `part` into `first`, and the greatest into `last`: their indices, ascending.

    As a stable sort would order them: of equal ones the earlier is less.
    """
    held = 0
    for e in range(part.shape[0]):
        if held <= count or part[e] < part[first[count]]:
            i = min(held, count)
            while i > 0 and part[e] < part[first[i - 1]]:
                first[i] = first[i - 1]
                i -= 1
            first[i] = e
            held = min(held + 1, count + 1)
    held = 0
    for e in range(part.shape[0]):
        # `last` is filled from its end, greatest there.
        if held <= count or part[e] >= part[last[0]]:
            if held <= count:
                i = count - held
                held += 1
            else:
                i = 0
            while i < count and part[e] >= part[last[i + 1]]:
                last[i] = last[i + 1]
                i += 1
            last[i] = e


@numba.njit(inline="always")
def _halves(address: Any) -> Any:
    return numba.carray(pointer(address), 1 << 40, dtype=np.uint16)  # type: ignore[call-arg]


@numba.njit(nogil=True, cache=True)
def _store(address: Any) -> None:
    """Quantize and write the tokens of the `CALL` at `address`."""
    call = numba.carray(pointer(address), 1, dtype=CALL)[0]  # type: ignore[call-arg]
    count, elements, groups, bfloat = call.count, call.elements, call.groups, call.bfloat != 0
    x = numba.carray(pointer(call.x), (call.batch, call.tokens, groups, elements), dtype=np.float32)
    channels = groups * elements
    centroids = numba.carray(pointer(call.centroids), (channels, call.step), dtype=np.float32)
    middle = numba.carray(pointer(call.middle), (channels, call.levels), dtype=np.float32)
    fields = numba.carray(pointer(call.fields), (4, call.planes, channels), dtype=np.uint32)
    weight = numba.carray(pointer(call.weight), channels, dtype=np.float32)
    words = numba.carray(pointer(call.words), 1 << 40, dtype=np.uint32)
    exact, zeros, levels = _halves(call.exact), _halves(call.zero), _halves(call.level)
    error, chosen = np.empty(elements, np.float32), np.empty(max(1, count), np.int64)
    first, last = np.empty(count + 1, np.int64), np.empty(count + 1, np.int64)
    left, size = np.empty(elements, np.float32), elements - count
    heads, dim = call.heads // groups, channels // call.heads
    residue = numba.carray(pointer(call.residue), (call.batch, call.tokens, call.heads, 2), dtype=np.float32)
    order = numba.carray(pointer(call.order), (call.heads, dim), dtype=np.int64)
    matrix = numba.carray(pointer(call.matrix), (call.heads, dim, dim), dtype=np.float32)
    codes, target, is_exact = np.empty(channels, np.int32), np.empty(dim, np.float32), np.zeros(elements, np.bool_)
    for b in range(call.batch):
        for t in range(call.tokens):
            row = words[b * call.words_row + t * call.words_token :]
            for w in range(call.width):
                row[w] = np.uint32(0)
            for group in range(groups):
                part = x[b, t, group]
                zero, scale, step = np.float32(0.0), np.float32(1.0), np.float32(1.0)
                if call.relative:
                    # The narrowest range of all but `count` elements, as `outliers.shortest_window`.
                    if count <= FEW:
                        _extremes(part, count, first, last)
                    else:
                        ranked = np.argsort(part, kind="mergesort")
                        first[:], last[:] = ranked[: count + 1], ranked[size - 1 :]
                    best, begin = part[last[0]] - part[first[0]], 0
                    for i in range(1, count + 1):
                        span = part[last[i]] - part[first[i]]
                        if span < best:
                            best, begin = span, i
                    low, high = part[first[begin]], part[last[begin]]
                    for i in range(count):
                        chosen[i] = first[i] if i < begin else last[i + 1]
                    middle_bits = _narrow((low + high) / np.float32(2.0), bfloat)
                    scale_bits = _narrow((high - low) / np.float32(2.0), bfloat)
                    for copy in range(call.copies):
                        zeros[b * call.zero_row + t * call.zero_token + group + copy] = middle_bits
                        levels[b * call.level_row + t * call.level_token + group + copy] = scale_bits
                    zero, step = _widen(middle_bits, bfloat), _widen(scale_bits, bfloat)
                    scale = step if step > 0 else np.float32(1.0)
                for e in range(elements):
                    c = group * elements + e
                    value = (part[e] - zero) / scale if call.relative else part[e]
                    code = nearest(middle[c], value)
                    codes[c] = code
                    error[e] = value - centroids[c, code]
                    error[e] = error[e] * error[e] * weight[c]
                if not call.relative:
                    for i in range(count):
                        worst = 0
                        for e in range(1, elements):
                            if error[e] > error[worst]:
                                worst = e
                        chosen[i] = worst
                        error[worst] = np.float32(-1.0)
                if count:
                    chosen[:count].sort()
                    to_index = b * call.index_row + t * call.index_token + group * count
                    to_exact = b * call.exact_row + t * call.exact_token + group * count
                    for i in range(count):
                        if call.short:
                            short = numba.carray(pointer(call.index), 1 << 40, dtype=np.uint8)
                            short[to_index + i] = np.uint8(chosen[i])
                        else:
                            long = numba.carray(pointer(call.index), 1 << 40, dtype=np.int16)
                            long[to_index + i] = np.int16(chosen[i])
                        exact[to_exact + i] = _narrow(part[chosen[i]], bfloat)
                if call.order:
                    for i in range(count):
                        is_exact[chosen[i]] = True
                    for h in range(heads):
                        its, mine = slice(h * dim, (h + 1) * dim), group * heads + h
                        of = slice(mine * dim, (mine + 1) * dim)
                        round_head(part[its], is_exact[its], call.relative, zero, step, centroids[of], middle[of],
                                   order[mine], matrix[mine], target, codes[of])  # fmt: skip
                    for i in range(count):
                        is_exact[chosen[i]] = False
                for e in range(elements):
                    c = group * elements + e
                    left[e] = part[e] - (zero + step * centroids[c, codes[c]])
                    for plane in range(call.planes):
                        mask = fields[2, plane, c]
                        if mask:
                            code = (np.uint32(codes[c]) >> fields[3, plane, c]) & mask
                            row[fields[0, plane, c]] |= np.uint32(code << fields[1, plane, c])
                for i in range(count):
                    left[chosen[i]] = part[chosen[i]] - _widen(_narrow(part[chosen[i]], bfloat), bfloat)
                if call.residue:
                    for h in range(heads):
                        wrong, norm = np.float64(0.0), np.float64(0.0)
                        for e in range(h * dim, (h + 1) * dim):
                            wrong += np.float64(left[e]) * np.float64(left[e])
                            norm += np.float64(part[e]) * np.float64(part[e])
                        residue[b, t, group * heads + h, 0] = wrong
                        residue[b, t, group * heads + h, 1] = norm
