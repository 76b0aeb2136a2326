"""Growing tensors: rows of a batch that get longer, token by token, and may be forgotten from either end.

Dimension 0 is the batch, dimension 1 the token. Room grows by an eighth (or another `share`; at least `min_room`
tokens) when it runs out, so appending a token costs O(1) on average and at most that much of the memory is spare; the
first append takes exactly what it needs. Tokens dropped from the front are spare room too, used again when the room
runs out. A grown tensor is never larger than that: `nbytes` is what the process really holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

MIN_ROOM = 64

Spec = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape of one token and type of what is kept, by name."""


def check_rows(part: str, found: Mapping[str, Tensor], expected: Spec, length: int | None = None) -> int:
    """Tokens of `found [B, t, ...]`, t of them if `length` is given; 0 if there is nothing.

    Raises:
        ValueError: a tensor is missing, unknown, or not of the expected shape and type.
    """
    if found and set(found) != set(expected):
        raise ValueError(f"{part} holds {sorted(found)}, expected {sorted(expected)}")
    if not found:
        return 0
    batch, tokens = (*next(iter(found.values())).shape, 0, 0)[:2]
    tokens = tokens if length is None else length
    for name, tensor in found.items():
        tail, kind = expected[name]
        if tensor.shape != (batch, tokens, *tail) or tensor.dtype != kind:
            raise ValueError(
                f"{part}.{name} is {tensor.dtype} {list(tensor.shape)}, expected {kind} {[batch, tokens, *tail]}"
            )
    return tokens


class Slices(Mapping[str, Tensor]):
    """Tokens `start..stop` of every tensor of `rows`, as views that are made when they are asked for.

    Valid until the rows change.
    """

    def __init__(self, rows: Rows, start: int, stop: int) -> None:
        self._rows, self._start, self._stop = rows, start, stop

    def __getitem__(self, name: str) -> Tensor:
        first = self._rows._first
        return self._rows._buffers[name][:, first + self._start : first + self._stop]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows._buffers)

    def __len__(self) -> int:
        return len(self._rows._buffers)

    def dtype(self, name: str) -> torch.dtype:
        """The type of one tensor."""
        return self._rows._buffers[name].dtype

    def place(self, name: str) -> tuple[int, int, int]:
        """Address of the first token of one tensor, and the steps, in elements, between rows and tokens."""
        return self._rows.place(name, self._start)


class Rows:
    """Named tensors `[B, T, ...]` that are appended to, cut and selected together."""

    def __init__(self, min_room: int = MIN_ROOM, share: int = 8) -> None:
        self.length = 0
        self.min_room = min_room
        self.share = share
        self._first = 0
        self._buffers: dict[str, Tensor] = {}
        self._places: dict[str, tuple[int, int, int, int]] = {}

    def place(self, name: str, start: int) -> tuple[int, int, int]:
        """Address of token `start` of one tensor, and the steps, in elements, between batch rows and tokens."""
        known = self._places.get(name)
        if known is None:
            # Looked up once: most steps write where the last one did.
            buffer = self._buffers[name]
            row, token = buffer.stride()[:2]
            known = self._places[name] = (buffer.data_ptr(), row, token, token * buffer.element_size())
        address, row, token, size = known
        return address + (self._first + start) * size, row, token

    def __getstate__(self) -> dict[str, Any]:
        # A copy has memory of its own.
        return self.__dict__ | {"_places": {}}

    @property
    def batch(self) -> int:
        """Rows of the batch, 0 before the first append."""
        return next(iter(self._buffers.values())).shape[0] if self._buffers else 0

    def append(self, new: dict[str, Tensor]) -> None:
        """Add the same number of tokens `[B, t, ...]` to every tensor."""
        self.extend({name: (tensor.shape, tensor.dtype, tensor.device) for name, tensor in new.items()})
        count = next(iter(new.values())).shape[1]
        for name, place in self.read(self.length - count, self.length).items():
            place.copy_(new[name])

    def extend(self, new: dict[str, tuple[torch.Size, torch.dtype, torch.device]]) -> None:
        """Make room for tokens of the given shapes `[B, t, ...]`, which the caller writes."""
        count = next(iter(new.values()))[0][1]
        stop = self._first + self.length + count
        room = self.length + count
        if self._buffers and stop > next(iter(self._buffers.values())).shape[1]:
            room = max(room, self.length + max(self.min_room, self.length // self.share))
            self._buffers = {name: self._moved(buffer, room) for name, buffer in self._buffers.items()}
            self._places = {}
            self._first = 0
        for name, (shape, dtype, device) in new.items():
            if name not in self._buffers:
                self._places = {}
                self._buffers[name] = torch.empty(shape[0], room, *shape[2:], dtype=dtype, device=device)
        self.length += count

    def _moved(self, buffer: Tensor, room: int) -> Tensor:
        grown = buffer.new_empty(buffer.shape[0], room, *buffer.shape[2:])
        grown[:, : self.length] = buffer[:, self._first : self._first + self.length]
        return grown

    def read(self, start: int, stop: int) -> Slices:
        """Tokens `start..stop` of every tensor."""
        return Slices(self, start, stop)

    def crop(self, length: int) -> None:
        """Forget the tokens from `length` on; give memory back once three quarters of it are spare."""
        self.length = min(self.length, length)
        if self._buffers and self.length < next(iter(self._buffers.values())).shape[1] // 4:
            self._buffers = {name: self._moved(buffer, self.length) for name, buffer in self._buffers.items()}
            self._places = {}
            self._first = 0

    def drop(self, count: int) -> None:
        """Forget the first `count` tokens; their room is used again once it exceeds the spare room of `append`."""
        count = min(count, self.length)
        self._first += count
        self.length -= count
        if self._first > max(self.min_room, self.length // 8):
            self._buffers = {name: self._moved(buffer, self.length) for name, buffer in self._buffers.items()}
            self._places = {}
            self._first = 0

    def replace(self, kept: dict[str, Tensor], room: int) -> None:
        """Hold `kept [B, t, ...]`, of the names and sizes held now, in room for `room` tokens or a little more.

        Memory that is about as large as that is used again.
        """
        count = next(iter(kept.values())).shape[1]
        room = max(room, count)
        for name, new in kept.items():
            buffer = self._buffers[name]
            if not room <= buffer.shape[1] <= room + room // self.share:
                buffer = self._buffers[name] = buffer.new_empty(new.shape[0], room, *buffer.shape[2:])
            buffer[:, :count] = new
        self._places = {}
        self._first = 0
        self.length = count

    def select(self, indices: Tensor) -> None:
        """Keep the batch rows `indices`, in that order, repeated as often as they occur."""
        # Spare room and all: beam search selects before every append.
        for name, buffer in self._buffers.items():
            self._buffers[name] = buffer.index_select(0, indices.to(buffer.device))
        self._places = {}

    def to(self, device: torch.device | str) -> None:
        """Move every tensor."""
        self._buffers = {name: buffer.to(device) for name, buffer in self._buffers.items()}
        self._places = {}

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor held, spare room included."""
        return dict(self._buffers)

    @property
    def nbytes(self) -> int:
        """Bytes held, spare room included."""
        return sum(buffer.nbytes for buffer in self._buffers.values())
