"""Contexts to evict from: the sampled tokens of each sequence's first half, side by side.

Eviction is judged at the middle of a calibration sequence. What a token drew until then (`attention_early`) is what a
policy can know; what it draws from the second half of the sequence is what keeping it is worth.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SINKS, RECENT = 4, 0.05
"""First tokens, and share of last ones, that every policy keeps: not to be chosen."""
FEWEST = 10
"""Tokens to choose among that a sequence must have in the sample."""


@dataclass(frozen=True)
class Contexts:
    """S contexts of at most M sampled tokens.

    Attributes:
        index: `[S, M]` int64, the tokens' places in the sample; 0 where there is none.
        held: `[S, M]` bool, where there is a token.
        free: `[S, M]` bool, tokens that a policy chooses among: neither sinks nor recent.
        queries: `[S, M]` float32, how many queries of the context saw the token; 1 where there is none.
    """

    index: Tensor
    held: Tensor
    free: Tensor
    queries: Tensor

    @classmethod
    def find(
        cls, sequence: Tensor, position: Tensor, middle: int, sliding: int | None = None, sinks: int = SINKS
    ) -> Contexts | None:
        """The contexts of a sample, or None if no sequence has enough of it.

        Args:
            sequence: `[n]` int64, which sequence a token is of. position: `[n]`, where in it.
            middle: tokens of a context. sliding: tokens that a query sees, itself included; None for all.
            sinks: first tokens that always stay.
        """
        first = 0 if sliding is None else max(0, middle - sliding + 1)
        here = ((position >= first) & (position < middle)).nonzero()[:, 0]
        recent = middle - round(RECENT * middle)
        free = (position >= sinks) & (position < recent)
        _, group = sequence[here].unique(return_inverse=True)
        groups = int(group.max()) + 1 if len(group) else 0
        choices = torch.zeros(groups, dtype=torch.long).index_add_(0, group, free[here].long())
        enough = choices >= FEWEST
        if not bool(enough.any()):
            return None
        here, group = here[enough[group]], (enough.cumsum(0) - 1)[group[enough[group]]]
        order = (group * middle + position[here]).argsort()
        here, group = here[order], group[order]
        count = group.bincount()
        place = torch.arange(len(here)) - (count.cumsum(0) - count)[group]
        index = torch.zeros(len(count), int(count.max()), dtype=torch.long)
        held = torch.zeros(index.shape, dtype=torch.bool)
        index[group, place], held[group, place] = here, True
        age = (middle - position[index]).clamp(max=middle if sliding is None else sliding)
        return cls(index, held, held & free[index], torch.where(held, age, 1).float())

    def gather(self, x: Tensor) -> Tensor:
        """Figures of every sampled token and head, `[n, H, ...]`, as `[S, H, M, ...]`; 0 where there is no token."""
        held = self.held.view(len(self.held), 1, -1, *[1] * (x.ndim - 2))
        return x[self.index].transpose(1, 2) * held

    def best(self, score: Tensor, share: float) -> Tensor:
        """The `share` of each context's free tokens with the highest `score [S, H, M]`, per head: `[S, H, M]` bool.

        At least one; equal scores in the order of their positions.
        """
        order = score.masked_fill(~self.free[:, None], -torch.inf).argsort(dim=-1, descending=True, stable=True)
        rank = order.argsort(-1)
        return rank < self.count(share)[:, None, None]

    def count(self, share: float) -> Tensor:
        """How many tokens `share` of each context's free ones are: `[S]` int64, at least 1."""
        return (share * self.free.sum(1)).round().long().clamp(min=1)
