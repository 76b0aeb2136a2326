"""Codebooks against what was sampled: do the centroids lie where the values, and the Fisher weight, are?"""

from __future__ import annotations

from collections.abc import Sequence

from kvcalib.report.chart import Axis, Chart
from kvcalib.report.data import Density
from kvcalib.report.page import Figure, Key, Missing, Section
from kvcalib.report.svg import ticks
from kvcalib.report.words import percent

LEGEND = (
    Key("c8", "sampled values", kind="area"),
    Key("second", "the same, weighted by Fisher", kind="line thin"),
    Key("first", "centroids", kind="line"),
)


def codebooks(densities: Sequence[Density], rule: str) -> Section | Missing:
    """A small histogram for every chosen channel, its centroids as strokes on the axis."""
    if not densities:
        return Missing("Codebooks against the sampled density", "kvcalib report RUN (the run holds the sample)")
    figures = []
    for one in densities:
        title = f"Layer {one.layer}, {one.role} head {one.head}, channel {one.channel}"
        note = f"{one.why}; {one.width} bit" + (f", {percent(one.outside, 2)} beyond the edges" if one.outside else "")
        figures.append(Figure(title, _plot(one, title), note=note, small=True))
    return Section("codebooks", "Codebooks against the sampled density", [rule], figures=figures, legend=LEGEND)


def _plot(one: Density, title: str) -> str:
    # A few tokens can carry most of the Fisher weight: their peaks are cut where they would flatten the rest.
    highest = min(max([*one.density, *one.weighted]), 2 * max(one.density)) or 1.0
    ends = one.edges[0], one.edges[-1]
    x = Axis(one.unit, tuple(t for t in ticks(ends, 6) if ends[0] <= t <= ends[1]), ends=ends)
    y = Axis("", (), ends=(0.0, highest * 1.05))
    chart = Chart(f"{title}: histogram and {len(one.centroids)} centroids", x, y, width=320, height=190, left=14)
    chart.steps(one.edges, one.density, "c8", filled=True)
    chart.steps(one.edges, one.weighted, "second")
    chart.ticks_below(one.centroids, "first")
    return chart.svg()
