"""Spending a budget: one choice for every item, least total loss, total cost within the budget.

The multiple-choice knapsack problem. Items are channels, groups, heads or layers; choices are widths (and whatever else
has a cost in bits). Three steps:

1. The lower convex hull of every item: its steps, taken in order of loss saved per bit, solve the relaxed problem,
   which bounds the optimum from below. The first step that does not fit is the only fractional one, so the rounded plan
   is within one item's step of the bound (Sinha and Zoltners, Operations Research 27, 1979).
2. At the price of that step, in loss per bit, every choice has a reduced cost: what it adds to the bound at least.
   A choice that adds more than the rounded plan lies above the bound is in no better plan and is left out.
3. What is left, seldom more than a few choices of a few items, is solved exactly by dynamic programming over the cost.
   Where even that is too large, the rounded plan stands, with its gap.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np

from kvcalib.errors import InputError

EXACT_STATES = 50_000_000
"""Choices times states of the cost up to which a problem is solved exactly."""


@dataclass(frozen=True)
class Plan:
    """A solution.

    Attributes:
        choice: `[n]` int64, the index of each item's choice.
        loss: total loss. cost: total cost.
        bound: no plan within the budget has a smaller loss than this.
    """

    choice: np.ndarray
    loss: float
    cost: int
    bound: float

    @property
    def gap(self) -> float:
        """`(loss - bound) / bound`: how far from the optimum the plan can be at most."""
        return (self.loss - self.bound) / self.bound if self.bound > 0 else float(self.loss > self.bound)


def solve(loss: np.ndarray, cost: np.ndarray, budget: int, exact: bool | None = None) -> Plan:
    """The plan of least loss within `budget`.

    Args:
        loss: `[n, c]` float, loss of each choice of each item, at least 0; +inf where there is no such choice.
        cost: `[n, c]` int, cost of each choice, at least 0.
        budget: the most that all chosen costs may sum to.
        exact: dynamic programming over all choices whatever it takes; False: the rounded plan; None: over the choices
            that step 2 leaves, where they are few enough.

    Raises:
        InputError: even the cheapest choices cost more than `budget`.
        ValueError: shapes differ, a loss is negative or NaN, a cost is negative or not whole, an item has no choice.
    """
    loss, cost = np.asarray(loss, dtype=np.float64), np.asarray(cost)
    if loss.ndim != 2 or loss.shape != cost.shape:
        raise ValueError(f"loss has shape {loss.shape} and cost {cost.shape}, expected the same [items, choices]")
    if not np.issubdtype(cost.dtype, np.integer):
        raise ValueError(f"cost is of type {cost.dtype}, expected whole numbers (bits)")
    if np.isnan(loss).any() or (loss < 0).any() or (cost < 0).any():
        raise ValueError("loss and cost must not be negative or NaN")
    there = np.isfinite(loss)
    if not there.any(1).all():
        raise ValueError(f"item {int(there.any(1).argmin())} has no choice of finite loss")
    cost, budget = cost.astype(np.int64), int(budget)
    cheapest = int(np.where(there, cost, np.iinfo(np.int64).max).min(1).sum()) if len(loss) else 0
    if cheapest > budget:
        raise InputError(f"the budget is {budget} bits, the smallest plan takes {cheapest}; allow more bits")
    plan, price = _relaxed(loss, cost, budget)
    if exact is False or (exact is None and plan.loss <= plan.bound):
        return plan
    if exact is None:
        # What a choice adds to the bound; the allowance covers rounding of sums of many items.
        reduced = loss + price * cost
        added = reduced - reduced.min(1, keepdims=True)
        there &= added <= plan.loss - plan.bound + 1e-9 * plan.loss
    found = _exactly(loss, cost, budget, there, None if exact else EXACT_STATES)
    return plan if found is None else found


def _exactly(loss: np.ndarray, cost: np.ndarray, budget: int, there: np.ndarray, most: int | None) -> Plan | None:
    """The best plan of the choices that are `there`; None if that takes more than `most` states."""
    rows = np.arange(len(loss))
    least = np.where(there, cost, np.iinfo(np.int64).max).min(1)
    open_ = np.flatnonzero(there.sum(1) > 1)
    # The choices that are there first, in a table as narrow as the fullest item.
    width = int(there.sum(1).max())
    column = np.argsort(~there, axis=1, kind="stable")[:, :width]
    mine = there[rows[:, None], column]
    extra = np.where(mine, cost[rows[:, None], column] - least[:, None], 0)
    unit = max(1, int(np.gcd.reduce(extra, axis=None)))
    # Spare budget beyond the dearest choices changes nothing and would only cost states.
    room = min(budget - int(least.sum()), int(extra.max(1).sum())) // unit
    if most is not None and len(open_) * width * (room + 1) > most:
        return None
    kept = np.where(mine, loss[rows[:, None], column], np.inf)
    place = mine.argmax(1)
    place[open_] = _dynamic(kept[open_], extra[open_] // unit, room)
    choice = column[rows, place]
    total = float(loss[rows, choice].sum())
    return Plan(choice, total, int(cost[rows, choice].sum()), total)


@numba.njit(cache=True)
def value_curve(loss: np.ndarray, cost: np.ndarray, room: int) -> np.ndarray:
    """Least loss of one choice for every item, for every budget of 0..room: float64 `[room + 1]`; see `solve`."""
    best = np.zeros(room + 1)
    for i in range(len(loss)):
        best = _one_more(best, loss[i], cost[i])[0]
    return best


@numba.njit(cache=True)
def _one_more(best: np.ndarray, loss: np.ndarray, cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`best` for every budget after one more item, and the choice that it takes there."""
    after = np.full(len(best), np.inf)
    taken = np.zeros(len(best), np.int16)
    for c in range(len(loss)):
        if not np.isfinite(loss[c]):
            continue
        for b in range(cost[c], len(best)):
            value = best[b - cost[c]] + loss[c]
            if value < after[b]:
                after[b] = value
                taken[b] = c
    return after, taken


