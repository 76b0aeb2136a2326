"""A packed layer that lets tokens go: `policies` say which, here is how they leave.

Every row and KV head holds the same number of slots, in the order in which tokens came; where heads keep tokens of
their own, a slot holds another token for each. Of every token a slot also keeps its position, the attention it drew and
what the policy noted when it was stored. To let tokens go, those that stay are moved together, once for a sixteenth of
the budget: O(1) a token. Rows of a batch decide each for itself; one with fewer tokens leaves its first slots unused.

When and how many: `counts.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvcalib.model.taps import Call
from kvcalib.quant.quantizer import Quantizer
from kvcalib.runtime import heads
from kvcalib.runtime.attention import attend_packed
from kvcalib.runtime.counts import Counts, Targets
from kvcalib.runtime.eviction import Eviction
from kvcalib.runtime.kernels.view import PackedView
from kvcalib.runtime.layers import ROLES, PackedLayer, with_exact
from kvcalib.runtime.policies import Held, Policy
from kvcalib.runtime.storage import Rows

BYTE = 255
"""What a trait of 1 is in a byte."""


def noted(rule: Policy, key: Tensor, value: Tensor) -> Tensor:
    """What `Policy.observe` notes, in the type that it is kept in."""
    found = rule.observe(key, value)
    return ((found * BYTE).round() if rule.trait_dtype == torch.uint8 else found).to(rule.trait_dtype)


class EvictingLayer(PackedLayer):
    """Packed keys and values of one layer, of at most so many tokens.

    Args:
        key, value: the layer's quantizers.
        eviction: how many tokens stay, and which.
        alpha: the layer's weight of attention, for policies that ask for it.
        share: the layer's share of the tokens, 1 on average over layers.
        sinks, recent: first and last tokens that stay exact; they are among those that stay.

    Raises:
        ValueError: heads shall keep their own tokens, and the rows cannot be split.
    """

    def __init__(
        self,
        key: Quantizer,
        value: Quantizer,
        eviction: Eviction,
        alpha: float = 1.0,
        share: float = 1.0,
        sinks: int = 0,
        recent: int = 0,
    ) -> None:
        self.eviction, self.alpha, self.share = eviction, alpha, share
        splits = heads.separable(key) and heads.separable(value)
        if eviction.per == "head" and not splits:
            raise ValueError(
                "per is 'head', but the artifact ranks outliers over all heads of a token, so heads cannot keep tokens "
                "of their own; fit with --value-scale head or without outliers, or take per='layer'"
            )
        self.whole_mask = True
        self.by_head = splits and eviction.per != "layer" and len(key.layout.widths) > 1
        # A layer that goes by attention alone need not remember how well its tokens quantize.
        unweighted = eviction.rule.weighted and (alpha if eviction.alpha is None else eviction.alpha) == 1
        self.traits = 0 if unweighted else eviction.rule.traits
        self.readers = {"key": key, "value": heads.reader(value) if self.by_head else value}
        super().__init__(key, value, sinks, recent)

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedLayer:
        memo.update({id(quantizer): quantizer for quantizer in self.readers.values()})
        return super().__deepcopy__(memo)

    def _clear(self) -> None:
        super()._clear()
        self.marks = Rows()
        self.counts = Counts(self.eviction, self.share)
        self.coming: tuple[Tensor, Tensor, Tensor | None] | None = None

    # What transformers asks of a layer.

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys of the mask: of the new tokens alone, unless a stock layer shares the mask."""
        return (self.seen + query_length, 0) if self.whole_mask else (query_length, self.seen)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take `[B, H, t, D]` for the `attend` that follows, which stores."""
        self._begin(key_states, value_states)
        self.coming = (key_states.detach(), value_states.detach(), self.valid)
        self.counts.start(len(key_states))
        self.seen += key_states.shape[2]
        return key_states, value_states

    def attend(self, call: Call, position_ids: Tensor, exact: bool = False) -> Tensor:
        """Store what came, let go what must, and attend to what is held; `[B, Q, Hq, Dv]`.

        Args:
            position_ids: `[B or 1, Q]`, of the tokens that came.
            exact: they see each other exactly.
        """
        assert self.coming is not None
        key, value, valid = self.coming
        self.coming = None
        if valid is not None and bool(valid.all()):
            valid = None
        out: list[Tensor] = []
        for first, last, leaving in self.counts.parts(key.shape[2], valid):
            mine = slice(first, last)
            self._leave(leaving)
            here = None if valid is None else valid[:, mine]
            self._admit(key[:, :, mine], value[:, :, mine], position_ids[:, mine], here)
            # The last columns of the model's mask are the new tokens; what is held is known here.
            hidden = None if call.mask is None else call.mask[:, :, mine, : call.mask.shape[-1] - key.shape[2] + last]
            part = replace(call, query=call.query[:, :, mine], key=key[:, :, mine], value=value[:, :, mine])
            part.mask = self._mask(hidden, last - first)
            out.append(self._read(part, exact and last - first > 1, len(out) > 0 or last < key.shape[2]))
        return out[0] if len(out) == 1 else torch.cat(out, 1)

    def evict(self) -> None:
        """Let go at once what the budget does not allow; otherwise that waits for the next pass."""
        self._leave(self.counts.now())

    # How they leave.

    def _leave(self, targets: Targets) -> None:
        """Keep `targets[b]` tokens of every row, all where None."""
        if all(target is None for target in targets):
            return
        stay = self._choose(targets)
        position = self.marks.read(0, self.slots)["position"].transpose(1, 2)
        # Nothing leaves where sinks and recent tokens are all there are.
        if bool(((position >= 0) & ~stay).any()):
            self._keep(stay)

    def _choose(self, targets: Targets) -> Tensor:
        """Which slots stay, bool `[B, Hp, S]`."""
        position = self.marks.read(0, self.slots)["position"].transpose(1, 2)
        used, slots = position >= 0, position.shape[2]
        device = position.device
        based = [self.counts.basis(row) for row in range(len(self.counts.held))]
        sinks = max(self.eviction.rule.sinks, self.sinks)
        recents = [
            max(self.window.length, min(self.eviction.recents(n), n if t is None else max(0, t - sinks)))
            for n, t in zip(based, targets, strict=True)
        ]
        # The sinks are the first used slots and the recent tokens the last ones, in every head.
        rank = used[:, :1].int().cumsum(-1)
        edge = torch.tensor([h - r for h, r in zip(self.counts.held, recents, strict=True)], device=device)[
            :, None, None
        ]
        kept = used & ((rank <= sinks) | (rank > edge))
        always = kept[:, 0].sum(-1)
        everything = torch.tensor([t is None for t in targets], device=device)
        wanted = torch.tensor([slots if t is None else t for t in targets], device=device)
        marks = self.marks.read(0, self.slots)
        held = Held(
            position=position,
            drawn=self._mark(marks, "drawn", position.shape),
            traits=self._traits(position.shape),
            alpha=self.alpha if self.eviction.alpha is None else self.eviction.alpha,
            heavy=torch.tensor([self.eviction.heavy(n, self.share) for n in based], device=device, dtype=torch.float64),
        )
        chosen = self.eviction.rule.choose(held, used & ~kept, (wanted - always).clamp(min=0))
        return torch.where(everything[:, None, None], used, kept | chosen)

    @staticmethod
    def _mark(marks: Any, name: str, shape: torch.Size) -> Tensor:
        return marks[name].transpose(1, 2) if name in marks else torch.zeros(shape, device=marks["position"].device)

    def _traits(self, shape: torch.Size) -> Tensor:
        """`[B, Hp, S, n]` float32; zeros for tokens in the exact window, which stay anyway."""
        made = torch.zeros(*shape, self.eviction.rule.traits, device=self.device)
        held = self._stored_traits()
        if held is not None:
            made[:, :, : held.shape[1]] = held.transpose(1, 2).float() / (BYTE if held.dtype == torch.uint8 else 1)
        return made

    def _stored_traits(self) -> Tensor | None:
        """Of the packed tokens, `[B, t, Hp, n]`; None if there are none."""
        return self.packed.read(0, self.packed.length)["trait"] if self.traits and self.packed.length else None

    def _keep(self, stay: Tensor) -> None:
        """Move the slots `stay [B, Hp, S]`, as many in every head of a row, together; they end at the last slot."""
        self.counts.held = stay[:, 0].sum(-1).tolist()
        window = self.window.length
        # Padding in the exact window stays where it is, too.
        last = torch.arange(stay.shape[2], device=stay.device) >= stay.shape[2] - window
        stay = stay | last
        counts = stay[:, 0].sum(-1)
        slots = max(*counts.tolist(), 1)
        order = torch.where(stay, torch.arange(stay.shape[2], device=stay.device), -1).sort(-1).values[..., -slots:]
        used, index = order >= 0, order.clamp(min=0)
        room = self.counts.room(slots)
        marks = {n: heads.moved(t, index) for n, t in self.marks.read(0, self.slots).items()}
        marks["position"].masked_fill_(~used.transpose(1, 2), -1)
        self.marks.replace(marks, room)
        # Tokens of the exact window always stay; what is left of the order are packed ones.
        self._keep_packed(index[..., : slots - window], used[..., : slots - window], room - window)
        if self.sink:
            rank = torch.arange(self.sinks, device=stay.device) + (slots - counts)[:, None]
            self.sink["slot"] = torch.where(self.sink["slot"] >= 0, rank, -1).int()

    def _keep_packed(self, index: Tensor, used: Tensor, room: int) -> None:
        """Keep the packed tokens `index [B, Hp, n]`, in that order, in room for `room`; some slots may be unused."""
        if self.packed.length:
            rows = self.packed.read(0, self.packed.length)
            self.packed.replace({n: self._moved(n, t, index) for n, t in rows.items()}, room)

    def _moved(self, name: str, tensor: Tensor, index: Tensor) -> Tensor:
        role, _, part = name.partition(".")
        if not self.by_head or part != "words":
            return heads.moved(tensor, index)
        return heads.moved_words(tensor, index, heads.bits(self.quantizers[role]).to(tensor.device))

    @property
    def slots(self) -> int:
        """Slots of every row, used or not."""
        return self.marks.length

    # How they come.

    def _admit(self, key: Tensor, value: Tensor, position_ids: Tensor, valid: Tensor | None) -> None:
        """Store `[B, H, t, D]` with their marks."""
        batch, kv_heads, count, _ = key.shape
        across = kv_heads if self.by_head else 1
        position = position_ids.to(torch.int32).expand(batch, -1)
        if valid is not None:
            position = position.masked_fill(~valid, -1)
        self.counts.admit(count, valid)
        marks = {"position": position[:, :, None].expand(-1, -1, across)}
        if self.eviction.rule.attention:
            marks["drawn"] = torch.zeros(batch, count, across, device=key.device)
        self.marks.append(marks)
        self.valid = valid
        self._take(key, value)

    def _row_spec(self, exact: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        spec = super()._row_spec(exact)
        rule, across = self.eviction.rule, len(self.quantizers["key"].layout.widths) if self.by_head else 1
        if self.by_head and self.quantizers["value"].relative:
            for name in ("value.zero", "value.scale"):
                spec[name] = ((across,), exact)
        if self.traits:
            spec["trait"] = ((across, self.traits), rule.trait_dtype)
        return spec

    def _residues(self, key: Tensor) -> dict[str, Tensor]:
        if not self.traits:
            return {}
        return {role: torch.empty(*key.shape[:3], 2, device=key.device) for role in ROLES}

    def _note(self, rows: Mapping[str, Tensor], residues: dict[str, Tensor]) -> None:
        if not self.by_head:
            # The token's over all heads: squares add up.
            residues = {role: r.sum(2, keepdim=True) for role, r in residues.items()}
        rows["trait"].copy_(noted(self.eviction.rule, residues["key"], residues["value"]))

    # How they are read.

    def view(self, count: int, positions: Tensor) -> PackedView:
        return replace(super().view(count, positions), key=self.readers["key"], value=self.readers["value"])

    def _mask(self, mask: Tensor | None, queries: int) -> Tensor | None:
        """Which slots each of the last `queries` tokens sees, bool `[B, 1, Q, S]`; None for all up to itself.

        `mask`: the model's, whose last columns are these tokens.
        """
        if mask is None and all(n == self.slots for n in self.counts.held):
            return None
        used = self.marks.read(0, self.slots)["position"][:, :, 0] >= 0
        past = self.slots - queries
        if mask is None:
            new = torch.ones(queries, queries, dtype=torch.bool, device=used.device).tril()[None, None]
        else:
            new = mask[..., -queries:]
            new = new if new.dtype == torch.bool else new > torch.finfo(new.dtype).min / 2
        seen = used[:, None, None, :past].expand(-1, -1, queries, -1)
        return torch.cat([seen, new.expand(len(used), -1, -1, -1) & used[:, None, None, past:]], -1)

    def _read(self, call: Call, exact: bool, apart: bool) -> Tensor:
        """Attention of the last tokens over all slots; what they paid is added to what the slots drew."""
        queries = call.query.shape[2]
        view = self.view(self.slots, self._positions())
        rule = self.eviction.rule
        drawn = None
        if rule.attention:
            kv_heads = len(self.quantizers["key"].layout.widths)
            drawn = torch.empty(self.batch, kv_heads, self.slots, device=self.device)
        if exact:
            view = with_exact(view, call.key, call.value)
        out = attend_packed(call, view, drawn, rule.decay, own=apart or self.eviction.streaming)
        if drawn is not None:
            self._draw(drawn, queries)
        return out

    def _draw(self, drawn: Tensor, queries: int) -> None:
        """Note what the last queries paid to every slot, `drawn [B, H, S]`."""
        held, decay = self.marks.read(0, self.slots)["drawn"].transpose(1, 2), self.eviction.rule.decay
        if decay != 1:
            held.mul_(decay**queries)
        held.add_(drawn if self.by_head else drawn.sum(1, keepdim=True))

    def _positions(self) -> Tensor:
        position = self.marks.read(0, self.slots)["position"]
        if self.eviction.streaming:
            if all(n == self.slots for n in self.counts.held):
                return torch.arange(self.slots, dtype=torch.int32, device=position.device)[None]
            return ((position[:, :, 0] >= 0).int().cumsum(1) - 1).int()
        return position.transpose(1, 2) if self.by_head else position[:, :, 0]

    # What a cache does with its layers.

    @property
    def batch(self) -> int:
        return len(self.counts.held)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, those of them that are still here. What left before them stays gone."""
        before = self.seen
        self._crop_to(tokens_to_remove, self.seen)
        removed = before - self.seen
        if not removed or not self.slots:
            return
        marks = self.marks.read(0, self.slots)["position"].transpose(1, 2)
        newest = marks.amax((1, 2), keepdim=True)
        gone = marks > newest - removed
        self.counts.forget(removed)
        most = int(gone.sum(-1).max())
        alike = bool(gone[..., self.slots - most :].all())
        # Tokens of the exact window are the same in all heads.
        exact = most if alike else min(removed, self.window.length)
        self.counts.held = [n - exact for n in self.counts.held]
        staying = ((marks >= 0) & (marks <= newest - removed))[..., : self.slots - exact]
        self._cut(exact)
        if not alike:
            # Heads have lost different numbers of the others: all keep as many as the one that has the fewest left, the
            # sinks and the newest of them.
            least = staying.sum(-1).amin(1)[:, None, None]
            sinks = least.clamp(max=max(self.eviction.rule.sinks, self.sinks))
            newer = staying.flip(-1).cumsum(-1).flip(-1)
            self._keep(staying & ((staying.cumsum(-1) <= sinks) | (newer <= least - sinks)))

    def _cut(self, count: int) -> None:
        """Take the last `count` slots off."""
        slots = self.slots - count
        self.window.crop(max(0, slots - self.packed.length))
        self.packed.crop(slots)
        self.marks.crop(slots)
        if self.sink:
            self.sink["slot"][self.sink["slot"] >= slots] = -1
            self.sink_count = (self.sink["slot"] >= 0).sum(1, dtype=torch.int32)
            self.sinks_full = bool((self.sink_count >= self.sinks).all())

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.marks.select(indices)
        self.counts.select(indices.tolist())

    def _move(self, device: torch.device | str) -> None:
        super()._move(device)
        self.marks.to(device)

    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() | {f"mark.{n}": t for n, t in self.marks.tensors().items()}

    @property
    def _may_lack(self) -> bool:
        return True

    def live(self) -> dict[str, Tensor]:
        held = super().live()
        held.update({f"mark.{n}": t for n, t in self.marks.read(0, self.slots).items()})
        if self.batch:
            held["count"] = torch.tensor([self.counts.seen, self.counts.held, self.counts.prompt]).T.contiguous()
        return held

    def revive(self, tensors: dict[str, Tensor], seen: int, dtype: torch.dtype) -> None:
        marks = {n.removeprefix("mark."): t for n, t in tensors.items() if n.startswith("mark.")}
        count = tensors.get("count")
        rest = {n: t for n, t in tensors.items() if n != "count" and not n.startswith("mark.")}
        slots, batch = self._revive_tokens(rest, seen, dtype)
        if not tensors:
            return
        across = len(self.quantizers["key"].layout.widths) if self.by_head else 1
        kinds = {"position": torch.int32} | ({"drawn": torch.float32} if self.eviction.rule.attention else {})
        found = {n: (t.dtype, tuple(t.shape)) for n, t in marks.items()}
        expected = {n: (kind, (batch, slots, across)) for n, kind in kinds.items()}
        if found != expected:
            raise ValueError(f"marks are {found}, expected {expected}")
        if count is None or count.dtype != torch.int64 or count.shape != (batch, 3):
            raise ValueError(f"count is {None if count is None else list(count.shape)}, expected int64 {[batch, 3]}")
        used = (marks["position"] >= 0).sum(1)
        if not bool((used == count[:, 1:2].to(used.device)).all()) or bool((count < 0).any()):
            raise ValueError(f"count says that {count[:, 1].tolist()} slots are used, marks say {used[:, 0].tolist()}")
        if "drawn" in marks and not bool((torch.isfinite(marks["drawn"]) & (marks["drawn"] >= 0)).all()):
            raise ValueError("mark.drawn holds numbers that are not finite or below 0")
        self.marks.append(marks)
        self.counts.seen, self.counts.held, self.counts.prompt = (x.tolist() for x in count.T)

    def _revive_tokens(self, tensors: dict[str, Tensor], seen: int, dtype: torch.dtype) -> tuple[int, int]:
        """`revive` without the marks; slots and rows found."""
        super().revive(tensors, seen, dtype)
        return self.packed.length + self.window.length, max(self.packed.batch, self.window.batch)

    def survivors(self) -> Tensor:
        """Positions of the tokens held, int32 `[B, H, S]`, -1 where a slot is unused; a copy."""
        position = self.marks.read(0, self.slots)["position"].transpose(1, 2)
        return position.expand(-1, len(self.quantizers["key"].layout.widths), -1).clone()
