"""Attention over packed keys and values in one pass: the Triton kernels.

A program takes some rows of queries of one kv head (all query heads that share it: each tile of keys and values is
decoded once for all of them) and one stretch of the packed tokens. Tile by tile it unpacks the keys of a group of 16
channels, looks their centroids up, turns them by RoPE, scores them, carries an online softmax (arXiv 1805.02867) and
adds the values up the same way. Stretches are reduced by a second kernel in a fixed order (flash-decoding), so a launch
gives the same bits every time. Exact tokens (sinks, the recent window) are one stretch of their own.

Tensors of a group are `[8, N]` pairs: the channels of a thread lie in registers and the 32 lanes of a warp hold 32
tokens of the same channel, so a warp's look-ups fall into one channel's codebook. Up to 3 bits one look-up gives both
channels of a pair, as two float16 in a word (not for float32 queries).

Rotation: with t0 the smallest position of a tile, `q . R(t) k = (R(-t0) q) . R(t - t0) k`. The query turns once per
tile and the keys by `t - t0`, whose cos and sin are the same few rows for every tile (see `tables.py`).

Values: `x = zero[t] + scale[t] * c`. The scale goes into the softmax weights, `w = p * scale`, and the zeros add up to
one number per row, `sum p * zero`. float16 has too little range for `p * scale`; there x is computed per element.
"""

# What Triton compiles has no Python types, no starred tuples, and decides some branches before others.
# mypy: disable-error-code="no-untyped-def, assignment"
# ruff: noqa: RUF005, SIM102

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
DIGIT = tl.constexpr(4096)
NEAR = tl.constexpr(128)
# So many outliers of a token are kept in registers; more are read again for every group.
FEW = tl.constexpr(4)
META = tl.constexpr(8)
NOT_A_POSITION = tl.constexpr(2147483647)
# Scales below this count as this, so that an exact element of a token whose other elements are all equal survives
# the division by its scale.
SMALLEST_SCALE = tl.constexpr(2.0**-40)


@triton.jit
def narrow(x, kind: tl.constexpr):
    """float32 `x` rounded to nearest even in `kind`. By hand for bfloat16, which Triton's interpreter truncates."""
    if kind == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = (bits & -65536).to(tl.float32, bitcast=True)
    return x.to(kind)


