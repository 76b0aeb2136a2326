"""`hf-hqq`: transformers' quantized cache with HQQ (half-quadratic quantization), its prefill error shown (`hf.py`).

HQQ fits each group's zero by alternating shrinkage of the error and rounding. `group` numbers that follow one another
(axis 1, channels of a token's head) or lie far apart (axis 0) share scale and zero. transformers' default is 0, its
documentation advises 1 for HQQ, the default here. At 3 bits only axis 0 can be unpacked (hqq 0.2.8 counts the
groups of matrices alone).
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator
from transformers.cache_utils import HQQQuantizedLayer
from transformers.utils import is_hqq_available

from kvcalib.evaluation.baselines.hf import HfBaseline, HfSettings, ShownLayer


class HqqSettings(HfSettings):
    """Settings of `hf-hqq`."""

    key_axis: int = Field(default=1, description="`axis_key`.")
    value_axis: int = Field(default=1, description="`axis_value`.")

    @model_validator(mode="after")
    def _unpackable(self) -> HqqSettings:
        if self.bits == 3 and (self.key_axis, self.value_axis) != (0, 0):
            raise ValueError(
                f"bits is 3 with key_axis {self.key_axis} and value_axis {self.value_axis}, expected 0 for both: hqq "
                "cannot unpack 3 bits along another axis"
            )
        return self


class HqqLayer(ShownLayer, HQQQuantizedLayer):
    """transformers' layer, shown."""


class HfHqq(HfBaseline):
    """See the module."""

    label = "hf-hqq"
    source = "transformers.QuantizedCache, backend hqq"
    accepts = HqqSettings
    package = "hqq"
    widths = (1, 2, 3, 4, 8)
    axes = (0, 1)

    @staticmethod
    def available() -> bool:
        return bool(is_hqq_available())

    def make(self, **kwargs: Any) -> Any:
        return HqqLayer(**kwargs)
