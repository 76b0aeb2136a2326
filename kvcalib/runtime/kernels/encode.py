"""Quantize, rank outliers, pack and store new tokens of keys and values: one Triton launch.

A program takes one token of K or of V. First it sees the token group by group (a group is a head, or the whole token):
keys get their codes and errors, and the largest weighted errors are the outliers; so do values whose codebook is not
relative. Relative ones get the shortest window that holds all but n elements, from the n + 1 smallest and n + 1
largest. Then it fills the row word by word: the fields of a
word, wherever their channels are, are quantized again and shifted into place, so any layout packs alike.

With error feedback the heads' channels are rounded place by place, all heads at once (`feedback.py` in this folder);
codes then go through a buffer, from which the row is filled.

Asked for, the residue: of the first pass's codes, decoded as `Quantizer.decode` would, the squared error of each head.

The result is that of `Quantizer.encode`, bit for bit: same midpoints, same rounding of zero and scale, IEEE division.
Among equal errors the lower index is the outlier, where `torch.topk` leaves the choice open.
"""

# What Triton compiles has no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvcalib.quant.quantizer import Quantizer
from kvcalib.runtime.kernels.arithmetic import narrow
from kvcalib.runtime.kernels.feedback import KEPT, code_of, feed_back
from kvcalib.runtime.kernels.launch import Launch, strides
from kvcalib.runtime.kernels.tables import EncodeTables, encode_tables

LOWEST = tl.constexpr(-(2**63))
HIGHEST = tl.constexpr(2**63 - 1)
WORDS_AT_ONCE = 16


