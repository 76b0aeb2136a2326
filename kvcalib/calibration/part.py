"""What one process has done of a pass: a folder that is complete after every batch.

    rows                 sampled tokens, a block per batch; in a block one stretch of rows per tensor, as laid out by
                         the first batch
    state.safetensors    the sums, which batches they are of, how many rows each has, and the layout

Rows are written as they come, so none stay in memory. A batch is committed by replacing the state, after its rows are
on disk: what a process that was killed wrote beyond the state's last batch is written again.
"""

from __future__ import annotations

import contextlib
import math
import os
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kvcalib.calibration.statistics import LayerShape
from kvcalib.errors import CorruptFile, InputError
from kvcalib.files import DTYPES, remove_leftovers, write_error, write_tensors
from kvcalib.streamed import Spec, TensorFile, as_bytes, gather_rows

ROWS, STATE, DONE = "rows", "state.safetensors", "done"
TYPES = {name: dtype for dtype, name in DTYPES.items()}


class Part:
    """The folder of one process, with what was committed there.

    Attributes:
        done: rows of each committed batch, in the order in which they were done.
        sample: type and row shape of each sampled tensor.
        layers: shapes of the layers that were seen.

    Raises:
        InputError: the folder cannot be written. CorruptFile: its state is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.done: dict[int, int] = {}
        self.sample: dict[str, Spec] = {}
        self.layers: list[LayerShape] = []
        self._before: dict[str, int] = {}
        self._stride = 0
        self._start = self._count = 0
        self._file: int | None = None
        if (folder / STATE).is_file():
            state = TensorFile(folder / STATE)
            self.done = {int(batch): int(rows) for batch, rows in state[DONE]}
            for name, dtype, shape in state.metadata["sample"]:
                self._place(name, TYPES[dtype], shape)
            self.layers = [LayerShape.model_validate(shape) for shape in state.metadata["layers"]]

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.name

    def sums(self) -> dict[str, Tensor]:
        """The sums of all committed batches, as `Sums.tensors` gave them."""
        if not self.done:
            return {}
        state = TensorFile(self.folder / STATE)
        return {name: state[name] for name in state if name != DONE}

    def begin(self, rows: int) -> None:
        """A batch with `rows` sampled tokens comes."""
        self._start, self._count = sum(self.done.values()), rows

    def put(self, name: str, rows: Tensor) -> None:
        """Write this batch's rows of one tensor."""
        if name not in self.sample:
            self._place(name, rows.dtype, list(rows.shape[1:]))
        # The first batch finds out the stride as it goes; it begins at 0.
        offset = self._start * self._stride + self._count * self._before[name]
        buffer = as_bytes(rows.detach().cpu().contiguous())
        file = self._opened()
        try:
            while len(buffer):
                written = os.pwrite(file, buffer.data, offset)
                buffer, offset = buffer[written:], offset + written
        except OSError as error:
            raise write_error(self.folder / ROWS, error) from error

    def commit(self, batch: int, sums: Mapping[str, Tensor], layers: Sequence[LayerShape]) -> None:
        """The batch is complete, and `sums` are those of all batches that are."""
        if self._count:
            try:
                os.fsync(self._opened())
            except OSError as error:
                raise write_error(self.folder / ROWS, error) from error
        done = self.done | {batch: self._count}
        note = {
            "sample": [[name, DTYPES[dtype], list(shape)] for name, (dtype, shape) in self.sample.items()],
            "layers": [shape.model_dump(mode="json") for shape in layers],
        }
        table = torch.tensor(list(done.items()), dtype=torch.int64)
        write_tensors(self.folder / STATE, {**sums, DONE: table}, note)
        self.done, self.layers = done, list(layers)

    def gather(self, name: str, index: np.ndarray) -> Tensor:
        """The rows `index [m]` of one sampled tensor, counted over the batches in the order of `done`: `[m, ...]`."""
        dtype, shape = self.sample[name]
        counts = np.array(list(self.done.values()))
        starts = np.cumsum(counts) - counts
        block = np.searchsorted(starts, index, side="right") - 1
        within = (index - starts[block]) * dtype.itemsize * math.prod(shape)
        offsets = starts[block] * self._stride + counts[block] * self._before[name] + within
        return gather_rows(self._opened(), offsets, dtype, shape, self.folder / ROWS)

    def _place(self, name: str, dtype: torch.dtype, shape: Sequence[int]) -> None:
        self.sample[name], self._before[name] = (dtype, tuple(shape)), self._stride
        self._stride += dtype.itemsize * math.prod(shape)

    def _opened(self) -> int:
        if self._file is None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                remove_leftovers(self.folder)
                self._file = os.open(self.folder / ROWS, os.O_RDWR | os.O_CREAT, 0o666)
            except OSError as error:
                raise write_error(self.folder / ROWS, error) from error
            weakref.finalize(self, os.close, self._file)
        return self._file


def find_parts(folder: Path) -> list[Part]:
    """The parts in `folder` that have something done, by name; one whose state is damaged counts as not done."""
    found = []
    for path in sorted(folder.glob(f"*/{STATE}")):
        with contextlib.suppress(CorruptFile, InputError, KeyError, ValueError):
            found.append(Part(path.parent))
    return [part for part in found if part.done]
