"""A cache layer whose tokens get as many bits as the attention they draw says (after QAQ, arXiv 2403.04643).

A token enters at full precision. When it leaves the recent window, the attention that it drew from the queries in the
window chooses the width of its key and of its value, and it is packed (`pools.py`). With the exact copy kept in host
memory the choice is made again as attention changes, up or down (the paper's section 4.2).

The tokens of a pass see each other exactly, because their width is chosen from that very attention; those that leave
the window are packed as soon as all queries that count have seen them, and read as stored from then on.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from kvcalib.errors import ArtifactMismatch
from kvcalib.model.taps import Call
from kvcalib.quant.quantizer import Quantizer
from kvcalib.runtime.attention import chunked_attention
from kvcalib.runtime.drawn import Drawn, Heads
from kvcalib.runtime.heads import moved
from kvcalib.runtime.layers import READ_CHUNK, ROLES, TapLayer, along
from kvcalib.runtime.pools import MOST_TIERS, Observe, Pools, tags_of
from kvcalib.runtime.storage import Rows, Spec, check_rows

Signal = Literal["late", "peak"]
SIGNALS: tuple[Signal, ...] = ("late", "peak")
KeepExact = Literal["no", "cpu"]
KEEP_EXACT: tuple[KeepExact, ...] = ("no", "cpu")
HEADS: dict[Signal, Heads] = {"late": "mean", "peak": "max"}


@dataclass(frozen=True)
class LayerRule:
    """When a token of one layer gets which tier.

    Attributes:
        key, value: thresholds of the signal, ascending, one less than tiers; a token gets the tier whose number is how
            many of them its signal reaches.
        mean: the signal's mean on the calibration text; a choice made again compares with it.
    """

    key: tuple[float, ...]
    value: tuple[float, ...]
    mean: float


def first_that_counts(window: int, signal: Signal) -> int:
    """How many of the `window` queries from a token's own on pass before one counts.

    "peak", the paper's signal, is the largest weight from any head and query. "late" is the mean over heads and over
    the later half of the window; what a token draws right after it came says little about what it will draw.
    """
    return 0 if signal == "peak" else window // 2


def signal_of(drawn: Tensor, signal: Signal) -> Tensor:
    """The number that thresholds are set on, from the weights `drawn [..., m]` of the queries that count."""
    return drawn.amax(-1) if signal == "peak" else drawn.mean(-1)


def tier_of(signal: Tensor, thresholds: Sequence[float]) -> Tensor:
    """How many thresholds each signal reaches, int64."""
    limits = torch.tensor(thresholds, dtype=torch.float32, device=signal.device)
    return (signal.float()[..., None] >= limits).sum(-1)


class AdaptiveLayer(TapLayer):
    """Packed keys and values of one layer, a width for each token.

    Args:
        tiers: quantizers by role, from the fewest bits to the most.
        rule: see `LayerRule`.
        window: queries whose attention counts, the token's own included.
        recent: last tokens that stay exact, at least `window`.
        signal: see `signal_of`.
        sinks: real tokens at the start of every row that stay exact.
        keep_exact: "cpu" keeps all tokens exact in host memory as well and chooses again.
        every: tokens from one choice to the next, with `keep_exact`.

    Attributes:
        observe: see `Pools.append`; None where nothing is kept of a token beside its tag.
        seen: tokens held, which is all that came in unless a layer around this one lets some go
            (`evicting_adaptive.py`).

    Memory: the pools, the window with the attention drawn so far (float32, of each query that counts). The exact copy
    is not among `tensors()`, but in `host_tensors()`.
    """

    def __init__(
        self,
        tiers: Sequence[dict[str, Quantizer]],
        rule: LayerRule,
        window: int,
        recent: int | None = None,
        signal: Signal = "late",
        sinks: int = 0,
        keep_exact: KeepExact = "no",
        every: int = 16,
    ) -> None:
        super().__init__()
        recent = window if recent is None else recent
        if recent < window or window < 1:
            raise ValueError(
                f"recent is {recent}, expected at least the {window} queries in which adaptive widths see a token's "
                "attention"
            )
        for role, limits in (("key", rule.key), ("value", rule.value)):
            if len(limits) + 1 != len(tiers) or sorted(limits) != list(limits) or not len(tiers) <= MOST_TIERS:
                raise ValueError(
                    f"{role} has thresholds {list(limits)} for {len(tiers)} tiers, expected an ascending list of one "
                    f"less, and at most {MOST_TIERS} tiers"
                )
        self.tiers, self.rule, self.signal, self.sinks = list(tiers), rule, signal, sinks
        self.skipped = first_that_counts(window, signal)
        self.observed, self.recent, self.keep_exact, self.every = window, recent, keep_exact, every
        self.observe: Observe | None = None
        self._clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> AdaptiveLayer:
        memo.update({id(quantizer): quantizer for tier in self.tiers for quantizer in tier.values()})
        made = object.__new__(type(self))
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    def _clear(self) -> None:
        self.pools = Pools(self.tiers)
        self.window = Rows(min_room=max(8, self.recent // 8))
        self.host = Rows(min_room=16)
        self.is_initialized = False
        self.valid = None
        self.seen = 0
        self.since = 0
        self.requantized = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take `[B, H, t, D]` into the exact window and return them as they came; `settle` packs."""
        for role, x in (("key", key_states), ("value", value_states)):
            expected = self.tiers[0][role].layout.widths.shape
            if x.shape[1::2] != expected:
                raise ArtifactMismatch(
                    f"{role}s have {x.shape[1]} kv heads of {x.shape[3]} channels, the artifact has "
                    f"{expected[0]} of {expected[1]}; build one for this model"
                )
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        value = along(self.tiers[0]["value"], value_states.detach())
        new = {"key": key_states.detach().transpose(1, 2), "value": value.transpose(1, 2)}
        shape = new["key"].shape[:2]
        if self.keep_exact == "cpu":
            nothing = {"drawn": torch.zeros(shape), "trust": torch.zeros(shape)}
            nothing["counted"] = torch.zeros(shape, dtype=torch.bool)
            self.host.append({name: t.to("cpu") for name, t in new.items()} | nothing)
        new["drawn"] = torch.zeros(*shape, self.observed - self.skipped, device=self.device)
        if self.sinks:
            new["valid"] = torch.ones(shape, dtype=torch.bool, device=self.device)
            if self.valid is not None:
                new["valid"] &= self.valid.to(self.device)
        watched = self.seen - self.observed + 1
        self.window.append(new)
        self.seen += shape[1]
        # A token that leaves and was seen by all queries that count is packed before it is read once more.
        self._pack(min(self.window.length - self.recent, watched - self.pools.length))
        return key_states, value_states

    def chunks(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """`(start, keys, values)` of all tokens: packed, then exact ones."""
        yield from self.pools.chunks()
        for start in range(0, self.window.length, READ_CHUNK):
            part = self.window.read(start, min(start + READ_CHUNK, self.window.length))
            key, value = (part[role].float().transpose(1, 2) for role in ROLES)
            yield self.pools.length + start, key, value

    def attend(self, call: Call, query: Tensor, positions: Tensor) -> Tensor:
        """Attention of `query [B, Hq, Q, D]`, rotated, over all tokens; then packs what left the window."""
        out, drawn = self.read(call, query, positions)
        self.learn(drawn)
        return out

    def read(
        self, call: Call, query: Tensor, positions: Tensor, log_sums: list[Tensor] | None = None
    ) -> tuple[Tensor, Drawn]:
        """Attention of `query [B, Hq, Q, D]`, rotated, over all tokens, and what `learn` shall take in after it.

        Args:
            log_sums: as `chunked_attention`.
        """
        again = self.keep_exact == "cpu"
        drawn = Drawn(self.observed, self.observed if again else 0, HEADS[self.signal])
        out = chunked_attention(
            query,
            self.chunks(),
            lambda keys, start: call.rotate_at(keys.to(query.dtype), positions, start).float(),
            call.mask,
            self.seen,
            call.scaling,
            call.kwargs.get("softcap"),
            call.kwargs.get("s_aux"),
            drawn,
            log_sums,
        )
        basis = self.tiers[0]["value"].basis
        return out if basis is None else basis.output_back(out), drawn

    def learn(self, drawn: Drawn) -> None:
        """Take in what the last queries paid: pack what left the window, choose again."""
        self.settle(drawn.band)
        if self.keep_exact == "cpu":
            self.follow(drawn.all, drawn.band.shape[1])

    def settle(self, band: Tensor) -> None:
        """Note what the last queries paid, `band [B, Q, observed]` as `Drawn.band`; pack the tokens that leave."""
        queries, held = band.shape[1], self.window.length
        noted = self.window.read(0, held)["drawn"]
        for back in range(self.skipped, self.observed):
            # Query i, counted from the window's first token, pays to token i - back.
            first = max(held - queries - back, 0)
            count = held - back - first
            if count > 0:
                noted[:, first : first + count, back - self.skipped] = band[:, queries - count :, back]
        self._pack(held - self.recent)

    def _pack(self, count: int) -> None:
        """Choose widths for the window's first `count` tokens, if any, and pack them."""
        if count <= 0:
            return
        part = self.window.read(0, count)
        signal = signal_of(part["drawn"], self.signal)
        tag = tags_of(tier_of(signal, self.rule.key), tier_of(signal, self.rule.value))
        if self.sinks:
            tag = torch.where(self._is_sink(part["valid"]), self._exact_tag, tag)
        if self.keep_exact == "cpu":
            here = self.host.read(self.pools.length, self.pools.length + count)
            here["trust"].copy_(signal / self.rule.mean)
        self.pools.append({role: part[role] for role in ROLES}, tag, self.observe)
        self.window.drop(count)

    @property
    def _exact_tag(self) -> Tensor:
        exact = torch.tensor(self.pools.exact, device=self.device)
        return tags_of(exact, exact)

    def _is_sink(self, valid: Tensor) -> Tensor:
        """Which of the next tokens `valid [B, t]` are among the first `sinks` real ones of their row."""
        rank = valid.int().cumsum(1)
        if self.pools.length:
            rank = rank + (self.pools.tag() == self._exact_tag).sum(1, keepdim=True)
        return valid & (rank <= self.sinks)

    def follow(self, weights: Tensor, queries: int) -> None:
        """Remember what the last queries paid to every token, `[B, q, T]`; choose again when `every` tokens have come.

        A token's weights since the last choice, their mean ("late") or the largest ("peak"), are compared with the mean
        of all tokens that were packed then; half of what it drew before counts too. Tokens packed since keep their
        tiers until the next choice.
        """
        held = self.host.read(0, self.pools.length)
        known, come = held["drawn"], weights[..., : self.pools.length].to("cpu")
        come = come * held["counted"][:, None]
        if self.signal == "peak":
            torch.maximum(known, come.amax(1), out=known)
        else:
            known += come.sum(1)
        self.since += queries
        if self.since < self.every:
            return
        self.since = 0
        if not self.pools.length:
            return
        mean = known.sum(1, keepdim=True) / (known > 0).sum(1, keepdim=True).clamp(min=1)
        trust, counted = held["trust"], held["counted"]
        trust.copy_(torch.where(counted, (trust + known / mean.clamp(min=1e-30)) * 0.5, trust))
        before = self.pools.tag()
        signal = (trust * self.rule.mean).to(before.device)
        again = tags_of(tier_of(signal, self.rule.key), tier_of(signal, self.rule.value))
        stays = ~counted.to(before.device)
        if self.sinks:
            stays |= before == self._exact_tag
        self.requantized += self.pools.retag(torch.where(stays, before, again), held, self.observe)
        known.zero_()
        counted.fill_(True)

    def keep(self, index: Tensor, used: Tensor) -> None:
        """Hold of every row the packed tokens `index [B, n]`, in that order, and the window; the rest is gone.

        Args:
            used: `[B, n]`, False where a row has nothing to put.
        """
        if self.keep_exact == "cpu":
            held = self.host.read(0, self.host.length)
            there = torch.arange(self.pools.length, self.host.length).expand(len(index), -1)
            order = torch.cat([index.to("cpu"), there], 1)[:, None]
            self.host.replace(
                {n: moved(t if t.ndim > 2 else t[..., None], order).reshape(*order.shape[::2], *t.shape[2:])
                 for n, t in held.items()}, order.shape[2]
            )  # fmt: skip
        if self.pools.length:
            self.pools.take(index, used)
        self.seen = self.pools.length + self.window.length

    @property
    def batch(self) -> int:
        return max(self.pools.batch, self.window.batch)

    @property
    def elements(self) -> int:
        """Key and value elements of all tokens held."""
        per_token = sum(q.layout.widths.numel() for q in self.tiers[0].values())
        return self.batch * (self.pools.length + self.window.length) * per_token

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens. What left the exact window stays as it was packed; the window fills up again."""
        keep = self._crop_to(tokens_to_remove, self.pools.length + self.window.length)
        self.window.crop(max(0, keep - self.pools.length))
        self.pools.crop(keep)
        self.host.crop(keep)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.pools.select(indices)
        self.window.select(indices)
        self.host.select(indices.to("cpu"))

    def reset(self) -> None:
        self._clear()

    def offload(self) -> None:
        self._move("cpu")

    def prefetch(self) -> None:
        if self.is_initialized:
            self._move(self.device)

    def _move(self, device: torch.device | str) -> None:
        self.pools.to(device)
        self.window.to(device)

    def tensors(self) -> dict[str, Tensor]:
        held = self.pools.tensors()
        held.update({f"recent.{n}": t for n, t in self.window.tensors().items()})
        return held

    def live(self) -> dict[str, Tensor]:
        held = {f"pools.{n}": t for n, t in self.pools.live().items()}
        held.update({f"recent.{n}": t for n, t in self.window.read(0, self.window.length).items()})
        if self.host.length:
            held.update({f"host.{n}": t for n, t in self.host.read(0, self.host.length).items()})
            held["since"] = torch.full((self.batch,), self.since)
        return held

    def revive(self, tensors: dict[str, Tensor], seen: int, dtype: torch.dtype, trait: Spec | None = None) -> None:
        """Become the layer whose `live()` is `tensors`.

        Args:
            trait: as `Pools.revive`.

        Raises:
            ValueError: a tensor is missing, unknown, or not as this layer keeps it.
        """
        self._clear()
        if not tensors and not seen:
            return
        since = tensors.get("since")
        parts: dict[str, dict[str, Tensor]] = {"pools": {}, "recent": {}, "host": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            if part != "since":
                parts.setdefault(part, {})[rest] = tensor
        if len(parts) > 3:
            raise ValueError(f"it holds {sorted(parts)}, expected pools, recent and host")
        device = next(t.device for part in ("pools", "recent", "host") for t in parts[part].values())
        exact: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            role: (tuple(q.layout.widths.shape), dtype) for role, q in self.tiers[0].items()
        }
        noted = {"drawn": ((self.observed - self.skipped,), torch.float32)}
        marks = {"valid": ((), torch.bool)} if self.sinks else {}
        recent = check_rows("recent", parts["recent"], exact | noted | marks)
        self.pools.revive(parts["pools"], dtype, trait or {})
        held = self.pools.length + recent
        if held != seen or recent > self.recent:
            raise ValueError(f"{held} tokens are stored of {seen} seen, {recent} of them exact")
        if self.keep_exact == "cpu":
            numbers = {"drawn": ((), torch.float32), "trust": ((), torch.float32), "counted": ((), torch.bool)}
            copies = check_rows("host", parts["host"], exact | numbers, seen)
            if copies != seen or since is None or since.dtype != torch.int64 or since.ndim != 1:
                raise ValueError(f"the exact copy of {seen} tokens, or when their widths were chosen, is missing")
            self.since = int(since[0])
            if not 0 <= self.since < self.every:
                raise ValueError(f"since is {self.since}, expected less than {self.every}")
            self.host.append({name: t.to("cpu") for name, t in parts["host"].items()})
        elif parts["host"]:
            raise ValueError("it holds an exact copy, which this layer does not keep")
        if recent:
            self.window.append(parts["recent"])
        batches = {rows.batch for rows in (self.pools, self.window, self.host) if rows.batch}
        if len(batches) > 1:
            raise ValueError("packed, recent and exact tokens are of different batch sizes")
        self.seen, self.dtype, self.device, self.is_initialized = seen, dtype, device, True

    def host_tensors(self) -> dict[str, Tensor]:
        """The exact copy in host memory, and of every token the attention since the last choice and before it."""
        return {f"host.{n}": t for n, t in self.host.tensors().items()}
