"""The solver against brute force, and against the bound that it states."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcalib.allocation.budget import solve
from kvcalib.errors import InputError


def brute_force(loss, cost, budget):
    best = np.inf
    for chosen in itertools.product(range(loss.shape[1]), repeat=len(loss)):
        rows = np.arange(len(loss))
        if cost[rows, list(chosen)].sum() <= budget:
            best = min(best, loss[rows, list(chosen)].sum())
    return best


@st.composite
def problems(draw):
    items, choices = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    numbers = st.floats(0, 10, allow_nan=False, width=32)
    loss = np.array(
        draw(st.lists(st.lists(numbers, min_size=choices, max_size=choices), min_size=items, max_size=items))
    )
    costs = st.lists(st.integers(0, 20), min_size=choices, max_size=choices)
    cost = np.array(draw(st.lists(costs, min_size=items, max_size=items)))
    return loss, cost, draw(st.integers(int(cost.min(1).sum()), int(cost.max(1).sum()) + 3))


@settings(max_examples=300, deadline=None)
@given(problems())
def test_equals_brute_force(problem):
    loss, cost, budget = problem
    plan = solve(loss, cost, budget)
    assert plan.cost <= budget
    assert plan.loss == pytest.approx(brute_force(loss, cost, budget), abs=1e-9)
    assert plan.gap == 0


@settings(max_examples=300, deadline=None)
@given(problems())
def test_the_relaxation_bounds_the_optimum(problem):
    loss, cost, budget = problem
    best = brute_force(loss, cost, budget)
    plan = solve(loss, cost, budget, exact=False)
    rows = np.arange(len(loss))
    assert plan.cost == cost[rows, plan.choice].sum() <= budget
    assert plan.loss == pytest.approx(loss[rows, plan.choice].sum())
    assert plan.bound <= best + 1e-6
    assert plan.loss >= best - 1e-9


def test_a_loss_far_below_the_others_rounding():
    loss = np.array([[2.0, 9.99999996e-13]] + [[0.0, 0.0]] * 4)
    plan = solve(loss, np.array([[0, 1]] + [[0, 0]] * 4), 1)
    assert (plan.loss, plan.gap) == (9.99999996e-13, 0)


def test_a_model_of_70_billion_parameters_takes_seconds():
    """80 layers, 8 heads, 128 channels, keys and values, 9 widths."""
    rng = np.random.default_rng(0)
    items = 80 * 8 * 128 * 2
    loss = rng.lognormal(0, 2, (items, 1)) * 4.0 ** -np.arange(9) * rng.uniform(0.7, 1.3, (items, 9))
    cost = np.broadcast_to(np.arange(9), loss.shape)
    solve(loss[:100], cost[:100], 250, exact=False)
    began = time.perf_counter()
    plan = solve(loss, cost, int(2.5 * items))
    assert time.perf_counter() - began < 10
    assert plan.gap < 1e-6
    assert int(2.5 * items) - 8 <= plan.cost <= int(2.5 * items)


@pytest.mark.parametrize("seed", range(8))
def test_leaving_out_choices_leaves_the_optimum(seed):
    """Against dynamic programming over all choices, on problems whose hull is not the optimum."""
    rng = np.random.default_rng(seed)
    loss = rng.lognormal(0, 1.5, (60, 1)) * 4.0 ** -rng.uniform(0, 1.2, (60, 9)).cumsum(1)
    cost = rng.integers(3, 40, (60, 9)).cumsum(1) * 8
    loss[rng.random(loss.shape) < 0.2] = np.inf
    loss[:, 0] = 2 * np.where(np.isfinite(loss), loss, 0).max(1)
    budget = int(cost.mean()) * 60
    rounded, plan, whole = (solve(loss, cost, budget, exact) for exact in (False, None, True))
    assert plan.loss == pytest.approx(whole.loss, rel=1e-12)
    assert plan.gap == 0
    assert plan.cost <= budget
    assert rounded.bound <= whole.loss * (1 + 1e-12)
    assert rounded.loss >= whole.loss * (1 - 1e-12)


def test_missing_choices_are_not_taken():
    loss = np.array([[np.inf, 1.0], [3.0, np.inf]])
    cost = np.array([[0, 4], [1, 0]])
    for exact in (True, False):
        assert solve(loss, cost, 5, exact).choice.tolist() == [1, 0]


def test_what_cannot_be_solved_is_named():
    one = np.ones((2, 3))
    cost = np.array([[2, 3, 4]] * 2)
    with pytest.raises(InputError, match="budget is 3 bits, the smallest plan takes 4"):
        solve(one, cost, 3)
    with pytest.raises(ValueError, match="item 1 has no choice"):
        solve(np.array([[1.0], [np.inf]]), np.ones((2, 1), int), 9)
    with pytest.raises(ValueError, match="whole numbers"):
        solve(one, cost * 0.5, 9)
    with pytest.raises(ValueError, match="negative or NaN"):
        solve(-one, cost, 9)
    with pytest.raises(ValueError, match=r"shape \(2, 3\) and cost \(2, 2\)"):
        solve(one, cost[:, :2], 9)
