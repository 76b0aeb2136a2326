"""Quantizers whose heads stand alone: every head's part of a row can be moved without the others.

What that takes: words of its own for each head, ranks of outliers within a head, and a zero and scale for each head. An
artifact may have been built otherwise, because that is smaller. Words can be laid out anew, and where nothing is kept
exact by rank a token's one zero and scale can be stored once per head; ranks over all heads of a token cannot be split.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kvcalib.quant.packing import Layout
from kvcalib.quant.quantizer import Quantizer


def separable(quantizer: Quantizer) -> bool:
    """Whether `apart` can make heads stand alone."""
    return quantizer.scope == "head" or not quantizer.outliers


def apart(quantizer: Quantizer) -> Quantizer:
    """The same codebooks and widths, each head's words a segment of its own; encodes the same codes.

    Raises:
        ValueError: not `separable`.
    """
    if not separable(quantizer):
        raise ValueError("outliers are ranked over all heads of a token")
    layout = quantizer.layout
    if layout.segment == "head":
        return quantizer
    first = layout.word[0].long() * 32 + layout.shift[0].long()
    order = torch.where(layout.word[0] < 0, torch.iinfo(torch.int64).max, first).argsort(dim=-1, stable=True)
    return replace(quantizer, layout=Layout.build(layout.widths, "head", order))


def reader(quantizer: Quantizer) -> Quantizer:
    """What decodes rows in which zero and scale were stored for every head."""
    return replace(quantizer, scope="head") if quantizer.relative and quantizer.scope == "token" else quantizer


def owners(quantizer: Quantizer, name: str, size: int) -> Tensor:
    """Which head each of the `size` elements of a token's stored tensor `name` belongs to, int64."""
    heads = quantizer.layout.widths.shape[0]
    if name != "words":
        return torch.arange(heads).repeat_interleave(size // heads)
    found = torch.zeros(size, dtype=torch.int64)
    for head in range(heads):
        used = quantizer.layout.word[:, head]
        found[used[used >= 0].long().unique()] = head
    return found
