"""How each layer's tokens survive storage, and what eviction should make of it."""

from __future__ import annotations

from collections.abc import Sequence

from kvcalib.report.chart import Axis, Chart
from kvcalib.report.data import Layer
from kvcalib.report.page import Figure, Key, Missing, Section
from kvcalib.report.sections.bits import ROLES, by_layer


def friendliness(layers: Sequence[Layer]) -> Section | Missing:
    """Relative errors, heavy hitters missed, weights and shares, of the layers that have them."""
    known = [layer for layer in layers if layer.error is not None]
    if not known:
        return Missing("Friendliness", "kvcalib friendliness RUN; kvcalib build RUN --out ARTIFACT")
    figures = [Figure("Relative error of stored tokens", by_layer(known, "error", "mean of |x - x̂| / |x|"), ROLES)]
    missed = [(layer.index, 1 - layer.overlap) for layer in known if layer.overlap is not None]
    if missed:
        one = _lines([("first", missed)], "share of the top 20 %")
        figures.append(Figure("Heavy hitters that quantized keys miss", one))
    alphas = [(layer.index, layer.alpha) for layer in known if layer.alpha is not None]
    shares = [(layer.index, layer.share) for layer in known if layer.share is not None]
    if alphas or shares:
        legend = [
            Key("first", "alpha: weight of attention", "circle"),
            Key("second", "share of the token budget, mean 1", "square"),
        ]
        both = _lines([("first", alphas), ("second", shares)], "weight; share")
        figures.append(Figure("What eviction should use", both, legend))
    says = "Friendliness is 1 - relative error. A layer with large errors needs more bits, or fewer tokens to lose."
    return Section("friendliness", "Friendliness by layer", [says], figures=figures)


def _lines(series: Sequence[tuple[str, Sequence[tuple[int, float]]]], unit: str) -> str:
    points = [p for _, some in series for p in some]
    x = Axis.over([float(i) for i, _ in points], "layer", whole=True)
    chart = Chart(f"{unit} by layer", x, Axis.over([v for _, v in points], unit, zero=True))
    for colour, some in series:
        chart.line([(float(i), v) for i, v in some], colour)
        for i, value in some:
            shape = "circle" if colour == "first" else "square"
            chart.mark(i, value, colour, shape, f"layer {i}: {value:.3g}")  # type: ignore[arg-type]
    return chart.svg()
