"""`hf-quanto`: transformers' quantized cache with optimum-quanto, its prefill error shown (`hf.py`).

Asymmetric integers between the least and the greatest of `group` numbers. On axis 0, the default, they are numbers that
follow one another, channels of a token's head; on axis -1 they are of one channel.
"""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import QuantoQuantizedLayer
from transformers.utils import is_optimum_quanto_available

from kvcalib.evaluation.baselines.hf import HfBaseline, HfSettings, ShownLayer


class QuantoLayer(ShownLayer, QuantoQuantizedLayer):
    """transformers' layer, shown."""


class HfQuanto(HfBaseline):
    """See the module."""

    label = "hf-quanto"
    source = "transformers.QuantizedCache, backend quanto"
    accepts = HfSettings
    package = "optimum-quanto"
    widths = (2, 4)
    axes = (0, -1)

    @staticmethod
    def available() -> bool:
        return bool(is_optimum_quanto_available())

    def make(self, **kwargs: Any) -> Any:
        return QuantoLayer(**kwargs)