@triton.jit
def _ranked(x, low):
    """int64 in the order of float32 `x`, then of `low` (0 .. 2**32 - 1)."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered.to(tl.int64) << 32) | low.to(tl.int64)


@triton.jit
def _unranked(rank):
    """The float32 of a rank."""
    ordered = (rank >> 32).to(tl.int32)
    return tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).to(tl.float32, bitcast=True)


@triton.jit
def _store_outliers(index, value, x, chosen, number, group, COUNT: tl.constexpr, LIMIT: tl.constexpr):
    """Write the chosen elements of every group, ascending: where an element goes is how many are chosen before it."""
    place = tl.cumsum(chosen.to(tl.int32), 1) - 1
    to = group * COUNT + place
    tl.store(index + to, number.to(index.dtype.element_ty), mask=chosen)
    tl.store(value + to, narrow(tl.clamp(x, -LIMIT, LIMIT), value.dtype.element_ty), mask=chosen)


@triton.jit
def _store_residue(residue, to_head, to_sum, x, decoded, live, element, group, DIM: tl.constexpr, GROUPS: tl.constexpr,
                   HEADS: tl.constexpr):  # fmt: skip
    """Sums of `(x - decoded)**2` and `x**2` of each head, from elements by group: a head each, or all in one."""
    gap = x - decoded
    gap = tl.where(live, gap * gap, 0.0)
    size = tl.where(live, x * x, 0.0)
    if GROUPS == HEADS:
        to = residue + group * to_head
        tl.store(to, tl.sum(gap, 1)[:, None], mask=group < GROUPS)
        tl.store(to + to_sum, tl.sum(size, 1)[:, None], mask=group < GROUPS)
    else:
        for head in range(HEADS):
            mine = element // DIM == head
            tl.store(residue + head * to_head, tl.sum(tl.sum(tl.where(mine, gap, 0.0), 1), 0))
            tl.store(residue + head * to_head + to_sum, tl.sum(tl.sum(tl.where(mine, size, 0.0), 1), 0))


@triton.jit
def _stored(x, value, LIMIT: tl.constexpr):
    """float32 `x` as `value` points to it: rounded to that type, at most LIMIT."""
    return narrow(tl.clamp(x, -LIMIT, LIMIT), value.dtype.element_ty).to(tl.float32)


@triton.jit
def _pack(
    x_row, x_sh, words, zeros, scales, middle, fields, codes, RELATIVE: tl.constexpr, DIM: tl.constexpr,
    SIZE: tl.constexpr, BITS: tl.constexpr, LEVELS: tl.constexpr, WORDS: tl.constexpr, AT_ONCE: tl.constexpr,
    FEEDBACK: tl.constexpr,
):  # fmt: skip
    """Write the row's words: quantize the channel of every field of a word, or take its code from `codes`, and put the
    fields together."""
    for start in range(0, WORDS, AT_ONCE):
        word = start + tl.arange(0, AT_ONCE)
        inside = word < WORDS
        entry = fields + (word[:, None] * 32 + tl.arange(0, 32)[None, :]) * 4
        element = tl.load(entry, mask=inside[:, None], other=-1)
        live = element >= 0
        element = tl.where(live, element, 0)
        if FEEDBACK:
            code = tl.load(codes + element, mask=live, other=0).to(tl.int32)
        else:
            x = tl.load(x_row + (element // DIM) * x_sh + element % DIM, mask=live, other=0.0).to(tl.float32)
            if RELATIVE:
                zero = tl.load(zeros + element // SIZE).to(tl.float32)
                scale = tl.load(scales + element // SIZE).to(tl.float32)
                x = tl.div_rn(x - zero, tl.where(scale > 0, scale, 1.0))
            code = code_of(x, element, middle, live, BITS, LEVELS)
        position = tl.load(entry + 1, mask=live, other=0)
        size = tl.load(entry + 2, mask=live, other=0)
        shift = tl.load(entry + 3, mask=live, other=0)
        # Fields share no bits, so their sum is their union.
        tl.store(words + word, tl.sum(((code >> position) & size) << shift, 1), mask=inside)


@triton.jit
def _encode_plain(
    x_row, x_sh, words, index, value, middle, book, weight, fields, codes, order, matrix, residue, to_head, to_sum,
    DIM: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, GROUPS_PADDED: tl.constexpr,
    SIZE_PADDED: tl.constexpr, BITS: tl.constexpr, LEVELS: tl.constexpr, OUTLIERS: tl.constexpr, LIMIT: tl.constexpr,
    WORDS: tl.constexpr, AT_ONCE: tl.constexpr, RESIDUE: tl.constexpr, FEEDBACK: tl.constexpr,
    HEADS_PADDED: tl.constexpr, DIM_PADDED: tl.constexpr,
):  # fmt: skip
    """A token whose codebook holds the elements as they are."""
    if OUTLIERS > 0 or RESIDUE or FEEDBACK:
        heads: tl.constexpr = GROUPS * SIZE // DIM
        group = tl.arange(0, GROUPS_PADDED)[:, None]
        number = tl.arange(0, SIZE_PADDED)[None, :]
        live = (group < GROUPS) & (number < SIZE)
        element = tl.where(live, group * SIZE + number, 0)
        x = tl.load(x_row + (element // DIM) * x_sh + element % DIM, mask=live, other=0.0).to(tl.float32)
        code = code_of(x, element, middle, live, BITS, LEVELS)
        centroid = tl.load(book + element * LEVELS + code)
        if OUTLIERS > 0:
            gap = x - centroid
            error = gap * gap * tl.load(weight + element)
            # Of equal errors the lower index ranks higher.
            rank = tl.where(live, _ranked(error, 0x7FFFFFFF - number), LOWEST + 1)
            for _ in range(OUTLIERS):
                top = tl.max(rank, 1)
                rank = tl.where(rank == top[:, None], LOWEST, rank)
            chosen = live & (rank == LOWEST)
            _store_outliers(index, value, x, chosen, number, group, OUTLIERS, LIMIT)
        if FEEDBACK:
            if OUTLIERS > 0:
                code += tl.where(chosen, KEPT, 0)
            tl.store(codes + element, code.to(tl.int16), mask=live)
            tl.debug_barrier()
            feed_back(x_row, x_sh, codes, book, book, middle, book, order, matrix, False, heads, DIM, SIZE,
                      HEADS_PADDED, DIM_PADDED, BITS, LEVELS)  # fmt: skip
            tl.debug_barrier()
        if RESIDUE:
            if FEEDBACK:
                code = tl.load(codes + element, mask=live, other=0).to(tl.int32)
                centroid = tl.load(book + element * LEVELS + code)
            if OUTLIERS > 0:
                centroid = tl.where(chosen, _stored(x, value, LIMIT), centroid)
            _store_residue(residue, to_head, to_sum, x, centroid, live, element, group, DIM, GROUPS, heads)
    _pack(x_row, x_sh, words, book, book, middle, fields, codes, False, DIM, SIZE, BITS, LEVELS, WORDS, AT_ONCE,
          FEEDBACK)  # fmt: skip


@triton.jit
def _encode_relative(
    x_row, x_sh, words, index, value, zeros, scales, middle, fields, book, codes, order, matrix, residue, to_head,
    to_sum, DIM: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, GROUPS_PADDED: tl.constexpr,
    SIZE_PADDED: tl.constexpr, BITS: tl.constexpr, LEVELS: tl.constexpr, OUTLIERS: tl.constexpr, LIMIT: tl.constexpr,
    WORDS: tl.constexpr, AT_ONCE: tl.constexpr, WINDOWS: tl.constexpr, COPIES: tl.constexpr, RESIDUE: tl.constexpr,
    FEEDBACK: tl.constexpr, HEADS_PADDED: tl.constexpr, DIM_PADDED: tl.constexpr,
):  # fmt: skip
    """A token whose codebook is relative to zero and scale of each group."""
    heads: tl.constexpr = GROUPS * SIZE // DIM
    group = tl.arange(0, GROUPS_PADDED)[:, None]
    number = tl.arange(0, SIZE_PADDED)[None, :]
    live = (group < GROUPS) & (number < SIZE)
    element = tl.where(live, group * SIZE + number, 0)
    x = tl.load(x_row + (element // DIM) * x_sh + element % DIM, mask=live, other=0.0).to(tl.float32)
    rank = _ranked(x, number)
    rising = tl.where(live, rank, HIGHEST)
    falling = tl.where(live, rank, LOWEST)
    # Element number w of the sorted group, and the upper end of the window that starts there.
    window = tl.arange(0, WINDOWS)[None, :]
    lower = tl.zeros([GROUPS_PADDED, WINDOWS], tl.float32)
    upper = tl.full([GROUPS_PADDED, WINDOWS], float("inf"), tl.float32)
    from_below = tl.full([GROUPS_PADDED, SIZE_PADDED], SIZE_PADDED, tl.int32)
    from_above = tl.full([GROUPS_PADDED, SIZE_PADDED], SIZE_PADDED, tl.int32)
    for j in range(OUTLIERS + 1):
        least = tl.min(rising, 1)[:, None]
        lower = tl.where(window == j, _unranked(least), lower)
        from_below = tl.where(rising == least, j, from_below)
        rising = tl.where(rising == least, HIGHEST, rising)
        most = tl.max(falling, 1)[:, None]
        upper = tl.where(window == OUTLIERS - j, _unranked(most), upper)
        from_above = tl.where(falling == most, j, from_above)
        falling = tl.where(falling == most, LOWEST, falling)
    if GROUPS_PADDED > GROUPS:
        # Rows of no group hold no numbers, which the interpreter's argmin refuses.
        upper = tl.where(group < GROUPS, upper, 0.0)
        lower = tl.where(group < GROUPS, lower, 0.0)
    start = tl.argmin(upper - lower, 1)[:, None]
    low = tl.sum(tl.where(window == start, lower, 0.0), 1)[:, None]
    high = tl.sum(tl.where(window == start, upper, 0.0), 1)[:, None]
    kind: tl.constexpr = zeros.dtype.element_ty
    there = group < GROUPS
    zero = narrow(tl.clamp((low + high) * 0.5, -LIMIT, LIMIT), kind)
    scale = narrow(tl.clamp((high - low) * 0.5, -LIMIT, LIMIT), kind)
    if COPIES == 1:
        tl.store(zeros + group, zero, mask=there)
        tl.store(scales + group, scale, mask=there)
    else:
        for copy in range(COPIES):
            tl.store(zeros + group + copy, zero, mask=there)
            tl.store(scales + group + copy, scale, mask=there)
    if OUTLIERS > 0:
        chosen = live & ((from_below < start) | (from_above < OUTLIERS - start))
        _store_outliers(index, value, x, chosen, number, group, OUTLIERS, LIMIT)
    if RESIDUE or FEEDBACK:
        zero = zero.to(tl.float32)
        scale = scale.to(tl.float32)
        code = code_of(tl.div_rn(x - zero, tl.where(scale > 0, scale, 1.0)), element, middle, live, BITS, LEVELS)
    if FEEDBACK:
        if OUTLIERS > 0:
            code += tl.where(chosen, KEPT, 0)
        tl.store(codes + element, code.to(tl.int16), mask=live)
        tl.debug_barrier()
        feed_back(x_row, x_sh, codes, zeros, scales, middle, book, order, matrix, True, heads, DIM, SIZE,
                  HEADS_PADDED, DIM_PADDED, BITS, LEVELS)  # fmt: skip
    # Other threads of this program read zero, scale and codes back.
    tl.debug_barrier()
    if RESIDUE:
        if FEEDBACK:
            code = tl.load(codes + element, mask=live, other=0).to(tl.int32)
        decoded = zero + scale * tl.load(book + element * LEVELS + code)
        if OUTLIERS > 0:
            decoded = tl.where(chosen, _stored(x, value, LIMIT), decoded)
        _store_residue(residue, to_head, to_sum, x, decoded, live, element, group, DIM, GROUPS, heads)
    _pack(x_row, x_sh, words, zeros, scales, middle, fields, codes, True, DIM, SIZE, BITS, LEVELS, WORDS, AT_ONCE,
          FEEDBACK)  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "x_ksb", "x_kst", "x_vsb", "x_vst", "rk_sb", "rk_st", "rv_sb", "rv_st"])
def encode_kernel(
    key, x_ksb, x_kst, x_ksh, value, x_vsb, x_vst, x_vsh, tokens,
    k_words, kw_sb, kw_st, k_index, ki_sb, ki_st, k_exact, kx_sb, kx_st,
    v_words, vw_sb, vw_st, v_index, vi_sb, vi_st, v_exact, vx_sb, vx_st, v_zero, vz_sb, vz_st, v_scale, vs_sb, vs_st,
    k_middle, k_book, k_weight, k_fields, v_middle, v_fields,
    k_codes, k_order, k_matrix, v_codes, v_order, v_matrix,
    v_book, v_weight, k_residue, rk_sb, rk_st, rk_sh, rk_sx, v_residue, rv_sb, rv_st, rv_sh, rv_sx,
    LIMIT: tl.constexpr, AT_ONCE: tl.constexpr,
    K_DIM: tl.constexpr, K_GROUPS: tl.constexpr, K_SIZE: tl.constexpr, K_GROUPS_PADDED: tl.constexpr,
    K_SIZE_PADDED: tl.constexpr, K_BITS: tl.constexpr, K_LEVELS: tl.constexpr, K_OUTLIERS: tl.constexpr,
    K_WORDS: tl.constexpr,
    V_DIM: tl.constexpr, V_GROUPS: tl.constexpr, V_SIZE: tl.constexpr, V_GROUPS_PADDED: tl.constexpr,
    V_SIZE_PADDED: tl.constexpr, V_BITS: tl.constexpr, V_LEVELS: tl.constexpr, V_OUTLIERS: tl.constexpr,
    V_WORDS: tl.constexpr, V_RELATIVE: tl.constexpr, WINDOWS: tl.constexpr, COPIES: tl.constexpr,
    RESIDUE: tl.constexpr, K_FEEDBACK: tl.constexpr, V_FEEDBACK: tl.constexpr, HEADS_PADDED: tl.constexpr,
    K_DIM_PADDED: tl.constexpr, V_DIM_PADDED: tl.constexpr,
):  # fmt: skip
    """Grid: (batch * tokens, 2), the second axis K or V."""
    batch = (tl.program_id(0) // tokens).to(tl.int64)
    t = (tl.program_id(0) % tokens).to(tl.int64)
    k_codes += tl.program_id(0).to(tl.int64) * (K_GROUPS * K_SIZE)
    v_codes += tl.program_id(0).to(tl.int64) * (V_GROUPS * V_SIZE)
    if tl.program_id(1) == 0:
        _encode_plain(
            key + batch * x_ksb + t * x_kst, x_ksh, k_words + batch * kw_sb + t * kw_st,
            k_index + batch * ki_sb + t * ki_st, k_exact + batch * kx_sb + t * kx_st,
            k_middle, k_book, k_weight, k_fields, k_codes, k_order, k_matrix,
            k_residue + batch * rk_sb + t * rk_st, rk_sh, rk_sx,
            K_DIM, K_GROUPS, K_SIZE, K_GROUPS_PADDED, K_SIZE_PADDED, K_BITS, K_LEVELS, K_OUTLIERS, LIMIT,
            K_WORDS, AT_ONCE, RESIDUE, K_FEEDBACK, HEADS_PADDED, K_DIM_PADDED,
        )  # fmt: skip
    elif V_RELATIVE:
        _encode_relative(
            value + batch * x_vsb + t * x_vst, x_vsh, v_words + batch * vw_sb + t * vw_st,
            v_index + batch * vi_sb + t * vi_st, v_exact + batch * vx_sb + t * vx_st,
            v_zero + batch * vz_sb + t * vz_st, v_scale + batch * vs_sb + t * vs_st, v_middle, v_fields,
            v_book, v_codes, v_order, v_matrix, v_residue + batch * rv_sb + t * rv_st, rv_sh, rv_sx,
            V_DIM, V_GROUPS, V_SIZE, V_GROUPS_PADDED, V_SIZE_PADDED, V_BITS, V_LEVELS, V_OUTLIERS, LIMIT,
            V_WORDS, AT_ONCE, WINDOWS, COPIES, RESIDUE, V_FEEDBACK, HEADS_PADDED, V_DIM_PADDED,
        )  # fmt: skip
    else:
        _encode_plain(
            value + batch * x_vsb + t * x_vst, x_vsh, v_words + batch * vw_sb + t * vw_st,
            v_index + batch * vi_sb + t * vi_st, v_exact + batch * vx_sb + t * vx_st,
            v_middle, v_book, v_weight, v_fields, v_codes, v_order, v_matrix,
            v_residue + batch * rv_sb + t * rv_st, rv_sh, rv_sx,
            V_DIM, V_GROUPS, V_SIZE, V_GROUPS_PADDED, V_SIZE_PADDED, V_BITS, V_LEVELS, V_OUTLIERS, LIMIT,
            V_WORDS, AT_ONCE, RESIDUE, V_FEEDBACK, HEADS_PADDED, V_DIM_PADDED,
        )  # fmt: skip


def packed_encode(
    key: Tensor,
    value: Tensor,
    key_quantizer: Quantizer,
    value_quantizer: Quantizer,
    rows: dict[str, Tensor],
    residue: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Quantize `key, value [B, t, H, D]` (keys un-rotated) into `rows`, tensor by tensor as `Quantizer.encode` would.

    Args:
        key, value: new tokens, any float type; the channels dense, other strides free.
        key_quantizer, value_quantizer: of the layer.
        rows: where they go, as in `PackedView.rows` but of the new tokens only: `key.words [B, t, W]` and so on, views
            into the cache's buffers. Their type (float16 or bfloat16) is the type of exact elements, zero and scale.
            `value.zero` and `value.scale` may have H groups where the quantizer has one for the token and no outliers:
            every head then gets the same number.
        residue: of keys and of values, float32 `[B, t, H, 2]` with any strides: overwritten with `|x - x^|**2` and
            `|x|**2` of each token and head, x^ what `Quantizer.decode` makes of the rows.

    Raises:
        ValueError: a tensor of `residue`, or zero and scale, is not of that shape and type.
    """
    encode_launch(key, value, key_quantizer, value_quantizer, rows, residue).run()


