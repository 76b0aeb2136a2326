"""Cache layers that keep un-rotated keys: exact ones, and packed ones.

`update` only stores; the attention function reads (`attention.py`). What it reads is what was stored: prompt, new
tokens and all, except the first `sinks` real tokens of each row and the last `recent` tokens, which stay exact. A layer
with a sliding window keeps the last `sliding - 1` tokens, as transformers' own does.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from kvcalib.errors import ArtifactMismatch
from kvcalib.quant.quantizer import Quantizer
from kvcalib.runtime import paths
from kvcalib.runtime.encode import MOST_TOKENS, store
from kvcalib.runtime.kernels.view import PackedView
from kvcalib.runtime.storage import Rows, check_rows

READ_CHUNK = 1024
ENCODE_CHUNK = 4096
MOST_ROOM = 1024
"""Tokens of spare room in the window of exact ones; beyond that many eighths, room grows by eighths anyway."""
ROLES = ("key", "value")


class TapLayer(DynamicLayer):
    """A layer that keeps un-rotated keys; its reader is `attention.py`, so `update` returns only what is new.

    Attributes:
        sliding: how many tokens a query sees, itself included; None for all.
        seen: tokens that came in and were not cropped, those that slid out of the window included.
    """

    def __init__(self, sliding: int | None = None) -> None:
        super().__init__()
        self.sliding = sliding
        self.is_sliding = sliding is not None
        self.record_past = False
        self.seen = 0
        self.valid: Tensor | None = None

    def note(self, valid: Tensor | None) -> None:
        """Which of the tokens that the next `update` brings are real: `[B, t]` bool, None for all."""
        self.valid = valid

    def activate_past_recording(self) -> None:
        """Keep what slides out of the window until the next `crop`, which may then reach back to it."""
        self.record_past = True

    def visible(self, queries: int) -> int:
        """How many of the last tokens the last `queries` tokens may see."""
        return self.seen if self.sliding is None else min(self.seen, self.sliding - 1 + queries)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that the next `query_length` tokens will see."""
        past = self.seen if self.sliding is None else min(self.seen, self.sliding - 1)
        return past + query_length, self.seen - past

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1 if self.sliding is None else self.sliding

    get_max_cache_shape = get_max_length

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that the layer holds."""
        raise NotImplementedError

    def revive(self, tensors: dict[str, Tensor], seen: int, dtype: torch.dtype) -> None:
        """Become the layer whose live tensors are `tensors`; see `saved.py`."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor that the layer holds, spare room included."""
        return sum(t.nbytes for t in self.tensors().values())

    @property
    def batch(self) -> int:
        """Rows of the batch, 0 while the layer is empty."""
        raise NotImplementedError

    @property
    def elements(self) -> int:
        """Key and value elements of all tokens held, 0 where the layer does not pack."""
        return 0

    def live(self) -> dict[str, Tensor]:
        """Every tensor that `revive` needs, without spare room."""
        raise NotImplementedError

    def host_tensors(self) -> dict[str, Tensor]:
        """Exact copies in host memory, which are not among `tensors()`."""
        return {}

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.batch:
            self.batch_select_indices(torch.arange(self.batch).repeat_interleave(repeats))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.batch:
            self.batch_select_indices(beam_idx)

    def _stale(self, held: int) -> int:
        """How many of `held` tokens no later query can see."""
        if self.sliding is None or self.record_past:
            return 0
        return max(0, held - (self.sliding - 1))

    def _crop_to(self, tokens_to_remove: int, held: int) -> int:
        """Tokens of the `held` that stay; `seen` is reduced.

        transformers passes a negative count; up to 5.16 a positive number was the length to keep.
        """
        positive = max(0, self.seen - tokens_to_remove)
        remove = min(self.seen, -tokens_to_remove if tokens_to_remove <= 0 else positive)
        missing = min(self.seen - remove, (self.sliding or self.seen + 1) - 1) - (held - remove)
        if remove and missing > 0:
            raise RuntimeError(
                f"crop by {remove} tokens: {missing} tokens that the window of {self.sliding} would show again are "
                "gone; call cache.activate_past_recording() before the tokens come in"
            )
        self.seen -= remove
        return max(0, held - remove)


