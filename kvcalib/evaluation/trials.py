"""A trial: one way to keep the cache while a task runs, the same for every task.

    with Trial(artifact, eviction).run(model, rotations) as session:
        cache = session.read(prompt)          # one pass, then what the policy drops is dropped
        logits = session.decode(ids, cache)   # passes of a few tokens, on what is stored

Whatever follows the prompt reads the evicted cache: eviction happens once the prompt is in, before the next pass.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvcalib.model.rotary import Rotation
from kvcalib.runtime.cache import PackedCache
from kvcalib.runtime.eviction import Eviction
from kvcalib.runtime.loader import Artifact, Attachment, Prefill, attach, detach
from kvcalib.runtime.tiers import Adaptive


@dataclass(frozen=True, eq=False)
class Trial:
    """What a task runs on.

    Attributes:
        artifact: None for the unquantized model with its full cache.
        eviction: None where every token stays.
        adaptive: widths by attention in place of the artifact's.
    """

    artifact: Artifact | None
    eviction: Eviction | None = None
    adaptive: Adaptive | None = None

    @property
    def where(self) -> str | None:
        """The folder of the adaptive widths or of the artifact, or the model's name."""
        if self.adaptive is not None:
            return str(self.adaptive.path or "adaptive")
        return None if self.artifact is None else str(self.artifact.path or self.artifact.manifest.model.name)

    @property
    def policy(self) -> str | None:
        """The name of the eviction policy, None without eviction."""
        return None if self.eviction is None else self.eviction.rule.name

    @property
    def described(self) -> dict[str, Any] | None:
        """The settings of eviction, for a report."""
        return None if self.eviction is None else json.loads(self.eviction.describe())

    @contextlib.contextmanager
    def run(
        self,
        model: PreTrainedModel,
        rotations: Mapping[int, Rotation],
        sinks: int | None = None,
        recent: int | None = None,
        prefill: Prefill = "quantized",
    ) -> Iterator[Session]:
        """`model` on such caches, attached until the end of the block."""
        if self.artifact is None:
            yield Session(model, None, prefill)
            return
        chosen = {layer: rotations[layer] for layer in self.artifact.quantizers}
        attachment = attach(model, self.artifact, sinks, recent, chosen, prefill, self.adaptive, eviction=self.eviction)
        try:
            yield Session(model, attachment, prefill)
        finally:
            detach(model)


class Session:
    """A model and the kind of cache it runs on. Every pass is without gradient.

    Attributes:
        seconds: of each pass of `decode`, per token of one row.
    """

    def __init__(self, model: PreTrainedModel, attachment: Attachment | None, prefill: Prefill = "quantized") -> None:
        self.model, self.attachment, self.prefill = model, attachment, prefill
        self.seconds: list[float] = []

    def new_cache(self) -> DynamicCache:
        """An empty cache."""
        if self.attachment is None:
            return DynamicCache(config=self.model.config.get_text_config(decoder=True))
        return self.attachment.make_cache()

    @torch.no_grad()
    def read(self, ids: Tensor) -> tuple[DynamicCache, Tensor]:
        """A cache of the prompt `ids [B, T]` with what the policy keeps, and the logits of its last token `[B, V]`."""
        cache = self.new_cache()
        if self.attachment is not None:
            self.attachment.prefill = self.prefill
        logits = self.model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        if self.attachment is not None:
            self.attachment.prefill = "quantized"
        if isinstance(cache, PackedCache):
            cache.evict()
        return cache, logits

    @torch.no_grad()
    def decode(self, ids: Tensor, cache: DynamicCache, step: int = 1) -> Tensor:
        """Logits `[B, t, V]` of `ids [B, t]`, which go through in passes of `step` tokens."""
        found = []
        for part in torch.split(ids, step, 1):
            began = time.perf_counter()
            found.append(self.model(input_ids=part, past_key_values=cache).logits)
            if ids.is_cuda:
                torch.cuda.synchronize()
            self.seconds.append((time.perf_counter() - began) / part.numel())
        return torch.cat(found, 1)


def survivors(cache: DynamicCache) -> dict[int, Tensor]:
    """Layer to the positions kept `[B, H, S]`, -1 where a slot is unused; empty for a cache that evicts nothing."""
    return cache.survivors() if isinstance(cache, PackedCache) else {}


def tokens_kept(cache: DynamicCache) -> float:
    """Tokens that a KV head holds, mean over layers, heads and rows."""
    found = survivors(cache)
    if not found:
        return float(cache.get_seq_length())
    return float(torch.stack([(kept >= 0).sum(-1).double().mean() for kept in found.values()]).mean())


def cache_bytes(cache: DynamicCache) -> float:
    """Bytes of everything that `cache` holds; elements of a stock cache count at 16 bits."""
    if isinstance(cache, PackedCache):
        return float(cache.nbytes())
    tensors = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return float(sum(2 * t.numel() for t in tensors if isinstance(t, Tensor)))
