"""Dense-and-sparse rows with a codebook: what `kvquant-published` stores keys and values as.

A token's elements of all heads `[C]`: codes of one width, outliers as value and index, as many as there are, and how
many there are. The first real tokens of a row may be exact; their codes exist too and are not read.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from kvcalib.errors import InputError
from kvcalib.evaluation.baselines.affine import uniform_layout
from kvcalib.evaluation.baselines.baseline import Place
from kvcalib.evaluation.baselines.ragged import Ragged, selected
from kvcalib.evaluation.baselines.stored import Codec, Track
from kvcalib.quant.quantizer import saturate

MOST = 1 << 15
"""Channels of a token that an index of two bytes reaches."""


class SparseCodec(Codec):
    """Codes of normalized elements, and outliers.

    Args:
        codebook: levels that codes are nearest to, ascending `[2**bits]`.
        back: what a code decodes to.
        sinks: exact first tokens.
        sparse: outliers are kept.
    """

    def __init__(self, place: Place, codebook: np.ndarray, back: np.ndarray, sinks: int, sparse: bool) -> None:
        if place.kv_heads * place.head_dim > MOST:
            raise InputError(
                f"a token of this model has {place.kv_heads} x {place.head_dim} channels, expected at most {MOST}: "
                "outliers are indexed with two bytes"
            )
        self.layout = uniform_layout(place.kv_heads, place.head_dim, len(codebook).bit_length() - 1)
        self.middles = torch.from_numpy((codebook[1:] + codebook[:-1]) / 2).float()
        self.back = torch.from_numpy(back).float()
        self.sinks, self.sparse = sinks, sparse
        self.heads = (place.kv_heads, place.head_dim)

    @abstractmethod
    def split(self, x: Tensor, exact: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """`x [B, t, C]` normalized, which elements are outliers, and what is stored of each token beside `[B, t]`."""

    @abstractmethod
    def scales(self, rows: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Zero and range of stored tokens, broadcast over `[B, t, C]`."""

    @staticmethod
    def normal(x: Tensor, zero: Tensor, half: Tensor) -> Tensor:
        """`(x - zero) / half`, 0 where there is no range."""
        wide = half.to(x.device).float()
        normal = (x - zero.to(x.device).float()) / torch.where(wide > 0, wide, 1.0)
        return torch.where(wide > 0, normal, 0.0)

    def track(self) -> Track:
        return SparseTrack(self)

    def encode(self, x: Tensor, exact: torch.dtype) -> dict[str, Tensor]:
        """Rows of `x [B, t, H, D]`; `outside [B, t, C]` says which elements are to be kept exact as well."""
        normal, outside, rows = self.split(x.flatten(2), exact)
        codes = torch.searchsorted(self.middles.to(x.device), normal.contiguous(), out_int32=True)
        words = self.layout.pack(codes.unflatten(-1, self.heads))
        return rows | {"words": words, "outside": outside}

    def decode(self, rows: Mapping[str, Tensor]) -> Tensor:
        """The dense part, float32 `[B, t, H, D]`."""
        codes = self.layout.unpack(rows["words"]).flatten(-2)
        zero, half = (t.to(codes.device).float() for t in self.scales(rows))
        return (zero + half * self.back.to(codes.device)[codes]).unflatten(-1, self.heads)


class SparseTrack(Track):
    """Rows, outliers in a `Ragged`, and sinks."""

    codec: SparseCodec

    def __init__(self, codec: SparseCodec) -> None:
        super().__init__(codec)
        self.outliers = Ragged()
        self.sink: dict[str, Tensor] = {}

    def append(self, x: Tensor, exact: torch.dtype, valid: Tensor | None = None) -> None:
        x = saturate(x, exact)
        self._keep_sinks(x, valid)
        made = self.codec.encode(x.float(), exact)
        outside = made.pop("outside")
        if not self.codec.sparse:
            self.packed.append(made)
            return
        made["count"] = outside.sum(-1, dtype=torch.int32)
        self.packed.append(made)
        # In the order (token, batch row).
        token, row, channel = outside.transpose(0, 1).nonzero(as_tuple=True)
        self.outliers.append({"value": x.flatten(2)[row, token, channel], "index": channel.short()})

    def _keep_sinks(self, x: Tensor, valid: Tensor | None) -> None:
        """Copy the first real tokens of every row, `slot` says which they are, -1 none yet."""
        sinks = self.codec.sinks
        if not sinks:
            return
        if not self.sink:
            self.sink["x"] = x.new_zeros(x.shape[0], sinks, *x.shape[2:])
            self.sink["slot"] = torch.full((x.shape[0], sinks), -1, dtype=torch.int32, device=x.device)
        real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if valid is None else valid.to(x.device)
        rank = (self.sink["slot"] >= 0).sum(1, keepdim=True) + real.int().cumsum(1) - 1
        row, token = (real & (rank < sinks)).nonzero(as_tuple=True)
        self.sink["x"][row, rank[row, token]] = x[row, token]
        self.sink["slot"][row, rank[row, token]] = (self.packed.length + token).int()

    def read(self) -> Tensor:
        rows = self.packed.read(0, self.packed.length)
        x = self.codec.decode(rows)
        if self.codec.sparse:
            flat = x.flatten(2).transpose(0, 1).contiguous()
            counts = rows["count"].long().T.flatten()
            places = torch.arange(len(counts), device=x.device).repeat_interleave(counts)
            held = self.outliers.read()
            flat.view(-1, flat.shape[-1])[places, held["index"].long()] = held["value"].float()
            x = flat.transpose(0, 1).reshape(x.shape)
        if self.sink:
            row, place = (self.sink["slot"] >= 0).nonzero(as_tuple=True)
            x[row, self.sink["slot"][row, place].long()] = self.sink["x"][row, place].float()
        return x

    def crop(self, keep: int) -> None:
        if keep >= self.packed.length:
            return
        if self.codec.sparse:
            self.outliers.crop(int(self.packed.read(0, keep)["count"].sum()))
        self.packed.crop(keep)
        if self.sink:
            self.sink["slot"][self.sink["slot"] >= keep] = -1

    def select(self, indices: Tensor) -> None:
        if self.packed.length and self.codec.sparse:
            self.outliers.take(selected(self.packed.read(0, self.packed.length)["count"], indices))
        self.packed.select(indices)
        self.sink = {name: t.index_select(0, indices.to(t.device)) for name, t in self.sink.items()}

    def tensors(self) -> dict[str, Tensor]:
        held = self.packed.tensors() | {f"outlier.{name}": t for name, t in self.outliers.tensors().items()}
        return held | {f"sink.{name}": t for name, t in self.sink.items()}
