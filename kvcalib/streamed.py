"""safetensors files larger than memory: read tensor by tensor, written piece by piece.

The bytes are those of the safetensors format (a header of JSON behind its length, then the tensors), which its own
library writes only from tensors that are all in memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvcalib.errors import CorruptFile
from kvcalib.files import read_tensors, replacing, tensors_note

Spec = tuple[torch.dtype, tuple[int, ...]]
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a file of ours by name, each read from disk when it is asked for and not kept.

    Raises:
        InputError, CorruptFile: as `read_tensors`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        _, self.metadata = read_tensors(path, names=())
        self._file: Any = safe_open(path, framework="pt").__enter__()
        self._names = dict.fromkeys(sorted(self._file.keys()))

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        try:
            return self._file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CorruptFile(f"{self.path}: tensor {name!r} cannot be read ({error}); copy or make it again") from None

    def spec(self, name: str) -> Spec:
        """Type and shape of a tensor, which stays on disk."""
        found = self._file.get_slice(name)
        return next(dtype for dtype, known in DTYPES.items() if known == found.get_dtype()), tuple(found.get_shape())

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def stream_tensors(
    path: Path, specs: Mapping[str, Spec], pieces: Callable[[str], Iterable[Tensor]], metadata: Any = None
) -> None:
    """Write tensors to `path` atomically; `pieces(name)` gives one's elements in order, piece by piece.

    The same content gives the same bytes. Tensors are asked for by falling size of their elements, then by name.

    Raises:
        InputError: as `write_bytes`. ValueError: the pieces of a tensor are not what `specs` says.
    """
    order = sorted(specs, key=lambda name: (-specs[name][0].itemsize, name))
    header: dict[str, Any] = {"__metadata__": tensors_note(metadata)}
    end = 0
    for name in order:
        dtype, shape = specs[name]
        start, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8 bytes
    with replacing(path, 8 + len(text) + end) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            dtype, shape = specs[name]
            left = math.prod(shape)
            for piece in pieces(name):
                left -= piece.numel()
                if piece.dtype != dtype or left < 0:
                    raise ValueError(f"{name}: a piece is {piece.dtype} {list(piece.shape)}, expected {dtype} {shape}")
                flat = piece.detach().cpu().contiguous().reshape(-1)
                if flat.numel():
                    file.write(flat.view(torch.uint8).numpy().data)
            if left:
                raise ValueError(f"{name}: {left} elements are missing of {dtype} {shape}")
