"""Codebooks: the centroids of every channel, and the formats that are not fitted.

`nuq` codebooks come out of `kmeans.py`. `nf` and `int` are fixed level sets on [-1, 1] stretched over a channel's
range. All three are stored alike: `centroids [H, D, 2**w]`, ascending, in the units of the tensor they quantize.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from scipy.stats import norm
from torch import Tensor

from kvcalib.quant.packing import MAX_BITS, check_widths

Format = Literal["nuq", "nf", "int"]
FORMATS: tuple[Format, ...] = ("nuq", "nf", "int")
LADDER = (1 << (MAX_BITS + 1)) - 1
"""Centroids of the widths 0..8 of one channel, one after another: 1 + 2 + 4 + ... + 256 = 511."""


def ladder_slice(bits: int) -> slice:
    """Where the centroids of width `bits` lie in a ladder of length 511: `2**bits - 1` first, `2**bits` of them."""
    return slice((1 << bits) - 1, (1 << (bits + 1)) - 1)


def uniform_levels(bits: int) -> np.ndarray:
    """`2**bits` equal steps over [-1, 1]; the middle for 0 bits."""
    return np.linspace(-1, 1, 1 << bits) if bits else np.zeros(1)


def normal_float_levels(bits: int) -> np.ndarray:
    """NormalFloat levels on [-1, 1]: quantiles of a normal variable with an exact zero (QLoRA, arXiv 2305.14314).

    For 2 bits this is [-1, 0, .338, 1], the table that KVQuant (arXiv 2401.18079) uses. One bit has no zero: it takes
    the medians of the two halves.
    """
    if bits == 0:
        return np.zeros(1)
    offset = 0.9677083
    if bits == 1:
        middle = norm.ppf(0.75) / norm.ppf(offset)
        return np.array([-middle, middle])
    half = 1 << (bits - 1)
    positive = norm.ppf(np.linspace(offset, 0.5, half + 1)[:-1])
    negative = -norm.ppf(np.linspace(offset, 0.5, half)[:-1])
    levels = np.sort(np.concatenate([negative, [0.0], positive]))
    return levels / levels.max()


def fixed_ladder(name: Format) -> np.ndarray:
    """The levels of `nf` or `int` for all widths 0..8, concatenated `[511]`."""
    levels = normal_float_levels if name == "nf" else uniform_levels
    return np.concatenate([levels(bits) for bits in range(MAX_BITS + 1)])


class Codebook:
    """Centroids per head and channel, of any width per channel.

    Attributes:
        widths: `[H, D]` uint8, 0..8; a channel of width 0 has one centroid.
        centroids: `[H, D, 2**max(widths)]` float32, ascending; narrower channels repeat their last centroid. Of a
            codebook that came ragged, made when first asked for: one wide channel among narrow ones takes many times
            the room.
    """

    def __init__(self, widths: Tensor, centroids: Tensor | None = None, ragged: Tensor | None = None) -> None:
        self.widths = widths
        self._centroids, self._ragged = centroids, ragged
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @property
    def centroids(self) -> Tensor:
        """See the class."""
        if self._centroids is None:
            assert self._ragged is not None
            sizes = 1 << self.widths.flatten().long()
            place = (
                torch.minimum(torch.arange(int(sizes.max())), sizes[:, None] - 1) + (sizes.cumsum(0) - sizes)[:, None]
            )
            self._centroids = self._ragged.float()[place].reshape(*self.widths.shape, -1)
        return self._centroids

    @classmethod
    def from_ladders(cls, ladders: Tensor, widths: Tensor) -> Codebook:
        """Pick from `ladders [H, D, 511]` the codebook of each channel's width."""
        widths = check_widths(widths)
        size = 1 << int(widths.max())
        heads, head_dim = widths.shape
        centroids = torch.empty(heads, head_dim, size, dtype=torch.float32)
        for bits in widths.unique().tolist():
            rows = widths == bits
            chosen = ladders[rows][:, ladder_slice(bits)].to(torch.float32)
            centroids[rows] = torch.nn.functional.pad(chosen, (0, size - chosen.shape[1]))
            centroids[rows, chosen.shape[1] :] = chosen[:, -1:]
        return cls(widths, centroids)

    @classmethod
    def from_ragged(cls, ragged: Tensor, widths: Tensor) -> Codebook:
        """Inverse of `ragged()`.

        Raises:
            ValueError: the number of centroids is not the sum of `2**widths`.
        """
        widths = check_widths(widths)
        expected = int((1 << widths.flatten().long()).sum())
        if ragged.numel() != expected:
            raise ValueError(f"codebook has {ragged.numel()} centroids, expected {expected} for its widths")
        return cls(widths, ragged=ragged.flatten())

    def ragged(self) -> Tensor:
        """All centroids without padding, head by head and channel by channel: float32 `[sum 2**widths]`."""
        flat = self.centroids.flatten(0, 1)
        return torch.cat([row[: 1 << int(w)] for row, w in zip(flat, self.widths.flatten(), strict=True)])

    def tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """`(centroids [H*D, S], midpoints [H*D, S-1])` on `device`; unused midpoints are +inf."""
        if device not in self._tables:
            flat = self.centroids.flatten(0, 1)
            middle = (flat[:, 1:] + flat[:, :-1]) / 2
            used = torch.arange(1, flat.shape[1]) < (1 << self.widths.flatten().int())[:, None]
            middle = torch.where(used, middle, torch.inf)
            self._tables[device] = (flat.contiguous().to(device), middle.contiguous().to(device))
        return self._tables[device]

    def encode(self, x: Tensor) -> Tensor:
        """Index of the nearest centroid for `x [N, H, D]`; int32 `[N, H, D]`, ties to the lower index."""
        columns = x.flatten(1).float().T.contiguous()
        _, middle = self.tables(x.device)
        if not middle.shape[1]:
            return torch.zeros(x.shape, dtype=torch.int32, device=x.device)
        return torch.searchsorted(middle, columns, out_int32=True).T.reshape(x.shape)

    def decode(self, codes: Tensor) -> Tensor:
        """Centroids of `codes [N, H, D]`; float32 `[N, H, D]`."""
        centroids, _ = self.tables(codes.device)
        start = torch.arange(centroids.shape[0], device=codes.device, dtype=torch.int32) * centroids.shape[1]
        return centroids.flatten().index_select(0, (codes.flatten(1) + start).flatten()).reshape(codes.shape)
