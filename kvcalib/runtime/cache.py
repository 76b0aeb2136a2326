"""The packed cache that `generate()` runs on.

`PackedCache` is transformers' `DynamicCache` in which layers that attend in full are `PackedLayer`s; sliding, linear
and shared layers keep their stock layer. Keys are stored before RoPE together with their positions (once for all
layers), so reading rotates them. `PackedLayer.update` only stores; `attention.py` reads chunk by chunk, and what it
reads is what was stored: prompt, new tokens and all, except the first `sinks` real tokens of each row and the last
`recent` tokens, which stay exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from kvcalib.errors import ArtifactMismatch
from kvcalib.quant.quantizer import Quantizer
from kvcalib.runtime.storage import Rows

READ_CHUNK = 1024
ENCODE_CHUNK = 4096


class TapLayer(DynamicLayer):
    """A layer that keeps un-rotated keys; its reader is `attention.py`, so `update` returns only what is new."""

    def __init__(self) -> None:
        super().__init__()
        self.valid: Tensor | None = None

    def note(self, valid: Tensor | None) -> None:
        """Which of the tokens that the next `update` brings are real: `[B, t]` bool, None for all."""
        self.valid = valid

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that the layer holds."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor that the layer holds, spare room included."""
        return sum(t.nbytes for t in self.tensors().values())

    def get_max_cache_shape(self) -> int:
        return -1

    def get_max_length(self) -> int:
        return -1


