"""Options and widths out of one budget: how many outliers, what shares a scale, and how wide every channel is.

A row is what is stored of one token: the keys or the values of one layer. Each row takes one option (outlier count and
scope, with codebooks of its own), which costs a fixed number of bits and gives every unit a table of losses; then each
unit takes a width. That is a multiple-choice knapsack inside another. A row is whole words, so the inner one has few
answers: the least loss of each option at every number of words. The outer one chooses one of all these answers for
every row. Both are solved by `budget.py`, and the bound of the whole is the outer relaxation over the inner bounds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvcalib.allocation.budget import Plan, Steps, solve, value_curve
from kvcalib.allocation.fisher import Per, Table, units
from kvcalib.errors import InputError
from kvcalib.quant.packing import GROUP, MAX_BITS

WORD = 32
INNER_STATES = 4_000_000
"""Choices times states up to which an option's curve is exact; above, its convex hull stands for it."""


@dataclass(frozen=True)
class Option:
    """One way to store a row.

    Attributes:
        table: the loss of every width of every channel under this option.
        overhead: bits of a token that no width changes: outliers with their indices, zeros and scales.
    """

    table: Table
    overhead: int


@dataclass(frozen=True)
class Chosen:
    """What the budget was spent on.

    Attributes:
        option: index of each row's option.
        widths: `[H, D]` uint8 of each row.
        plan: loss, cost in bits (rows of whole words, overheads included) and bound; `choice` is `option`.
    """

    option: list[int]
    widths: list[Tensor]
    plan: Plan


@dataclass(frozen=True)
class _Curve:
    """One option's units `[U, 9]`, and its least loss at every number of words: reached by a plan, and bounded."""

    unit: np.ndarray
    loss: np.ndarray
    cost: np.ndarray
    best: np.ndarray
    bound: np.ndarray


class Rows:
    """The problem of all rows: inner curves are taken once, any budget is then soon solved.

    Args:
        rows: the options of every row; all options of a row have tables of one shape.
        mean: about the code width that budgets allow, by which channels are grouped.
        per, group: what takes one width; see `fisher.allocate`.
    """

    def __init__(self, rows: list[list[Option]], mean: float, per: Per = "channel", group: int = GROUP) -> None:
        self.rows = rows
        self._curves = [[_curve(option.table, per, group, mean) for option in row] for row in rows]
        most = max((sum(len(curve.best) for curve in row) for row in self._curves), default=0)
        self._best, self._bound = np.full((2, len(rows), most), np.inf)
        self._cost = np.zeros((len(rows), most), np.int64)
        for i, (row, curves) in enumerate(zip(rows, self._curves, strict=True)):
            start = 0
            for option, curve in zip(row, curves, strict=True):
                part = slice(start, start + len(curve.best))
                self._best[i, part], self._bound[i, part] = curve.best, curve.bound
                self._cost[i, part] = option.overhead + WORD * np.arange(len(curve.best))
                start = part.stop

    @property
    def smallest(self) -> int:
        """Bits of the smallest plan."""
        return sum(min(option.overhead for option in row) for row in self.rows)

    @property
    def largest(self) -> int:
        """Bits beyond which nothing is gained: the dearest option of every row at its widest."""
        return int(np.where(np.isfinite(self._best), self._cost, 0).max(1).sum())

    def loss(self, bits: int) -> float:
        """Least loss within `bits`, without its widths; arguments and errors as in `solve`."""
        return solve(self._best, self._cost, bits).loss

    def solve(self, bits: int) -> Chosen:
        """Options and widths of least loss with rows of at most `bits` per token together.

        Raises:
            InputError: the smallest plan takes more than `bits`.
        """
        if bits < self.smallest:
            raise InputError(f"the budget is {bits} bits, the smallest plan takes {self.smallest}; allow more bits")
        outer = solve(self._best, self._cost, bits)
        exact = np.array_equal(self._best, self._bound)
        bound = (outer if exact else solve(self._bound, self._cost, bits)).bound
        options, widths, loss = [], [], 0.0
        for row, curves, place in zip(self.rows, self._curves, outer.choice.tolist(), strict=True):
            option = 0
            while place >= len(curves[option].best):
                place -= len(curves[option].best)
                option += 1
            curve = curves[option]
            inner = solve(curve.loss, curve.cost, WORD * place)
            options.append(option)
            shape = row[option].table.loss.shape[1:]
            widths.append(torch.from_numpy(inner.choice[curve.unit].astype(np.uint8)).view(shape))
            loss += inner.loss
        return Chosen(options, widths, Plan(np.array(options), loss, outer.cost, min(bound, loss)))


def _curve(table: Table, per: Per, group: int, mean: float) -> _Curve:
    unit, loss, cost = units(table, per, group, mean)
    words = -(-MAX_BITS * len(unit) // WORD)
    common = int(np.gcd.reduce(cost, axis=None)) or 1
    reach = np.minimum(WORD * np.arange(words + 1), MAX_BITS * len(unit)) // common
    if loss.size * (reach[-1] + 1) <= INNER_STATES:
        best = value_curve(loss, cost // common, int(reach[-1]))[reach]
        return _Curve(unit, loss, cost, best, best)
    steps = Steps.of(loss, cost)
    # Losses and bits along the hull of all units together; between two of its points the bound is the line.
    bits = np.concatenate([[0], np.cumsum(steps.price)])
    along = loss[np.arange(len(loss)), steps.start].sum() - np.concatenate([[0.0], np.cumsum(steps.saved)])
    budget = WORD * np.arange(words + 1)
    best = along[np.searchsorted(bits, budget, side="right") - 1]
    return _Curve(unit, loss, cost, best, np.maximum(np.interp(budget, bits, along), 0.0))
