"""`codebooks.safetensors`: what stage `fit-nuq` was told, and what it found, read from disk as it is asked for.

The file holds per layer and for keys and values: `ladder [H, D, 511]` (codebooks of all widths 0..8), `weight [H, D]`
(mean Fisher per token), `loss [9, H, D]` (predicted loss in nats per token of each width, by nearest rounding) and, for
error feedback, `curvature [H, D, D]` (mean of g g', g the gradient). Of values in a basis of their own there is `basis
[H, D, D]`, and all else is along it. Bits are chosen from the file afterwards, by `build` or by allocation.

An *option* is a share of outliers and a scope (what shares their ranks, and a value's zero and scale). The run has a
base option; with `choices` further ones are fitted for allocation to choose among, each with a ladder and a loss table
of its own: `layers.I.ROLE.K.ladder` and `.loss`, K their place in `Codebooks.options`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from kvcalib.artifact.manifest import MOST_SINKS, FitSettings
from kvcalib.errors import InputError
from kvcalib.quant.basis import Basis
from kvcalib.quant.codebook import Format
from kvcalib.quant.fitting import Granularity, Solver, Weights, make_quantizer
from kvcalib.quant.outliers import outlier_count
from kvcalib.quant.packing import MAX_BITS
from kvcalib.quant.quantizer import BYTE_INDEXED, Quantizer, Scope
from kvcalib.rundir import CODEBOOKS, RunDir, fingerprint
from kvcalib.streamed import TensorFile

STAGE_VERSION = 5
Role = Literal["key", "value"]
ValueBasis = Literal["pca", "none"]
ROLES: tuple[Role, ...] = ("key", "value")


class Option(BaseModel):
    """What of a row besides its widths is a choice."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    outliers: float = Field(ge=0, le=0.05, description="Exact share of a group's elements.")
    scope: Scope = Field(description="Group of outlier ranks and, where values have them, of zero and scale.")

    def __str__(self) -> str:
        return f"{100 * self.outliers:g} % outliers per {self.scope}"


Options = dict[tuple[int, Role], Option]
"""By layer and role."""


class Choices(BaseModel):
    """Options that are fitted beside the base option: every share in every scope."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    outliers: tuple[Annotated[float, Field(ge=0, le=0.05)], ...] = (0.0, 0.005, 0.01, 0.02)
    scopes: tuple[Scope, ...] = ("token", "head")


class FitNuqSettings(BaseModel):
    """Settings of the stage."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key_bits: int = Field(default=3, ge=1, le=MAX_BITS)
    value_bits: int = Field(default=3, ge=1, le=MAX_BITS)
    granularity: Granularity = "channel"
    value_granularity: Granularity = "channel"
    value_basis: ValueBasis = Field(
        default="pca", description="Axes of values: each head's principal ones, or the model's, with zero and scale."
    )
    value_scale: Scope = Field(
        default="token", description="What shares outlier ranks of values, and zero and scale: a token, or its head."
    )
    key_outlier_scope: Scope = "token"
    outliers: float = Field(default=0.01, ge=0, le=0.05)
    choices: Choices | None = Field(
        default=Choices(outliers=(0.0,), scopes=("token",)),
        description="Further options for a budget to choose among; None for no others.",
    )
    sinks: int = Field(
        default=0, ge=0, le=MOST_SINKS, description="First tokens of a sequence, left out of thresholds and fit."
    )
    format: Format = "nuq"
    weights: Weights = "fisher_scale"
    qnorm: bool = True
    solver: Solver = "exact"
    feedback: bool = Field(default=True, description="Each channel's rounding makes up for the errors of others.")

    @property
    def bits(self) -> dict[Role, int]:
        """Bits by role."""
        return {"key": self.key_bits, "value": self.value_bits}

    def relative(self, role: Role) -> bool:
        """Whether codebooks are relative to a zero and scale of each token."""
        return role == "value" and self.value_basis == "none"

    def scope(self, role: Role) -> Scope:
        """Group of outlier ranks, and of zero and scale."""
        return self.key_outlier_scope if role == "key" else self.value_scale

    def option(self, role: Role) -> Option:
        """The base option."""
        return Option(outliers=self.outliers, scope=self.scope(role))

    def options(self, role: Role, heads: int, head_dim: int) -> list[Option]:
        """The base option, then those of `choices` that differ from it and from one another in what is stored.

        Shares that round up to one number of outliers are one option. The scope makes no difference where there are
        neither outliers nor scales. Ranks per head are left out where a group has no scale and an index into all of a
        token's elements takes one byte anyway: ranks per token then keep the better elements at the same size.
        """
        found: dict[tuple[Scope, int], Option] = {}
        more = () if self.choices is None else itertools.product(self.choices.scopes, self.choices.outliers)
        for option in (self.option(role), *(Option(outliers=share, scope=scope) for scope, share in more)):
            count = outlier_count(option.outliers, head_dim if option.scope == "head" else heads * head_dim)
            scope = option.scope if count or self.relative(role) else "token"
            if found and not self.relative(role) and scope == "head" and heads * head_dim <= BYTE_INDEXED:
                continue
            found.setdefault((scope, count), option)
        return list(found.values())

    def manifest(self) -> FitSettings:
        """The part of the settings that an artifact records."""
        return FitSettings(
            format=self.format,
            weights=self.weights,
            key_granularity=self.granularity,
            value_granularity=self.value_granularity,
            outliers=self.outliers,
            sinks=self.sinks,
            qnorm=self.qnorm,
            solver=self.solver,
        )


