"""Policies against their formulas, written out for one token after the other."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvcalib.runtime.policies import POLICIES, Held, find
from kvcalib.runtime.policies.policy import best, unit
from kvcalib.runtime.policies.qhitter import QHitter
from kvcalib.runtime.policies.qhitter_published import QHitterPublished


def layer(seed, batch=1, heads=2, slots=100, unused=0, traits=2, prompt=None, keep=0.2, recent=0.05):
    generator = torch.Generator().manual_seed(seed)
    position = torch.arange(slots).expand(batch, heads, -1).clone().int()
    if unused:
        position[:, :, :unused] = -1
    return Held(
        position=position,
        drawn=torch.rand(batch, heads, slots, generator=generator) * 10,
        traits=torch.rand(batch, heads, slots, traits, generator=generator),
        alpha=0.5,
        heavy=torch.full((batch,), (keep - recent) * (prompt or slots), dtype=torch.float64),
    )


def published(attention, key_error, value_error, alpha=0.5, recent=0.05):
    """What Q-Hitter's code keeps of a prompt, from part B2 of its description: sets of tokens by head.

    Args:
        attention: `[H][S]` accumulated attention. key_error, value_error: `[H][S]`, 2-norms.
    """
    heads, size = len(attention), len(attention[0])
    n_default, n_heavy, n_recent = int(0.07 * size), math.floor(0.08 * size), int(recent * size)

    def flat(x):
        return [v for row in x for v in row]

    def normal(x):
        low, high = min(flat(x)), max(flat(x))
        return [[(v - low) / (high - low) for v in row] for row in x]

    h, k, v = normal(attention), normal(key_error), normal(value_error)
    found = []
    for head in range(heads):
        rest = list(range(size - n_recent))
        default = sorted(rest, key=lambda t: attention[head][t], reverse=True)[:n_default]
        rest = [t for t in rest if t not in default]
        score = [alpha * h[head][t] + (1 - alpha) * (2 - k[head][t] - v[head][t]) / 2 for t in range(size)]
        heavy = sorted(rest, key=lambda t: score[t], reverse=True)[:n_heavy]
        found.append({*default, *heavy, *range(size - n_recent, size)})
    return found


@pytest.mark.parametrize("size", [40, 100, 300, 768])
@pytest.mark.parametrize("heads", [1, 2, 8])
def test_published_selection(size, heads):
    held = layer(size + heads, 1, heads, size)
    recent = int(0.05 * size)
    free = torch.ones(1, heads, size, dtype=torch.bool)
    free[..., size - recent :] = False
    count = torch.tensor([int(0.2 * size) - recent])
    chosen = QHitterPublished().choose(held, free, count) | ~free
    expected = published(held.drawn[0].tolist(), held.traits[0, ..., 0].tolist(), held.traits[0, ..., 1].tolist())
    assert [set(row.nonzero()[:, 0].tolist()) for row in chosen[0]] == expected


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("size", range(1, 21))
def test_short_prompts(name, size):
    policy = find(name)
    if not policy.evicts:
        return
    held = layer(size, 2, 1, size, traits=max(1, policy.traits))
    free = torch.ones(2, 1, size, dtype=torch.bool)
    chosen = policy.choose(held, free, torch.tensor([max(1, size // 5), size]))
    assert chosen.sum(-1)[0, 0] in range(1, max(2, size // 5 + 1))


@pytest.mark.parametrize("policy", [QHitter(), QHitterPublished()], ids=lambda p: p.name)
def test_rows_of_a_batch_do_not_see_each_other(policy):
    one, two = layer(1, slots=60), layer(2, slots=60)
    both = Held(*(torch.cat([getattr(x, n) for x in (one, two)]) for n in ("position", "drawn", "traits")), 0.5,
                torch.cat([one.heavy, two.heavy]))  # fmt: skip
    free, count = torch.ones(1, 2, 60, dtype=torch.bool), torch.tensor([20])
    together = policy.choose(both, free.expand(2, -1, -1), count.expand(2))
    for row, held in enumerate((one, two)):
        assert torch.equal(together[row : row + 1], policy.choose(held, free, count))


@pytest.mark.parametrize("policy", [QHitter(), QHitterPublished()], ids=lambda p: p.name)
def test_equal_errors_and_equal_attention_are_no_reason_to_fail(policy):
    held = layer(3, slots=30)
    held.traits.fill_(0.4)
    held.drawn.fill_(2.0)
    chosen = policy.choose(held, torch.ones(1, 2, 30, dtype=torch.bool), torch.tensor([6]))
    assert (chosen.sum(-1) <= 6).all()
    assert (chosen.sum(-1) > 0).all()
    assert torch.isfinite(policy.score(held)).all()


def test_unused_slots_change_nothing():
    held = layer(4, slots=50)
    free, count = torch.ones(1, 2, 50, dtype=torch.bool), torch.tensor([9])
    padded = layer(4, slots=50, unused=0)
    for name in ("position", "drawn", "traits"):
        x = getattr(held, name)
        room = torch.full((1, 2, 7, *x.shape[3:]), -1 if name == "position" else 99, dtype=x.dtype)
        setattr(padded, name, torch.cat([room, x], 2))
    there = torch.cat([torch.zeros(1, 2, 7, dtype=torch.bool), free], 2)
    for policy in (QHitter(), QHitterPublished()):
        assert torch.equal(policy.choose(padded, there, count)[..., 7:], policy.choose(held, free, count))


@given(st.integers(0, 10**6), st.floats(0.5, 1), st.booleans(), st.floats(0, 1))
@example(0, 1 - 2**-53, True, 0.0)
@settings(max_examples=30, deadline=None)
def test_qhitter_s_score(seed, decay, age_norm, alpha):
    held = layer(seed, 2, 3, 12, traits=1)
    held.alpha = alpha
    score = QHitter(age_norm, decay).score(held)
    for b in range(2):
        for h in range(3):
            mean = [
                float(held.drawn[b, h, t]) / (sum(decay**i for i in range(12 - t)) if age_norm else 1)
                for t in range(12)
            ]
            for t in range(12):
                expected = alpha * mean[t] / max(mean) + (1 - alpha) * float(held.traits[b, h, t, 0])
                assert score[b, h, t] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_friendliness_is_one_minus_the_mean_relative_error():
    key, value = (
        torch.tensor([[0.04, 1.0], [9.0, 1.0], [0.0, 0.0]]),
        torch.tensor([[0.01, 4.0], [0.0, 1.0], [0.0, 0.0]]),
    )
    found = QHitter().observe(key, value)[:, 0]
    assert torch.allclose(found, torch.tensor([1 - (0.2 + 0.05) / 2, 0.0, 1.0]))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.integers(0, 30))
def test_best_is_sorting_with_the_later_first_among_equals(scores, count):
    free = torch.tensor([s != 3 for s in scores])[None, None]
    found = best(torch.tensor(scores).float()[None, None], free, torch.tensor([count]))[0, 0]
    order = sorted((t for t in range(len(scores)) if scores[t] != 3), key=lambda t: (scores[t], t), reverse=True)
    assert set(found.nonzero()[:, 0].tolist()) == set(order[:count])


def test_unit():
    x = torch.tensor([[[1.0, 3.0, 9.0], [2.0, 5.0, 0.0]]])
    where = torch.tensor([[[True, True, False], [True, True, False]]])
    assert torch.equal(unit(x, where, (1, 2)), torch.tensor([[[0.0, 0.5, 0.0], [0.25, 1.0, 0.0]]]))
    assert torch.equal(unit(torch.ones(1, 1, 3), torch.ones(1, 1, 3, dtype=torch.bool), (1, 2)), torch.zeros(1, 1, 3))
