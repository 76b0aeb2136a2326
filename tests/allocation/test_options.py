"""Options and widths out of one budget, against brute force over all of them."""

import itertools
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcalib.allocation import options as module
from kvcalib.allocation.fisher import Table
from kvcalib.allocation.options import WORD, Option, Rows
from kvcalib.errors import InputError


def option(loss, overhead, pairs=None):
    return Option(Table(torch.as_tensor(loss, dtype=torch.float64), pairs), overhead)


def spent(row, chosen, widths):
    """Bits of one row, as it is stored."""
    return row[chosen].overhead + WORD * -(-int(widths.sum()) // WORD)


def brute_force(rows, budget):
    """Least loss over every option and every width of every channel; rows take whole words."""
    best = np.inf
    per_row = []
    for row in rows:
        found = {}
        for one in row:
            loss = one.table.loss.flatten(1).numpy()
            widths = np.array(list(itertools.product(range(9), repeat=loss.shape[1])))
            cost = one.overhead + WORD * -(-widths.sum(1) // WORD)
            lost = loss[widths, np.arange(loss.shape[1])].sum(1)
            for bits in np.unique(cost).tolist():
                found[bits] = min(lost[cost == bits].min(), found.get(bits, np.inf))
        per_row.append(found.items())
    for chosen in itertools.product(*per_row):
        if sum(cost for cost, _ in chosen) <= budget:
            best = min(best, sum(lost for _, lost in chosen))
    return best


@st.composite
def problems(draw):
    """Up to 3 rows of 1 to 3 options; 1 to 3 units of 1 to 16 channels, of 4 widths that are worth having."""
    rows = []
    numbers = st.floats(0, 10, allow_nan=False, width=32)
    for _ in range(draw(st.integers(1, 3))):
        channels = draw(st.integers(1, 3))
        row = []
        for _ in range(draw(st.integers(1, 3))):
            table = np.full((9, 1, channels), 1e3)
            for width in draw(st.lists(st.integers(0, 8), min_size=4, max_size=4, unique=True)):
                table[width, 0] = draw(st.lists(numbers, min_size=channels, max_size=channels))
            row.append(option(table, draw(st.integers(0, 12)) * 8))
        rows.append(row)
    smallest = sum(min(o.overhead for o in row) for row in rows)
    return rows, smallest + draw(st.integers(0, 160))


@settings(max_examples=150, deadline=None)
@given(problems(), st.booleans())
def test_equals_brute_force(problem, curves):
    rows, budget = problem
    states = module.INNER_STATES
    try:
        # Without exact inner curves the plan may be worse, and the bound must still hold.
        module.INNER_STATES = states if curves else 0
        chosen = Rows(rows, 2.0, group=0).solve(budget)
    finally:
        module.INNER_STATES = states
    best = brute_force(rows, budget)
    lost = sum(
        float(row[k].table.loss.gather(0, w.long()[None]).sum())
        for row, k, w in zip(rows, chosen.option, chosen.widths, strict=True)
    )
    used = sum(spent(row, k, w) for row, k, w in zip(rows, chosen.option, chosen.widths, strict=True))
    assert used <= chosen.plan.cost <= budget
    assert chosen.plan.loss == pytest.approx(lost, abs=1e-9)
    assert chosen.plan.bound <= best + 1e-9
    if curves:
        assert lost == pytest.approx(best, abs=1e-9)
        assert chosen.plan.gap <= 1e-9
    else:
        assert lost >= best - 1e-9


def wide_rows(layers, heads, dim, seed=0, options=7):
    """Keys and values of a model: losses that fall fourfold a bit, options that save loss and cost bits."""
    rng = np.random.default_rng(seed)
    half = torch.arange(dim // 2)
    pairs = torch.stack([half, half + dim // 2], 1)
    rows = []
    for i in range(2 * layers):
        base = rng.lognormal(0, 2, (1, heads, dim)) * 4.0 ** -np.arange(9)[:, None, None]
        base = base * rng.uniform(0.8, 1.2, (9, heads, dim))
        saves = rng.uniform(0.65, 0.9)
        rows.append(
            [option(base * saves**k, k * heads * 24 + 32 * (i % 2), pairs if i % 2 else None) for k in range(options)]
        )
    return rows, 2 * layers * heads * dim


@pytest.mark.parametrize("group", [16, 0])
def test_a_model_of_70_billion_parameters_takes_seconds(group):
    """80 layers, 8 heads, 128 channels, keys and values, 9 widths, 7 options each."""
    rows, elements = wide_rows(80, 8, 128)
    Rows(rows[:2], 2.5, group=group).solve(6000)
    began = time.perf_counter()
    chosen = Rows(rows, 2.5, group=group).solve(int(2.5 * elements))
    assert time.perf_counter() - began < 20
    assert chosen.plan.gap < 1e-3
    assert 0 <= int(2.5 * elements) - chosen.plan.cost < WORD
    assert len(set(chosen.option)) > 1


def test_a_choice_of_options_is_never_worse_than_any_one_of_them():
    rows, elements = wide_rows(3, 2, 32, options=3)
    budget = int(2.7 * elements)
    both = Rows(rows, 2.5).solve(budget).plan
    for k in range(3):
        alone = Rows([[row[k]] for row in rows], 2.5).solve(budget).plan
        assert both.loss <= alone.loss * (1 + 1e-9)
    assert both.loss == pytest.approx(Rows(rows, 2.5).loss(budget))


def test_an_option_is_taken_for_what_it_saves():
    """For one word, a thousandth of the loss in the row that loses most, next to nothing in the other."""
    table = 4.0 ** -torch.arange(9, dtype=torch.float64).view(9, 1, 1).expand(9, 1, 8)
    rows = [
        [option(table * size, 0), option(table * size * left, WORD)] for size, left in ((1.0, 0.99), (1000.0, 0.001))
    ]
    chosen = Rows(rows, 2.0, group=0).solve(3 * WORD)
    assert chosen.option == [0, 1]
    assert Rows(rows, 2.0, group=0).solve(10 * WORD).option == [1, 1]


def test_what_no_plan_can_meet_is_named():
    rows = [[option(np.ones((9, 1, 4)), 48), option(np.ones((9, 1, 4)), 24)]]
    found = Rows(rows, 2.0, group=0)
    assert (found.smallest, found.largest) == (24, 48 + WORD)
    with pytest.raises(InputError, match="budget is 23 bits, the smallest plan takes 24"):
        found.solve(23)
