"""Losses by measurement: what rounding one layer's keys, or its values, alone did to the model's predictions.

The measurement has one figure per width, KL(unquantized || quantized) in nats per token, and knows no channels. The
Fisher loss knows channels, but is a second-order estimate. Joined, each width of a channel costs

    loss'[w, h, d] = loss[w, h, d] * KL[w] / sum of loss[w]

so that the channels of a layer add up to what was measured, and share it as the Fisher information says.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kvcalib.errors import InputError
from kvcalib.quant.packing import MAX_BITS


def measured_loss(loss: Tensor, measured: Mapping[int, float]) -> Tensor:
    """Losses that add up to the measured ones: `loss [9, H, D]` to float64 `[9, H, D]`, nats per token.

    A width that was not measured is scaled as the nearest one that was (the wider of two as near). A width whose loss
    is 0 in every channel shares its KL evenly.

    Args:
        loss: predicted loss of the widths 0..8 of every channel.
        measured: KL by width, nats per token; at least one.

    Raises:
        InputError: nothing was measured, a width is outside 0..8, or a KL is negative, NaN or infinite.
    """
    if not measured:
        raise InputError(
            "no width of this layer was measured, expected at least one of 0..8; run the measurement again"
        )
    for width, found in measured.items():
        if not 0 <= width <= MAX_BITS:
            raise InputError(f"the measured width is {width}, expected 0..{MAX_BITS}")
        if not 0 <= found < float("inf"):
            raise InputError(f"the KL measured at {width} bits is {found}, expected a finite number of 0 or more")
    wide = loss.double()
    scaled = torch.empty_like(wide)
    for width in range(MAX_BITS + 1):
        near = min(measured, key=lambda m: (abs(m - width), -m))
        total = float(wide[near].sum())
        if total > 0:
            scaled[width] = wide[width] * (measured[near] / total)
        else:
            scaled[width] = measured[near] / wide[width].numel()
    return scaled
