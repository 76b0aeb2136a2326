"""Stage `fit-nuq`: calibration to codebooks, and the loss that every width would cost every channel.

Layers are shared out over the processes of a launch, and within a process over its cores, one thread each: so that no
sum depends on how many there are. A fitted layer lies in the run's `parts` as soon as it is done; what is there is not
fitted again, and the last step strings the parts together to `codebooks.safetensors` (`codebooks.py`).

A worker holds one layer at a time: its token sample (n tokens of keys, values and both Fishers) in the calibration's
types, of keys or values a copy in float64 that each option adds about four of the same size to while it is fitted, and
its ladders (2 kB a channel, role and option). Putting the parts together holds one tensor.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvcalib.calibration.statistics import Calibration, rope_pairs
from kvcalib.errors import InputError, NonFiniteActivations
from kvcalib.files import write_tensors
from kvcalib.launch import Launch
from kvcalib.quant.basis import Basis
from kvcalib.quant.fitting import FitOptions, fit_absolute, fit_relative, predicted_loss
from kvcalib.quant.fitting import uniform_quantizer as at_bits
from kvcalib.quant.packing import MAX_BITS
from kvcalib.rundir import CALIBRATION, CODEBOOKS, RunDir, fingerprint
from kvcalib.stages.codebooks import (
    ROLES,
    STAGE_VERSION,
    Choices,
    Codebooks,
    FitNuqSettings,
    Option,
    Options,
    Role,
    predicted_total,
    tensor_name,
)
from kvcalib.stages.progress import note, progress
from kvcalib.stages.threads import by_layer
from kvcalib.streamed import TensorFile, stream_tensors

__all__ = [
    "ROLES", "STAGE_VERSION", "Choices", "Codebooks", "FitNuqSettings", "Option", "Options", "Role", "channel_order",
    "exact_dtype", "fit_layer", "predicted_total", "run", "sample_without_sinks",
]  # fmt: skip
PARTS = "fit-nuq"
NEEDED = ("stages/fisher.json", CALIBRATION)


def run(run_dir: RunDir, settings: FitNuqSettings, here: Launch | None = None) -> Codebooks:
    """Fit every layer of the run's calibration; layers that a stopped run of the same settings fitted are kept.

    Args:
        here: the processes that share the layers; all of them call this. This one alone if None.
    """
    here = here or Launch()
    here.supply(run_dir.path, NEEDED)
    with here.holding("fit-nuq", run_dir.lock):
        recorded: dict[str, Any] = {}
        done = False
        with here.step("fit-nuq"):
            if here.first:
                recorded = _recorded(run_dir, settings)
                done = run_dir.up_to_date("fit-nuq", recorded)
        recorded, done = here.same([recorded, done])
        if done:
            note("fit-nuq: up to date")
            with here.step("fit-nuq"):
                if here.first:
                    _with_settings(run_dir, settings, recorded)
        else:
            _fit_and_join(run_dir, settings, recorded, here)
    here.supply(run_dir.path, ("stages/fit-nuq.json", CODEBOOKS))
    return Codebooks.load(run_dir)


def _recorded(run_dir: RunDir, settings: FitNuqSettings) -> dict[str, Any]:
    """What the codebooks depend on."""
    if settings.solver == "lloyd" and settings.format != "nuq":
        raise InputError(f"--solver lloyd fits nuq codebooks, --format is {settings.format!r}; drop one of the two")
    return {
        **settings.model_dump(mode="json", exclude={"key_bits", "value_bits"}),
        "calibration": fingerprint(run_dir.settings("fisher")),
        "stage_version": STAGE_VERSION,
    }


def _with_settings(run_dir: RunDir, settings: FitNuqSettings, recorded: dict[str, Any]) -> None:
    """Codebooks that are up to date, with the widths that `settings` name; nothing is fitted for that."""
    there = Codebooks.load(run_dir)
    if there.settings != settings:
        _join(run_dir, [run_dir.file(CODEBOOKS)], settings, recorded)


def _fit_and_join(run_dir: RunDir, settings: FitNuqSettings, recorded: dict[str, Any], here: Launch) -> None:
    with here.step("fit-nuq"):
        calibration, _ = Calibration.load(run_dir.file(CALIBRATION))
        # Refused before anything is written.
        sample_without_sinks(calibration, settings.sinks)
        if settings.value_basis == "pca":
            _check_gradients(calibration)
        if settings.feedback:
            _curvature(calibration, calibration.info.layers[0].index, "key")
    folder = here.in_turn("fit-nuq", lambda: run_dir.parts(PARTS, recorded, discard=True))
    layers = [shape.index for shape in calibration.info.layers]
    there = {layer for found in here.gather(_fitted(folder, layers)) for layer in found}
    left = [layer for layer in layers if layer not in there]
    if there and left:
        note(f"fit-nuq: {len(there)} of {len(layers)} layers are there, {len(left)} are left")

    def fit(layer: int) -> None:
        write_tensors(_part(folder, layer), fit_layer(calibration, layer, settings), {"layer": layer})
        show(len(_fitted(folder, layers)))  # what the other processes did counts too, where it can be seen

    with progress("fit-nuq", len(layers), "layers") as show:
        show(len(there))
        with here.step("fit-nuq"):
            by_layer(fit, here.mine(left), here.cores)
        show(len(layers))
    held = here.gather(_fitted(folder, layers))
    for layer in layers:
        if layer not in held[0]:
            rank = next(rank for rank, found in enumerate(held) if layer in found)
            here.fetch(_part(folder, layer), rank, _part(folder, layer))
    with here.step("fit-nuq"):
        if here.first:
            _join(run_dir, [_part(folder, layer) for layer in layers], settings, recorded)
    here.in_turn("fit-nuq", lambda: run_dir.drop_parts(PARTS))


def _part(folder: Path, layer: int) -> Path:
    return folder / f"layer-{layer}.safetensors"


def _fitted(folder: Path, layers: list[int]) -> list[int]:
    """The layers whose part is there, whole."""
    return [layer for layer in layers if _part(folder, layer).is_file()]


def _join(run_dir: RunDir, files: list[Path], settings: FitNuqSettings, recorded: dict[str, Any]) -> None:
    """Write `codebooks.safetensors` with the tensors of `files`."""
    sources = [TensorFile(path) for path in files]
    owner = {name: source for source in sources for name in source}

    def pieces(name: str) -> Iterable[Tensor]:
        return (owner[name][name],)

    specs = {name: source.specs[name] for name, source in owner.items()}
    stream_tensors(run_dir.output("fit-nuq", CODEBOOKS), specs, pieces, {"settings": settings.model_dump(mode="json")})
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
    """Ladder, weight and loss table of one layer's keys and values, and what else of `codebooks.py` they have."""
    fitted = {}
    for role in ROLES:
        points = _points(calibration, layer, role, settings)
        if role == "key":
            fitted[tensor_name(layer, role, "order")] = channel_order(calibration, layer)
        if points.basis is not None:
            fitted[tensor_name(layer, role, "basis")] = points.basis.matrix
        if settings.feedback and points.curvature is not None:
            fitted[tensor_name(layer, role, "curvature")] = points.curvature.float()
        fitted[tensor_name(layer, role, "weight")] = points.weight
        for place, option in enumerate(settings.options(role, *points.weight.shape)):
            ladder = _fit(points, role, option, settings)
            fitted[tensor_name(layer, role, "ladder", place)] = ladder
            fitted[tensor_name(layer, role, "loss", place)] = torch.stack(
                [
                    predicted_loss(
                        at_bits(ladder, bits, settings.relative(role), option.scope, option.outliers, points.weight),
                        points.x,
                        points.fisher,
                        exact_dtype(points.x.dtype),
                    )
                    for bits in range(MAX_BITS + 1)
                ]
            )
    return fitted


