"""The compiled loops of `native.py`: one tile of 64 tokens of one kv head at a time, from packed words to the output.

A tile's words are transposed once, every channel is looked up for 64 tokens in a row, and rotation, scores, softmax and
the weighted sum of values follow while the tile is hot. No more than two tiles of floats exist per thread.

Keys are rotated relative to their tile: the query is turned back by the tile's first position, the keys by 0..63, whose
cosines and sines are one small table (`R(t)q . R(s)k = R(t - s)q . k`). Where the positions of a tile do not follow one
another (padding, evicted tokens), keys are rotated by their own.

Arguments come as one row of numbers, `CALL`, mostly addresses: a compiled function that takes fifty arrays spends more
time on taking them than a short context takes.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

TILE = 64
LANES = 16
NOTHING = np.float32(-1e30)
FLAGS = {"reassoc", "contract", "nsz", "arcp"}

TABLES = ("used", "most", "amount", "fields", "count", "narrow", "centroids", "levels", "row_of", "reach", "groups",
          "outliers", "short")  # fmt: skip
"""Numbers and addresses of one quantizer, which never change:

used `[H, most]` int64: words that a head reads; amount `[H]` int64: how many. fields `[4, H, D, 3]` uint32: for each
plane the place of its word in `used`, shift, mask and position in the code. count `[H, D]` int32: planes. narrow
`[H, D]` bool: whether the look-up of 16 levels does. centroids `[H, D, levels]` float32. row_of `[H, reach]` int64: the
row of the tile where an outlier index belongs, D if it is another head's. short: 1 where an index has one byte."""
STORED = ("words", "index", "exact")
PLACE = ("", "_row", "_token")
DYNAMIC = (
    "next", "tasks", "splits", "share", "tiles", "batch", "kv_heads", "rows", "queries", "head_dim", "value_dim",
    "total", "length", "query", "rotate", "out", "peak", "norm", "sums", "positions", "position_rows", "position_step",
    "masked", "mask", "mask_rows", "mask_step", "turns", "channel", "scale", "fine", "fine_sin", "coarse", "coarse_sin",
    "coarse_rows", "wide", "sinks", "sink_key", "sink_value", "sink_slot", "recent", "recent_key", "recent_value",
    "logits",
    *(f"{role}_{name}{part}" for role in ("key", "value") for name in STORED for part in PLACE),
    *(f"{name}{part}" for name in ("zero", "level") for part in PLACE),
)  # fmt: skip
FLOATS = ("scaling", "softcap")
CALL = np.dtype(
    [(name, np.int64) for name in DYNAMIC]
    + [(name, np.float64) for name in FLOATS]
    + [(f"{role}_{name}", np.int64) for role in ("key", "value") for name in TABLES]
)
"""One call: counts, then addresses. `*_row` and `*_token` are steps in elements. "level" is the values' scale."""


@intrinsic
def pointer(_: Any, address: Any) -> Any:
    """The pointer that the number `address` is."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


@intrinsic
def _ticket(_: Any, address: Any) -> Any:
    """The number at `address`, which goes up by one: no two threads get the same."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number = ir.IntType(64)
        place = builder.inttoptr(arguments[0], number.as_pointer())
        return builder.atomic_rmw("add", place, ir.Constant(number, 1), "monotonic")

    return types.int64(types.int64), generate


