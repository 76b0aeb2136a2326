"""The compiled loops of `native.py`: one tile of 64 tokens of one kv head at a time, from packed words to the output.

A tile's words are transposed once, every channel is looked up for 64 tokens in a row, and rotation, scores, softmax and
the weighted sum of values follow while the tile is hot (`native_tile.py`). No more than two tiles of floats exist per
thread.

Keys are rotated relative to their tile: the query is turned back by the tile's smallest position, the keys by how far
they lie behind it (`R(t)q . R(s)k = R(t - s)q . k`). That is 0..63, one small table in the tile's order, where the
positions follow one another; elsewhere (padding, evicted tokens) rows of the table of 0..1023, and angles made anew
where a tile reaches further.

The attention that tokens drew: raw scores are kept while tiles pass, and weighed once the log-sum-exp is known.

Arguments come as one row of numbers, `CALL`, mostly addresses: a compiled function that takes fifty arrays spends more
time on taking them than a short context takes.

Everything is inlined into the two functions that are called (`forceinline`). A call within compiled code goes by a weak
symbol: the process that compiled would run the helper as it was optimised alone, a process that reads numba's cache the
copy that was optimised once more with its caller, and sums that may be reordered differ in their last bits.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from kvcalib.runtime import native_tile
from kvcalib.runtime.native_tile import (
    FLAGS,
    NOTHING,
    TILE,
    far_angles,
    fold,
    look_up,
    relative,
    score,
    turn,
    turn_keys,
    turn_keys_by,
    weigh,
)  # fmt: skip

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
    "next", "far", "tasks", "splits", "share", "tiles", "batch", "kv_heads", "rows", "queries", "head_dim",
    "value_dim", "total", "length", "query", "rotate", "out", "peak", "norm", "sums", "positions", "position_row",
    "position_head", "position_token", "masked", "mask", "mask_rows", "mask_step", "turns", "channel", "scale", "fine",
    "fine_sin", "coarse", "coarse_sin", "coarse_rows", "wide", "sinks", "sink_key", "sink_value", "sink_slot",
    "recent", "recent_key", "recent_value", "logits", "drawn", "raw",
    *(f"{role}_{name}{part}" for role in ("key", "value") for name in STORED for part in PLACE),
    *(f"{name}{part}" for name in ("zero", "level") for part in PLACE),
)  # fmt: skip
FLOATS = ("scaling", "softcap", "decay")
CALL = np.dtype(
    [(name, np.int64) for name in DYNAMIC]
    + [(name, np.float64) for name in FLOATS]
    + [(f"{role}_{name}", np.int64) for role in ("key", "value") for name in TABLES]
)
"""One call: counts, then addresses. `*_row`, `*_head`, `*_token` are steps in elements. "level" is the values' scale;
"zero" and "level" are 0 where the codebook of values is not relative.