class ExactLayer(TapLayer):
    """Keys and values as they came: what the self-test and a byte-for-byte baseline need."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = Rows()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.is_initialized = True
        self.rows.append({"key": key_states.transpose(1, 2), "value": value_states.transpose(1, 2)})
        return key_states, value_states

    def read(self) -> tuple[Tensor, Tensor]:
        """All keys (un-rotated) and values, `[B, H, T, D]`."""
        rows = self.rows.read(0, self.rows.length)
        return rows["key"].transpose(1, 2), rows["value"].transpose(1, 2)

    def get_seq_length(self) -> int:
        return self.rows.length

    def crop(self, tokens_to_remove: int) -> None:
        self.rows.crop(self.rows.length - _to_remove(tokens_to_remove, self.rows.length))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.rows.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.rows.select(_repeat(self.rows, repeats))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.rows.select(beam_idx)

    def reset(self) -> None:
        self.__init__()  # type: ignore[misc]

    def tensors(self) -> dict[str, Tensor]:
        return self.rows.tensors()


class PackedLayer(TapLayer):
    """Packed keys and values of one layer.

    Args:
        key, value: the layer's quantizers.
        sinks: real tokens at the start of every row that stay exact.
        recent: tokens at the end that stay exact; they are quantized when they leave the window.

    Memory: a row of words per token for keys and one for values, outliers, zero and scale; exact keys and values of
    the sinks and of the window. A sink's row of words exists too and is not read.
    """

    def __init__(self, key: Quantizer, value: Quantizer, sinks: int = 0, recent: int = 0) -> None:
        super().__init__()
        self.quantizers = {"key": key, "value": value}
        self.sinks, self.recent = sinks, recent
        self._clear()

    def _clear(self) -> None:
        self.packed = Rows()
        self.window = Rows()
        self.sink: dict[str, Tensor] = {}
        self.sink_count: Tensor | None = None
        self.is_initialized = False
        self.valid = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store `[B, H, t, D]` and return them as they came."""
        expected = self.quantizers["key"].layout.widths.shape
        if key_states.shape[1::2] != expected:
            raise ArtifactMismatch(
                f"keys have {key_states.shape[1]} kv heads of {key_states.shape[3]} channels, the artifact has "
                f"{expected[0]} of {expected[1]}; build one for this model"
            )
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        new = {"key": key_states.transpose(1, 2), "value": value_states.transpose(1, 2)}
        if self.sinks:
            valid = self.valid
            new["valid"] = torch.ones(new["key"].shape[:2], dtype=torch.bool, device=self.device)
            if valid is not None:
                new["valid"] &= valid
        if not self.recent:
            self._store(new)
            return key_states, value_states
        self.window.append({name: tensor.contiguous() for name, tensor in new.items()})
        leaving = self.window.length - self.recent
        if leaving > 0:
            self._store(self.window.read(0, leaving))
            staying = {name: t.clone() for name, t in self.window.read(leaving, self.window.length).items()}
            self.window = Rows()
            self.window.append(staying)
        return key_states, value_states

    def _store(self, new: dict[str, Tensor]) -> None:
        """Quantize and append tokens `[B, t, H, D]`."""
        if self.sinks:
            self._keep_sinks(new)
        batch, count = new["key"].shape[:2]
        exact = torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float16
        for start in range(0, count, ENCODE_CHUNK):
            rows = {}
            for name, quantizer in self.quantizers.items():
                part = new[name][:, start : start + ENCODE_CHUNK]
                encoded = quantizer.encode(part.reshape(-1, *part.shape[2:]), exact)
                rows.update({f"{name}.{n}": t.reshape(batch, -1, *t.shape[1:]) for n, t in encoded.items()})
            self.packed.append(rows)

    def _keep_sinks(self, new: dict[str, Tensor]) -> None:
        """Copy the first real tokens of each row, with their slots, until every row has its `sinks`."""
        batch = new["key"].shape[0]
        if self.sink_count is None:
            for name in self.quantizers:
                self.sink[name] = new[name].new_zeros(batch, self.sinks, *new[name].shape[2:])
            self.sink["slot"] = torch.full((batch, self.sinks), -1, dtype=torch.int32, device=self.device)
            self.sink_count = torch.zeros(batch, dtype=torch.int32, device=self.device)
        if int(self.sink_count.min()) >= self.sinks:
            return
        rank = self.sink_count[:, None] + new["valid"].int().cumsum(1) - 1
        row, token = (new["valid"] & (rank < self.sinks)).nonzero(as_tuple=True)
        place = rank[row, token].long()
        for name in self.quantizers:
            self.sink[name][row, place] = new[name][row, token]
        self.sink["slot"][row, place] = (self.packed.length + token).int()
        self.sink_count += new["valid"].sum(1, dtype=torch.int32)
        self.sink_count.clamp_(max=self.sinks)

    def chunks(self, size: int = READ_CHUNK) -> Iterator[tuple[int, Tensor, Tensor]]:
        """`(start, keys, values)` of all stored tokens, `[B, H, t, D]` float32 with t <= size, keys un-rotated."""
        for start in range(0, self.packed.length, size):
            rows = self.packed.read(start, min(start + size, self.packed.length))
            part = {}
            for name, quantizer in self.quantizers.items():
                mine = {n.split(".")[1]: t for n, t in rows.items() if n.startswith(name + ".")}
                batch, count = mine["words"].shape[:2]
                x = quantizer.decode({n: t.reshape(batch * count, *t.shape[2:]) for n, t in mine.items()})
                part[name] = x.reshape(batch, count, *x.shape[1:])
            self._put_sinks(part, start)
            yield start, part["key"].transpose(1, 2), part["value"].transpose(1, 2)
        if self.window.length:
            rows = self.window.read(0, self.window.length)
            key, value = (rows[n].float().transpose(1, 2) for n in ("key", "value"))
            yield self.packed.length, key, value

    def _put_sinks(self, part: dict[str, Tensor], start: int) -> None:
        if not self.sink:
            return
        slot = self.sink["slot"] - start
        row, place = ((slot >= 0) & (slot < part["key"].shape[1])).nonzero(as_tuple=True)
        for name in self.quantizers:
            part[name][row, slot[row, place].long()] = self.sink[name][row, place].float()

    def get_seq_length(self) -> int:
        return self.packed.length + self.window.length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens. What left the exact window stays quantized; the window fills up again."""
        keep = self.get_seq_length() - _to_remove(tokens_to_remove, self.get_seq_length())
        self.window.crop(max(0, keep - self.packed.length))
        self.packed.crop(keep)
        if self.sink:
            self.sink["slot"][self.sink["slot"] >= keep] = -1
            self.sink_count = (self.sink["slot"] >= 0).sum(1, dtype=torch.int32)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.packed.select(indices)
        self.window.select(indices)
        self.sink = {name: t.index_select(0, indices.to(t.device)) for name, t in self.sink.items()}
        if self.sink_count is not None:
            self.sink_count = self.sink_count.index_select(0, indices.to(self.sink_count.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(_repeat(self.packed if self.packed.length else self.window, repeats))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.get_seq_length():
            self.batch_select_indices(beam_idx)

    def reset(self) -> None:
        self._clear()

    def offload(self) -> None:
        self._move("cpu")

    def prefetch(self) -> None:
        if self.is_initialized:
            self._move(self.device)

    def _move(self, device: torch.device | str) -> None:
        self.packed.to(device)
        self.window.to(device)
        self.sink = {name: t.to(device) for name, t in self.sink.items()}
        self.sink_count = None if self.sink_count is None else self.sink_count.to(device)

    def tensors(self) -> dict[str, Tensor]:
        held = dict(self.packed.tensors())
        held.update({f"recent.{n}": t for n, t in self.window.tensors().items()})
        held.update({f"sink.{n}": t for n, t in self.sink.items()})
        if self.sink_count is not None:
            held["sink.count"] = self.sink_count
        return held


class PackedCache(DynamicCache):
    """All layers of a model, `layers` of them tapped, and the positions of their tokens.

    Args:
        config: the model's config; it names the stock layers.
        layers: layer index to the `TapLayer` that takes its place.
    """

    def __init__(self, config: PreTrainedConfig, layers: dict[int, TapLayer]) -> None:
        super().__init__(config=config.get_text_config(decoder=True))
        for index, layer in layers.items():
            self.layers[index] = layer
        self.tapped = tuple(sorted(layers))
        self._positions = Rows()
        self._view: Tensor | None = None

    def extend_positions(self, length: int, position_ids: Tensor) -> Tensor:
        """Positions of all `length` tokens `[B or 1, length]`, of which `position_ids [B or 1, t]` are the last.

        Every tapped layer of a forward pass calls this; the first one appends.
        """
        if self._positions.length < length:
            new = position_ids[:, -(length - self._positions.length) :].to(torch.int32)
            if new.shape[0] > 1 and bool((new == new[:1]).all()) and not self._has_rows(2):
                new = new[:1]
            if self._has_rows(1) and self._positions.tensors()["position"].shape[0] != new.shape[0]:
                self._positions.select(torch.zeros(new.shape[0], dtype=torch.long))
            self._positions.append({"position": new})
            self._view = None
        if self._view is None or self._view.shape[1] != length:
            self._view = self._positions.read(0, length)["position"]
        return self._view

    def _tap_layer(self, index: int) -> TapLayer:
        layer = self.layers[index]
        assert isinstance(layer, TapLayer)
        return layer

    def _has_rows(self, minimum: int) -> bool:
        held = self._positions.tensors()
        return bool(held) and held["position"].shape[0] >= minimum

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self._positions.crop(max((self._tap_layer(i).get_seq_length() for i in self.tapped), default=0))
        self._view = None

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._select_positions(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self._has_rows(2):
            self._select_positions(_repeat(self._positions, repeats))

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        self._select_positions(beam_idx)

    def _select_positions(self, indices: Tensor) -> None:
        # One shared row of positions serves every row of the batch.
        if self._has_rows(2):
            self._positions.select(indices)
        self._view = None

    def reset(self) -> None:
        super().reset()
        self._positions = Rows()
        self._view = None

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that the cache holds, by name: packed, exact and stock layers, and positions."""
        held = {f"positions.{name}": t for name, t in self._positions.tensors().items()}
        for index, layer in enumerate(self.layers):
            mine = layer.tensors() if isinstance(layer, TapLayer) else _stock_tensors(layer)
            held.update({f"layers.{index}.{name}": t for name, t in mine.items()})
        return held

    def nbytes(self) -> int:
        """Bytes of everything the cache holds, spare room included."""
        return sum(t.nbytes for t in self.tensors().values())

    def effective_bits(self) -> float:
        """Bytes of the packed layers and positions times 8, per cached key or value element of those layers."""
        elements, held = 0, self._positions.nbytes
        for index in self.tapped:
            layer = self.layers[index]
            if not isinstance(layer, PackedLayer) or not layer.get_seq_length():
                continue
            rows = next(iter({**layer.packed.tensors(), **layer.window.tensors()}.values())).shape[0]
            widths = layer.quantizers["key"].layout.widths.numel() + layer.quantizers["value"].layout.widths.numel()
            elements += rows * layer.get_seq_length() * widths
            held += layer.nbytes
        return held * 8 / elements if elements else 0.0


def _stock_tensors(layer: Any) -> dict[str, Tensor]:
    held = {}
    for name in ("keys", "values"):
        tensor = getattr(layer, name, None)
        if isinstance(tensor, Tensor):
            held[name] = tensor
    return held


def _to_remove(tokens_to_remove: int, length: int) -> int:
    """transformers passes a negative count; up to 5.16 a positive number was the length to keep."""
    return min(length, -tokens_to_remove) if tokens_to_remove <= 0 else max(0, length - tokens_to_remove)


def _repeat(rows: Rows, repeats: int) -> Tensor:
    held = rows.tensors()
    batch = next(iter(held.values())).shape[0] if held else 0
    return torch.arange(batch).repeat_interleave(repeats)
