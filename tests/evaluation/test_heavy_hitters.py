"""Attention recomputed, and overlap with it, against transformers' eager weights, loops and sets."""

import math

import pytest
import torch

from kvcalib.evaluation.heavy_hitters import accumulate, captured, exact_attention, overlap
from kvcalib.model.selftest import full_attention_layers
from kvcalib.runtime.loader import prove
from tests.tiny import tiny_family, tiny_llama, tokens

LENGTH, PROMPT = 300, 70  # more queries than a block on either side of the prompt's end


@pytest.mark.parametrize("make", [tiny_llama, lambda: tiny_family("qwen3"), lambda: tiny_family("gemma2")])
def test_sums_are_those_of_eager_attention(make):
    model = make()
    layers = full_attention_layers(model)
    ids = tokens(2, LENGTH)
    found = exact_attention(model, prove(model, layers), ids, PROMPT)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(ids, output_attentions=True).attentions
    assert set(found) == set(layers)
    for layer in layers:
        kv_heads = found[layer].prompt.shape[1]
        by_group = weights[layer].unflatten(1, (kv_heads, -1)).sum(2)
        assert torch.allclose(found[layer].prompt, by_group[:, :, :PROMPT, :PROMPT].sum(2), atol=1e-4)
        assert torch.allclose(found[layer].later, by_group[:, :, PROMPT:, :PROMPT].sum(2), atol=1e-4)


@pytest.mark.parametrize("sliding", [None, 5])
def test_softcap_sink_logits_and_windows(sliding):
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, heads, 12, 4, generator=generator, dtype=torch.float64) for heads in (4, 2))
    logits = torch.randn(4, generator=generator)
    found = accumulate(query, key, 0.7, 5, 3.0, logits, sliding)
    sums = torch.zeros(2, 2, 5, dtype=torch.float64)
    for head in range(4):
        for q in range(12):
            seen = [t for t in range(q + 1) if sliding is None or q - t < sliding]
            raw = {t: 0.7 * float(query[0, head, q] @ key[0, head // 2, t]) for t in seen}
            power = {t: math.exp(3 * math.tanh(s / 3)) for t, s in raw.items()}
            total = sum(power.values()) + math.exp(float(logits[head]))
            for t in seen:
                if t < 5:
                    sums[int(q >= 5), head // 2, t] += power[t] / total
    assert torch.allclose(found.prompt[0].double(), sums[0], atol=1e-5)
    assert torch.allclose(found.later[0].double(), sums[1], atol=1e-5)


def test_overlap_and_capture_count_as_sets_do():
    generator = torch.Generator().manual_seed(1)
    drawn = torch.rand(3, 2, 20, generator=generator)
    kept = torch.stack([torch.randperm(20, generator=generator)[:7] for _ in range(6)]).view(3, 2, 7).int()
    kept[1, :, :3] = -1  # a row with fewer tokens
    kept[2, 0, -1] = 24  # a token after the prompt
    hits, share = overlap(kept, drawn), captured(kept, drawn)
    for row in range(3):
        for head in range(2):
            mine = {int(p) for p in kept[row, head] if p >= 0}
            order = sorted(range(20), key=lambda t: -float(drawn[row, head, t]))
            expected = len(mine & set(order[: len(mine)])) / len(mine)
            assert hits[row, head].item() == pytest.approx(expected)
            mass = sum(float(drawn[row, head, t]) for t in mine if t < 20) / float(drawn[row, head].sum())
            assert share[row, head].item() == pytest.approx(mass, rel=1e-5)
    assert len(set(hits.flatten().tolist())) > 2


def test_everything_kept_is_everything():
    kept = torch.arange(9).expand(1, 2, 9)
    drawn = torch.rand(1, 2, 9, generator=torch.Generator().manual_seed(2))
    assert overlap(kept, drawn).tolist() == [[1, 1]]
    assert captured(kept, drawn).flatten().tolist() == pytest.approx([1, 1])
    best = drawn.argsort(-1, descending=True)
    assert overlap(best[..., :4], drawn).tolist() == [[1, 1]]
    assert overlap(best[..., 5:], drawn).tolist() == [[0, 0]]