@intrinsic
def _field(_: Any, word: Any, shift: Any, mask: Any, place: Any) -> Any:
    """`((word >> shift) & mask) << place` in 32 bits; numba would widen it to 64 and halve the lanes twice."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word, shift, mask, place = arguments
        return builder.shl(builder.and_(builder.lshr(word, shift), mask), place)

    return types.uint32(types.uint32, types.uint32, types.uint32, types.uint32), generate


@intrinsic
def _fetch(
    _: Any, turned: Any, row_a: Any, shift_a: Any, mask_a: Any, row_b: Any, shift_b: Any, mask_b: Any, place_b: Any,
    table: Any, out: Any,
) -> Any:  # fmt: skip
    """`out[0:64] = table[code[0:64]]`, a code below 16 made of a field in row a and one in row b of `turned [*, 64]`.

    One in-register permutation per 16 where the CPU has one: written as a permutation in LLVM's terms, since a loop
    over `table[code]` becomes one load per element.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, table, target = (
            context.make_array(signature.args[i])(context, builder, arguments[i]).data for i in (0, 8, 9)
        )
        floats = ir.VectorType(ir.FloatType(), LANES)
        numbers = ir.VectorType(ir.IntType(32), LANES)
        number, wide = ir.IntType(32), ir.IntType(64)

        def spread(x: Any) -> Any:
            first = builder.insert_element(ir.Constant(numbers, ir.Undefined), x, ir.Constant(number, 0))
            return builder.shuffle_vector(first, ir.Constant(numbers, ir.Undefined), ir.Constant(numbers, [0] * LANES))

        def load(pointer: Any, start: Any, kind: Any) -> Any:
            found = builder.load(builder.bitcast(builder.gep(pointer, [start]), kind.as_pointer()))
            found.align = 4
            return found

        levels = load(table, ir.Constant(wide, 0), floats)
        shift_a, mask_a, shift_b, mask_b, place_b = (spread(arguments[i]) for i in (2, 3, 5, 6, 7))
        rows = [builder.mul(builder.zext(arguments[i], wide), ir.Constant(wide, TILE)) for i in (1, 4)]
        for start in range(0, TILE, LANES):
            a, b = (load(source, builder.add(row, ir.Constant(wide, start)), numbers) for row in rows)
            low = builder.and_(builder.lshr(a, shift_a), mask_a)
            high = builder.shl(builder.and_(builder.lshr(b, shift_b), mask_b), place_b)
            code = builder.and_(builder.or_(low, high), ir.Constant(numbers, [LANES - 1] * LANES))
            found = ir.Constant(floats, ir.Undefined)
            for lane in range(LANES):
                place = ir.Constant(number, lane)
                level = builder.extract_element(levels, builder.extract_element(code, place))
                found = builder.insert_element(found, level, place)
            to = builder.bitcast(builder.gep(target, [ir.Constant(wide, start)]), floats.as_pointer())
            builder.store(found, to).align = 4
        return context.get_dummy_value()

    field = (types.uint32,) * 3
    return types.void(turned, *field, *field, types.uint32, table, out), generate


@numba.njit(inline="always", fastmath=FLAGS)
def _exp(x: Any) -> Any:
    """e^x for x <= 0 in float32, within 2 ulp: 2^n times a polynomial of the fraction."""
    y = max(x, np.float32(-87.0)) * np.float32(1.4426950408889634)
    n = np.int32(y - np.float32(0.5))
    f = y - np.float32(n)
    p = np.float32(1.5403530e-4)
    p = p * f + np.float32(1.3333558e-3)
    p = p * f + np.float32(9.6181291e-3)
    p = p * f + np.float32(5.5504109e-2)
    p = p * f + np.float32(2.4022651e-1)
    p = p * f + np.float32(6.9314718e-1)
    p = p * f + np.float32(1.0)
    return p * np.int32((n + np.int32(127)) << np.int32(23)).view(np.float32)


