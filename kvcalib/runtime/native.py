"""Decode attention over packed storage on a CPU: one pass, one tile of 64 tokens in the first-level cache at a time.

The reference path (`attention.py`) unpacks a chunk with a dozen tensor operations, each a pass over memory; for one new
token that costs several times the attention itself. Here a tile's words are transposed once, every channel is looked up
for 64 tokens in a row, and rotation, scores, softmax and the weighted sum of values follow while the tile is hot. No
more than two tiles of floats exist per thread.

Keys are rotated relative to their tile: the query is turned back by the tile's first position, the keys by 0..63, whose
cosines and sines are one small table (`R(t)q . R(s)k = R(t - s)q . k`). Where the positions of a tile do not follow one
another (padding, evicted tokens), keys are rotated by their own.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic
from torch import Tensor

from kvcalib.model.angles import Angles
from kvcalib.quant.packing import MAX_PLANES
from kvcalib.quant.quantizer import Quantizer
from kvcalib.runtime.kernels.view import PackedView
from kvcalib.runtime.storage import Flat, flat_memory

TILE = 64
LANES = 16
MOST_ROWS = 32
"""Query rows per kv head up to which this beats the chunked path, whose matrix products pay off for many."""
NOTHING = np.float32(-1e30)
FLAGS = {"reassoc", "contract", "nsz", "arcp"}
_PLANS: WeakKeyDictionary[Quantizer, tuple[Angles | None, dict[str, Any]]] = WeakKeyDictionary()


def fits(query: Tensor, view: PackedView) -> bool:
    """Whether `native_attention` takes this call and is the faster path: few queries, some packed tokens."""
    rows = query.shape[1] // view.key.layout.widths.shape[0] * query.shape[2]
    return query.device.type == "cpu" and rows <= MOST_ROWS and view.length > 0


def native_attention(
    query: Tensor,
    view: PackedView,
    angles: Angles,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Softmax attention of the last Q tokens over a packed layer; see `attention.chunked_attention`.

    Args:
        query: `[B, Hq, Q, D]`, rotated.
        angles: the layer's rotation.
        mask: None for plain causal, bool `[B or 1, 1, Q, T + w]` (True attends), or float to add.

    Returns:
        `[B, Q, Hq, Dv]` in the dtype of `query`.
    """
    batch, heads, queries, head_dim = query.shape
    kv_heads, value_dim = view.value.layout.widths.shape
    total = view.positions.shape[1]
    rows = heads // kv_heads * queries
    key, value = _plan(view.key, angles), _plan(view.value, None)
    # Rows of one kv head together: [B, H, G * Q, D], channels in the plan's order, scaled.
    ready = (query.float() * scaling)[..., key["channel"]].reshape(batch, kv_heads, rows, head_dim).contiguous().numpy()
    ready = ready * key["scale"]
    kind, masked = _mask(mask)
    fine, coarse = _tables(angles, int(view.positions.max()) if angles.turns and total else 0)
    splits = max(1, min(torch.get_num_threads() * 2 // max(1, batch * kv_heads), -(-total // (4 * TILE))))
    if batch * kv_heads >= torch.get_num_threads():
        splits = 1
    shape = (batch, kv_heads, splits, rows)
    peak, norm = np.full(shape, NOTHING, np.float32), np.zeros(shape, np.float32)
    sums = np.zeros((*shape, value_dim), np.float32)
    tiles = -(-view.length // TILE)
    share = -(-tiles // splits)
    exact = _exact(view, kv_heads, head_dim, value_dim, key["channel"])
    arguments = (
        ready, queries, total, view.length,
        _flat(view, "key.words"), *key["tables"], *_outliers(view, "key"),
        _flat(view, "value.words"), *value["tables"], *_outliers(view, "value"),
        _flat(view, "value.zero"), _flat(view, "value.scale"), _wide(view.rows["value.zero"].dtype),
        *exact, np.ascontiguousarray(view.positions.numpy()), *fine, *coarse, angles.turns,
        kind, masked, np.float32(softcap or 0.0), peak, norm, sums,
    )  # fmt: skip
    tasks = [
        (b, h, s, s * share, min(tiles, (s + 1) * share), s == splits - 1)
        for b in range(batch)
        for h in range(kv_heads)
        for s in range(splits)
    ]
    _spread(tasks, arguments)
    out = _reduce(peak, norm, sums, sink_logits, queries)
    return torch.from_numpy(out).to(query.dtype)


def _reduce(
    peak: np.ndarray, norm: np.ndarray, sums: np.ndarray, sink_logits: Tensor | None, queries: int
) -> np.ndarray:
    """Join the splits: `[B, Q, Hq, Dv]`; rows that saw nothing are zero."""
    kv_heads, splits, rows = sums.shape[1:4]
    if splits == 1 and sink_logits is None:
        total = norm[:, :, 0, :, None]
        out = sums[:, :, 0] / np.where(total > 0, total, np.float32(1.0))
        return _rows_first(out, queries)
    highest = peak.max(2, keepdims=True)
    weight = np.where(peak > NOTHING / 2, np.exp(peak - highest), 0.0)
    total = (norm * weight).sum(2)
    out = (sums * weight[..., None]).sum(2)
    if sink_logits is not None:
        extra = sink_logits.detach().float().numpy().reshape(1, kv_heads, -1, 1).repeat(queries, 3)
        extra = extra.reshape(1, kv_heads, rows)
        base = np.maximum(highest[:, :, 0], extra)
        factor = np.exp(highest[:, :, 0] - base)
        total, out = total * factor + np.exp(extra - base), out * factor[..., None]
    out = out / np.where(total > 0, total, 1.0)[..., None]
    return _rows_first(out, queries)


def _rows_first(out: np.ndarray, queries: int) -> np.ndarray:
    """`[B, H, G * Q, Dv]` to `[B, Q, H * G, Dv]`."""
    batch, kv_heads, rows, value_dim = out.shape
    if queries > 1:
        out = out.reshape(batch, kv_heads, rows // queries, queries, value_dim).transpose(0, 3, 1, 2, 4)
    return np.ascontiguousarray(out.reshape(batch, queries, -1, value_dim), dtype=np.float32)


@lru_cache(maxsize=1)
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="kvcalib")


def _spread(tasks: list[tuple[int, int, int, int, int, bool]], arguments: tuple[Any, ...]) -> None:
    """Run the tasks on torch's number of threads, this one among them."""
    threads = min(torch.get_num_threads(), len(tasks))
    if threads == 1:
        _work(tasks, arguments)
        return
    parts = [tasks[i::threads] for i in range(threads)]
    waiting: list[Future[None]] = [_pool(threads - 1).submit(_work, part, arguments) for part in parts[1:]]
    _work(parts[0], arguments)
    for future in waiting:
        future.result()


def _work(tasks: list[tuple[int, int, int, int, int, bool]], arguments: tuple[Any, ...]) -> None:
    for task in tasks:
        _attend(*task, *arguments)


def _plan(quantizer: Quantizer, angles: Angles | None) -> dict[str, Any]:
    """Tables of one quantizer, channels in pair order for keys: made once."""
    kept = _PLANS.get(quantizer)
    if kept is not None and kept[0] is angles:
        return kept[1]
    layout = quantizer.layout
    heads, dim = layout.widths.shape
    channel = torch.arange(dim) if angles is None else torch.stack([angles.first, angles.second], 1).flatten()
    word, shift, mask, position = (t.reshape(-1, heads, dim) for t in layout.tables(torch.device("cpu")))
    planes = word.shape[0]
    fields = np.zeros((4, heads, dim, MAX_PLANES), np.uint32)
    for row, table in enumerate((word, shift, mask, position)):
        fields[row, :, :, :planes] = table[:, :, channel].permute(1, 2, 0).numpy().astype(np.uint32)
    count = (fields[2] > 0).sum(-1).astype(np.int32)
    used = [np.unique(fields[0, h][fields[2, h] > 0]) for h in range(heads)]
    words = np.zeros((heads, max(1, *(len(u) for u in used))), np.int64)
    for h, mine in enumerate(used):
        words[h, : len(mine)] = mine
        fields[0, h] = np.searchsorted(mine, fields[0, h]).clip(0, max(0, len(mine) - 1))
    amount = np.array([len(u) for u in used], np.int64)
    levels = quantizer.codebook.centroids[:, channel].float()
    centroids = torch.nn.functional.pad(levels, (0, max(0, LANES - levels.shape[-1]))).contiguous().numpy()
    narrow = (layout.widths[:, channel] <= 4).numpy()
    # Where an outlier goes: a row of the tile, or the spare row `dim` if it is another head's.
    row_of = torch.full((heads, heads if quantizer.groups == 1 else 1, dim), dim, dtype=torch.int64)
    for h in range(heads):
        row_of[h, h if quantizer.groups == 1 else 0, channel] = torch.arange(dim)
    scale = np.ones(dim, np.float32) if angles is None else angles.scale.repeat_interleave(2).numpy()
    plan = {
        "channel": channel,
        "scale": scale,
        "tables": (words, amount, fields, count, narrow, centroids, row_of.flatten(1).numpy(), quantizer.groups),
    }
    _PLANS[quantizer] = (angles, plan)
    return plan


_TURNS: WeakKeyDictionary[Angles, tuple[Any, Any]] = WeakKeyDictionary()


def _tables(angles: Angles, highest: int) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """Cosines and sines of 0..1023 and of multiples of 1024 up to `highest`, `[n, P]` float32 each."""
    fine, coarse = _TURNS.get(angles, (None, None))
    if fine is None:
        fine = tuple(x.numpy() for x in angles.at(torch.arange(1024)))
        coarse = (np.zeros((0, 1), np.float32),) * 2
    if len(coarse[0]) <= highest >> 10:
        room = 2 * ((highest >> 10) + 1)
        coarse = tuple(x.numpy() for x in angles.at(torch.arange(room) * 1024))
    _TURNS[angles] = (fine, coarse)
    return fine, coarse


def _flat(view: PackedView, name: str) -> Flat:
    """The memory under one of the view's rows."""
    if view.flat is not None:
        return view.flat[name]
    rows = view.rows[name].contiguous()
    return flat_memory(rows), rows.stride(0), rows.stride(1), 0


def _outliers(view: PackedView, role: str) -> tuple[Any, ...]:
    quantizer = view.key if role == "key" else view.value
    if not quantizer.outliers:
        return 0, (np.zeros(0, np.int16), 0, 0, 0), (np.zeros(0, np.uint16), 0, 0, 0), _wide(torch.float16)
    index, value = f"{role}.outlier_index", f"{role}.outlier_value"
    return quantizer.outliers, _flat(view, index), _flat(view, value), _wide(view.rows[value].dtype)


@lru_cache
def _wide(dtype: torch.dtype) -> np.ndarray:
    """Every number of a two-byte type as float32, by its bits."""
    return torch.arange(65536).to(torch.uint16).view(dtype).float().numpy()


def _mask(mask: Tensor | None) -> tuple[int, np.ndarray]:
    """0 for causal, 1 with a mask to add, and the mask `[B or 1, Q, T]`."""
    if mask is None:
        return 0, np.zeros((1, 1, 1), np.float32)
    if mask.dtype == torch.bool:
        added = torch.zeros(mask.shape, dtype=torch.float32).masked_fill_(~mask, float(NOTHING))
    else:
        added = mask.float().clamp(min=float(NOTHING))
    return 1, added[:, 0].contiguous().numpy()


def _exact(view: PackedView, kv_heads: int, head_dim: int, value_dim: int, channel: Tensor) -> tuple[Any, ...]:
    """Sinks `[B, s, H, D]` with their slots, and the recent window `[B, w, H, D]`, in float32 and the plan's order."""
    found: list[Any] = []
    for key, value in ((view.sink_key, view.sink_value), (view.recent_key, view.recent_value)):
        if key is None or value is None or not key.shape[1]:
            found += [np.zeros((1, 0, kv_heads, dim), np.float32) for dim in (head_dim, value_dim)]
        else:
            found += [key.float()[..., channel].contiguous().numpy(), value.float().contiguous().numpy()]
    slot = torch.zeros(1, 0, dtype=torch.int32) if view.sink_slot is None else view.sink_slot
    return (*found, slot.contiguous().numpy())


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


@intrinsic
def _pick(_: Any, table: Any, codes: Any, out: Any) -> Any:
    """`out[0:64] = table[codes[0:64]]` for codes below 16: one in-register permutation per 16 where the CPU has one.

    Written as a permutation in LLVM's terms; a loop over `table[code]` becomes one load per element.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, index, target = (
            context.make_array(kind)(context, builder, argument).data
            for kind, argument in zip(signature.args, arguments, strict=True)
        )
        floats = ir.VectorType(ir.FloatType(), LANES)
        numbers = ir.VectorType(ir.IntType(32), LANES)

        def at(pointer: Any, start: int, kind: Any) -> Any:
            moved = builder.gep(pointer, [ir.Constant(ir.IntType(64), start)])
            return builder.bitcast(moved, kind.as_pointer())

        levels = builder.load(at(source, 0, floats))
        levels.align = 4
        for start in range(0, TILE, LANES):
            code = builder.load(at(index, start, numbers))
            code.align = 4
            code = builder.and_(code, ir.Constant(numbers, [LANES - 1] * LANES))
            found = ir.Constant(floats, ir.Undefined)
            for lane in range(LANES):
                place = ir.Constant(ir.IntType(32), lane)
                level = builder.extract_element(levels, builder.extract_element(code, place))
                found = builder.insert_element(found, level, place)
            builder.store(found, at(target, start, floats)).align = 4
        return context.get_dummy_value()

    return types.void(table, codes, out), generate


@numba.njit(fastmath=FLAGS, nogil=True, cache=True)
def _look_up(
    head: Any, batch: Any, start: Any, n: Any, flat: Any, tables: Any, turned: Any, codes: Any, tile: Any
) -> None:
    """Decode tokens `start..start + n` of one head into `tile [D, 64]`; `turned [words, 64]`, `codes [64]`: scratch."""
    words, row_stride, token_stride, origin = flat
    used, amount, fields, count, narrow, centroids = tables
    first = origin + batch * row_stride + start * token_stride
    for t in range(n):
        for w in range(amount[head]):
            turned[w, t] = words[first + t * token_stride + used[head, w]]
    for c in range(tile.shape[0]):
        planes = count[head, c]
        for t in range(TILE):
            codes[t] = np.uint32(0)
        for plane in range(planes):
            row, shift = turned[fields[0, head, c, plane]], fields[1, head, c, plane]
            mask, place = fields[2, head, c, plane], fields[3, head, c, plane]
            for t in range(TILE):
                codes[t] |= ((row[t] >> shift) & mask) << place
        out, levels = tile[c], centroids[head, c]
        if narrow[head, c]:
            _pick(levels, codes, out)  # type: ignore[call-arg]
        else:
            for t in range(TILE):
                out[t] = levels[codes[t]]


@numba.njit(fastmath=FLAGS, nogil=True, cache=True)
def _turn_query(query: Any, back: Any, position: Any, fine: Any, fine_sin: Any, coarse: Any, coarse_sin: Any) -> None:
    """`back = R(-position) query`, both `[M, D]` in pair order."""
    a, b = position >> 10, position & 1023
    for p in range(fine.shape[1]):
        cos = fine[b, p] * coarse[a, p] - fine_sin[b, p] * coarse_sin[a, p]
        sin = fine_sin[b, p] * coarse[a, p] + fine[b, p] * coarse_sin[a, p]
        for m in range(query.shape[0]):
            x, y = query[m, 2 * p], query[m, 2 * p + 1]
            back[m, 2 * p] = x * cos + y * sin
            back[m, 2 * p + 1] = y * cos - x * sin


@numba.njit(fastmath=FLAGS, nogil=True, cache=True)
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


@numba.njit(fastmath=FLAGS, nogil=True, cache=True)
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


@numba.njit(fastmath=FLAGS, nogil=True, cache=True)
def _fold(scores: Any, n: Any, zero: Any, scale: Any, tile: Any, peak: Any, norm: Any, sums: Any) -> None:
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
    weighted = np.empty(TILE, np.float32)
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


@numba.njit(fastmath=FLAGS, nogil=True, cache=True)
def _attend(
    batch: Any, head: Any, split: Any, first_tile: Any, last_tile: Any, last: Any,
    queries: Any, count: Any, total: Any, length: Any,
    key_words: Any, k_used: Any, k_amount: Any, k_fields: Any, k_count: Any, k_narrow: Any, k_centroids: Any,
    k_row: Any, k_groups: Any, k_outliers: Any, k_index: Any, k_value: Any, k_wide: Any,
    value_words: Any, v_used: Any, v_amount: Any, v_fields: Any, v_count: Any, v_narrow: Any, v_centroids: Any,
    v_row: Any, v_groups: Any, v_outliers: Any, v_index: Any, v_value: Any, v_wide: Any,
    zeros: Any, scales: Any, wide: Any,
    sink_key: Any, sink_value: Any, recent_key: Any, recent_value: Any, sink_slot: Any,
    positions: Any, fine: Any, fine_sin: Any, coarse: Any, coarse_sin: Any, turns: Any,
    masked: Any, mask: Any, softcap: Any, peak: Any, norm: Any, sums: Any,
) -> None:  # fmt: skip
    """Tiles `first_tile..last_tile` of one row and kv head, and in the last split the recent window too."""
    query = queries[batch, head]
    rows, head_dim = query.shape
    value_dim, pairs = sums.shape[4], head_dim // 2
    position = positions[min(batch, positions.shape[0] - 1)]
    bias = mask[min(batch, mask.shape[0] - 1)]
    # One row more than channels: where outliers of other heads go.
    flat, values = np.zeros((head_dim + 1) * TILE, np.float32), np.zeros((value_dim + 1, TILE), np.float32)
    keys = flat.reshape(head_dim + 1, TILE)
    turned = np.zeros((max(k_used.shape[1], v_used.shape[1]), TILE), np.uint32)
    codes = np.zeros(TILE, np.uint32)
    scores, back = np.empty((rows, TILE), np.float32), np.empty((rows, head_dim), np.float32)
    zero, scale = np.zeros(TILE, np.float32), np.zeros(TILE, np.float32)
    near, own = np.empty(head_dim * TILE, np.float32), np.empty(head_dim * TILE, np.float32)
    if turns:
        for p in range(pairs):
            for t in range(TILE):
                near[2 * p * TILE + t], near[(2 * p + 1) * TILE + t] = fine[t, p], fine_sin[t, p]
    k_tables = (k_used, k_amount, k_fields, k_count, k_narrow, k_centroids)
    v_tables = (v_used, v_amount, v_fields, v_count, v_narrow, v_centroids)
    recent = recent_key.shape[1] if last else 0
    for number in range(first_tile, last_tile + (recent + TILE - 1) // TILE):
        if number < last_tile:
            start = number * TILE
            n = min(TILE, length - start)
            _look_up(head, batch, start, n, key_words, k_tables, turned, codes, keys[:head_dim])
            if k_outliers:
                group = head if k_groups > 1 else 0
                place = k_index[3] + batch * k_index[1] + start * k_index[2] + group * k_outliers
                where, exact, row_of = k_index[0][place:], k_value[0][place:], k_row[head]
                for t in range(n):
                    for i in range(k_outliers):
                        keys[row_of[where[t * k_index[2] + i]], t] = k_wide[exact[t * k_index[2] + i]]
            for s in range(sink_slot.shape[1]):
                t = sink_slot[batch, s] - start
                if 0 <= t < n:
                    for c in range(head_dim):
                        keys[c, t] = sink_key[batch, s, head, c]
        else:
            start = length + (number - last_tile) * TILE
            n = min(TILE, length + recent - start)
            for t in range(n):
                for c in range(head_dim):
                    keys[c, t] = recent_key[batch, start - length + t, head, c]
        if turns:
            follow = position[start] >= 0
            for t in range(1, n):
                follow &= position[start + t] == position[start] + t
            if follow:
                _turn_query(query, back, position[start], fine, fine_sin, coarse, coarse_sin)
                _turn_keys(flat, near, head_dim)
                _scores(back, keys[:head_dim], scores)
            else:
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
            if softcap > 0:
                for t in range(n):
                    row[t] = softcap * np.tanh(row[t] / softcap)
            if masked:
                for t in range(n):
                    row[t] = max(row[t] + bias[q, start + t], NOTHING)
            else:
                for t in range(max(0, total - count + q + 1 - start), n):
                    row[t] = NOTHING
        if number < last_tile:
            _look_up(head, batch, start, n, value_words, v_tables, turned, codes, values[:value_dim])
            group = head if v_groups > 1 else 0
            for t in range(n):
                zero[t] = wide[zeros[0][zeros[3] + batch * zeros[1] + (start + t) * zeros[2] + group]]
                scale[t] = wide[scales[0][scales[3] + batch * scales[1] + (start + t) * scales[2] + group]]
        else:
            for t in range(n):
                zero[t], scale[t] = np.float32(0.0), np.float32(1.0)
                for c in range(value_dim):
                    values[c, t] = recent_value[batch, start - length + t, head, c]
        if number < last_tile:
            if v_outliers:
                group = head if v_groups > 1 else 0
                place = v_index[3] + batch * v_index[1] + start * v_index[2] + group * v_outliers
                where, exact, row_of = v_index[0][place:], v_value[0][place:], v_row[head]
                for t in range(n):
                    if scale[t] == 0:
                        for c in range(value_dim):
                            values[c, t] = zero[t]
                        zero[t], scale[t] = np.float32(0.0), np.float32(1.0)
                    inverse = np.float32(1.0) / scale[t]
                    for i in range(v_outliers):
                        # What, scaled and shifted like the others, gives the exact value.
                        shifted = (v_wide[exact[t * v_index[2] + i]] - zero[t]) * inverse
                        values[row_of[where[t * v_index[2] + i]], t] = shifted
            for s in range(sink_slot.shape[1]):
                t = sink_slot[batch, s] - start
                if 0 <= t < n:
                    zero[t], scale[t] = np.float32(0.0), np.float32(1.0)
                    for c in range(value_dim):
                        values[c, t] = sink_value[batch, s, head, c]
        _fold(
            scores,
            n,
            zero,
            scale,
            values[:value_dim],
            peak[batch, head, split],
            norm[batch, head, split],
            sums[batch, head, split],
        )
