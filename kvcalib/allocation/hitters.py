"""Heavy hitters under quantization: does the attention that quantized keys draw choose the same tokens?

Q-Hitter (MLSys 2024) reports that keys of 4 bits and less lower the accuracy of heavy-hitter selection. Here that is
measured from the calibration file alone, for any quantizer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcalib.allocation.contexts import Contexts

HEAVY = 0.2
"""Share of a context's tokens that are its heavy hitters, as in H2O (arXiv 2306.14048)."""


def quantized_attention(attention: Tensor, slope: Tensor, change: Tensor) -> Tensor:
    """Attention that tokens draw with quantized keys: `A exp(G . (k^ - k) / A)`, `[n, H]`.

    To first order this is `A + G . (k^ - k)`, with G the slope of A by the token's own key; the exponential is exact
    where a token's weights are small and all its queries are moved alike, and is never negative. What the other keys'
    errors do is left out: they move all tokens of a context nearly alike.

    Args:
        attention: A, `[n, H]`, drawn with exact keys. slope: G, `[n, H, D]`. change: `k^ - k`, `[n, H, D]`.
    """
    a = attention.float()
    moved = (slope.float() * change.float()).sum(-1)
    return torch.where(a > 0, a * (moved / a.clamp(min=torch.finfo(torch.float32).tiny)).clamp(-30, 30).exp(), a)


def overlap(contexts: Contexts, exact: Tensor, quantized: Tensor, share: float = HEAVY) -> Tensor:
    """Heavy hitters that stay so: `|top(exact) & top(quantized)| / k`, mean over contexts, `[H]` float64.

    Args:
        exact, quantized: mean attention per query, `[S, H, M]`.
    """
    both = (contexts.best(exact, share) & contexts.best(quantized, share)).sum(-1)
    return (both / contexts.count(share)[:, None]).double().mean(0)


def mean_where(x: Tensor, where: Tensor) -> float:
    """Mean of `x` at the places `where`; NaN if there is none."""
    return float(x[where].double().mean())
