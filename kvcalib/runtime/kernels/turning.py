"""Rotation of a tile: how far its tokens turn, and the cos and sin of that.

With t0 the smallest position of a tile, `q . R(t) k = (R(-t0) q) . R(t - t0) k`. The query turns once per tile and the
keys by `t - t0`, whose cos and sin are the same few rows for every tile (see `tables.py`).
"""

# What Triton compiles has no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from kvcalib.runtime.kernels.arithmetic import halves

DIGIT = tl.constexpr(4096)
NEAR = tl.constexpr(128)
NOT_A_POSITION = tl.constexpr(2147483647)


@triton.jit
def angle_at(turn, pair, position, PAIRS: tl.constexpr):
    """cos and sin of any position from 0 to DIGIT**2 - 1: two digits, added by the angle-sum formula."""
    low = turn + pair * DIGIT + position % DIGIT
    high = turn + (2 * PAIRS + pair) * DIGIT + (position // DIGIT) % DIGIT
    cos = tl.load(low)
    sin = tl.load(low + PAIRS * DIGIT)
    more_cos = tl.load(high)
    more_sin = tl.load(high + PAIRS * DIGIT)
    return cos * more_cos - sin * more_sin, sin * more_cos + cos * more_sin


@triton.jit
def near_angle(turn, near, pair, place, delta, far, PAIRS: tl.constexpr, HALF: tl.constexpr):
    """cos and sin `[8, N]` of `delta [N]`; far: whether any delta is NEAR or more; place: first of the 8 pairs."""
    i = tl.arange(0, 8)[:, None]
    column = (delta % NEAR)[None, :]
    if HALF:
        both = tl.load((near + place * NEAR + column) + i * NEAR)
        cos, sin = halves(both)
    else:
        start = near + 2 * place * NEAR + column
        cos = tl.load(start + 2 * i * NEAR)
        sin = tl.load(start + (2 * i + 1) * NEAR)
    if far:
        cos, sin = angle_at(turn, pair[:, None], delta[None, :], PAIRS)
    return cos, sin


@triton.jit
def turned_by(positions, slot, live, PER_HEAD: tl.constexpr):
    """Of a tile: which tokens live, the smallest position, each token's distance from it, whether any is NEAR or more,
    and 0.

    positions: the pointer to those of the row (and head), and the distance of two slots' numbers. PER_HEAD: slots at
    position -1 are unused and not read; otherwise that counts as 0.

    The 0 comes out of the positions, so the compiler cannot know it. Added to the head, it keeps the unrolled groups'
    addresses and look-ups from being moved out of the loop over tiles, where they would fill the registers.
    """
    start, stride = positions
    position = tl.load(start + slot * stride, mask=live, other=0)
    if PER_HEAD:
        live = live & (position >= 0)
    position = tl.maximum(position, 0)
    first = tl.min(tl.where(live, position, NOT_A_POSITION), 0)
    delta = tl.where(live, position - first, 0)
    far = tl.max(delta, 0) >= NEAR
    return live, tl.where(first == NOT_A_POSITION, 0, first), delta, far, tl.minimum(first, 0)