def encode_launch(
    key: Tensor,
    value: Tensor,
    key_quantizer: Quantizer,
    value_quantizer: Quantizer,
    rows: dict[str, Tensor],
    residue: tuple[Tensor, Tensor] | None = None,
) -> Launch:
    """The launch that fills `rows`; arguments as `packed_encode`."""
    key = key if key.stride(-1) == 1 else key.contiguous()
    value = value if value.stride(-1) == 1 else value.contiguous()
    batch, tokens = key.shape[:2]
    exact, zero, scale = _exact(rows), rows.get("value.zero"), rows.get("value.scale")
    k_tables, v_tables = (encode_tables(q, key.device) for q in (key_quantizer, value_quantizer))
    args = {
        "key": key, **strides("x", key, ("ksb", 0), ("kst", 1), ("ksh", 2)),
        "value": value, **strides("x", value, ("vsb", 0), ("vst", 1), ("vsh", 2)), "tokens": tokens,
        **_targets(rows, "key", "k", exact), **_targets(rows, "value", "v", exact),
        "v_zero": exact if zero is None else zero, **strides("vz", zero, ("sb", 0), ("st", 1)),
        "v_scale": exact if scale is None else scale, **strides("vs", scale, ("sb", 0), ("st", 1)),
        "k_middle": k_tables.middle, "k_book": k_tables.centroids, "k_weight": k_tables.weight,
        "k_fields": k_tables.fields, "v_middle": v_tables.middle, "v_fields": v_tables.fields,
        **_feedback_args("k", k_tables, key), **_feedback_args("v", v_tables, value),
        "v_book": v_tables.centroids, "v_weight": v_tables.weight, **_residue_args(key, value, residue),
    }  # fmt: skip
    constants = {
        "LIMIT": torch.finfo(exact.dtype).max if exact.is_floating_point() else 0.0, "AT_ONCE": WORDS_AT_ONCE,
        **_shape(key_quantizer, "K"), **_shape(value_quantizer, "V"),
        "V_RELATIVE": value_quantizer.relative, "COPIES": _copies(value_quantizer, rows),
        "WINDOWS": triton.next_power_of_2(value_quantizer.outliers + 1),
        "RESIDUE": residue is not None, "K_FEEDBACK": k_tables.order is not None,
        "V_FEEDBACK": v_tables.order is not None, "HEADS_PADDED": triton.next_power_of_2(key.shape[2]),
        "K_DIM_PADDED": triton.next_power_of_2(key.shape[3]), "V_DIM_PADDED": triton.next_power_of_2(value.shape[3]),
    }  # fmt: skip
    # With feedback an error's last bit may tip a later channel's code: products are rounded as everywhere else.
    fusion = k_tables.order is None and v_tables.order is None
    return Launch(encode_kernel, (batch * tokens, 2), args, constants, warps=4, fusion=fusion)


