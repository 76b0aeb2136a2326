"""What letting tokens go, and keeping the others quantized, costs the queries that come: in nats, to second order.

Query i of one head computes x_i = sum_t a_it v_t. With the tokens D gone and the others renormalised it is off by
sum_D a_it (v_t - c), c the mean value of what stayed. Over later queries a_it has the mean m_t and the variance
s_t - m_t^2; taken as independent between tokens, the mean square of that error is

    |sum_D m_t (v_t - c)|^2 + sum_D (s_t - m_t^2) |v_t - c|^2 + sum_K s_t (|v^_t - v_t|^2 + r_t^2 |v_t - c|^2)

where the last sum is over the tokens K that stay: their values are off by v^ - v, and their attention by the factor
1 + r, because their keys are. Attention mass alone misleads where attention is spread evenly, as in many first layers:
there the tokens that draw most are a biased sample, and the first term counts.

Of a context only sampled tokens are there; they are taken for a context of their own.

A squared error in channel d costs half of what Fisher says of the head's output, `E[(dL/dx_d)^2]`. Value Fisher is
`(sum_i a_it dL/dx_i)^2`, so with gradients independent between queries that is its sum over the sum of a^2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcalib.allocation.contexts import Contexts


@dataclass(frozen=True)
class Stakes:
    """Tokens of S contexts, for H kv heads.

    Attributes:
        mean, square: m and s, mean and mean square of the weights that later queries give, `[S, H, M]`.
        value: `[S, H, M, D]`, scaled so that squares are nats.
        noise: `|v^ - v|^2` in that scale. drift: r^2. Both `[S, H, M]`.
        group: query heads of a kv head.
    """

    mean: Tensor
    square: Tensor
    value: Tensor
    noise: Tensor
    drift: Tensor
    group: int

    def loss(self, contexts: Contexts, kept: Tensor) -> Tensor:
        """Predicted loss of keeping `kept [S, H, M]` and what is not free: nats per later query, `[S]` float64."""
        stays = contexts.held[:, None] & (kept | ~contexts.free[:, None])
        m = torch.where(stays, self.mean, 0)
        size = m.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        centre = torch.einsum("shm,shmd->shd", m / size, self.value)
        apart = self.value - centre[:, :, None]
        gone = torch.where(stays, 0, self.mean)
        bias = torch.einsum("shm,shmd->shd", gone, apart).square().sum(-1)
        spread = torch.where(stays, self.square * self.drift, (self.square - self.mean.square()).clamp(min=0))
        own = (spread * apart.square().sum(-1)).sum(-1) + (self.square * self.noise * stays).sum(-1)
        return self.group * (bias + own).double().sum(1)


def output_fisher(value_fisher: Tensor, square: Tensor) -> Tensor | None:
    """`E[(dL/dx)^2]` of an attention head's output, per channel: `[H, D]` float32; None if no query says anything.

    Args:
        value_fisher: `[n, H, D]` of tokens that only later queries see. square: `[n, H]`, their sum of a^2.
    """
    drawn = square.double().sum(0)
    if not len(square) or not bool((drawn > 0).all()):
        return None
    return (value_fisher.double().sum(0) / drawn[:, None]).float()
