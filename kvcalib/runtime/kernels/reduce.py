"""The reduction: stretches of one output row, joined in a fixed order (flash-decoding)."""

# What Triton compiles has no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from kvcalib.runtime.kernels.arithmetic import LOG2E, narrow
from kvcalib.runtime.kernels.drawn import keep_norms
from kvcalib.runtime.kernels.softmax import share_of


@triton.jit(do_not_specialize=["queries", "splits"])
def reduce_kernel(
    partial, peaks, out, v_channels, sink_logits, queries, splits, norms,
    HEADS: tl.constexpr, GROUP: tl.constexpr, VALUE_DIM: tl.constexpr, PADDED: tl.constexpr, M: tl.constexpr,
    AT_ONCE: tl.constexpr, SINK_LOGITS: tl.constexpr, DRAWN: tl.constexpr,
):  # fmt: skip
    """One output row per program: the stretches of `partial [.., splits, M, Dv]` in ascending order."""
    row = tl.program_id(0)
    per_head = GROUP * queries
    local = row % per_head
    head = (row // per_head) % HEADS
    batch = (row // per_head // HEADS).to(tl.int64)
    tile = (row // per_head).to(tl.int64) * tl.cdiv(per_head, M) + local // M
    c = tl.arange(0, PADDED)
    inside = c < VALUE_DIM
    peak = -float("inf")
    total = 0.0
    acc = tl.zeros([PADDED], tl.float32)
    for start in range(0, splits, AT_ONCE):
        number = start + tl.arange(0, AT_ONCE)
        there = number < splits
        place = (tile * splits + number) * M + local % M
        theirs = tl.load(peaks + 2 * place, mask=there, other=-float("inf"))
        totals = tl.load(peaks + 2 * place + 1, mask=there, other=0.0)
        x = tl.load(partial + place[:, None] * VALUE_DIM + c[None, :], mask=there[:, None] & inside[None, :], other=0.0)
        higher = tl.maximum(peak, tl.max(theirs, 0))
        base = tl.where(higher == -float("inf"), 0.0, higher)
        decay = tl.exp2((peak - base) * LOG2E)
        weight = tl.exp2((theirs - base) * LOG2E)
        total = total * decay + tl.sum(totals * weight, 0)
        acc = acc * decay + tl.sum(x * weight[:, None], 0)
        peak = higher
    query_head = head * GROUP + local % GROUP
    share = share_of(peak, total, sink_logits, query_head, True, SINK_LOGITS)
    channel = tl.load(v_channels + head * VALUE_DIM + c, mask=inside, other=0)
    place = ((batch * queries + local // GROUP) * (HEADS * GROUP) + query_head) * VALUE_DIM
    tl.store(out + place + channel, narrow(acc * share, out.dtype.element_ty), mask=inside)
    if DRAWN:
        keep_norms(norms, row.to(tl.int64), peak, share, True)
