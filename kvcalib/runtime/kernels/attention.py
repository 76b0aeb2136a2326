"""Attention over a packed view: shapes, the plan of a launch, and the launch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
import triton
from torch import Tensor

from kvcalib.model.angles import Angles
from kvcalib.quant.quantizer import Quantizer
from kvcalib.runtime.kernels.decode import ABSENT, COMPUTED, FOLDED, attention_kernel
from kvcalib.runtime.kernels.drawn import Drawing, drawn_launch, scratch
from kvcalib.runtime.kernels.launch import Launch, strides
from kvcalib.runtime.kernels.reduce import reduce_kernel
from kvcalib.runtime.kernels.tables import SlotTables, TurnTables, slot_tables, turn_tables
from kvcalib.runtime.kernels.view import PackedView

WAVES = 4
MIN_TILES = 4
REDUCE_AT_ONCE = 16
# Bytes of raw scores that are kept at once where the attention drawn is asked for (of one query at least).
SCORES_AT_ONCE = 1 << 28


@dataclass(frozen=True)
class Blocks:
    """Tile sizes of a launch: query rows, packed tokens, exact tokens; warps."""

    rows: int
    tokens: int
    exact: int
    warps: int


def blocks_for(rows: int, dim: int, dtype: torch.dtype) -> Blocks:
    """Tile sizes for `rows` query rows of one kv head and `dim` channels; see docs/kernels.md, "Tiles"."""
    if dtype == torch.float32:
        return Blocks(16, 32, 16, 4)
    if rows <= 16:
        return Blocks(16, 64, 16, 2)
    if rows <= 32:
        return Blocks(32, 64, 16, 4)
    return Blocks(64, 64, 16, 4) if dim <= 128 else Blocks(64, 32, 16, 8)


def packed_attention(
    query: Tensor,
    view: PackedView,
    angles: Angles | None,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    splits: int | None = None,
    drawn: Tensor | None = None,
    decay: float = 1.0,
) -> Tensor:
    """Softmax attention of `query` over the T + w slots of `view`.

    Args:
        query: `[B, Hq, Q, D]`, rotated; the last Q of the slots. float32, float16 or bfloat16: also the dots' type.
        view: packed rows, sinks, recent window and positions of one layer. Positions per head,
            `[B or 1, H, >= T + w]` with any strides, may be -1: that slot is unused, nothing of it is read.
        angles: how keys turn; None where they do not (NoPE).
        mask: None for causal by slot, bool `[B or 1, 1, Q, T + w]` (True attends), or a float to add.
        scaling: factor on the scores.
        softcap: `c * tanh(s / c)` on the scores.
        sink_logits: `[Hq]`, a logit per head that only enlarges the denominator.
        splits: stretches of the packed tokens that run side by side; None chooses by the number of processors.
        drawn: `[B, H, T + w]` float32, contiguous: overwritten with the attention that each token draws,
            `sum_q decay ** (Q - 1 - q) * weight_q` over the query heads that share the kv head and the Q queries;
            0 where a mask hides the token. Same bits on every call.
        decay: factor, 0 to 1, per query that came later.

    Returns:
        `[B, Q, Hq, Dv]` in the dtype of `query`. A row that sees nothing is 0. Same bits on every call.

    Raises:
        ValueError: `drawn` is not of that shape and type, or `decay` is outside 0 to 1.
    """
    if drawn is None:
        return _launched(query, view, angles, mask, scaling, softcap, sink_logits, splits, None)
    batch, query_heads, queries, _ = query.shape
    Drawing(drawn, decay).check(batch, view.value.layout.widths.shape[0], view.total)
    block = max(1, SCORES_AT_ONCE // max(1, 4 * batch * query_heads * view.total))
    outs = []
    # The last queries come first: they see every token, so what they draw overwrites all of `drawn`.
    for last in range(queries, 0, -block):
        first = max(0, last - block)
        later = queries - last
        part = None if mask is None else mask[:, :, first:last]
        seen = view if mask is not None else _without_last(view, later)
        drawing = Drawing(drawn, decay, later, add=later > 0)
        outs.append(
            _launched(query[:, :, first:last], seen, angles, part, scaling, softcap, sink_logits, splits, drawing)
        )
    return outs[0] if len(outs) == 1 else torch.cat(outs[::-1], dim=1)


def _launched(
    query: Tensor, view: PackedView, angles: Angles | None, mask: Tensor | None, scaling: float, softcap: float | None,
    sink_logits: Tensor | None, splits: int | None, drawing: Drawing | None,
) -> Tensor:  # fmt: skip
    out, launches = attention_launches(
        query, view, angles, mask, scaling, softcap, sink_logits, splits, drawing=drawing
    )
    for launch in launches:
        launch.run()
    return out


def _without_last(view: PackedView, count: int) -> PackedView:
    """`view` without its last `count` slots."""
    recent = view.total - view.length - count
    if count == 0 or view.recent_key is None or view.recent_value is None:
        return replace(view, length=view.length - count)
    if recent <= 0:
        return replace(view, length=view.length + recent, recent_key=None, recent_value=None)
    return replace(view, recent_key=view.recent_key[:, :recent], recent_value=view.recent_value[:, :recent])


def attention_launches(
    query: Tensor,
    view: PackedView,
    angles: Angles | None,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    splits: int | None = None,
    blocks: Blocks | None = None,
    drawing: Drawing | None = None,
) -> tuple[Tensor, list[Launch]]:
    """The output's tensor and the launches that fill it; arguments as `packed_attention`.

    blocks: the tiles, instead of what `blocks_for` says; drawing: where the attention drawn goes.
    """
    batch, query_heads, queries, dim = query.shape
    heads, value_dim = view.value.layout.widths.shape
    group = query_heads // heads
    device = query.device
    k_tables = slot_tables(view.key, angles, device)
    v_tables = slot_tables(view.value, None, device)
    turns = turn_tables(angles, device) if angles is not None and k_tables.pair is not None else None
    query = query if query.stride(-1) == 1 else query.contiguous()

    blocks = blocks or blocks_for(group * queries, max(dim, value_dim), query.dtype)
    tiles = triton.cdiv(group * queries, blocks.rows)
    programs = batch * heads * tiles
    packed_tiles = triton.cdiv(view.length, blocks.tokens)
    if splits is None:
        splits = min(triton.cdiv(WAVES * processors(device), max(programs, 1)), packed_tiles // MIN_TILES)
    split_tiles = max(1, triton.cdiv(packed_tiles, max(splits, 1)))
    splits = max(1, triton.cdiv(packed_tiles, split_tiles))
    exact = view.sink_key is not None or view.recent_key is not None
    direct = splits == 1
    stretches = splits + (exact and not direct)

    out = query.new_empty(batch, queries, query_heads, value_dim)
    partial, peaks = out, out
    if not direct:
        partial = torch.empty(programs, stretches, blocks.rows, value_dim, dtype=torch.float32, device=device)
        peaks = torch.empty(programs, stretches, blocks.rows, 2, dtype=torch.float32, device=device)
    if mask is not None:
        mask = mask.expand(batch, 1, queries, view.total)
        mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    logits = sink_logits if sink_logits is not None else out
    raw, norms = scratch(drawing, out, group * queries, view.total)
    args = {
        "query": query,
        **strides("q", query, ("sb", 0), ("sh", 1), ("sq", 2)),
        "out": out, "partial": partial, "peaks": peaks,
        **_row_args(view, "key", "k"), **_row_args(view, "value", "v"),
        **_group_args(view, "zero", query), **_group_args(view, "scale", query),
        **_exact_args(view, "sink", "s", query), **_exact_args(view, "recent", "r", query),
        "sink_slot": view.sink_slot if view.sink_slot is not None else view.positions,
        **strides("ss", view.sink_slot, ("sb", 0)),
        **_position_args(view),
        "mask": mask if mask is not None else view.positions,
        **strides("mask", mask, ("sb", 0), ("sq", 2), ("sn", 3)),
        "sink_logits": logits,
        **_table_args(k_tables, v_tables, turns, query.dtype),
        "scaling": float(scaling), "softcap": float(softcap or 0.0),
        "packed": view.length, "recent": view.total - view.length,
        "sinks": 0 if view.sink_slot is None else view.sink_slot.shape[1],
        "queries": queries, "total_slots": view.total, "split_tiles": split_tiles,
        "raw": raw, "norms": norms,
    }  # fmt: skip
    constants = {
        "HEADS": heads, "GROUP": group, "DIM": dim, "VALUE_DIM": value_dim,
        "M": blocks.rows, "N": blocks.tokens, "EXACT_N": blocks.exact,
        **_constants(view.key, "K", k_tables, query.dtype), **_constants(view.value, "V", v_tables, query.dtype),
        "V_BY_HEAD": view.value.scope == "head" or _scales(view) > 1,
        # The groups of values are unrolled; branches on a width read at run time keep each group's loads in its own
        # block, without which Triton 3.6 spills about 100 bytes a thread.
        "V_WIDTH": -1,
        "ROTATE": turns is not None, "HALF": query.dtype == torch.bfloat16,
        "SCALES": _scales_in(view.value, query.dtype),
        "MASK": 0 if mask is None else 1 if mask.dtype == torch.uint8 else 2, "SOFTCAP": softcap is not None,
        "SINKS": view.sink_slot is not None, "RECENT": view.recent_key is not None,
        "SINK_LOGITS": sink_logits is not None, "DIRECT": direct, "SINGLE": queries == 1,
        "WIDEN": triton.knobs.runtime.interpret, "PER_HEAD": view.positions.dim() == 3, "DRAWN": drawing is not None,
    }  # fmt: skip
    launches = [Launch(attention_kernel, (programs, stretches), args, constants, blocks.warps)]
    if not direct:
        reduce_args = {
            "partial": partial, "peaks": peaks, "out": out, "v_channels": v_tables.channel, "sink_logits": logits,
            "queries": queries, "splits": stretches, "norms": norms,
        }  # fmt: skip
        reduce_constants = {
            "HEADS": heads, "GROUP": group, "VALUE_DIM": value_dim, "PADDED": triton.next_power_of_2(value_dim),
            "M": blocks.rows, "AT_ONCE": REDUCE_AT_ONCE, "SINK_LOGITS": sink_logits is not None,
            "DRAWN": drawing is not None,
        }  # fmt: skip
        launches.append(Launch(reduce_kernel, (batch * query_heads * queries,), reduce_args, reduce_constants, 4))
    if drawing is not None:
        launches.append(drawn_launch(drawing, raw, norms, group, causal=mask is None))
    return out, launches


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; a few for Triton's interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _position_args(view: PackedView) -> dict[str, Tensor | int]:
    positions = view.positions
    return {
        "positions": positions, "pos_sb": positions.stride(0) if positions.shape[0] > 1 else 0,
        "pos_sh": positions.stride(1) if positions.dim() == 3 else 0, "pos_sn": positions.stride(-1),
    }  # fmt: skip


def _row_args(view: PackedView, name: str, short: str) -> dict[str, Tensor | int]:
    # A view without packed tokens may have no rows at all; nothing reads what stands in for them.
    words = view.rows.get(f"{name}.words", view.positions[..., None])
    index = view.rows.get(f"{name}.outlier_index")
    exact = view.rows.get(f"{name}.outlier_value")
    return {
        f"{short}_words": words, **strides(f"{short}w", words, ("sb", 0), ("st", 1)),
        f"{short}_index": words if index is None else index,
        **strides(f"{short}i", index, ("sb", 0), ("st", 1), ("sg", 2)),
        f"{short}_exact": words if exact is None else exact,
        **strides(f"{short}x", exact, ("sb", 0), ("st", 1), ("sg", 2)),
    }  # fmt: skip


def _group_args(view: PackedView, name: str, absent: Tensor) -> dict[str, Tensor | int]:
    tensor = view.rows.get(f"value.{name}")
    present = absent if tensor is None else tensor
    return {f"v_{name}": present, **strides(f"v{name[0]}", tensor, ("sb", 0), ("st", 1))}


def _scales_in(value: Quantizer, dtype: torch.dtype) -> int:
    """Where zero and scale of values go; see `decode.py`."""
    place = COMPUTED if dtype == torch.float16 else FOLDED
    return int((place if value.relative else ABSENT).value)


def _scales(view: PackedView) -> int:
    """Zeros and scales of one token: a cache may keep the token's one for every head, so that heads can part."""
    zero = view.rows.get("value.zero")
    return 1 if zero is None else zero.shape[2]


