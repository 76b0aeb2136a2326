"""The attention that tokens draw: from the scores of one pass of `attention_kernel` to a sum per token and kv head.

A weight is `exp(score - peak) * share`, and peak and share (one over the softmax's denominator) of a query are known
only when all of its tokens have been seen. So the pass keeps its raw scores, and a second small kernel turns them into
weights, times `decay ** (queries that came later)`, and adds them up in a fixed order: the same call, the same bits.
"""

# What Triton compiles has no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvcalib.runtime.kernels.arithmetic import LOG2E
from kvcalib.runtime.kernels.launch import Launch

# A float mask takes what it hides to the lowest number, not to -inf.
HIDDEN = tl.constexpr(-1e38)
TOKENS = 128
ROWS = 8


@triton.jit
def keep_scores(raw, anchor, score, slot, held, query_live):
    """Store `score [M, N]` of the slots that this program holds.

    raw: the pointer to the head's scores, numbers `[M]` and length of its rows; anchor: a 0 that the compiler does not
    know, so that it computes the rows' addresses here instead of keeping them in registers (see `turning.py`).
    """
    start, row, length = raw
    place = (row + anchor).to(tl.int64) * length
    tl.store(start + place[:, None] + slot[None, :], score, mask=query_live[:, None] & held[None, :])


@triton.jit
def keep_norms(norms, row, peak, share, live):
    """Store what turns the scores of a row into weights."""
    tl.store(norms + 2 * row, tl.where(peak == -float("inf"), 0.0, peak), mask=live)
    tl.store(norms + 2 * row + 1, share, mask=live)


@triton.jit(do_not_specialize=["queries", "total_slots", "later", "width"])
def drawn_kernel(
    raw, norms, drawn, log_decay, queries, total_slots, later, width,
    GROUP: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr, CAUSAL: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Grid: (batch * kv heads, tiles of N tokens). Rows of a head: query by query, its GROUP heads side by side."""
    head = tl.program_id(0).to(tl.int64)
    rows = GROUP * queries
    slot = tl.program_id(1) * N + tl.arange(0, N)
    drew = tl.zeros([N], tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        live = row < rows
        seen = live[:, None] & (slot < total_slots)[None, :]
        number = row // GROUP
        if CAUSAL:
            # The pass leaves out what no query of a tile sees.
            seen &= slot[None, :] <= (total_slots - queries + number)[:, None]
        place = head * rows + row
        score = tl.load(raw + (place * total_slots)[:, None] + slot[None, :], mask=seen, other=-float("inf"))
        peak = tl.load(norms + 2 * place, mask=live, other=0.0)
        share = tl.load(norms + 2 * place + 1, mask=live, other=0.0)
        after = later + queries - 1 - number
        share *= tl.where(after == 0, 1.0, tl.exp2(after.to(tl.float32) * log_decay))
        weight = tl.exp2((score - peak[:, None]) * LOG2E) * share[:, None]
        drew += tl.sum(tl.where(score > HIDDEN, weight, 0.0), 0)
    to = drawn + head * width + slot
    inside = slot < total_slots
    if ADD:
        drew += tl.load(to, mask=inside, other=0.0)
    tl.store(to, drew, mask=inside)


@dataclass
class Drawing:
    """Where the attention drawn from some queries of a call goes.

    Attributes:
        out: `[B, H, width]` float32, contiguous; its first T + w numbers of every head are written.
        decay: factor per query that came later.
        later: queries of the call after these.
        add: add to what `out` holds, instead of overwriting it.
    """

    out: Tensor
    decay: float = 1.0
    later: int = 0
    add: bool = False

    def check(self, batch: int, heads: int, total: int) -> None:
        """Raise ValueError unless `out` and `decay` fit a call over `total` tokens."""
        expected = (batch, heads, total)
        if self.out.shape != expected or self.out.dtype != torch.float32 or not self.out.is_contiguous():
            raise ValueError(
                f"drawn is {self.out.dtype} {list(self.out.shape)} with strides {self.out.stride()}, expected float32 "
                f"{list(expected)}, contiguous: B, kv heads, slots of the view"
            )
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay is {self.decay}, expected a factor from 0 to 1")


def scratch(drawing: Drawing | None, absent: Tensor, rows: int, total: int) -> tuple[Tensor, Tensor]:
    """Room for raw scores `[B, H, rows, total]` and norms `[B, H, rows, 2]`; `absent` twice if nothing is drawn."""
    if drawing is None:
        return absent, absent
    size = (*drawing.out.shape[:2], rows)
    raw = torch.empty(*size, total, dtype=torch.float32, device=absent.device)
    return raw, torch.empty(*size, 2, dtype=torch.float32, device=absent.device)


def drawn_launch(drawing: Drawing, raw: Tensor, norms: Tensor, group: int, causal: bool) -> Launch:
    """The launch that sums up what `scratch` gave and the pass has filled."""
    batch, heads, rows, total = raw.shape
    args = {
        "raw": raw, "norms": norms, "drawn": drawing.out,
        "log_decay": math.log2(drawing.decay) if drawing.decay else -math.inf,
        "queries": rows // group, "total_slots": total, "later": drawing.later, "width": drawing.out.shape[2],
    }  # fmt: skip
    constants = {"GROUP": group, "ROWS": ROWS, "N": TOKENS, "CAUSAL": causal, "ADD": drawing.add}
    return Launch(drawn_kernel, (batch * heads, triton.cdiv(total, TOKENS)), args, constants, warps=4)
