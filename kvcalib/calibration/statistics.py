"""The calibration record: exact sums per layer and the token sample, in one safetensors file.

Everything adds up: `merging.merge` makes the record of several texts. Per layer `i` (H kv heads, Hq query
heads, n kept tokens):

    layers.i.key.sum, .square_sum, .fisher_sum          [H, D]   (and layers.i.value.*)
    layers.i.key.fisher_outer, .value.fisher_outer      [H, D (D + 1) / 2]  sum of g g^T over tokens, g = dL/dx of a
                                                        key or value: the lower triangle, row by row
    layers.i.query.outer                                [H, D, D]  sum of q q^T over tokens and the group's heads
    layers.i.query.norm_histogram                       [Hq, 512]  counts of log2 |q|^2, see `NORM_BINS`
    layers.i.attention.peak_sum, .peak_square_sum       [H]      of the windowed maximum
    layers.i.sample.key, .value                         [n, H, D]  in the model's dtype, keys before RoPE
    layers.i.sample.key_gradient, .value_gradient       [n, H, D]  float32, dL/dx, L the summed NLL of the sequence;
                                                        `Calibration.tensors` has their squares as key_fisher and
                                                        value_fisher too
    layers.i.sample.attention_sum, .attention_peak      [n, H]   attention drawn from all later queries; its maximum
                                                        over the first `window` queries
    layers.i.sample.attention_late                      [n, H]   mean over the later half of these queries
    layers.i.sample.attention_early                     [n, H]   drawn from the queries of the sequence's first half
    layers.i.sample.attention_slope                     [n, H, D]  bfloat16, gradient of attention_early with respect
                                                        to the token's own key
    layers.i.sample.attention_later_square              [n, H]   sum of squared weights, queries of the second half
    sample.hash, sample.sequence, sample.position       [n]      ascending by hash
    sequences                                           [N]      ids of all sequences, ascending
    nll                                                 []       summed NLL of all predicted tokens, nats

All queries and keys are un-rotated. Sums of real numbers are float64 in `Calibration.tensors`. The file has each as two
tensors, `NAME.limbs [3, ...]` int64 and `NAME.top [...]` int16, which are exact (`exact.py`): the same, bit by bit, in
whatever order and by however many processes the batches were done. A sum is `2^(40 (top - 2)) (limbs[0] 2^80 +
limbs[1] 2^40 + limbs[2])`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from kvcalib.calibration.sums import Decoded, Prefixed
from kvcalib.calibration.validate import Sound, check_specs, read_info
from kvcalib.files import write_tensors
from kvcalib.model.identity import ModelIdentity
from kvcalib.streamed import TensorFile

VERSION = 7
READABLE = (2, 3, 4, 5, 6, VERSION)
"""Versions that `load` reads. Files of version 2 lack `LayerShape.scaling`, which only QAQ needs; files before version
4 lack `attention_early`, `_slope` and `_later_square`, which only the weights of eviction need; files before version 5
have float64 sums and no `sequences`, without which they cannot be merged; files before version 6 lack `fisher_outer`,
which only error feedback needs; files before version 7 have `key_fisher` and `value_fisher` in place of gradients, of
which only values in a basis of their own need the sign."""
APART = " + "
"""Between the names of several texts."""
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
    batches: int | None = Field(
        default=None, description="Contributions to every sum; None in files before version 5, which do not count them."
    )
    merged: list[str] = Field(default=[], description="Fingerprints of the runs that were merged, ascending; else [].")

    @property
    def texts(self) -> list[str]:
        """The sources of the text: one, or of a merged calibration several."""
        return self.data.split(APART) if self.merged else [self.data]

    @property
    def nll(self) -> float:
        """Mean NLL of the calibration text, nats per predicted token."""
        return self.nll_sum / max(1, self.predicted_tokens)


@dataclass
class Calibration:
    """A calibration file: what it is of, and its tensors by name.

    Attributes:
        stored: the tensors as the file has them. One that was loaded reads each when it is asked for and keeps none.
        path: the file that it was loaded from.
    """

    info: CalibrationInfo
    stored: Mapping[str, Tensor] = field(repr=False)
    path: Path | None = None

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Sums as float64, sampled tokens and their Fisher by name; CorruptFile for numbers of a file that are none."""
        return Decoded(self.stored) if self.path is None else Sound(Decoded(self.stored), self.path)

    def layer(self, index: int) -> Mapping[str, Tensor]:
        """Tensors of one layer, their names without `layers.{index}.`."""
        return Prefixed(self.tensors, f"layers.{index}.")

    def curvature(self, index: int, role: str) -> Tensor | None:
        """Mean over tokens of `g g^T` of one layer's keys or values, float64 `[H, D, D]`; None in an old file."""
        data = self.layer(index)
        if f"{role}.fisher_outer" not in data:
            return None
        return from_lower_triangle(data[f"{role}.fisher_outer"] / self.info.tokens)

    def save(self, path: Path, extra: Any = None) -> None:
        """Write the file atomically; the same record gives the same bytes."""
        write_tensors(path, self.stored, file_note(self.info, extra))

    @classmethod
    def load(cls, path: Path) -> tuple[Calibration, Any]:
        """The record in `path`, and the `extra` it was saved with. Its tensors stay on disk until they are asked for.

        Raises:
            InputError: no such file. CorruptFile: damaged, of another version, or it contradicts itself.
        """
        tensors = TensorFile(path)
        info = read_info(path, tensors.metadata, CalibrationInfo, READABLE)
        check_specs(path, info, tensors)
        return cls(info, tensors, path), tensors.metadata.get("extra")


def file_note(info: CalibrationInfo, extra: Any = None) -> dict[str, Any]:
    """The metadata of a calibration file."""
    return {"info": info.model_dump(mode="json"), "extra": extra}


def lower_triangle(square: Tensor) -> Tensor:
    """`[..., D, D]` to `[..., D (D + 1) / 2]`: the diagonal and what lies below it, row by row."""
    row, column = torch.tril_indices(*square.shape[-2:], device=square.device)
    return square[..., row, column]


def from_lower_triangle(triangle: Tensor) -> Tensor:
    """The symmetric matrices of which `lower_triangle` kept the half."""
    channels = math.isqrt(2 * triangle.shape[-1])
    row, column = torch.tril_indices(channels, channels, device=triangle.device)
    square = triangle.new_empty(*triangle.shape[:-1], channels, channels)
    square[..., row, column] = square[..., column, row] = triangle
    return square


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
