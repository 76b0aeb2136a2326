"""How many tokens each row of a batch has seen and holds, and how many must leave before more come.

Numbers only, no tensors of a cache: when tokens leave does not depend on which. With a share to keep, a prompt is read
whole, in one pass or several, and tokens leave when decoding begins (a pass of at most `DECODING` tokens) and from then
on as they come, a part of the budget at a time. With a number to keep, they leave whenever a block of tokens has come,
in a prompt too, at the same tokens however the prompt is cut.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

from torch import Tensor

from kvcalib.runtime.eviction import Eviction

DECODING = 16
"""Tokens of a pass up to which it counts as decoding (one token, or a few drafted ones) and not as a prompt's."""
Targets = list[int | None]
"""How many tokens each row shall hold, None where all may stay."""


class Counts:
    """The rows' counts in one layer.

    Args:
        share: the layer's share of the tokens, 1 on average over layers.

    Attributes:
        seen, held: real tokens of each row so far, and those still there.
        prompt: where the budget does not grow, what a row had seen when its first token had to leave; else 0.
    """

    def __init__(self, eviction: Eviction, share: float) -> None:
        self.eviction, self.share = eviction, share
        self.seen: list[int] = []
        self.held: list[int] = []
        self.prompt: list[int] = []

    def start(self, batch: int) -> None:
        """Begin with `batch` empty rows, unless there are rows already."""
        if not self.seen:
            self.seen, self.held, self.prompt = ([0] * batch for _ in range(3))

    def budget(self, seen: int) -> int:
        """Tokens that a row may hold when it has seen so many."""
        return self.eviction.budget(seen, self.share)

    def parts(self, count: int, valid: Tensor | None) -> Iterator[tuple[int, int, Targets]]:
        """`(first, last, targets)` of the parts in which `count` tokens go in, and what rows may hold before each.

        Rows are admitted (`admit`) between one part and the next.

        Args:
            valid: `[B, count]`, which tokens are real; None for all.
        """
        if not self.eviction.rule.evicts:
            yield 0, count, [None for _ in self.held]
        elif self.eviction.counted:
            yield from self._blocks(count, valid)
        else:
            yield 0, count, self._targets(count) if count <= DECODING else [None for _ in self.held]

    def _blocks(self, count: int, valid: Tensor | None) -> Iterator[tuple[int, int, Targets]]:
        block, most = self.eviction.block(self.share), self.budget(0)
        rows = range(len(self.seen))
        if valid is None:
            real = [[True] * count for _ in rows]
            before = [[self.seen[b] + i for i in range(count)] for b in rows]
        else:
            real = valid.tolist()
            earlier = (valid.int().cumsum(1) - valid.int()).tolist()
            before = [[self.seen[b] + n for n in earlier[b]] for b in rows]
        # A row's blocks are counted in its own tokens, so that it does not matter what lies beside it in the batch.
        edges = [[real[b][i] and before[b][i] % block == 0 for i in range(count)] for b in rows]
        starts = sorted({0} | {i for b in rows for i in range(count) if edges[b][i]})
        for first, last in itertools.pairwise([*starts, count]):
            full = [edges[b][first] and self.held[b] + block > most for b in rows]
            yield first, last, [most - block if full[b] else None for b in rows]

    def _targets(self, coming: int) -> Targets:
        """What rows may hold before `coming` more."""
        targets: Targets = []
        for b, held in enumerate(self.held):
            if not self.eviction.rule.grows:
                self.prompt[b] = self.basis(b)
            most = self.budget(self.seen[b] + coming if self.eviction.rule.grows else self.prompt[b])
            spare = max(coming, int(most * self.eviction.rule.every))
            targets.append(max(0, most - spare) if held and held + coming > most else None)
        return targets

    def now(self) -> Targets:
        """What rows may hold if nothing more comes."""
        if not self.held or not self.eviction.rule.evicts:
            return [None for _ in self.held]
        if not self.eviction.rule.grows:
            self.prompt = [self.basis(b) for b in range(len(self.held))]
        most = [self.budget(self.basis(b)) for b in range(len(self.held))]
        return [m if m < held else None for m, held in zip(most, self.held, strict=True)]

    def basis(self, row: int) -> int:
        """Tokens that a row's budget is a share of: all it has seen, or those of the prompt."""
        return self.seen[row] if self.eviction.rule.grows else self.prompt[row] or self.seen[row]

    def room(self, slots: int) -> int:
        """Slots to have memory for: `slots` now, and what comes until tokens leave again."""
        if self.eviction.counted:
            return max(slots, self.budget(0))
        if not self.eviction.rule.grows:
            return max(slots, self.budget(max(self.prompt)))
        # One token at a time fills what is spare now and what the budget grows by meanwhile.
        seen, grown = max(self.seen), min(1.0, self.eviction.keep * self.share)
        spare = max(1, self.budget(seen) - slots)
        return max(slots, self.budget(seen + math.ceil(spare / max(1 - grown, 0.1))))

    def admit(self, count: int, valid: Tensor | None) -> None:
        """Take in a part of `count` tokens."""
        real = [count] * len(self.seen) if valid is None else valid.sum(1).tolist()
        self.seen = [n + m for n, m in zip(self.seen, real, strict=True)]
        self.held = [n + m for n, m in zip(self.held, real, strict=True)]

    def forget(self, removed: int) -> None:
        """The last `removed` tokens were never seen; what is held is for the caller to say."""
        self.seen = [max(0, n - removed) for n in self.seen]
        self.prompt = [p if n else 0 for p, n in zip(self.prompt, self.seen, strict=True)]

    def select(self, rows: list[int]) -> None:
        """Keep these rows, in that order."""
        self.seen, self.held, self.prompt = ([x[i] for i in rows] for x in (self.seen, self.held, self.prompt))
