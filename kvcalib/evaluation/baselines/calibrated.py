"""What a baseline may be fitted to: tokens of a calibration, as plain tensors."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, eq=False)
class LayerSample:
    """Sampled tokens of one layer, `[N, H, D]` each.

    Attributes:
        key, value: keys before RoPE and values, in the model's dtype.
        key_fisher, value_fisher: (dL/dx)^2 of each element, float32, L the summed NLL of the token's sequence.
    """

    key: Tensor
    value: Tensor
    key_fisher: Tensor
    value_fisher: Tensor


@dataclass(frozen=True, eq=False)
class Calibrated:
    """A calibration's token sample.

    Attributes:
        layers: by layer index.
        position: int64 `[N]`, each token's position in its sequence; the same tokens in all layers.
        source: where it was read from.
    """

    layers: dict[int, LayerSample] = field(repr=False)
    position: Tensor = field(repr=False)
    source: str = ""
