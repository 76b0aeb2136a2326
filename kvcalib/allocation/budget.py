"""Spending a budget: one choice for every item, least total loss, total cost within the budget.

The multiple-choice knapsack problem. Items are channels, groups, heads or layers; choices are widths (and whatever else
has a cost in bits). Small problems are solved exactly by dynamic programming over the cost. Large ones by the lower
convex hull of every item: its steps, taken in order of loss saved per bit, solve the relaxed problem, which bounds the
optimum from below; the first step that does not fit is the only fractional one, so the rounded plan is within one
item's step of the bound (Sinha and Zoltners, Operations Research 27, 1979). The gap that remains is reported.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np

from kvcalib.errors import InputError

EXACT_STATES = 20_000_000


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
        exact: dynamic programming whatever it takes; None: where it is small enough.

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
    if np.isinf(loss).all(1).any():
        raise ValueError(f"item {int(np.isinf(loss).all(1).argmax())} has no choice of finite loss")
    cost = np.where(np.isinf(loss), np.iinfo(np.int64).max // (4 * max(1, len(loss))), cost).astype(np.int64)
    cheapest = int(cost.min(1).sum()) if len(loss) else 0
    if cheapest > budget:
        raise InputError(f"the budget is {budget} bits, the smallest plan takes {cheapest}; allow more bits")
    # Spare budget beyond the dearest choices changes nothing and would only cost states.
    room = min(int(budget), int(np.where(np.isinf(loss), 0, cost).max(1).sum()) if len(loss) else 0)
    if exact or (exact is None and loss.size * (room + 1) <= EXACT_STATES):
        choice = _dynamic(loss, cost, room)
        total = float(loss[np.arange(len(loss)), choice].sum())
        return Plan(choice, total, int(cost[np.arange(len(loss)), choice].sum()), total)
    return _hull(loss, cost, int(budget))


@numba.njit(cache=True)
def _dynamic(loss: np.ndarray, cost: np.ndarray, budget: int) -> np.ndarray:
    """Exact choices: least loss of the first items for every cost up to `budget`."""
    items, choices = loss.shape
    best = np.zeros(budget + 1)
    taken = np.zeros((items, budget + 1), np.int16)
    for i in range(items):
        after = np.full(budget + 1, np.inf)
        for c in range(choices):
            step = cost[i, c]
            if step > budget or not np.isfinite(loss[i, c]):
                continue
            for b in range(step, budget + 1):
                value = best[b - step] + loss[i, c]
                if value < after[b]:
                    after[b] = value
                    taken[i, b] = c
        best = after
    choice = np.zeros(items, np.int64)
    b = budget
    for i in range(items - 1, -1, -1):
        choice[i] = taken[i, b]
        b -= cost[i, choice[i]]
    return choice


@numba.njit(cache=True)
def _hulls(loss: np.ndarray, cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
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


def _hull(loss: np.ndarray, cost: np.ndarray, budget: int) -> Plan:
    hull, size = _hulls(loss, cost)
    rows = np.arange(len(loss))
    choice = hull[:, 0].copy()
    spent = int(cost[rows, choice].sum())
    total = float(loss[rows, choice].sum())
    item, step = np.nonzero(np.arange(1, hull.shape[1])[None] < size[:, None])
    before, after = hull[item, step], hull[item, step + 1]
    saved = loss[item, before] - loss[item, after]
    price = cost[item, after] - cost[item, before]
    # Within an item slopes fall from step to step, so this order never takes a later step before an earlier one.
    order = np.lexsort((step, item, -saved / price))
    used = spent + np.cumsum(price[order])
    fits = int(np.searchsorted(used, budget, side="right"))
    taken = order[:fits]
    np.maximum.at(level := np.zeros(len(loss), np.int64), item[taken], step[taken] + 1)
    total -= float(saved[taken].sum())
    spent = int(used[fits - 1]) if fits else spent
    bound = total
    if fits < len(order):
        broken = order[fits]
        bound -= float(saved[broken] * (budget - spent) / price[broken])
    # What is left goes, best first, to later steps that still fit.
    for k in order[fits:]:
        if spent == budget:
            break
        if step[k] == level[item[k]] and spent + price[k] <= budget:
            level[item[k]] += 1
            spent += int(price[k])
    choice = hull[rows, level]
    return Plan(choice, float(loss[rows, choice].sum()), int(cost[rows, choice].sum()), max(0.0, bound))