class ExactLayer(TapLayer):
    """Keys and values as they came: what the self-test and a byte-for-byte baseline need."""

    def __init__(self, sliding: int | None = None) -> None:
        super().__init__(sliding)
        self.rows = Rows()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.is_initialized = True
        self.rows.drop(self._stale(self.rows.length))
        self.rows.append({"key": key_states.transpose(1, 2), "value": value_states.transpose(1, 2)})
        self.seen += key_states.shape[2]
        return key_states, value_states

    def read(self, count: int) -> tuple[Tensor, Tensor]:
        """The last `count` keys (un-rotated) and values, `[B, H, count, D]`."""
        rows = self.rows.read(self.rows.length - count, self.rows.length)
        return rows["key"].transpose(1, 2), rows["value"].transpose(1, 2)

    @property
    def batch(self) -> int:
        return self.rows.batch

    def crop(self, tokens_to_remove: int) -> None:
        self.rows.crop(self._crop_to(tokens_to_remove, self.rows.length))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.rows.select(indices)

    def reset(self) -> None:
        self.__init__(self.sliding)  # type: ignore[misc]

    def tensors(self) -> dict[str, Tensor]:
        return self.rows.tensors()


class PackedLayer(TapLayer):
    """Packed keys and values of one layer.

    Args:
        key, value: the layer's quantizers.
        sinks: real tokens at the start of every row that stay exact; none in a sliding layer, which would drop them.
        recent: tokens at the end that stay exact; they are quantized when they leave the window.
        sliding: see `TapLayer`.

    Memory: a row of words per token for keys and one for values, outliers, zero and scale; exact keys and values of
    the sinks and of the window. A sink's row of words exists too and is not read.
    """

    def __init__(
        self, key: Quantizer, value: Quantizer, sinks: int = 0, recent: int = 0, sliding: int | None = None
    ) -> None:
        super().__init__(sliding)
        self.quantizers = {"key": key, "value": value}
        self.sinks = sinks if sliding is None else 0
        self.recent = recent
        self._known: tuple[Any, dict[str, Any]] | None = None
        self._clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedLayer:
        memo.update({id(quantizer): quantizer for quantizer in self.quantizers.values()})
        made = object.__new__(type(self))
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    def _clear(self) -> None:
        self.packed = Rows()
        # Whatever `recent` is: an artifact may say 2^53.
        self.window = Rows(min_room=max(8, min(self.recent // 8, MOST_ROOM)))
        self.sink: dict[str, Tensor] = {}
        self.sink_count: Tensor | None = None
        self.sinks_full = self.sinks == 0
        self.is_initialized = False
        self.valid = None
        self.seen = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store `[B, H, t, D]` and return them as they came."""
        self._begin(key_states, value_states)
        self.packed.drop(min(self._stale(self.packed.length + self.window.length), self.packed.length))
        self.seen += key_states.shape[2]
        self._take(key_states, value_states)
        return key_states, value_states

    def _begin(self, key: Tensor, value: Tensor) -> None:
        """Check the shapes of keys and values that come, and note their type and device."""
        for role, x in (("key", key), ("value", value)):
            expected = self.quantizers[role].layout.widths.shape
            if x.shape[1::2] != expected:
                raise ArtifactMismatch(
                    f"{role}s have {x.shape[1]} kv heads of {x.shape[3]} channels, the artifact has "
                    f"{expected[0]} of {expected[1]}; build one for this model"
                )
        self.dtype, self.device, self.is_initialized = key.dtype, key.device, True

    def _take(self, key: Tensor, value: Tensor) -> None:
        """Store `[B, H, t, D]`: the last ones in the exact window, what leaves it packed."""
        value = along(self.quantizers["value"], value)
        new = {"key": key.transpose(1, 2), "value": value.transpose(1, 2)}
        if self.sinks and (self.recent or not self.sinks_full):
            shape = new["key"].shape[:2]
            new["valid"] = torch.ones(shape, dtype=torch.bool, device=self.device)
            if self.valid is not None:
                new["valid"] &= self.valid.to(self.device)
        if not self.recent:
            self._store(new)
            return
        self.window.append(new)
        leaving = self.window.length - self.recent
        if leaving > 0:
            self._store(self.window.read(0, leaving))
            self.window.drop(leaving)

    def _store(self, new: Mapping[str, Tensor]) -> None:
        """Quantize and append tokens `[B, t, H, D]`."""
        if not self.sinks_full:
            self._keep_sinks(new)
        batch, count = new["key"].shape[:2]
        exact = torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float16
        self.packed.extend(self._spec(batch, count, exact))
        path = paths.writing(self.quantizers["key"], self.quantizers["value"], self.device)
        rows = self.packed.read(self.packed.length - count, self.packed.length)
        residues = self._residues(new["key"])
        if path == "native" and batch * count <= MOST_TOKENS:
            for role, quantizer in self.quantizers.items():
                store(quantizer, new[role], exact, rows, f"{role}.", residues.get(role))
        elif path == "triton":
            from kvcalib.runtime.kernels.encode import packed_encode

            pair = (residues["key"], residues["value"]) if residues else None
            packed_encode(
                new["key"],
                new["value"],
                self.quantizers["key"],
                self.quantizers["value"],
                dict(rows),
                *([pair] if pair else []),
            )
        else:
            for start in range(0, count, ENCODE_CHUNK):
                part = slice(start, start + ENCODE_CHUNK)
                for role, quantizer in self.quantizers.items():
                    x = new[role][:, part]
                    flat = x.reshape(-1, *x.shape[2:])
                    made = quantizer.encode(flat, exact)
                    for name, t in made.items():
                        # A token's one zero and scale may be kept once per head (`heads.py`).
                        rows[f"{role}.{name}"][:, part] = t.reshape(*x.shape[:2], *t.shape[1:])
                    if residues:
                        residues[role][:, part] = residue(quantizer, made, flat).view(*x.shape[:3], 2)
        if residues:
            self._note(rows, residues)

    def _residues(self, key: Tensor) -> dict[str, Tensor]:
        """Where `|x - x^|^2` and `|x|^2` of tokens `key [B, t, H, D]` and their values go, nowhere if nobody asks."""
        return {}

    def _note(self, rows: Mapping[str, Tensor], residues: dict[str, Tensor]) -> None:
        """Take the `residues` `[B, t, H, 2]` of the tokens just stored in `rows`."""

    def _spec(self, batch: int, count: int, exact: torch.dtype) -> dict[str, Any]:
        """What `Rows.extend` is told of `count` new tokens; most steps are alike."""
        asked = (batch, count, exact, self.device)
        if self._known is None or self._known[0] != asked:
            spec = {
                name: (torch.Size((batch, count, *shape)), dtype, self.device)
                for name, (shape, dtype) in self._row_spec(exact).items()
            }
            self._known = (asked, spec)
        return self._known[1]

    def _row_spec(self, exact: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of what is stored of one packed token, by name."""
        return {
            f"{role}.{name}": spec
            for role, quantizer in self.quantizers.items()
            for name, spec in quantizer.row_spec(exact).items()
        }

    def _keep_sinks(self, new: Mapping[str, Tensor]) -> None:
        """Copy the first real tokens of each row, with their slots, until every row has its `sinks`."""
        batch = new["key"].shape[0]
        if self.sink_count is None:
            for name in self.quantizers:
                self.sink[name] = new[name].new_zeros(batch, self.sinks, *new[name].shape[2:])
            self.sink["slot"] = torch.full((batch, self.sinks), -1, dtype=torch.int32, device=self.device)
            self.sink_count = torch.zeros(batch, dtype=torch.int32, device=self.device)
        rank = self.sink_count[:, None] + new["valid"].int().cumsum(1) - 1
        row, token = (new["valid"] & (rank < self.sinks)).nonzero(as_tuple=True)
        place = rank[row, token].long()
        for name in self.quantizers:
            self.sink[name][row, place] = new[name][row, token]
        self.sink["slot"][row, place] = (self.packed.length + token).int()
        self.sink_count += new["valid"].sum(1, dtype=torch.int32)
        self.sink_count.clamp_(max=self.sinks)
        self.sinks_full = bool((self.sink_count >= self.sinks).all())

    def view(self, count: int, positions: Tensor) -> PackedView:
        """What attention over the last `count` tokens reads; `positions [B or 1, count]` are those tokens'."""
        window = min(count, self.window.length)
        packed = count - window
        recent: Mapping[str, Tensor] = {}
        if window:
            recent = self.window.read(self.window.length - window, self.window.length)
        return PackedView(
            key=self.quantizers["key"],
            value=self.quantizers["value"],
            rows=self.packed.read(self.packed.length - packed, self.packed.length),
            length=packed,
            sink_key=self.sink.get("key"),
            sink_value=self.sink.get("value"),
            sink_slot=self.sink.get("slot"),
            recent_key=recent.get("key"),
            recent_value=recent.get("value"),
            positions=positions,
        )

    @property
    def batch(self) -> int:
        return max(self.packed.batch, self.window.batch)

    @property
    def _may_lack(self) -> bool:
        """Whether tokens that came in may be gone."""
        return self.sliding is not None

    @property
    def elements(self) -> int:
        per_token = sum(q.layout.widths.numel() for q in self.quantizers.values())
        return self.batch * (self.packed.length + self.window.length) * per_token

    def live(self) -> dict[str, Tensor]:
        held = {f"packed.{n}": t for n, t in self.packed.read(0, self.packed.length).items()}
        held.update({f"recent.{n}": t for n, t in self.window.read(0, self.window.length).items()})
        held.update({f"sink.{n}": t for n, t in self.sink.items()})
        return held

    def revive(self, tensors: dict[str, Tensor], seen: int, dtype: torch.dtype) -> None:
        """Become the layer whose `live()` is `tensors` and which had `seen` tokens, keys and values in `dtype`.

        Raises:
            ValueError: a tensor is missing, unknown, or not of the shape and type that the quantizers ask for.
        """
        self._clear()
        if not tensors and not seen:
            return
        parts: dict[str, dict[str, Tensor]] = {"packed": {}, "recent": {}, "sink": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts.setdefault(part, {})[rest] = tensor
        length = {part: self._check_part(part, found, dtype) for part, found in parts.items()}
        held, slots = length["packed"] + length["recent"], parts["sink"].get("slot")
        if held > seen or (not self._may_lack and held != seen) or length["recent"] > self.recent:
            raise ValueError(f"{held} tokens are stored of {seen} seen, {length['recent']} of them exact")
        if self.sinks and length["packed"] and slots is None:
            raise ValueError(f"the {self.sinks} exact first tokens are missing")
        if slots is not None and bool(((slots < -1) | (slots >= max(length["packed"], 1))).any()):
            raise ValueError(f"sink.slot is outside the {length['packed']} packed tokens")
        if len({tensor.shape[0] for tensor in tensors.values()}) > 1:
            raise ValueError("packed, recent and sink tokens are of different batch sizes")
        for role, quantizer in self.quantizers.items():
            check_indices(f"packed.{role}", quantizer, parts["packed"].get(f"{role}.outlier_index"))
        for rows, name in ((self.packed, "packed"), (self.window, "recent")):
            if parts[name]:
                rows.append(parts[name])
        if slots is not None:
            self.sink = {name: t.clone() for name, t in parts["sink"].items()}
            self.sink_count = (slots >= 0).sum(1, dtype=torch.int32)
            self.sinks_full = bool((self.sink_count >= self.sinks).all())
        self.seen, self.dtype, self.device = seen, dtype, next(iter(tensors.values())).device
        self.is_initialized = True

    def _check_part(self, part: str, found: dict[str, Tensor], dtype: torch.dtype) -> int:
        """Tokens `[B, t, ...]` of one part of a saved layer; ValueError if a tensor is not as this layer keeps it."""
        expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        exact = {role: (tuple(q.layout.widths.shape), dtype) for role, q in self.quantizers.items()}
        if part == "packed":
            two_bytes = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
            expected.update(self._row_spec(two_bytes))
        elif part == "recent" and self.recent:
            expected = exact | ({"valid": ((), torch.bool)} if self.sinks else {})
        elif part == "sink" and self.sinks:
            expected = exact | {"slot": ((), torch.int32)}
        return check_rows(part, found, expected, self.sinks if part == "sink" else None)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens. What left the exact window stays quantized; the window fills up again.

        Raises:
            RuntimeError: a sliding window would have to show tokens again that are gone.
        """
        keep = self._crop_to(tokens_to_remove, self.packed.length + self.window.length)
        self.window.crop(max(0, keep - self.packed.length))
        self.packed.crop(keep)
        self.packed.drop(min(self._stale_after_crop(), self.packed.length))
        if self.sink:
            self.sink["slot"][self.sink["slot"] >= keep] = -1
            self.sink_count = (self.sink["slot"] >= 0).sum(1, dtype=torch.int32)
            self.sinks_full = bool((self.sink_count >= self.sinks).all())

    def _stale_after_crop(self) -> int:
        held = self.packed.length + self.window.length
        return 0 if self.sliding is None else max(0, held - (self.sliding - 1))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.packed.select(indices)
        self.window.select(indices)
        self.sink = {name: t.index_select(0, indices.to(t.device)) for name, t in self.sink.items()}
        if self.sink_count is not None:
            self.sink_count = self.sink_count.index_select(0, indices.to(self.sink_count.device))

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


def along(quantizer: Quantizer, x: Tensor) -> Tensor:
    """The model's values `[B, H, t, D]` as `quantizer` takes them."""
    return x if quantizer.basis is None else quantizer.basis.forth(x)


def check_indices(what: str, quantizer: Quantizer, index: Tensor | None) -> None:
    """ValueError unless the outliers of saved rows lie within their group."""
    size = quantizer.layout.widths.numel() // quantizer.groups
    if index is not None and bool(((index.long() < 0) | (index.long() >= size)).any()):
        raise ValueError(f"{what}.outlier_index is outside the {size} elements of its group")


def residue(quantizer: Quantizer, rows: dict[str, Tensor], x: Tensor) -> Tensor:
    """`|x - x^|^2` and `|x|^2` of every token and head of `x [N, H, D]`, stored as `rows`: float32 `[N, H, 2]`."""
    wide = x.float()
    return torch.stack([(quantizer.decode(rows) - wide).square().sum(-1), wide.square().sum(-1)], -1)


def with_exact(view: PackedView, key: Tensor, value: Tensor) -> PackedView:
    """`view` with its last tokens, already stored, read as `key, value [B, H, t, D]` instead."""
    value = along(view.value, value)
    past = view.total - key.shape[2]
    older = max(0, past - view.length)
    exact = [
        new.transpose(1, 2) if held is None else torch.cat([held[:, :older], new.transpose(1, 2)], 1)
        for held, new in ((view.recent_key, key), (view.recent_value, value))
    ]
    length = min(past, view.length)
    rows = {name: t[:, :length] for name, t in view.rows.items()}
    slot = view.sink_slot
    if slot is not None:
        slot = torch.where(slot < length, slot, -1)
    return replace(view, rows=rows, length=length, sink_slot=slot, recent_key=exact[0], recent_value=exact[1])


def chunks(view: PackedView, size: int = READ_CHUNK) -> Iterator[tuple[int, Tensor, Tensor]]:
    """`(start, keys, values)` of all tokens of a view, `[B, H, t, D]` float32 with t <= size, keys un-rotated."""
    for start in range(0, view.length, size):
        stop = min(start + size, view.length)
        part = {}
        for name, quantizer in (("key", view.key), ("value", view.value)):
            mine = {n.split(".")[1]: t[:, start:stop] for n, t in view.rows.items() if n.startswith(name + ".")}
            batch, count = mine["words"].shape[:2]
            x = quantizer.decode({n: t.reshape(batch * count, *t.shape[2:]) for n, t in mine.items()})
            part[name] = x.reshape(batch, count, *x.shape[1:])
        _put_sinks(view, part, start)
        yield start, part["key"].transpose(1, 2), part["value"].transpose(1, 2)
    if view.recent_key is not None and view.recent_value is not None:
        yield view.length, view.recent_key.float().transpose(1, 2), view.recent_value.float().transpose(1, 2)


def _put_sinks(view: PackedView, part: dict[str, Tensor], start: int) -> None:
    """Put the exact sinks over their packed rows in a chunk `part [B, t, H, D]` that begins at slot `start`."""
    if view.sink_slot is None:
        return
    slot = view.sink_slot - start
    row, place = ((slot >= 0) & (slot < part["key"].shape[1])).nonzero(as_tuple=True)
    for name, exact in (("key", view.sink_key), ("value", view.sink_value)):
        assert exact is not None
        part[name][row, slot[row, place].long()] = exact[row, place].float()
