"""A layer of adaptive widths that lets tokens go: every token as many bits as its attention says, and not all of them.

Which tokens leave, when, and what is kept of each beside its width is `evicting.py`'s; how they are stored and read is
`adaptive.py`'s. A token's width is one for all its heads, so all heads hold the same tokens.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor

from kvcalib.model.taps import Call
from kvcalib.runtime.adaptive import AdaptiveLayer
from kvcalib.runtime.attention import drawn_attention
from kvcalib.runtime.evicting import EvictingLayer, noted
from kvcalib.runtime.eviction import Eviction
from kvcalib.runtime.storage import Rows


class EvictingAdaptiveLayer(EvictingLayer):
    """Keys and values of one layer, of at most so many tokens, a width for each.

    Args:
        store: an empty layer that keeps them.
        eviction, alpha, share: as `EvictingLayer`.

    Raises:
        ValueError: heads shall keep tokens of their own.
    """

    def __init__(self, store: AdaptiveLayer, eviction: Eviction, alpha: float = 1.0, share: float = 1.0) -> None:
        if eviction.per == "head":
            raise ValueError(
                "per is 'head', but with adaptive widths a token has one width in all heads, so they cannot keep "
                "tokens of their own; take per='layer' or leave it out"
            )
        self.store = store
        tier = store.tiers[0]
        super().__init__(
            tier["key"], tier["value"], replace(eviction, per="layer"), alpha, share, store.sinks, store.recent
        )
        if self.traits:
            store.observe = functools.partial(noted, self.eviction.rule)

    # What `EvictingLayer` asks of the window is how many tokens it holds; they always stay.
    @property
    def window(self) -> Rows:
        """The store's."""
        return self.store.window

    @window.setter
    def window(self, rows: Rows) -> None:
        """The store makes its own."""

    def _clear(self) -> None:
        super()._clear()
        self.store.reset()

    def _take(self, key: Tensor, value: Tensor) -> None:
        self.store.note(self.valid)
        self.store.update(key, value)

    def _stored_traits(self) -> Tensor | None:
        return self.store.pools.traits() if self.store.pools.length else None

    def _keep_packed(self, index: Tensor, used: Tensor, room: int) -> None:
        self.store.keep(index[:, 0], used[:, 0])

    def _read(self, call: Call, exact: bool, apart: bool) -> Tensor:
        # Tokens of a pass see each other exactly anyway: their widths are chosen from that very attention.
        positions = self._positions().clamp(min=0)
        queries, rule = call.query.shape[2], self.eviction.rule
        if apart or self.eviction.streaming:
            query = call.rotate_at(call.query, positions[:, self.slots - queries : self.slots])
        else:
            query = call.rotate_new(call.query)
        log_sums: list[Tensor] = []
        out, paid = self.store.read(call, query, positions, log_sums)
        if rule.attention:
            kv_heads = len(self.quantizers["key"].layout.widths)
            drawn = torch.empty(self.batch, kv_heads, self.slots, device=self.device)
            drawn_attention(
                query,
                self.store.chunks(),
                lambda keys, start: call.rotate_at(keys.to(query.dtype), positions, start).float(),
                call.mask,
                self.slots,
                call.scaling,
                call.kwargs.get("softcap"),
                log_sums,
                rule.decay,
                drawn,
            )
            self._draw(drawn, queries)
        self.store.learn(paid)
        return out

    @property
    def elements(self) -> int:
        return self.store.elements

    def _cut(self, count: int) -> None:
        self.store.crop(-count)
        self.marks.crop(self.slots - count)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.store.batch_select_indices(indices)
        self.marks.select(indices)
        self.counts.select(indices.tolist())

    def _move(self, device: torch.device | str) -> None:
        self.marks.to(device)
        self.store._move(device)

    def tensors(self) -> dict[str, Tensor]:
        return self.store.tensors() | {f"mark.{n}": t for n, t in self.marks.tensors().items()}

    def host_tensors(self) -> dict[str, Tensor]:
        return self.store.host_tensors()

    def live(self) -> dict[str, Tensor]:
        return {n: t for n, t in super().live().items() if not n.startswith("recent.")} | self.store.live()

    def _revive_tokens(self, tensors: dict[str, Tensor], seen: int, dtype: torch.dtype) -> tuple[int, int]:
        self._clear()
        slots = sum(tensors[n].shape[1] for n in ("pools.tag", "recent.drawn") if n in tensors)
        rule = self.eviction.rule
        trait = {"trait": ((1, self.traits), rule.trait_dtype)} if self.traits else {}
        self.store.revive(tensors, slots, dtype, trait)
        if slots > seen:
            raise ValueError(f"{slots} tokens are stored of {seen} seen")
        if tensors:
            self.seen, self.dtype, self.device, self.is_initialized = seen, dtype, self.store.device, True
        return slots, self.store.batch
