"""Which tokens draw attention, taken from the unquantized model, and how many of them a policy keeps.

Two figures for the tokens that a policy keeps of a prompt, per layer and KV head, with the query heads of a group
summed:

- *overlap*: |kept and top-k by attention accumulated over the prompt's queries| / k, where k is how many are kept. The
  attention is the published sum (H2O, arXiv 2306.14048; Q-Hitter), not normalised by age, from exact keys. The sums of
  old tokens are over more queries, so old tokens are favoured: a policy can do better than its overlap says.
- *captured*: of the attention that the tokens after the prompt pay to the prompt, the share that falls on what is kept.
  No policy can know it when it chooses; it is what a choice is worth.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcalib.model import selftest
from kvcalib.model.rotary import Rotation
from kvcalib.model.taps import AttentionOutput, Call, Tap, Taps

BLOCK = 256
"""Queries whose weights exist at a time."""


@dataclass(frozen=True)
class Drawn:
    """Attention that the tokens of a prompt draw in one layer, float32 `[B, H, P]`.

    Attributes:
        prompt: from the prompt's own queries. later: from the queries after it.
    """

    prompt: Tensor
    later: Tensor


@torch.no_grad()
def exact_attention(
    model: PreTrainedModel, rotations: Mapping[int, Rotation], ids: Tensor, prompt: int
) -> dict[int, Drawn]:
    """Attention of the unquantized model over `ids [B, T]`, rows without padding, for the layers of `rotations`.

    Args:
        prompt: tokens of each row that count as its prompt.
    """
    windows = selftest.attention_layers(model)
    handler = _Watching(prompt, {layer: windows[layer] for layer in rotations})
    with Taps(model, handler, dict(rotations)):
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    return handler.found


class _Watching:
    """Handler that leaves attention as it is and sums its weights."""

    def __init__(self, prompt: int, sliding: dict[int, int | None]) -> None:
        self.prompt, self.sliding = prompt, sliding
        self.found: dict[int, Drawn] = {}

    def before(self, tap: Tap) -> None:
        """Nothing to prepare."""

    def attend(self, call: Call) -> AttentionOutput:
        """The model's own attention."""
        query, key = call.rotate_new(call.query), call.rotate_new(call.key)
        layer = call.tap.layer
        softcap, sink_logits = call.kwargs.get("softcap"), call.kwargs.get("s_aux")
        self.found[layer] = accumulate(query, key, call.scaling, self.prompt, softcap, sink_logits, self.sliding[layer])
        return call.plain(query, key, call.value)


def accumulate(
    query: Tensor,
    key: Tensor,
    scaling: float,
    prompt: int,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    sliding: int | None = None,
) -> Drawn:
    """Causal softmax weights summed over queries and over the query heads of a KV head, for the first `prompt` tokens.

    Args:
        query: `[B, Hq, T, D]`, rotated. key: `[B, H, T, D]`, rotated.
        softcap, sink_logits: see `runtime.attention.chunked_attention`.
        sliding: how many tokens a query sees, itself included; None for all.
    """
    batch, kv_heads, length, _ = key.shape
    sums = [torch.zeros(batch, kv_heads, prompt, device=key.device) for _ in range(2)]
    column = torch.arange(length, device=key.device)
    keys = key.float().transpose(2, 3)[:, :, None]
    # Blocks end at the prompt's end, so that a block's queries all go into one of the two sums.
    edges = sorted({*range(0, prompt, BLOCK), *range(prompt, length, BLOCK), length})
    for start, stop in itertools.pairwise(edges):
        grouped = query[:, :, start:stop].float().unflatten(1, (kv_heads, -1))
        scores = grouped @ keys * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        age = torch.arange(start, stop, device=key.device)[:, None] - column
        hidden = age < 0 if sliding is None else (age < 0) | (age >= sliding)
        scores = scores.masked_fill(hidden, -torch.inf)
        if sink_logits is not None:
            extra = sink_logits.float().view(1, kv_heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
            scores = torch.cat([scores, extra], -1)
        sums[start >= prompt] += scores.softmax(-1)[..., :prompt].sum((2, 3))
    return Drawn(*sums)


def overlap(kept: Tensor, drawn: Tensor) -> Tensor:
    """|kept and top-k of drawn| / k for each row and KV head, `[B, H]`.

    Args:
        kept: positions `[B, H, S]`, -1 where a slot is unused; k is how many are used. A position beyond those of
            `drawn` is no heavy hitter.
        drawn: attention by position `[B, H, P]`.
    """
    used = kept >= 0
    rank = drawn.sort(dim=-1, descending=True, stable=True).indices.argsort(-1)
    inside = used & (kept < drawn.shape[-1])
    hits = inside & (rank.gather(-1, kept.long().clamp(0, drawn.shape[-1] - 1)) < used.sum(-1, keepdim=True))
    return hits.sum(-1) / used.sum(-1).clamp(min=1)


def captured(kept: Tensor, drawn: Tensor) -> Tensor:
    """Share of `drawn [B, H, P]` that falls on the positions `kept [B, H, S]` (-1: unused), `[B, H]`."""
    inside = (kept >= 0) & (kept < drawn.shape[-1])
    mine = drawn.gather(-1, kept.long().clamp(0, drawn.shape[-1] - 1)) * inside
    return mine.sum(-1) / drawn.sum(-1).clamp(min=torch.finfo(drawn.dtype).tiny)
