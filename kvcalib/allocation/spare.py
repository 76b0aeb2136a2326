"""Spending what whole words leave: rows are words of 32 bits, and a plan that counts bits leaves some of them empty.

Greedy: first the steps that fit into words which are paid for anyway, then those that save the most per further word.
A step makes wider by one bit what takes one width: a channel, a head, a table, or the 16 channels of a head and width
(for keys 8 RoPE pairs) that gain the most, so groups stay groups.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvcalib.allocation.fisher import Per, Table
from kvcalib.quant.packing import GROUP, MAX_BITS

WORD = 32


def fill(
    tables: list[Table], widths: list[Tensor], words: int, per: Per = "channel", group: int = GROUP
) -> list[Tensor]:
    """`widths [H, D]` uint8 of every table, wider where `words` words in all rows together leave room.

    Args:
        words: what the rows of all tables may take; a row takes `ceil(sum of widths / 32)`.
        per, group: what takes one width, as in `allocation.fisher.allocate`.
    """
    rows = [width.long().numpy().copy() for width in widths]
    losses = [table.loss.double().numpy() for table in tables]
    used = [int(row.sum()) for row in rows]
    left = words - sum(map(_words, used))
    steps = [_step(*part, per, group) for part in zip(tables, losses, rows, strict=True)]
    while True:
        best: tuple[bool, float, int] | None = None
        for number, (saved, channels) in enumerate(steps):
            more = _words(used[number] + len(channels)) - _words(used[number])
            if saved > 0 and more <= left:
                # What costs no word comes first.
                best = max(best or (False, 0.0, 0), (more == 0, saved / max(1, more), number))
        if best is None:
            return [torch.from_numpy(row.astype(np.uint8)) for row in rows]
        number = best[2]
        channels = steps[number][1]
        left += _words(used[number])
        rows[number].reshape(-1)[channels] += 1
        used[number] += len(channels)
        left -= _words(used[number])
        steps[number] = _step(tables[number], losses[number], rows[number], per, group)


def _words(bits: int) -> int:
    return -(-bits // WORD)


def _step(table: Table, loss: np.ndarray, width: np.ndarray, per: Per, group: int) -> tuple[float, np.ndarray]:
    """The best step of one table: loss that it saves, and its channels among `H * D`."""
    heads, dim = width.shape
    wider = np.minimum(width + 1, MAX_BITS)
    gain = np.take_along_axis(loss, width[None], 0)[0] - np.take_along_axis(loss, wider[None], 0)[0]
    gain = np.where(width < MAX_BITS, gain, -np.inf)
    every = np.arange(heads * dim).reshape(heads, dim)
    if per == "layer":
        return float(gain.sum()), every.reshape(-1)
    if per == "head":
        head = int(gain.sum(1).argmax())
        return float(gain[head].sum()), every[head]
    if not group or dim % group:
        channel = int(gain.argmax())
        return float(gain.reshape(-1)[channel]), np.array([channel])
    members = np.arange(dim)[:, None] if table.pairs is None else table.pairs.numpy()
    together = group // members.shape[1]
    best, chosen = -np.inf, every[0, :0]
    for head in range(heads):
        total, present = gain[head, members].sum(1), width[head, members[:, 0]]
        for bits in np.unique(present[present < MAX_BITS]):
            mine = np.flatnonzero(present == bits)
            mine = mine[np.argsort(-total[mine], kind="stable")[:together]]
            if total[mine].sum() > best:
                best, chosen = float(total[mine].sum()), every[head, members[mine].reshape(-1)]
    return best, chosen
