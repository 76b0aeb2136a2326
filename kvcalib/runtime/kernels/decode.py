"""Attention over packed keys and values in one pass: the Triton kernels.

A program takes some rows of queries of one kv head (all query heads that share it: each tile of keys and values is
decoded once for all of them) and one stretch of the packed tokens. Tile by tile it unpacks the keys of a group of 16
channels, looks their centroids up, turns them by RoPE, scores them, carries an online softmax (arXiv 1805.02867) and
adds the values up the same way. Stretches are reduced by a second kernel in a fixed order (`reduce.py`), so a launch
gives the same bits every time. Exact tokens (sinks, the recent window) are one stretch of their own.

What a tile holds: `unpack.py`; how it turns: `turning.py`; the softmax: `softmax.py`.

Values: `x = c`, or relative ones, `x = zero[t] + scale[t] * c`. Then the scale goes into the softmax weights,
`w = p * scale`, and the zeros add up to one number per row, `sum p * zero`. float16 has too little range for
`p * scale`; there x is computed per element.
"""

# What Triton compiles has no Python types, no starred tuples, and decides some branches before others.
# mypy: disable-error-code="no-untyped-def, assignment, index"
# ruff: noqa: RUF005, SIM102

from __future__ import annotations

import triton
import triton.language as tl

from kvcalib.runtime.kernels.arithmetic import dot, interleave, narrow
from kvcalib.runtime.kernels.drawn import keep_norms, keep_scores
from kvcalib.runtime.kernels.softmax import masked, share_of, soft
from kvcalib.runtime.kernels.turning import angle_at, near_angle, turned_by
from kvcalib.runtime.kernels.unpack import decoded, read_outlier, with_outlier

