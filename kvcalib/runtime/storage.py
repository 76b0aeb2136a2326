"""Growing tensors: rows of a batch that get longer, token by token.

Dimension 0 is the batch, dimension 1 the token. Room grows by an eighth (at least 64 tokens) when it runs out, so
appending a token costs O(1) on average and at most an eighth of the memory is spare; the first append takes exactly
what it needs. A grown tensor is never larger than that: `nbytes` is what the process really holds.
"""

from __future__ import annotations

import torch
from torch import Tensor

MIN_ROOM = 64


class Rows:
    """Named tensors `[B, T, ...]` that are appended to, cut and selected together."""

    def __init__(self) -> None:
        self.length = 0
        self._buffers: dict[str, Tensor] = {}

    def append(self, new: dict[str, Tensor]) -> None:
        """Add the same number of tokens `[B, t, ...]` to every tensor."""
        count = next(iter(new.values())).shape[1]
        stop = self.length + count
        for name, tensor in new.items():
            buffer = self._buffers.get(name)
            if buffer is None:
                self._buffers[name] = tensor.contiguous().clone()
                continue
            if buffer.shape[1] < stop:
                room = max(stop, self.length + max(MIN_ROOM, self.length // 8))
                grown = buffer.new_empty(buffer.shape[0], room, *buffer.shape[2:])
                grown[:, : self.length] = buffer[:, : self.length]
                self._buffers[name] = buffer = grown
            buffer[:, self.length : stop] = tensor
        self.length = stop

    def read(self, start: int, stop: int) -> dict[str, Tensor]:
        """Tokens `start..stop` of every tensor, as views."""
        return {name: buffer[:, start:stop] for name, buffer in self._buffers.items()}

    def crop(self, length: int) -> None:
        """Forget the tokens from `length` on; give memory back once three quarters of it are spare."""
        self.length = min(self.length, length)
        for name, buffer in self._buffers.items():
            if self.length < buffer.shape[1] // 4:
                self._buffers[name] = buffer[:, : self.length].clone()

    def select(self, indices: Tensor) -> None:
        """Keep the batch rows `indices`, in that order, repeated as often as they occur."""
        for name, buffer in self._buffers.items():
            self._buffers[name] = buffer[:, : self.length].index_select(0, indices.to(buffer.device))

    def to(self, device: torch.device | str) -> None:
        """Move every tensor."""
        self._buffers = {name: buffer.to(device) for name, buffer in self._buffers.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor held, spare room included."""
        return dict(self._buffers)

    @property
    def nbytes(self) -> int:
        """Bytes held, spare room included."""
        return sum(buffer.nbytes for buffer in self._buffers.values())