@numba.njit(fastmath=FLAGS, nogil=True)
def _look_up(head: Any, rows: Any, step: Any, n: Any, tables: Any, turned: Any, codes: Any, tile: Any) -> None:
    """Decode `n` tokens of one head into `tile [D, 64]`.

    `rows`: their words, `step` from one token to the next; `turned [words, 64]` and `codes [64]`: scratch.
    """
    used, amount, fields, count, narrow, centroids = tables
    for t in range(n):
        for w in range(amount[head]):
            turned[w, t] = rows[t * step + used[head, w]]
    for c in range(tile.shape[0]):
        if narrow[head, c]:
            _fetch(  # type: ignore[call-arg]
                turned, fields[0, head, c, 0], fields[1, head, c, 0], fields[2, head, c, 0], fields[0, head, c, 1],
                fields[1, head, c, 1], fields[2, head, c, 1], fields[3, head, c, 1], centroids[head, c], tile[c],
            )  # fmt: skip
            continue
        for t in range(TILE):
            codes[t] = np.uint32(0)
        for plane in range(count[head, c]):
            row, shift = turned[fields[0, head, c, plane]], fields[1, head, c, plane]
            mask, place = fields[2, head, c, plane], fields[3, head, c, plane]
            for t in range(TILE):
                codes[t] |= _field(row[t], shift, mask, place)  # type: ignore[call-arg]
        out, levels = tile[c], centroids[head, c]
        for t in range(TILE):
            out[t] = levels[codes[t]]


@numba.njit(fastmath=FLAGS, nogil=True)
def _turn(x: Any, out: Any, position: Any, sign: Any, angles: Any) -> None:
    """`out = R(sign * position) x`, both `[M, D]` in pair order; position >= 0."""
    fine, fine_sin, coarse, coarse_sin = angles
    a, b = position >> 10, position & 1023
    for p in range(fine.shape[1]):
        cos = fine[b, p] * coarse[a, p] - fine_sin[b, p] * coarse_sin[a, p]
        sin = (fine_sin[b, p] * coarse[a, p] + fine[b, p] * coarse_sin[a, p]) * sign
        for m in range(x.shape[0]):
            first, second = x[m, 2 * p], x[m, 2 * p + 1]
            out[m, 2 * p] = first * cos - second * sin
            out[m, 2 * p + 1] = second * cos + first * sin


