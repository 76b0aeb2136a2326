"""Asymmetric integers: what `int` and `kivi` share.

    step = (max - min) / (2^b - 1),    code = round((x - min) / step),    x^ = min + step code

with min and step rounded to two bytes before codes are taken. Halves round to even. A group whose step rounds to 0 has
codes 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcalib.quant.packing import Layout
from kvcalib.quant.quantizer import saturate


def encode(x: Tensor, bits: int, dim: int, exact: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Codes int32 of the shape of `x`, and min and step of each group along `dim`, which they lack."""
    low, high = x.amin(dim), x.amax(dim)
    levels = (1 << bits) - 1
    low, step = saturate(low, exact), saturate((high - low) / levels, exact)
    wide = step.float().unsqueeze(dim)
    codes = ((x - low.float().unsqueeze(dim)) / torch.where(wide > 0, wide, 1.0)).round().clamp(0, levels)
    return torch.where(wide > 0, codes, 0.0).int(), low, step


def decode(codes: Tensor, low: Tensor, step: Tensor, dim: int) -> Tensor:
    """The inverse, float32."""
    return low.float().unsqueeze(dim) + step.float().unsqueeze(dim) * codes


def uniform_layout(kv_heads: int, head_dim: int, bits: int) -> Layout:
    """The row of words of a token whose codes all have `bits` bits."""
    return Layout.build(torch.full((kv_heads, head_dim), bits, dtype=torch.uint8))
