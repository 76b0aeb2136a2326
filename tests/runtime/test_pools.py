"""Pools of packed tokens against a list of tokens in Python."""

import functools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvcalib.runtime.pools import Pools, tags_of
from tests.runtime import adaptive_talk
from tests.runtime.talk import pair_of

HEADS, DIM = 2, 16


@pytest.fixture(scope="module")
def tiers(tmp_path_factory):
    """Quantizers of one layer by role, of three tiers."""
    adaptive = adaptive_talk.make(tmp_path_factory.mktemp("pools"), "llama", outliers=0.03)[3]
    return [tier[0] for tier in adaptive.tiers]


class Listed:
    """Rows of a batch as Python lists of (exact key, exact value, key's class, value's class)."""

    def __init__(self, tiers):
        self.tiers, self.rows = tiers, []

    def stored(self, role, x, c):
        if c == len(self.tiers):
            return x
        quantizer = self.tiers[c][role]
        return quantizer.decode(quantizer.encode(x[None], torch.float16))[0]

    def read(self):
        keys = [[self.stored("key", k, c) for k, _, c, _ in row] for row in self.rows]
        values = [[self.stored("value", v, c) for _, v, _, c in row] for row in self.rows]
        return [torch.stack([torch.stack(row) for row in x]) for x in (keys, values)]


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 9)),
        st.tuples(st.just("crop"), st.integers(0, 12)),
        st.tuples(st.just("select"), st.lists(st.integers(0, 9), min_size=1, max_size=4)),
        st.tuples(st.just("retag"), st.integers(0, 3)),
        st.tuples(st.just("take"), st.integers(0, 9)),
    ),
    max_size=12,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=ACTIONS, seed=st.integers(0, 999), size=st.integers(1, 11), relative=st.booleans())
def test_pools_hold_what_a_list_holds(tiers, actions, seed, size, relative):
    tiers = [pair_of(pair, relative) for pair in tiers]
    generator = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.randint, generator=generator)
    pools, listed = Pools(tiers), Listed(tiers)
    listed.rows = [[] for _ in range(2)]
    for action, argument in [("append", 5), *actions]:
        if action == "append":
            batch = len(listed.rows)
            x = torch.randn(2, batch, argument, HEADS, DIM, generator=generator)
            classes = draw(0, len(tiers) + 1, (2, batch, argument))
            pools.append({"key": x[0], "value": x[1]}, tags_of(*classes))
            for b, row in enumerate(listed.rows):
                row += [(x[0, b, t], x[1, b, t], int(classes[0, b, t]), int(classes[1, b, t])) for t in range(argument)]
        elif action == "crop":
            pools.crop(argument)
            listed.rows = [row[:argument] for row in listed.rows]
        elif action == "select":
            chosen = [i % len(listed.rows) for i in argument]
            pools.select(torch.tensor(chosen))
            listed.rows = [list(listed.rows[i]) for i in chosen]
        elif pools.length and action == "take":
            count = min(argument, pools.length)
            batch = len(listed.rows)
            index = torch.stack([torch.randperm(pools.length, generator=generator)[:count] for _ in range(batch)])
            used = draw(0, 5, (batch, count)) > 0
            pools.take(index, used)
            nothing = torch.zeros(HEADS, DIM)
            listed.rows = [
                [row[i] if u else (nothing, nothing, 0, 0) for i, u in zip(line, use, strict=True)]
                for row, line, use in zip(listed.rows, index.tolist(), used.tolist(), strict=True)
            ]
        elif pools.length:
            # A few tokens change class, some of them to one that has none yet.
            tag = pools.tag().clone()
            other = tags_of(*draw(0, len(tiers) + 1, (2, *tag.shape)))
            tag = torch.where(draw(0, 4, tag.shape) < argument, other, tag)
            exact = [torch.stack([torch.stack([t[i] for t in row]) for row in listed.rows]) for i in (0, 1)]
            before = pools.tag().clone()
            count = pools.retag(tag, {"key": exact[0], "value": exact[1]})
            assert count == int((tag % 16 != before % 16).sum() + (tag // 16 != before // 16).sum())
            listed.rows = [
                [(k, v, int(c) % 16, int(c) // 16) for (k, v, *_), c in zip(row, line, strict=True)]
                for row, line in zip(listed.rows, tag, strict=True)
            ]
    assert pools.length == len(listed.rows[0])
    parts = list(pools.chunks(size))
    assert [start for start, *_ in parts] == list(range(0, pools.length, size))
    if pools.length:
        for found, expected in zip(zip(*[p[1:] for p in parts], strict=True), listed.read(), strict=True):
            # A batch's product may round otherwise than one row's: to a bit of float32, not to another level.
            assert torch.allclose(torch.cat(found, 2).transpose(1, 2), expected, atol=1e-6)


def test_rows_are_chosen_when_nothing_is_left(tiers):
    """Crop to nothing, then a beam search begins: the batch is still known."""
    pools = Pools(tiers)
    x = torch.randn(2, 3, HEADS, DIM)
    pools.append({"key": x, "value": x}, torch.zeros(2, 3, dtype=torch.uint8))
    pools.crop(0)
    pools.select(torch.tensor([1]))
    assert (pools.length, pools.batch) == (0, 1)
    pools.append({"key": x[:1], "value": x[:1]}, torch.zeros(1, 3, dtype=torch.uint8))
    assert [k.shape for _, k, _ in pools.chunks()] == [(1, HEADS, 3, DIM)]
