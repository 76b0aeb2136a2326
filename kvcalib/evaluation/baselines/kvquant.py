"""`kvquant-published`: KVQuant (arXiv 2401.18079) as its code has it (commit 57a2383).

Per layer one codebook c for all keys and one for all values, of 2^b levels on normalized numbers:

    keys, before RoPE   z, r = middle and half range of a channel's calibrated percentiles
    values              z, r = middle and half range of a token's own inliers, over all heads
    code = argmin |(x - z) / r - c|,    x^ = z + r c'[code]

`outliers` o: a key below its channel's o/2 percentile or above the opposite one is kept exact, and a value at or beyond
these quantiles of its token. How many that are is up to the data; each takes two bytes and an index of two, and each
token a pointer of four (the paper's section 3.4). The codebook is k-means over calibrated inliers weighted by their
Fisher, without the factor r^2 that the paper's equation 7 has: so is the code. Q-Norm (`qnorm`) moves c to c' such that
mean and deviation of rounded inliers are those before. `sinks` first tokens are exact.

Other than that code: any number of kv heads, rows and chunks; channels and tokens without spread make no NaN; the sinks
left out of k-means are those of each sequence, whatever its length. Its cap on outliers (42 a token, made for 4096
channels) is left out. Thresholds and codebooks belong to the model and are not counted.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from kvcalib.errors import InputError
from kvcalib.evaluation.baselines.baseline import Place, Settings
from kvcalib.evaluation.baselines.sparse import SparseCodec
from kvcalib.evaluation.baselines.stored import StoredLayer
from kvcalib.evaluation.baselines.tapped import TappedBaseline
from kvcalib.quant import kmeans
from kvcalib.quant.quantizer import saturate


class KvquantSettings(Settings):
    """Settings of `kvquant-published`."""

    bits: int = Field(default=3, ge=1, le=8, description="Of keys and values.")
    outliers: float = Field(default=0.01, ge=0, lt=0.5, description="Share kept exact, half at either end.")
    qnorm: bool = Field(default=False, description="Q-Norm, which its code applies at 2 bits.")
    sinks: int = Field(default=0, ge=0, description="First tokens kept exact, and left out of the codebooks.")
    solver: Literal["lloyd", "exact"] = Field(default="lloyd", description="k-means; its code has scikit-learn's.")


class KeyCodec(SparseCodec):
    """Calibrated thresholds `lower`, `upper [C]` per channel."""

    def __init__(self, place: Place, codebook: np.ndarray, back: np.ndarray, lower: Tensor, upper: Tensor, sinks: int,
                 sparse: bool) -> None:  # fmt: skip
        super().__init__(place, codebook, back, sinks, sparse)
        self.lower, self.upper = saturate(lower, torch.float16), saturate(upper, torch.float16)
        self.zero, self.range = (self.upper + self.lower) / 2, (self.upper - self.lower) / 2

    def split(self, x: Tensor, exact: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        lower, upper = self.lower.to(x.device).float(), self.upper.to(x.device).float()
        outside = (x < lower) | (x > upper)
        return self.normal(x, self.zero, self.range), outside & self.sparse, {}

    def scales(self, rows: Any) -> tuple[Tensor, Tensor]:
        return self.zero, self.range


class ValueCodec(SparseCodec):
    """A token's own quantiles; `zero` and `range` of two bytes each."""

    def __init__(self, place: Place, codebook: np.ndarray, back: np.ndarray, outliers: float, sinks: int) -> None:
        super().__init__(place, codebook, back, sinks, outliers > 0)
        self.outliers = outliers

    def split(self, x: Tensor, exact: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        if self.outliers:
            ordered = x.sort(dim=-1).values
            outside = (x <= quantile(ordered, self.outliers / 2)) | (x >= quantile(ordered, 1 - self.outliers / 2))
        else:
            outside = torch.zeros_like(x, dtype=torch.bool)
        # Outliers stand in the range as the token's (lower) median.
        inside = torch.where(outside, x.median(dim=-1, keepdim=True).values, x)
        lower, upper = inside.amin(-1), inside.amax(-1)
        zero, half = saturate((upper + lower) / 2, exact), saturate((upper - lower) / 2, exact)
        return self.normal(x, zero[..., None], half[..., None]), outside, {"zero": zero, "range": half}

    def scales(self, rows: Any) -> tuple[Tensor, Tensor]:
        return rows["zero"][..., None], rows["range"][..., None]


def quantile(ordered: Tensor, share: float) -> Tensor:
    """torch.quantile, linear, of values that are sorted; of any number of them: `[..., C] -> [..., 1]`."""
    rank = share * (ordered.shape[-1] - 1)
    below = int(rank)
    above = min(below + 1, ordered.shape[-1] - 1)
    return torch.lerp(ordered[..., below : below + 1], ordered[..., above : above + 1], rank - below)


def thresholds(x: np.ndarray, outliers: float, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper percentile of `x [T, C]` along `axis`, with linear interpolation; least and greatest for 0."""
    low, high = np.percentile(x, [50 * outliers, 100 - 50 * outliers], axis=axis)
    return low, high


def fit(
    x: np.ndarray, fisher: np.ndarray, lower: np.ndarray, upper: np.ndarray, counts: np.ndarray, chosen: KvquantSettings
) -> tuple[np.ndarray, np.ndarray]:
    """Codebook to code with and codebook to decode with, ascending float64 `[2**bits]`.

    Args:
        x, fisher: `[T, C]`.
        lower, upper: of each element, broadcast.
        counts: bool `[T]`, tokens that k-means sees.
    """
    half = (upper - lower) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        normal = (x - (upper + lower) / 2) / half
    inside = (np.abs(normal) <= 1) & np.isfinite(normal)
    seen = inside & counts[:, None]
    centres = kmeans.fit(normal[seen], fisher[seen], 1 << chosen.bits, solver=chosen.solver)
    if not chosen.qnorm:
        return centres, centres
    before = normal[inside]
    after = centres[kmeans.assign(before, centres)]
    scale = before.std() / after.std() if after.std() > 0 else 1.0
    return centres, centres * scale + before.mean() - after.mean() * scale


class KvquantPublished(TappedBaseline):
    """See the module."""

    label = "kvquant-published"
    source = "KVQuant, arXiv 2401.18079, code of 2024-07"
    accepts = KvquantSettings
    calibrates = True
    chosen: KvquantSettings

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._codecs: dict[Place, tuple[KeyCodec, ValueCodec]] = {}

    def layer(self, place: Place) -> Any:
        if place not in self._codecs:
            self._codecs[place] = self._fit(place)
        return StoredLayer(*self._codecs[place])

    def _fit(self, place: Place) -> tuple[KeyCodec, ValueCodec]:
        chosen, calibrated = self.chosen, self.calibrated
        assert calibrated is not None
        sample = calibrated.layers.get(place.index)
        found = None if sample is None else tuple(sample.key.shape[1:])
        if sample is None or found != (place.kv_heads, place.head_dim):
            raise InputError(
                f"baseline {self.label!r}: the calibration {calibrated.source or 'given'} has for layer {place.index} "
                f"{found or 'nothing'}, this model has {(place.kv_heads, place.head_dim)} kv heads and channels; "
                "calibrate this model with `kvcalib fisher`"
            )
        counts = (calibrated.position >= chosen.sinks).numpy()
        key, value = sample.key.flatten(1).double().numpy(), sample.value.flatten(1).double().numpy()
        lower, upper = thresholds(key, chosen.outliers, 0)
        books = fit(key, sample.key_fisher.flatten(1).double().numpy(), lower, upper, counts, chosen)
        keys = KeyCodec(
            place, *books, torch.from_numpy(lower), torch.from_numpy(upper), chosen.sinks, chosen.outliers > 0
        )
        low, high = (edge[:, None] for edge in thresholds(value, chosen.outliers, 1))
        books = fit(value, sample.value_fisher.flatten(1).double().numpy(), low, high, counts, chosen)
        return keys, ValueCodec(place, *books, chosen.outliers, chosen.sinks)
