"""What adaptive widths are chosen from: several artifacts of one model, and the rule that picks one for each token.

On disk a folder: `adaptive.json` (signal, window, thresholds of every layer, hashes of the tiers) and the tiers'
artifacts `tier-0`, `tier-1`, ... from the fewest bits to the most. `kvcalib tiers` writes it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvcalib.artifact.store import MANIFEST, inside
from kvcalib.errors import ArtifactMismatch, CorruptFile, InputError
from kvcalib.files import hash_file
from kvcalib.folders import recover
from kvcalib.quant.quantizer import Quantizer
from kvcalib.runtime.adaptive import KEEP_EXACT, AdaptiveLayer, KeepExact, LayerRule, Signal
from kvcalib.runtime.evicting_adaptive import EvictingAdaptiveLayer
from kvcalib.runtime.eviction import Eviction
from kvcalib.runtime.pools import MOST_TIERS
from kvcalib.untrusted import MAX_JSON_BYTES, first_fault, parse_json, read_file

RULE = "adaptive.json"
Limit = Annotated[float, Field(ge=0)]


class LayerThresholds(BaseModel):
    """One layer's `adaptive.LayerRule`; a threshold that no weight reaches is above 1."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    index: int = Field(ge=0, le=1 << 20)
    key: list[Limit]
    value: list[Limit]
    mean: float = Field(gt=0, description="Mean of the signal on the calibration text.")


class Rule(BaseModel):
    """`adaptive.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    format: Literal["kvcalib-adaptive"] = "kvcalib-adaptive"
    format_version: Literal[1] = 1
    signal: Signal
    window: int = Field(ge=1, le=1 << 20, description="Queries whose attention counts: those from the token itself on.")
    bits: float = Field(ge=0, description="Mean effective bits of packed tokens on the calibration text.")
    tiers: list[str] = Field(min_length=2, max_length=MOST_TIERS, description="sha256 of each tier's manifest.json.")
    layers: list[LayerThresholds]

    def encode(self) -> bytes:
        """The bytes of `adaptive.json`: the fields and their digest, one way of writing them only."""
        body = self.model_dump(mode="json")
        return _render({**body, "digest": hashlib.sha256(_render(body)).hexdigest()})


def _render(body: dict[str, Any]) -> bytes:
    return (json.dumps(body, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()


@dataclass(frozen=True)
class Adaptive:
    """Adaptive widths as `kvcalib.attach(..., adaptive=...)` takes them.

    Attributes:
        rule: thresholds; see `Rule`.
        tiers: quantizers by layer and role, of every tier.
        path: the folder.
        keep_exact: "cpu" keeps an exact copy of all tokens in host memory and chooses again as attention changes.
        every: tokens from one choice to the next, with `keep_exact`.
    """

    rule: Rule
    tiers: tuple[dict[int, dict[str, Quantizer]], ...]
    path: Path | None = None
    keep_exact: KeepExact = "no"
    every: int = 16

    def __post_init__(self) -> None:
        if self.keep_exact not in KEEP_EXACT:
            raise ValueError(f"keep_exact is {self.keep_exact!r}, expected one of {KEEP_EXACT}")
        if self.every < 1:
            raise ValueError(f"every is {self.every}, expected 1 token or more between two choices")

    def with_exact(self, keep_exact: KeepExact, every: int = 16) -> Adaptive:
        """The same widths with another place for the exact copy."""
        return replace(self, keep_exact=keep_exact, every=every)

    def check_fit(self, quantizers: dict[int, dict[str, Quantizer]]) -> None:
        """ArtifactMismatch unless the tiers quantize the layers of an artifact's `quantizers`, of the same shapes."""
        where = f"adaptive widths {str(self.path)!r}" if self.path else "the adaptive widths"
        for number, tier in enumerate(self.tiers):
            if sorted(tier) != sorted(quantizers):
                raise ArtifactMismatch(
                    f"{where}: tier {number} quantizes layers {sorted(tier)}, the artifact {sorted(quantizers)}; "
                    "make both from one run"
                )
            for layer, pair in tier.items():
                for role, quantizer in pair.items():
                    if not same_basis(quantizer, self.tiers[0][layer][role]):
                        raise ArtifactMismatch(
                            f"{where}: tier {number}, layer {layer}: {role}s are kept in another basis than in tier 0; "
                            "build all tiers from one run, with one --value-basis"
                        )
                    found, expected = (tuple(q.layout.widths.shape) for q in (quantizer, quantizers[layer][role]))
                    if found != expected:
                        raise ArtifactMismatch(
                            f"{where}: tier {number}, layer {layer}: {role}s have {found[0]} kv heads of {found[1]} "
                            f"channels, the artifact's {expected[0]} of {expected[1]}; make both from one run"
                        )

    def describe(self) -> str:
        """What a saved cache remembers: these widths in one line."""
        made = {"rule": hashlib.sha256(self.rule.encode()).hexdigest(), "keep_exact": self.keep_exact}
        return json.dumps(made | {"every": self.every}, sort_keys=True)

    def layer(
        self,
        index: int,
        sinks: int,
        recent: int,
        eviction: Eviction | None = None,
        alpha: float = 1.0,
        share: float = 1.0,
    ) -> AdaptiveLayer | EvictingAdaptiveLayer:
        """A cache layer; `recent` below the rule's window is taken for the window.

        Args:
            eviction, alpha, share: as `EvictingLayer`, if tokens shall leave.
        """
        limits = next(t for t in self.rule.layers if t.index == index)
        made = AdaptiveLayer(
            [tier[index] for tier in self.tiers],
            LayerRule(tuple(limits.key), tuple(limits.value), limits.mean),
            self.rule.window,
            max(recent, self.rule.window),
            self.rule.signal,
            sinks,
            self.keep_exact,
            self.every,
        )
        return made if eviction is None else EvictingAdaptiveLayer(made, eviction, alpha, share)


