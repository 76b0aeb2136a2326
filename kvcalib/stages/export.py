"""Stage `export`: a run or an artifact to files that other programs read.

What a target needs is gathered here. FP8 scales and the predicted loss of FP8 and NVFP4 come from the calibration's
sample (`quant/floats.py`), on rotated keys: both formats are applied behind RoPE. An artifact has no sample; there the
losses of the two formats are estimated from the predicted loss that it records (`estimated`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from kvcalib import __version__
from kvcalib.allocation.budget import solve
from kvcalib.artifact import hub, store
from kvcalib.artifact.exports import FOLDER, NAMES, TARGETS, Export, Facts, LayerFacts
from kvcalib.artifact.exports.export import MODULE
from kvcalib.artifact.manifest import LayerSpec
from kvcalib.calibration.statistics import Calibration, LayerShape
from kvcalib.errors import InputError
from kvcalib.quant import floats
from kvcalib.rundir import CALIBRATION, RunDir
from kvcalib.stages.progress import progress

TOKENS = 1024
"""Sampled tokens over which losses are taken; ranges are taken over all."""
UNQUANTIZED = 16.0
NOISE = {"FP8": 6.9e-4, "NVFP4": 8.9e-3}
"""Mean squared error of the two formats over the variance, of normal numbers (`tests/quant/test_floats.py`)."""
TENTHS = 10
"""Costs are whole numbers of tenths of a bit."""


class ExportSettings(BaseModel):
    """Settings of the stage; each target takes those that it knows."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    effective_bits: float = Field(
        default=6.0, ge=floats.BITS["NVFP4"], le=UNQUANTIZED, description="modelopt: bits per element, at most."
    )
    module: str = Field(default=MODULE, description="modelopt, vllm-scales: name of a layer's attention module.")
    tp_size: int = Field(default=1, ge=1, le=1024, description="sglang-scales: ranks of tensor parallelism.")
    backend: str = Field(default="hqq", description="hf: hqq or quanto.")


@dataclass(frozen=True)
class Exported:
    """What was written: the files, the facts they hold, and what their user should know."""

    paths: list[Path]
    facts: Facts
    notes: list[str]


