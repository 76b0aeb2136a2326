"""The calibration record: float64 sums per layer and the token sample, in one safetensors file.

Everything adds up: `merge(a, b)` is the record of both texts. Per layer `i` (H kv heads, Hq query
heads, n kept tokens):

    layers.i.key.sum, .square_sum, .fisher_sum          [H, D]   (and layers.i.value.*)
    layers.i.query.outer                                [H, D, D]  sum of q q^T over tokens and the group's heads
    layers.i.query.norm_histogram                       [Hq, 512]  counts of log2 |q|^2, see `NORM_BINS`
    layers.i.attention.peak_sum, .peak_square_sum       [H]      of the windowed maximum
    layers.i.sample.key, .value                         [n, H, D]  in the model's dtype, keys before RoPE
    layers.i.sample.key_fisher, .value_fisher           [n, H, D]  float32, (dL/dx)^2, L the summed NLL of the sequence
    layers.i.sample.attention_sum, .attention_peak      [n, H]   attention drawn from all later queries; its maximum
                                                        over the first `window` queries
    layers.i.sample.attention_late                      [n, H]   mean over the later half of these queries
    layers.i.sample.attention_early                     [n, H]   drawn from the queries of the sequence's first half
    layers.i.sample.attention_slope                     [n, H, D]  bfloat16, gradient of attention_early with respect
                                                        to the token's own key
    layers.i.sample.attention_later_square              [n, H]   sum of squared weights, queries of the second half
    sample.hash, sample.sequence, sample.position       [n]

All queries and keys are un-rotated.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from kvcalib.calibration.sample import bottom_k
from kvcalib.errors import CorruptFile, InputError
from kvcalib.files import read_tensors, write_tensors
from kvcalib.model.identity import ModelIdentity, hash_json

VERSION = 4
READABLE = (2, 3, VERSION)
"""Versions that `load` reads. Files of version 2 lack `LayerShape.scaling`, which only QAQ needs; files before version
4 lack `attention_early`, `_slope` and `_later_square`, which only the weights of eviction need."""
NORM_BINS = 512
NORM_LOWEST, NORM_PER_OCTAVE = -24, 8


class LayerShape(BaseModel):
    """Shape of one calibrated layer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    index: int
    query_heads: int
    kv_heads: int
    head_dim: int
    key_bias_norm: float | None = Field(default=None, description="|b_k| of the key projection, if it has a bias.")
    sliding: int | None = Field(default=None, description="Tokens that a query sees, itself included; None for all.")
    partner: list[int] = Field(description="For each channel of a head the one that RoPE turns it with.")
    scaling: float | None = Field(
        default=None, description="What the attention multiplies q.k by, as its call said; None in files of version 2."
    )


def rope_pairs(partner: list[int]) -> list[tuple[int, int]]:
    """The pairs of channels that RoPE turns together, each once, by their lower channel."""
    return [(i, p) for i, p in enumerate(partner) if i < p]


