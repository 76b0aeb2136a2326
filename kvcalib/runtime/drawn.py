"""The attention that tokens draw, taken from the scores of `chunked_attention` while it runs: no second pass.

A weight is exp(score - log-sum-exp), and the log-sum-exp is known only when the last chunk has been read. So raw scores
are kept until then, of two small parts only: of every query the scores of the last `offsets` tokens up to itself, and,
if asked for, of the last `rows` queries the scores of all tokens. No queries x tokens matrix exists.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Heads = Literal["mean", "max"]


class Drawn:
    """Scores of one attention call; feed with `take`, end each block of queries with `finish`.

    Args:
        offsets: tokens back from each query, itself included, whose weights are kept.
        rows: last queries of the call whose weights on all tokens are kept.
        heads: how the weights of all query heads become one number.
    """

    def __init__(self, offsets: int, rows: int = 0, heads: Heads = "mean") -> None:
        self.offsets, self.rows, self.heads = offsets, rows, heads
        self._near: dict[int, Tensor] = {}
        self._far: dict[int, list[Tensor]] = {}
        self._bands: list[Tensor] = []
        self._all: list[Tensor] = []

    def take(self, first: int, queries: int, past: int, start: int, scores: Tensor) -> None:
        """`scores [B, H, G, q, t]`, masked, of the queries from `first` on and the tokens from `start` on.

        Args:
            queries: all queries of the call. past: tokens before the first of them.
        """
        q, count = scores.shape[-2:]
        # A float mask takes what it hides to the lowest number, not to -inf.
        seen = scores.masked_fill(scores < torch.finfo(scores.dtype).min / 2, -torch.inf)
        if first not in self._near:
            self._near[first] = scores.new_full((*scores.shape[:-1], self.offsets), -torch.inf)
        if start + count > past + first - self.offsets + 1:
            query = past + first + torch.arange(q, device=scores.device)
            token = query[:, None] - torch.arange(self.offsets, device=scores.device) - start
            inside = (token >= 0) & (token < count)
            found = seen.gather(-1, token.clamp(0, count - 1).expand(*scores.shape[:3], -1, -1))
            self._near[first] = torch.where(inside, found, self._near[first])
        wanted = min(q, first + q - (queries - self.rows))
        if self.rows and wanted > 0:
            self._far.setdefault(first, []).append(seen[..., q - wanted :, :])

    def finish(self, first: int, peak: Tensor, total: Tensor) -> None:
        """The block's running maximum and sum `[B, H, G, q, 1]`, sink logits included."""
        log_sum = torch.where(total > 0, peak + total.log(), torch.inf)
        self._bands.append(self._merged((self._near.pop(first) - log_sum).exp()))
        if first in self._far:
            far = self._far.pop(first)
            log_sum = log_sum[..., -far[0].shape[-2] :, :]
            self._all.append(self._merged(torch.cat([(part - log_sum).exp() for part in far], -1)))

    def _merged(self, weights: Tensor) -> Tensor:
        flat = weights.flatten(1, 2)
        return flat.mean(1) if self.heads == "mean" else flat.amax(1)

    @property
    def band(self) -> Tensor:
        """`[B, Q, offsets]`: what each query pays to the token `j` before it; 0 where there is none."""
        return torch.cat(self._bands, 1)

    @property
    def all(self) -> Tensor:
        """`[B, min(rows, Q), T]`: what the last queries pay to every token."""
        length = max(part.shape[-1] for part in self._all)
        # An earlier block of queries does not reach the chunks after it.
        return torch.cat([torch.nn.functional.pad(p, (0, length - p.shape[-1])) for p in self._all], 1)
