"""Attention over a packed layer: chunk by chunk, never a full-precision copy of the cache.

For every chunk of stored tokens: unpack, look up, rotate, score; the softmax is carried along as a running maximum and
sum (online softmax, arXiv 1805.02867). All arithmetic in float32. This is the reference path on every device;
`attend_packed` takes a fused kernel where there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kvcalib.model.taps import Call
from kvcalib.runtime import native, paths
from kvcalib.runtime.drawn import Drawn
from kvcalib.runtime.kernels.view import PackedView
from kvcalib.runtime.layers import chunks

QUERY_BLOCK = 1024

Chunks = Iterator[tuple[int, Tensor, Tensor]]


def attend_packed(
    call: Call, view: PackedView, drawn: Tensor | None = None, decay: float = 1.0, own: bool = False
) -> Tensor:
    """Attention of the call's queries over `view`; `[B, Q, Hq, Dv]` in their dtype, along the model's own axes.

    Args:
        drawn: float32 `[B, H, T + w]`, overwritten with the attention that the tokens drew: the sum over the group's
            heads and over queries, each times `decay` to the power of how many queries came after it.
        own: the queries' positions are the view's last ones, whatever the model says.
    """
    out = _attend(call, view, drawn, decay, own)
    return out if view.value.basis is None else view.value.basis.output_back(out)


def _attend(call: Call, view: PackedView, drawn: Tensor | None, decay: float, own: bool) -> Tensor:
    """`attend_packed` along the axes in which values are kept."""
    softcap, sink_logits = call.kwargs.get("softcap"), call.kwargs.get("s_aux")
    angles = call.angles
    path = paths.reading(call.query, view, angles)
    if path == "native":
        assert angles is not None
        return native.native_attention(
            call.query, view, angles, call.mask, call.scaling, softcap, sink_logits, rotate=True, drawn=drawn,
            decay=decay,
        )  # fmt: skip
    if own:
        last = view.positions if view.positions.ndim == 2 else view.positions[:, 0]
        query = call.rotate_at(call.query, last[:, view.total - call.query.shape[2] : view.total].clamp(min=0))
    else:
        query = call.rotate_new(call.query)
    if path == "triton":
        from kvcalib.runtime.kernels.attention import packed_attention

        return packed_attention(
            query, view, angles, call.mask, call.scaling, softcap, sink_logits, drawn=drawn, decay=decay
        )
    rotate = _rotation(call, view, query.dtype)
    log_sums: list[Tensor] = []
    out = chunked_attention(
        query, chunks(view), rotate, call.mask, view.total, call.scaling, softcap, sink_logits, log_sums=log_sums
    )
    if drawn is not None:
        drawn_attention(
            query, chunks(view), rotate, call.mask, view.total, call.scaling, softcap, log_sums, decay, drawn
        )
    return out


def _rotation(call: Call, view: PackedView, dtype: torch.dtype) -> Callable[[Tensor, int], Tensor]:
    """What turns keys `[B, H, t, D]` that begin at a slot of `view` to their positions."""
    if view.positions.ndim == 2:
        return lambda keys, start: call.rotate_at(keys.to(dtype), view.positions, start).float()
    heads = view.key.layout.widths.shape[0]

    # Heads that hold different tokens are turned as rows of a batch. Asked for as one tensor, so that angles are
    # computed once for all chunks.
    flat: list[Tensor] = []

    def rotate(keys: Tensor, start: int) -> Tensor:
        if not flat:
            flat.append(view.positions.expand(keys.shape[0], -1, -1).clamp(min=0).flatten(0, 1))
        single = keys.to(dtype).flatten(0, 1)[:, None]
        return call.rotate_at(single, flat[0], start).float().view(keys.shape[0], heads, *keys.shape[2:])

    return rotate


def chunked_attention(
    query: Tensor,
    chunks: Chunks,
    rotate: Callable[[Tensor, int], Tensor],
    mask: Tensor | None,
    length: int,
    scaling: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    drawn: Drawn | None = None,
    log_sums: list[Tensor] | None = None,
) -> Tensor:
    """Softmax attention of `query` over `length` cached tokens that come in chunks.

    Args:
        query: `[B, Hq, Q, D]`, rotated; the last Q of the `length` tokens.
        chunks: `(start, keys [B, H, t, D] un-rotated, values [B, H, t, Dv])`, float32, ascending.
        rotate: `(keys, start) -> keys` rotated to their positions.
        mask: None for plain causal, bool `[B or 1, 1, Q, length]` (True attends), or float to add.
        scaling: factor on the scores.
        softcap: `c * tanh(s / c)` on the scores (gemma2).
        sink_logits: `[Hq]`, a logit per head that takes its share of the softmax and no value (gpt-oss).
        drawn: takes the weights that it wants while they pass.
        log_sums: is given the log of the softmax's sum of every block of queries, `[B, H, G, q, 1]`.

    Returns:
        `[B, Q, Hq, Dv]` in the dtype of `query`.
    """
    batch, heads, queries, _ = query.shape
    state: list[list[Tensor]] = []
    blocks = range(0, queries, QUERY_BLOCK)
    wide = query.float() * scaling
    for start, keys, values in chunks:
        keys = rotate(keys, start)
        kv_heads = keys.shape[1]
        group = heads // kv_heads
        for number, first in enumerate(blocks):
            last = min(first + QUERY_BLOCK, queries)
            if len(state) <= number:
                shape = (batch, kv_heads, group, last - first)
                state.append(
                    [
                        wide.new_full((*shape, 1), -torch.inf),
                        wide.new_zeros((*shape, 1)),
                        wide.new_zeros((*shape, values.shape[-1])),
                    ]
                )
            if mask is None and start > length - queries + last - 1:
                continue
            scores = _scores(wide[:, :, first:last], keys, softcap, mask, first, start, length - queries)
            if drawn is not None:
                drawn.take(first, queries, length - queries, start, scores)
            _fold(state[number], scores, values.to(wide.dtype))
    parts = []
    for number, first in enumerate(blocks):
        _share_with_sinks(state[number], sink_logits)
        if drawn is not None:
            drawn.finish(first, *state[number][:2])
        if log_sums is not None:
            peak, total, _ = state[number]
            log_sums.append(torch.where(total > 0, peak + total.log(), torch.inf))
        parts.append(_finish(state[number]))
    return torch.cat(parts, dim=1).to(query.dtype)


def drawn_attention(
    query: Tensor,
    chunks: Chunks,
    rotate: Callable[[Tensor, int], Tensor],
    mask: Tensor | None,
    length: int,
    scaling: float,
    softcap: float | None,
    log_sums: list[Tensor],
    decay: float,
    out: Tensor,
) -> None:
    """Write the attention that each token drew to `out [B, H, length]`; see `attend_packed`.

    A second pass over the chunks, since a weight is known only when all scores are: `log_sums` and the other arguments
    as `chunked_attention` gave and took them.
    """
    queries = query.shape[2]
    wide = query.float() * scaling
    age = torch.arange(queries - 1, -1, -1, device=query.device)
    factor = torch.full_like(age, decay, dtype=torch.float32) ** age
    out.zero_()
    for start, keys, _ in chunks:
        keys = rotate(keys, start)
        for number, first in enumerate(range(0, queries, QUERY_BLOCK)):
            last = min(first + QUERY_BLOCK, queries)
            if mask is None and start > length - queries + last - 1:
                continue
            scores = _scores(wide[:, :, first:last], keys, softcap, mask, first, start, length - queries)
            # A float mask takes what it hides to the lowest number, not to -inf.
            hidden = scores < torch.finfo(scores.dtype).min / 2
            weights = (scores - log_sums[number]).exp_().masked_fill_(hidden, 0.0)
            part = torch.einsum("bhgqt,q->bht", weights, factor[first:last])
            out[..., start : start + keys.shape[2]] += part


def _scores(
    rows: Tensor, keys: Tensor, softcap: float | None, mask: Tensor | None, first: int, start: int, past: int
) -> Tensor:
    """Masked scores `[B, H, G, q, t]` of scaled queries `[B, Hq, q, D]`, number `first` on, and keys `[B, H, t, D]`."""
    batch, heads, count = rows.shape[:3]
    kv_heads = keys.shape[1]
    flat = rows.reshape(batch, kv_heads, heads // kv_heads * count, -1)
    scores = (flat @ keys.transpose(2, 3).to(rows.dtype)).view(batch, kv_heads, -1, count, keys.shape[2])
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return _masked(scores, mask, first, start, past)


def _masked(scores: Tensor, mask: Tensor | None, first: int, start: int, past: int) -> Tensor:
    """Apply the part of the mask that belongs to queries from `first` and keys from `start`."""
    queries, count = scores.shape[-2:]
    if mask is None:
        if start + count - 1 <= past + first:
            return scores
        q = torch.arange(past + first, past + first + queries, device=scores.device)
        k = torch.arange(start, start + count, device=scores.device)
        return scores.masked_fill(k[None, :] > q[:, None], -torch.inf)
    part = mask[:, :, first : first + queries, start : start + count].unsqueeze(1)
    if part.dtype == torch.bool:
        return scores.masked_fill(~part, -torch.inf)
    return scores + part.float()


def _fold(state: list[Tensor], scores: Tensor, values: Tensor) -> None:
    """Take `scores [B, H, G, Q, t]` and `values [B, H, t, Dv]` into the running softmax."""
    peak, total, sums = state
    higher = torch.maximum(peak, scores.amax(-1, keepdim=True))
    # A row that has seen nothing but masked keys keeps -inf; subtracting it would give NaN.
    base = higher.clamp(min=torch.finfo(scores.dtype).min)
    weights = torch.exp(scores - base)
    decay = torch.exp(peak - base)
    flat = weights.flatten(2, 3) @ values
    state[0] = higher
    state[1] = total * decay + weights.sum(-1, keepdim=True)
    state[2] = sums * decay + flat.view_as(sums)


def _share_with_sinks(state: list[Tensor], sink_logits: Tensor | None) -> None:
    """Give the logits of gpt-oss their share of the sum."""
    if sink_logits is not None:
        peak, total, _ = state
        extra = sink_logits.float().view(1, peak.shape[1], peak.shape[2], 1, 1)
        state[1] = total + torch.exp(extra - peak.clamp(min=torch.finfo(peak.dtype).min))


def _finish(state: list[Tensor]) -> Tensor:
    """The normalised output of one query block, `[B, Q, Hq, Dv]`; rows without any key give zeros."""
    _, total, sums = state
    out = sums / torch.where(total > 0, total, 1.0)
    return out.flatten(1, 2).transpose(1, 2)