@triton.jit
def _halves(both):
    """The two float16 numbers of a word, the low half first, as float32."""
    low = both.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, (both >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _angle(turn, pair, position, PAIRS: tl.constexpr):
    """cos and sin of any position from 0 to DIGIT**2 - 1: two digits, added by the angle-sum formula."""
    low = turn + pair * DIGIT + position % DIGIT
    high = turn + (2 * PAIRS + pair) * DIGIT + (position // DIGIT) % DIGIT
    cos = tl.load(low)
    sin = tl.load(low + PAIRS * DIGIT)
    more_cos = tl.load(high)
    more_sin = tl.load(high + PAIRS * DIGIT)
    return cos * more_cos - sin * more_sin, sin * more_cos + cos * more_sin


@triton.jit
def _near_angle(turn, near, pair, place, delta, far, PAIRS: tl.constexpr, HALF: tl.constexpr):
    """cos and sin `[8, N]` of `delta [N]`; far: whether any delta is NEAR or more; place: first of the 8 pairs."""
    i = tl.arange(0, 8)[:, None]
    column = (delta % NEAR)[None, :]
    if HALF:
        both = tl.load((near + place * NEAR + column) + i * NEAR)
        cos, sin = _halves(both)
    else:
        start = near + 2 * place * NEAR + column
        cos = tl.load(start + 2 * i * NEAR)
        sin = tl.load(start + (2 * i + 1) * NEAR)
    if far:
        cos, sin = _angle(turn, pair[:, None], delta[None, :], PAIRS)
    return cos, sin


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
    return _halves(tl.load((start + index) + 64 * i))


@triton.jit
def _looked_up(start, a, b, LEVELS: tl.constexpr):
    """Centroids of the codes `a, b [8, N]` of a group whose codebooks begin at `start`."""
    i = tl.arange(0, 8)[:, None]
    # Constant parts last: they become the offsets of the load instructions.
    return tl.load((start + a) + 2 * i * LEVELS), tl.load((start + b) + (2 * i + 1) * LEVELS)


@triton.jit
def _decoded(
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
def _outlier(outlier, j, live, slots, DIM: tl.constexpr):
    """Slot `[N]` of outlier j of every token, -1 where it is another head's, and its value; slots: of the channels."""
    index, value, element = outlier
    channel = tl.load(index + j, mask=live, other=0).to(tl.int32) - element
    mine = live & (channel >= 0) & (channel < DIM)
    slot = tl.load(slots + channel, mask=mine, other=-1)
    return slot, tl.load(value + j, mask=live, other=0.0).to(tl.float32)


@triton.jit
def _with_outlier(a, b, place, value):
    """Put the exact `value [N]` over the element at `place [N]` of a group's 16."""
    i = tl.arange(0, 8)[:, None]
    a = tl.where(place[None, :] == 2 * i, value[None, :], a)
    return a, tl.where(place[None, :] == 2 * i + 1, value[None, :], b)


@triton.jit
def _dot(left, right, acc, kind: tl.constexpr, WIDEN: tl.constexpr):
    """`acc + left @ right` in float32 of factors rounded to `kind`.

    WIDEN: the same numbers as float32 factors, for Triton's interpreter, whose dot misreads bfloat16.
    """
    if WIDEN:
        left = narrow(left, kind).to(tl.float32)
        right = narrow(right, kind).to(tl.float32)
    else:
        left = left.to(kind)
        right = right.to(kind)
    return tl.dot(left, right, acc, input_precision="ieee")


@triton.jit
def _interleave(a, b, N: tl.constexpr):
    """`[8, N]` twice to `[16, N]`: a0, b0, a1, b1, ..."""
    return tl.join(a, b).permute(0, 2, 1).reshape(16, N)


@triton.jit
def _scores(
    query, live, delta, far, first, head, PACKED: tl.constexpr, source, outlier, tables, angles, scaling,
    HEADS: tl.constexpr, DIM: tl.constexpr, M: tl.constexpr, N: tl.constexpr, LEVELS: tl.constexpr,
    WIDTH: tl.constexpr, PLANES: tl.constexpr, PAIRED: tl.constexpr, OUTLIERS: tl.constexpr, ROTATE: tl.constexpr,
    HALF: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Scores `[M, N]` of the query rows with one tile of keys.

    query: row pointers `[M]` and which rows exist; source: `[N]` pointers to rows of words, or to exact keys; outlier:
    `[N]` pointers to the tokens' index and value, and the number of the head's first element.
    """
    query_row, query_live = query
    channels = tables[0]
    slots = tables[4] + head * DIM
    turn, near, pairs, pair_scale = angles
    i = tl.arange(0, 8)
    kind: tl.constexpr = query_row.dtype.element_ty
    wheres = ()
    exacts = ()
    for j in tl.static_range(OUTLIERS if OUTLIERS <= FEW else 0):
        where, exact = _outlier(outlier, j, live, slots, DIM)
        wheres = wheres + (where,)
        exacts = exacts + (exact,)
    score = tl.zeros([M, N], tl.float32)
    for group in tl.range(DIM // 16):
        place = channels + head * DIM + group * 16 + 2 * i
        first_channel = tl.load(place)
        second_channel = tl.load(place + 1)
        q_mask = query_live[:, None]
        q_a = tl.load(query_row[:, None] + first_channel[None, :], mask=q_mask, other=0.0).to(tl.float32) * scaling
        q_b = tl.load(query_row[:, None] + second_channel[None, :], mask=q_mask, other=0.0).to(tl.float32) * scaling
        if PACKED:
            a, b = _decoded(source, live, head, group, tables, HEADS, DIM, LEVELS, WIDTH, PLANES, PAIRED, N)
            if OUTLIERS <= FEW:
                for j in tl.static_range(OUTLIERS):
                    a, b = _with_outlier(a, b, wheres[j] - 16 * group, exacts[j])
            else:
                for j in range(OUTLIERS):
                    where, exact = _outlier(outlier, j, live, slots, DIM)
                    a, b = _with_outlier(a, b, where - 16 * group, exact)
        else:
            a = tl.load(source[None, :] + first_channel[:, None], mask=live[None, :], other=0.0).to(tl.float32)
            b = tl.load(source[None, :] + second_channel[:, None], mask=live[None, :], other=0.0).to(tl.float32)
        if ROTATE:
            pair = tl.load(pairs + head * (DIM // 2) + group * 8 + i)
            cos, sin = _angle(turn, pair, first, DIM // 2)
            size = tl.load(pair_scale + pair)
            cos = (cos * size)[None, :]
            sin = (sin * size)[None, :]
            q_a, q_b = q_a * cos + q_b * sin, q_b * cos - q_a * sin
            cos, sin = _near_angle(turn, near, pair, head * (DIM // 2) + group * 8, delta, far, DIM // 2, HALF)
            a, b = a * cos - b * sin, b * cos + a * sin
        score = _dot(tl.join(q_a, q_b).reshape(M, 16), _interleave(a, b, N), score, kind, WIDEN)
    return score


@triton.jit
def _add_values(
    accs, weight, decay, live, zero, scale, head, kind: tl.constexpr, PACKED: tl.constexpr, source, outlier, tables,
    HEADS: tl.constexpr, DIM: tl.constexpr, N: tl.constexpr, LEVELS: tl.constexpr, WIDTH: tl.constexpr,
    PLANES: tl.constexpr, PAIRED: tl.constexpr, OUTLIERS: tl.constexpr, FOLD: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """`accs * decay + weight @ values`, one `[M, 16]` per group; weight `[M, N]`; dots in `kind`."""
    channels = tables[0]
    slots = tables[4] + head * DIM
    i = tl.arange(0, 8)
    wheres = ()
    exacts = ()
    for j in tl.static_range(OUTLIERS if OUTLIERS <= FEW else 0):
        where, exact = _outlier(outlier, j, live, slots, DIM)
        if FOLD:
            exact = (exact - zero) / scale
        wheres = wheres + (where,)
        exacts = exacts + (exact,)
    added = ()
    for group in tl.static_range(DIM // 16):
        if PACKED:
            a, b = _decoded(source, live, head, group, tables, HEADS, DIM, LEVELS, WIDTH, PLANES, PAIRED, N)
            if not FOLD:
                a = zero[None, :] + scale[None, :] * a
                b = zero[None, :] + scale[None, :] * b
            if OUTLIERS <= FEW:
                for j in tl.static_range(OUTLIERS):
                    a, b = _with_outlier(a, b, wheres[j] - 16 * group, exacts[j])
            else:
                for j in range(OUTLIERS):
                    where, exact = _outlier(outlier, j, live, slots, DIM)
                    if FOLD:
                        exact = (exact - zero) / scale
                    a, b = _with_outlier(a, b, where - 16 * group, exact)
        else:
            place = channels + head * DIM + group * 16 + 2 * i
            first_channel = tl.load(place)
            second_channel = tl.load(place + 1)
            a = tl.load(source[None, :] + first_channel[:, None], mask=live[None, :], other=0.0).to(tl.float32)
            b = tl.load(source[None, :] + second_channel[:, None], mask=live[None, :], other=0.0).to(tl.float32)
        right = tl.trans(_interleave(a, b, N))
        added = added + (_dot(weight, right, accs[group] * decay[:, None], kind, WIDEN),)
    return added


@triton.jit
def _turned_by(positions, slot, live):
    """Smallest position of the tile, each token's distance from it, whether any is NEAR or more, and 0.

    The 0 comes out of the positions, so the compiler cannot know it. Added to the head, it keeps the unrolled groups'
    addresses and look-ups from being moved out of the loop over tiles, where they would fill the registers.
    """
    position = tl.maximum(tl.load(positions + slot, mask=live, other=0), 0)
    first = tl.min(tl.where(live, position, NOT_A_POSITION), 0)
    delta = tl.where(live, position - first, 0)
    far = tl.max(delta, 0) >= NEAR
    return tl.where(first == NOT_A_POSITION, 0, first), delta, far, tl.minimum(first, 0)


@triton.jit
def _masked(
    score, slot, live, query_live, query_slot, query_number, mask, mask_row, mask_column, softcap,
    MASK: tl.constexpr, SOFTCAP: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """Soft cap, then the mask: -inf where a query does not see a token."""
    if SOFTCAP:
        score = softcap * (1 - 2 / (1 + tl.exp2(score * (2 * LOG2E / softcap))))
    seen = live[None, :] & query_live[:, None]
    if SINGLE:
        # The only query is the last token: it sees every slot that its mask lets through.
        if MASK == 1:
            seen &= (tl.load(mask + slot * mask_column, mask=live, other=0) != 0)[None, :]
        elif MASK == 2:
            score += tl.load(mask + slot * mask_column, mask=live, other=0.0).to(tl.float32)[None, :]
    elif MASK == 0:
        seen &= slot[None, :] <= query_slot[:, None]
    else:
        place = (mask + query_number.to(tl.int64) * mask_row)[:, None] + (slot * mask_column)[None, :]
        if MASK == 1:
            seen &= tl.load(place, mask=seen, other=0) != 0
        else:
            score += tl.load(place, mask=seen, other=0.0).to(tl.float32)
    return tl.where(seen, score, -float("inf"))


@triton.jit
def _soft(score, peak, total):
    """One step of the online softmax: weights `[M, N]`, the decay of what was, new peak and total `[M]`."""
    higher = tl.maximum(peak, tl.max(score, 1))
    # A row that has seen nothing keeps -inf; subtracting that would give NaN.
    base = tl.where(higher == -float("inf"), 0.0, higher)
    weight = tl.exp2((score - base[:, None]) * LOG2E)
    decay = tl.exp2((peak - base) * LOG2E)
    return weight, decay, higher, total * decay + tl.sum(weight, 1)


@triton.jit
def _exact_tile(
    peak, total, zeros, accs, slot, live, key, value, query, query_slot, query_number, head, positions, mask_tuple,
    angles, k_tables, v_tables, scaling, softcap,
    HEADS: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    ROTATE: tl.constexpr, HALF: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr, FOLD: tl.constexpr,
    SINGLE: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Take N exact tokens into the running softmax; key, value: `[N]` pointers to their channels."""
    mask, mask_row, mask_column = mask_tuple
    first, delta, far, anchor = _turned_by(positions, slot, live)
    unused = (key, key, 0)
    score = _scores(
        query, live, delta, far, first, head, False, key, unused, k_tables, angles, scaling,
        HEADS, DIM, M, N, 1, -1, 0, False, 0, ROTATE, HALF, WIDEN,
    )  # fmt: skip
    score = _masked(
        score,
        slot,
        live,
        query[1],
        query_slot,
        query_number,
        mask,
        mask_row,
        mask_column,
        softcap,
        MASK,
        SOFTCAP,
        SINGLE,
    )
    weight, decay, peak, total = _soft(score, peak, total)
    kind: tl.constexpr = query[0].dtype.element_ty
    accs = _add_values(
        accs, weight, decay, live, 0.0, 1.0, head + anchor, kind, False, value, unused, v_tables,
        HEADS, VALUE_DIM, N, 1, -1, 0, False, 0, FOLD, WIDEN,
    )  # fmt: skip
    return peak, total, zeros * decay, accs


@triton.jit(
    do_not_specialize=[
        "packed", "recent", "queries", "total_slots", "split_tiles",
        "q_sb", "q_sh", "q_sq", "mask_sb", "mask_sq", "pos_sb", "sinks",
    ]
)  # fmt: skip
def attention_kernel(
    query, q_sb, q_sh, q_sq, out, partial, peaks,
    k_words, kw_sb, kw_st, k_index, ki_sb, ki_st, ki_sg, k_exact, kx_sb, kx_st, kx_sg,
    v_words, vw_sb, vw_st, v_index, vi_sb, vi_st, vi_sg, v_exact, vx_sb, vx_st, vx_sg,
    v_zero, vz_sb, vz_st, v_scale, vs_sb, vs_st,
    sink_key, sk_sb, sk_st, sk_sh, sink_value, sv_sb, sv_st, sv_sh, sink_slot, ss_sb,
    recent_key, rk_sb, rk_st, rk_sh, recent_value, rv_sb, rv_st, rv_sh,
    positions, pos_sb, mask, mask_sb, mask_sq, mask_sn, sink_logits,
    k_channels, k_fields, k_book, k_pair_book, k_slots, v_channels, v_fields, v_book, v_pair_book, v_slots,
    turn, near, pairs, pair_scale,
    scaling, softcap, packed, recent, sinks, queries, total_slots, split_tiles,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, EXACT_N: tl.constexpr,
    K_LEVELS: tl.constexpr, K_WIDTH: tl.constexpr, K_PLANES: tl.constexpr, K_OUTLIERS: tl.constexpr,
    K_BY_HEAD: tl.constexpr, K_PAIRED: tl.constexpr,
    V_LEVELS: tl.constexpr, V_WIDTH: tl.constexpr, V_PLANES: tl.constexpr, V_OUTLIERS: tl.constexpr,
    V_BY_HEAD: tl.constexpr, V_PAIRED: tl.constexpr,
    ROTATE: tl.constexpr, HALF: tl.constexpr, FOLD: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr, RECENT: tl.constexpr, SINK_LOGITS: tl.constexpr, DIRECT: tl.constexpr, SINGLE: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """Grid: (batch * kv heads * row tiles, stretches). Shapes and meanings: `attention.py`, which launches it.

    The last stretch of the grid holds the exact tokens; with DIRECT there is one stretch, which holds everything and
    writes the output itself.
    """
    tiles = tl.cdiv(GROUP * queries, M)
    tile = tl.program_id(0) % tiles
    head = (tl.program_id(0) // tiles) % HEADS
    batch = (tl.program_id(0) // tiles // HEADS).to(tl.int64)
    split = tl.program_id(1)

    # Queries of one number lie together, so that a tile of a long prompt ends at one slot.
    row = tile * M + tl.arange(0, M)
    query_live = row < GROUP * queries
    query_number = row // GROUP
    query_slot = total_slots - queries + query_number
    query_head = head * GROUP + row % GROUP
    query_row = query + batch * q_sb + query_head.to(tl.int64) * q_sh + query_number.to(tl.int64) * q_sq
    rows = (query_row, query_live)

    kind: tl.constexpr = query.dtype.element_ty
    positions += batch * pos_sb
    mask += batch * mask_sb
    visible = (mask, mask_sq, mask_sn)
    angles = (turn, near, pairs, pair_scale)
    k_tables = (k_channels, k_fields, k_book, k_pair_book, k_slots)
    v_tables = (v_channels, v_fields, v_book, v_pair_book, v_slots)

    peak = tl.full([M], -float("inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    zeros = tl.zeros([M], tl.float32)
    accs = ()
    for _ in tl.static_range(VALUE_DIM // 16):
        accs = accs + (tl.zeros([M, 16], tl.float32),)

    k_words += batch * kw_sb
    k_index += batch * ki_sb + (head * ki_sg if K_BY_HEAD else 0)
    k_exact += batch * kx_sb + (head * kx_sg if K_BY_HEAD else 0)
    v_words += batch * vw_sb
    v_index += batch * vi_sb + (head * vi_sg if V_BY_HEAD else 0)
    v_exact += batch * vx_sb + (head * vx_sg if V_BY_HEAD else 0)
    v_zero += batch * vz_sb + (head if V_BY_HEAD else 0)
    v_scale += batch * vs_sb + (head if V_BY_HEAD else 0)
    k_element = 0 if K_BY_HEAD else head * DIM
    v_element = 0 if V_BY_HEAD else head * VALUE_DIM

    stop = tl.minimum((split + 1) * split_tiles * N, packed)
    if MASK == 0 and not SINGLE:
        stop = tl.minimum(stop, total_slots - queries + (tile * M + M - 1) // GROUP + 1)
    for start in range(split * split_tiles * N, stop, N):
        slot = start + tl.arange(0, N)
        live = slot < stop
        if SINKS:
            for j in range(sinks):
                live = live & (slot != tl.load(sink_slot + batch * ss_sb + j))
        first, delta, far, anchor = _turned_by(positions, slot, live)
        t = slot.to(tl.int64)
        outlier = (k_index + t * ki_st, k_exact + t * kx_st, k_element)
        score = _scores(
            rows, live, delta, far, first, head, True, k_words + t * kw_st, outlier, k_tables, angles, scaling,
            HEADS, DIM, M, N, K_LEVELS, K_WIDTH, K_PLANES, K_PAIRED, K_OUTLIERS,
            ROTATE, HALF, WIDEN,
        )  # fmt: skip
        score = _masked(
            score,
            slot,
            live,
            query_live,
            query_slot,
            query_number,
            mask,
            mask_sq,
            mask_sn,
            softcap,
            MASK,
            SOFTCAP,
            SINGLE,
        )
        weight, decay, peak, total = _soft(score, peak, total)
        zero = tl.load(v_zero + t * vz_st, mask=live, other=0.0).to(tl.float32)
        scale = tl.load(v_scale + t * vs_st, mask=live, other=0.0).to(tl.float32)
        zeros = zeros * decay
        if FOLD:
            scale = tl.maximum(scale, SMALLEST_SCALE)
            zeros += tl.sum(weight * zero[None, :], 1)
            weight = weight * scale[None, :]
        outlier = (v_index + t * vi_st, v_exact + t * vx_st, v_element)
        accs = _add_values(
            accs, weight, decay, live, zero, scale, head + anchor, kind, True, v_words + t * vw_st,
            outlier, v_tables, HEADS, VALUE_DIM, N, V_LEVELS, V_WIDTH, V_PLANES, V_PAIRED, V_OUTLIERS,
            FOLD, WIDEN,
        )  # fmt: skip

    if SINKS or RECENT:
        if split == tl.num_programs(1) - 1:
            if SINKS:
                for start in range(0, sinks, EXACT_N):
                    number = start + tl.arange(0, EXACT_N)
                    slot = tl.load(sink_slot + batch * ss_sb + number, mask=number < sinks, other=-1)
                    live = (slot >= 0) & (slot < packed)
                    t = number.to(tl.int64)
                    peak, total, zeros, accs = _exact_tile(
                        peak, total, zeros, accs, slot, live,
                        sink_key + batch * sk_sb + head * sk_sh + t * sk_st,
                        sink_value + batch * sv_sb + head * sv_sh + t * sv_st,
                        rows, query_slot, query_number, head, positions, visible, angles, k_tables, v_tables,
                        scaling, softcap, HEADS, DIM, VALUE_DIM, M, EXACT_N, ROTATE, HALF, MASK, SOFTCAP, FOLD,
                        SINGLE, WIDEN,
                    )  # fmt: skip
            if RECENT:
                for start in range(0, recent, EXACT_N):
                    number = start + tl.arange(0, EXACT_N)
                    t = number.to(tl.int64)
                    peak, total, zeros, accs = _exact_tile(
                        peak, total, zeros, accs, packed + number, number < recent,
                        recent_key + batch * rk_sb + head * rk_sh + t * rk_st,
                        recent_value + batch * rv_sb + head * rv_sh + t * rv_st,
                        rows, query_slot, query_number, head, positions, visible, angles, k_tables, v_tables,
                        scaling, softcap, HEADS, DIM, VALUE_DIM, M, EXACT_N, ROTATE, HALF, MASK, SOFTCAP, FOLD,
                        SINGLE, WIDEN,
                    )  # fmt: skip

    c = tl.arange(0, 16)
    if DIRECT:
        share = _share(peak, total, sink_logits, query_head, query_live, SINK_LOGITS)
        place = ((batch * queries + query_number) * (HEADS * GROUP) + query_head) * VALUE_DIM
        for group in tl.static_range(VALUE_DIM // 16):
            channel = tl.load(v_channels + head * VALUE_DIM + group * 16 + c)
            x = (accs[group] + zeros[:, None]) * share[:, None]
            tl.store(out + place[:, None] + channel[None, :], narrow(x, kind), mask=query_live[:, None])
    else:
        place = (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + split) * M + tl.arange(0, M)
        tl.store(peaks + 2 * place, peak)
        tl.store(peaks + 2 * place + 1, total)
        for group in tl.static_range(VALUE_DIM // 16):
            to = partial + place[:, None] * VALUE_DIM + group * 16 + c[None, :]
            tl.store(to, accs[group] + zeros[:, None])


@triton.jit
def _share(peak, total, sink_logits, query_head, query_live, SINK_LOGITS: tl.constexpr):
    """One over the softmax's denominator; 0 where a row has seen nothing."""
    if SINK_LOGITS:
        base = tl.where(peak == -float("inf"), 0.0, peak)
        logit = tl.load(sink_logits + query_head, mask=query_live, other=0.0).to(tl.float32)
        total += tl.exp2((logit - base) * LOG2E)
    return tl.where(total > 0, 1 / tl.where(total > 0, total, 1.0), 0.0)


@triton.jit(do_not_specialize=["queries", "splits"])
def reduce_kernel(
    partial, peaks, out, v_channels, sink_logits, queries, splits,
    HEADS: tl.constexpr, GROUP: tl.constexpr, VALUE_DIM: tl.constexpr, PADDED: tl.constexpr, M: tl.constexpr,
    AT_ONCE: tl.constexpr, SINK_LOGITS: tl.constexpr,
):  # fmt: skip
    """One output row per program: the stretches of `partial [.., splits, M, Dv]` in ascending order."""
    row = tl.program_id(0)
    per_head = GROUP * queries
    local = row % per_head
    head = (row // per_head) % HEADS
    batch = (row // per_head // HEADS).to(tl.int64)
    tile = (row // per_head).to(tl.int64) * tl.cdiv(per_head, M) + local // M
    c = tl.arange(0, PADDED)
    inside = c < VALUE_DIM
    peak = -float("inf")
    total = 0.0
    acc = tl.zeros([PADDED], tl.float32)
    for start in range(0, splits, AT_ONCE):
        number = start + tl.arange(0, AT_ONCE)
        there = number < splits
        place = (tile * splits + number) * M + local % M
        theirs = tl.load(peaks + 2 * place, mask=there, other=-float("inf"))
        totals = tl.load(peaks + 2 * place + 1, mask=there, other=0.0)
        x = tl.load(partial + place[:, None] * VALUE_DIM + c[None, :], mask=there[:, None] & inside[None, :], other=0.0)
        higher = tl.maximum(peak, tl.max(theirs, 0))
        base = tl.where(higher == -float("inf"), 0.0, higher)
        decay = tl.exp2((peak - base) * LOG2E)
        weight = tl.exp2((theirs - base) * LOG2E)
        total = total * decay + tl.sum(totals * weight, 0)
        acc = acc * decay + tl.sum(x * weight[:, None], 0)
        peak = higher
    query_head = head * GROUP + local % GROUP
    share = _share(peak, total, sink_logits, query_head, True, SINK_LOGITS)
    channel = tl.load(v_channels + head * VALUE_DIM + c, mask=inside, other=0)
    place = ((batch * queries + local // GROUP) * (HEADS * GROUP) + query_head) * VALUE_DIM
    tl.store(out + place + channel, narrow(acc * share, out.dtype.element_ty), mask=inside)
