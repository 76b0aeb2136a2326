"""Which implementation runs: fused Triton kernels on CUDA, compiled loops on a CPU, plain tensor operations elsewhere.

All three compute the same; the tensor operations (`attention.chunked_attention`, `Quantizer.encode`) are the reference.
`KVCALIB_PATH=torch` (or `native`, `triton`) in the environment forces one, to compare them or to work around a fault.
"""

from __future__ import annotations

import os
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kvcalib.model.angles import Angles
from kvcalib.quant.quantizer import Quantizer
from kvcalib.runtime import native
from kvcalib.runtime.kernels.support import supports
from kvcalib.runtime.kernels.view import PackedView

Path = Literal["auto", "triton", "native", "torch"]
PATHS: tuple[Path, ...] = ("auto", "triton", "native", "torch")
_REASONS: WeakKeyDictionary[Quantizer, dict[tuple[Angles | None, torch.device], str | None]] = WeakKeyDictionary()


def forced() -> Path:
    """What the environment asks for, "auto" if nothing.

    Raises:
        ValueError: `KVCALIB_PATH` is none of `PATHS`.
    """
    value = os.environ.get("KVCALIB_PATH", "auto")
    for path in PATHS:
        if value == path:
            return path
    raise ValueError(f"the environment's KVCALIB_PATH is {value!r}, expected one of {PATHS}")


def reading(query: Tensor, view: PackedView, angles: Angles | None) -> Path:
    """How attention of `query` over `view` is computed; `angles` as `Call.angles`, None where they cannot be had."""
    wanted = forced()
    if wanted == "torch" or angles is None or view.length == 0:
        return "torch"
    if _triton(wanted, view.key, view.value, angles, query.device):
        return "triton"
    return "native" if native.fits(query, view) else "torch"


def writing(key: Quantizer, value: Quantizer, device: torch.device) -> Path:
    """How new tokens are quantized."""
    wanted = forced()
    if wanted == "torch":
        return "torch"
    if _triton(wanted, key, value, None, device):
        return "triton"
    return "native" if device.type == "cpu" else "torch"


def _triton(wanted: Path, key: Quantizer, value: Quantizer, angles: Angles | None, device: torch.device) -> bool:
    """Whether the fused kernels run: wanted or on a GPU, and able to; `supports` is asked once for a layer."""
    if wanted == "native" or (wanted == "auto" and device.type != "cuda"):
        return False
    known = _REASONS.setdefault(key, {})
    if (angles, device) not in known:
        known[(angles, device)] = supports(key, value, angles, device)
    return known[(angles, device)] is None
