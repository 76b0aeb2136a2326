"""Heavy hitters that quantize well, with a weight for each layer (after Q-Hitter, MLSys 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcalib.runtime.policies.policy import Held, Policy


class QHitter(Policy):
    """score = alpha * a / max a + (1 - alpha) * f, alpha the layer's.

    a: mean attention per query, so that age does not win by itself (`age_norm=False`: the sum, as published); a query
    counts `decay` times the one after it, since what a token draws now says more about what it will draw. f:
    friendliness, 1 - (|k - k^| / |k| + |v - v^| / |v|) / 2, at least 0, of what the storage quantizer made of it.
    """

    name = "qhitter"
    attention = True
    traits = 1
    trait_dtype = torch.uint8
    weighted = True

    def __init__(self, age_norm: bool = True, decay: float = 0.99) -> None:
        self.age_norm, self.decay = age_norm, decay

    def observe(self, key: Tensor, value: Tensor) -> Tensor:
        error = (relative(key) + relative(value)) / 2
        return (1 - error).clamp(min=0)[..., None]

    def score(self, held: Held) -> Tensor:
        a = held.drawn / held.queries(self.decay) if self.age_norm else held.drawn
        most = a.masked_fill(held.position < 0, 0).amax(-1, keepdim=True)
        a = a / torch.where(most > 0, most, 1.0)
        return held.alpha * a + (1 - held.alpha) * held.traits[..., 0]


def relative(residue: Tensor) -> Tensor:
    """`|x - x^| / |x|` from the squares of both, `[..., 2]`; 0 for a token of zeros kept as such."""
    error, size = residue[..., 0].sqrt(), residue[..., 1].sqrt()
    return torch.where(size > 0, error / torch.where(size > 0, size, 1.0), error)
