"""Rows whose groups have a width each: what `qaq-published` stores keys and values as.

A group is a token, or a token's head, of n elements. Of each are kept: a byte that says its width, the range and the
mean of its inliers in two bytes each, its outliers (a fixed number of the least and of the greatest, exact, with
indices), and codes of its width in whole words. Groups of one width lie one after another in a `Ragged`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvcalib.evaluation.baselines.ragged import Ragged, selected
from kvcalib.quant.packing import MAX_BITS, Layout
from kvcalib.quant.quantizer import BYTE_INDEXED, saturate
from kvcalib.runtime.storage import Rows


def outlier_ranks(share: float, size: int) -> tuple[int, int]:
    """How many of the least and of the greatest of `size` elements are outliers.

    QAQ's code compares with `lo = kthvalue(ceil(share / 2 n))` and `hi = kthvalue(floor((1 - share / 2) n))`: outliers
    are `x <= lo` and `x > hi`.
    """
    if not share:
        return 0, 0
    return math.ceil(share / 2 * size), size - math.floor((1 - share / 2) * size)


class Grouped:
    """Groups `x [..., n]` float32, their outliers taken out.

    Attributes:
        index: `[..., k]` of the outliers, the least ones first; `value`: what they are, in `exact`.
        range, mean: `[...]` of the others, in `exact`, a two-byte type.
    """

    def __init__(self, x: Tensor, share: float, exact: torch.dtype) -> None:
        low, high = outlier_ranks(share, x.shape[-1])
        values, order = x.sort(dim=-1, stable=True)
        size = x.shape[-1]
        inside = values[..., low : size - high]
        self.x = x
        self.index = torch.cat([order[..., :low], order[..., size - high :]], -1)
        self.value = saturate(x.gather(-1, self.index), exact)
        self.range = saturate(inside[..., -1] - inside[..., 0], exact)
        self.mean = saturate(inside.mean(-1), exact)

    def codes(self, bits: Tensor) -> Tensor:
        """`clamp(round((x - mean) / s), -2^(B-1), 2^(B-1) - 1) + 2^(B-1)` with s = range / 2^B, for `bits [...]` of 1
        or more: int32 `[..., n]`.
        """  # fmt: skip
        half = torch.exp2(bits.float() - 1)[..., None]
        step = self.range.float()[..., None] / (2 * half)
        codes = ((self.x - self.mean.float()[..., None]) / torch.where(step > 0, step, 1.0)).round()
        return (torch.minimum(torch.maximum(codes, -half), half - 1) + half).int()


def decoded(codes: Tensor, span: Tensor, mean: Tensor, bits: Tensor) -> Tensor:
    """`q s + mean` with `q = code - 2^(B-1)`; at 0 bits the code's clamp leaves q = -1/2."""
    half = torch.exp2(bits.float() - 1)[..., None]
    step = span.float()[..., None] / (2 * half)
    return torch.where(bits[..., None] > 0, codes - half, -0.5) * step + mean.float()[..., None]


class VariableTrack:
    """The keys, or the values, of one layer.

    Args:
        groups, size: groups of a token and their elements.
        outliers: share of a group's elements.
    """

    def __init__(self, groups: int, size: int, outliers: float) -> None:
        self.groups, self.size, self.share = groups, size, outliers
        self.rows = Rows()
        self.pools = {bits: Ragged() for bits in range(1, MAX_BITS + 1)}
        self.layouts = {b: Layout.build(torch.full((1, size), b, dtype=torch.uint8), "row") for b in self.pools}

    @property
    def length(self) -> int:
        """Tokens held."""
        return self.rows.length

    def append(self, found: Grouped, bits: Tensor) -> None:
        """Take the groups `[B, t, G, n]` of t tokens, `bits [B, t, G]` 0..8 each."""
        new = {"bits": bits.to(torch.uint8), "range": found.range, "mean": found.mean}
        if found.index.shape[-1]:
            index = found.index.to(torch.uint8 if self.size <= BYTE_INDEXED else torch.int16)
            new |= {"outlier_value": found.value, "outlier_index": index}
        self.rows.append(new)
        by_token, codes = bits.transpose(0, 1), found.codes(bits).transpose(0, 1)
        for width, pool in self.pools.items():
            mine = codes[by_token == width]
            if len(mine):
                pool.append({"words": self.layouts[width].pack(mine[:, None])})

    def read(self) -> Tensor:
        """All tokens, float32 `[B, T, G, n]`."""
        rows = self.rows.read(0, self.rows.length)
        by_token = rows["bits"].transpose(0, 1)
        codes = torch.zeros(*by_token.shape, self.size, dtype=torch.int32, device=by_token.device)
        for width, pool in self.pools.items():
            if len(pool):
                codes[by_token == width] = self.layouts[width].unpack(pool.read()["words"])[:, 0]
        x = decoded(codes.transpose(0, 1), rows["range"], rows["mean"], rows["bits"])
        if "outlier_index" in rows:
            x = x.scatter(-1, rows["outlier_index"].long(), rows["outlier_value"].float())
        return x

    def _counts(self, width: int, tokens: int) -> Tensor:
        """How many groups of each token have a width: `[B, tokens]`."""
        return (self.rows.read(0, tokens)["bits"] == width).sum(-1)

    def crop(self, keep: int) -> None:
        """Keep the first `keep` tokens."""
        for width, pool in self.pools.items():
            if len(pool):
                pool.crop(int(self._counts(width, min(keep, self.length)).sum()))
        self.rows.crop(keep)

    def select(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        for width, pool in self.pools.items():
            if len(pool):
                pool.take(selected(self._counts(width, self.length), indices))
        self.rows.select(indices)

    def tensors(self) -> dict[str, Tensor]:
        """Everything held, spare room included."""
        held = self.rows.tensors()
        return held | {f"words.{b}": t for b, pool in self.pools.items() for t in pool.tensors().values()}
