"""The temperature of attention, for `bench/ideas.py`: do scores `q.k` vary as much with stored keys?

Over the keys that a query sees, all alike or weighed by its attention, the variance of `q.k` and of `q.k^`; the factor
of a KV head is the root of their ratio, summed over queries. Keys' centroids are then scaled by it about the mean of
their channel, which scales `q.k^` about its mean, apart from codes that change with the centroids.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from ideas_store import Replayed, Scalar, Stored
from torch import Tensor

from kvcalib.evaluation.passes import batches
from kvcalib.model.taps import AttentionOutput, Call, Taps
from kvcalib.quant.codebook import Codebook


class _Scores(Replayed):
    """Handler that leaves the model's attention as it is and sums both variances, `[2, H]` by layer."""

    def __init__(self, stored: Stored, weigh: str) -> None:
        super().__init__(stored)
        self.weigh = weigh
        self.sums: dict[int, Tensor] = {}

    def attend(self, call: Call) -> AttentionOutput:
        """The model's own attention."""
        query, key = call.rotate_new(call.query), call.rotate_new(call.key)
        shown = call.rotate_new(self._shown(call, "key", call.key))
        repeats, length = query.shape[1] // key.shape[1], query.shape[2]
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        both = [query @ k.repeat_interleave(repeats, 1).mT * call.scaling for k in (key, shown)]
        if self.weigh == "attention":
            weight = both[0].masked_fill(hidden, -torch.inf).softmax(-1)
        else:
            weight = (~hidden).float() / (~hidden).sum(-1, keepdim=True)
        found = []
        for scores in both:
            mean = (weight * scores).sum(-1, keepdim=True)
            spread = (weight * (scores - mean).square()).sum((0, 2, 3), dtype=torch.float64)
            found.append(spread.reshape(-1, repeats).sum(1))
        layer = call.tap.layer
        self.sums[layer] = self.sums.get(layer, 0) + torch.stack(found)
        return call.plain(query, key, call.value)


def spreads(model: Any, rotations: Any, stored: Stored, sequences: np.ndarray, weigh: str) -> dict[int, Tensor]:
    """The factor `[H]` by which the stored keys of every layer fall short, on `sequences [N, T]`."""
    handler = _Scores(stored, weigh)
    with Taps(model, handler, rotations), torch.no_grad():
        for ids in batches(model, sequences, 1):
            model(input_ids=ids, use_cache=False)
    return {layer: (exact / shown.clamp(min=1e-30)).sqrt().float() for layer, (exact, shown) in handler.sums.items()}


def scaled(keys: Scalar, factor: Tensor, sample: Tensor) -> Scalar:
    """`keys` with centroids scaled by `factor [H]` about each channel's mean over `sample [N, H, D]`."""
    mean = (sample if keys.map is None else keys.map.forth(sample)).mean(0)[..., None]
    moved = mean + factor[:, None, None] * (keys.codebook.centroids - mean)
    return replace(keys, codebook=Codebook(keys.codebook.widths, moved))
