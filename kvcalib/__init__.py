"""kvcalib: calibrate a language model's KV cache for 2 to 4 bits, and generate on it.

import kvcalib
artifact = kvcalib.load("artifacts/llama3-8b-nuq3")
kvcalib.attach(model, artifact)
model.generate(...)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "Adaptive", "Artifact", "PackedCache", "__version__", "attach", "detach", "load", "load_adaptive", "load_cache",
]  # fmt: skip

if TYPE_CHECKING:
    from kvcalib.runtime.cache import PackedCache
    from kvcalib.runtime.loader import Artifact, attach, detach, load, load_cache
    from kvcalib.runtime.tiers import Adaptive, load_adaptive

# transformers takes seconds to import; `kvcalib --help` and kvcalib.quant need none of it.
_LAZY = dict.fromkeys(("Artifact", "attach", "detach", "load", "load_cache"), "loader") | {
    "PackedCache": "cache", "Adaptive": "tiers", "load_adaptive": "tiers",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"kvcalib.runtime.{_LAZY[name]}"), name)
    if name == "quant":
        return import_module("kvcalib.quant")
    raise AttributeError(f"module 'kvcalib' has no attribute {name!r}")
