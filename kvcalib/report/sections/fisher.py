"""Fisher by channel: how unequal channels are is what mixed widths live on."""

from __future__ import annotations

from collections.abc import Sequence

from kvcalib.report.chart import Axis, Chart
from kvcalib.report.data import Layer
from kvcalib.report.page import Figure, Key, Missing, Section

MOST_LAYERS, MOST_POINTS = 8, 65


def fisher(layers: Sequence[Layer]) -> Section | Missing:
    """Sorted curves of the channels' mean Fisher, a line for every shown layer."""
    known = [layer for layer in layers if any(f > 0 for role in layer.fisher for f in role)]
    if not known:
        return Missing("Fisher by channel", "kvcalib fisher MODEL --run RUN; kvcalib build RUN --out ARTIFACT")
    shown = evenly(known, MOST_LAYERS)
    legend = [Key(shade(i, len(shown)), f"layer {layer.index}") for i, layer in enumerate(shown)]
    figures = [Figure(title, _plot(shown, place, title), legend) for place, title in ((0, "Keys"), (1, "Values"))]
    spread = max(_spread(role) for layer in known for role in layer.fisher)
    says = (
        "Mean squared gradient of the loss with respect to each channel, channels sorted. The steeper a curve, the "
        f"more a width per channel gains; within one layer the upper tenth has up to {spread:.0f} times the median."
    )
    return Section("fisher", "Fisher by channel", [says], figures=figures)


def _spread(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return ordered[int(0.9 * (len(ordered) - 1))] / max(ordered[len(ordered) // 2], 1e-300)


def _plot(shown: Sequence[Layer], place: int, title: str) -> str:
    curves = [sorted((v for v in layer.fisher[place] if v > 0), reverse=True) for layer in shown]
    y = Axis.over([v for curve in curves for v in (curve or [1.0])], "mean Fisher, nats² per unit²", log=True)
    x = Axis(
        "channels, largest Fisher first", (0.0, 0.25, 0.5, 0.75, 1.0), names=("0 %", "25 %", "50 %", "75 %", "100 %")
    )
    chart = Chart(f"{title}: sorted Fisher of channels by layer", x, y)
    for number, curve in enumerate(curves):
        last = len(curve) - 1
        places = sorted({round(last * k / (MOST_POINTS - 1)) for k in range(MOST_POINTS)}) if curve else []
        chart.line([(p / max(1, last), curve[p]) for p in places], shade(number, len(curves)))
    return chart.svg()


def shade(number: int, of: int) -> str:
    """The class of one of `of` shades, lightest first."""
    return f"s{round(7 * number / max(1, of - 1))}"


def evenly(layers: Sequence[Layer], most: int) -> list[Layer]:
    """At most `most` of them, the first and the last included."""
    if len(layers) <= most:
        return list(layers)
    return [layers[round(k * (len(layers) - 1) / (most - 1))] for k in range(most)]
