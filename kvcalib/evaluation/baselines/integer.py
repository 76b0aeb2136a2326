"""`int`: asymmetric integers per token and head, the plainest of all (`affine.py` has the formula).

Keys are stored after RoPE. What the tables of KVQuant (arXiv 2401.18079) call int-b, with a scale per head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from kvcalib.evaluation.baselines import affine
from kvcalib.evaluation.baselines.baseline import Baseline, BitSettings, Place, group_size
from kvcalib.evaluation.baselines.stored import Codec, StoredLayer


class IntSettings(BitSettings):
    """Settings of `int`."""

    group: int = Field(default=0, ge=0, description="Channels that share min and step; 0: a head's.")


class IntCodec(Codec):
    """Groups of `group` channels of a token's head: `words`, and `low`, `step` of two bytes each."""

    def __init__(self, place: Place, bits: int, group: int) -> None:
        self.bits, self.group = bits, group
        self.layout = affine.uniform_layout(place.kv_heads, place.head_dim, bits)

    def encode(self, x: Tensor, exact: torch.dtype) -> dict[str, Tensor]:
        codes, low, step = affine.encode(x.unflatten(-1, (-1, self.group)), self.bits, -1, exact)
        return {"words": self.layout.pack(codes.flatten(-2)), "low": low, "step": step}

    def decode(self, rows: Mapping[str, Tensor]) -> Tensor:
        codes = self.layout.unpack(rows["words"]).unflatten(-1, (-1, self.group))
        return affine.decode(codes, rows["low"], rows["step"], -1).flatten(-2)


class Integer(Baseline):
    """See the module."""

    label = "int"
    source = "per-token asymmetric integers"
    accepts = IntSettings
    chosen: IntSettings

    def layer(self, place: Place) -> Any:
        group = group_size(self.label, self.chosen.group, place.head_dim)
        key, value = (IntCodec(place, bits, group) for bits in self.chosen.widths)
        return StoredLayer(key, value)
