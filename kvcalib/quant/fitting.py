"""Fitting the codebooks of one layer's keys and values to a sample of tokens.

The quantity to be small is the predicted loss of KVQuant's Eq. 7 (arXiv 2401.18079), `sum F (x - x^)^2`. In normalised
units `xn = (x - z) / s` that is weighted k-means with weights `F s^2` (`weights="fisher_scale"`); the paper's code used
F alone (`"fisher"`). Codebooks are fitted for all widths 0..8 at once and kept as ladders `[H, D, 511]` (see
`codebook.ladder_slice`), so that bits can be chosen afterwards.

Shapes: samples and Fisher `[n, H, D]`, n tokens without sinks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from kvcalib.quant import kmeans, outliers
from kvcalib.quant.basis import Basis
from kvcalib.quant.codebook import LADDER, Codebook, Format, fixed_ladder, ladder_slice
from kvcalib.quant.feedback import Feedback
from kvcalib.quant.packing import MAX_BITS, Layout
from kvcalib.quant.qnorm import match_moments
from kvcalib.quant.quantizer import Quantizer, Scope

LEAST_INLIERS = 0.05
"""Share of a codebook's points that must be inliers; else it is fitted on all of them."""

Granularity = Literal["layer", "head", "channel"]
Weights = Literal["fisher_scale", "fisher", "none"]
Solver = Literal["exact", "lloyd"]


@dataclass(frozen=True)
class FitOptions:
    """How codebooks are fitted.

    Attributes:
        format: fitted (`nuq`), NormalFloat (`nf`) or uniform (`int`) levels.
        weights: `fisher_scale` (Eq. 7), `fisher` or `none`.
        outlier_share: exact share of each token's (or token and head's) elements.
        qnorm: match the moments after rounding, see `qnorm.py`.
        solver: `exact` dynamic programming, or scikit-learn's `lloyd` as the papers used it.
    """

    format: Format = "nuq"
    weights: Weights = "fisher_scale"
    outlier_share: float = 0.01
    qnorm: bool = False
    solver: Solver = "exact"