@numba.njit(fastmath=FLAGS, nogil=True)
def _turn_keys(flat: Any, turn: Any, dim: Any) -> None:
    """Rotate `flat [D * 64]`, pairs of rows, in place by `turn [P * 2 * 64]`, a row of cosines and one of sines each.

    Flat arrays with constant distances: only then the compiler sees that the rows do not overlap, and vectorises.
    """
    for p in range(dim // 2):
        i = 2 * p * TILE
        for t in range(TILE):
            x, y = flat[i + t], flat[i + TILE + t]
            c, s = turn[i + t], turn[i + TILE + t]
            flat[i + t] = x * c - y * s
            flat[i + TILE + t] = y * c + x * s


@numba.njit(fastmath=FLAGS, nogil=True)
def _scores(query: Any, keys: Any, scores: Any) -> None:
    """`scores [M, 64] = query [M, D] @ keys [D, 64]`; four channels at a time, D is even."""
    for m in range(query.shape[0]):
        out = scores[m]
        for t in range(TILE):
            out[t] = np.float32(0.0)
        for c in range(0, keys.shape[0] - 3, 4):
            x, y, z, w = keys[c], keys[c + 1], keys[c + 2], keys[c + 3]
            qx, qy, qz, qw = query[m, c], query[m, c + 1], query[m, c + 2], query[m, c + 3]
            for t in range(TILE):
                out[t] += qx * x[t] + qy * y[t] + qz * z[t] + qw * w[t]
        for c in range(keys.shape[0] // 4 * 4, keys.shape[0]):
            x, qx = keys[c], query[m, c]
            for t in range(TILE):
                out[t] += qx * x[t]


@numba.njit(fastmath=FLAGS, nogil=True)
def _fold(
    scores: Any, n: Any, zero: Any, scale: Any, tile: Any, weighted: Any, peak: Any, norm: Any, sums: Any
) -> None:
    """Take `n` scores and the values `zero[t] + scale[t] * tile[:, t]` of a tile into the running softmax."""
    for m in range(scores.shape[0]):
        row = scores[m]
        highest = NOTHING
        for t in range(n):
            highest = max(highest, row[t])
        if highest <= NOTHING / 2:
            row[:] = np.float32(0.0)
            continue
        highest = max(highest, peak[m])
        decay = _exp(peak[m] - highest) if peak[m] > NOTHING / 2 else np.float32(0.0)
        peak[m] = highest
        total, rise = np.float32(0.0), np.float32(0.0)
        for t in range(n):
            w = _exp(row[t] - highest) if row[t] > NOTHING / 2 else np.float32(0.0)
            total += w
            rise += w * zero[t]
            row[t] = w
        row[n:] = np.float32(0.0)
        norm[m] = norm[m] * decay + total
        out = sums[m]
        for c in range(tile.shape[0]):
            out[c] = out[c] * decay + rise
    for m in range(scores.shape[0]):
        row, out = scores[m], sums[m]
        for t in range(TILE):
            weighted[t] = row[t] * scale[t]
        for c in range(0, tile.shape[0] - 1, 2):
            x, y = tile[c], tile[c + 1]
            a, b = np.float32(0.0), np.float32(0.0)
            for t in range(TILE):
                a += weighted[t] * x[t]
                b += weighted[t] * y[t]
            out[c] += a
            out[c + 1] += b
        if tile.shape[0] % 2:
            x, a = tile[tile.shape[0] - 1], np.float32(0.0)
            for t in range(TILE):
                a += weighted[t] * x[t]
            out[tile.shape[0] - 1] += a


@numba.njit(inline="always")
def _floats(address: Any, shape: Any) -> Any:
    return numba.carray(pointer(address), shape, dtype=np.float32)  # type: ignore[call-arg]


@numba.njit(inline="always")
def _halves(address: Any) -> Any:
    """Two-byte floats as numbers; as many as anybody asks for."""
    return numba.carray(pointer(address), 1 << 40, dtype=np.uint16)  # type: ignore[call-arg]


@numba.njit(inline="always")
def _integers(address: Any, shape: Any) -> Any:
    return numba.carray(pointer(address), shape, dtype=np.int64)  # type: ignore[call-arg]


@numba.njit(nogil=True)
def _index(address: Any, short: Any, i: Any) -> Any:
    """The i-th outlier index."""
    if short:
        return np.int64(numba.carray(pointer(address), 1 << 40, dtype=np.uint8)[i])  # type: ignore[call-arg]
    return np.int64(numba.carray(pointer(address), 1 << 40, dtype=np.int16)[i])  # type: ignore[call-arg]


@numba.njit(nogil=True)
def _tables(
    heads: Any, dim: Any, used: Any, most: Any, amount: Any, fields: Any, count: Any, narrow: Any, centroids: Any,
    levels: Any,
) -> Any:  # fmt: skip
    return (
        _integers(used, (heads, most)),
        _integers(amount, (heads,)),
        numba.carray(pointer(fields), (4, heads, dim, 3), dtype=np.uint32),  # type: ignore[call-arg]
        numba.carray(pointer(count), (heads, dim), dtype=np.int32),  # type: ignore[call-arg]
        numba.carray(pointer(narrow), (heads, dim), dtype=np.uint8),  # type: ignore[call-arg]
        _floats(centroids, (heads, dim, levels)),
    )


@numba.njit(fastmath=FLAGS, nogil=True)
def _ready(call: Any, batch: Any, head: Any, position: Any, angles: Any, query: Any) -> None:
    """The query rows of one kv head `[G * Q, D]`: channels in the plan's order, scaled, rotated where they are not."""
    heads = call.kv_heads * (call.rows // call.queries)
    raw = _floats(call.query, (call.batch, heads, call.queries, call.head_dim))
    channel = _integers(call.channel, (call.head_dim,))
    scale = _floats(call.scale, (call.head_dim,))
    one = np.empty((1, call.head_dim), np.float32)
    for m in range(call.rows):
        group, q = m // call.queries, m % call.queries
        row = raw[batch, head * (call.rows // call.queries) + group, q]
        for c in range(call.head_dim):
            one[0, c] = row[channel[c]] * np.float32(call.scaling) * scale[c]
        if call.rotate:
            _turn(one, query[m : m + 1], max(position[call.total - call.queries + q], 0), np.float32(1.0), angles)
            for c in range(call.head_dim):
                query[m, c] *= scale[c]
        else:
            query[m] = one[0]


@numba.njit(fastmath=FLAGS, nogil=True)
def _attend(call: Any, batch: Any, head: Any, split: Any) -> None:
    """One split of one row and kv head; the last split takes the recent window too."""
    rows, head_dim, value_dim = call.rows, call.head_dim, call.value_dim
    pairs, count, length, heads = head_dim // 2, call.queries, call.length, call.kv_heads
    first_tile, last_tile = split * call.share, min(call.tiles, (split + 1) * call.share)
    position = numba.carray(
        pointer(call.positions + 4 * min(batch, call.position_rows - 1) * call.position_step),  # type: ignore[call-arg]
        call.total, dtype=np.int32,
    )  # fmt: skip
    bias = _floats(call.mask + 4 * min(batch, call.mask_rows - 1) * count * call.mask_step, (count, call.mask_step))
    wide = _floats(call.wide, (65536,))
    fine, fine_sin = _floats(call.fine, (1024, pairs)), _floats(call.fine_sin, (1024, pairs))
    coarse = _floats(call.coarse, (call.coarse_rows, pairs))
    coarse_sin = _floats(call.coarse_sin, (call.coarse_rows, pairs))
    angles = (fine, fine_sin, coarse, coarse_sin)
    k_tables = _tables(
        heads, head_dim, call.key_used, call.key_most, call.key_amount, call.key_fields, call.key_count,
        call.key_narrow, call.key_centroids, call.key_levels,
    )  # fmt: skip
    v_tables = _tables(
        heads, value_dim, call.value_used, call.value_most, call.value_amount, call.value_fields, call.value_count,
        call.value_narrow, call.value_centroids, call.value_levels,
    )  # fmt: skip
    k_row = _integers(call.key_row_of, (heads, call.key_reach))
    v_row = _integers(call.value_row_of, (heads, call.value_reach))
    k_exact, v_exact = _halves(call.key_exact), _halves(call.value_exact)
    zeros, levels = _halves(call.zero), _halves(call.level)
    sink_slot = numba.carray(pointer(call.sink_slot), (call.batch, call.sinks), dtype=np.int32)
    sink_key = _floats(call.sink_key, (call.batch, call.sinks, heads, head_dim))
    sink_value = _floats(call.sink_value, (call.batch, call.sinks, heads, value_dim))
    recent_key = _floats(call.recent_key, (call.batch, call.recent, heads, head_dim))
    recent_value = _floats(call.recent_value, (call.batch, call.recent, heads, value_dim))
    k_words = numba.carray(pointer(call.key_words), 1 << 40, dtype=np.uint32)
    v_words = numba.carray(pointer(call.value_words), 1 << 40, dtype=np.uint32)
    channel = _integers(call.channel, (head_dim,))
    k_group = head if call.key_groups > 1 else 0
    v_group = head if call.value_groups > 1 else 0

    query = np.empty((rows, head_dim), np.float32)
    _ready(call, batch, head, position, angles, query)
    # One row more than channels: where outliers of other heads go.
    flat, values = np.zeros((head_dim + 1) * TILE, np.float32), np.zeros((value_dim + 1, TILE), np.float32)
    keys = flat.reshape(head_dim + 1, TILE)
    turned = np.zeros((max(call.key_most, call.value_most), TILE), np.uint32)
    codes, weighted = np.zeros(TILE, np.uint32), np.empty(TILE, np.float32)
    scores, back = np.empty((rows, TILE), np.float32), np.empty((rows, head_dim), np.float32)
    zero, scale = np.zeros(TILE, np.float32), np.zeros(TILE, np.float32)
    near = np.empty(head_dim * TILE, np.float32)
    own = np.empty(0, np.float32)
    if call.turns:
        for p in range(pairs):
            for t in range(TILE):
                near[2 * p * TILE + t], near[(2 * p + 1) * TILE + t] = fine[t, p], fine_sin[t, p]
    peaks = _floats(call.peak, (call.batch, heads, call.splits, rows))[batch, head, split]
    norms = _floats(call.norm, (call.batch, heads, call.splits, rows))[batch, head, split]
    sums = _floats(call.sums, (call.batch, heads, call.splits, rows, value_dim))[batch, head, split]
    peaks[:] = NOTHING
    norms[:] = np.float32(0.0)
    sums[:] = np.float32(0.0)
    recent = call.recent if split == call.splits - 1 else 0
    for number in range(first_tile, last_tile + (recent + TILE - 1) // TILE):
        if number < last_tile:
            start = number * TILE
            n = min(TILE, length - start)
            at = batch * call.key_words_row + start * call.key_words_token
            _look_up(head, k_words[at:], call.key_words_token, n, k_tables, turned, codes, keys[:head_dim])
            for t in range(n if call.key_outliers else 0):
                i = batch * call.key_index_row + (start + t) * call.key_index_token + k_group * call.key_outliers
                j = batch * call.key_exact_row + (start + t) * call.key_exact_token + k_group * call.key_outliers
                for o in range(call.key_outliers):
                    keys[k_row[head, _index(call.key_index, call.key_short, i + o)], t] = wide[k_exact[j + o]]
            for s in range(call.sinks):
                t = sink_slot[batch, s] - start
                if 0 <= t < n:
                    for c in range(head_dim):
                        keys[c, t] = sink_key[batch, s, head, channel[c]]
        else:
            start = length + (number - last_tile) * TILE
            n = min(TILE, length + recent - start)
            for t in range(n):
                for c in range(head_dim):
                    keys[c, t] = recent_key[batch, start - length + t, head, channel[c]]
        if call.turns:
            follow = position[start] >= 0
            for t in range(1, n):
                follow &= position[start + t] == position[start] + t
            if follow:
                _turn(query, back, position[start], np.float32(-1.0), angles)
                _turn_keys(flat, near, head_dim)
                _scores(back, keys[:head_dim], scores)
            else:
                if len(own) == 0:
                    own = np.zeros(head_dim * TILE, np.float32)
                for t in range(n):
                    a, b = max(position[start + t], 0) >> 10, max(position[start + t], 0) & 1023
                    for p in range(pairs):
                        i = 2 * p * TILE + t
                        own[i] = fine[b, p] * coarse[a, p] - fine_sin[b, p] * coarse_sin[a, p]
                        own[i + TILE] = fine_sin[b, p] * coarse[a, p] + fine[b, p] * coarse_sin[a, p]
                _turn_keys(flat, own, head_dim)
                _scores(query, keys[:head_dim], scores)
        else:
            _scores(query, keys[:head_dim], scores)
        for m in range(rows):
            row, q = scores[m], m % count
            if call.softcap > 0:
                cap = np.float32(call.softcap)
                for t in range(n):
                    row[t] = cap * np.tanh(row[t] / cap)
            if call.masked:
                for t in range(n):
                    row[t] = max(row[t] + bias[q, start + t], NOTHING)
            else:
                for t in range(max(0, call.total - count + q + 1 - start), n):
                    row[t] = NOTHING
        if number < last_tile:
            at = batch * call.value_words_row + start * call.value_words_token
            _look_up(head, v_words[at:], call.value_words_token, n, v_tables, turned, codes, values[:value_dim])
            for t in range(n):
                zero[t] = wide[zeros[batch * call.zero_row + (start + t) * call.zero_token + v_group]]
                scale[t] = wide[levels[batch * call.level_row + (start + t) * call.level_token + v_group]]
            for t in range(n if call.value_outliers else 0):
                if scale[t] == 0:
                    for c in range(value_dim):
                        values[c, t] = zero[t]
                    zero[t], scale[t] = np.float32(0.0), np.float32(1.0)
                inverse = np.float32(1.0) / scale[t]
                i = batch * call.value_index_row + (start + t) * call.value_index_token + v_group * call.value_outliers
                j = batch * call.value_exact_row + (start + t) * call.value_exact_token + v_group * call.value_outliers
                for o in range(call.value_outliers):
                    # What, scaled and shifted like the others, gives the exact value.
                    shifted = (wide[v_exact[j + o]] - zero[t]) * inverse
                    values[v_row[head, _index(call.value_index, call.value_short, i + o)], t] = shifted
            for s in range(call.sinks):
                t = sink_slot[batch, s] - start
                if 0 <= t < n:
                    zero[t], scale[t] = np.float32(0.0), np.float32(1.0)
                    for c in range(value_dim):
                        values[c, t] = sink_value[batch, s, head, c]
        else:
            for t in range(n):
                zero[t], scale[t] = np.float32(0.0), np.float32(1.0)
                for c in range(value_dim):
                    values[c, t] = recent_value[batch, start - length + t, head, c]
        _fold(scores, n, zero, scale, values[:value_dim], weighted, peaks, norms, sums)


@numba.njit(nogil=True)
def _join(call: Any, batch: Any, head: Any) -> None:
    """Join the splits of one row and kv head into `out [B, Q, Hq, Dv]`; query rows that saw nothing give zeros."""
    rows, splits, heads, count, dim = call.rows, call.splits, call.kv_heads, call.queries, call.value_dim
    group = rows // count
    peak = _floats(call.peak, (call.batch, heads, splits, rows))[batch, head]
    norm = _floats(call.norm, (call.batch, heads, splits, rows))[batch, head]
    sums = _floats(call.sums, (call.batch, heads, splits, rows, dim))[batch, head]
    out = _floats(call.out, (call.batch, count, heads * group, dim))
    for m in range(rows):
        at, q = head * group + m // count, m % count
        highest = peak[0, m]
        for s in range(1, splits):
            highest = max(highest, peak[s, m])
        total = np.float64(0.0)
        base = highest
        if call.logits:
            # A logit per head takes its share of the softmax and no value.
            extra = _floats(call.logits, (heads * group,))[at]
            base = max(highest, extra)
            total += np.exp(np.float64(extra - base))
        line = out[batch, q, at]
        line[:] = np.float32(0.0)
        for s in range(splits):
            if peak[s, m] > NOTHING / 2:
                weight = np.exp(np.float64(peak[s, m] - base))
                total += norm[s, m] * weight
                for c in range(dim):
                    line[c] += sums[s, m, c] * np.float32(weight)
        if total > 0:
            inverse = np.float32(1.0 / total)
            for c in range(dim):
                line[c] *= inverse


def _work(address: Any) -> None:
    """Take tasks of the `CALL` at `address`, a split of a row's kv head each, until none is left.

    Every thread of the team calls this; `next` is the first of the record's numbers.
    """
    call = numba.carray(pointer(address), 1, dtype=CALL)[0]  # type: ignore[call-arg]
    while True:
        task = _ticket(address)
        if task >= call.tasks:
            break
        split = task % call.splits
        head = task // call.splits % call.kv_heads
        batch = task // (call.splits * call.kv_heads)
        _attend(call, batch, head, split)
        if call.splits == 1:
            _join(call, batch, head)


def _join_all(address: Any) -> None:
    """Join the splits of every row and kv head."""
    call = numba.carray(pointer(address), 1, dtype=CALL)[0]  # type: ignore[call-arg]
    for batch in range(call.batch):
        for head in range(call.kv_heads):
            _join(call, batch, head)


@lru_cache(maxsize=1)
def loops() -> tuple[Any, Any]:
    """`_work` and `_join_all` as C functions; compiled, or read from numba's cache, when first asked for."""
    made = numba.cfunc(types.void(types.int64), cache=True)
    return made(_work), made(_join_all)
