"""As many entries for a token as it needs: outliers beyond a threshold, codes of a width of its own.

Entries of all tokens and rows of a batch lie one after another, in the order (token, batch row); how many a token has
is kept beside them. Nothing is padded.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kvcalib.runtime.storage import Rows


class Ragged:
    """Named tensors `[N, ...]` of N entries that grow together."""

    def __init__(self) -> None:
        self.rows = Rows()

    def __len__(self) -> int:
        return self.rows.length

    def append(self, new: Mapping[str, Tensor]) -> None:
        """Add entries `[n, ...]`."""
        self.rows.append({name: t[None] for name, t in new.items()})

    def read(self) -> dict[str, Tensor]:
        """All entries."""
        return {name: t[0] for name, t in self.rows.read(0, self.rows.length).items()}

    def crop(self, count: int) -> None:
        """Keep the first `count` entries."""
        self.rows.crop(count)

    def take(self, order: Tensor) -> None:
        """Keep the entries `order [n]`, in that order."""
        if self.rows.tensors():
            self.rows.replace({name: t[order][None] for name, t in self.read().items()}, len(order))

    def tensors(self) -> dict[str, Tensor]:
        """Everything held, spare room included."""
        return self.rows.tensors()


def selected(counts: Tensor, indices: Tensor) -> Tensor:
    """Which entries the batch rows `indices` have, in their order: int64 `[n]`; `counts [B, T]` as they were before."""
    by_token = counts.long().T
    starts = (by_token.flatten().cumsum(0) - by_token.flatten()).view_as(by_token)
    indices = indices.to(counts.device)
    return ranges(starts[:, indices].flatten(), by_token[:, indices].flatten())


def ranges(starts: Tensor, counts: Tensor) -> Tensor:
    """`starts[0], starts[0] + 1, ...`, `counts[0]` of them, then the same of the next."""
    within = torch.arange(int(counts.sum()), device=counts.device)
    before = counts.cumsum(0) - counts
    return within + (starts - before).repeat_interleave(counts)
