"""A tile of rows to numbers: fields out of words, centroids of the codes, exact elements over them.

Tensors of a group of 16 channels are `[8, N]` pairs: the channels of a thread lie in registers and the 32 lanes of a
warp hold 32 tokens of the same channel, so a warp's look-ups fall into one channel's codebook. Up to 3 bits one look-up
gives both channels of a pair, as two float16 in a word (not for float32 queries).
"""

# What Triton compiles has no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from kvcalib.runtime.kernels.arithmetic import halves

META = tl.constexpr(8)


@triton.jit
def _pair_fields(row, live, N: tl.constexpr):
    """Two words of 4-bit fields as 8 fields of 8 bits, `[8, N]`; higher bits are not cleared."""
    i = tl.arange(0, 8)[:, None]
    low = tl.load(row, mask=live, other=0)[None, :]
    high = tl.load(row + 1, mask=live, other=0)[None, :]
    return tl.where(i < 4, low, high) >> (8 * (i % 4))


@triton.jit
def _grouped_codes(row, live, width, fours, more_fours, twos, ones, N: tl.constexpr):
    """Codes `[8, N]` of the first and second channels of a group's pairs; every word is loaded once.

    fours, more_fours, twos: word of the group's plane of 4, again 4, and 2 bits; ones: half word of the plane of 1 bit.
    """
    i = tl.arange(0, 8)[:, None]
    a = tl.zeros([8, N], tl.int32)
    b = tl.zeros([8, N], tl.int32)
    if width >= 4:
        field = _pair_fields(row + fours, live, N)
        a = field & 15
        b = (field >> 4) & 15
    if width == 8:
        field = _pair_fields(row + more_fours, live, N)
        a |= (field & 15) << 4
        b |= ((field >> 4) & 15) << 4
    if (width & 2) != 0:
        field = tl.load(row + twos, mask=live, other=0)[None, :] >> (4 * i)
        a |= (field & 3) << (width & 4)
        b |= ((field >> 2) & 3) << (width & 4)
    if (width & 1) != 0:
        field = (tl.load(row + ones // 2, mask=live, other=0) >> (16 * (ones % 2)))[None, :] >> (2 * i)
        a |= (field & 1) << (width - 1)
        b |= ((field >> 1) & 1) << (width - 1)
    return a, b


@triton.jit
def _free_codes(row, live, fields, slot, HEADS: tl.constexpr, DIM: tl.constexpr, PLANES: tl.constexpr, N: tl.constexpr):
    """Codes `[8, N]` of the channels in `slot [8, 1]`, one load per field: any layout."""
    code = tl.zeros([8, N], tl.int32)
    for plane in tl.static_range(PLANES):
        entry = fields + (plane * HEADS * DIM + slot) * 4
        word = tl.load(row[None, :] + tl.load(entry), mask=live[None, :], other=0)
        code |= ((word >> tl.load(entry + 1)) & tl.load(entry + 2)) << tl.load(entry + 3)
    return code


@triton.jit
def _looked_up_in_pairs(row, live, width, twos, ones, start, N: tl.constexpr):
    """Both centroids of a pair in one look-up, for widths up to 3: 64 words of two float16 per pair from `start`."""
    i = tl.arange(0, 8)[:, None]
    index = tl.zeros([8, N], tl.int32)
    if (width & 2) != 0:
        index = (tl.load(row + twos, mask=live, other=0)[None, :] >> (4 * i)) & 15
    if (width & 1) != 0:
        field = (tl.load(row + ones // 2, mask=live, other=0) >> (16 * (ones % 2)))[None, :] >> (2 * i)
        index |= (field & 3) << 4
    return halves(tl.load((start + index) + 64 * i))


@triton.jit
def _looked_up(start, a, b, LEVELS: tl.constexpr):
    """Centroids of the codes `a, b [8, N]` of a group whose codebooks begin at `start`."""
    i = tl.arange(0, 8)[:, None]
    # Constant parts last: they become the offsets of the load instructions.
    return tl.load((start + a) + 2 * i * LEVELS), tl.load((start + b) + (2 * i + 1) * LEVELS)


@triton.jit
def decoded(
    row, live, head, group, tables,
    HEADS: tl.constexpr, DIM: tl.constexpr, LEVELS: tl.constexpr, WIDTH: tl.constexpr, PLANES: tl.constexpr,
    PAIRED: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Centroids `[8, N]` float32 of the first and of the second channels of the pairs of a group."""
    _, fields, book, pair_book, _ = tables
    slot = head * DIM + group * 16
    start = book + slot * LEVELS
    pair_start = pair_book + (head * (DIM // 2) + group * 8) * 64
    if PLANES > 0:
        i = tl.arange(0, 8)[:, None]
        a = _free_codes(row, live, fields, slot + 2 * i, HEADS, DIM, PLANES, N)
        b = _free_codes(row, live, fields, slot + 2 * i + 1, HEADS, DIM, PLANES, N)
        a, b = _looked_up(start, a, b, LEVELS)
    elif WIDTH >= 0:
        # All groups of one width: their fields follow one another.
        meta = fields + head * (DIM // 16) * META
        fours = tl.load(meta + 1) + 2 * group
        more_fours = tl.load(meta + 2) + 2 * group
        twos = tl.load(meta + 3) + group
        ones = tl.load(meta + 4) + group
        if PAIRED and WIDTH <= 3:
            a, b = _looked_up_in_pairs(row, live, WIDTH, twos, ones, pair_start, N)
        else:
            a, b = _grouped_codes(row, live, WIDTH, fours, more_fours, twos, ones, N)
            a, b = _looked_up(start, a, b, LEVELS)
    else:
        meta = fields + (head * (DIM // 16) + group) * META
        width = tl.load(meta)
        fours = tl.load(meta + 1)
        more_fours = tl.load(meta + 2)
        twos = tl.load(meta + 3)
        ones = tl.load(meta + 4)
        if PAIRED:
            if width <= 3:
                a, b = _looked_up_in_pairs(row, live, width, twos, ones, pair_start, N)
            else:
                a, b = _grouped_codes(row, live, width, fours, more_fours, twos, ones, N)
                a, b = _looked_up(start, a, b, LEVELS)
        else:
            a, b = _grouped_codes(row, live, width, fours, more_fours, twos, ones, N)
            a, b = _looked_up(start, a, b, LEVELS)
    return a, b


@triton.jit
def read_outlier(outlier, j, live, slots, DIM: tl.constexpr):
    """Slot `[N]` of outlier j of every token, -1 where it is another head's, and its value; slots: of the channels."""
    index, value, element = outlier
    channel = tl.load(index + j, mask=live, other=0).to(tl.int32) - element
    mine = live & (channel >= 0) & (channel < DIM)
    slot = tl.load(slots + channel, mask=mine, other=-1)
    return slot, tl.load(value + j, mask=live, other=0.0).to(tl.float32)


@triton.jit
def with_outlier(a, b, place, value):
    """Put the exact `value [N]` over the element at `place [N]` of a group's 16."""
    i = tl.arange(0, 8)[:, None]
    a = tl.where(place[None, :] == 2 * i, value[None, :], a)
    return a, tl.where(place[None, :] == 2 * i + 1, value[None, :], b)
