"""Error feedback while rounding: a channel's rounding makes up for what was done to the channels before it.

The loss that an error `e = x^ - x` of one head's key or value causes is, to second order, `e' C e / 2` with C the mean
of `g g'` over tokens, g the gradient of the loss with respect to that key or value. Rounding every channel to its
nearest centroid heeds the diagonal of C alone. With `C = M' diag(d) M`, M unit lower triangular in the order in which
channels are rounded, the loss is `sum_k d_k (e_k + sum_{j<k} M_kj e_j)^2 / 2`; so channel k is rounded to the centroid
nearest to `x_k - sum_{j<k} M_kj e_j`. That is Babai's nearest plane (Combinatorica 6, 1986), and what GPTQ (Frantar et
al., arXiv 2210.17323) does to the columns of a weight matrix. Channels of few bits come first, so that finer ones make
up for them.

Only the choice of codes changes. What is stored, how it is read and how large it is do not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcalib.quant.codebook import Codebook
from kvcalib.quant.feedback_loop import round_tokens

DAMPING = 0.1
"""Share of the mean of C's diagonal that is added to the diagonal: C is a mean over a sample, and heavy feedback makes
large errors of the later channels."""


class Feedback:
    """What the errors of a head's channels do to the targets of those that are rounded later.

    Attributes:
        widths: `[H, D]` uint8, of the channels.
        triangle: `[H, D (D - 1) / 2]` float32, what lies above the diagonal of `matrix`, row by row.
    """

    def __init__(self, widths: Tensor, triangle: Tensor) -> None:
        """ValueError if `triangle` is not of the shape that goes with `widths`."""
        heads, channels = widths.shape
        if triangle.shape != (heads, channels * (channels - 1) // 2):
            raise ValueError(
                f"feedback is {tuple(triangle.shape)}, expected {(heads, channels * (channels - 1) // 2)} for widths "
                f"{(heads, channels)}"
            )
        self.widths, self.triangle = widths, triangle
        self._placed: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @classmethod
    def from_curvature(cls, curvature: Tensor, widths: Tensor, damping: float = DAMPING) -> Feedback:
        """The feedback of channels of `widths [H, D]`, for the loss's `curvature [H, D, D]`: symmetric, no eigenvalue
        below 0.

        Raises:
            ValueError: the curvature is not of that shape, or holds NaN or infinities.
        """
        heads, channels = widths.shape
        if curvature.shape != (heads, channels, channels) or not bool(torch.isfinite(curvature).all()):
            raise ValueError(
                f"curvature is {tuple(curvature.shape)}, expected finite numbers {(heads, channels, channels)}"
            )
        order = rounding_order(widths)
        c = curvature.double().cpu()
        mean = c.diagonal(dim1=1, dim2=2).mean(1)
        # Of a head that no loss depends on, nothing is known: nearest rounding. The scale of C does not matter.
        c = c / torch.where(mean > 0, mean, 1.0)[:, None, None]
        c = c + torch.eye(channels, dtype=torch.float64) * torch.where(mean > 0, damping, 1.0)[:, None, None]
        c = c.gather(1, order[..., None].expand_as(c)).gather(2, order[:, None].expand_as(c))
        # From the last place to the first: C = U diag(d) U' with U = M' unit upper triangular.
        lower = torch.linalg.cholesky(c.flip(1, 2))
        lower = lower / lower.diagonal(dim1=1, dim2=2)[:, None]
        row, column = torch.triu_indices(channels, channels, 1)
        return cls(widths, lower.flip(1, 2)[:, row, column].float())

    @property
    def order(self) -> Tensor:
        """`[H, D]` int64, the channels in the order in which they are rounded."""
        return self.tables(torch.device("cpu"))[0]

    @property
    def matrix(self) -> Tensor:
        """`[H, D, D]` float32, strictly upper triangular, by place in that order: `matrix[h, j, k]` is `M_kj`."""
        return self.tables(torch.device("cpu"))[1]

    def tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """`(order, matrix)` on `device`; made when first asked for, since they take twice the triangle's room."""
        if device not in self._placed:
            heads, channels = self.widths.shape
            matrix = torch.zeros(heads, channels, channels)
            row, column = torch.triu_indices(channels, channels, 1)
            matrix[:, row, column] = self.triangle
            self._placed[device] = rounding_order(self.widths).to(device), matrix.to(device)
        return self._placed[device]

    def encode(
        self, codebook: Codebook, x: Tensor, codes: Tensor, exact: Tensor | None, grid: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """Codes of `x [N, H, D]` float32, int32 `[N, H, D]`.

        Args:
            codes: of nearest rounding, int32 `[N, H, D]`: what exact elements keep.
            exact: bool `[N, H, D]`, elements that are stored exactly and have no error; None for none.
            grid: zero and scale `[N, H]` float32, as stored, of a codebook that is relative to them; else None.
        """
        if exact is None:
            exact = torch.zeros_like(x, dtype=torch.bool)
        if x.device.type == "cpu":
            return self._looped(codebook, x, codes, exact, grid)
        return self._stepped(codebook, x, codes, exact, grid)

    def _looped(
        self, codebook: Codebook, x: Tensor, codes: Tensor, exact: Tensor, grid: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        heads, channels = self.widths.shape
        centroids, middle = (t.reshape(heads, channels, -1).numpy() for t in codebook.tables(x.device))
        zero, scale = grid or (torch.zeros(x.shape[:2]), torch.ones(x.shape[:2]))
        made = codes.contiguous().clone()
        round_tokens(
            x.contiguous().numpy(), exact.contiguous().numpy(), grid is not None, zero.contiguous().numpy(),
            scale.contiguous().numpy(), centroids, middle, self.order.numpy(), self.matrix.numpy(), made.numpy(),
        )  # fmt: skip
        return made

    def _stepped(
        self, codebook: Codebook, x: Tensor, codes: Tensor, exact: Tensor, grid: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """The same by tensor operations: a step for each place, all tokens and heads at once."""
        order, matrix = self.tables(x.device)
        heads, channels = order.shape
        centroids, middle = (t.reshape(heads, channels, -1) for t in codebook.tables(x.device))
        head = torch.arange(heads, device=x.device)
        target = x[:, head[:, None], order]
        made = codes.clone()
        for place in range(channels):
            c = order[:, place]
            value = target[:, :, place]
            if grid is not None:
                zero, scale = grid
                value = (value - zero) / torch.where(scale > 0, scale, 1.0)
            code = (middle[head, c] < value[..., None]).sum(-1)
            stored = centroids[head, c, code]
            if grid is not None:
                # In two operations: one might be contracted, with one rounding less.
                stored = scale * stored
                stored = zero + stored
            kept = exact[:, head, c]
            error = torch.where(kept, 0.0, stored - x[:, head, c])
            made[:, head, c] = torch.where(kept, made[:, head, c], code.int())
            change = matrix[:, place, place + 1 :] * error[..., None]
            target[:, :, place + 1 :] -= change
        return made


def rounding_order(widths: Tensor) -> Tensor:
    """`[H, D]` int64: each head's channels by ascending width, of one width in their own order."""
    return widths.cpu().long().argsort(dim=1, stable=True)