@numba.njit(cache=True)
def _dynamic(loss: np.ndarray, cost: np.ndarray, budget: int) -> np.ndarray:
    """Exact choices: least loss of the first items for every cost up to `budget`."""
    items = len(loss)
    best = np.zeros(budget + 1)
    taken = np.zeros((items, budget + 1), np.int16)
    for i in range(items):
        best, taken[i] = _one_more(best, loss[i], cost[i])
    choice = np.zeros(items, np.int64)
    b = budget
    for i in range(items - 1, -1, -1):
        choice[i] = taken[i, b]
        b -= cost[i, choice[i]]
    return choice


@numba.njit(cache=True)
def hulls(loss: np.ndarray, cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The choices on each item's lower convex hull, ascending in cost: `[n, c]` padded by -1, and how many."""
    items, choices = loss.shape
    hull = np.full((items, choices), -1, np.int64)
    size = np.zeros(items, np.int64)
    for i in range(items):
        order = np.argsort(cost[i], kind="mergesort")
        n = 0
        for c in order:
            if not np.isfinite(loss[i, c]):
                continue
            if n and cost[i, c] == cost[i, hull[i, n - 1]] and loss[i, c] < loss[i, hull[i, n - 1]]:
                n -= 1
            elif n and loss[i, c] >= loss[i, hull[i, n - 1]]:
                continue
            while n >= 2:
                a, b = hull[i, n - 2], hull[i, n - 1]
                left = (loss[i, a] - loss[i, b]) * (cost[i, c] - cost[i, b])
                if left > (loss[i, b] - loss[i, c]) * (cost[i, b] - cost[i, a]):
                    break
                n -= 1
            hull[i, n] = c
            n += 1
        size[i] = n
    return hull, size


@dataclass(frozen=True)
class Steps:
    """The steps from choice to choice on the hulls of all items, best first.

    Attributes:
        start: `[n]`, the cheapest choice of each item.
        item, step: `[s]`, whose step it is, and the how manieth of that item from 0 on.
        saved, price: `[s]`, the loss it saves and the bits it costs.
        hull: see `hulls`.
    """

    start: np.ndarray
    item: np.ndarray
    step: np.ndarray
    saved: np.ndarray
    price: np.ndarray
    hull: np.ndarray

    @classmethod
    def of(cls, loss: np.ndarray, cost: np.ndarray) -> Steps:
        """The steps of a problem; see `solve`."""
        hull, size = hulls(loss, cost)
        item, step = np.nonzero(np.arange(1, hull.shape[1])[None] < size[:, None])
        before, after = hull[item, step], hull[item, step + 1]
        saved = loss[item, before] - loss[item, after]
        price = cost[item, after] - cost[item, before]
        # Within an item slopes fall from step to step, so this order never takes a later step before an earlier one.
        order = np.lexsort((step, item, -saved / price))
        return cls(hull[:, 0], item[order], step[order], saved[order], price[order], hull)


def _relaxed(loss: np.ndarray, cost: np.ndarray, budget: int) -> tuple[Plan, float]:
    """The rounded plan with the relaxation's bound, and the price of a bit in loss."""
    steps = Steps.of(loss, cost)
    rows = np.arange(len(loss))
    spent = int(cost[rows, steps.start].sum())
    total = float(loss[rows, steps.start].sum())
    used = spent + np.cumsum(steps.price)
    fits = int(np.searchsorted(used, budget, side="right"))
    np.maximum.at(level := np.zeros(len(loss), np.int64), steps.item[:fits], steps.step[:fits] + 1)
    total -= float(steps.saved[:fits].sum())
    spent = int(used[fits - 1]) if fits else spent
    bound, price = total, 0.0
    if fits < len(steps.item):
        price = float(steps.saved[fits] / steps.price[fits])
        bound -= price * (budget - spent)
    # What is left goes, best first, to later steps that still fit.
    least = steps.price.min(initial=1 << 62)
    for k in range(fits, len(steps.item)):
        if budget - spent < least:
            break
        i = steps.item[k]
        if steps.step[k] == level[i] and spent + steps.price[k] <= budget:
            level[i] += 1
            spent += int(steps.price[k])
    choice = steps.hull[rows, level]
    total = float(loss[rows, choice].sum())
    # Sums in another order round otherwise: a bound above the plan is the plan.
    return Plan(choice, total, int(cost[rows, choice].sum()), min(max(0.0, bound), total)), price
