"""Q-Norm: give the dequantized values back the mean and spread that rounding took.

Rounding to centroids shrinks the spread of a distribution. Q-Norm (KVQuant's repository) maps every centroid by
`c -> a*c + b` with `a = s / s_q`, `b = m - a * m_q`, where `m, s` are the moments before and `m_q, s_q` after
quantization, here under the same weights as the codebook's fit. It matches moments; it does not minimise error.
"""

from __future__ import annotations

import numpy as np

from kvcalib.quant import kmeans


def match_moments(centres: np.ndarray, values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """`centres [S]` moved so that quantized `values [N]` keep their weighted mean and deviation; float64 `[S]`."""
    total = weights.sum()
    if total <= 0 or len(centres) < 2:
        return centres
    rounded = centres[kmeans.assign(values, centres)]
    mean, mean_q = (weights @ values) / total, (weights @ rounded) / total
    spread = np.sqrt(weights @ (values - mean) ** 2 / total)
    spread_q = np.sqrt(weights @ (rounded - mean_q) ** 2 / total)
    gain = spread / spread_q if spread_q > 0 else 1.0
    return gain * (centres - mean_q) + mean
