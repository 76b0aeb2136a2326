"""The plot of an allocation: bits by layer, predicted loss by layer, and loss against budget with the chosen point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvcalib.report.svg import Panel, Point, page


@dataclass(frozen=True)
class Layer:
    """Mean code widths and predicted losses (nats per token) of one layer."""

    index: int
    key_bits: float
    value_bits: float
    key_loss: float
    value_loss: float


def allocation_plot(heading: str, note: str, layers: Sequence[Layer], curve: Sequence[Point], chosen: Point) -> str:
    """The SVG file's text.

    Args:
        curve: (mean code width, predicted loss) of the method's plans. chosen: the same of the plan taken.
    """
    bits = Panel("Bits by layer", "layer", "mean code width, bits per element", whole=True)
    bits.add([(layer.index, layer.key_bits) for layer in layers], "first", "keys")
    bits.add([(layer.index, layer.value_bits) for layer in layers], "second", "values")
    loss = Panel("Predicted loss by layer", "layer", "nats per token", whole=True)
    loss.add([(layer.index, layer.key_loss) for layer in layers], "first", "keys")
    loss.add([(layer.index, layer.value_loss) for layer in layers], "second", "values")
    budget = Panel("Predicted loss against budget", "mean code width, bits per element", "nats per token", log=True)
    budget.add(curve, "first", "this method's plans", dots=False)
    budget.add([chosen], "mark", f"chosen: {chosen[0]:.2f} bits", line=False)
    return page([bits, loss, budget], heading, note)
