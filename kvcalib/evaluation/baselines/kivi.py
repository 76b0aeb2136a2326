"""`kivi`: keys per channel in groups of tokens, values per token in groups of channels (KIVI, arXiv 2402.02750).

    keys:   one min and step for each channel and `group` tokens in a row
    values: one min and step for each token and `group` channels of a head

Algorithm 1 of the paper keeps a residual in full precision: of keys the last T mod R tokens, which are quantized
together once they are R; of values the last R. `affine.py` has the arithmetic. Keys are stored after RoPE.

Other than KIVI's code: the prompt attends to what is stored (there it attends to exact keys and values); residuals take
two bytes a number; a group without spread decodes to its value, not to NaN. As there, padding on the left is a key like
any other and widens the groups it stands in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from kvcalib.evaluation.baselines import affine
from kvcalib.evaluation.baselines.baseline import Baseline, BitSettings, Place, group_size
from kvcalib.evaluation.baselines.integer import IntCodec
from kvcalib.evaluation.baselines.stored import Codec, StoredLayer


class KiviSettings(BitSettings):
    """Settings of `kivi`; the defaults are those of the paper's 2-bit rows."""

    bits: int = Field(default=2, ge=1, le=8, description="Of keys and values.")
    group: int = Field(default=32, ge=1, description="Tokens of a key group, channels of a value group.")
    residual: int = Field(default=128, ge=0, description="R, a multiple of `group`; 0: what fills no group stays.")

    @model_validator(mode="after")
    def _whole_groups(self) -> KiviSettings:
        if self.residual % self.group:
            raise ValueError(
                f"residual is {self.residual}, expected a multiple of group, which is {self.group}: keys leave it in "
                "whole groups"
            )
        return self


class KeyCodec(Codec):
    """Groups of `group` tokens, channel by channel: `words [B, n, group, W]`, `low` and `step [B, n, H, D]`."""

    def __init__(self, place: Place, bits: int, group: int, residual: int) -> None:
        self.bits, self.block = bits, group
        self.step = residual or group
        self.layout = affine.uniform_layout(place.kv_heads, place.head_dim, bits)

    def leaving(self, window: int) -> int:
        return window // self.step * self.step

    def encode(self, x: Tensor, exact: torch.dtype) -> dict[str, Tensor]:
        codes, low, step = affine.encode(x.unflatten(1, (-1, self.block)), self.bits, 2, exact)
        return {"words": self.layout.pack(codes), "low": low, "step": step}

    def decode(self, rows: Mapping[str, Tensor]) -> Tensor:
        return affine.decode(self.layout.unpack(rows["words"]), rows["low"], rows["step"], 2).flatten(1, 2)


class ValueCodec(IntCodec):
    """Groups of channels, once a token is older than the last `residual`."""

    def __init__(self, place: Place, bits: int, group: int, residual: int) -> None:
        super().__init__(place, bits, group)
        self.residual = residual

    def leaving(self, window: int) -> int:
        return max(0, window - self.residual)


class Kivi(Baseline):
    """See the module."""

    label = "kivi"
    source = "KIVI, arXiv 2402.02750"
    accepts = KiviSettings
    chosen: KiviSettings

    def layer(self, place: Place) -> Any:
        chosen = self.chosen
        channels = group_size(self.label, chosen.group, place.head_dim)
        key_bits, value_bits = chosen.widths
        return StoredLayer(
            KeyCodec(place, key_bits, chosen.group, chosen.residual),
            ValueCodec(place, value_bits, channels, chosen.residual),
        )
