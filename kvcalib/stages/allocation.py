"""`allocation.safetensors`: what stage `allocate` was told, and the widths that it chose.

The file holds `layers.I.key.widths` and `layers.I.value.widths`, `[H, D]` uint8: 0..8, or 16 throughout a layer that
stays exact. Its metadata is `Allocation`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from kvcalib.allocation.fisher import Per
from kvcalib.errors import CorruptFile, InputError
from kvcalib.files import read_tensors
from kvcalib.quant.packing import MAX_BITS
from kvcalib.report.allocation import Layer, allocation_plot
from kvcalib.rundir import ALLOCATION, CODEBOOKS, RunDir
from kvcalib.stages.allocators import EXACT, Name, is_exact
from kvcalib.stages.check import Checked
from kvcalib.stages.fit_nuq import ROLES, Codebooks, Option, Options

Method = Literal["fisher", "kl", "qaq"]
Widths = dict[Name, Tensor]


class AllocateSettings(BaseModel):
    """Settings of the stage; exactly one of `budget` and `widths`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    budget: float | None = Field(default=None, gt=0, description="Effective bits: every byte of the cache counted.")
    widths: float | None = Field(default=None, ge=0, le=8, description="Mean code width; overheads come on top.")
    method: Method = "fisher"
    per: Per = Field(default="channel", description="What takes one width; channel if not given, for qaq head.")
    group: Literal[0, 16] = 16
    exact_layers: tuple[int, ...] = Field(default=(), description="Layers that stay exact, at 16 bits.")
    as_published: bool = Field(default=False, description="qaq by the arithmetic of the paper's code.")

    @property
    def title(self) -> str:
        """Method and units in words."""
        return f"{self.method} per {self.per}" + " as published" * self.as_published

    @model_validator(mode="before")
    @classmethod
    def _unit(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("per") is None:
            return {**given, "per": "head" if given.get("method") == "qaq" else "channel"}
        return given

    @model_validator(mode="after")
    def _one(self) -> AllocateSettings:
        if (self.budget is None) == (self.widths is None):
            raise ValueError("give one of --budget (effective bits) and --widths (mean code width)")
        if self.method == "qaq" and self.per == "channel":
            raise ValueError("--per is channel, but qaq's bounds are of whole heads; give --per head or --per layer")
        if self.as_published and self.method != "qaq":
            raise ValueError(f"--as-published is about qaq, --method is {self.method}; give --method qaq")
        return self


class LayerPlan(BaseModel):
    """Mean code widths of one layer, and its predicted losses in nats per token; 16 bits and no loss if exact."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    index: int
    key_bits: float
    value_bits: float
    key_loss: float
    value_loss: float

    @property
    def exact(self) -> bool:
        """Whether the layer is not quantized."""
        return self.key_bits == self.value_bits == EXACT


class Allocation(BaseModel):
    """What the stage found out, as recorded beside the widths."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    settings: AllocateSettings
    codebooks: str = Field(description="Which codebooks the widths are for: the hash of their file.")
    mean_width: float = Field(description="Of the channels of all layers that are not exact.")
    effective_bits: float = Field(description="Of a long cache without sinks, recent window and spare room.")
    loss: float = Field(description="Predicted loss of the plan, nats per token.")
    bound: float | None = Field(description="No plan of this budget and these units has less, where that is known.")
    curve: list[tuple[float, float]] = Field(description="(mean code width, predicted loss) of the method's plans.")
    layers: list[LayerPlan]
    key_options: dict[int, Option] = Field(description="Outliers and scope of the keys, by layer.")
    value_options: dict[int, Option] = Field(description="Outliers and scope of the values, by layer.")
    checked: list[Checked] = Field(default=[], description="Plans that were measured, if any; this is the best.")

    @property
    def options(self) -> Options:
        """Outliers and scope by layer and role."""
        found: Options = {(layer, "key"): option for layer, option in self.key_options.items()}
        return found | {(layer, "value"): option for layer, option in self.value_options.items()}

    @property
    def gap(self) -> float:
        """How far above the best plan's loss this one's can be, as a share; 0 where nothing is known."""
        return 0.0 if self.bound is None else max(0.0, self.loss / max(self.bound, 1e-300) - 1)


def load(run_dir: RunDir) -> tuple[Allocation, Widths]:
    """The widths in a run.

    Raises:
        InputError: there are none, or they were chosen for other codebooks than those there now.
        CorruptFile: a layer is missing or unknown, or a width is none that the storage knows.
    """
    expected = run_dir.output_hash("fit-nuq", CODEBOOKS)
    path = run_dir.file(ALLOCATION)
    other = (
        f"{run_dir.path}: its widths were chosen for other codebooks than those there now; "
        "run `kvcalib allocate` on this folder again"
    )
    if run_dir.settings("allocate")["codebooks"] != expected:
        raise InputError(other)
    tensors, found = read_tensors(path)
    try:
        allocation = Allocation.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CorruptFile(f"{path}: {where}: {first['msg']}; run `kvcalib allocate` on this folder again") from None
    if allocation.codebooks != expected:
        raise InputError(other)
    return allocation, _checked(path, tensors, Codebooks.load(run_dir))


def _checked(path: Path, tensors: dict[str, Tensor], codebooks: Codebooks) -> Widths:
    """The widths of every layer of `codebooks`, or CorruptFile with what is wrong."""
    again = "run `kvcalib allocate` on this folder again"
    names = {f"layers.{layer}.{role}.widths": (layer, role) for layer in codebooks.layers for role in ROLES}
    for name in sorted(set(names) ^ set(tensors)):
        what = "is missing" if name in names else "is no layer's of the codebooks"
        raise CorruptFile(f"{path}: {name} {what}; {again}")
    for name, (layer, role) in names.items():
        found, shape = tensors[name], codebooks.get(layer, role, "weight").shape
        if found.shape != shape or found.dtype != torch.uint8:
            raise CorruptFile(
                f"{path}: {name} is {str(found.dtype).removeprefix('torch.')} {list(found.shape)}, expected uint8 "
                f"{list(shape)}; {again}"
            )
        other = tensors[f"layers.{layer}.{'value' if role == 'key' else 'key'}.widths"]
        wrong = (found > MAX_BITS).nonzero()
        if len(wrong) and not (is_exact(found) and is_exact(other)):
            head, channel = wrong[0].tolist()
            raise CorruptFile(
                f"{path}: {name}[{head}][{channel}] is {found[head, channel].item()}, expected 0..{MAX_BITS}, or "
                f"{EXACT} in all keys and values of the layer; {again}"
            )
    return {name: tensors[tensor] for tensor, name in names.items()}


def drawing(allocation: Allocation) -> str:
    """The plan's plot, as the text of an SVG file."""
    counted = f"{allocation.effective_bits:.3f} effective bits, mean code width {allocation.mean_width:.3f}"
    note_ = f"{counted}; predicted loss {allocation.loss:.5f} nats per token"
    best = [row for row in allocation.checked if row.kept]
    if best:
        note_ += f"; measured KLD {best[0].kld:.5f} (best of {len(allocation.checked)} plans: {best[0].plan})"
    exact = [layer.index for layer in allocation.layers if layer.exact]
    if exact:
        note_ += f"; exact: layers {', '.join(map(str, exact))}"
    layers = [Layer(**layer.model_dump()) for layer in allocation.layers if not layer.exact]
    chosen = (allocation.mean_width, allocation.loss)
    return allocation_plot(f"Allocation by {allocation.settings.title}", note_, layers, allocation.curve, chosen)
