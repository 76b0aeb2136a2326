"""`hf-quanto`: transformers' quantized cache with optimum-quanto, its prefill error shown (`hf.py`).

Asymmetric integers between the least and the greatest of `group` numbers. On axis 0, the default, they are numbers that
follow one another, channels of a token's head; on axis -1 they are of one channel.
"""

from __future__ import annotations

import functools
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from transformers.cache_utils import QuantoQuantizedLayer
from transformers.utils import is_optimum_quanto_available

from kvcalib.errors import InputError
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
        layer = QuantoLayer(**kwargs)
        reason = why_not()
        if reason is not None:
            raise InputError(
                f"baseline {self.label!r}: optimum-quanto compiles its CPU code on first use, which failed: {reason}; "
                "install a C++ compiler (g++) and ninja"
            )
        return layer


@functools.cache
def why_not() -> str | None:
    """Why quanto cannot unpack codes on the CPU, None if it can; compiles on first use."""
    before = os.environ.get("PATH", "")
    if shutil.which("ninja") is None:
        # The package of that name lies beside the interpreter, which need not be on the PATH.
        os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), before])
    try:
        torch.ops.quanto.unpack(torch.zeros(1, dtype=torch.uint8), 4)
    except Exception as error:
        return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    finally:
        os.environ["PATH"] = before
    return None
