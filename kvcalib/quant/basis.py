"""Values in a basis of their own: an orthogonal map of each head, the principal axes of its values.

Channels of a head's values vary together, and one codebook a channel cannot know that. Along the principal axes of
their covariance (Pearson, 1901; as a code's transform: the Karhunen-Loeve transform) they do not vary together, so that
bits go where the variance is. A token's own zero and scale no longer pay then, and its row has none.

With `R [D, D]` orthogonal, a value `v` is kept as `v R`. Attention is linear in its values, so its output over what is
kept is turned back by `R'` once per query and head, however many tokens there are; nothing is turned at reading.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Basis:
    """The axes along which each head's values are kept.

    Attributes:
        matrix: `[H, D, D]` float32, orthogonal; column k of a head is its k-th axis.
    """

    def __init__(self, matrix: Tensor) -> None:
        """ValueError if `matrix` is not of that shape."""
        if matrix.ndim != 3 or matrix.shape[1] != matrix.shape[2]:
            raise ValueError(f"basis is {tuple(matrix.shape)}, expected a square matrix for each head")
        self.matrix = matrix.float()
        self._placed: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @classmethod
    def principal(cls, x: Tensor) -> Basis:
        """The principal axes of a sample `x [n, H, D]` of values: those of the most variance first.

        Each points to where its component of the largest magnitude is positive, so that one sample has one basis.

        Raises:
            ValueError: `x` has no token, or holds NaN or infinities.
        """
        wide = x.double().cpu()
        if not len(wide) or not bool(torch.isfinite(wide).all()):
            raise ValueError(f"a basis takes finite values of 1 token or more, found {tuple(x.shape)}")
        centred = (wide - wide.mean(0)).transpose(0, 1)
        axes = torch.linalg.eigh(centred.transpose(1, 2) @ centred).eigenvectors.flip(2)
        largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
        return cls(axes * largest.sign())

    def forth(self, x: Tensor) -> Tensor:
        """Values `[B, H, T, D]` along the axes, in the type of `x`."""
        return self._turned(x, 0)

    def back(self, x: Tensor) -> Tensor:
        """Values `[B, H, T, D]` that lie along the axes, as the model has them, in the type of `x`."""
        return self._turned(x, 1)

    def rows_forth(self, x: Tensor) -> Tensor:
        """`forth` of rows `[N, H, D]`."""
        return self.forth(x.transpose(0, 1)[None])[0].transpose(0, 1)

    def rows_back(self, x: Tensor) -> Tensor:
        """`back` of rows `[N, H, D]`."""
        return self.back(x.transpose(0, 1)[None])[0].transpose(0, 1)

    def output_back(self, out: Tensor) -> Tensor:
        """An attention's output `[B, Q, Hq, D]` over values along the axes, as over those of the model."""
        batch, queries, query_heads, channels = out.shape
        grouped = out.reshape(batch, queries, len(self.matrix), -1, channels).permute(2, 0, 1, 3, 4)
        turned = self._product(grouped.reshape(len(self.matrix), -1, channels), 1).view(grouped.shape)
        return turned.permute(1, 2, 0, 3, 4).reshape(batch, queries, query_heads, channels)

    def curvature_forth(self, curvature: Tensor) -> Tensor:
        """A curvature `[H, D, D]` of the loss with respect to values, with respect to those along the axes."""
        matrix = self.matrix.to(curvature)
        return matrix.transpose(1, 2) @ curvature @ matrix

    def _turned(self, x: Tensor, which: int) -> Tensor:
        batch, heads, tokens, channels = x.shape
        flat = x.transpose(0, 1).reshape(heads, batch * tokens, channels)
        return self._product(flat, which).view(heads, batch, tokens, channels).transpose(0, 1)

    def _product(self, flat: Tensor, which: int) -> Tensor:
        """Rows `[H, N, D]` times each head's matrix (0) or its transpose (1), in the type of `flat`."""
        matrix = self._tables(flat.device)[which]
        if flat.dtype == torch.float64:
            return flat @ matrix.double()
        return (flat.float() @ matrix).to(flat.dtype)

    def _tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._placed:
            there = self.matrix.to(device)
            self._placed[device] = there, there.transpose(1, 2).contiguous()
        return self._placed[device]