class Codebooks:
    """The codebooks of a run, its tensors by name.

    Every layer's keys and values stand under one option, the base option unless `under` says otherwise; ladders, losses
    and quantizers are that option's.
    """

    def __init__(self, tensors: Mapping[str, Tensor], settings: FitNuqSettings, chosen: Options | None = None) -> None:
        self.tensors, self.settings = tensors, settings
        self._chosen = {} if chosen is None else dict(chosen)

    def under(self, options: Options) -> Codebooks:
        """The same codebooks with these layers and roles under these options.

        Raises:
            InputError: there are no codebooks of an option; says which there are.
        """
        for (layer, role), option in options.items():
            there = self.options(layer, role)
            if option not in there:
                raise InputError(
                    f"codebooks: layer {layer} has no {role}s with {option}, expected one of "
                    f"{', '.join(str(o) for o in there)}; run `kvcalib fit-nuq --choices` and `kvcalib allocate` again"
                )
        return Codebooks(self.tensors, self.settings, self._chosen | options)

    @classmethod
    def load(cls, run_dir: RunDir) -> Codebooks:
        """The codebooks of a run; InputError if there are none, or not of the present calibration and version."""
        recorded = run_dir.settings("fit-nuq")
        if recorded.get("stage_version") != STAGE_VERSION:
            raise InputError(
                f"{run_dir.path}: fit-nuq is of stage version {recorded.get('stage_version')}, expected "
                f"{STAGE_VERSION}; run `kvcalib fit-nuq` on this folder again"
            )
        if recorded["calibration"] != fingerprint(run_dir.settings("fisher")):
            raise InputError(
                f"{run_dir.path}: its codebooks were fitted on another calibration than the one there now; "
                "run `kvcalib fit-nuq` on this folder again"
            )
        tensors = TensorFile(run_dir.file(CODEBOOKS))
        return cls(tensors, FitNuqSettings.model_validate(tensors.metadata["settings"]))

    @cached_property
    def layers(self) -> list[int]:
        """Indices of the fitted layers."""
        return sorted({int(name.split(".")[1]) for name in self.tensors})

    def get(self, layer: int, role: Role, name: str) -> Tensor:
        """`ladder`, `weight`, `loss` or `curvature` of one layer's keys or values; keys' `order`, values' `basis`."""
        place = self.options(layer, role).index(self.option(layer, role)) if name in ("ladder", "loss") else 0
        return self.tensors[tensor_name(layer, role, name, place)]

    def option(self, layer: int, role: Role) -> Option:
        """The option that one layer's keys or values stand under."""
        return self._chosen.get((layer, role), self.settings.option(role))

    def options(self, layer: int, role: Role) -> list[Option]:
        """The options of one layer's keys or values, the base option first."""
        heads, head_dim = self.tensors[tensor_name(layer, role, "weight")].shape
        return self.settings.options(role, heads, head_dim)

    def widths(self, layer: int, role: Role, bits: int | Tensor) -> Tensor:
        """`bits` as a width per channel, `[H, D]` uint8."""
        return torch.as_tensor(bits).to(torch.uint8).expand(self.get(layer, role, "weight").shape)

    def quantizer(self, layer: int, role: Role, bits: int | Tensor, feedback: bool = True) -> Quantizer:
        """The quantizer of one layer's keys or values at `bits`: one width, or one per channel `[H, D]` (0..8).

        Args:
            feedback: False where only what is stored matters, not how it is chosen.
        """
        option = self.option(layer, role)
        return make_quantizer(
            self.get(layer, role, "ladder"),
            self.widths(layer, role, bits),
            self.settings.relative(role),
            option.scope,
            option.outliers,
            self.get(layer, role, "weight"),
            self.get(layer, role, "order") if role == "key" else None,
            self.get(layer, role, "curvature") if feedback and self.settings.feedback else None,
            self.basis(layer, role),
        )

    def basis(self, layer: int, role: Role) -> Basis | None:
        """The basis that one layer's keys or values are kept in; None for the model's own."""
        kept = role == "value" and self.settings.value_basis == "pca"
        return Basis(self.get(layer, role, "basis")) if kept else None


def tensor_name(layer: int, role: Role, what: str, place: int = 0) -> str:
    """A tensor's name in the file; `place` is that of the option."""
    return f"layers.{layer}.{role}.{place}.{what}" if place else f"layers.{layer}.{role}.{what}"


def predicted_total(codebooks: Codebooks, layer: int, role: Role, bits: int | Tensor) -> float:
    """Predicted loss of one layer's keys or values at one width, or one per channel `[H, D]`; nats per token."""
    widths = codebooks.widths(layer, role, bits).long()
    return float(codebooks.get(layer, role, "loss").gather(0, widths[None]).sum())
