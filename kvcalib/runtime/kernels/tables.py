"""Static tables that the kernels read, built once per quantizer, rotation and device.

A *slot* is a channel's place in the order in which a kernel visits the channels of a head: groups of 16, inside a group
the order of the fields. RoPE pairs lie side by side in the slots of keys.

Angles: a position is written in base 4096, and cos and sin of every digit's angle are computed in float64. A kernel
adds the angles up by the angle-sum formula. So no float32 ever holds a large angle, and a position of a million is as
exact as position 1 (float32 `t * frequency` is off by 0.03 radians there).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from kvcalib.model.angles import Angles
from kvcalib.quant.packing import GROUP, PLANES, Layout
from kvcalib.quant.quantizer import Quantizer

DIGIT = 4096
DIGITS = 2
NEAR = 128
META = 8


@dataclass
class SlotTables:
    """One quantizer's tables. H heads, D slots, S = 2**max(width), P planes.

    Attributes:
        grouped: planes are read by group; otherwise field by field.
        width: the width of all groups, or -1 where they differ or the layout is not grouped.
        planes: planes per channel that the field-by-field path reads.
        channel: `[H, D]` int32, the channel of each slot.
        slot: `[H, D]` int32, the slot of each channel.
        fields: grouped `[H, D / 16, 8]` int32: width, first word of the first and of the second plane of 4 bits, word
            of the plane of 2 bits, 2 * word + half of the plane of 1 bit. Otherwise `[P, H, D, 4]` int32: word, shift,
            mask, position in the code.
        centroids: `[H, D, S]` float32 by slot.
        pair_book: `[H, D / 2, 64]` int32, two float16 centroids (the first channel's in the low half) for each pair of
            codes of at most 3 bits, at `low_a + 4 * low_b + 16 * high_a + 32 * high_b` (low: the plane of 2 bits, high:
            of 1 bit). None where no group is so narrow, or a centroid is beyond float16.
        pair: keys that turn: `[H, D / 2]` int32, the pair of the angles in each pair of slots; else None.
        near: keys that turn: `[H, D / 2, 2, 128]` float32, cos and sin of the pair's first positions; else None.
        near_half: the same as float16 in one word `[H, D / 2, 128]` int32, cos in the low half.
    """

    grouped: bool
    width: int
    planes: int
    channel: Tensor
    slot: Tensor
    fields: Tensor
    centroids: Tensor
    pair_book: Tensor | None
    pair: Tensor | None
    near: Tensor | None
    near_half: Tensor | None


@dataclass
class TurnTables:
    """cos and sin of the digits of a position.

    Attributes:
        turn: `[2, 2, P, 4096]` float32: digit, cos or sin, pair, digit's value.
        scale: `[P]` float32.
        turns: False where every frequency is 0 and every scale 1.
    """

    turn: Tensor
    scale: Tensor
    turns: bool


@dataclass
class EncodeTables:
    """What the encode kernel reads of one quantizer. E = H * D elements, W words.

    Attributes:
        middle: `[E, S]` float32, midpoints between centroids, +inf where unused.
        centroids: `[E, S]` float32.
        weight: `[E]` float32.
        fields: `[W, 32, 4]` int32: element (-1: none), position in the code, mask, shift of each field of a word.
        order: with error feedback `[H, D]` int32, the elements in the order in which each head rounds them; else None.
        matrix: with error feedback `[H, D, D]` float32, see `Feedback`; else None.
    """

    middle: Tensor
    centroids: Tensor
    weight: Tensor
    fields: Tensor
    order: Tensor | None
    matrix: Tensor | None


T = TypeVar("T")
_CACHE: dict[tuple[Any, ...], Any] = {}


def _once(build: Callable[[], T], owners: tuple[Any, ...], *key: Any) -> T:
    """`build()`, remembered as long as all `owners` live."""
    full = (build.__qualname__, *(id(o) for o in owners), *key)
    kept = _CACHE.get(full)
    if kept is None:
        kept = _CACHE[full] = build()
        final: list[Any] = []

        def forget() -> None:
            _CACHE.pop(full, None)
            # Of the owners the first one to go ends it: the others would carry a finalizer each for ever.
            for each in final:
                each.detach()

        final += [weakref.finalize(owner, forget) for owner in owners]
    return kept


def slot_tables(quantizer: Quantizer, angles: Angles | None, device: torch.device) -> SlotTables:
    """Tables of keys (with the angles that turn them) or of values (None) on `device`."""
    if angles is not None and not turn_tables(angles, device).turns:
        angles = None

    def build() -> SlotTables:
        return _slot_tables(quantizer, angles, device)

    return _once(build, (quantizer,) if angles is None else (quantizer, angles), str(device))


def turn_tables(angles: Angles, device: torch.device) -> TurnTables:
    """cos and sin of `angles` on `device`."""

    def build() -> TurnTables:
        frequency = angles.frequency.double().cpu()
        digit = torch.arange(DIGIT, dtype=torch.float64)
        angle = torch.stack([digit * (frequency[:, None] * DIGIT**level) for level in range(DIGITS)])
        turn = torch.stack([angle.cos(), angle.sin()], dim=1)
        scale = angles.scale.float().cpu()
        turns = bool((frequency != 0).any() or (scale != 1).any())
        return TurnTables(turn.float().to(device), scale.to(device), turns)

    return _once(build, (angles,), str(device))


def encode_tables(quantizer: Quantizer, device: torch.device) -> EncodeTables:
    """Tables of the encode kernel on `device`."""

    def build() -> EncodeTables:
        centroids, middle = quantizer.codebook.tables(torch.device("cpu"))
        middle = torch.nn.functional.pad(middle, (0, 1), value=torch.inf)
        order = matrix = None
        if quantizer.feedback is not None:
            order, matrix = quantizer.feedback.tables(torch.device("cpu"))
            order = (order + order.shape[1] * torch.arange(len(order))[:, None]).int()
        weight, fields = quantizer.weight.float().flatten(), _word_fields(quantizer.layout)
        middle, centroids, weight, fields = (t.contiguous().to(device) for t in (middle, centroids, weight, fields))
        return EncodeTables(middle, centroids, weight, fields, _on(order, device), _on(matrix, device))

    return _once(build, (quantizer,), str(device))


def _slot_tables(quantizer: Quantizer, angles: Angles | None, device: torch.device) -> SlotTables:
    layout = quantizer.layout
    heads, head_dim = layout.widths.shape
    pairs = None if angles is None else torch.stack([angles.first, angles.second], dim=1).long().cpu()
    groups = layout.groups(pairs)
    if groups is not None:
        channel = torch.tensor([[d for group in head for d in group.channels] for head in groups])
        fields = torch.tensor([[_group_meta(g.width, g.planes) for g in head] for head in groups], dtype=torch.int32)
    else:
        natural = torch.arange(head_dim) if pairs is None else pairs.flatten()
        channel = natural.expand(heads, head_dim).contiguous()
        tables = (t.reshape(-1, heads, head_dim) for t in layout.tables(torch.device("cpu")))
        by_slot = (t.gather(2, channel.expand(t.shape)).int() for t in tables)
        fields = torch.stack(list(by_slot), dim=-1)
    centroids = quantizer.codebook.centroids.float()
    centroids = centroids.gather(1, channel[..., None].expand(centroids.shape))
    pair = near = half = None
    if pairs is not None and angles is not None:
        number = torch.empty(head_dim, dtype=torch.int32)
        number[pairs[:, 0]] = torch.arange(len(pairs), dtype=torch.int32)
        pair = number[channel[:, ::2]]
        angle = angles.frequency.double().cpu()[pair.long()][..., None] * torch.arange(NEAR, dtype=torch.float64)
        near = torch.stack([angle.cos(), angle.sin()], dim=2).float()
        bits = near.to(torch.float16).view(torch.int16).int()
        half = (bits[:, :, 0] & 0xFFFF) | (bits[:, :, 1] << 16)
    widths = layout.widths.unique().tolist()
    return SlotTables(
        grouped=groups is not None,
        width=widths[0] if groups is not None and len(widths) == 1 else -1,
        planes=layout.word.shape[0] if layout.words else 0,
        channel=channel.int().to(device),
        slot=channel.argsort(1).int().to(device),
        fields=fields.contiguous().to(device),
        centroids=centroids.contiguous().to(device),
        pair_book=_on(_pair_book(centroids, fields) if groups is not None else None, device),
        pair=_on(pair, device),
        near=_on(near, device),
        near_half=_on(half, device),
    )


def _on(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.contiguous().to(device)


def _pair_book(centroids: Tensor, fields: Tensor) -> Tensor | None:
    width = fields[..., 0].repeat_interleave(GROUP // 2, 1)[..., None]
    narrow = width <= 3
    if not bool(narrow.any()) or float(centroids.abs().max()) >= torch.finfo(torch.float16).max:
        return None
    index = torch.arange(64)
    # With one plane of 1 bit that plane holds the code; beside a plane of 2 bits, its highest bit.
    place = torch.where(width == 3, 4, 1)
    codes = [
        torch.where((width & 2) != 0, (index >> 2 * k) & 3, 0)
        + torch.where((width & 1) != 0, ((index >> (4 + k)) & 1) * place, 0)
        for k in range(2)
    ]
    both = []
    for k, code in enumerate(codes):
        code = torch.where(narrow, code, 0)
        chosen = centroids[:, k::2].gather(2, code.long())
        both.append(chosen.to(torch.float16).view(torch.int16).int())
    return (both[0] & 0xFFFF) | (both[1] << 16)


def _group_meta(width: int, planes: tuple[tuple[int, int], ...]) -> list[int]:
    meta = [width] + [0] * (META - 1)
    fours = 0
    for size, (word, half) in zip(PLANES[width], planes, strict=True):
        if size == 4:
            meta[1 + fours] = word
            fours += 1
        elif size == 2:
            meta[3] = word
        else:
            meta[4] = 2 * word + half
    return meta


def _word_fields(layout: Layout) -> Tensor:
    """Layout table turned round: which fields every word holds, `[W, 32, 4]`."""
    fields = torch.zeros(layout.words, 32, 4, dtype=torch.int32)
    fields[..., 0] = -1
    filled = [0] * layout.words
    word = layout.word.flatten(1).tolist()
    shift = layout.shift.flatten(1).tolist()
    for element, width in enumerate(layout.widths.flatten().tolist()):
        position = 0
        for plane, size in enumerate(PLANES[width]):
            w = word[plane][element]
            fields[w, filled[w]] = torch.tensor([element, position, (1 << size) - 1, shift[plane][element]])
            filled[w] += 1
            position += size
    return fields


def groups_of(head_dim: int) -> int:
    """Groups of 16 slots in a head."""
    return head_dim // GROUP
