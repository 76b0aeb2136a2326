"""Packed tokens of different widths: one dense pool of rows per width class, and one byte per token that says which.

Class c < C is the tier c of C quantizers, class C keeps the token exact. Keys and values have pools of their own. A
pool has no batch dimension: tokens lie in it in the order (token, batch row), so rows of a batch may differ in how many
tokens of a class they hold and nothing is padded. Which slot a token has is not stored: it is the number of earlier
tokens of its class, which a reader that goes from the first token on counts as it goes.

Tag `[B, T]` uint8: the key's class in the low four bits, the value's in the high four.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from kvcalib.quant.quantizer import Quantizer
from kvcalib.runtime import heads
from kvcalib.runtime.layers import ENCODE_CHUNK, READ_CHUNK, ROLES, check_indices, residue
from kvcalib.runtime.storage import Rows, Spec, check_rows

SHIFT = {"key": 0, "value": 4}
MOST_TIERS = 15
# There are many pools, and what is spare in them counts: a sixteenth at most.
MIN_ROOM, SHARE = 16, 16
Observe = Callable[[Tensor, Tensor], Tensor]


def tags_of(key: Tensor, value: Tensor) -> Tensor:
    """Classes of keys and values, integers of one shape, as tags."""
    return (key.to(torch.uint8) << SHIFT["key"]) | (value.to(torch.uint8) << SHIFT["value"])


class Pools:
    """Tokens of one layer that are appended in order, cut from the end, and selected by batch row.

    Args:
        tiers: quantizers by role, of each class.
    """

    def __init__(self, tiers: Sequence[dict[str, Quantizer]]) -> None:
        self.tiers = tiers
        self.exact = len(tiers)
        self.tags = Rows(MIN_ROOM, SHARE)
        self.pools = {(role, c): Rows(MIN_ROOM, SHARE) for role in ROLES for c in range(self.exact + 1)}
        self.dtype = torch.float32

    @property
    def length(self) -> int:
        """Tokens of each batch row."""
        return self.tags.length

    @property
    def batch(self) -> int:
        """Rows of the batch, 0 while there are no tokens."""
        return self.tags.batch

    def tag(self) -> Tensor:
        """`[B, T]` uint8, a view."""
        return self.tags.read(0, self.length)["tag"]

    def append(self, new: dict[str, Tensor], tag: Tensor, observe: Observe | None = None) -> None:
        """Quantize keys and values `[B, t, H, D]` as `tag [B, t]` says.

        Args:
            observe: what to keep of each token beside its tag (`traits`), from `|x - x^|^2` and `|x|^2` of its key and
                of its value, `[B, t, 1, 2]`, summed over heads; given always or never.
        """
        self.dtype = new["key"].dtype
        flat = {role: new[role].transpose(0, 1).flatten(0, 1) for role in ROLES}
        residues = []
        for role, classes in self._classes(tag).items():
            made = torch.zeros(len(classes), 1, 2, device=tag.device)
            for c in range(self.exact + 1):
                index = (classes == c).nonzero()[:, 0]
                if len(index):
                    rows = self._encode(role, c, flat[role], index)
                    self.pools[role, c].append(_one(rows))
                    if observe is not None:
                        made[index] = self._residue(role, c, rows, flat[role][index])
            residues.append(made.view(tag.shape[1], tag.shape[0], 1, 2).transpose(0, 1))
        self.tags.append({"tag": tag} if observe is None else {"tag": tag, "trait": observe(*residues)})

    def _residue(self, role: str, c: int, rows: dict[str, Tensor], x: Tensor) -> Tensor:
        """`|x - x^|^2` and `|x|^2` over all heads of tokens `x [N, H, D]` kept as `rows`: `[N, 1, 2]`."""
        x = x.to(next(iter(rows.values())).device)
        if c < self.exact:
            return residue(self.tiers[c][role], rows, x).sum(1, keepdim=True)
        size = x.float().square().sum((1, 2))
        return torch.stack([torch.zeros_like(size), size], -1)[:, None]

    def traits(self) -> Tensor | None:
        """What `observe` gave of every token, `[B, T, 1, n]`, a view; None if it was never asked."""
        return self.tags.read(0, self.length).get("trait")

    def _classes(self, tag: Tensor) -> dict[str, Tensor]:
        """Classes of keys and of values of `tag [B, t]` in the pools' order, `[t * B]`."""
        flat = tag.transpose(0, 1).reshape(-1)
        return {role: (flat >> SHIFT[role]) & MOST_TIERS for role in ROLES}

    def _encode(self, role: str, c: int, x: Tensor, index: Tensor) -> dict[str, Tensor]:
        """Rows of class `c` of the tokens `index` of `x [N, H, D]`."""
        device = x.device if self.tags.batch == 0 else self.tag().device
        if c == self.exact:
            return {"exact": x[index].to(device)}
        two_bytes = torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float16
        quantizer = self.tiers[c][role]
        parts = [quantizer.encode(x[i].to(device), two_bytes) for i in index.split(ENCODE_CHUNK)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def chunks(self, size: int = READ_CHUNK) -> Iterator[tuple[int, Tensor, Tensor]]:
        """`(start, keys, values)` of all tokens, `[B, H, t, D]` float32 with t <= size, as they were appended."""
        taken = dict.fromkeys(self.pools, 0)
        for start in range(0, self.length, size):
            tag = self.tags.read(start, min(start + size, self.length))["tag"]
            part = {}
            for role, classes in self._classes(tag).items():
                shape = self.tiers[0][role].layout.widths.shape
                x = torch.empty(len(classes), *shape, device=tag.device)
                for c in range(self.exact + 1):
                    index = (classes == c).nonzero()[:, 0]
                    first, count = taken[role, c], len(index)
                    if count:
                        rows = {n: t[0] for n, t in self.pools[role, c].read(first, first + count).items()}
                        x[index] = rows["exact"].float() if c == self.exact else self.tiers[c][role].decode(rows)
                        taken[role, c] += count
                part[role] = x.view(tag.shape[1], tag.shape[0], *shape).permute(1, 2, 0, 3)
            yield start, part["key"], part["value"]

    def crop(self, length: int) -> None:
        """Forget the tokens from `length` on."""
        if length >= self.length:
            return
        for role, classes in self._classes(self.tags.read(0, length)["tag"]).items():
            for c in range(self.exact + 1):
                self.pools[role, c].crop(int((classes == c).sum()))
        self.tags.crop(length)

    def select(self, indices: Tensor) -> None:
        """Keep the batch rows `indices`, in that order, repeated as often as they occur."""
        if not self.batch:
            return
        tag = self.tag()
        indices = indices.to(tag.device)
        if len(indices) == len(tag) and bool((indices == torch.arange(len(tag), device=tag.device)).all()):
            return
        for role, classes in self._classes(tag).items():
            for c in range(self.exact + 1):
                mine = classes == c
                chosen = mine.view(self.length, len(tag))[:, indices]
                self._gather(role, c, _slots(mine).view(self.length, len(tag))[:, indices][chosen])
        self.tags.select(indices)

    def take(self, index: Tensor, used: Tensor) -> None:
        """Keep of every batch row the tokens `index [B, n]`, in that order; where not `used`, zeros of class 0."""
        tag, batch = self.tag(), self.batch
        order, rows = index.T, torch.arange(batch, device=tag.device)
        blank = bool((~used).any())
        made = torch.where(used, tag.gather(1, index), 0)
        after = self._classes(made)
        for role, classes in self._classes(tag).items():
            for c in range(self.exact + 1):
                mine = (after[role] == c).view(-1, batch)
                place = _slots(classes == c).view(-1, batch)[order, rows]
                if c == 0 and blank:
                    shape = self.tiers[0][role].layout.widths.shape
                    zeros = torch.zeros(1, *shape, dtype=self.dtype, device=tag.device)
                    held = self.pools[role, c]
                    held.append(_one(self._encode(role, c, zeros, torch.zeros(1, dtype=torch.long))))
                    place = torch.where(used.T, place, held.length - 1)
                self._gather(role, c, place[mine])
        kept, traits = {"tag": made}, self.traits()
        if traits is not None:
            kept["trait"] = heads.moved(traits, index[:, None])
        self.tags.replace(kept, index.shape[1])

    def retag(self, tag: Tensor, exact: Mapping[str, Tensor], observe: Observe | None = None) -> int:
        """Give every token the class that `tag [B, T]` says.

        Args:
            exact: keys and values `[B, T, H, D]`, on any device.
            observe: as `append`.

        Returns:
            How many keys and values were requantized.
        """
        before, after = self._classes(self.tag()), self._classes(tag)
        count = 0
        for role in ROLES:
            changed = before[role] != after[role]
            moved = int(changed.sum())
            if not moved:
                continue
            count += moved
            flat = exact[role].transpose(0, 1)
            for c in range(self.exact + 1):
                held = self.pools[role, c]
                mine = after[role] == c
                coming = (mine & changed).nonzero()[:, 0]
                leaving = bool(((before[role] == c) & changed).any())
                if not len(coming) and not leaving:
                    continue
                place = _slots(before[role] == c)
                place[coming] = held.length + torch.arange(len(coming), device=place.device)
                if len(coming):
                    there = coming.to(flat.device)
                    x = flat[there // flat.shape[1], there % flat.shape[1]]
                    rows = self._encode(role, c, x, torch.arange(len(coming), device=x.device))
                    held.append(_one({name: t.to(place.device) for name, t in rows.items()}))
                self._gather(role, c, place[mine])
        if observe is not None and count:
            self._observe_again(tag, exact, observe)
        self.tag().copy_(tag)
        return count

    def _observe_again(self, tag: Tensor, exact: Mapping[str, Tensor], observe: Observe) -> None:
        """Traits of the tokens whose class changes to `tag [B, T]`."""
        row, token = (self.tag() != tag).nonzero(as_tuple=True)
        residues = []
        for role in ROLES:
            x = exact[role][row.to(exact[role].device), token.to(exact[role].device)]
            classes = (tag[row, token] >> SHIFT[role]) & MOST_TIERS
            made = torch.zeros(len(row), 1, 2, device=tag.device)
            for c in range(self.exact + 1):
                index = (classes == c).nonzero()[:, 0]
                if len(index):
                    there = index.to(x.device)
                    made[index] = self._residue(role, c, self._encode(role, c, x, there), x[there])
            residues.append(made)
        traits = self.traits()
        assert traits is not None
        traits[row, token] = observe(*residues)

    def _gather(self, role: str, c: int, order: Tensor) -> None:
        """Keep the slots `order` of a pool, in that order; where that changes anything, no spare room is left."""
        held = self.pools[role, c]
        if len(order) == held.length and bool((order == torch.arange(held.length, device=order.device)).all()):
            return
        made = Rows(MIN_ROOM, SHARE)
        if len(order):
            made.append({name: t[:, order] for name, t in held.read(0, held.length).items()})
        self.pools[role, c] = made

    def to(self, device: torch.device | str) -> None:
        """Move every tensor."""
        for rows in (self.tags, *self.pools.values()):
            rows.to(device)

    def live(self) -> dict[str, Tensor]:
        """Every tensor that `revive` needs, without spare room."""
        made = dict(self.tags.read(0, self.length).items())
        for (role, c), rows in self.pools.items():
            if rows.length:
                made.update({f"{role}.{c}.{name}": t for name, t in rows.read(0, rows.length).items()})
        return made

    def revive(self, tensors: Mapping[str, Tensor], dtype: torch.dtype, trait: Spec) -> None:
        """Become the pools whose `live()` is `tensors`, of keys and values in `dtype`.

        Args:
            trait: shape and type of a token's traits, as {"trait": ...}; empty if none are kept.

        Raises:
            ValueError: a tensor is missing, unknown, or not what tags and quantizers ask for.
        """
        self.dtype = dtype
        tags = {name: t for name, t in tensors.items() if "." not in name}
        length = check_rows("pools", tags, {"tag": ((), torch.uint8), **trait})
        classes = self._classes(tags["tag"]) if length else {}
        two_bytes = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
        named: set[str] = set(tags)
        for (role, c), rows in self.pools.items():
            if role in classes and bool((classes[role] > self.exact).any()):
                raise ValueError(f"pools.tag names a {role} class above {self.exact}")
            part = f"{role}.{c}."
            mine = {name.removeprefix(part): t for name, t in tensors.items() if name.startswith(part)}
            quantizer = self.tiers[min(c, self.exact - 1)][role]
            spec: Spec = quantizer.row_spec(two_bytes)
            if c == self.exact:
                spec = {"exact": (tuple(quantizer.layout.widths.shape), dtype)}
            count = int((classes[role] == c).sum()) if role in classes else 0
            if check_rows(f"pools.{part[:-1]}", mine, spec, count) != count or any(len(t) != 1 for t in mine.values()):
                raise ValueError(f"pools.{part[:-1]} lacks the {count} tokens that the tags give it")
            check_indices(f"pools.{part[:-1]}", quantizer, mine.get("outlier_index"))
            named |= {part + name for name in mine}
            if mine:
                rows.append(mine)
        if named != set(tensors):
            raise ValueError(f"pools hold {sorted(set(tensors) - named)}, which is not theirs")
        if tags:
            self.tags.append(tags)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor held, spare room included."""
        held = dict(self.tags.tensors())
        for (role, c), rows in self.pools.items():
            held.update({f"{role}.{c}.{name}": t for name, t in rows.tensors().items()})
        return held


def _one(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t[None] for name, t in rows.items()}


def _slots(mine: Tensor) -> Tensor:
    """Slot of each token of a class, `mine` telling which are of it."""
    return mine.cumsum(0) - 1
