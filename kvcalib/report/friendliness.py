"""The plot of friendliness: errors by layer, heavy hitters that quantized keys miss, weights and shares of eviction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvcalib.report.svg import Colour, Panel, page

SHOWN: tuple[tuple[int, Colour], ...] = ((2, "first"), (3, "second"), (4, "mark"))


@dataclass(frozen=True)
class LayerPoint:
    """One layer: mean relative errors, share of heavy hitters missed by key bits, weight and share (None: unknown)."""

    index: int
    key_error: float
    value_error: float
    missed: dict[int, float]
    alpha: float | None
    share: float | None


def friendliness_plot(heading: str, note: str, layers: Sequence[LayerPoint]) -> str:
    """The SVG file's text."""
    errors = Panel("Relative error; friendliness is 1 - error", "layer", "mean of |x - x^| / |x|", whole=True)
    errors.add([(layer.index, layer.key_error) for layer in layers], "first", "keys")
    errors.add([(layer.index, layer.value_error) for layer in layers], "second", "values")
    panels = [errors]
    if any(layer.missed for layer in layers):
        missed = Panel("Heavy hitters that quantized keys miss", "layer", "share of the top 20 %", whole=True)
        for bits, colour in SHOWN:
            points = [(layer.index, layer.missed[bits]) for layer in layers if bits in layer.missed]
            missed.add(points, colour, f"{bits} bit")
        panels.append(missed)
    if any(layer.alpha is not None for layer in layers):
        weights = Panel("What eviction should use", "layer", "weight of attention; part of budget", whole=True)
        weights.add([(x.index, x.alpha) for x in layers if x.alpha is not None], "first", "alpha")
        weights.add([(x.index, x.share) for x in layers if x.share is not None], "second", "share (mean 1)")
        panels.append(weights)
    return page(panels, heading, note)
