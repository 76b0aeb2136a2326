"""What an eviction policy sees of a layer, and what it answers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass
class Held:
    """The tokens of one layer, `[B, H, S]` by row, KV head and slot, in the order they came; H is 1 where all heads
    hold the same.

    Attributes:
        position: int32, -1 where a slot is unused.
        drawn: float32, attention that the token drew, summed over the group's query heads and, each weighted by
            `Policy.decay` to the power of its age, over queries.
        traits: float32 `[B, H, S, Policy.traits]`, what the policy noted of each token when it was stored.
        alpha: the layer's weight of attention, 0..1.
        heavy: float64 `[B]`, tokens of each row's budget beside the recent ones, before rounding.
    """

    position: Tensor
    drawn: Tensor
    traits: Tensor
    alpha: float
    heavy: Tensor

    def queries(self, decay: float) -> Tensor:
        """How many queries saw each token, its own included, weighted like `drawn`; 1 where a slot is unused."""
        newest = self.position.amax((1, 2), keepdim=True)
        age = torch.where(self.position >= 0, newest - self.position + 1, 1).float()
        return age if decay == 1 else -torch.expm1(age * math.log(decay)) / (1 - decay)


class Policy:
    """Base of all policies: the tokens with the highest `score` stay.

    Attributes:
        evicts: it ever lets a token go.
        attention: it looks at `Held.drawn`.
        traits: how many numbers it notes of a token when it is stored; see `observe`. With `trait_dtype` uint8 they lie
            in 0..1.
        weighted: it looks at `Held.alpha`, and at 1 not at traits.
        decay: by how much a query counts less than the one after it.
        sinks: first tokens of a row that always stay.
        every: share of the budget that is evicted at a time; 0: no more than room has to be made for.
        grows: the budget grows with the tokens seen; else it stays what the first eviction found.
    """

    name: ClassVar[str]
    evicts: ClassVar[bool] = True
    attention: ClassVar[bool] = False
    traits: ClassVar[int] = 0
    trait_dtype: ClassVar[torch.dtype] = torch.float16
    weighted: ClassVar[bool] = False
    decay: float = 1.0
    sinks: int = 4
    every: float = 1 / 16
    grows: bool = True

    def observe(self, key: Tensor, value: Tensor) -> Tensor:
        """What to note of tokens, `[..., traits]`, from `|x - x^|^2` and `|x|^2` of keys and values `[..., 2]`."""
        raise NotImplementedError

    def score(self, held: Held) -> Tensor:
        """The higher, the longer a token stays: `[B, H, S]`."""
        raise NotImplementedError

    def choose(self, held: Held, free: Tensor, count: Tensor) -> Tensor:
        """Which of the tokens `free [B, H, S]` stay: at most `count [B]`, and as many in every head of a row."""
        return best(self.score(held), free, count)


def best(score: Tensor, free: Tensor, count: Tensor) -> Tensor:
    """The `count [B]` tokens of every row and head that are `free` and score highest; of equal ones the later."""
    order = score.masked_fill(~free, -torch.inf).flip(-1).argsort(dim=-1, descending=True, stable=True)
    slots = torch.arange(score.shape[-1], device=score.device)
    rank = torch.empty_like(order).scatter_(-1, order, slots.expand_as(order)).flip(-1)
    return free & (rank < count[:, None, None])


def unit(x: Tensor, where: Tensor, dims: tuple[int, ...]) -> Tensor:
    """`x` from its least to its greatest as 0 to 1, over `dims` and the places `where`; 0 where all are equal."""
    low = x.masked_fill(~where, torch.inf).amin(dims, keepdim=True)
    high = x.masked_fill(~where, -torch.inf).amax(dims, keepdim=True)
    span = high - low
    return torch.where(where & (span > 0), (x - low) / torch.where(span > 0, span, 1.0), 0.0)