def fit_absolute(
    x: np.ndarray, fisher: np.ndarray, granularity: Granularity, scope: Scope, options: FitOptions
) -> Tensor:
    """Ladders `[H, D, 511]` in the units of `x`: of keys, and of values in a basis of their own.

    Thresholds are per channel, percentiles of the sample (KVQuant, section 3.4); which elements are outliers, and so
    left out of the fit, is decided per token by rank of the normalised magnitude.
    """
    tokens, heads, head_dim = x.shape
    lower, upper = np.quantile(x, [options.outlier_share / 2, 1 - options.outlier_share / 2], axis=0)
    zero, scale = (upper + lower) / 2, (upper - lower) / 2
    scale = np.where(scale > 0, scale, 1.0)
    normal = (x - zero) / scale
    groups = heads if scope == "head" else 1
    count = outliers.outlier_count(options.outlier_share, heads * head_dim // groups)
    inlier = np.ones((tokens, groups, heads * head_dim // groups), dtype=bool)
    if count:
        rank = outliers.largest(torch.from_numpy(np.abs(normal).reshape(inlier.shape)), count).numpy()
        np.put_along_axis(inlier, rank, False, axis=-1)
    weight = _weights(fisher, scale, options.weights)
    ladders = _ladders(normal, weight, inlier.reshape(x.shape), granularity, options)
    return torch.from_numpy(zero[..., None] + scale[..., None] * ladders)


def fit_relative(
    x: np.ndarray, fisher: np.ndarray, granularity: Granularity, scope: Scope, options: FitOptions
) -> Tensor:
    """Ladders `[H, D, 511]` relative to the zero and scale that each token (or token and head) has."""
    tokens, heads, _ = x.shape
    groups = heads if scope == "head" else 1
    grouped = torch.from_numpy(x.reshape(tokens, groups, -1))
    count = outliers.outlier_count(options.outlier_share, grouped.shape[-1])
    lower, upper, outside = outliers.shortest_window(grouped, count)
    zero, scale = ((upper + lower) / 2)[..., None], ((upper - lower) / 2)[..., None]
    scale = torch.where(scale > 0, scale, 1.0)
    normal = ((grouped - zero) / scale).numpy().reshape(x.shape)
    inlier = torch.ones(grouped.shape, dtype=torch.bool).scatter_(-1, outside, False).numpy().reshape(x.shape)
    spread = scale.expand_as(grouped).numpy().reshape(x.shape)
    weight = _weights(fisher, spread, options.weights)
    return torch.from_numpy(_ladders(normal, weight, inlier, granularity, options))


def predicted_loss(quantizer: Quantizer, x: Tensor, fisher: Tensor, exact_dtype: torch.dtype) -> Tensor:
    """Half the mean of `F (x - x^)^2` per channel, in nats per token: float64 `[H, D]`.

    `x` and `fisher` are `[n, H, D]`; the second-order estimate of how much the NLL rises.
    """
    error = quantizer.decode(quantizer.encode(x, exact_dtype)) - x.float()
    return (fisher.double() * error.double().square()).mean(0) / 2


def uniform_quantizer(
    ladders: Tensor, bits: int, relative: bool, scope: Scope, outlier_share: float, weight: Tensor
) -> Quantizer:
    """The quantizer of one layer's keys or values with every channel at `bits`."""
    return make_quantizer(
        ladders, torch.full(ladders.shape[:2], bits, dtype=torch.uint8), relative, scope, outlier_share, weight
    )


def make_quantizer(
    ladders: Tensor,
    widths: Tensor,
    relative: bool,
    scope: Scope,
    outlier_share: float,
    weight: Tensor,
    order: Tensor | None = None,
    curvature: Tensor | None = None,
    basis: Basis | None = None,
) -> Quantizer:
    """The quantizer with `widths [H, D]` bits per channel, codebooks picked from `ladders [H, D, 511]`.

    Args:
        order: `[D]`, the sequence in which a head's channels are laid out in a row; ascending if None.
        curvature: `[H, D, D]` of the loss, for error feedback (`feedback.py`); None, or one channel a
            head: nearest rounding.
        basis: the axes that all of this is along; see `Quantizer`.
    """
    elements = ladders.shape[1] if scope == "head" else ladders.shape[0] * ladders.shape[1]
    return Quantizer(
        Codebook.from_ladders(ladders, widths),
        Layout.build(widths, order=None if order is None else order.expand(widths.shape)),
        relative,
        scope,
        outliers.outlier_count(outlier_share, elements),
        weight.float(),
        None if curvature is None or widths.shape[1] < 2 else Feedback.from_curvature(curvature, widths),
        basis,
    )


def _weights(fisher: np.ndarray, scale: np.ndarray, kind: Weights) -> np.ndarray:
    if kind == "fisher_scale":
        return fisher * np.square(scale)
    return fisher if kind == "fisher" else np.ones_like(fisher)


def _ladders(
    normal: np.ndarray, weight: np.ndarray, inlier: np.ndarray, granularity: Granularity, options: FitOptions
) -> np.ndarray:
    """Ladders `[H, D, 511]` of normalised values, one codebook per layer, head or channel."""
    tokens, heads, head_dim = normal.shape
    if options.format != "nuq":
        return np.broadcast_to(fixed_ladder(options.format), (heads, head_dim, LADDER)).copy()
    columns = {"layer": 1, "head": heads, "channel": heads * head_dim}[granularity]

    def by_codebook(a: np.ndarray) -> np.ndarray:
        # [n, H, D] to [points, codebooks]: the points of a codebook are all its channels' tokens.
        return np.ascontiguousarray(a.reshape(tokens, columns, -1).transpose(0, 2, 1).reshape(-1, columns))

    values, weights, valid = by_codebook(normal), by_codebook(weight), by_codebook(inlier)
    # A channel that is nearly always its token's largest would have nothing left to be fitted on.
    valid |= valid.mean(0) < LEAST_INLIERS
    if options.solver == "exact":
        ladders = kmeans.fit_ladders(values, weights, valid, MAX_BITS)
    else:
        ladders = np.stack([_lloyd(values[valid[:, c], c], weights[valid[:, c], c]) for c in range(columns)])
    if options.qnorm:
        for column in range(columns):
            keep = valid[:, column]
            for bits in range(1, MAX_BITS + 1):
                part = ladder_slice(bits)
                ladders[column, part] = match_moments(
                    ladders[column, part], values[keep, column], weights[keep, column]
                )
    return np.repeat(ladders, heads * head_dim // columns, axis=0).reshape(heads, head_dim, LADDER)


def _lloyd(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return np.concatenate([kmeans.fit(values, weights, 1 << bits, solver="lloyd") for bits in range(MAX_BITS + 1)])
