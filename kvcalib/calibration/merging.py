"""Calibration files of machines that never met, to one.

Merging is associative and commutative to the last bit, and gives the tensors of one pass over all of the text, if that
pass has the same batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from kvcalib.calibration.joining import COLUMNS, SEQUENCES, Source, join
from kvcalib.calibration.statistics import APART, Calibration, CalibrationInfo
from kvcalib.errors import InputError
from kvcalib.model.identity import hash_json
from kvcalib.streamed import TensorFile


@dataclass(frozen=True)
class Merger:
    """Records that can be merged.

    Attributes:
        info: what the merged file says of itself, but for the NLL. sequences: `[N]`, ids of all sequences.
    """

    records: list[Calibration]
    info: CalibrationInfo
    sequences: np.ndarray

    @classmethod
    def of(cls, files: Sequence[Path]) -> Merger:
        """The records in `files`.

        Raises:
            InputError: a file is missing or of an old version, they are of different models, seeds, windows, lengths
                or dtypes, or a sequence is in two of them. CorruptFile: one is damaged.
        """
        records = [Calibration.load(file)[0] for file in files]
        for file, record in zip(files, records, strict=True):
            if record.info.batches is None or SEQUENCES not in record.stored:
                raise InputError(
                    f"{file}: calibration version {record.info.version} cannot be merged, expected 5 or later; run "
                    "`kvcalib fisher` again with --overwrite"
                )
            _check_alike(files[0], records[0], file, record)
        sequences = [record.stored[SEQUENCES].numpy() for record in records]
        _check_apart(files, sequences)
        return cls(records, _together([record.info for record in records]), np.concatenate(sequences))

    def write(self, path: Path) -> None:
        """Write the calibration file of all texts; InputError if `path` cannot be written."""
        join(path, [_source(record) for record in self.records], self.info.keep_tokens, self.sequences, self.info)


def _together(infos: Sequence[CalibrationInfo]) -> CalibrationInfo:
    runs = sorted(run for info in infos for run in info.merged or [info.fingerprint])
    totals = ("sequences", "tokens", "predicted_tokens", "batches")
    return infos[0].model_copy(
        update={
            "fingerprint": hash_json(runs),
            "merged": runs,
            "data": APART.join(sorted({text for info in infos for text in info.texts})),
            # Where a name or the rounding of a norm differs, the choice must not depend on the order.
            "model": min((info.model for info in infos), key=lambda model: model.model_dump_json()),
            "layers": min((info.layers for info in infos), key=lambda layers: [x.model_dump_json() for x in layers]),
            **{name: sum(getattr(info, name) for info in infos) for name in totals},
        }
    )


def _check_apart(files: Sequence[Path], sequences: Sequence[np.ndarray]) -> None:
    """InputError if a sequence is in two of the files."""
    for k, mine in enumerate(sequences):
        for other in range(k):
            both = np.intersect1d(mine, sequences[other])
            if len(both):
                raise InputError(
                    f"cannot merge: {len(both)} of the {len(mine)} sequences of {files[k]} are in {files[other]} too "
                    "and would count twice; merge calibrations of different text"
                )


def _source(record: Calibration) -> Source:
    stored: Any = record.stored
    names = [name for name in stored if name not in (*COLUMNS, SEQUENCES)]
    sampled = {name for name in names if ".sample." in name}
    columns = np.stack([stored[name].numpy() for name in COLUMNS])
    sample = {name: (dtype, shape[1:]) for name, (dtype, shape) in stored.specs.items() if name in sampled}
    sums = _Named(stored, [name for name in names if name not in sampled])
    return Source(record.info.batches or 0, sums, columns, sample, stored)


class _Named(Mapping[str, Tensor]):
    """Some of a file's tensors."""

    def __init__(self, tensors: TensorFile, names: list[str]) -> None:
        self.tensors, self.names = tensors, names

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _check_alike(first_file: Path, first: Calibration, file: Path, other: Calibration) -> None:
    """InputError, naming what differs, if two records cannot be one."""
    for name in ("version", "seed", "keep_tokens", "window", "seq_len", "layers"):
        a, b = getattr(first.info, name), getattr(other.info, name)
        if name == "layers":
            a, b = ([(x.index, x.query_heads, x.kv_heads, x.head_dim, x.sliding, x.partner) for x in y] for y in (a, b))
        if a != b:
            raise InputError(f"cannot merge: {name} is {b} in {file} and {a} in {first_file}; calibrate both alike")
    specs = []
    for record in (first, other):
        stored: Any = record.stored
        specs.append(
            {n: (d, s[1:] if ".sample." in n else s) for n, (d, s) in stored.specs.items() if n.startswith("layers.")}
        )
    for name in sorted(set(specs[0]) | set(specs[1])):
        a, b = (spec.get(name) for spec in specs)
        if a != b:
            raise InputError(
                f"cannot merge: {name} is {b} in {file} and {a} in {first_file}; calibrate both with the same --dtype"
            )
    for name in ("weights_sha256", "rope_parameters_sha256"):
        if getattr(first.info.model, name) != getattr(other.info.model, name):
            raise InputError(
                f"cannot merge: {file} is of {other.info.model.name!r} and {first_file} of {first.info.model.name!r}, "
                f"whose {name} differ; calibrate both on one model"
            )
