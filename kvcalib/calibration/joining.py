"""Several records to one file: sums added exactly, the token sample cut out of all of theirs, in pieces.

The same code joins the parts that the processes of one pass leave (`part.py`), and calibration files of machines that
never met (`merging.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from kvcalib.calibration.exact import MOST, ExactSum
from kvcalib.calibration.part import Part
from kvcalib.calibration.sample import Chosen, bottom_k
from kvcalib.calibration.statistics import CalibrationInfo, file_note
from kvcalib.calibration.sums import LIMBS, TOP
from kvcalib.errors import InputError
from kvcalib.streamed import Spec, stream_tensors

COLUMNS = ("sample.hash", "sample.sequence", "sample.position")
SEQUENCES, NLL = "sequences", "nll"
PIECE = 4 << 20
"""Bytes of a sampled tensor that are in memory at a time."""


class Rows(Protocol):
    """Where sampled tokens lie."""

    def gather(self, name: str, index: np.ndarray) -> Tensor:
        """The rows `index [m]` of one tensor, `[m, ...]`."""
        ...


@dataclass
class Source:
    """One of the records that are joined.

    Attributes:
        batches: contributions to each of its sums.
        sums: by name, as files have them.
        columns: `[3, n]`, the sampled tokens' `COLUMNS`.
        sample: type and row shape of each sampled tensor.
    """

    batches: int
    sums: Mapping[str, Tensor]
    columns: np.ndarray
    sample: Mapping[str, Spec]
    rows: Rows


def join(
    path: Path, sources: Sequence[Source], keep: int, sequences: np.ndarray, info: CalibrationInfo
) -> CalibrationInfo:
    """Write the calibration file of all `sources` together; returns `info` with the NLL that they sum up to.

    Args:
        keep: tokens of the sample. sequences: `[N]`, the ids of all sequences.

    Raises:
        InputError: `path` cannot be written, or there are too many batches to add up exactly.
    """
    if sum(source.batches for source in sources) > MOST:
        raise InputError(f"{path}: more than {MOST} batches cannot be added exactly; take larger ones")
    columns = np.concatenate([source.columns for source in sources], axis=1)
    kept = bottom_k(columns[0], keep)
    owner = np.repeat(np.arange(len(sources)), [source.columns.shape[1] for source in sources])
    place = np.concatenate([np.arange(source.columns.shape[1]) for source in sources])
    owner, place = owner[kept], place[kept]
    ready = dict(zip(COLUMNS, torch.from_numpy(columns[:, kept]), strict=True))
    ready[SEQUENCES] = torch.from_numpy(np.sort(sequences))
    first = sources[0]
    specs: dict[str, Spec] = {name: (t.dtype, tuple(t.shape)) for name, t in ready.items()}
    specs |= {name: _spec(first.sums, name) for name in first.sums}
    specs |= {name: (dtype, (len(kept), *shape)) for name, (dtype, shape) in first.sample.items()}

    def pieces(name: str) -> Iterator[Tensor]:
        if name in ready:
            yield ready[name]
        elif name in first.sample:
            dtype, (_, *shape) = specs[name]
            step = max(1, PIECE // max(1, dtype.itemsize * torch.Size(shape).numel()))
            for start in range(0, len(kept), step):
                yield _gathered(sources, name, owner[start : start + step], place[start : start + step])
        else:
            yield _summed(sources, name)

    info = info.model_copy(update={"nll_sum": float(_sum(sources, NLL).value())})
    stream_tensors(path, specs, pieces, file_note(info))
    return info


def join_parts(path: Path, parts: Sequence[Part], chosen: Chosen, batch_size: int, info: CalibrationInfo) -> None:
    """Write the calibration file of one pass whose batches lie in `parts`, each in one of them.

    Raises:
        InputError: as `join`.
    """
    sources = []
    for part in parts:
        taken = [chosen.within(batch * batch_size, (batch + 1) * batch_size) for batch in part.done]
        index = np.concatenate([np.arange(x.start, x.stop) for x in taken])
        columns = np.stack([chosen.hash[index], chosen.ids[chosen.row[index]], chosen.position[index]])
        sources.append(Source(len(part.done), part.sums(), columns, part.sample, part))
    join(path, sources, info.keep_tokens, chosen.ids, info)


def _spec(tensors: Mapping[str, Tensor], name: str) -> Spec:
    tensor = tensors[name]
    return tensor.dtype, tuple(tensor.shape)


def _sum(sources: Sequence[Source], name: str) -> ExactSum:
    limbs, top = (sources[0].sums[name + end] for end in (LIMBS, TOP))
    total = ExactSum(limbs.clone(), top, sources[0].batches)
    for source in sources[1:]:
        total.merge(ExactSum(source.sums[name + LIMBS], source.sums[name + TOP], source.batches))
    return total


def _summed(sources: Sequence[Source], name: str) -> Tensor:
    for end in (LIMBS, TOP):
        if name.endswith(end):
            total = _sum(sources, name.removesuffix(end))
            return total.limbs if end == LIMBS else total.top
    return torch.stack([source.sums[name] for source in sources]).sum(0)


def _gathered(sources: Sequence[Source], name: str, owner: np.ndarray, place: np.ndarray) -> Tensor:
    """Rows of one tensor, each from its source: `[m, ...]`."""
    dtype, shape = sources[0].sample[name]
    found = torch.empty((len(owner), *shape), dtype=dtype)
    for k, source in enumerate(sources):
        mine = np.flatnonzero(owner == k)
        if len(mine):
            found[torch.from_numpy(mine)] = source.rows.gather(name, place[mine])
    return found
