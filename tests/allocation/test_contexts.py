"""Contexts of a token sample against loops over its sequences."""

import pytest
import torch

from kvcalib.allocation.contexts import FEWEST, Contexts

MIDDLE = 100


def sample(seed=0, sequences=5, length=200, kept=300):
    """Sequence ids and positions of `kept` tokens in no order."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(sequences * length, generator=generator)[:kept]
    return chosen // length * 7 - 3, chosen % length


def free_tokens(sequence, position, of, first=4):
    """Places in the sample of a sequence's free tokens: neither sinks nor the last 5 of 100, by position."""
    found = [i for i in range(len(sequence)) if sequence[i] == of and first <= position[i] < MIDDLE - 5]
    return sorted(found, key=lambda i: position[i])


@pytest.mark.parametrize("sinks", [4, 20])
def test_every_context_has_the_tokens_of_one_sequence(sinks):
    sequence, position = sample()
    contexts = Contexts.find(sequence, position, MIDDLE, sinks=sinks)
    ids = sorted(set(sequence.tolist()))
    assert len(contexts.index) == 5
    for row, of in enumerate(ids):
        held = contexts.index[row][contexts.held[row]].tolist()
        assert sorted(held) == [i for i in range(300) if sequence[i] == of and position[i] < MIDDLE]
        assert contexts.index[row][contexts.free[row]].tolist() == free_tokens(sequence, position, of, sinks)
        queries = contexts.queries[row][contexts.held[row]]
        # Every query from the token itself to the last of the context.
        assert queries.tolist() == [len(range(int(position[i]), MIDDLE)) for i in held]


def test_figures_and_choices_are_those_of_a_loop():
    sequence, position = sample()
    contexts = Contexts.find(sequence, position, MIDDLE)
    x = torch.rand(300, 2, generator=torch.Generator().manual_seed(1))
    best = contexts.best(contexts.gather(x), 0.2)
    for row, of in enumerate(sorted(set(sequence.tolist()))):
        free = free_tokens(sequence, position, of)
        for head in range(2):
            expected = sorted(free, key=lambda i: -x[i, head])[: round(0.2 * len(free))]
            assert set(contexts.index[row][best[row, head]].tolist()) == set(expected)


def test_sequences_with_few_tokens_are_left_out():
    sequence = torch.tensor([1] * 30 + [2] * 3 + [3] * FEWEST)
    position = torch.cat([torch.arange(30), torch.arange(10, 13), torch.arange(10, 10 + FEWEST)])
    contexts = Contexts.find(sequence, position, MIDDLE)
    assert [contexts.index[i][contexts.held[i]].tolist() for i in (0, 1)] == [list(range(30)), list(range(33, 43))]
    assert Contexts.find(sequence[30:33], position[30:33], MIDDLE) is None
    assert Contexts.find(sequence, position + MIDDLE, MIDDLE) is None


def test_a_sliding_layer_holds_what_a_later_query_sees():
    position = torch.arange(200)
    contexts = Contexts.find(torch.zeros(200, dtype=torch.long), position, MIDDLE, sliding=32)
    # The first later query is at 100 and sees 69 .. 100.
    assert contexts.index[contexts.held].tolist() == list(range(69, 100))
    assert contexts.queries.max() == 31


def test_equal_scores_keep_the_earlier_tokens():
    contexts = Contexts.find(torch.zeros(50, dtype=torch.long), torch.arange(50), MIDDLE)
    best = contexts.best(torch.ones(1, 1, 50), 0.25)
    assert best[0, 0].nonzero()[:, 0].tolist() == list(range(4, 4 + round(0.25 * 46)))
