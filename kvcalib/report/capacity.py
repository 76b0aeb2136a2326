"""How much context fits: weights and cache against a GPU's memory."""

from __future__ import annotations

from kvcalib.report.data import CacheLayer, Memory
from kvcalib.report.words import GIB

GPUS = (24, 40, 80, 141, 192)
"""Memory of common GPUs in GiB."""
RESERVE = 0.1
"""Share of a GPU's memory that is set aside for activations, the framework and fragmentation."""
MOST = 10**15


def cache_bytes(layers: tuple[CacheLayer, ...], tokens: int, packed: bool) -> float:
    """Bytes of one sequence's cache; layers with a sliding window stop growing at their window."""
    return sum(
        (layer.packed if packed else layer.exact) * (tokens if layer.window is None else min(tokens, layer.window))
        for layer in layers
    )


def tokens_that_fit(memory: Memory, gib: int, packed: bool) -> int | None:
    """The longest context beside the weights and the reserve; 0 if the weights do not fit, None for any length."""
    layers, room = tuple(memory.layers), gib * GIB * (1 - RESERVE) - (memory.weights or 0.0)
    if cache_bytes(layers, MOST, packed) <= room:
        return None
    low, high = 0, MOST
    while high - low > 1:
        middle = (low + high) // 2
        if cache_bytes(layers, middle, packed) <= room:
            low = middle
        else:
            high = middle
    return low


def usual_gpu(memory: Memory) -> int | None:
    """The smallest GPU of which the weights take at most 80 % of the usable memory; None if none."""
    usable = (gib for gib in GPUS if (memory.weights or 0.0) <= 0.8 * gib * GIB * (1 - RESERVE))
    return next(usable, None)


def long_bits(memory: Memory) -> float:
    """Effective bits of a long cache without sliding layers' ends: packed bytes times 16 over those at 16 bits."""
    return 16 * sum(layer.packed for layer in memory.layers) / sum(layer.exact for layer in memory.layers)
