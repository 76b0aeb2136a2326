"""How many tokens a cache keeps: the settings of eviction, checked, and the budgets that follow from them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from kvcalib.runtime.policies import Policy, find

Per = Literal["auto", "head", "layer"]
PERS: tuple[Per, ...] = ("auto", "head", "layer")
FEW = 4
"""Tokens beside the sinks that a share of a short prompt is rounded up to."""
ROOM = 1.25
"""How many times the recent tokens a layer's budget is at least, where layers differ."""


@dataclass(frozen=True)
class Eviction:
    """At most `keep` of the tokens stay.

    Attributes:
        keep: below 1 a share of the tokens seen so far, and 1 all of them; from 2 on a number of tokens. With a share
            the prompt is read whole and eviction starts with decoding; with a number tokens go in blocks as they come,
            so that memory is constant.
        recent: last tokens that always stay, as `keep` a share or a number; None: a quarter of `keep`.
        policy: which of the others stay; a name of `policies.POLICIES`, or a policy.
        streaming: positions are counted within the cache, so that there is no end; a share is then one of the longest
            context that the model knows.
        per: "head": each KV head keeps its own tokens; "layer": all keep the same; "auto": per head where the
            artifact's rows allow it.
        alpha: weight of attention in every layer, in place of the artifact's.
        limit: tokens that no layer may exceed; `within` sets it.
    """

    keep: float
    recent: float | None = None
    policy: str | Policy = "qhitter"
    streaming: bool = False
    per: Per = "auto"
    alpha: float | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        rule = find(self.policy)
        object.__setattr__(self, "policy", rule)
        keep, recent = self.keep, self.recent
        if not (0 < keep <= 1 or (keep >= 2 and keep == int(keep))):
            raise ValueError(f"keep is {keep!r}, expected a share in 0..1 or a whole number of tokens from 2 on")
        if recent is None:
            object.__setattr__(self, "recent", keep / 4 if keep <= 1 else max(1, int(keep) // 4))
        elif recent < 0 or (recent >= 1 and recent != int(recent)):
            raise ValueError(f"recent is {recent!r}, expected a share in 0..1 or a whole number of tokens")
        elif self.counted != (recent >= 1) and recent != 0:
            kinds = ("tokens", "a share") if self.counted else ("a share", "tokens")
            raise ValueError(f"keep is {kinds[0]} ({keep:g}) and recent is {kinds[1]} ({recent:g}); give both alike")
        elif not self.counted and keep + recent > 1 and keep < 1:
            raise ValueError(
                f"keep is {keep:g} and recent {recent:g}, together {keep + recent:g}, expected at most 1; recent "
                "tokens are among those kept, so a smaller recent will do"
            )
        if self.last > keep:
            raise ValueError(f"recent is {self.last:g}, expected at most keep, which is {keep:g}")
        if self.per not in PERS:
            raise ValueError(f"per is {self.per!r}, expected one of {PERS}")
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha!r}, expected 0..1")
        if self.counted:
            self._check_least(int(keep), f"keep is {keep:g} tokens", "")

    @property
    def rule(self) -> Policy:
        """The policy."""
        return find(self.policy)

    @property
    def last(self) -> float:
        """`recent`, never None."""
        assert self.recent is not None
        return self.recent

    @property
    def counted(self) -> bool:
        """Whether `keep` is a number of tokens, so that memory is constant."""
        return self.keep > 1

    @property
    def least(self) -> int:
        """The fewest tokens that a budget may have."""
        return self.rule.sinks + (int(self.last) + 2 if self.counted else FEW)

    def _check_least(self, tokens: int, what: str, remedy: str) -> None:
        if tokens < self.least:
            recent = f", the {self.last:g} recent ones" if self.counted else ""
            raise ValueError(
                f"{what}, expected at least {self.least}: {self.rule.sinks} sinks{recent} and some to choose{remedy}"
            )

    def within(self, context: int | None) -> Eviction:
        """These settings for a model whose longest context is `context` tokens, None if it does not say.

        Raises:
            ValueError: not even then a share is a workable number of tokens, streaming needs a number, or it is more
                than the model's positions.
        """
        if self.counted:
            if self.streaming and context is not None and self.keep > context:
                raise ValueError(
                    f"keep is {self.keep:g} tokens with streaming, expected at most {context}, the longest context "
                    "that the model's config names: positions are counted within the cache"
                )
            return replace(self, limit=context if self.streaming else None)
        if context is None:
            if self.streaming:
                raise ValueError(
                    f"keep is {self.keep:g} with streaming, but the model's config names no longest context "
                    "(max_position_embeddings); give keep as a number of tokens"
                )
            return self
        tokens = math.floor(self.keep * context + 1e-9)
        remedy = f"; the smallest workable keep is {math.ceil(1000 * self.least / context) / 1000:g}"
        self._check_least(tokens, f"keep is {self.keep:g}, of {context} tokens that is {tokens}", remedy)
        if not self.streaming:
            return self
        recent = max(1, math.floor(self.last * context))
        return replace(self, keep=tokens, recent=recent, limit=context)

    def block(self, share: float) -> int:
        """With a number of tokens: how many go at a time."""
        return max(1, int(self.keep * share * self.rule.every))

    def budget(self, seen: int, share: float) -> int:
        """Tokens that a layer may hold of a row of `seen` tokens; `share` is the layer's, 1 on average."""
        if self.counted:
            return max(self.least, math.floor(self.keep * share + 1e-9))
        return max(self.least, math.floor(min(1.0, self.keep * share) * seen + 1e-9))

    def recents(self, seen: int) -> int:
        """Last tokens of a row of `seen` tokens that stay."""
        return max(1, int(self.last) if self.counted else math.floor(self.last * seen + 1e-9))

    def heavy(self, seen: int, share: float) -> float:
        """Tokens of the budget beside the recent ones, before rounding."""
        tokens = 1 if self.counted else seen
        return max(0.0, (self.keep * share - self.last) * tokens)

    def shared(self, shares: dict[int, float]) -> dict[int, float]:
        """Shares of the tokens by layer, of the same sum as `shares` and in proportion, within what a layer can use.

        None is more than all tokens seen, or the limit; none so small that the recent tokens would not fit.
        """
        most = (self.limit or math.inf) / self.keep if self.counted else 1 / self.keep
        least = min(1.0, ROOM * self.last / self.keep)
        total, low, high = sum(shares.values()), 0.0, 1.0 / min(shares.values()) * max(1.0, least)

        def at(rise: float) -> dict[int, float]:
            return {layer: min(most, max(least, share * rise)) for layer, share in shares.items()}

        while sum(at(high).values()) < total - 1e-12 and high < 1e6:
            high *= 2
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if sum(at(middle).values()) < total else (low, middle)
        return at(high)

    def describe(self) -> str:
        """What a saved cache remembers: these settings in one line."""
        rule = self.rule
        body: dict[str, Any] = {"keep": self.keep, "recent": self.last, "policy": rule.name, "per": self.per}
        body |= {"streaming": self.streaming, "alpha": self.alpha, "settings": vars(rule)}
        return json.dumps(body, sort_keys=True)