def same_basis(one: Quantizer, other: Quantizer) -> bool:
    """Whether what one of them decodes lies along the axes of the other."""
    if one.basis is None or other.basis is None:
        return one.basis is other.basis
    return torch.equal(one.basis.matrix, other.basis.matrix)


def load_adaptive(folder: str | Path, keep_exact: KeepExact = "no", every: int = 16) -> Adaptive:
    """The adaptive widths in a folder that `kvcalib tiers` wrote; every hash is checked.

    Raises:
        InputError: there are none. CorruptFile: something was altered or is damaged.
    """
    from kvcalib.runtime.loader import load

    folder = Path(folder)
    path = folder / RULE
    if not folder.exists():
        recover(folder)
    if not path.is_file():
        raise InputError(f"{folder}: no adaptive widths there (no {RULE}); give the folder that `kvcalib tiers` wrote")
    raw = read_file(inside(folder, RULE), MAX_JSON_BYTES)
    try:
        body = parse_json(raw)
        body.pop("digest", None)
        rule = Rule.model_validate(body)
    except ValidationError as error:
        raise CorruptFile(f"{path}: {first_fault(error)}; run `kvcalib tiers` again") from None
    except (ValueError, AttributeError, TypeError) as error:
        raise CorruptFile(f"{path}: not the JSON of adaptive widths ({error}); run `kvcalib tiers` again") from None
    if rule.encode() != raw:
        raise CorruptFile(f"{path}: its digest does not match its content; it was altered or damaged")
    tiers = []
    for number, expected in enumerate(rule.tiers):
        place = folder / f"tier-{number}"
        if place.is_symlink() or not place.is_dir():
            raise CorruptFile(f"{place}: missing or a link; copy the folder again")
        artifact = load(place)
        if hash_file(place / MANIFEST) != expected:
            raise CorruptFile(f"{place}: another artifact than {RULE} names; run `kvcalib tiers` again")
        tiers.append(artifact.quantizers)
    made = Adaptive(rule, tuple(tiers), folder, keep_exact, every)
    for number, tier in enumerate(tiers):
        if sorted(tier) != [limits.index for limits in rule.layers]:
            raise CorruptFile(f"{folder}: tier {number} and {RULE} are of other layers; run `kvcalib tiers` again")
    for limits in rule.layers:
        for role in ("key", "value"):
            found = getattr(limits, role)
            if len(found) + 1 != len(tiers) or sorted(found) != found:
                raise CorruptFile(
                    f"{path}: layers {limits.index}: {role} is {found}, expected {len(tiers) - 1} ascending thresholds"
                )
    made.check_fit(tiers[0])
    return made
