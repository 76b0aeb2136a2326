"""The softmax that a kernel carries along (arXiv 1805.02867): mask, one step, the share at the end."""

# What Triton compiles has no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from kvcalib.runtime.kernels.arithmetic import LOG2E


@triton.jit
def masked(
    score, slot, live, query_live, query_slot, query_number, mask, mask_row, mask_column, softcap,
    MASK: tl.constexpr, SOFTCAP: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """Soft cap, then the mask: -inf where a query does not see a token."""
    if SOFTCAP:
        score = softcap * (1 - 2 / (1 + tl.exp2(score * (2 * LOG2E / softcap))))
    seen = live[None, :] & query_live[:, None]
    if SINGLE:
        # The only query is the last token: it sees every slot that its mask lets through.
        if MASK == 1:
            seen &= (tl.load(mask + slot * mask_column, mask=live, other=0) != 0)[None, :]
        elif MASK == 2:
            score += tl.load(mask + slot * mask_column, mask=live, other=0.0).to(tl.float32)[None, :]
    elif MASK == 0:
        seen &= slot[None, :] <= query_slot[:, None]
    else:
        place = (mask + query_number.to(tl.int64) * mask_row)[:, None] + (slot * mask_column)[None, :]
        if MASK == 1:
            seen &= tl.load(place, mask=seen, other=0) != 0
        else:
            score += tl.load(place, mask=seen, other=0.0).to(tl.float32)
    return tl.where(seen, score, -float("inf"))


@triton.jit
def soft(score, peak, total):
    """One step of the online softmax: weights `[M, N]`, the decay of what was, new peak and total `[M]`."""
    higher = tl.maximum(peak, tl.max(score, 1))
    # A row that has seen nothing keeps -inf; subtracting that would give NaN.
    base = tl.where(higher == -float("inf"), 0.0, higher)
    weight = tl.exp2((score - base[:, None]) * LOG2E)
    decay = tl.exp2((peak - base) * LOG2E)
    return weight, decay, higher, total * decay + tl.sum(weight, 1)


@triton.jit
def share_of(peak, total, sink_logits, query_head, query_live, SINK_LOGITS: tl.constexpr):
    """One over the softmax's denominator; 0 where a row has seen nothing."""
    if SINK_LOGITS:
        base = tl.where(peak == -float("inf"), 0.0, peak)
        logit = tl.load(sink_logits + query_head, mask=query_live, other=0.0).to(tl.float32)
        total += tl.exp2((logit - base) * LOG2E)
    return tl.where(total > 0, 1 / tl.where(total > 0, total, 1.0), 0.0)
