"""How much attention each token draws, in blocks of queries: never a T x T matrix per layer kept.

Accumulated attention (H2O, Q-Hitter): the sum over all queries. Windowed maximum (QAQ): the largest weight from the
first `window` queries that can see the token, itself included. Late attention (what adaptive widths are chosen by): the
mean over the later half of these queries. GQA groups are summed, maximised, or averaged, per kv head.

Early attention: the sum over the queries of the sequence's first half, with its slope: how it would change with the
token's key. Eviction looks at a context in its middle; what the second half attends to says whether it chose well.

`BlockAttention` is attention and these figures in one pass, with its own backward pass: on a CPU, torch's fused
attention takes two and a half times its forward pass to go back, and the weights would be computed twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

BLOCK = 128


class Drawn(NamedTuple):
    """Attention that each token of full sequences draws, float32 `[B, H, T]`, `slope [B, H, T, D]`.

    Attributes:
        total: sum over the queries and the group's heads.
        peak: maximum over the group and over the queries t .. t + window - 1.
        late: mean over the group and the queries t + window // 2 .. t + window - 1, in which queries after the
            sequence's end count as 0.
        early: as `total`, over the queries of the sequence's first half: 0 .. T // 2 - 1.
        slope: gradient of a token's `early` with respect to its own rotated key, the other keys as they are:
            `scaling * sum of a (1 - a) q`, with a the weight that query q gives the token.
        square: sum of a^2 over the queries of the second half and the group's heads.
    """

    total: Tensor
    peak: Tensor
    late: Tensor
    early: Tensor
    slope: Tensor
    square: Tensor

    @classmethod
    def zeros(cls, key: Tensor) -> Drawn:
        """Nothing drawn yet by `key [B, H, T, D]`."""
        total, peak, late, early, square = (torch.zeros(key.shape[:3], device=key.device) for _ in range(5))
        return cls(total, peak, late, early, torch.zeros_like(key), square)


def drawn_attention(
    query: Tensor,
    key: Tensor,
    scaling: float,
    window: int,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    sliding: int | None = None,
) -> Drawn:
    """Attention that causal queries pay to every token of full sequences.

    Args:
        query: `[B, Hq, T, D]`, rotated. key: `[B, H, T, D]`, rotated.
        sliding: how many tokens a query sees, itself included; None for all.
    """
    key = key.float()
    drawn = Drawn.zeros(key)
    kv_heads, group = key.shape[1], query.shape[1] // key.shape[1]
    for start, stop, rows, scores in _blocks(query.float(), key, scaling, softcap):
        if sliding is not None:
            age = torch.arange(start, stop, device=key.device)[:, None] - torch.arange(stop, device=key.device)
            scores.masked_fill_(age >= sliding, -torch.inf)
        if sink_logits is not None:
            extra = sink_logits.float().view(1, kv_heads, group, 1, 1).expand(*scores.shape[:-1], 1)
            weights = torch.cat([scores, extra], -1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        # What the softcap leaves of a score's slope; masked scores are infinite and have none.
        steep = None if softcap is None else (1 - (scores / softcap).square()).clamp_(min=0)
        _add_drawn(weights, rows, start, stop, window, drawn, steep)
    return drawn


class BlockAttention(torch.autograd.Function):
    """Causal attention of full sequences, float32: `apply(query, key, value, scaling, window)`.

    Takes rotated `query [B, Hq, T, D]`, `key [B, H, T, D]` and `value [B, H, T, Dv]`; returns the output
    `[B, Hq, T, Dv]` and, without gradient, the tensors of `Drawn` as `drawn_attention` does. The backward pass computes
    the weights of a block again from its scores and their log-sum-exp, as FlashAttention does (arXiv 2205.14135).
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int) -> tuple[Tensor, ...]:
        """See the class."""
        out = query.new_empty(*query.shape[:3], value.shape[3])
        log_sum = query.new_empty(query.shape[:3])
        drawn = Drawn.zeros(key)
        for start, stop, rows, scores in _blocks(query, key, scaling):
            highest = scores.amax(-1, keepdim=True)
            weights = scores.sub_(highest).exp_()
            norm = weights.sum(-1, keepdim=True)
            weights.div_(norm)
            _add_drawn(weights, rows, start, stop, window, drawn)
            mixed = weights.flatten(2, 3) @ value[:, :, :stop]
            out[:, :, start:stop] = mixed.view(*weights.shape[:4], -1).flatten(1, 2)
            log_sum[:, :, start:stop] = (highest + norm.log()).squeeze(-1).flatten(1, 2)
        ctx.save_for_backward(query, key, value, out, log_sum)
        ctx.scaling = scaling
        ctx.mark_non_differentiable(*drawn)
        return out, *drawn

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, Tensor, Tensor, None, None]:
        """See the class."""
        query, key, value, out, log_sum = ctx.saved_tensors
        kv_heads = key.shape[1]
        grad_query = torch.empty_like(query) if ctx.needs_input_grad[0] else None
        grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
        # What softmax's derivative takes off every weight: the output times its own gradient.
        inner = (grad * out).sum(-1)
        for start, stop, rows, scores in _blocks(query, key, ctx.scaling):
            weights = scores.sub_(_grouped(log_sum[:, :, start:stop], kv_heads)[..., None]).exp_().flatten(2, 3)
            above = _grouped(grad[:, :, start:stop], kv_heads).flatten(2, 3)
            grad_value[:, :, :stop] += weights.transpose(2, 3) @ above
            slope = above @ value[:, :, :stop].transpose(2, 3)
            slope.sub_(_grouped(inner[:, :, start:stop], kv_heads).flatten(2, 3)[..., None]).mul_(weights)
            # The rows already carry the scaling.
            grad_key[:, :, :stop] += slope.transpose(2, 3) @ rows
            if grad_query is not None:
                part = (slope @ key[:, :, :stop]).mul_(ctx.scaling)
                shape = (part.shape[0], kv_heads, -1, stop - start, part.shape[3])
                grad_query[:, :, start:stop] = part.view(shape).flatten(1, 2)
        return grad_query, grad_key, grad_value, None, None


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """`[B, Hq, ...]` to `[B, H, G, ...]`."""
    return x.unflatten(1, (kv_heads, -1))


