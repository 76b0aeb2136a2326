"""Pure tensor maths: codebooks, packing, outliers and the quantizer made of them. No files, models or printing."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

_ROOMS = ("codebook", "fitting", "kmeans", "outliers", "packing", "qnorm", "quantizer")


def __getattr__(name: str) -> ModuleType:
    # `kvcalib.quant.kmeans.fit` works after `import kvcalib` without loading numba for those who only pack.
    if name in _ROOMS:
        return import_module(f"kvcalib.quant.{name}")
    raise AttributeError(f"module 'kvcalib.quant' has no attribute {name!r}")