def run(
    source: str | Path,
    to: str,
    out: Path | None = None,
    settings: ExportSettings | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write the files of the target `to`.

    Args:
        source: a run's folder, or an artifact's folder or Hub id.
        out: a folder, or the name of the main file; default: `exports` inside `source`.

    Raises:
        InputError: an unknown target, a source that the target cannot be made from, or one that lacks something.
        FolderInUse: other files are there.
    """
    settings = settings or ExportSettings()
    target = find(to, settings)
    folder = Path(source)
    is_run = (folder / "run.json").is_file()
    if not is_run and folder.is_dir() and not (folder / store.MANIFEST).is_file():
        raise InputError(f"{folder}: neither a run (no run.json) nor an artifact (no {store.MANIFEST})")
    if is_run and "run" not in target.reads:
        raise InputError(
            f"{folder}: is a run, and --to {to} is made from an artifact; `kvcalib build {folder} --out ARTIFACT` "
            "makes one, then export that"
        )
    if not is_run:
        folder = hub.locate(source)
        if "artifact" not in target.reads:
            raise InputError(
                f"{source}: is an artifact, which holds no sample of keys and values to take FP8 scales from; give "
                f"--to {to} the run that it was built from (the folder of `kvcalib fisher --run`)"
            )
    facts = of_run(RunDir(folder)) if is_run else of_artifact(folder)
    facts = with_formats(facts, settings.effective_bits) if to == "modelopt" else facts
    if out is None and not is_run and not Path(source).is_dir():
        raise InputError(f"{source}: is on the Hub; give --out a folder for the files")
    return Exported(target.write(facts, out or folder / FOLDER, overwrite), facts, target.notes(facts))


def find(to: str, settings: ExportSettings) -> Export:
    """The target of a name, with its settings; InputError that lists the names if there is none."""
    for kind in TARGETS:
        if kind.name == to:
            known = getattr(kind, "__dataclass_fields__", {})
            return kind(**{name: value for name, value in settings.model_dump().items() if name in known})
    raise InputError(f"--to is {to!r}, expected one of {', '.join(NAMES)}")


def of_artifact(folder: Path) -> Facts:
    """The facts of an artifact; the losses of formats are estimated."""
    manifest = store.read_manifest(folder)
    layers = [
        LayerFacts(
            index=spec.index,
            kv_heads=spec.key.kv_heads,
            head_dim=spec.key.head_dim,
            sliding=spec.sliding,
            key_bits=spec.key.mean_bits,
            value_bits=spec.value.mean_bits,
            losses=estimated(spec),
        )
        for spec in manifest.layers
    ]
    if not layers:
        raise InputError(f"{folder}: no layer of it is quantized, there is nothing to export")
    return Facts(str(folder), __version__, manifest.model, layers, manifest.runtime.recent, estimated=True)


def estimated(spec: LayerSpec) -> dict[str, float]:
    """Predicted loss of a layer under each format, up to one factor for all: `sum_r p_r 4^(b_r) * noise(format)`.

    Every bit of a fitted codebook divides the squared error by about 4, so `p 4^b` undoes the widths that allocation
    chose, whatever they are, and what remains is how much the layer's error weighs.
    """
    weight = sum(part.predicted_loss * 4.0**part.mean_bits for part in (spec.key, spec.value))
    return {name: weight * noise for name, noise in NOISE.items()}


def of_run(run_dir: RunDir) -> Facts:
    """The facts of a run: FP8 scales and the predicted losses of both formats, on its calibration's sample."""
    run_dir.settings("fisher")
    calibration, _ = Calibration.load(run_dir.file(CALIBRATION))
    layers = []
    with progress("export", len(calibration.info.layers), "layers") as show:
        for done, shape in enumerate(calibration.info.layers, 1):
            layers.append(measured(shape, calibration.layer(shape.index), calibration.info.seed))
            show(done)
    return Facts(str(run_dir.path), __version__, calibration.info.model, layers)


def measured(shape: LayerShape, data: Mapping[str, Tensor], seed: int) -> LayerFacts:
    """One layer's scales and losses.

    Keys are turned by random angles, as it is not known where they will be read, and the Fisher of a pair is the mean
    of its two channels': what it is on average over the angles.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + shape.index)
    for role in ("key", "value"):
        if not bool(torch.isfinite(data[f"sample.{role}"]).all()):
            raise InputError(
                f"export: layer {shape.index}: the calibration's {role}s hold NaN or infinities; run `kvcalib fisher` "
                "again, with --dtype float32 or bfloat16"
            )
    # The sample is in the order of its hashes, so its first tokens are a uniform sample too.
    key, value = (data[f"sample.{role}"][:TOKENS].float() for role in ("key", "value"))
    key_fisher, value_fisher = (data[f"sample.{role}_fisher"][:TOKENS].float() for role in ("key", "value"))
    key = floats.turn(key, shape.partner, generator)
    key_fisher = (key_fisher + key_fisher[..., torch.tensor(shape.partner)]) / 2
    pairs = {"key": (key, key_fisher), "value": (value, value_fisher)}
    largest = {
        "key": floats.reach(data["sample.key"], shape.partner),
        "value": float(data["sample.value"].float().abs().max()),
    }
    scales, fp8_loss, nvfp4_loss = {}, 0.0, 0.0
    for role, (x, fisher) in pairs.items():
        scales[role], found = floats.fp8_scale([(x, fisher)], largest[role])
        fp8_loss += found
        nvfp4_loss += floats.loss(x, floats.nvfp4(x, largest[role]), fisher)
    shared, _ = floats.fp8_scale(list(pairs.values()), max(largest.values()))
    return LayerFacts(
        index=shape.index,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        sliding=shape.sliding,
        key_scale=scales["key"],
        value_scale=scales["value"],
        shared_scale=shared,
        losses={"FP8": fp8_loss, "NVFP4": nvfp4_loss},
    )


def with_formats(facts: Facts, effective_bits: float) -> Facts:
    """`facts` with a format for every layer: least predicted loss within `effective_bits` per element, solved exactly.

    A layer is NVFP4 (4.5 bits), FP8 (8) or unquantized (16, no loss); what saves the most loss per bit is raised first.
    """
    names = ["NVFP4", "FP8", None]
    bits = [floats.BITS["NVFP4"], floats.BITS["FP8"], UNQUANTIZED]
    elements = np.array([2 * layer.kv_heads * layer.head_dim for layer in facts.layers])
    cost = np.array([[round(TENTHS * b) for b in bits]]) * elements[:, None]
    loss = np.array([[layer.losses["NVFP4"], layer.losses["FP8"], 0.0] for layer in facts.layers])
    plan = solve(loss, cost, int(effective_bits * TENTHS * elements.sum() + 1e-6))
    layers = [replace(layer, format=names[k]) for layer, k in zip(facts.layers, plan.choice, strict=True)]
    return replace(facts, layers=layers)


def bits_of(facts: Facts) -> float:
    """Mean bits per element of the formats that `with_formats` chose."""
    elements = [2 * layer.kv_heads * layer.head_dim for layer in facts.layers]
    chosen = [floats.BITS[layer.format] if layer.format else UNQUANTIZED for layer in facts.layers]
    return sum(n * b for n, b in zip(elements, chosen, strict=True)) / sum(elements)
