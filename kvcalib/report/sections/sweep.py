"""All points of a sweep and the front of those that no other beats."""

from __future__ import annotations

from collections.abc import Sequence

from kvcalib.report.chart import Axis, Chart
from kvcalib.report.data import SweepPoint
from kvcalib.report.page import Figure, Key, Missing, Section, Table
from kvcalib.report.pareto import Point, front
from kvcalib.report.words import short, signed

LEGEND = (Key("mark", "Pareto front"), Key("first", "setting", "circle"))


def sweep(points: Sequence[SweepPoint]) -> Section | Missing:
    """KLD against effective bits of every setting, and the front as a table."""
    if not points:
        return Missing("Sweep of settings", "kvcalib sweep GRID.yaml; kvcalib report ... --sweep FILE.jsonl")
    kept = best(points)
    x = Axis.over([p.bits for p in points], "effective bits per element")
    y = Axis.over([p.kld for p in points], "KLD, nats per token", log=True)
    chart = Chart("KLD against effective bits of every setting of the sweep", x, y, height=320)
    chart.line([(p.bits, p.kld) for p in kept], "mark")
    for p in points:
        chart.mark(p.bits, p.kld, "first", title=f"{p.name}: {p.bits:.2f} bits, KLD {short(p.kld)}")
    rows = [[p.name, f"{p.bits:.2f}", short(p.kld), signed(p.delta_nll)] for p in kept]
    says = f"{len(points)} settings, {len(kept)} of them on the front: no other has both fewer bits and less KLD."
    table = Table(["on the front", "effective bits", "KLD", "delta NLL"], rows, beside=True)
    return Section(
        "sweep", "Sweep of settings", [says], figures=[Figure("KLD against size", chart.svg(), LEGEND)], tables=[table]
    )


def best(points: Sequence[SweepPoint]) -> list[SweepPoint]:
    """The points that no other beats in bits and KLD, by rising bits."""
    return [points[int(p.name)] for p in front(Point(str(i), p.bits, p.kld) for i, p in enumerate(points))]
