"""Decode attention over packed storage on a CPU, in one pass; the loops are in `native_loops.py`.

The reference path (`attention.py`) unpacks a chunk with a dozen tensor operations, each a pass over memory; for one new
token that costs several times the attention itself. Here a layer's step is one call of compiled code. What never
changes of a quantizer is laid out once; a step adds addresses, so that little of it is spent in Python.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from kvcalib.model.angles import Angles
from kvcalib.quant.packing import MAX_PLANES
from kvcalib.quant.quantizer import Quantizer
from kvcalib.runtime import team
from kvcalib.runtime.kernels.view import PackedView
from kvcalib.runtime.native_loops import DYNAMIC, STORED, loops
from kvcalib.runtime.native_tile import LANES, NOTHING, TILE
from kvcalib.runtime.storage import Slices

MOST_ROWS = 32
"""Query rows per kv head up to which this beats the chunked path, whose matrix products pay off for many."""
ALONE = 4
"""Tiles, all kv heads counted, up to which a second thread is not worth its call."""
LEAST = 32
"""Multiples of 1024 whose cosines are made at once: positions up to 32768."""


class _Plan(NamedTuple):
    """What never changes of one quantizer.

    Attributes:
        numbers: those of `native_loops.TABLES`.
        channel, scale: addresses of the channels in pair order and of their attention scaling.
        arrays: what lies at the addresses.
    """

    angles: Angles | None
    numbers: list[int]
    channel: int
    scale: int
    arrays: tuple[Tensor, ...]


class _Turns(NamedTuple):
    """Cosines and sines, float32 `[n, P]`, of 0..1023 and of multiples of 1024, and their addresses."""

    fine: tuple[Tensor, Tensor]
    coarse: tuple[Tensor, Tensor]
    numbers: tuple[int, ...]


_PLANS: WeakKeyDictionary[Quantizer, _Plan] = WeakKeyDictionary()
_TURNS: WeakKeyDictionary[Angles, _Turns] = WeakKeyDictionary()
_NAMES = {"words": "words", "index": "outlier_index", "exact": "outlier_value"}
_FAR, _FINE = DYNAMIC.index("far"), DYNAMIC.index("fine")


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
    rotate: bool = False,
    drawn: Tensor | None = None,
    decay: float = 1.0,
) -> Tensor:
    """Softmax attention of the last Q tokens over a packed layer; see `attention.chunked_attention`.

    Args:
        query: `[B, Hq, Q, D]`, rotated unless `rotate`.
        angles: the layer's rotation.
        mask: None for plain causal, bool `[B or 1, 1, Q, T + w]` (True attends), or float to add.
        rotate: turn the query too, at the last Q positions of the view.
        drawn: overwritten with the attention that each slot drew, float32 `[B, H, T + w]`, contiguous: the sum, over
            the kv head's query heads and the Q queries q, of `decay ** (Q - 1 - q)` times the weight in the softmax,
            sink logits included; 0 where the mask hides a slot.

    Returns:
        `[B, Q, Hq, Dv]` in the dtype of `query`.

    Raises:
        ValueError: `drawn` has another shape or type, or is not contiguous.
    """
    batch, heads, queries, head_dim = query.shape
    kv_heads, value_dim = view.value.layout.widths.shape
    length, rows, threads = view.length, heads // kv_heads * queries, torch.get_num_threads()
    total = view.total
    tiles, pairs = -(-length // TILE), batch * kv_heads
    splits = 1 if pairs >= threads else max(1, min(threads * 2 // pairs, -(-total // (4 * TILE))))
    key, value = _plan(view.key, angles), _plan(view.value, None)
    turns = _turns(angles, 0)
    # Everything whose address goes along must live until the end of the call.
    raw = query.detach().float().contiguous()
    out = torch.empty(batch, queries, heads, value_dim)
    each = pairs * splits * rows
    scratch = torch.empty(each * (2 + value_dim))
    raw_scores = None if drawn is None else _scores_for(drawn, (batch, kv_heads, total), rows)
    added = None if mask is None else _added(mask)
    logits = None if sink_logits is None else sink_logits.detach().float().contiguous()
    sinks = _floats(view.sink_key, view.sink_value)
    slot = None if view.sink_slot is None else view.sink_slot.contiguous()
    recent = _floats(view.recent_key, view.recent_value)
    peak = scratch.data_ptr()
    numbers = [
        0, 0, pairs * splits, splits, -(-tiles // splits), tiles, batch, kv_heads, rows, queries, head_dim, value_dim,
        total, length, raw.data_ptr(), int(rotate and angles.turns), out.data_ptr(), peak, peak + 4 * each,
        peak + 8 * each, *_steps(view.positions),
        *((0, 0, 0, 0) if added is None else (1, added.data_ptr(), added.shape[0], added.shape[2])),
        int(angles.turns), key.channel, key.scale, *turns.numbers, _wide(_exact_dtype(view)).data_ptr(),
        *((0, 0, 0, 0) if not sinks or slot is None else (sinks[0].shape[1], *(x.data_ptr() for x in (*sinks, slot)))),
        *((0, 0, 0) if not recent else (recent[0].shape[1], *(x.data_ptr() for x in recent))),
        0 if logits is None else logits.data_ptr(),
        *((0, 0) if drawn is None or raw_scores is None else (drawn.data_ptr(), raw_scores.data_ptr())),
    ]  # fmt: skip
    for role, quantizer in (("key", view.key), ("value", view.value)):
        for name in STORED if quantizer.outliers else STORED[:1]:
            numbers += place(view.rows, f"{role}.{_NAMES[name]}")
        if not quantizer.outliers:
            numbers += (0, 0, 0, 0, 0, 0)
    for name in ("value.zero", "value.scale"):
        numbers += place(view.rows, name) if view.value.relative else (0, 0, 0)
    numbers += (*_bits(scaling, softcap or 0.0, decay), *key.numbers, *value.numbers)
    call = array("q", numbers)
    data = call.buffer_info()[0]
    work, join = loops()
    together = 1 if tiles * pairs <= ALONE else min(threads, pairs * splits)
    team.run(work, data, together)
    if call[_FAR]:
        # A position beyond the tables, which nobody looked for: longer tables, and from the start.
        turns = _turns(angles, int(view.positions[..., :total].max()))
        call[0] = call[_FAR] = 0
        call[_FINE : _FINE + len(turns.numbers)] = array("q", turns.numbers)
        team.run(work, data, together)
    if splits > 1:
        team.run(join, data, 1)
    return out.to(query.dtype)


def _steps(positions: Tensor) -> tuple[int, int, int, int]:
    """Address of positions `[B or 1, T]` or `[B or 1, H, T]`, and the steps between batch rows, heads and slots."""
    row = positions.stride(0) if positions.shape[0] > 1 else 0
    return positions.data_ptr(), row, positions.stride(1) if positions.dim() == 3 else 0, positions.stride(-1)


def _scores_for(drawn: Tensor, shape: tuple[int, int, int], rows: int) -> Tensor:
    """Room for the raw scores of every query row of a kv head."""
    if drawn.shape != shape or drawn.dtype != torch.float32 or not drawn.is_contiguous():
        raise ValueError(
            f"drawn is {drawn.dtype} {tuple(drawn.shape)} with steps {drawn.stride()}, expected contiguous float32 "
            f"{shape}: batch, kv heads, slots"
        )
    return torch.empty(shape[0] * shape[1] * rows * shape[2])


def place(rows: Mapping[str, Tensor], name: str) -> tuple[int, int, int]:
    """Address of the first token of one of a layer's rows, and the steps, in elements, between rows and tokens."""
    if isinstance(rows, Slices):
        return rows.place(name)
    tensor = rows[name]
    return tensor.data_ptr(), tensor.stride(0), tensor.stride(1)