@dataclass(frozen=True)
class _Points:
    """What the codebooks of one layer's keys or values are fitted to, all of it along `basis`.

    Attributes:
        x, fisher: `[n, H, D]`, of sampled tokens without sinks. weight: `[H, D]`, mean Fisher of all tokens.
        curvature: `[H, D, D]` float64, None if nothing asks for it.
    """

    x: Tensor
    fisher: Tensor
    weight: Tensor
    curvature: Tensor | None
    basis: Basis | None = None


def _points(calibration: Calibration, layer: int, role: Role, settings: FitNuqSettings) -> _Points:
    data, keep = calibration.layer(layer), sample_without_sinks(calibration, settings.sinks)
    x, fisher = data[f"sample.{role}"][keep], data[f"sample.{role}_fisher"][keep]
    if not bool(torch.isfinite(x).all() and torch.isfinite(fisher).all()):
        raise NonFiniteActivations(
            f"fit-nuq: layer {layer}: the calibration's {role}s or their Fisher hold NaN or infinities; "
            "run `kvcalib fisher` again, with --dtype float32 or bfloat16"
        )
    turned = role == "value" and settings.value_basis == "pca"
    curvature = _curvature(calibration, layer, role) if turned or settings.feedback else None
    if not turned or curvature is None:
        weight = (data[f"{role}.fisher_sum"] / calibration.info.tokens).float()
        return _Points(x, fisher, weight, curvature)
    basis = Basis.principal(x)
    gradient = basis.rows_forth(data[f"sample.{role}_gradient"][keep])
    curvature = basis.curvature_forth(curvature)
    weight = curvature.diagonal(dim1=1, dim2=2).clamp(min=0).float()
    return _Points(basis.rows_forth(x), gradient.square(), weight, curvature, basis)


def _fit(points: _Points, role: Role, option: Option, settings: FitNuqSettings) -> Tensor:
    """Ladders `[H, D, 511]` float32 under one option."""
    options = FitOptions(settings.format, settings.weights, option.outliers, settings.qnorm, settings.solver)
    wide, weight = points.x.double().numpy(), points.fisher.double().numpy()
    fit = fit_relative if settings.relative(role) else fit_absolute
    granularity = settings.granularity if role == "key" else settings.value_granularity
    return fit(wide, weight, granularity, option.scope, options).float()


def _check_gradients(calibration: Calibration) -> None:
    """InputError if the calibration is too old to have gradients with their sign."""
    if f"layers.{calibration.info.layers[0].index}.sample.value_gradient" not in calibration.stored:
        raise InputError(
            f"fit-nuq: the calibration is of version {calibration.info.version}, whose sampled gradients have no sign, "
            "as values in a basis of their own need (version 7); run `kvcalib fisher` again with --overwrite, or pass "
            "--value-basis none"
        )


def _curvature(calibration: Calibration, layer: int, role: Role) -> Tensor:
    """`[H, D, D]` float64; InputError if the calibration is too old to have it."""
    found = calibration.curvature(layer, role)
    if found is None:
        raise InputError(
            f"fit-nuq: the calibration is of version {calibration.info.version}, which has no second moments of "
            "gradients, as error feedback needs (version 6); run `kvcalib fisher` again with --overwrite, or pass "
            "--no-feedback"
        )
    return found


def channel_order(calibration: Calibration, layer: int) -> Tensor:
    """`[D]` int64: the channels of a key with the two of each RoPE pair side by side, as kernels want them."""
    partner = next(shape.partner for shape in calibration.info.layers if shape.index == layer)
    return torch.tensor(rope_pairs(partner)).flatten()


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """The two-byte type in which a model of `dtype` keeps outliers and scales."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
