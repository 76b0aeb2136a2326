"""What the kernels read: one layer's packed rows, its exact tokens and their positions, as the cache holds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from kvcalib.quant.quantizer import Quantizer


@dataclass
class PackedView:
    """One layer of a cache. No tensor is copied: rows may be views into buffers with spare room.

    Slots 0..T-1 are packed, slots T..T+w-1 are the exact recent tokens. The last dimension of every tensor but
    `positions` is dense.

    Attributes:
        key, value: the layer's quantizers.
        rows: `key.words [B, T, Wk]` and `value.words [B, T, Wv]` int32; with outliers `key.outlier_index [B, T, G, n]`
            (uint8 or int16) and `key.outlier_value` (fp16 or bf16), for values alike; where their codebook
            is relative, `value.zero`, `value.scale` `[B, T, G]`.
        length: T.
        positions: `[B or 1, >= T + w]` int32, position of each slot, or `[B, H, >= T + w]` where heads hold different
            tokens, of any strides; any number where a slot is masked.
        sink_key, sink_value: `[B, s, H, D]` exact tokens (keys un-rotated) that replace packed ones.
        sink_slot: `[B, s]` int32, the slot each of them replaces, -1 where unused.
        recent_key, recent_value: `[B, w, H, D]` exact tokens (keys un-rotated).
    """

    key: Quantizer
    value: Quantizer
    rows: Mapping[str, Tensor]
    length: int
    positions: Tensor
    sink_key: Tensor | None = None
    sink_value: Tensor | None = None
    sink_slot: Tensor | None = None
    recent_key: Tensor | None = None
    recent_value: Tensor | None = None

    @property
    def total(self) -> int:
        """T + w: slots of the layer."""
        return self.length + (self.recent_key.shape[1] if self.recent_key is not None else 0)