# So many outliers of a token are kept in registers; more are read again for every group.
FEW = tl.constexpr(4)
# Scales below this count as this, so that an exact element of a token whose other elements are all equal survives
# the division by its scale.
SMALLEST_SCALE = tl.constexpr(2.0**-40)
# What becomes of zero and scale: there are none, they go into the weights, or into every element.
ABSENT = tl.constexpr(0)
FOLDED = tl.constexpr(1)
COMPUTED = tl.constexpr(2)


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
        where, exact = read_outlier(outlier, j, live, slots, DIM)
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
            a, b = decoded(source, live, head, group, tables, HEADS, DIM, LEVELS, WIDTH, PLANES, PAIRED, N)
            if OUTLIERS <= FEW:
                for j in tl.static_range(OUTLIERS):
                    a, b = with_outlier(a, b, wheres[j] - 16 * group, exacts[j])
            else:
                for j in range(OUTLIERS):
                    where, exact = read_outlier(outlier, j, live, slots, DIM)
                    a, b = with_outlier(a, b, where - 16 * group, exact)
        else:
            a = tl.load(source[None, :] + first_channel[:, None], mask=live[None, :], other=0.0).to(tl.float32)
            b = tl.load(source[None, :] + second_channel[:, None], mask=live[None, :], other=0.0).to(tl.float32)
        if ROTATE:
            pair = tl.load(pairs + head * (DIM // 2) + group * 8 + i)
            cos, sin = angle_at(turn, pair, first, DIM // 2)
            size = tl.load(pair_scale + pair)
            cos = (cos * size)[None, :]
            sin = (sin * size)[None, :]
            q_a, q_b = q_a * cos + q_b * sin, q_b * cos - q_a * sin
            cos, sin = near_angle(turn, near, pair, head * (DIM // 2) + group * 8, delta, far, DIM // 2, HALF)
            a, b = a * cos - b * sin, b * cos + a * sin
        score = dot(tl.join(q_a, q_b).reshape(M, 16), interleave(a, b, N), score, kind, WIDEN)
    return score


@triton.jit
def _add_values(
    accs, weight, decay, live, zero, scale, head, kind: tl.constexpr, PACKED: tl.constexpr, source, outlier, tables,
    HEADS: tl.constexpr, DIM: tl.constexpr, N: tl.constexpr, LEVELS: tl.constexpr, WIDTH: tl.constexpr,
    PLANES: tl.constexpr, PAIRED: tl.constexpr, OUTLIERS: tl.constexpr, SCALES: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """`accs * decay + weight @ values`, one `[M, 16]` per group; weight `[M, N]`; dots in `kind`."""
    channels = tables[0]
    slots = tables[4] + head * DIM
    i = tl.arange(0, 8)
    wheres = ()
    exacts = ()
    for j in tl.static_range(OUTLIERS if OUTLIERS <= FEW else 0):
        where, exact = read_outlier(outlier, j, live, slots, DIM)
        if SCALES == FOLDED:
            exact = (exact - zero) / scale
        wheres = wheres + (where,)
        exacts = exacts + (exact,)
    added = ()
    for group in tl.static_range(DIM // 16):
        if PACKED:
            a, b = decoded(source, live, head, group, tables, HEADS, DIM, LEVELS, WIDTH, PLANES, PAIRED, N)
            if SCALES == COMPUTED:
                a = zero[None, :] + scale[None, :] * a
                b = zero[None, :] + scale[None, :] * b
            if OUTLIERS <= FEW:
                for j in tl.static_range(OUTLIERS):
                    a, b = with_outlier(a, b, wheres[j] - 16 * group, exacts[j])
            else:
                for j in range(OUTLIERS):
                    where, exact = read_outlier(outlier, j, live, slots, DIM)
                    if SCALES == FOLDED:
                        exact = (exact - zero) / scale
                    a, b = with_outlier(a, b, where - 16 * group, exact)
        else:
            place = channels + head * DIM + group * 16 + 2 * i
            first_channel = tl.load(place)
            second_channel = tl.load(place + 1)
            a = tl.load(source[None, :] + first_channel[:, None], mask=live[None, :], other=0.0).to(tl.float32)
            b = tl.load(source[None, :] + second_channel[:, None], mask=live[None, :], other=0.0).to(tl.float32)
        right = tl.trans(interleave(a, b, N))
        added = added + (dot(weight, right, accs[group] * decay[:, None], kind, WIDEN),)
    return added


@triton.jit
def _exact_tile(
    peak, total, zeros, accs, slot, held, key, value, query, query_slot, query_number, head, positions, mask_tuple,
    angles, k_tables, v_tables, scaling, softcap, raw,
    HEADS: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    ROTATE: tl.constexpr, HALF: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr,
    SINGLE: tl.constexpr, WIDEN: tl.constexpr, PER_HEAD: tl.constexpr, DRAWN: tl.constexpr,
):  # fmt: skip
    """Take N exact tokens into the running softmax; key, value: `[N]` pointers to their channels."""
    mask, mask_row, mask_column = mask_tuple
    live, first, delta, far, anchor = turned_by(positions, slot, held, PER_HEAD)
    unused = (key, key, 0)
    score = _scores(
        query, live, delta, far, first, head, False, key, unused, k_tables, angles, scaling,
        HEADS, DIM, M, N, 1, -1, 0, False, 0, ROTATE, HALF, WIDEN,
    )  # fmt: skip
    score = masked(
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
    if DRAWN:
        keep_scores(raw, anchor, score, slot, held, query[1])
    weight, decay, peak, total = soft(score, peak, total)
    kind: tl.constexpr = query[0].dtype.element_ty
    accs = _add_values(
        accs, weight, decay, live, 0.0, 1.0, head + anchor, kind, False, value, unused, v_tables,
        HEADS, VALUE_DIM, N, 1, -1, 0, False, 0, ABSENT, WIDEN,
    )  # fmt: skip
    return peak, total, zeros * decay, accs


@triton.jit(
    do_not_specialize=[
        "packed", "recent", "queries", "total_slots", "split_tiles",
        "q_sb", "q_sh", "q_sq", "mask_sb", "mask_sq", "pos_sb", "pos_sh", "sinks",
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
    scaling, softcap, packed, recent, sinks, queries, total_slots, split_tiles, pos_sh, pos_sn, raw, norms,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, EXACT_N: tl.constexpr,
    K_LEVELS: tl.constexpr, K_WIDTH: tl.constexpr, K_PLANES: tl.constexpr, K_OUTLIERS: tl.constexpr,
    K_BY_HEAD: tl.constexpr, K_PAIRED: tl.constexpr,
    V_LEVELS: tl.constexpr, V_WIDTH: tl.constexpr, V_PLANES: tl.constexpr, V_OUTLIERS: tl.constexpr,
    V_BY_HEAD: tl.constexpr, V_PAIRED: tl.constexpr,
    ROTATE: tl.constexpr, HALF: tl.constexpr, SCALES: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr, RECENT: tl.constexpr, SINK_LOGITS: tl.constexpr, DIRECT: tl.constexpr, SINGLE: tl.constexpr,
    WIDEN: tl.constexpr, PER_HEAD: tl.constexpr, DRAWN: tl.constexpr,
):  # fmt: skip
    """Grid: (batch * kv heads * row tiles, stretches). Shapes and meanings: `attention.py`, which launches it.

    The last stretch of the grid holds the exact tokens; with DIRECT there is one stretch, which holds everything and
    writes the output itself. With DRAWN all scores are kept, see `drawn.py`.
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
    if PER_HEAD:
        positions += head.to(tl.int64) * pos_sh
    places = (positions, pos_sn)
    if DRAWN:
        raw += (batch * HEADS + head) * GROUP * queries * total_slots
    raw_rows = (raw, row, total_slots)
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
        held = live
        live, first, delta, far, anchor = turned_by(places, slot, held, PER_HEAD)
        t = slot.to(tl.int64)
        outlier = (k_index + t * ki_st, k_exact + t * kx_st, k_element)
        score = _scores(
            rows, live, delta, far, first, head, True, k_words + t * kw_st, outlier, k_tables, angles, scaling,
            HEADS, DIM, M, N, K_LEVELS, K_WIDTH, K_PLANES, K_PAIRED, K_OUTLIERS,
            ROTATE, HALF, WIDEN,
        )  # fmt: skip
        score = masked(
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
        if DRAWN:
            keep_scores(raw_rows, anchor, score, slot, held, query_live)
        weight, decay, peak, total = soft(score, peak, total)
        zero = 0.0
        scale = 1.0
        if SCALES != ABSENT:
            zero = tl.load(v_zero + t * vz_st, mask=live, other=0.0).to(tl.float32)
            scale = tl.load(v_scale + t * vs_st, mask=live, other=0.0).to(tl.float32)
        if SCALES == FOLDED:
            scale = tl.maximum(scale, SMALLEST_SCALE)
            zeros = zeros * decay + tl.sum(weight * zero[None, :], 1)
            weight = weight * scale[None, :]
        outlier = (v_index + t * vi_st, v_exact + t * vx_st, v_element)
        accs = _add_values(
            accs, weight, decay, live, zero, scale, head + anchor, kind, True, v_words + t * vw_st,
            outlier, v_tables, HEADS, VALUE_DIM, N, V_LEVELS, V_WIDTH, V_PLANES, V_PAIRED, V_OUTLIERS,
            SCALES, WIDEN,
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
                        rows, query_slot, query_number, head, places, visible, angles, k_tables, v_tables,
                        scaling, softcap, raw_rows, HEADS, DIM, VALUE_DIM, M, EXACT_N, ROTATE, HALF, MASK, SOFTCAP,
                        SINGLE, WIDEN, PER_HEAD, DRAWN,
                    )  # fmt: skip
            if RECENT:
                for start in range(0, recent, EXACT_N):
                    number = start + tl.arange(0, EXACT_N)
                    t = number.to(tl.int64)
                    peak, total, zeros, accs = _exact_tile(
                        peak, total, zeros, accs, packed + number, number < recent,
                        recent_key + batch * rk_sb + head * rk_sh + t * rk_st,
                        recent_value + batch * rv_sb + head * rv_sh + t * rv_st,
                        rows, query_slot, query_number, head, places, visible, angles, k_tables, v_tables,
                        scaling, softcap, raw_rows, HEADS, DIM, VALUE_DIM, M, EXACT_N, ROTATE, HALF, MASK, SOFTCAP,
                        SINGLE, WIDEN, PER_HEAD, DRAWN,
                    )  # fmt: skip

    c = tl.arange(0, 16)
    if DIRECT:
        share = share_of(peak, total, sink_logits, query_head, query_live, SINK_LOGITS)
        place = ((batch * queries + query_number) * (HEADS * GROUP) + query_head) * VALUE_DIM
        for group in tl.static_range(VALUE_DIM // 16):
            channel = tl.load(v_channels + head * VALUE_DIM + group * 16 + c)
            x = (accs[group] + zeros[:, None]) * share[:, None]
            tl.store(out + place[:, None] + channel[None, :], narrow(x, kind), mask=query_live[:, None])
        if DRAWN:
            keep_norms(norms, (batch * HEADS + head) * GROUP * queries + row, peak, share, query_live)
    else:
        place = (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + split) * M + tl.arange(0, M)
        tl.store(peaks + 2 * place, peak)
        tl.store(peaks + 2 * place + 1, total)
        for group in tl.static_range(VALUE_DIM // 16):
            to = partial + place[:, None] * VALUE_DIM + group * 16 + c[None, :]
            tl.store(to, accs[group] + zeros[:, None])