def _exact_args(view: PackedView, name: str, short: str, absent: Tensor) -> dict[str, Tensor | int]:
    args: dict[str, Tensor | int] = {}
    for role in ("key", "value"):
        tensor: Tensor | None = getattr(view, f"{name}_{role}")
        args[f"{name}_{role}"] = absent if tensor is None else tensor
        args.update(strides(f"{short}{role[0]}", tensor, ("sb", 0), ("st", 1), ("sh", 2)))
    return args


def _table_args(key: SlotTables, value: SlotTables, turns: TurnTables | None, dtype: torch.dtype) -> dict[str, Tensor]:
    absent = key.channel
    near = key.near_half if dtype == torch.bfloat16 else key.near
    return {
        "k_channels": key.channel, "k_fields": key.fields, "k_book": key.centroids,
        "k_slots": key.slot, "v_slots": value.slot,
        "k_pair_book": absent if key.pair_book is None else key.pair_book,
        "v_channels": value.channel, "v_fields": value.fields, "v_book": value.centroids,
        "v_pair_book": absent if value.pair_book is None else value.pair_book,
        "turn": absent if turns is None else turns.turn, "near": absent if near is None else near,
        "pairs": absent if key.pair is None else key.pair,
        "pair_scale": absent if turns is None else turns.scale,
    }  # fmt: skip


def _constants(quantizer: Quantizer, short: str, tables: SlotTables, dtype: torch.dtype) -> dict[str, int | bool]:
    return {
        f"{short}_LEVELS": tables.centroids.shape[2], f"{short}_WIDTH": tables.width,
        f"{short}_PLANES": 0 if tables.grouped else tables.planes,
        f"{short}_PAIRED": tables.pair_book is not None and dtype != torch.float32,
        f"{short}_OUTLIERS": quantizer.outliers, f"{short}_BY_HEAD": quantizer.scope == "head",
    }  # fmt: skip
