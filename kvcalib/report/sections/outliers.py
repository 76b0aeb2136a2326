"""The share of elements kept exact, by layer."""

from __future__ import annotations

from collections.abc import Sequence

from kvcalib.report.data import Layer
from kvcalib.report.page import Figure, Missing, Section
from kvcalib.report.sections.bits import ROLES, by_layer


def outliers(layers: Sequence[Layer]) -> Section | Missing:
    """Outlier share of keys and values; one sentence where there are none."""
    if not layers:
        return Missing("Outlier share", "kvcalib build RUN --out ARTIFACT")
    title = "Outlier share by layer"
    if not any(share for layer in layers for share in layer.outliers):
        says = "No element is kept exact as an outlier: within this budget wider codes were worth more."
        return Section("outliers", title, [says])
    figure = Figure("Elements of a token kept exact", by_layer(layers, "outliers", "%", factor=100.0), ROLES)
    says = (
        "A fixed number of elements per token, by rank. Each costs its 16 bits and an index, counted in effective bits."
    )
    return Section("outliers", title, [says], figures=[figure])
