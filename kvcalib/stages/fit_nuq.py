"""Stage `fit-nuq`: calibration to codebooks, and the loss that every width would cost every channel.

`codebooks.safetensors` holds per layer and for keys and values: `ladder [H, D, 511]` (codebooks of all widths 0..8),
`weight [H, D]` (mean Fisher per token) and `loss [9, H, D]` (predicted loss in nats per token of each width). Bits are
chosen from it afterwards, by `build` or by allocation.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

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
from kvcalib.quant.packing import MAX_BITS
from kvcalib.quant.quantizer import Quantizer, Scope
from kvcalib.rundir import CALIBRATION, CODEBOOKS, RunDir, fingerprint
from kvcalib.stages.progress import note, progress

STAGE_VERSION = 2
Role = Literal["key", "value"]
ROLES: tuple[Role, ...] = ("key", "value")


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
    """`codebooks.safetensors` in memory."""

    def __init__(self, tensors: dict[str, Tensor], settings: FitNuqSettings) -> None:
        self.tensors, self.settings = tensors, settings

    @classmethod
    def load(cls, run_dir: RunDir) -> Codebooks:
        """The codebooks of a run; InputError if there are none, or none of the present calibration."""
        if run_dir.settings("fit-nuq")["calibration"] != fingerprint(run_dir.settings("fisher")):
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
        return self.tensors[f"layers.{layer}.{role}.{name}"]

    def widths(self, layer: int, role: Role, bits: int | Tensor) -> Tensor:
        """`bits` as a width per channel, `[H, D]` uint8."""
        return torch.as_tensor(bits).to(torch.uint8).expand(self.get(layer, role, "weight").shape)

    def quantizer(self, layer: int, role: Role, bits: int | Tensor) -> Quantizer:
        """The quantizer of one layer's keys or values at `bits`: one width, or one per channel `[H, D]` (0..8)."""
        return make_quantizer(
            self.get(layer, role, "ladder"),
            self.widths(layer, role, bits),
            role == "value",
            self.settings.scope(role),
            self.settings.outliers,
            self.get(layer, role, "weight"),
            self.get(layer, role, "order") if role == "key" else None,
        )


def run(run_dir: RunDir, settings: FitNuqSettings) -> Codebooks:
    """Fit every layer of the run's calibration, layers in parallel over the cores."""
    if settings.solver == "lloyd" and settings.format != "nuq":
        raise InputError(f"--solver lloyd fits nuq codebooks, --format is {settings.format!r}; drop one of the two")
    calibrated = run_dir.settings("fisher")
    recorded = {
        **settings.model_dump(exclude={"key_bits", "value_bits"}),
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
    options = FitOptions(settings.format, settings.weights, settings.outliers, settings.qnorm, settings.solver)
    fitted = {}
    for role in ROLES:
        x, fisher = data[f"sample.{role}"][keep], data[f"sample.{role}_fisher"][keep]
        if not bool(torch.isfinite(x).all() and torch.isfinite(fisher).all()):
            raise NonFiniteActivations(
                f"fit-nuq: layer {layer}: the calibration's {role}s or their Fisher hold NaN or infinities; "
                "run `kvcalib fisher` again, with --dtype float32 or bfloat16"
            )
        wide, weight = x.double().numpy(), fisher.double().numpy()
        if role == "key":
            ladder = fit_keys(wide, weight, settings.granularity, settings.scope(role), options)
        else:
            ladder = fit_values(wide, weight, settings.value_granularity, settings.scope(role), options)
        if role == "key":
            fitted[f"layers.{layer}.key.order"] = channel_order(calibration, layer)
        mean = (data[f"{role}.fisher_sum"] / calibration.info.tokens).float()
        fitted[f"layers.{layer}.{role}.ladder"] = ladder.float()
        fitted[f"layers.{layer}.{role}.weight"] = mean
        fitted[f"layers.{layer}.{role}.loss"] = torch.stack(
            [
                predicted_loss(
                    at_bits(ladder.float(), bits, role == "value", settings.scope(role), settings.outliers, mean),
                    x,
                    fisher,
                    exact_dtype(x.dtype),
                )
                for bits in range(MAX_BITS + 1)
            ]
        )
    return fitted


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
