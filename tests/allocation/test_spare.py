"""What whole words leave: no plan grows beyond them, groups stay groups, and nothing that fits is left."""

import itertools

import pytest
import torch

from kvcalib.allocation.fisher import allocate
from kvcalib.allocation.spare import fill
from kvcalib.quant.packing import GROUP, Layout
from tests.allocation.test_fisher import table, total

TABLES = [table(seed=0), table(seed=1, paired=False), table(seed=2)]


def words(widths):
    return sum(-(-int(w.sum()) // 32) for w in widths)


@pytest.mark.parametrize(("per", "group"), [("channel", GROUP), ("channel", 0), ("head", GROUP), ("layer", GROUP)])
@pytest.mark.parametrize("room", [7, 16, 40])
def test_rows_grow_to_the_words_that_are_there(per, group, room):
    before, plan = allocate(TABLES, 400, per, group)
    after = fill(TABLES, before, room, per, group)
    assert words(after) <= max(room, words(before))
    assert all(bool((a >= b).all()) for a, b in zip(after, before, strict=True))
    assert total(TABLES, after) <= plan.loss * (1 + 1e-12)
    step = {"channel": group or 1, "head": 32, "layer": 64}[per]
    left = room - words(after)
    if room >= words(before):
        # Nothing more fits: a step costs at least this many words in every row that is not full of 8 bits.
        assert left < min(-(-(int(w.sum()) + step) // 32) - -(-int(w.sum()) // 32) for w in after) or left <= 0
    for t, w in zip(TABLES, after, strict=True):
        if per == "channel" and group:
            assert all(bool((torch.bincount(row.long(), minlength=9) % GROUP == 0).all()) for row in w)
            order = None if t.pairs is None else t.pairs.flatten().expand(2, -1)
            assert Layout.build(w, order=order).groups(t.pairs) is not None
        if per != "channel":
            assert bool((w == w[:, :1]).all())
        if per == "layer":
            assert len(w.unique()) == 1


def test_one_word_goes_where_brute_force_puts_it():
    tables = [table(heads=1, dim=4, seed=s, paired=False) for s in range(2)]
    before = [torch.full((1, 4), 3, dtype=torch.uint8)] * 2  # 12 bits of a word each: 20 more are free in both
    after = fill(tables, before, 2, "channel", 0)
    best = sum(
        min(
            sum(float(t.loss[w, 0, d]) for d, w in enumerate(chosen))
            for chosen in itertools.product(range(3, 9), repeat=4)
            if sum(chosen) <= 32
        )
        for t in tables
    )
    assert total(tables, after) == pytest.approx(best)
