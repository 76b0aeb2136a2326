"""Quantization friendliness: how well a layer's tokens survive the quantizer that will store them.

Q-Hitter scores a token by the error that quantization does to it. Its code takes the raw 2-norm of the error, so small
tokens look friendly; here the error is relative to the token's own norm, and it is the error of the storage quantizer
with its codebooks, scales and outliers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcalib.quant.quantizer import Quantizer


def relative_error(quantizer: Quantizer, x: Tensor, exact_dtype: torch.dtype = torch.float16) -> Tensor:
    """`|x - x^| / |x|` of every token and head: `x [n, H, D]` to float32 `[n, H]`; 0 for a token that is all zero."""
    wide = x.float()
    error = (quantizer.decode(quantizer.encode(wide, exact_dtype)) - wide).norm(dim=-1)
    size = wide.norm(dim=-1)
    return torch.where(size > 0, error / size.clamp(min=torch.finfo(torch.float32).tiny), error)


def friendliness(key_error: float, value_error: float) -> float:
    """One figure per layer in 0..1: `1 - (key error + value error) / 2`, floored at 0 (1: quantizes without error)."""
    return max(0.0, 1 - (key_error + value_error) / 2)
