"""Where the bits went: mean code widths by layer, and by head where heads differ."""

from __future__ import annotations

from collections.abc import Sequence

from kvcalib.report.chart import Axis, Chart
from kvcalib.report.data import Layer
from kvcalib.report.heat import heat_map
from kvcalib.report.page import Figure, Key, Missing, Section, Table

ROLES = (Key("first", "keys", "circle"), Key("second", "values", "square"))
DIFFERS = 0.05
"""Bits by which a layer's heads must differ for a picture by head."""


def bits(layers: Sequence[Layer]) -> Section | Missing:
    """Widths by layer, and a heat map of heads."""
    if not layers:
        return Missing("Bits by layer", "kvcalib build RUN --out ARTIFACT")
    figures = [Figure("Mean code width", by_layer(layers, "bits", "bits per element"), ROLES)]
    if any(max(heads) - min(heads) > DIFFERS for layer in layers for heads in layer.by_head if len(heads)):
        figures.append(Figure("By head", _heads(layers), note="Keys of each KV head left, values right."))
    rows = [[str(layer.index), *(f"{b:.2f}" for b in layer.bits)] for layer in layers]
    says = "Code widths alone; outliers, scales and positions come on top. Wider where the loss is more sensitive."
    tables = [Table(["layer", "keys, bits", "values, bits"], rows, "As a table", folded=True)]
    return Section("bits", "Bits by layer", [says], figures=figures, tables=tables)


def by_layer(layers: Sequence[Layer], what: str, unit: str, log: bool = False, factor: float = 1.0) -> str:
    """Keys and values over the layers: the pair `what` of each, times `factor`."""
    pairs = [(layer.index, getattr(layer, what)) for layer in layers if getattr(layer, what) is not None]
    values = [factor * v for _, pair in pairs for v in pair]
    index = [i for i, _ in pairs]
    x = Axis.over([min(index), max(index)], "layer", whole=True)
    chart = Chart(f"{unit} by layer, keys and values", x, Axis.over(values, unit, log, zero=True))
    for place, key in enumerate(ROLES):
        points = [(float(i), factor * pair[place]) for i, pair in pairs]
        chart.line([p for p in points if p[1] > 0 or not log], key.colour)
        for i, value in points:
            assert key.shape is not None
            chart.mark(i, value, key.colour, key.shape, f"layer {i:.0f}, {key.name}: {value:.3g} {unit}")
    return chart.svg()


def _heads(layers: Sequence[Layer]) -> str:
    keys, values = (max(len(layer.by_head[role]) for layer in layers) for role in (0, 1))
    rows: list[list[float | None]] = []
    for layer in layers:
        row: list[float | None] = []
        for role, most in ((0, keys), (1, values)):
            heads = layer.by_head[role]
            row += [*heads, *[None] * (most - len(heads))]
        rows.append(row)
    names = [f"K{i}" for i in range(keys)] + [f"V{i}" for i in range(values)]
    known = [v for row in rows for v in row if v is not None]
    return heat_map(
        "mean code width by layer and head", [str(layer.index) for layer in layers], names, rows, 0.0, max(known),
        lambda v: f"{v:.2f}", "layer", "KV head", gap_before=keys,
    )  # fmt: skip
