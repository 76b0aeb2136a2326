"""`turboquant`: a random rotation, then one fixed codebook for all coordinates (TurboQuant, arXiv 2504.19874).

    n = |x|,    y = R x / n,    code = argmin_c |y_j - level[c]|,    x^ = n R^T level[code]

After a random rotation a coordinate of a unit vector of d channels has the density f(t) ~ (1 - t^2)^((d - 3) / 2), near
N(0, 1/d), whatever x was; `level` is its Lloyd-Max quantizer. Nothing is calibrated. R is a Hadamard matrix times
random signs where d is a power of two, else a random orthogonal matrix, as in the paper's analysis.

This is the variant for mean squared error (Q_mse), which vLLM and others serve. The paper's second stage, a sign bit
per channel of the residual (QJL), is left out, as it is there. Keys are stored after RoPE, one rotation serves all
heads, and the norm takes two bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from pydantic import Field
from scipy.special import betaincc, betainccinv, gammaln
from torch import Tensor

from kvcalib.evaluation.baselines.affine import uniform_layout
from kvcalib.evaluation.baselines.baseline import Baseline, BitSettings, Place
from kvcalib.evaluation.baselines.stored import Codec, StoredLayer
from kvcalib.quant.quantizer import saturate

STEPS = 3000
"""Most steps of Lloyd's iteration; it stops where no level moves any more, which up to 5 bits it does before."""


class TurboSettings(BitSettings):
    """Settings of `turboquant`."""

    seed: int = Field(default=0, ge=0, description="Of signs, or of the orthogonal matrix.")


def hadamard(size: int) -> Tensor:
    """The Hadamard matrix of Sylvester's construction, orthonormal: float64 `[size, size]`, a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / size**0.5


def rotation(head_dim: int, seed: int) -> Tensor:
    """R: float32 `[head_dim, head_dim]`, orthogonal."""
    generator = torch.Generator().manual_seed(seed)
    if head_dim & (head_dim - 1) == 0:
        signs = torch.randint(0, 2, (head_dim,), generator=generator).double() * 2 - 1
        return (hadamard(head_dim) * signs).float()
    normal = torch.randn(head_dim, head_dim, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(normal)
    return (q * r.diagonal().sign()).float()


@functools.lru_cache(maxsize=64)
def sphere_levels(head_dim: int, bits: int) -> np.ndarray:
    """Lloyd-Max levels, ascending float64 `[2**bits]`, of a coordinate of a random unit vector of `head_dim` channels.

    Each level is the mean of the density between the middles to its neighbours. With F the distribution function and
    G(t) = -c (1 - t^2)^((d - 1) / 2) / (d - 1) the integral of t f(t), that mean is (G(b) - G(a)) / (F(b) - F(a)).
    """
    if head_dim < 2:
        raise ValueError(f"head_dim is {head_dim}, expected at least 2")
    power = (head_dim - 1) / 2
    scale = np.exp(gammaln(head_dim / 2) - gammaln(power)) / np.sqrt(np.pi) / (head_dim - 1)

    def above(t: np.ndarray) -> np.ndarray:
        # 1 - F of a positive t, to full precision where it is next to nothing.
        return betaincc(0.5, power, t * t) / 2

    def moment(t: np.ndarray) -> np.ndarray:
        return -scale * (1 - t * t) ** power

    # Only the positive half: the density is symmetric, and so is its optimum. Many levels lie as the cube root of the
    # density does, which is that of (d + 6) / 3 channels: where to begin.
    count = 1 << (bits - 1)
    levels = betainccinv(0.5, (head_dim + 3) / 6, 1 - (np.arange(count) + 0.5) / count) ** 0.5
    for _ in range(STEPS):
        edges = np.concatenate([[0.0], (levels[1:] + levels[:-1]) / 2, [1.0]])
        mass = -np.diff(above(edges))
        moved = np.where(mass > 0, np.diff(moment(edges)) / np.where(mass > 0, mass, 1.0), levels)
        moved = moved.clip(edges[:-1], edges[1:])
        still = np.abs(moved - levels).max() < 1e-10
        levels = moved
        if still:
            break
    return np.concatenate([-levels[::-1], levels])


class TurboCodec(Codec):
    """A token's head: `words`, and `norm` of two bytes."""

    def __init__(self, place: Place, bits: int, seed: int) -> None:
        self.layout = uniform_layout(place.kv_heads, place.head_dim, bits)
        self.rotation = rotation(place.head_dim, seed)
        self.levels = torch.from_numpy(sphere_levels(place.head_dim, bits)).float()
        self.middles = (self.levels[1:] + self.levels[:-1]) / 2

    def encode(self, x: Tensor, exact: torch.dtype) -> dict[str, Tensor]:
        norm = x.norm(dim=-1, keepdim=True)
        unit = x / torch.where(norm > 0, norm, 1.0)
        turned = unit @ self.rotation.to(x.device).T
        codes = torch.searchsorted(self.middles.to(x.device), turned.contiguous(), out_int32=True)
        return {"words": self.layout.pack(codes), "norm": saturate(norm[..., 0], exact)}

    def decode(self, rows: Mapping[str, Tensor]) -> Tensor:
        codes = self.layout.unpack(rows["words"])
        turned = self.levels.to(codes.device)[codes]
        return rows["norm"].float()[..., None] * (turned @ self.rotation.to(codes.device))


class TurboQuant(Baseline):
    """See the module."""

    label = "turboquant"
    source = "TurboQuant, arXiv 2504.19874"
    accepts = TurboSettings
    chosen: TurboSettings

    def layer(self, place: Place) -> Any:
        key, value = (TurboCodec(place, bits, self.chosen.seed) for bits in self.chosen.widths)
        return StoredLayer(key, value)
