"""How much attention each token draws, in blocks of queries: never a T x T matrix per layer kept.

Accumulated attention (H2O, Q-Hitter): the sum over all queries. Windowed maximum (QAQ): the largest weight from the
first `window` queries that can see the token, itself included. GQA groups are summed, or maximised, per kv head.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128


def drawn_attention(
    query: Tensor,
    key: Tensor,
    scaling: float,
    window: int,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention that causal queries pay to every token of full sequences.

    Args:
        query: `[B, Hq, T, D]`, rotated. key: `[B, H, T, D]`, rotated.

    Returns:
        `(total, peak)`, float32 `[B, H, T]`: the sum over queries and group; the maximum over the group and over the
        queries t .. t + window - 1.
    """
    batch, heads, length, _ = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    total = torch.zeros(batch, kv_heads, length, device=query.device)
    peak = torch.zeros_like(total)
    grouped = query.float().reshape(batch, kv_heads, group, length, -1) * scaling
    wide = key.float().transpose(2, 3).unsqueeze(2)
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        scores = grouped[:, :, :, start:stop] @ wide[..., :stop]
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        rows = torch.arange(start, stop, device=query.device)
        # Only the last block of keys holds any that a query of this block may not see.
        scores[..., start:].masked_fill_(torch.arange(start, stop, device=query.device) > rows[:, None], -torch.inf)
        if sink_logits is not None:
            extra = sink_logits.float().view(1, kv_heads, group, 1, 1).expand(*scores.shape[:-1], 1)
            weights = torch.cat([scores, extra], -1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        total[..., :stop] += weights.sum((2, 3))
        strongest = weights.amax(2)
        for offset in range(min(window, stop)):
            first = max(start - offset, 0)
            seen = strongest[:, :, first + offset - start :, :]
            columns = torch.arange(first, stop - offset, device=query.device)
            drawn = seen.gather(-1, columns.view(1, 1, -1, 1).expand(batch, kv_heads, -1, 1)).squeeze(-1)
            peak[..., first : stop - offset] = torch.maximum(peak[..., first : stop - offset], drawn)
    return total, peak
