"""Attention under quantized keys against attention that is computed with them, and overlap against sets."""

import pytest
import torch

from kvcalib.allocation.contexts import Contexts
from kvcalib.allocation.hitters import mean_where, overlap, quantized_attention


def drawn(query, key):
    """Attention that each key draws from queries that all see it."""
    return (query @ key.mT).softmax(-1).sum(0)


@pytest.mark.parametrize(("size", "bound"), [(0.01, 2e-3), (0.1, 2e-2), (0.4, 0.1)])
def test_prediction_follows_the_attention_with_one_key_moved(size, bound):
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(60, 8, generator=generator), torch.randn(40, 8, generator=generator)
    change = torch.randn(40, 8, generator=generator) * size
    weights = (query @ key.mT).softmax(-1)
    exact, slope = weights.sum(0), torch.einsum("qt,qd->td", weights * (1 - weights), query)
    found = quantized_attention(exact[:, None], slope[:, None], change[:, None])[:, 0]
    for t in range(40):
        moved = key.clone()
        moved[t] += change[t]
        assert found[t].item() == pytest.approx(drawn(query, moved)[t].item(), rel=bound)


def test_prediction_is_never_negative_and_finite():
    a = torch.tensor([[0.0], [1e-30], [1.0]])
    slope, change = torch.full((3, 1, 2), -50.0), torch.full((3, 1, 2), 1.0)
    found = quantized_attention(a, slope, change)
    assert (found >= 0).all() and torch.isfinite(found).all()
    assert found[0] == 0
    assert torch.equal(quantized_attention(a, slope, torch.zeros(3, 1, 2)), a)


def test_overlap_counts_common_tokens_of_each_head_and_context():
    generator = torch.Generator().manual_seed(0)
    sequence = torch.arange(120) // 60
    position = torch.arange(120) % 60
    contexts = Contexts.find(sequence, position, 80)
    exact, other = torch.rand(120, 3, generator=generator), torch.rand(120, 3, generator=generator)
    found = overlap(contexts, contexts.gather(exact), contexts.gather(other))
    for head in range(3):
        shares = []
        for of in (0, 1):
            free = [i for i in range(120) if sequence[i] == of and 4 <= position[i]]
            a, b = (set(sorted(free, key=lambda i: -x[i, head])[: round(0.2 * 56)]) for x in (exact, other))
            shares.append(len(a & b) / len(a))
        assert found[head].item() == pytest.approx(sum(shares) / 2)
    assert overlap(contexts, contexts.gather(exact), contexts.gather(exact)).tolist() == [1, 1, 1]


def test_mean_where():
    assert mean_where(torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([[True, False], [False, True]])) == 2.5
