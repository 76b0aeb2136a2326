"""Quantization friendliness: how well a layer's tokens survive the quantizer that will store them.

Q-Hitter scores a token by the error that quantization does to it. Its code takes the raw 2-norm of the error, so small
tokens look friendly; here the error is relative to the token's own norm, and it is the error of the storage quantizer
with its codebooks, scales and outliers. One normalisation for all tokens: prompt or decoded, of any layer and head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcalib.quant.quantizer import Quantizer

QUANTILES = (0.1, 0.5, 0.9)


def relative_error(quantizer: Quantizer, x: Tensor, exact_dtype: torch.dtype = torch.float16) -> Tensor:
    """`|x - x^| / |x|` of every token and head: `x [n, H, D]` to float32 `[n, H]`; 0 for a token that is all zero."""
    return relative(quantization_error(quantizer, x, exact_dtype), x)


def quantization_error(quantizer: Quantizer, x: Tensor, exact_dtype: torch.dtype = torch.float16) -> Tensor:
    """`x^ - x` of the storage quantizer, float32 `[n, H, D]`."""
    wide = x.float()
    return quantizer.round_trip(wide, exact_dtype) - wide


def relative(error: Tensor, x: Tensor) -> Tensor:
    """`|error| / |x|` over the last dimension, float32; 0 for a token of zeros that is kept as such."""
    size = x.float().norm(dim=-1)
    found = error.norm(dim=-1)
    return torch.where(size > 0, found / size.clamp(min=torch.finfo(torch.float32).tiny), found)


def token_friendliness(key_error: Tensor, value_error: Tensor) -> Tensor:
    """`1 - (key error + value error) / 2` of each token, within 0..1 (1: quantizes without error)."""
    return (1 - (key_error + value_error) / 2).clamp(0, 1)


def friendliness(key_error: float, value_error: float) -> float:
    """One figure per layer in 0..1: `1 - (key error + value error) / 2`, floored at 0 (1: quantizes without error)."""
    return max(0.0, 1 - (key_error + value_error) / 2)


def quantiles(error: Tensor) -> list[list[float]]:
    """The 10, 50 and 90 % quantiles of each head's relative errors `[n, H]`: `[H][3]`."""
    return torch.quantile(error.double(), torch.tensor(QUANTILES, dtype=torch.float64), dim=0).T.tolist()
