"""Rounding with error feedback in a kernel: one token, all heads at once, one place of their orders after the other.

The bits of `kvcalib.quant.feedback_loop.round_head`, if products are not fused with sums.
"""

# What Triton compiles has no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

KEPT = tl.constexpr(256)
"""Added to the code of an element that is kept exact."""


@triton.jit
def code_of(x, element, middle, live, BITS: tl.constexpr, LEVELS: tl.constexpr):
    """Midpoints below `x`, by binary search in the element's `LEVELS` of them (the last is +inf)."""
    code = tl.zeros_like(element)
    for step in tl.static_range(BITS):
        below = tl.load(middle + element * LEVELS + code + (LEVELS >> (step + 1)) - 1, mask=live, other=0.0)
        code += tl.where(below < x, LEVELS >> (step + 1), 0)
    return code


@triton.jit
def feed_back(
    x_row, x_sh, codes, zeros, scales, middle, book, order, matrix, RELATIVE: tl.constexpr, HEADS: tl.constexpr,
    DIM: tl.constexpr, SIZE: tl.constexpr, HEADS_PADDED: tl.constexpr, DIM_PADDED: tl.constexpr, BITS: tl.constexpr,
    LEVELS: tl.constexpr,
):  # fmt: skip
    """Replace `codes [E]` int16 of one token, of nearest rounding; exact elements, marked by `KEPT`, lose the mark."""
    head = tl.arange(0, HEADS_PADDED)[:, None]
    place = tl.arange(0, DIM_PADDED)[None, :]
    there = head < HEADS
    live = there & (place < DIM)
    element = tl.load(order + head * DIM + place, mask=live, other=0)
    x = tl.load(x_row + (element // DIM) * x_sh + element % DIM, mask=live, other=0.0).to(tl.float32)
    known = tl.load(codes + element, mask=live, other=0).to(tl.int32)
    target = x
    if RELATIVE:
        group = head * DIM // SIZE
        zero = tl.load(zeros + group, mask=there, other=0.0).to(tl.float32)
        scale = tl.load(scales + group, mask=there, other=0.0).to(tl.float32)
        divisor = tl.where(scale > 0, scale, 1.0)
    for k in range(DIM):
        at = place == k
        mine = tl.sum(tl.where(at, element, 0), 1)[:, None]
        before = tl.sum(tl.where(at, known, 0), 1)[:, None]
        wanted = tl.sum(tl.where(at, target, 0.0), 1)[:, None]
        if RELATIVE:
            wanted = tl.div_rn(wanted - zero, divisor)
        code = code_of(wanted, mine, middle, there, BITS, LEVELS)
        stored = tl.load(book + mine * LEVELS + code, mask=there, other=0.0)
        if RELATIVE:
            stored = zero + scale * stored
        exact = before >= KEPT
        error = tl.where(exact, 0.0, stored - tl.sum(tl.where(at, x, 0.0), 1)[:, None])
        known = tl.where(at, tl.where(exact, before - KEPT, code), known)
        row = tl.load(matrix + (head * DIM + k) * DIM + place, mask=live, other=0.0)
        target -= row * error
    tl.store(codes + element, known.to(tl.int16), mask=live)
