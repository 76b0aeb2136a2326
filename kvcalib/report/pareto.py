"""The Pareto front of a sweep, loss against size: which points no other beats, and their plot."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from kvcalib.report.svg import Panel, page

MOST_NAMES = 10
"""Points that are named on the plot, of the front and baselines; more would lie on one another."""


@dataclass(frozen=True)
class Point:
    """One measured setting: effective bits, loss in nats per token; `ours` is False for other methods' points."""

    name: str
    bits: float
    loss: float
    ours: bool = True


def front(points: Iterable[Point]) -> list[Point]:
    """The points that no other dominates, by rising bits.

    A point dominates another if it has neither more bits nor more loss, and less of one of them. Of equal points all
    stay. Points whose bits or loss are not finite are left out.
    """
    kept: list[Point] = []
    for point in sorted((p for p in points if math.isfinite(p.bits) and math.isfinite(p.loss)), key=_by_size):
        best = kept[-1] if kept else None
        if best is None or point.loss < best.loss or (point.bits, point.loss) == (best.bits, best.loss):
            kept.append(point)
    return kept


def _by_size(point: Point) -> tuple[float, float]:
    return point.bits, point.loss


def pareto_plot(heading: str, note: str, points: Iterable[Point], loss: str, log: bool = True) -> str:
    """The SVG file's text: every point, and the front as a line.

    Args:
        loss: what the vertical axis shows, with its unit.
        log: whether it is logarithmic; points of a loss of 0 or less are then not drawn.
    """
    points = [p for p in points if p.loss > 0 or not log]
    bits = "effective bits (all bytes x 8 / elements)"
    panel = Panel("Loss against size", bits, loss, log=log, width=720, height=420)
    panel.add([(p.bits, p.loss) for p in front(points)], "mark", "Pareto front", dots=False)
    ours, others = ([(p.bits, p.loss) for p in points if p.ours is which] for which in (True, False))
    if ours:
        panel.add(ours, "first", "kvcalib", line=False)
    if others:
        panel.add(others, "second", "baselines", line=False)
    named = {*front(points), *(p for p in points if not p.ours)}
    for point in sorted(named, key=_by_size) if len(named) <= MOST_NAMES else ():
        panel.name((point.bits, point.loss), point.name)
    return page([panel], heading, note)
