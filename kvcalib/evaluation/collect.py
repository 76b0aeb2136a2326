"""Batches measured once each, by whichever process: figures that do not depend on how many there are or on a restart.

Every batch gives one row, a JSON value. A keeper says which batches this process measures, keeps its rows and gives
back those of all; what is made of them is computed from all rows in the order of the text, by every process alike. JSON
gives floats back to the last bit.
"""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

Row = dict[str, Any]


class Keeper(Protocol):
    """Shares out numbered measurements and keeps them; all processes call its methods in the same order."""

    def step(self) -> contextlib.AbstractContextManager[None]:
        """A block that all processes leave together; an error of one is raised in all."""

    def due(self, count: int) -> list[int]:
        """Of the measurements 0 to `count - 1` those that nobody has made and this process shall make."""

    def keep(self, number: int, row: Row) -> None:
        """Take down a measurement."""

    def done(self) -> int:
        """How many measurements there are, about: other processes' are counted as they are known here."""

    def rows(self) -> dict[int, Row]:
        """All measurements of all processes."""


class Alone:
    """A keeper for one process, in memory."""

    def __init__(self) -> None:
        self._rows: dict[int, Row] = {}

    def step(self) -> contextlib.AbstractContextManager[None]:
        """Nobody else is there."""
        return contextlib.nullcontext()

    def due(self, count: int) -> list[int]:
        """See `Keeper`."""
        return [number for number in range(count) if number not in self._rows]

    def keep(self, number: int, row: Row) -> None:
        """See `Keeper`."""
        self._rows[number] = row

    def done(self) -> int:
        """See `Keeper`."""
        return len(self._rows)

    def rows(self) -> dict[int, Row]:
        """See `Keeper`."""
        return self._rows


def collect(
    keeper: Keeper,
    sequences: np.ndarray,
    batch_size: int,
    measure: Callable[[int, np.ndarray], Row],
    on_batch: Callable[[int], None] | None = None,
) -> list[Row]:
    """The rows of all batches of `sequences [N, T]`, in order.

    Args:
        measure: number of the batch and its sequences `[B, T]` to its row.
        on_batch: told how many sequences are done, about, after each batch.
    """
    starts = range(0, len(sequences), batch_size)
    due = keeper.due(len(starts))

    def tell() -> None:
        if on_batch is not None:
            on_batch(min(len(sequences), keeper.done() * batch_size))

    with keeper.step():
        tell()
        for number in due:
            start = starts[number]
            keeper.keep(number, measure(number, sequences[start : start + batch_size]))
            tell()
    found = keeper.rows()
    if on_batch is not None:
        on_batch(len(sequences))
    return [found[number] for number in range(len(starts))]


def packed(x: np.ndarray) -> str:
    """`x [n]` as text, exact: base64 of little-endian float32."""
    return base64.b64encode(x.astype("<f4").tobytes()).decode("ascii")


def unpacked(text: str) -> np.ndarray:
    """What `packed` was given, float32 `[n]`."""
    return np.frombuffer(base64.b64decode(text), "<f4").astype(np.float32)
