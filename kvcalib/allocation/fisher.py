"""Widths by predicted loss: one exact budget over every layer, keys and values, head and channel.

The loss of a width is what `fit-nuq` recorded, half of sum F (x - x^)^2 in nats per token. A unit is what takes one
width: a layer's keys or values, a head, a group of channels, or a channel. Groups are 16 channels of a head with alike
sensitivity (for keys 8 RoPE pairs): what fused kernels read fast; they cost a few percent against free channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from kvcalib.allocation.budget import Plan, solve
from kvcalib.quant.packing import GROUP, MAX_BITS

Per = Literal["layer", "head", "channel"]


@dataclass(frozen=True)
class Table:
    """Keys or values of one layer.

    Attributes:
        loss: `[9, H, D]`, predicted loss of each width of each channel, nats per token.
        pairs: `[D / 2, 2]` channels that belong into one group together (a key's RoPE pairs), or None.
    """

    loss: Tensor
    pairs: Tensor | None


def allocate(tables: list[Table], bits: int, per: Per = "channel", group: int = GROUP) -> tuple[list[Tensor], Plan]:
    """Widths `[H, D]` uint8 of every table: least total loss with at most `bits` code bits per token.

    Args:
        bits: sum of all widths that the plan may have.
        per: what takes one width.
        group: for `per="channel"`, channels that share a width; 0 for none. Tables whose heads are not a multiple of
            it stay free.

    Raises:
        InputError: `bits` is less than 0.
    """
    mean = bits / max(1, sum(t.loss[0].numel() for t in tables))
    parts = [units(table, per, group, mean) for table in tables]
    plan = solve(np.concatenate([loss for _, loss, _ in parts]), np.concatenate([cost for _, _, cost in parts]), bits)
    widths, start = [], 0
    for table, (unit, loss, _) in zip(tables, parts, strict=True):
        chosen = plan.choice[start : start + len(loss)]
        widths.append(torch.from_numpy(chosen[unit].astype(np.uint8)).view(table.loss.shape[1:]))
        start += len(chosen)
    return widths, plan


def units(table: Table, per: Per, group: int, mean: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What takes one width: the unit of every channel `[H * D]`, and loss and bits of every width of it `[U, 9]`.

    Args:
        table: losses of one layer's keys or values.
        per, group: see `allocate`.
        mean: about the width that the budget allows, at which channels are ranked into groups.
    """
    unit = _units(table, per, group, mean)
    count = int(unit.max()) + 1
    flat = table.loss.double().flatten(1).numpy()
    loss = np.stack([np.bincount(unit, row, count) for row in flat], 1)
    return unit, loss, np.bincount(unit, minlength=count)[:, None] * np.arange(MAX_BITS + 1)


def _units(table: Table, per: Per, group: int, mean: float) -> np.ndarray:
    """The unit of every channel, `[H * D]` int64, numbered from 0."""
    _, heads, dim = table.loss.shape
    head = np.arange(heads).repeat(dim)
    if per == "layer":
        return np.zeros(heads * dim, np.int64)
    if per == "head":
        return head
    if not group or dim % group:
        return np.arange(heads * dim)
    members = torch.arange(dim)[:, None] if table.pairs is None else table.pairs.long()
    # Sensitivity: the loss at about the width that the budget allows, summed over those that go together.
    near = table.loss[min(MAX_BITS, max(1, round(mean)))].double()
    ranked = near[:, members].sum(-1).argsort(dim=1, descending=True, stable=True)
    place = torch.arange(ranked.shape[1]) // (group // members.shape[1])
    first = torch.arange(heads)[:, None] * (dim // group)
    unit = torch.empty(heads, dim, dtype=torch.int64)
    for side in range(members.shape[1]):
        unit.scatter_(1, members[:, side][ranked], place + first)
    return unit.flatten().numpy()
