"""Weights taken while the online softmax runs, against the softmax of the whole matrix."""

import pytest
import torch

from kvcalib.runtime import attention
from kvcalib.runtime.drawn import Drawn


@pytest.mark.parametrize("heads", ["mean", "max"])
@pytest.mark.parametrize("mask", ["none", "bool", "float"])
@pytest.mark.parametrize(("queries", "sinks", "softcap"), [(23, False, None), (1, True, None), (9, True, 2.0)])
def test_band_and_last_rows_equal_the_softmax(monkeypatch, queries, sinks, softcap, mask, heads):
    """Several chunks of keys, several blocks of queries, GQA, padding in the first row."""
    monkeypatch.setattr(attention, "QUERY_BLOCK", 8)
    generator = torch.Generator().manual_seed(0)
    length, n, rows = 23, 5, 3
    q = torch.randn(2, 4, queries, 8, generator=generator) * 2
    k, v = torch.randn(2, 2, 2, length, 8, generator=generator)
    logits = torch.randn(4, generator=generator) if sinks else None
    hidden = (torch.arange(length)[None] > torch.arange(length - queries, length)[:, None]).expand(2, 1, -1, -1).clone()
    if mask != "none":
        hidden[0, :, :, :6] = True
    given = {
        "none": None,
        "bool": ~hidden,
        "float": torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min),
    }[mask]
    drawn = Drawn(n, rows, heads)
    chunks = ((s, k[:, :, s : s + 7], v[:, :, s : s + 7]) for s in range(0, length, 7))
    attention.chunked_attention(q, chunks, lambda x, _: x, given, length, 0.5, softcap, logits, drawn)

    scores = q @ k.repeat_interleave(2, 1).transpose(2, 3) * 0.5
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.double().masked_fill(hidden, -torch.inf).exp()
    total = weights.sum(-1, keepdim=True)
    if sinks:
        total = total + logits.double().exp().view(1, 4, 1, 1)
    weights = weights / torch.where(total > 0, total, 1.0)
    weights = weights.mean(1) if heads == "mean" else weights.amax(1)
    assert drawn.all.shape == (2, min(rows, queries), length)
    assert torch.allclose(drawn.all.double(), weights[:, -rows:], atol=1e-6)
    for i in range(queries):
        for back in range(n):
            token = length - queries + i - back
            expected = weights[:, i, token] if token >= 0 else torch.zeros(2)
            assert torch.allclose(drawn.band[:, i, back].double(), expected.double(), atol=1e-6)
