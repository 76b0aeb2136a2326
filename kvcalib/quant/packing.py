"""Codes of 0 to 8 bits packed densely into rows of 32-bit words.

One row holds the codes of one token: `codes [..., H, D]` becomes `words [..., W]` int32. A static table says, for every
head and channel, in which word and at which shift its bits lie. A code is cut into planes of 4, 2 and 1 bits
(3 = 2 + 1, 7 = 4 + 2 + 1, 8 = 4 + 4, low bits in the first plane). Inside a segment the fields follow one another from
large to small, so no field ever straddles two words and at most 31 bits of a segment stay unused. A segment is a head
(heads can be read, sharded and evicted alone) or, where that would waste more than 2 %, the whole row.

Where 16 channels in a row have one width they form a group: its plane of 4 bits is two whole words, of 2 bits one
word, of 1 bit half a word. The kernels read such a plane with one or two loads instead of sixteen.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

PLANES: dict[int, tuple[int, ...]] = {
    0: (), 1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (4, 4),
}  # fmt: skip
MAX_PLANES = 3
MAX_BITS = 8
Segment = Literal["head", "row"]
HEAD_SEGMENT_WASTE = 0.02
GROUP = 16


@dataclass(frozen=True)
class Group:
    """16 channels of one head whose fields lie side by side in every plane.

    Attributes:
        width: bits of each channel.
        channels: the 16 channels of the head, in the order of their fields.
        planes: for each plane `(word, half)`: its first word, and 1 where a plane of 1 bit takes the word's upper half.
    """

    width: int
    channels: tuple[int, ...]
    planes: tuple[tuple[int, int], ...]


@dataclass
class Layout:
    """Where each channel's bits lie in a row.

    Attributes:
        widths: `[H, D]` uint8, bits per channel, 0..8.
        word: `[P, H, D]` int16, word index of each plane, -1 where the channel has no such plane.
        shift: `[P, H, D]` uint8, position of the field's lowest bit in its word.
        words: W, the words of one row.
        segment: "head" when each head's words stand alone, else "row".
    """

    widths: Tensor
    word: Tensor
    shift: Tensor
    words: int
    segment: Segment
    _tables: dict[torch.device, tuple[Tensor, ...]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def build(cls, widths: Tensor, segment: Segment | None = None, order: Tensor | None = None) -> Layout:
        """Lay out `widths [H, D]`; `segment=None` takes "head" unless that wastes more than 2 % of a row.

        Args:
            widths: bits per channel, 0..8.
            segment: what stands alone: each head, or the whole row.
            order: `[H, D]`, the sequence in which the channels of each head are laid (0..D-1 if None). Wider channels
                still come first; `order` decides among channels of one width. RoPE pairs side by side in `order` lie
                side by side in every plane.

        Raises:
            ValueError: a width outside 0..8, or an `order` whose rows are not permutations of 0..D-1.
        """
        table = check_widths(widths)
        if segment is None:
            by_head = cls.build(table, "head", order)
            return by_head if by_head.waste <= HEAD_SEGMENT_WASTE else cls.build(table, "row", order)
        width = table.numpy()
        heads, head_dim = width.shape
        sequence = _check_order(order, heads, head_dim)
        word = np.full((MAX_PLANES, heads, head_dim), -1, dtype=np.int16)
        shift = np.zeros((MAX_PLANES, heads, head_dim), dtype=np.uint8)
        bit = 0
        for rows in [[h] for h in range(heads)] if segment == "head" else [list(range(heads))]:
            bit = -(-bit // 32) * 32
            # Wide channels first: channels of one width then stand together, as the kernels want them.
            fields = sorted(((h, d) for h in rows for d in sequence[h]), key=lambda c: -int(width[c]))
            for size in (4, 2, 1):
                for plane in range(MAX_PLANES):
                    for h, d in fields:
                        planes = PLANES[int(width[h, d])]
                        if plane < len(planes) and planes[plane] == size:
                            word[plane, h, d], shift[plane, h, d] = divmod(bit, 32)
                            bit += size
        used = max(1, *(len(PLANES[int(w)]) for w in np.unique(width)))
        return cls(table, torch.from_numpy(word[:used]), torch.from_numpy(shift[:used]), -(-bit // 32), segment)

    @property
    def bits(self) -> int:
        """Bits of one row that carry codes."""
        return int(self.widths.sum())

    @property
    def waste(self) -> float:
        """Share of a row's bits that carry nothing."""
        return 1 - self.bits / (32 * self.words) if self.words else 0.0

    def check(self) -> None:
        """Raise ValueError unless every field lies inside the row, on its own bits, as the widths ask.

        Compiled code reads and writes by these tables. So every word of the row must hold a field, too: else a row
        could be of any length.
        """
        width = check_widths(self.widths).numpy()
        sizes = np.zeros((max(1, *(len(PLANES[int(w)]) for w in np.unique(width))), *width.shape), dtype=np.int32)
        for bits in np.unique(width):
            for plane, size in enumerate(PLANES[int(bits)]):
                sizes[plane][width == bits] = size
        if self.word.shape != sizes.shape or self.shift.shape != sizes.shape:
            raise ValueError(
                f"word has shape {list(self.word.shape)} and shift {list(self.shift.shape)}, expected "
                f"{list(sizes.shape)}: planes of the widths, heads, channels"
            )
        word, shift = self.word.numpy().astype(np.int32), self.shift.numpy().astype(np.int32)
        self._refuse(
            np.where(sizes > 0, (word < 0) | (word >= self.words), word != -1), "word", word,
            f"0..{self.words - 1} where the width has such a plane, else -1",
        )  # fmt: skip
        self._refuse(
            np.where(sizes > 0, shift + sizes > 32, shift != 0), "shift", shift,
            "a field within 32 bits, 0 where there is none",
        )  # fmt: skip
        total = int(sizes.sum())
        if total > 32 * self.words:
            raise ValueError(f"words is {self.words}, expected at least {-(-total // 32)} for {total} bits")
        first, flat = np.where(sizes > 0, word * 32 + shift, 0).ravel(), sizes.ravel()
        taken = np.repeat(first, flat) + np.arange(total) - np.repeat(flat.cumsum() - flat, flat)
        again = np.bincount(taken, minlength=1)[taken] > 1
        if again.any():
            h, d = divmod(int(np.repeat(np.arange(flat.size), flat)[again][0]) % width.size, width.shape[1])
            raise ValueError(f"word and shift of head {h} channel {d} overlap with another field")
        used = np.unique(word[sizes > 0])
        if len(used) < self.words:
            raise ValueError(f"words is {self.words}, expected {len(used)}: some hold no field")
        if self.segment == "head":
            owner = np.broadcast_to(np.arange(len(width))[:, None], word.shape)
            owned = np.unique(word[sizes > 0].astype(np.int64) * len(width) + owner[sizes > 0])
            if len(owned) > len(used):
                raise ValueError("segment is 'head', but heads share words; expected 'row'")

    @staticmethod
    def _refuse(wrong: np.ndarray, name: str, table: np.ndarray, expected: str) -> None:
        """ValueError naming the first place where `wrong [P, H, D]` is True."""
        if wrong.any():
            plane, h, d = (int(i) for i in np.argwhere(wrong)[0])
            raise ValueError(f"{name}[{plane}][{h}][{d}] is {table[plane, h, d]}, expected {expected}")

    def groups(self, pairs: Tensor | None = None) -> list[list[Group]] | None:
        """The groups of every head in the order of their fields, or None where the tables hold no such groups.

        Args:
            pairs: `[D / 2, 2]`, the channels that RoPE turns together. A group then consists of 8 of these pairs, the
                two channels of a pair next to each other. None: any 16 channels do.
        """
        mate = None if pairs is None else {int(a): int(b) for a, b in pairs.tolist()}
        found = [self._head_groups(h, mate) for h in range(self.widths.shape[0])]
        whole = [groups for groups in found if groups is not None]
        return whole if len(whole) == len(found) else None

    def _head_groups(self, head: int, mate: dict[int, int] | None) -> list[Group] | None:
        width = self.widths[head].tolist()
        start = (self.word[:, head].long() * 32 + self.shift[:, head].long()).tolist()
        groups = []
        for bits in sorted(set(width), reverse=True):
            channels = [d for d, w in enumerate(width) if w == bits]
            if bits:
                channels.sort(key=lambda d: start[0][d])
            elif mate is not None:
                channels = [d for a, b in mate.items() if width[a] == width[b] == 0 for d in (a, b)]
            if len(channels) % GROUP or len(channels) != width.count(bits):
                return None
            for first in range(0, len(channels), GROUP):
                mine = channels[first : first + GROUP]
                if mate is not None and any(mate.get(a) != b for a, b in zip(mine[::2], mine[1::2], strict=True)):
                    return None
                for plane, size in enumerate(PLANES[bits]):
                    low = start[plane][mine[0]]
                    # A plane of 1 bit is aligned to half a word, the others to a word.
                    if low % min(32, GROUP * size) or any(
                        start[plane][d] != low + i * size for i, d in enumerate(mine)
                    ):
                        return None
                planes = tuple(divmod(start[p][mine[0]], 32) for p in range(len(PLANES[bits])))
                groups.append(Group(bits, tuple(mine), tuple((word, shift // 16) for word, shift in planes)))
        return groups

    def tables(self, device: torch.device) -> tuple[Tensor, ...]:
        """`(word, shift, mask, position)`, each `[P, H*D]`, on `device`; unused planes have mask 0."""
        if device not in self._tables:
            planes = self.word.shape[0]
            sizes = torch.zeros(planes, *self.widths.shape, dtype=torch.int32)
            for plane in range(planes):
                for width, split in PLANES.items():
                    if plane < len(split):
                        sizes[plane][self.widths == width] = split[plane]
            position = (sizes.cumsum(0) - sizes).int()
            flat = (self.word.clamp(min=0).long(), self.shift.int(), (1 << sizes) - 1, position)
            self._tables[device] = tuple(t.flatten(1).to(device) for t in flat)
        return self._tables[device]

    def pack(self, codes: Tensor) -> Tensor:
        """`codes [..., H, D]` (any integer type) to `words [..., W]` int32.

        Raises:
            ValueError: the last two dimensions are not those of `widths`.
        """
        if codes.shape[-2:] != self.widths.shape:
            raise ValueError(f"codes end in {tuple(codes.shape[-2:])}, expected {tuple(self.widths.shape)}")
        lead = codes.shape[:-2]
        # One channel per row: index_add_ then adds whole rows, and fields never share bits, so + is |.
        columns = codes.reshape(-1, self.widths.numel()).T.to(torch.int32)
        words = torch.zeros(self.words, columns.shape[1], dtype=torch.int32, device=codes.device)
        word, shift, mask, position = self.tables(codes.device)
        for plane in range(word.shape[0]):
            fields = (columns >> position[plane, :, None]) & mask[plane, :, None]
            if self.words:
                words.index_add_(0, word[plane], fields << shift[plane, :, None])
        return words.T.contiguous().reshape(*lead, self.words)

    def unpack(self, words: Tensor) -> Tensor:
        """`words [..., W]` int32 to `codes [..., H, D]` int32."""
        lead = words.shape[:-1]
        rows = words.reshape(lead.numel(), self.words)
        word, shift, mask, position = self.tables(words.device)
        codes = torch.zeros(rows.shape[0], self.widths.numel(), dtype=torch.int32, device=words.device)
        for plane in range(word.shape[0] if self.words else 0):
            fields = (rows.index_select(1, word[plane]) >> shift[plane]) & mask[plane]
            codes |= fields << position[plane]
        return codes.reshape(*lead, *self.widths.shape)


def check_widths(widths: Tensor) -> Tensor:
    """`widths [H, D]` as uint8 on the CPU, or ValueError naming the first width outside 0..8."""
    table = torch.as_tensor(widths).cpu()
    if table.ndim != 2:
        raise ValueError(f"widths has shape {tuple(table.shape)}, expected [heads, head_dim]")
    wrong = ((table < 0) | (table > MAX_BITS)).nonzero()
    if len(wrong):
        h, d = wrong[0].tolist()
        raise ValueError(f"widths[{h}][{d}] is {table[h, d].item()}, expected 0..{MAX_BITS}")
    return table.to(torch.uint8).contiguous()


def _check_order(order: Tensor | None, heads: int, head_dim: int) -> list[list[int]]:
    if order is None:
        return [list(range(head_dim))] * heads
    rows = torch.as_tensor(order).cpu()
    if rows.shape != (heads, head_dim):
        raise ValueError(f"order has shape {tuple(rows.shape)}, expected {(heads, head_dim)} as widths")
    wrong = (rows.long().sort(-1).values != torch.arange(head_dim)).any(-1).nonzero()
    if len(wrong):
        head = int(wrong[0])
        raise ValueError(f"order[{head}] is {rows[head].tolist()}, expected each of 0..{head_dim - 1} once")
    return [[int(d) for d in row] for row in rows]


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack `codes [..., N]` of `bits` (1..8) bits each into `[..., ceil(N * bits / 32)]` int32 words.

    Raises:
        ValueError: `bits` outside 1..8, or a code that does not fit into `bits` bits.
    """
    _check_bits(bits)
    codes = torch.as_tensor(codes)
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 1 << bits):
        raise ValueError(f"codes span {int(codes.min())}..{int(codes.max())}, expected 0..{(1 << bits) - 1}")
    return _uniform(codes.shape[-1], bits).pack(codes.unsqueeze(-2))


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """The `count` codes per row that `pack` put into `words [..., W]`; `[..., count]` int32.

    Raises:
        ValueError: `bits` outside 1..8, or a row that is not `ceil(count * bits / 32)` words long.
    """
    _check_bits(bits)
    layout = _uniform(count, bits)
    if words.shape[-1] != layout.words:
        raise ValueError(f"rows have {words.shape[-1]} words, expected {layout.words} for {count} codes of {bits} bits")
    return layout.unpack(words).squeeze(-2)


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"bits is {bits}, expected 1..{MAX_BITS}")


def _uniform(count: int, bits: int) -> Layout:
    return Layout.build(torch.full((1, count), bits, dtype=torch.uint8), "row")
