"""Stage `fit-nuq`: calibration to codebooks, and the loss that every width would cost every channel.

`codebooks.safetensors` holds per layer and for keys and values: `ladder [H, D, 511]` (codebooks of all widths 0..8),
`weight [H, D]` (mean Fisher per token) and `loss [9, H, D]` (predicted loss in nats per token of each width). Bits are
chosen from it afterwards, by `build` or by allocation.

An *option* is a share of outliers and a scope (what shares their ranks, and a value's zero and scale). The run has a
base option; with `choices` further ones are fitted for allocation to choose among, each with a ladder and a loss table
of its own: `layers.I.ROLE.K.ladder` and `.loss`, K their place in `Codebooks.options`.
"""

from __future__ import annotations

import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from kvcalib.artifact.manifest import FitSettings
from kvcalib.calibration.statistics import Calibration, rope_pairs
from kvcalib.errors import InputError, NonFiniteActivations
from kvcalib.files import read_tensors, write_tensors
from kvcalib.quant.codebook import Format
from kvcalib.quant.fitting import (
    FitOptions,
    Granularity,
    Solver,
    Weights,
    fit_keys,
    fit_values,
    make_quantizer,
    predicted_loss,
)
from kvcalib.quant.fitting import uniform_quantizer as at_bits
from kvcalib.quant.outliers import outlier_count
from kvcalib.quant.packing import MAX_BITS
from kvcalib.quant.quantizer import BYTE_INDEXED, Quantizer, Scope
from kvcalib.rundir import CALIBRATION, CODEBOOKS, RunDir, fingerprint
from kvcalib.stages.progress import note, progress

STAGE_VERSION = 3
Role = Literal["key", "value"]
ROLES: tuple[Role, ...] = ("key", "value")


class Option(BaseModel):
    """What of a row besides its widths is a choice."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    outliers: float = Field(ge=0, le=0.05, description="Exact share of a group's elements.")
    scope: Scope = Field(description="Group of outlier ranks and, for values, of zero and scale.")

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
    value_scale: Scope = Field(default="token", description="What shares a zero and scale: a token, or its head.")
    key_outlier_scope: Scope = "token"
    outliers: float = Field(default=0.01, ge=0, le=0.05)
    choices: Choices | None = Field(
        default=Choices(outliers=(0.0,), scopes=("token",)),
        description="Further options for a budget to choose among; None for no others.",
    )
    sinks: int = Field(default=0, ge=0, description="First tokens of a sequence, left out of thresholds and fit.")
    format: Format = "nuq"
    weights: Weights = "fisher_scale"
    qnorm: bool = True
    solver: Solver = "exact"

    @property
    def bits(self) -> dict[Role, int]:
        """Bits by role."""
        return {"key": self.key_bits, "value": self.value_bits}

    def scope(self, role: Role) -> Scope:
        """Group of outlier ranks, and for values of zero and scale."""
        return self.key_outlier_scope if role == "key" else self.value_scale

    def option(self, role: Role) -> Option:
        """The base option."""
        return Option(outliers=self.outliers, scope=self.scope(role))

    def options(self, role: Role, heads: int, head_dim: int) -> list[Option]:
        """The base option, then those of `choices` that differ from it and from one another in what is stored.

        Shares that round up to one number of outliers are one option, and the scope makes no difference to keys without
        outliers. Ranks of keys per head are left out where an index into all of a token's elements takes one byte
        anyway: ranks per token then keep the better elements at the same size.
        """
        found: dict[tuple[Scope, int], Option] = {}
        more = () if self.choices is None else itertools.product(self.choices.scopes, self.choices.outliers)
        for option in (self.option(role), *(Option(outliers=share, scope=scope) for scope, share in more)):
            count = outlier_count(option.outliers, head_dim if option.scope == "head" else heads * head_dim)
            scope = "token" if role == "key" and not count else option.scope
            if found and role == "key" and scope == "head" and heads * head_dim <= BYTE_INDEXED:
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
    """`codebooks.safetensors` in memory.

    Every layer's keys and values stand under one option, the base option unless `under` says otherwise; ladders, losses
    and quantizers are that option's.
    """

    def __init__(self, tensors: dict[str, Tensor], settings: FitNuqSettings, chosen: Options | None = None) -> None:
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
        tensors, note_ = read_tensors(run_dir.file(CODEBOOKS))
        return cls(tensors, FitNuqSettings.model_validate(note_["settings"]))

    @property
    def layers(self) -> list[int]:
        """Indices of the fitted layers."""
        return sorted({int(name.split(".")[1]) for name in self.tensors})

    def get(self, layer: int, role: Role, name: str) -> Tensor:
        """`ladder`, `weight` or `loss` of one layer's keys or values, `order` of its keys."""
        place = self.options(layer, role).index(self.option(layer, role)) if name in ("ladder", "loss") else 0
        return self.tensors[_name(layer, role, name, place)]

    def option(self, layer: int, role: Role) -> Option:
        """The option that one layer's keys or values stand under."""
        return self._chosen.get((layer, role), self.settings.option(role))

    def options(self, layer: int, role: Role) -> list[Option]:
        """The options of one layer's keys or values, the base option first."""
        heads, head_dim = self.tensors[_name(layer, role, "weight")].shape
        return self.settings.options(role, heads, head_dim)

    def widths(self, layer: int, role: Role, bits: int | Tensor) -> Tensor:
        """`bits` as a width per channel, `[H, D]` uint8."""
        return torch.as_tensor(bits).to(torch.uint8).expand(self.get(layer, role, "weight").shape)

    def quantizer(self, layer: int, role: Role, bits: int | Tensor) -> Quantizer:
        """The quantizer of one layer's keys or values at `bits`: one width, or one per channel `[H, D]` (0..8)."""
        option = self.option(layer, role)
        return make_quantizer(
            self.get(layer, role, "ladder"),
            self.widths(layer, role, bits),
            role == "value",
            option.scope,
            option.outliers,
            self.get(layer, role, "weight"),
            self.get(layer, role, "order") if role == "key" else None,
        )


