"""Thresholds of adaptive widths: from which attention on a token is worth the bits of the next tier.

QAQ bounds a value's error by sigma_X / (sqrt(T) S_t) (arXiv 2403.04643, section 3.2): each halving of the attention S_t
saves a bit, whatever a bit costs or gains elsewhere. Here the widths come from what the tiers were measured to lose: a
token with signal s costs s / mean(s) * L_c in tier c, L_c the tier's predicted loss per token and b_c its bits. The
cheapest tier at the price lambda per bit minimises s / mean(s) * L_c + lambda * b_c, so between two neighbours c, d on
the lower convex hull of (b, L) the threshold is

    s = mean(s) * lambda * (b_d - b_c) / (L_c - L_d)

and one lambda for all layers, keys and values meets the budget on the calibration sample.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcalib.errors import InputError

NEVER = 2.0
"""A threshold above every attention weight."""


@dataclass(frozen=True)
class Choice:
    """Keys or values of one layer.

    Attributes:
        signal: `[n]`, attention of sampled tokens, at least 0.
        bits: of one token's row in each tier, ascending.
        loss: of each tier, nats per token.
    """

    signal: Tensor
    bits: list[int]
    loss: list[float]


def hull(bits: list[int], loss: list[float]) -> list[int]:
    """Tiers on the lower convex hull of (bits, loss), from the fewest bits to the least loss."""
    best = [0]
    while True:
        here = best[-1]
        slopes = {
            c: (loss[here] - loss[c]) / (bits[c] - bits[here])
            for c in range(here + 1, len(bits))
            if bits[c] > bits[here] and loss[c] < loss[here]
        }
        if not slopes:
            return best
        best.append(max(slopes, key=lambda c: (slopes[c], c)))


def thresholds(choice: Choice, price: float) -> list[float]:
    """Ascending thresholds of the signal at `price` nats per bit, one less than tiers; `NEVER` where none is enough."""
    kept = hull(choice.bits, choice.loss)
    mean = float(choice.signal.double().mean())
    limits = [NEVER] * (len(choice.bits) - 1)
    for c, d in itertools.pairwise(kept):
        gain = (choice.loss[c] - choice.loss[d]) / (choice.bits[d] - choice.bits[c])
        # Tiers that are off the hull are skipped: they share the threshold of the next one on it.
        limits[c:d] = [min(NEVER, mean * price / gain)] * (d - c)
    return limits


def mean_bits(choice: Choice, limits: list[float]) -> float:
    """Mean bits of a token's row on the sample."""
    tier = (choice.signal.float()[:, None] >= torch.tensor(limits, dtype=torch.float32)).sum(1)
    return float(torch.tensor(choice.bits, dtype=torch.float64)[tier].mean())


def meet(choices: list[Choice], budget: float) -> list[list[float]]:
    """Thresholds for each choice, whose rows take at most `budget` bits per token together, and as near as they can.

    Raises:
        InputError: the budget is below the smallest tiers, or above what all largest tiers take; says both.
    """

    def plan(price: float) -> tuple[list[list[float]], float]:
        limits = [thresholds(choice, price) for choice in choices]
        return limits, sum(mean_bits(choice, x) for choice, x in zip(choices, limits, strict=True))

    smallest, largest = (sum(choice.bits[i] for choice in choices) for i in (0, -1))
    if not smallest <= budget <= largest:
        raise InputError(f"the budget is {budget:g} bits per token, the tiers take {smallest} to {largest}")
    low, high = -80.0, 80.0
    found, bits = plan(math.exp(low))
    if bits <= budget:
        return found
    for _ in range(80):
        middle = (low + high) / 2
        if plan(math.exp(middle))[1] <= budget:
            high = middle
        else:
            low = middle
    return plan(math.exp(high))[0]
