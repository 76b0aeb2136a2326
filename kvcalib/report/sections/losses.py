"""Did the calibration predict the cost? Predicted against measured loss, and the prediction by layer."""

from __future__ import annotations

from collections.abc import Sequence

from kvcalib.report.chart import Axis, Chart
from kvcalib.report.data import Layer, Predicted
from kvcalib.report.page import Figure, Key, Missing, Section, Table
from kvcalib.report.sections.bits import ROLES, by_layer
from kvcalib.report.words import short, signed

KINDS = (Key("first", "KLD", "circle"), Key("second", "delta NLL", "cross"), Key("c8", "equal", kind="dashed"))


def losses(predicted: Sequence[Predicted], layers: Sequence[Layer]) -> Section | Missing:
    """A point for every measured artifact, beside the line on which both are equal."""
    if not predicted:
        return Missing("Predicted against measured loss", "kvcalib eval ARTIFACT --json RUN/eval.json")
    figures = [Figure("Predicted and measured", _plot(predicted), KINDS)]
    if any(loss > 0 for layer in layers for loss in layer.loss):
        figures.append(Figure("Predicted loss by layer", by_layer(layers, "loss", "nats per token", log=True), ROLES))
    rows = [[p.name, f"{p.bits:.2f}", short(p.loss), short(p.kld), signed(p.delta_nll)] for p in predicted]
    head = ["", "effective bits", "predicted loss", "measured KLD", "measured delta NLL"]
    says = (
        "The prediction is half of the sum of Fisher times squared error over the calibration sample, nats per token. "
        "It is of second order and takes errors as independent: good for ranking plans, rough as a figure."
    )
    return Section("losses", "Predicted against measured loss", [says], figures=figures, tables=[Table(head, rows)])


def _plot(predicted: Sequence[Predicted]) -> str:
    values = [v for p in predicted for v in (p.loss, p.kld, p.delta_nll) if v > 0]
    x = Axis.over(values, "predicted, nats per token", log=True)
    y = Axis.over(values, "measured, nats per token", log=True)
    chart = Chart("predicted against measured loss of artifacts", x, y, height=320)
    ends = x.marks[0], x.marks[-1]
    chart.line([(e, e) for e in ends], "c8", "dashed")
    for p in predicted:
        chart.mark(p.loss, p.kld, "first", "circle", f"{p.name}: KLD {short(p.kld)}", big=True)
        chart.mark(p.loss, p.delta_nll, "second", "cross", f"{p.name}: delta NLL {signed(p.delta_nll)}")
    for p in predicted:
        chart.name(p.loss, p.kld, p.name, left=p.kld > p.loss)
    return chart.svg()
