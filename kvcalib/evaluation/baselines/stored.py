"""A cache layer that stores keys and values through a codec each, and shows attention nothing but what it stored.

`update` appends, then decodes everything: slow, and never a simulation. Tokens come in the two-byte type that a cache
holds them in (float16, or bfloat16 for bfloat16 models). What a codec does not take yet, its residual window, is kept
in that type.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kvcalib.evaluation.baselines.baseline import two_bytes
from kvcalib.quant.quantizer import saturate
from kvcalib.runtime.layers import TapLayer
from kvcalib.runtime.storage import MIN_ROOM, Rows

WINDOW_ROOM = 8


class Codec(ABC):
    """How one layer's keys, or values, are stored.

    Attributes:
        block: tokens that are stored together.
    """

    block: int = 1

    @abstractmethod
    def encode(self, x: Tensor, exact: torch.dtype) -> dict[str, Tensor]:
        """`x [B, n * block, H, D]` float32 to tensors `[B, n, ...]`; scales and such in `exact`, a two-byte type."""

    @abstractmethod
    def decode(self, rows: Mapping[str, Tensor]) -> Tensor:
        """What `encode` made of n blocks back to float32 `[B, n * block, H, D]`."""

    def leaving(self, window: int) -> int:
        """How many of the first of `window` tokens, not stored yet, are to be stored now: a multiple of `block`."""
        return window

    def track(self) -> Track:
        """What holds a layer's keys, or values, in this form."""
        return Track(self)


class Track:
    """The keys, or the values, of one layer: blocks stored by a codec, then the exact window."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        # Spare room is the same number of tokens whatever a block is.
        self.packed = Rows(min_room=max(1, MIN_ROOM // self.codec.block))
        self.window = Rows(min_room=WINDOW_ROOM)

    @property
    def length(self) -> int:
        """Tokens held."""
        return self.packed.length * self.codec.block + self.window.length

    def append(self, x: Tensor, exact: torch.dtype, valid: Tensor | None = None) -> None:
        """Take tokens `x [B, t, H, D]`; `valid [B, t]`: which are real, where that is known, None for all."""
        x = saturate(x, exact)
        leaving = self.codec.leaving(self.window.length + x.shape[1])
        old = min(leaving, self.window.length)
        if leaving:
            fresh = x[:, : leaving - old]
            part = torch.cat([self.window.read(0, old)["x"], fresh], 1) if old else fresh
            self.packed.append(self.codec.encode(part.float(), exact))
            self.window.drop(old)
        if x.shape[1] > leaving - old:
            self.window.append({"x": x[:, leaving - old :]})

    def read(self) -> Tensor:
        """All tokens, float32 `[B, T, H, D]`."""
        parts = []
        if self.packed.length:
            parts.append(self.codec.decode(self.packed.read(0, self.packed.length)))
        if self.window.length:
            parts.append(self.window.read(0, self.window.length)["x"].float())
        return torch.cat(parts, 1)

    def crop(self, keep: int) -> None:
        """Keep the first `keep` tokens; what is left of a block that is cut goes back to the window, as stored."""
        blocks, rest = divmod(keep, self.codec.block)
        if blocks >= self.packed.length:
            self.window.crop(max(0, keep - self.packed.length * self.codec.block))
            return
        self.window.crop(0)
        tail = self.codec.decode(self.packed.read(blocks, blocks + 1))[:, :rest] if rest else None
        self.packed.crop(blocks)
        if tail is not None:
            held = self.window.tensors().get("x")
            self.window.append({"x": tail if held is None else saturate(tail, held.dtype)})

    def select(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        self.packed.select(indices)
        self.window.select(indices)

    def tensors(self) -> dict[str, Tensor]:
        """Everything held, spare room included."""
        return self.packed.tensors() | {f"recent.{name}": t for name, t in self.window.tensors().items()}


class StoredLayer(TapLayer):
    """Keys and values of one layer, stored by a codec each.

    Untapped it is a layer of any `DynamicCache` and stores keys after RoPE. In a tapped model (`tapped.py`) it stores
    keys before RoPE, and who reads rotates them.
    """

    def __init__(self, key: Codec, value: Codec) -> None:
        super().__init__()
        self.codecs = (key, value)
        self._clear()

    def _clear(self) -> None:
        self.tracks = {role: codec.track() for role, codec in zip(("key", "value"), self.codecs, strict=True)}
        self.is_initialized, self.seen, self.valid = False, 0, None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store `[B, H, t, D]`; all keys and values as stored, `[B, H, T, D]`."""
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self.seen += key_states.shape[2]
        for role, x in (("key", key_states), ("value", value_states)):
            self.tracks[role].append(x.detach().transpose(1, 2), two_bytes(x.dtype), self.valid)
        key, value = (self.tracks[role].read().transpose(1, 2).to(self.dtype) for role in ("key", "value"))
        return key, value

    @property
    def batch(self) -> int:
        return max(max(track.packed.batch, track.window.batch) for track in self.tracks.values())

    def crop(self, tokens_to_remove: int) -> None:
        keep = self._crop_to(tokens_to_remove, self.seen)
        for track in self.tracks.values():
            track.crop(keep)

    def batch_select_indices(self, indices: Tensor) -> None:
        for track in self.tracks.values():
            track.select(indices)

    def reset(self) -> None:
        self._clear()

    def tensors(self) -> dict[str, Tensor]:
        return {f"{role}.{name}": t for role, track in self.tracks.items() for name, t in track.tensors().items()}
