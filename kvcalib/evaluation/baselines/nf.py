"""`nf`: NormalFloat, the quantiles of a normal variable, scaled by each group's largest magnitude.

    s = max |x|,    code = argmin_c |x / s - level[c]|,    x^ = s level[code]

Levels as in QLoRA (arXiv 2305.14314, appendix E; `quant/codebook.py`): asymmetric, zero and both ends exact. Keys are
stored after RoPE. KVQuant's tables (arXiv 2401.18079) centre the range of a token first; QLoRA's largest magnitude, as
here, is one number of two bytes and not two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from kvcalib.evaluation.baselines.affine import uniform_layout
from kvcalib.evaluation.baselines.baseline import Baseline, BitSettings, Place, group_size
from kvcalib.evaluation.baselines.stored import Codec, StoredLayer
from kvcalib.quant.codebook import normal_float_levels
from kvcalib.quant.quantizer import saturate


class NfSettings(BitSettings):
    """Settings of `nf`."""

    group: int = Field(default=0, ge=0, description="Channels that share a scale; 0: a head's.")


class NfCodec(Codec):
    """Groups of `group` channels of a token's head: `words`, and `scale` of two bytes each."""

    def __init__(self, place: Place, bits: int, group: int) -> None:
        self.group = group
        self.layout = uniform_layout(place.kv_heads, place.head_dim, bits)
        self.levels = torch.from_numpy(normal_float_levels(bits)).float()
        self.middles = (self.levels[1:] + self.levels[:-1]) / 2

    def encode(self, x: Tensor, exact: torch.dtype) -> dict[str, Tensor]:
        grouped = x.unflatten(-1, (-1, self.group))
        scale = saturate(grouped.abs().amax(-1), exact)
        wide = scale.float()[..., None]
        normal = grouped / torch.where(wide > 0, wide, 1.0)
        codes = torch.searchsorted(self.middles.to(x.device), normal.contiguous(), out_int32=True)
        return {"words": self.layout.pack(codes.flatten(-2)), "scale": scale}

    def decode(self, rows: Mapping[str, Tensor]) -> Tensor:
        codes = self.layout.unpack(rows["words"]).unflatten(-1, (-1, self.group))
        return (rows["scale"].float()[..., None] * self.levels.to(codes.device)[codes]).flatten(-2)


class NormalFloat(Baseline):
    """See the module."""

    label = "nf"
    source = "NormalFloat, QLoRA, arXiv 2305.14314"
    accepts = NfSettings
    chosen: NfSettings

    def layer(self, place: Place) -> Any:
        group = group_size(self.label, self.chosen.group, place.head_dim)
        key, value = (NfCodec(place, bits, group) for bits in self.chosen.widths)
        return StoredLayer(key, value)