def _blocks(
    query: Tensor, key: Tensor, scaling: float, softcap: float | None = None
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """`(start, stop, rows [B, H, G * q, D], scores [B, H, G, q, stop])` of each block of queries, masked causally.

    `rows` are the block's queries times `scaling`.
    """
    kv_heads, length = key.shape[1], query.shape[2]
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        grouped = _grouped(query[:, :, start:stop], kv_heads)
        rows = grouped.flatten(2, 3) * scaling
        scores = (rows @ key[:, :, :stop].transpose(2, 3)).view(*grouped.shape[:4], stop)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        # Only the last keys hold any that a query of this block may not see.
        later = torch.ones(stop - start, stop - start, dtype=torch.bool, device=key.device).triu_(1)
        scores[..., start:].masked_fill_(later, -torch.inf)
        yield start, stop, rows, scores


def _add_drawn(
    weights: Tensor, rows: Tensor, start: int, stop: int, window: int, drawn: Drawn, steep: Tensor | None = None
) -> None:
    """Take the weights of the queries `start..stop`, `[B, H, G, q, stop]`, and their `rows` into `drawn`.

    `steep`, like `weights`: what each score's slope is multiplied by.
    """
    total, peak, late, early, slope, square = drawn
    summed = weights.sum((2, 3))
    total[..., :stop] += summed
    strongest = weights.amax(2)
    for offset in range(min(window, stop)):
        first = max(start - offset, 0)
        seen = strongest[:, :, first + offset - start :]
        drawn_then = seen[..., first : stop - offset].diagonal(dim1=2, dim2=3)
        peak[..., first : stop - offset] = torch.maximum(peak[..., first : stop - offset], drawn_then)
        if offset >= window // 2:
            queries = weights[:, :, :, first + offset - start :, first : stop - offset]
            each = queries.diagonal(dim1=3, dim2=4).mean(2)
            late[..., first : stop - offset] += each / (window - window // 2)
    inside = max(0, min(stop, early.shape[-1] // 2) - start)
    if start + inside < stop:
        square[..., :stop] += weights[:, :, :, inside:].square().sum((2, 3))
    if not inside:
        return
    whole = start + inside == stop
    group, stop = weights.shape[2], start + inside
    weights = weights[:, :, :, :inside, :stop]
    early[..., :stop] += summed if whole else weights.sum((2, 3))
    pull = torch.addcmul(weights, weights, weights, value=-1)
    if steep is not None:
        pull.mul_(steep[:, :, :, :inside, :stop])
    # The rows already carry the scaling.
    queries = rows.unflatten(2, (group, -1))[:, :, :, :inside].flatten(2, 3)
    slope[:, :, :stop] += pull.flatten(2, 3).transpose(2, 3) @ queries