def _feedback_args(short: str, tables: EncodeTables, x: Tensor) -> dict[str, Tensor]:
    """Tables of the feedback, and room for the codes of all tokens `x [B, t, H, D]`; any tensor where there is none."""
    if tables.order is None or tables.matrix is None:
        return dict.fromkeys((f"{short}_codes", f"{short}_order", f"{short}_matrix"), tables.fields)
    codes = torch.empty(x.shape, dtype=torch.int16, device=x.device)
    return {f"{short}_codes": codes, f"{short}_order": tables.order, f"{short}_matrix": tables.matrix}


def _exact(rows: dict[str, Tensor]) -> Tensor:
    """A tensor of what is kept in two bytes; where there is none, one that nothing is written to as such."""
    names = ("value.zero", "value.outlier_value", "key.outlier_value", "key.words")
    return next(rows[name] for name in names if name in rows)


def _copies(quantizer: Quantizer, rows: dict[str, Tensor]) -> int:
    """How often each zero and scale is stored: once, or once for every head."""
    if not quantizer.relative:
        return 1
    heads = quantizer.layout.widths.shape[0]
    may = {quantizer.groups} if quantizer.outliers else {quantizer.groups, heads}
    for name in ("zero", "scale"):
        found = rows[f"value.{name}"].shape[2]
        if found not in may:
            raise ValueError(
                f"rows['value.{name}'] has {found} groups a token, expected {' or '.join(map(str, sorted(may)))} for a "
                f"quantizer of scope {quantizer.scope!r} with {heads} heads and {quantizer.outliers} outliers"
            )
    return int(rows["value.zero"].shape[2] // quantizer.groups)


def _residue_args(key: Tensor, value: Tensor, residue: tuple[Tensor, Tensor] | None) -> dict[str, Any]:
    args: dict[str, Any] = {}
    for name, short, x, number in (("key", "k", key, 0), ("value", "v", value, 1)):
        tensor = None if residue is None else residue[number]
        expected = (*x.shape[:3], 2)
        if tensor is not None and (tensor.shape != expected or tensor.dtype != torch.float32):
            raise ValueError(
                f"residue of {name}s is {tensor.dtype} {list(tensor.shape)}, expected float32 {list(expected)}: "
                "batch, tokens, kv heads, error and size"
            )
        args[f"{short}_residue"] = x if tensor is None else tensor
        args.update(strides(f"r{short}", tensor, ("sb", 0), ("st", 1), ("sh", 2), ("sx", 3)))
    return args


def _targets(rows: dict[str, Tensor], name: str, short: str, absent: Tensor) -> dict[str, Any]:
    args: dict[str, Any] = {}
    for what, part, letter in (
        ("words", "words", "w"),
        ("outlier_index", "index", "i"),
        ("outlier_value", "exact", "x"),
    ):
        tensor = rows.get(f"{name}.{what}")
        args[f"{short}_{part}"] = absent if tensor is None else tensor
        args.update(strides(f"{short}{letter}", tensor, ("sb", 0), ("st", 1)))
    return args


def _shape(quantizer: Quantizer, short: str) -> dict[str, int]:
    heads, dim = quantizer.layout.widths.shape
    size = heads * dim // quantizer.groups
    levels = quantizer.codebook.centroids.shape[-1]
    return {
        f"{short}_DIM": dim, f"{short}_GROUPS": quantizer.groups, f"{short}_SIZE": size,
        f"{short}_GROUPS_PADDED": triton.next_power_of_2(quantizer.groups),
        f"{short}_SIZE_PADDED": triton.next_power_of_2(size),
        f"{short}_BITS": levels.bit_length() - 1, f"{short}_LEVELS": levels,
        f"{short}_OUTLIERS": quantizer.outliers, f"{short}_WORDS": quantizer.layout.words,
    }  # fmt: skip
