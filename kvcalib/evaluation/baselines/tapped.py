"""Baselines that see more than a cache does: keys before RoPE, the attention that is paid, which tokens are padding.

The model is tapped (`model/taps.py`): queries and keys come un-rotated, and a handler computes the attention. A layer
that stores keys before RoPE (`StoredLayer`) has them rotated as they are read; a layer with an `attend` of its own is
asked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvcalib.evaluation.baselines.baseline import Baseline, CacheSession
from kvcalib.evaluation.trials import Session
from kvcalib.model.taps import AttentionOutput, Call, Tap, Taps
from kvcalib.runtime.cache import PackedCache
from kvcalib.runtime.layers import TapLayer
from kvcalib.runtime.loader import new_positions, prove, valid_tokens


@runtime_checkable
class Attends(Protocol):
    """A `TapLayer` that computes attention itself."""

    def attend(self, call: Call, position_ids: Tensor) -> Tensor:
        """`[B, Q, Hq, D]` for the call's queries, after `update` brought its keys and values."""


class Reader:
    """The taps' handler."""

    @torch.compiler.disable
    def before(self, tap: Tap) -> None:
        """Tell the cache which of the new tokens are real."""
        if not isinstance(tap.cache, PackedCache):
            raise ValueError(
                f"the model runs a baseline and was given a {type(tap.cache).__name__} as past_key_values; pass "
                "session.new_cache()"
            )
        tap.cache.expect(tap.layer, valid_tokens(tap.mask))

    @torch.compiler.disable
    def attend(self, call: Call) -> AttentionOutput:
        """Attention over everything that the layer shows."""
        cache, tap = call.tap.cache, call.tap
        layer = cache.layers[tap.layer]
        current = new_positions(call, layer)
        if isinstance(layer, Attends):
            return layer.attend(call, current), None
        # What `update` returned: all keys as stored, un-rotated, and all values.
        positions = cache.extend_positions(layer.seen, current)
        return call.plain(call.rotate_new(call.query), call.rotate_at(call.key, positions), call.value)


class TappedBaseline(Baseline):
    """A baseline whose layers are `TapLayer`s of a `PackedCache`; positions count among its bytes."""

    def new_cache(self, model: PreTrainedModel) -> PackedCache:
        layers: dict[int, TapLayer] = self.layers(model)
        return PackedCache(model.config, layers)

    @contextlib.contextmanager
    def run(self, model: PreTrainedModel) -> Iterator[Session]:
        rotations = prove(model, list(self.layers(model)))
        with Taps(model, Reader(), rotations):
            yield CacheSession(model, lambda: self.new_cache(model))

    def nbytes(self, cache: DynamicCache) -> float:
        assert isinstance(cache, PackedCache)
        positions = sum(t.nbytes for name, t in cache.tensors().items() if name.startswith("positions."))
        return super().nbytes(cache) + positions
