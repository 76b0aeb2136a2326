"""Stage `allocate`: codebooks and a budget to a width for every channel.

`allocation.safetensors` holds `layers.I.key.widths` and `layers.I.value.widths`, `[H, D]` uint8; its metadata the
settings, the options (outliers and scope) of every layer's keys and values, predicted loss, the bound below which no
plan of the budget can lie, and the curve of loss against budget. A budget in effective bits is spent on options and
widths together (`options.py`); a mean code width leaves the options as `fit-nuq` was given them.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from kvcalib.allocation.fisher import Per, Table, allocate
from kvcalib.calibration.statistics import Calibration, rope_pairs
from kvcalib.errors import InputError
from kvcalib.files import read_tensors, write_tensors
from kvcalib.rundir import ALLOCATION, CALIBRATION, CODEBOOKS, RunDir
from kvcalib.stages.fit_nuq import ROLES, Codebooks, Option, Options, Role
from kvcalib.stages.options import POSITION_BITS, row_bits, within
from kvcalib.stages.progress import note

STAGE_VERSION = 2
CURVE = tuple(step / 4 for step in range(2, 25))
"""Mean code widths at which the curve of loss against budget is taken: 0.5 to 6 bits."""


class AllocateSettings(BaseModel):
    """Settings of the stage; exactly one of `budget` and `widths`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    budget: float | None = Field(default=None, gt=0, description="Effective bits: every byte of the cache counted.")
    widths: float | None = Field(default=None, ge=0, le=8, description="Mean code width; overheads come on top.")
    method: Literal["fisher"] = "fisher"
    per: Per = "channel"
    group: Literal[0, 16] = 16

    @model_validator(mode="after")
    def _one(self) -> AllocateSettings:
        if (self.budget is None) == (self.widths is None):
            raise ValueError("give one of --budget (effective bits) and --widths (mean code width)")
        return self


class Allocation(BaseModel):
    """What the stage found out, as recorded beside the widths."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    settings: AllocateSettings
    mean_width: float
    effective_bits: float = Field(description="Of a long cache without sinks, recent window and spare room.")
    loss: float = Field(description="Predicted loss of the plan, nats per token.")
    bound: float = Field(description="No plan of this budget and these units has a smaller predicted loss.")
    curve: list[tuple[float, float]] = Field(description="(mean code width, predicted loss) of the best plans.")
    key_options: dict[int, Option] = Field(description="Outliers and scope of the keys, by layer.")
    value_options: dict[int, Option] = Field(description="Outliers and scope of the values, by layer.")

    @property
    def options(self) -> Options:
        """Outliers and scope by layer and role."""
        found: Options = {(layer, "key"): option for layer, option in self.key_options.items()}
        return found | {(layer, "value"): option for layer, option in self.value_options.items()}


Widths = dict[tuple[int, Role], Tensor]


def run(run_dir: RunDir, settings: AllocateSettings) -> tuple[Allocation, Widths]:
    """Choose widths and write them into the run.

    Raises:
        InputError: the budget is below the smallest plan or above the largest one; says which they are.
    """
    codebooks = Codebooks.load(run_dir)
    recorded = {**settings.model_dump(), "codebooks": _codebooks_hash(run_dir), "stage_version": STAGE_VERSION}
    with run_dir.lock():
        if run_dir.up_to_date("allocate", recorded):
            note("allocate: up to date")
            return load(run_dir)
        calibration, _ = Calibration.load(run_dir.file(CALIBRATION))
        names = [(layer, role) for layer in codebooks.layers for role in ROLES]
        pairs = {shape.index: torch.tensor(rope_pairs(shape.partner)) for shape in calibration.info.layers}
        tables = [
            Table(codebooks.get(layer, role, "loss"), pairs[layer] if role == "key" else None) for layer, role in names
        ]
        elements = sum(t.loss[0].numel() for t in tables)
        if settings.budget is not None:
            best = within(codebooks, calibration, codebooks.layers, settings.budget, settings.per, settings.group)
            codebooks, widths, loss, bound = best.codebooks, best.widths, best.loss, best.bound
            tables = [Table(codebooks.get(*name, "loss"), t.pairs) for name, t in zip(names, tables, strict=True)]
        else:
            room = round((settings.widths or 0.0) * elements)
            chosen, plan = allocate(tables, room, settings.per, settings.group)
            widths, loss, bound = dict(zip(names, chosen, strict=True)), plan.loss, plan.bound
        curve = [(mean, allocate(tables, int(mean * elements), settings.per, settings.group)[1].loss) for mean in CURVE]
        allocation = Allocation(
            settings=settings,
            mean_width=sum(int(w.sum()) for w in widths.values()) / elements,
            effective_bits=effective_bits(codebooks, widths),
            loss=loss,
            bound=bound,
            curve=curve,
            key_options={layer: codebooks.option(layer, "key") for layer in codebooks.layers},
            value_options={layer: codebooks.option(layer, "value") for layer in codebooks.layers},
        )
        tensors = {f"layers.{layer}.{role}.widths": w for (layer, role), w in widths.items()}
        write_tensors(run_dir.file(ALLOCATION), tensors, allocation.model_dump(mode="json"))
        run_dir.finish("allocate", recorded, [ALLOCATION])
    return allocation, widths


def load(run_dir: RunDir) -> tuple[Allocation, Widths]:
    """The widths in a run.

    Raises:
        InputError: there are none, or they were chosen for other codebooks than those there now.
    """
    if run_dir.settings("allocate")["codebooks"] != _codebooks_hash(run_dir):
        raise InputError(
            f"{run_dir.path}: its widths were chosen for other codebooks than those there now; "
            "run `kvcalib allocate` on this folder again"
        )
    tensors, found = read_tensors(run_dir.file(ALLOCATION))
    widths: Widths = {}
    for name, tensor in tensors.items():
        _, layer, role, _ = name.split(".")
        widths[(int(layer), "key" if role == "key" else "value")] = tensor
    return Allocation.model_validate(found), widths


def effective_bits(codebooks: Codebooks, widths: Widths) -> float:
    """Bits of a token's rows in all layers, and of its position, per key or value element."""
    total = sum(row_bits(codebooks.quantizer(layer, role, w)) for (layer, role), w in widths.items())
    return (total + POSITION_BITS) / sum(w.numel() for w in widths.values())


def _codebooks_hash(run_dir: RunDir) -> Any:
    return (run_dir.record("fit-nuq") or {}).get("outputs", {}).get(CODEBOOKS)