@lru_cache
def _bits(*numbers: float) -> tuple[int, ...]:
    """float64s as the integers that have their bits."""
    return struct.unpack(f"{len(numbers)}q", struct.pack(f"{len(numbers)}d", *numbers))


def _plan(quantizer: Quantizer, angles: Angles | None) -> _Plan:
    """The tables of one quantizer, channels in pair order for keys: made once."""
    kept = _PLANS.get(quantizer)
    if kept is None or kept.angles is not angles:
        kept = _PLANS[quantizer] = _make_plan(quantizer, angles)
    return kept


def _make_plan(quantizer: Quantizer, angles: Angles | None) -> _Plan:
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
    most = max(1, *(len(u) for u in used))
    words = np.zeros((heads, most), np.int64)
    for h, mine in enumerate(used):
        words[h, : len(mine)] = mine
        fields[0, h] = np.searchsorted(mine, fields[0, h]).clip(0, max(0, len(mine) - 1))
    levels = quantizer.codebook.centroids[:, channel].float()
    levels = torch.nn.functional.pad(levels, (0, max(0, LANES - levels.shape[-1]))).contiguous()
    # Where an outlier goes: a row of the tile, or the spare row `dim` if it is another head's.
    row_of = torch.full((heads, heads if quantizer.groups == 1 else 1, dim), dim, dtype=torch.int64)
    for h in range(heads):
        row_of[h, h if quantizer.groups == 1 else 0, channel] = torch.arange(dim)
    arrays = (
        torch.from_numpy(words), torch.tensor([len(u) for u in used]), torch.from_numpy(fields.view(np.int32)),
        torch.from_numpy(count), (layout.widths[:, channel] <= 4).to(torch.uint8).contiguous(), levels,
        row_of.flatten(1).contiguous(), channel.contiguous(),
        torch.ones(dim) if angles is None else angles.scale.repeat_interleave(2).contiguous(),
    )  # fmt: skip
    at = [x.data_ptr() for x in arrays]
    short = int(quantizer.index_dtype == torch.uint8)
    numbers = [at[0], most, *at[1:6], levels.shape[-1], at[6], arrays[6].shape[1], quantizer.groups,
               quantizer.outliers, short]  # fmt: skip
    return _Plan(angles, numbers, at[7], at[8], arrays)


