"""Quality against size, all contenders: which of them nothing else beats in both."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvcalib.report.chart import SHAPES, Axis, Chart, Shape
from kvcalib.report.data import Contender, Estimate, Measurement
from kvcalib.report.page import Figure, Key, Missing, Section
from kvcalib.report.svg import ticks
from kvcalib.report.words import interval, short

COLOURS = ("second", "mark", "c4", "c5", "c6", "c7", "c8", "c9")
WIDEST = 12.0
"""Effective bits beyond which a contender is not drawn: the unquantized cache has 16."""


def pareto(measurements: Sequence[Measurement]) -> Section | Missing:
    """KLD and delta NLL against effective bits, a pair of plots for every measurement."""
    figures = [figure for where in measurements for figure in _figures(where)]
    if not figures:
        return Missing(
            "Quality against size", "kvcalib eval ARTIFACT --compare fp16,kivi,int --json F; report --comparison F"
        )
    notes = ["Lower and further left is better. Effective bits count every byte that a cache holds."]
    if any(c.delta_nll.value <= 0 for where in measurements for c in drawn(where)):
        notes.append("Hollow marks on the lower edge are at 0 or below.")
    if any(c.kld.low is not None for where in measurements for c in where.contenders):
        notes.append("Vertical strokes are 95 % intervals, by paired bootstrap over sequences.")
    return Section("pareto", "Quality against size", figures=figures, notes=[" ".join(notes)])


def drawn(where: Measurement) -> list[Contender]:
    """The contenders that a plot shows."""
    return [c for c in where.contenders if c.failed is None and c.bits <= WIDEST]


def styles(contenders: Sequence[Contender]) -> dict[str, tuple[str, Shape]]:
    """A colour and a shape for every family, kvcalib's own first."""
    others = list(dict.fromkeys(c.family for c in contenders if not c.ours))
    found: dict[str, tuple[str, Shape]] = {c.family: ("first", "circle") for c in contenders if c.ours}
    for number, family in enumerate(others):
        found[family] = COLOURS[number % len(COLOURS)], SHAPES[number % len(SHAPES)]
    return found


def _figures(where: Measurement) -> list[Figure]:
    shown = drawn(where)
    if not shown:
        return []
    style = styles(shown)
    legend = [Key(colour, family, shape) for family, (colour, shape) in style.items()]
    about = f"{where.data}, {where.samples} × {where.seq_len} tokens"
    kinds: tuple[tuple[str, Callable[[Contender], Estimate]], ...] = (
        ("KL divergence from the unquantized model", lambda c: c.kld),
        ("Loss above the unquantized model's", lambda c: c.delta_nll),
    )
    return [Figure(title, _plot(title, shown, get, style), legend, about) for title, get in kinds]


def _plot(
    title: str,
    shown: Sequence[Contender],
    get: Callable[[Contender], Estimate],
    style: dict[str, tuple[str, Shape]],
) -> str:
    values = [v for c in shown for v in (get(c).value, get(c).low, get(c).high) if v is not None and v > 0]
    # An interval that reaches down to nothing should not stretch the axis by decades.
    lowest = min((get(c).value for c in shown if get(c).value > 0), default=1e-3) / 3
    y = Axis.over([v for v in values if v >= lowest], "nats per token", log=True)
    bits = [c.bits for c in shown]
    ends = min(bits) - 0.2, max(bits) + 0.5
    x = Axis("effective bits per element", tuple(t for t in ticks(ends, 8) if ends[0] <= t <= ends[1]), ends=ends)
    chart = Chart(title, x, y, height=320)
    families = list(style)
    for family in families:
        points = sorted((c.bits, get(c).value) for c in shown if c.family == family)
        if len(points) > 1:
            chart.line(points, style[family][0], "" if style[family][0] == "first" else "faint")
    for c in sorted(shown, key=lambda c: (c.ours, c.name)):
        estimate, (colour, shape) = get(c), style[c.family]
        if estimate.low is not None and estimate.high is not None:
            chart.spread(c.bits, estimate.low, estimate.high, colour)
        tip = f"{c.name}: {short(c.bits)} bits, {interval(estimate)}"
        chart.mark(c.bits, estimate.value, colour, shape, tip, big=c.ours)
    for c in (c for c in shown if c.ours):
        chart.name(c.bits, get(c).value, c.name)
    for family in families:
        # The legend names all; beside its largest member a family is named where there is room.
        last = max((c for c in shown if c.family == family), key=lambda c: c.bits)
        if not last.ours:
            chart.name(last.bits, get(last).value, family, crossing=0)
    return chart.svg()
