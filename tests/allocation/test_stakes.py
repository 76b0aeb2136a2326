"""Predicted cost of eviction against attention outputs that are computed with and without the tokens."""

import pytest
import torch

from kvcalib.allocation.contexts import Contexts
from kvcalib.allocation.stakes import Stakes, output_fisher

TOKENS, HEADS, DIM = 40, 2, 6


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def contexts():
    """One context of 40 tokens, all of them seen by later queries."""
    return Contexts.find(torch.zeros(TOKENS, dtype=torch.long), torch.arange(TOKENS), TOKENS)


def independent_weights(generator, queries=40_000, spread=1.0):
    """Weights of `queries` later queries, `[queries, H, M]`, independent between tokens."""
    scale = torch.rand(HEADS, TOKENS, generator=generator) ** 3 / 4
    return scale * (1 - spread + spread * 2 * torch.rand(queries, HEADS, TOKENS, generator=generator))


def stakes(weights, value, noise=None, drift=None):
    zero = torch.zeros(1, HEADS, TOKENS)
    return Stakes(
        weights.mean(0)[None], weights.square().mean(0)[None], value[None], zero if noise is None else noise[None],
        zero if drift is None else drift[None], group=3,
    )  # fmt: skip


def choose(generator, share=0.3):
    kept = torch.rand(1, HEADS, TOKENS, generator=generator) < share
    return kept, (kept | ~contexts().free[:, None])[0]


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_loss_is_the_mean_square_of_what_the_gone_tokens_take_along(generator, spread):
    weights, value = independent_weights(generator, spread=spread), torch.randn(HEADS, TOKENS, DIM, generator=generator)
    kept, stays = choose(generator)
    expected = 0.0
    for head in range(HEADS):
        mean = weights[:, head].mean(0) * stays[head]
        centre = (mean[:, None] * value[head]).sum(0) / mean.sum()
        off = (weights[:, head] * ~stays[head]) @ (value[head] - centre)
        expected += 3 * off.square().sum(1).mean().item()
    assert stakes(weights, value).loss(contexts(), kept).item() == pytest.approx(expected, rel=0.02)


def test_kept_tokens_cost_their_errors(generator):
    """Values are off by fixed lengths in random directions, weights by a fixed factor up or down."""
    weights, value = independent_weights(generator), torch.randn(HEADS, TOKENS, DIM, generator=generator)
    noise, drift = torch.rand(HEADS, TOKENS, generator=generator), torch.rand(HEADS, TOKENS, generator=generator) / 4
    everything = torch.ones(1, HEADS, TOKENS, dtype=torch.bool)
    expected = 0.0
    for head in range(HEADS):
        mean = weights[:, head].mean(0)
        centre = (mean[:, None] * value[head]).sum(0) / mean.sum()
        direction = torch.randn(len(weights), TOKENS, DIM, generator=generator)
        moved = direction / direction.norm(dim=-1, keepdim=True) * noise[head].sqrt()[:, None]
        sign = torch.randint(0, 2, (len(weights), TOKENS), generator=generator) * 2 - 1
        off = torch.einsum("qt,qtd->qd", weights[:, head], moved)
        off += (weights[:, head] * sign * drift[head].sqrt()) @ (value[head] - centre)
        expected += 3 * off.square().sum(1).mean().item()
    found = stakes(weights, value, noise, drift).loss(contexts(), everything).item()
    assert found == pytest.approx(expected, rel=0.02)


def test_keeping_all_of_exact_tokens_costs_nothing(generator):
    found = stakes(independent_weights(generator, 100), torch.randn(HEADS, TOKENS, DIM, generator=generator))
    assert found.loss(contexts(), torch.ones(1, HEADS, TOKENS, dtype=torch.bool)).item() == 0


def test_even_attention_is_better_served_by_a_fair_sample_than_by_its_largest_draws(generator):
    """Mass says the opposite: the tokens that draw a little more all have values on one side."""
    side = torch.arange(TOKENS) % 2
    mean = (1 + 0.1 * side) / TOKENS
    weights = mean.expand(10, HEADS, TOKENS)
    value = torch.where(side == 1, 1.0, -1.0)[None, :, None].expand(HEADS, TOKENS, DIM).contiguous()
    found, where = stakes(weights, value), contexts()
    most = where.best(mean.expand(1, HEADS, TOKENS), 0.4)
    place = torch.arange(TOKENS)
    fair = where.best((place % 4 < 2).float().sub(place / 1000).expand(1, HEADS, TOKENS), 0.4)
    assert most.sum() == fair.sum()
    assert (mean * most).sum() > (mean * fair).sum()
    assert found.loss(where, fair) < found.loss(where, most) / 10


def test_output_fisher_is_found_from_the_values(generator):
    weights = torch.rand(500, 300, generator=generator) ** 4
    wanted = torch.tensor([0.5, 2.0, 7.0])
    gradient = torch.randn(500, 3, generator=generator) * wanted.sqrt()
    fisher = (weights.T @ gradient).square()
    found = output_fisher(fisher[:, None], weights.square().sum(0)[:, None])
    # One draw of the gradients: its own mean square, and the square of its sum besides.
    many = torch.stack([
        output_fisher(((weights.T @ (torch.randn(500, 3, generator=generator) * wanted.sqrt())) ** 2)[:, None],
                      weights.square().sum(0)[:, None])[0] for _ in range(400)
    ])  # fmt: skip
    assert found.shape == (1, 3)
    assert torch.allclose(many.mean(0), wanted, rtol=0.15)


def test_output_fisher_needs_queries():
    assert output_fisher(torch.zeros(0, 2, 3), torch.zeros(0, 2)) is None
    assert output_fisher(torch.ones(4, 2, 3), torch.tensor([[1.0, 0.0]] * 4)) is None