def _turns(angles: Angles, highest: int) -> _Turns:
    """The tables of a rotation, long enough for position `highest`."""
    kept = _TURNS.get(angles)
    if kept is None or len(kept.coarse[0]) <= highest >> 10:
        fine = angles.at(torch.arange(1024)) if kept is None else kept.fine
        room = max(LEAST, 2 * ((highest >> 10) + 1))
        coarse = angles.at(torch.arange(room) * 1024)
        kept = _TURNS[angles] = _Turns(fine, coarse, (*(x.data_ptr() for x in (*fine, *coarse)), room))
    return kept


@lru_cache
def _wide(dtype: torch.dtype) -> Tensor:
    """Every number of a two-byte type as float32, by its bits."""
    return torch.arange(65536).to(torch.uint16).view(dtype).float()


def _exact_dtype(view: PackedView) -> torch.dtype:
    """The type of zeros, scales and outliers; any where there are none."""
    if view.value.relative:
        name = "value.zero"
    elif view.value.outliers or view.key.outliers:
        name = f"{'value' if view.value.outliers else 'key'}.outlier_value"
    else:
        return torch.float16
    return view.rows.dtype(name) if isinstance(view.rows, Slices) else view.rows[name].dtype


def _added(mask: Tensor) -> Tensor:
    """A mask to add, `[B or 1, Q, T]`."""
    if mask.dtype == torch.bool:
        added = torch.zeros(mask.shape).masked_fill_(~mask, float(NOTHING))
    else:
        added = mask.float().clamp(min=float(NOTHING))
    return added[:, 0].contiguous()


def _floats(key: Tensor | None, value: Tensor | None) -> tuple[Tensor, ...]:
    """Exact keys and values as dense float32; nothing if there are none."""
    if key is None or value is None or not key.shape[1]:
        return ()
    return key.float().contiguous(), value.float().contiguous()
