"""KL divergence of two sets of logits, with its gradient, in blocks: vocabularies are large."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BLOCK = 512


class ForwardKL(torch.autograd.Function):
    """`apply(expected, found)`: sum over positions of KL(softmax(expected) || softmax(found)), logits `[N, V]`.

    In nats, float64. The gradient is with respect to `found` alone, `softmax(found) - softmax(expected)`; it is
    computed on the way, in the logits' dtype, and nothing else of their size is kept.
    """

    @staticmethod
    def forward(ctx: Any, expected: Tensor, found: Tensor) -> Tensor:
        """See the class."""
        total = found.new_zeros((), dtype=torch.float64)
        gradient = torch.empty_like(found) if ctx.needs_input_grad[1] else None
        for start in range(0, len(found), BLOCK):
            part = slice(start, start + BLOCK)
            p, q = expected[part].float().log_softmax(-1), found[part].float().log_softmax(-1)
            total += (p.exp() * (p - q)).sum(dtype=torch.float64)
            if gradient is not None:
                gradient[part] = q.exp() - p.exp()
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[None, Tensor]:
        """See the class."""
        (gradient,) = ctx.saved_tensors
        return None, gradient * upstream[0].to(gradient.dtype)