def run(run_dir: RunDir, settings: FitNuqSettings) -> Codebooks:
    """Fit every layer of the run's calibration, layers in parallel over the cores."""
    if settings.solver == "lloyd" and settings.format != "nuq":
        raise InputError(f"--solver lloyd fits nuq codebooks, --format is {settings.format!r}; drop one of the two")
    calibrated = run_dir.settings("fisher")
    recorded = {
        **settings.model_dump(mode="json", exclude={"key_bits", "value_bits"}),
        "calibration": fingerprint(calibrated),
        "stage_version": STAGE_VERSION,
    }
    with run_dir.lock():
        if run_dir.up_to_date("fit-nuq", recorded):
            note("fit-nuq: up to date")
            codebooks = Codebooks.load(run_dir)
            codebooks.settings = settings
            _save(run_dir, codebooks, recorded)
            return codebooks
        calibration, _ = Calibration.load(run_dir.file(CALIBRATION))
        tensors: dict[str, Tensor] = {}
        layers = [shape.index for shape in calibration.info.layers]
        workers = max(1, min(len(layers), os.cpu_count() or 1))
        # One thread per layer; inside it torch should not want all the cores as well.
        threads = torch.get_num_threads()
        with progress("fit-nuq", len(layers), "layers") as show, ThreadPoolExecutor(workers) as pool:
            torch.set_num_threads(max(1, threads // workers))
            try:
                for done, fitted in enumerate(pool.map(lambda i: fit_layer(calibration, i, settings), layers), 1):
                    tensors.update(fitted)
                    show(done)
            finally:
                torch.set_num_threads(threads)
        codebooks = Codebooks(tensors, settings)
        _save(run_dir, codebooks, recorded)
    return codebooks


def _save(run_dir: RunDir, codebooks: Codebooks, recorded: dict[str, Any]) -> None:
    note_ = {"settings": codebooks.settings.model_dump(mode="json")}
    write_tensors(run_dir.file(CODEBOOKS), codebooks.tensors, note_)
    run_dir.finish("fit-nuq", recorded, [CODEBOOKS])


def sample_without_sinks(calibration: Calibration, sinks: int) -> Tensor:
    """Which sampled tokens count: `[n]` bool, False for the first `sinks` positions of a sequence."""
    keep = calibration.tensors["sample.position"] >= sinks
    if int(keep.sum()) < 2:
        raise InputError(
            f"fit-nuq: {int(keep.sum())} sampled tokens lie after the first --sinks {sinks} of their sequence, "
            "expected at least 2; use fewer sinks or longer sequences"
        )
    return keep


def fit_layer(calibration: Calibration, layer: int, settings: FitNuqSettings) -> dict[str, Tensor]:
    """Ladder, weight and loss table of one layer's keys and values."""
    data = calibration.layer(layer)
    keep = sample_without_sinks(calibration, settings.sinks)
    fitted = {}
    for role in ROLES:
        x, fisher = data[f"sample.{role}"][keep], data[f"sample.{role}_fisher"][keep]
        if not bool(torch.isfinite(x).all() and torch.isfinite(fisher).all()):
            raise NonFiniteActivations(
                f"fit-nuq: layer {layer}: the calibration's {role}s or their Fisher hold NaN or infinities; "
                "run `kvcalib fisher` again, with --dtype float32 or bfloat16"
            )
        if role == "key":
            fitted[_name(layer, role, "order")] = channel_order(calibration, layer)
        mean = (data[f"{role}.fisher_sum"] / calibration.info.tokens).float()
        fitted[_name(layer, role, "weight")] = mean
        for place, option in enumerate(settings.options(role, *mean.shape)):
            ladder = _fit(x, fisher, role, option, settings)
            fitted[_name(layer, role, "ladder", place)] = ladder
            fitted[_name(layer, role, "loss", place)] = torch.stack(
                [
                    predicted_loss(
                        at_bits(ladder, bits, role == "value", option.scope, option.outliers, mean),
                        x,
                        fisher,
                        exact_dtype(x.dtype),
                    )
                    for bits in range(MAX_BITS + 1)
                ]
            )
    return fitted


def _fit(x: Tensor, fisher: Tensor, role: Role, option: Option, settings: FitNuqSettings) -> Tensor:
    """Ladders `[H, D, 511]` float32 of the sample `x [n, H, D]` under one option."""
    options = FitOptions(settings.format, settings.weights, option.outliers, settings.qnorm, settings.solver)
    wide, weight = x.double().numpy(), fisher.double().numpy()
    if role == "key":
        return fit_keys(wide, weight, settings.granularity, option.scope, options).float()
    return fit_values(wide, weight, settings.value_granularity, option.scope, options).float()


def _name(layer: int, role: Role, what: str, place: int = 0) -> str:
    """The tensor's name; `place` is that of the option."""
    return f"layers.{layer}.{role}.{place}.{what}" if place else f"layers.{layer}.{role}.{what}"


def channel_order(calibration: Calibration, layer: int) -> Tensor:
    """`[D]` int64: the channels of a key with the two of each RoPE pair side by side, as kernels want them."""
    partner = next(shape.partner for shape in calibration.info.layers if shape.index == layer)
    return torch.tensor(rope_pairs(partner)).flatten()


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """The two-byte type in which a model of `dtype` keeps outliers and scales."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float16


def predicted_total(codebooks: Codebooks, layer: int, role: Role, bits: int | Tensor) -> float:
    """Predicted loss of one layer's keys or values at one width, or one per channel `[H, D]`; nats per token."""
    widths = codebooks.widths(layer, role, bits).long()
    return float(codebooks.get(layer, role, "loss").gather(0, widths[None]).sum())