class CalibrationInfo(BaseModel):
    """What a calibration file says of itself."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    version: int = VERSION
    model: ModelIdentity
    data: str
    seed: int
    keep_tokens: int
    window: int
    seq_len: int
    sequences: int
    tokens: int
    nll_sum: float = Field(description="Summed NLL of all predicted tokens, nats.")
    predicted_tokens: int
    fingerprint: str
    layers: list[LayerShape]

    @property
    def nll(self) -> float:
        """Mean NLL of the calibration text, nats per predicted token."""
        return self.nll_sum / max(1, self.predicted_tokens)


@dataclass
class Calibration:
    """A calibration file in memory: what it is of, and its tensors by name."""

    info: CalibrationInfo
    tensors: dict[str, Tensor] = field(repr=False)

    def layer(self, index: int) -> dict[str, Tensor]:
        """Tensors of one layer, their names without `layers.{index}.`."""
        prefix = f"layers.{index}."
        return {n.removeprefix(prefix): t for n, t in self.tensors.items() if n.startswith(prefix)}

    def save(self, path: Path, extra: Any = None) -> None:
        """Write the file atomically; the same record gives the same bytes."""
        note = {"info": self.info.model_dump(mode="json"), "extra": extra}
        write_tensors(path, self.tensors, note)

    @classmethod
    def load(cls, path: Path) -> tuple[Calibration, Any]:
        """The record in `path`, and the `extra` it was saved with.

        Raises:
            InputError: no such file. CorruptFile: damaged, or of another version.
        """
        tensors, note = read_tensors(path)
        version = note.get("info", {}).get("version")
        if version not in READABLE:
            raise CorruptFile(
                f"{path}: calibration version is {version!r}, expected one of {READABLE}; run `kvcalib fisher` again "
                "with --overwrite"
            )
        return cls(CalibrationInfo.model_validate(note["info"]), tensors), note.get("extra")


def merge(a: Calibration, b: Calibration) -> Calibration:
    """The record of both texts: sums added, the sample cut out of both.

    Raises:
        InputError: the two are of different models, seeds, windows or sequence lengths.
    """
    for name in ("seed", "keep_tokens", "window", "seq_len", "layers"):
        if getattr(a.info, name) != getattr(b.info, name):
            raise InputError(
                f"cannot merge calibrations: {name} is {getattr(a.info, name)} in one and "
                f"{getattr(b.info, name)} in the other; calibrate both alike"
            )
    if set(a.tensors) != set(b.tensors):
        raise InputError(
            f"cannot merge calibrations: only one of them has {sorted(set(a.tensors) ^ set(b.tensors))[0]!r}; "
            "calibrate both with one version of kvcalib"
        )
    if a.info.model.weights_sha256 != b.info.model.weights_sha256:
        raise InputError(f"cannot merge calibrations of {a.info.model.name!r} and {b.info.model.name!r}: other weights")
    hashes = torch.cat([a.tensors["sample.hash"], b.tensors["sample.hash"]])
    kept = torch.from_numpy(bottom_k(hashes.numpy(), a.info.keep_tokens))
    merged = {}
    for name, tensor in a.tensors.items():
        other = b.tensors[name]
        merged[name] = torch.cat([tensor, other])[kept] if "sample." in name else tensor + other
    info = a.info.model_copy(
        update={
            "fingerprint": hash_json(sorted([a.info.fingerprint, b.info.fingerprint])),
            "data": a.info.data if a.info.data == b.info.data else f"{a.info.data} + {b.info.data}",
            **{
                n: getattr(a.info, n) + getattr(b.info, n)
                for n in ("sequences", "tokens", "nll_sum", "predicted_tokens")
            },
        }
    )
    return Calibration(info, merged)


def norm_histogram(squared: Tensor) -> Tensor:
    """Counts of `log2(squared)` in eighths of an octave from 2^-24 on: `[Hq, tokens] -> [Hq, 512]` int64."""
    place = ((squared.clamp(min=1e-30).log2() - NORM_LOWEST) * NORM_PER_OCTAVE).floor().clamp(0, NORM_BINS - 1).long()
    counts = torch.zeros(squared.shape[0], NORM_BINS, dtype=torch.int64, device=squared.device)
    return counts.scatter_add_(1, place, torch.ones_like(place))


def norm_quantile(counts: Tensor, share: float) -> np.ndarray:
    """The `share` quantile of |q|^2 per head from `norm_histogram` counts `[Hq, 512]`; within 9 % (a bin's width)."""
    cumulative = counts.numpy().cumsum(1)
    wanted = share * cumulative[:, -1:]
    place = (cumulative < wanted).sum(1)
    before = np.where(place > 0, np.take_along_axis(cumulative, np.maximum(place - 1, 0)[:, None], 1)[:, 0], 0)
    inside = (wanted[:, 0] - before) / np.maximum(np.take_along_axis(counts.numpy(), place[:, None], 1)[:, 0], 1)
    return 2.0 ** (NORM_LOWEST + (place + inside) / NORM_PER_OCTAVE)