"far" is set where a position lies beyond the table of multiples of 1024: the results are not to be used."""


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


@numba.njit(nogil=True, forceinline=True)
def _index(address: Any, short: Any, i: Any) -> Any:
    """The i-th outlier index."""
    if short:
        return np.int64(numba.carray(pointer(address), 1 << 40, dtype=np.uint8)[i])  # type: ignore[call-arg]
    return np.int64(numba.carray(pointer(address), 1 << 40, dtype=np.int16)[i])  # type: ignore[call-arg]


@numba.njit(nogil=True, forceinline=True)
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


@numba.njit(fastmath=FLAGS, nogil=True, forceinline=True)
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
            here = max(position[(call.total - call.queries + q) * call.position_token], 0)
            if here >= call.coarse_rows << 10:
                call.far = 1
                return
            turn(one, query[m : m + 1], here, np.float32(1.0), angles)
            for c in range(call.head_dim):
                query[m, c] *= scale[c]
        else:
            query[m] = one[0]


@numba.njit(fastmath=FLAGS, nogil=True, forceinline=True)
def _attend(call: Any, batch: Any, head: Any, split: Any) -> None:
    """One split of one row and kv head; the last split takes the recent window too."""
    rows, head_dim, value_dim = call.rows, call.head_dim, call.value_dim
    pairs, count, length, heads = head_dim // 2, call.queries, call.length, call.kv_heads
    first_tile, last_tile = min(call.tiles, split * call.share), min(call.tiles, (split + 1) * call.share)
    position = numba.carray(
        pointer(call.positions + 4 * (batch * call.position_row + head * call.position_head)),  # type: ignore[call-arg]
        1 << 40, dtype=np.int32,
    )  # fmt: skip
    bias = _floats(call.mask + 4 * min(batch, call.mask_rows - 1) * count * call.mask_step, (count, call.mask_step))
    wide = _floats(call.wide, (65536,))
    fine, fine_sin = _floats(call.fine, 1024 * pairs), _floats(call.fine_sin, 1024 * pairs)
    coarse = _floats(call.coarse, call.coarse_rows * pairs)
    coarse_sin = _floats(call.coarse_sin, call.coarse_rows * pairs)
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
    # As they stay where values have none.
    zero, scale = np.zeros(TILE, np.float32), np.ones(TILE, np.float32)
    near = np.empty(head_dim * TILE, np.float32)
    own_cos, own_sin = np.empty(0, np.float32), np.empty(0, np.float32)
    place = np.zeros(TILE, np.int64)
    raw = _floats(call.raw, (call.batch, heads, rows, call.total))[batch, head]
    if call.turns:
        for p in range(pairs):
            for t in range(TILE):
                near[2 * p * TILE + t], near[(2 * p + 1) * TILE + t] = fine[t * pairs + p], fine_sin[t * pairs + p]
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
            look_up(head, k_words[at:], call.key_words_token, n, k_tables, turned, codes, keys[:head_dim])
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
            lowest, highest, follow = relative(position, call.position_token, start, n, place)
            if highest >= call.coarse_rows << 10:
                call.far = 1
                return
            turn(query, back, lowest, np.float32(-1.0), angles)
            if follow:
                turn_keys(flat, near, head_dim)
            elif highest - lowest < 1024:
                for t in range(n):
                    place[t] *= pairs
                turn_keys_by(flat, fine, fine_sin, place, head_dim)
            else:
                if len(own_cos) == 0:
                    own_cos, own_sin = np.empty(TILE * pairs, np.float32), np.empty(TILE * pairs, np.float32)
                far_angles(place, angles, own_cos, own_sin)
                turn_keys_by(flat, own_cos, own_sin, place, head_dim)
            score(back, keys[:head_dim], scores)
        else:
            score(query, keys[:head_dim], scores)
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
            if call.drawn:
                raw[m, start : start + n] = row[:n]
        if number < last_tile:
            at = batch * call.value_words_row + start * call.value_words_token
            look_up(head, v_words[at:], call.value_words_token, n, v_tables, turned, codes, values[:value_dim])
            for t in range(n if call.zero else 0):
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
        fold(scores, n, zero, scale, values[:value_dim], weighted, peaks, norms, sums)


@numba.njit(nogil=True, forceinline=True)
def _join(call: Any, batch: Any, head: Any) -> None:
    """Join the splits of one row and kv head into `out [B, Q, Hq, Dv]`; query rows that saw nothing give zeros."""
    rows, splits, heads, count, dim = call.rows, call.splits, call.kv_heads, call.queries, call.value_dim
    group = rows // count
    peak = _floats(call.peak, (call.batch, heads, splits, rows))[batch, head]
    norm = _floats(call.norm, (call.batch, heads, splits, rows))[batch, head]
    sums = _floats(call.sums, (call.batch, heads, splits, rows, dim))[batch, head]
    out = _floats(call.out, (call.batch, count, heads * group, dim))
    raw = _floats(call.raw, (call.batch, heads, rows, call.total))[batch, head]
    drawn = _floats(call.drawn, (call.batch, heads, call.total))[batch, head]
    if call.drawn:
        drawn[:] = np.float32(0.0)
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
            if call.drawn:
                weigh(raw[m], base, np.float32(call.decay ** (count - 1 - q) / total), drawn)


@lru_cache(maxsize=1)
def loops() -> tuple[Any, Any]:
    """Two C functions that take the address of a `CALL`; compiled, or read from numba's cache, when first asked for.

    The first takes tasks, a split of a row's kv head each, until none is left: every thread of the team calls it. The
    second joins the splits of every row and kv head.
    """
    # numba's cache watches this file only; what a function closes over is part of its key.
    code = sha256(Path(native_tile.__file__).read_bytes()).hexdigest()

    def work(address: Any) -> None:
        call = numba.carray(pointer(address), 1, dtype=CALL)[0]  # type: ignore[call-arg]
        assert code
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

    def join(address: Any) -> None:
        call = numba.carray(pointer(address), 1, dtype=CALL)[0]  # type: ignore[call-arg]
        assert code
        for batch in range(call.batch):
            for head in range(call.kv_heads):
                _join(call, batch, head)

    made = numba.cfunc(types.void(types.int64), cache=True)
    return made(work), made(join)
