"""Progress bars and notes on standard error, so that standard output stays machine-readable.

Of several processes of a launch the first one speaks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kvcalib.launch import launched_rank

console = Console(stderr=True)
_drawn = True


def bars(drawn: bool) -> None:
    """Whether `progress` draws: the bars of several processes would tear each other."""
    global _drawn
    _drawn = drawn


@contextlib.contextmanager
def progress(title: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """A bar for `total` units; the yielded function is told how many are done."""
    columns = (
        TextColumn("[bold]{task.description:<14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not _drawn or launched_rank() > 0) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.update(task, completed=done)


def note(message: str, everyone: bool = False) -> None:
    """One line for the reader, from the first process of a launch alone unless `everyone` has something else to say."""
    if launched_rank() > 0 and not everyone:
        return
    console.print(message, highlight=False, soft_wrap=True)
