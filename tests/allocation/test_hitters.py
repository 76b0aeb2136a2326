"""Attention under quantized keys against attention that is computed with them, and overlap against sets."""

import pytest
import torch

from kvcalib.allocation.contexts import Contexts
from kvcalib.allocation.hitters import mean_where, overlap, quantized_attention


@pytest.mark.parametrize(("size", "left"), [(0.01, 0.02), (0.1, 0.1), (0.3, 0.3)])
def test_prediction_follows_the_attention_with_one_key_moved(size, left):
    """What is `left` of the change when the prediction is taken off it, all tokens together."""
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(60, 8, generator=generator) / 2, torch.randn(200, 8, generator=generator)
    change = torch.randn(200, 8, generator=generator) * size
    weights = (query @ key.mT).softmax(-1)
    exact, slope = weights.sum(0), torch.einsum("qt,qd->td", weights * (1 - weights), query)
    found = quantized_attention(exact[:, None], slope[:, None], change[:, None])[:, 0]
    true = torch.stack([(query @ (key + change * row[:, None]).mT).softmax(-1).sum(0)[t]
                        for t, row in enumerate(torch.eye(200))])  # fmt: skip
    assert (found - true).norm() < left * (true - exact).norm()


def test_prediction_is_never_negative_and_finite():
    a = torch.tensor([[0.0], [1e-30], [1.0]])
    slope, change = torch.full((3, 1, 2), -50.0), torch.full((3, 1, 2), 1.0)
    found = quantized_attention(a, slope, change)
    assert (found >= 0).all()
    assert torch.isfinite(found).all()
    assert found[0] == 0
    assert torch.equal(quantized_attention(a, slope, torch.zeros(3, 1, 2)), a)


def test_overlap_counts_common_tokens_of_each_head_and_context():
    generator = torch.Generator().manual_seed(0)
    sequence, position = torch.arange(120) // 60, torch.arange(120) % 60
    contexts = Contexts.find(sequence, position, 80)
    exact, other = torch.rand(120, 3, generator=generator), torch.rand(120, 3, generator=generator)
    found = overlap(contexts, contexts.gather(exact), contexts.gather(other))
    for head in range(3):
        shares = []
        for of in (0, 1):
            free = [i for i in range(120) if sequence[i] == of and position[i] >= 4]
            a, b = (set(sorted(free, key=lambda i: -x[i, head])[: round(0.2 * 56)]) for x in (exact, other))
            shares.append(len(a & b) / len(a))
        assert found[head].item() == pytest.approx(sum(shares) / 2)
    assert overlap(contexts, contexts.gather(exact), contexts.gather(exact)).tolist() == [1, 1, 1]


def test_mean_where():
    assert mean_where(torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([[True, False], [False, True]])) == 2.5
