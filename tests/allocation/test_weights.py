"""Alpha: where friendliness decides, where attention does, and that noise does not move it."""

import pytest
import torch

from kvcalib.allocation.contexts import Contexts
from kvcalib.allocation.stakes import Stakes
from kvcalib.allocation.weights import ALPHAS, attention_weight, score

CONTEXTS, TOKENS = 12, 100


@pytest.fixture
def contexts():
    place = torch.arange(CONTEXTS * TOKENS)
    return Contexts.find(place // TOKENS, place % TOKENS, TOKENS)


def make(later, noise):
    """Stakes of tokens whose values all differ: `[S, 1, M]` figures, weights that do not vary between queries."""
    value = torch.randn(*later.shape, 64, generator=torch.Generator().manual_seed(9))
    return Stakes(later, later.square(), value, noise, torch.zeros_like(later), group=1)


def random(generator):
    return torch.rand(CONTEXTS, 1, TOKENS, generator=generator)


def test_attention_that_persists_gets_all_the_weight(contexts):
    generator = torch.Generator().manual_seed(0)
    attention, friendliness = random(generator) ** 4, random(generator)
    assert attention_weight(contexts, attention, friendliness, make(attention / 20, torch.zeros_like(attention))) == 1


def test_friendliness_decides_where_later_attention_is_all_the_same(contexts):
    """Errors differ much, what queries look at does not follow from what they looked at."""
    generator = torch.Generator().manual_seed(0)
    attention, friendliness = random(generator) ** 4, random(generator)
    later = torch.full_like(attention, 0.01)
    found = attention_weight(contexts, attention, friendliness, make(later, 1e4 * (1 - friendliness) ** 2))
    assert found == 0


def test_what_makes_no_difference_leaves_attention_alone(contexts):
    generator = torch.Generator().manual_seed(0)
    attention = random(generator)
    same = torch.ones_like(attention)
    assert attention_weight(contexts, attention, same, make(attention, 0 * same)) == 1
    nothing = make(0 * same, 0 * same)
    assert attention_weight(contexts, attention, random(generator), nothing) == 1


def test_the_choice_is_the_largest_within_a_standard_error(contexts):
    """The rule once more, in a loop over alphas and contexts."""
    generator = torch.Generator().manual_seed(3)
    attention, friendliness, later = random(generator) ** 2, random(generator), random(generator) / 50
    stakes = make(later, (1 - friendliness) / 2)
    losses = {}
    for alpha in ALPHAS:
        top = attention.amax(-1, keepdim=True)
        kept = contexts.best(alpha * attention / top + (1 - alpha) * friendliness, 0.2)
        losses[alpha] = stakes.loss(contexts, kept)
    best = min(ALPHAS, key=lambda a: float(losses[a].mean()))
    good = []
    for alpha in ALPHAS:
        more = [float(x - y) for x, y in zip(losses[alpha], losses[best], strict=True)]
        mean = sum(more) / CONTEXTS
        variance = sum((x - mean) ** 2 for x in more) / (CONTEXTS - 1)
        if mean <= (variance / CONTEXTS) ** 0.5:
            good.append(alpha)
    assert attention_weight(contexts, attention, friendliness, stakes) == max(good)


def test_score_is_between_its_parts(contexts):
    generator = torch.Generator().manual_seed(0)
    attention, friendliness = random(generator), random(generator)
    assert torch.equal(score(contexts, attention, friendliness, 0), friendliness)
    alone = score(contexts, attention, friendliness, 1)
    assert (alone.amax(-1) == 1).all()
    assert torch.allclose(alone, attention / attention.amax(-1, keepdim=True))
    assert (score(contexts, 0 * attention, friendliness, 1) == 0).all()
