"""safetensors files, read with suspicion: the header is checked whole before a byte of a tensor is read.

    8 bytes, little endian: n | n bytes of JSON: {name: {dtype, shape, data_offsets}} | the tensors' bytes

The tensors must lie side by side from the first byte after the header to the file's last, so what is allocated is never
more than what the file holds. Tensors are read into memory of their own: a file that shrinks later does no harm.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from kvcalib.errors import CorruptFile
from kvcalib.untrusted import MAX_JSON_BYTES, open_file, parse_json, shown

DTYPES = {
    "I64": torch.int64, "F64": torch.float64, "F32": torch.float32, "I32": torch.int32, "BF16": torch.bfloat16,
    "F16": torch.float16, "I16": torch.int16, "F8_E4M3": torch.float8_e4m3fn, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
"""In the order in which safetensors' own writer puts a file's tensors."""
MAX_DIMENSIONS = 8
_PREFIX = 8


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: bytes `start` to `stop` of the part behind the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class CheckedFile:
    """An open safetensors file whose header is sound; a context manager.

    Attributes:
        entries: the tensors in the order of their bytes. metadata: strings by name. digest: with `hashing` the sha256
            of what was read so far: of the whole file once every tensor was read, in order.

    Raises:
        InputError: there is no such file. CorruptFile: it is no regular file, or its header is none or lies.
    """

    def __init__(self, path: Path, hashing: bool = False) -> None:
        self.path = path
        self._hashing = hashing
        self._file = open_file(path)
        try:
            self.size = os.fstat(self._file.fileno()).st_size
            head = self._header()
            self.digest = hashlib.sha256(head)
            self.begin = len(head)
            self.entries, self.metadata = self._parse(head[_PREFIX:])
        except ValueError as error:
            self._file.close()
            raise CorruptFile(
                f"{path}: not a readable safetensors file ({error}); {self.size} bytes, truncated or altered: copy or "
                "build it again"
            ) from None
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> CheckedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def read(self, name: str) -> Tensor:
        """The tensor `name`.

        Raises:
            CorruptFile: there is none, the file has shrunk since, or a bool is neither 0 nor 1.
        """
        if name not in self.entries:
            raise CorruptFile(f"{self.path}: has no tensor {name!r}; it is of another version or damaged")
        entry = self.entries[name]
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        if entry.stop > entry.start:
            content = raw_bytes(tensor)
            self._file.seek(self.begin + entry.start)
            if _fill(self._file, content) < len(content):
                raise CorruptFile(f"{self.path}: ends within {name!r}; it was truncated while it was read")
            if entry.dtype == torch.bool and int(tensor.view(torch.uint8).max()) > 1:
                raise CorruptFile(f"{self.path}: {name!r} holds a byte that is no bool (neither 0 nor 1)")
            if self._hashing:
                self.digest.update(content)
        return tensor

    def _header(self) -> bytes:
        """The first bytes, up to where the tensors begin."""
        prefix = bytearray(_PREFIX)
        if _fill(self._file, memoryview(prefix)) < _PREFIX:
            raise ValueError("it has no header")
        length = int.from_bytes(prefix, "little")
        most = min(self.size - _PREFIX, MAX_JSON_BYTES)
        if length > most:
            raise ValueError(f"its header claims {length} bytes, expected at most {most}")
        text = bytearray(length)
        if _fill(self._file, memoryview(text)) < length:
            raise ValueError("it ends within its header")
        return bytes(prefix + text)

    def _parse(self, text: bytes) -> tuple[dict[str, Entry], dict[str, str]]:
        body = parse_json(text)
        if not isinstance(body, dict):
            raise ValueError(f"its header is {type(body).__name__}, expected an object")
        metadata = body.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("__metadata__ is no object of strings")
        found = sorted(((n, _entry(n, e)) for n, e in body.items()), key=lambda item: (item[1].start, item[1].stop))
        end, room = 0, self.size - self.begin
        for name, entry in found:
            if entry.start != end:
                raise ValueError(
                    f"data_offsets of {shown(name)} begin at {entry.start}, expected {end}: no overlap and no gap"
                )
            end = entry.stop
            if end > room:
                raise ValueError(f"data_offsets of {shown(name)} end at {end}, beyond the {room} bytes there are")
        if end != room:
            raise ValueError(f"{room - end} bytes lie behind its last tensor")
        return dict(found), metadata


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, row-major."""
    flat = tensor.detach().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _entry(name: str, value: Any) -> Entry:
    """One checked entry of the header; ValueError that names it."""
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"entry {shown(name)} is {shown(value)}, expected dtype, shape and data_offsets")
    kind, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        raise ValueError(f"dtype of {shown(name)} is {shown(kind)}, expected one of {', '.join(DTYPES)}")
    if not _counts(shape) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"shape of {shown(name)} is {shown(shape)}, expected at most {MAX_DIMENSIONS} counts")
    if not _counts(offsets) or len(offsets) != 2 or offsets[1] < offsets[0]:
        raise ValueError(f"data_offsets of {shown(name)} are {shown(offsets)}, expected a start and an end")
    elements, reach = 1, 1
    for size in shape:
        elements, reach = elements * size, reach * max(1, size)
    # Shapes like [0, 10**18] take no bytes, but their strides would overflow.
    if elements * DTYPES[kind].itemsize != offsets[1] - offsets[0] or reach >= 1 << 50:
        raise ValueError(
            f"data_offsets of {shown(name)} span {offsets[1] - offsets[0]} bytes, its shape {shown(shape)} of {kind} "
            "does not"
        )
    return Entry(DTYPES[kind], tuple(shape), offsets[0], offsets[1])


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(x) is int and x >= 0 for x in value)


def _fill(file: Any, into: memoryview) -> int:
    """Bytes read into `into`, fewer only at the file's end."""
    done = 0
    while done < len(into) and (count := file.readinto(into[done:])):
        done += count
    return done
