"""One tensor's quantizer: keys or values of one layer, in and out of packed form.

Keys, and values in a basis of their own (`basis.py`): `x = codebook[h, d][code]`. Values as the model has them:
`x = zero + scale * codebook[h, d][code]` with zero and scale per token or per token and head. In all, a fixed number of
elements per group is kept exact (`outliers.py`). This class is what the cache stores through, what the calibration
predicts with and what friendliness measures: one definition of the error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvcalib.quant import outliers
from kvcalib.quant.basis import Basis
from kvcalib.quant.codebook import Codebook
from kvcalib.quant.feedback import Feedback
from kvcalib.quant.packing import Layout

Scope = Literal["token", "head"]
Rows = dict[str, Tensor]
"""What is stored of N tokens: name to tensor, the token first. `words [N, W]`; with outliers `outlier_index` and
`outlier_value [N, G, n]`; of relative codebooks `zero` and `scale [N, G]`. G is 1 (scope "token") or H ("head")."""

BYTE_INDEXED = 256
"""Elements of a group up to which an outlier's index takes one byte."""


@dataclass(eq=False)
class Quantizer:
    """Quantizer of the keys or the values of one layer.

    Attributes:
        codebook: centroids per head and channel.
        layout: where each channel's code lies in a row.
        relative: whether the codebook is relative to zero and scale of the group.
        scope: what a group is: all heads of a token, or each head of a token.
        outliers: exact elements per group.
        weight: `[H, D]` float32, mean Fisher of each channel; the exact elements are those that save the most of it.
        feedback: how a channel's rounding makes up for the errors of others; None for nearest rounding.
        basis: the axes along which `encode` takes its elements and `decode` gives them back; who has the model's own
            turns them forth and back, or calls `round_trip`. None for the model's own.
    """

    codebook: Codebook
    layout: Layout
    relative: bool
    scope: Scope
    outliers: int
    weight: Tensor
    feedback: Feedback | None = None
    basis: Basis | None = None

    @property
    def groups(self) -> int:
        """Groups of one token: 1 or H."""
        return self.layout.widths.shape[0] if self.scope == "head" else 1

    def encode(self, x: Tensor, exact_dtype: torch.dtype) -> Rows:
        """`x [N, H, D]` to rows; exact elements, zero and scale are kept in `exact_dtype` (2 bytes).

        Which elements are exact is decided by nearest rounding, with feedback too.
        """
        x = x.float()
        grouped = x.reshape(x.shape[0], self.groups, -1)
        rows: Rows = {}
        if self.relative:
            lower, upper, index = outliers.shortest_window(grouped, self.outliers)
            rows["zero"] = saturate((lower + upper) / 2, exact_dtype)
            rows["scale"] = saturate((upper - lower) / 2, exact_dtype)
            # Codes are taken against the rounded zero and scale, so that rounding them costs next to nothing.
            scale = rows["scale"].float()[..., None]
            normal = (grouped - rows["zero"].float()[..., None]) / torch.where(scale > 0, scale, 1.0)
            codes = self.codebook.encode(normal.reshape(x.shape))
        else:
            codes = self.codebook.encode(x)
            error = (x - self.codebook.decode(codes)).square() * self.weight.to(x.device)
            index = outliers.largest(error.reshape(grouped.shape), self.outliers)
        if self.outliers:
            rows["outlier_value"] = saturate(grouped.gather(-1, index), exact_dtype)
            rows["outlier_index"] = index.to(self.index_dtype)
        if self.feedback is not None:
            codes = self.feedback.encode(self.codebook, x, codes, self._exact(x, index), self._grid(x, rows))
        rows["words"] = self.layout.pack(codes)
        return rows

    def _exact(self, x: Tensor, index: Tensor) -> Tensor | None:
        """Which elements of `x [N, H, D]` are those of `index [N, G, n]` in their groups; None if there are none."""
        if not self.outliers:
            return None
        exact = torch.zeros(
            (x.shape[0], self.groups, self.layout.widths.numel() // self.groups), dtype=torch.bool, device=x.device
        )
        return exact.scatter_(-1, index, True).view(x.shape)

    def _grid(self, x: Tensor, rows: Rows) -> tuple[Tensor, Tensor] | None:
        """Zero and scale of every head `[N, H]` as they are stored; None for keys."""
        if not self.relative:
            return None
        zero, scale = (rows[name].float().expand(x.shape[:2]) for name in ("zero", "scale"))
        return zero, scale

    def decode(self, rows: Rows) -> Tensor:
        """Rows of N tokens back to float32 `[N, H, D]`."""
        codes = self.layout.unpack(rows["words"])
        x = self.codebook.decode(codes)
        grouped = x.reshape(x.shape[0], self.groups, -1)
        if self.relative:
            grouped = torch.addcmul(rows["zero"].float()[..., None], rows["scale"].float()[..., None], grouped)
        if self.outliers:
            grouped = grouped.scatter(-1, rows["outlier_index"].long(), rows["outlier_value"].float())
        return grouped.reshape(x.shape)

    def along(self, x: Tensor) -> Tensor:
        """The model's keys or values `[N, H, D]` as `encode` takes them."""
        return x if self.basis is None else self.basis.rows_forth(x)

    def round_trip(self, x: Tensor, exact_dtype: torch.dtype) -> Tensor:
        """The model's keys or values `[N, H, D]` as they come back from storage, float32."""
        found = self.decode(self.encode(self.along(x), exact_dtype))
        return found if self.basis is None else self.basis.rows_back(found)

    def row_spec(self, exact_dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of what is stored of one token, by name; see `Rows`."""
        spec: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"words": ((self.layout.words,), torch.int32)}
        if self.outliers:
            spec["outlier_index"] = ((self.groups, self.outliers), self.index_dtype)
            spec["outlier_value"] = ((self.groups, self.outliers), exact_dtype)
        if self.relative:
            spec["zero"] = spec["scale"] = ((self.groups,), exact_dtype)
        return spec

    @property
    def index_dtype(self) -> torch.dtype:
        """One byte where a group has at most 256 elements, else two."""
        return torch.uint8 if self.layout.widths.numel() // self.groups <= BYTE_INDEXED else torch.int16


def saturate(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in a two-byte type, at its largest number where it would overflow to infinity."""
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype)
