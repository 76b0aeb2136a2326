"""The packed cache that `generate()` runs on.

`PackedCache` is transformers' `DynamicCache` in which the calibrated layers are `layers.PackedLayer`s; all others keep
their stock layer. Keys are stored before RoPE together with their positions (once for all layers), so reading rotates
them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kvcalib.runtime import saved
from kvcalib.runtime.evicting import EvictingLayer
from kvcalib.runtime.layers import TapLayer
from kvcalib.runtime.storage import Rows

EXACT_BITS = 16


class PackedCache(DynamicCache):
    """All layers of a model, `layers` of them tapped, and the positions of their tokens.

    Args:
        config: the model's config; it names the stock layers.
        layers: layer index to the `TapLayer` that takes its place.
        origin: what the cache was made from: artifact, model and settings (see `saved.py`).

    Attributes:
        lent: the cache lives for one forward pass, whose output must not name it.
    """

    def __init__(self, config: PreTrainedConfig, layers: dict[int, TapLayer], origin: saved.Origin | None = None):
        super().__init__(config=config.get_text_config(decoder=True))
        for index, layer in layers.items():
            self.layers[index] = layer
        self.tapped = tuple(sorted(layers))
        full = [layer for layer in self.layers if not getattr(layer, "is_sliding", False)]
        evicting = [layer for layer in full if isinstance(layer, EvictingLayer)]
        for mine in evicting:
            # Layers of one kind share a mask; a stock layer needs all of it.
            mine.whole_mask = len(evicting) < len(full)
        self.origin = origin
        self.lent = False
        self._positions = Rows()
        self._view: Tensor | None = None
        self._expected: int | None = None

    def expect(self, layer: int, valid: Tensor | None) -> None:
        """An attached model's layer is about to `update`; `valid [B, t]`: which of its tokens are real, None for all.

        Raises:
            ValueError: this cache keeps that layer in a stock layer.
        """
        if layer not in self.tapped:
            raise ValueError(
                f"the cache packs layers {list(self.tapped)}, but the model is attached at layer {layer} too; make the "
                "cache with the attached artifact: artifact.new_cache(model)"
            )
        self._tap_layer(layer).note(valid)
        self._expected = layer

    @torch.compiler.disable
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        expected, self._expected = self._expected, None
        if layer_idx in self.tapped and layer_idx != expected:
            raise RuntimeError(
                f"layer {layer_idx} of this cache is packed, and only an attached model can read it; call "
                "kvcalib.attach(model, artifact) with the artifact that the cache was made from"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def extend_positions(self, length: int, position_ids: Tensor) -> Tensor:
        """Positions of all `length` tokens `[B or 1, length]`, of which `position_ids [B or 1, t]` are the last.

        Every tapped layer of a forward pass calls this; the first one appends.
        """
        if self._positions.length < length:
            new = position_ids[:, -(length - self._positions.length) :].to(torch.int32)
            if new.shape[0] > 1 and self._positions.batch < 2 and bool((new == new[:1]).all()):
                new = new[:1]
            if self._positions.batch == 1 < new.shape[0]:
                self._positions.select(torch.zeros(new.shape[0], dtype=torch.long))
            held = self._positions.tensors().get("position")
            self._positions.append({"position": new if held is None else new.expand(held.shape[0], -1)})
            self._view = None
        if self._view is None or self._view.shape[1] != length:
            self._view = self._positions.read(0, length)["position"]
        return self._view

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens of every layer; a negative count (transformers up to 5.16: the length to keep)."""
        super().crop(tokens_to_remove)
        self._positions.crop(self._seen())
        self._view = None

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._select_positions(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._select_positions(torch.arange(self._positions.batch).repeat_interleave(repeats))

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        self._select_positions(beam_idx)

    def _select_positions(self, indices: Tensor) -> None:
        # One shared row of positions serves every row of the batch.
        if self._positions.batch > 1:
            self._positions.select(indices)
        self._view = None

    def positions(self) -> dict[str, Tensor]:
        """`position [B or 1, T]` int32 of every token that came in; nothing if no layer asks (`in_order`)."""
        return dict(self._positions.read(0, self._positions.length))

    def put_positions(self, position: Tensor) -> None:
        """Take the positions `[B or 1, T]` of a saved cache.

        Raises:
            ValueError: there are more or fewer than tokens.
        """
        tokens = self._seen()
        if position.dtype != torch.int32 or position.ndim != 2 or position.shape[1] != tokens:
            raise ValueError(
                f"positions are {position.dtype} {list(position.shape)}, expected int32 for {tokens} tokens"
            )
        self._positions = Rows()
        self._positions.append({"position": position})
        self._view = None

    @property
    def in_order(self) -> bool:
        """Whether any layer asks for the positions of all tokens; layers that evict keep those of their own."""
        return not all(isinstance(self._tap_layer(i), EvictingLayer) for i in self.tapped)

    def evict(self) -> None:
        """Let go now what the eviction's budget does not allow, as after a prompt that nothing follows yet."""
        for index in self.tapped:
            layer = self.layers[index]
            if isinstance(layer, EvictingLayer):
                layer.evict()

    def survivors(self) -> dict[int, Tensor]:
        """By layer that evicts: positions of the tokens it holds, int32 `[B, H, S]`, -1 where a slot is unused."""
        layers = {index: self.layers[index] for index in self.tapped}
        return {i: layer.survivors() for i, layer in layers.items() if isinstance(layer, EvictingLayer) and layer.batch}

    def _tap_layer(self, index: int) -> TapLayer:
        layer = self.layers[index]
        assert isinstance(layer, TapLayer)
        return layer

    def _seen(self) -> int:
        return max((self._tap_layer(i).seen for i in self.tapped), default=0)

    def reset(self) -> None:
        """Forget everything; the cache can be used again, for another batch size too."""
        super().reset()
        self._positions = Rows()
        self._view = None

    def save(self, path: str | Path) -> None:
        """Write the cache to a `.safetensors` file, for another process to go on from; see `saved.save`."""
        saved.save(self, Path(path))

    @classmethod
    def load(cls, path: str | Path, model: PreTrainedModel) -> PackedCache:
        """The cache that `save` wrote, for the attached `model`; see `loader.load_cache`."""
        from kvcalib.runtime.loader import load_cache

        return load_cache(path, model)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that the cache holds, by name: packed, exact and stock layers, and positions."""
        held = {f"positions.{name}": t for name, t in self._positions.tensors().items()}
        for index, layer in enumerate(self.layers):
            mine = layer.tensors() if isinstance(layer, TapLayer) else saved.stock_tensors(layer)
            held.update({f"layers.{index}.{name}": t for name, t in mine.items()})
        return held

    def nbytes(self) -> int:
        """Bytes of everything the cache holds, spare room included."""
        return sum(t.nbytes for t in self.tensors().values())

    def host_nbytes(self) -> int:
        """Bytes of the exact copies that adaptive layers keep in host memory; not among `nbytes`."""
        return sum(t.nbytes for i in self.tapped for t in self._tap_layer(i).host_tensors().values())

    def effective_bits(self) -> float:
        """Bytes of the packed layers and positions times 8, per cached key or value element of those layers.

        A layer that could be packed and is not (it attends in full or, where sliding layers are packed, slides) was
        left exact by the plan and counts too, at 16 bits an element, as the unquantized cache does everywhere.
        """
        packed = [layer for layer in map(self._tap_layer, self.tapped) if layer.elements]
        elements = sum(layer.elements for layer in packed)
        if not elements:
            return 0.0
        held = self._positions.nbytes + sum(layer.nbytes for layer in packed)
        exact = sum(t.numel() for layer in self._exact() for t in saved.stock_tensors(layer).values())
        return (held * 8 + EXACT_BITS * exact) / (elements + exact)

    def _exact(self) -> list[Any]:
        """The stock layers that an artifact could have packed."""
        sliding = any(self._tap_layer(index).sliding is not None for index in self.tapped)
        kinds = (DynamicLayer, DynamicSlidingWindowLayer) if sliding else (DynamicLayer,)
        return [layer for i, layer in enumerate(self.layers) if i not in self.tapped and type(layer) in kinds]
