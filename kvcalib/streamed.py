"""safetensors files larger than memory: read tensor by tensor, written piece by piece.

The bytes are those of the safetensors format (a header of JSON behind its length, then the tensors), which its own
library writes only from tensors that are all in memory.
"""

from __future__ import annotations

import itertools
import math
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvcalib.errors import CorruptFile
from kvcalib.files import flat_bytes, layout, read_tensors, replacing
from kvcalib.tensorfile import CheckedFile

Spec = tuple[torch.dtype, tuple[int, ...]]
GAP = 16 << 10
"""Bytes between two rows that are rather read than skipped."""
SPAN = 1 << 20
"""About the bytes that are read at a time."""


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a file of ours by name, each read from disk when it is asked for and not kept.

    It is read, not mapped: mapped pages would count as this process's memory for as long as the file is open.

    Attributes:
        specs: type and shape of each.

    Raises:
        InputError, CorruptFile: as `read_tensors`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        _, self.metadata = read_tensors(path, names=())
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        with CheckedFile(path) as file:
            self.specs: dict[str, Spec] = {n: (e.dtype, e.shape) for n, e in sorted(file.entries.items())}
            self._start = {name: file.begin + entry.start for name, entry in file.entries.items()}

    def __getitem__(self, name: str) -> Tensor:
        dtype, shape = self.specs[name]
        tensor = torch.empty(shape, dtype=dtype)
        read_into(self._file, as_bytes(tensor), self._start[name], self.path)
        return tensor

    def gather(self, name: str, index: np.ndarray) -> Tensor:
        """The rows `index [m]` of one tensor, `[m, ...]`."""
        dtype, (_, *shape) = self.specs[name]
        size = dtype.itemsize * math.prod(shape)
        return gather_rows(self._file, self._start[name] + index * size, dtype, shape, self.path)

    def __contains__(self, name: object) -> bool:
        return name in self.specs

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)


def as_bytes(tensor: Tensor) -> np.ndarray:
    """The memory of a contiguous CPU tensor, `[bytes]` uint8."""
    return tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else np.empty(0, np.uint8)


def read_into(file: int, buffer: np.ndarray, offset: int, path: Path) -> None:
    """Fill `buffer` from `offset` on; CorruptFile if the file ends before, or cannot be read."""
    done = 0
    while done < len(buffer):
        try:
            got = os.preadv(file, [buffer[done:].data], offset + done)
        except OSError as error:
            raise CorruptFile(f"{path}: cannot be read ({error.strerror}); copy or make it again") from None
        if got == 0:
            raise CorruptFile(f"{path}: ends after {offset + done} bytes, {len(buffer) - done} more are expected")
        done += got


def gather_rows(file: int, offsets: np.ndarray, dtype: torch.dtype, shape: Sequence[int], path: Path) -> Tensor:
    """Rows of `shape` that lie at `offsets [m]`, in any order: `[m, *shape]`. Neighbours are read together."""
    found = torch.empty((len(offsets), *shape), dtype=dtype)
    size = dtype.itemsize * math.prod(shape)
    if not found.numel():
        return found
    rows, order = as_bytes(found).reshape(-1, size), np.argsort(offsets, kind="stable")
    places = offsets[order]
    step = np.diff(places)
    apart = (step % size != 0) | (step > size + GAP) | (places[1:] // SPAN != places[:-1] // SPAN)
    for start, stop in itertools.pairwise([0, *(np.flatnonzero(apart) + 1).tolist(), len(places)]):
        first = int(places[start])
        buffer = np.empty(int(places[stop - 1]) - first + size, np.uint8)
        read_into(file, buffer, first, path)
        rows[order[start:stop]] = buffer.reshape(-1, size)[(places[start:stop] - first) // size]
    return found


def stream_tensors(
    path: Path, specs: Mapping[str, Spec], pieces: Callable[[str], Iterable[Tensor]], metadata: Any = None
) -> None:
    """Write tensors to `path` atomically; `pieces(name)` gives one's elements in order, piece by piece.

    The same content gives the same bytes. Tensors are asked for by type, then by name.

    Raises:
        InputError: as `write_bytes`. ValueError: the pieces of a tensor are not what `specs` says.
    """
    header, order, size = layout(specs, metadata)
    with replacing(path, size) as temporary, open(temporary, "wb") as file:
        file.write(header)
        for name in order:
            dtype, shape = specs[name]
            left = math.prod(shape)
            for piece in pieces(name):
                left -= piece.numel()
                if piece.dtype != dtype or left < 0:
                    raise ValueError(f"{name}: a piece is {piece.dtype} {list(piece.shape)}, expected {dtype} {shape}")
                file.write(flat_bytes(piece))
            if left:
                raise ValueError(f"{name}: {left} elements are missing of {dtype} {shape}")
