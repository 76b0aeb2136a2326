"""Stage `tiers`: several artifacts of one run to adaptive widths, a folder that `attach(..., adaptive=)` takes."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field

from kvcalib.allocation.tiers import Choice, mean_bits, meet
from kvcalib.artifact.store import CARD, MANIFEST, TENSORS
from kvcalib.calibration.statistics import Calibration
from kvcalib.errors import FolderInUse, InputError
from kvcalib.files import hash_file
from kvcalib.folders import recover, replacing_folder
from kvcalib.quant.quantizer import Quantizer
from kvcalib.rundir import CALIBRATION, RunDir
from kvcalib.runtime.adaptive import Signal
from kvcalib.runtime.loader import Artifact, load
from kvcalib.runtime.pools import MOST_TIERS
from kvcalib.runtime.tiers import RULE, LayerThresholds, Rule, same_basis

POSITION_BITS = 32
TAG_BITS = 8


class TierSettings(BaseModel):
    """Settings of the stage."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    budget: float = Field(gt=0, description="Mean effective bits of packed tokens, tags and positions included.")
    signal: Signal = "late"


def run(
    run_dir: RunDir, artifacts: Sequence[str | Path], out: Path, settings: TierSettings, overwrite: bool = False
) -> Rule:
    """Find the thresholds that meet the budget on the calibration text, and write `out`.

    Args:
        artifacts: built from `run_dir`, in any order; a token gets one of them for its key and one for its value.

    Raises:
        InputError: too few or too many, of other calibrations, or no plan for the budget. FolderInUse: `out` holds
            something else.
    """
    if not 2 <= len(artifacts) <= MOST_TIERS:
        raise InputError(f"tiers: {len(artifacts)} artifacts are given, expected 2 to {MOST_TIERS}")
    calibration, _ = Calibration.load(run_dir.file(CALIBRATION))
    tiers = sorted((load(path) for path in artifacts), key=_row_bits)
    for tier in tiers:
        if tier.manifest.calibration.fingerprint != calibration.info.fingerprint:
            raise InputError(
                f"tiers: {tier.path} was built from another calibration than {run_dir.path} holds; "
                f"build it with `kvcalib build {run_dir.path}`"
            )
        if sorted(tier.quantizers) != sorted(tiers[0].quantizers):
            raise InputError(f"tiers: {tier.path} quantizes other layers than {tiers[0].path}")
        for layer, pair in tier.quantizers.items():
            if not same_basis(pair["value"], tiers[0].quantizers[layer]["value"]):
                raise InputError(
                    f"tiers: values of layer {layer} are kept in another basis in {tier.path} than in {tiers[0].path}; "
                    "build all of them from one `kvcalib fit-nuq`"
                )
    names = [(layer, role) for layer in sorted(tiers[0].quantizers) for role in ("key", "value")]
    choices = [_choice(calibration, tiers, layer, role, settings.signal) for layer, role in names]
    elements = sum(tiers[0].quantizers[layer][role].layout.widths.numel() for layer, role in names)
    fixed = POSITION_BITS + TAG_BITS * len(tiers[0].quantizers)
    try:
        limits = meet(choices, settings.budget * elements - fixed)
    except InputError:
        low, high = ((sum(c.bits[i] for c in choices) + fixed) / elements for i in (0, -1))
        raise InputError(
            f"tiers: the budget is {settings.budget:g} effective bits, these artifacts take {low:.3f} to {high:.3f}; "
            "choose one between, or other artifacts"
        ) from None
    found = dict(zip(names, limits, strict=True))
    total = sum(mean_bits(choice, x) for choice, x in zip(choices, limits, strict=True))
    means = {layer: float(choice.signal.mean()) for (layer, _), choice in zip(names, choices, strict=True)}
    rule = Rule(
        signal=settings.signal,
        window=calibration.info.window,
        bits=(total + fixed) / elements,
        tiers=[hash_file(Path(tier.path or "") / MANIFEST) for tier in tiers],
        layers=[
            LayerThresholds(
                index=layer,
                key=found[layer, "key"],
                value=found[layer, "value"],
                mean=max(means[layer], 1e-30),
            )
            for layer in sorted(tiers[0].quantizers)
        ],
    )
    _write(out, rule, [Path(tier.path or "") for tier in tiers], overwrite)
    return rule


def _row_bits(artifact: Artifact) -> int:
    return sum(row_bits(quantizer) for pair in artifact.quantizers.values() for quantizer in pair.values())


def row_bits(quantizer: Quantizer) -> int:
    """Bits of everything that is stored of one token."""
    spec = quantizer.row_spec(torch.float16)
    return sum(8 * torch.Size(shape).numel() * dtype.itemsize for shape, dtype in spec.values())


def _choice(calibration: Calibration, tiers: list[Artifact], layer: int, role: str, signal: Signal) -> Choice:
    sample = calibration.layer(layer)
    name = "sample.attention_late" if signal == "late" else "sample.attention_peak"
    if name not in sample:
        raise InputError(
            f"tiers: the calibration has no {name.removeprefix('sample.')} of layer {layer}, an older kvcalib made it; "
            "run `kvcalib fisher` again with --overwrite"
        )
    # Later tokens were not seen by all queries that count.
    whole = calibration.tensors["sample.position"] <= calibration.info.seq_len - calibration.info.window
    if not bool(whole.any()):
        raise InputError(
            f"tiers: no sampled token was seen by the {calibration.info.window} queries of the window; "
            "calibrate on longer sequences"
        )
    heads = sample[name][whole]
    return Choice(
        heads.mean(1) if signal == "late" else heads.amax(1),
        [row_bits(tier.quantizers[layer][role]) for tier in tiers],
        [_predicted(tier, layer, role) for tier in tiers],
    )


def _predicted(artifact: Artifact, layer: int, role: str) -> float:
    spec = next(spec for spec in artifact.manifest.layers if spec.index == layer)
    return spec.key.predicted_loss if role == "key" else spec.value.predicted_loss


def _write(out: Path, rule: Rule, tiers: list[Path], overwrite: bool) -> None:
    """Write the folder; it appears complete or not at all."""
    recover(out)
    if out.exists():
        _check_replaceable(out, rule, overwrite)
    with replacing_folder(out, lambda: _check_replaceable(out, rule, overwrite)) as temporary:
        for number, tier in enumerate(tiers):
            (temporary / f"tier-{number}").mkdir()
            for name in (MANIFEST, TENSORS, CARD):
                shutil.copyfile(tier / name, temporary / f"tier-{number}" / name)
        (temporary / RULE).write_bytes(rule.encode())


def _check_replaceable(out: Path, rule: Rule, overwrite: bool) -> bool:
    """True if what is at `out` may be replaced by `rule`; FolderInUse if not."""
    expected = {RULE, *(f"tier-{i}" for i in range(MOST_TIERS))}
    if not out.is_dir():
        raise FolderInUse(f"{out}: is a file, expected a folder for the adaptive widths; choose another --out")
    present = {path.name for path in out.iterdir()}
    if present and (RULE not in present or present - expected):
        strange = sorted(present - expected)[:3] or sorted(present)[:3]
        raise FolderInUse(f"{out}: holds {', '.join(strange)}, no adaptive widths; choose another --out")
    if present and (out / RULE).read_bytes() != rule.encode() and not overwrite:
        raise FolderInUse(f"{out}: holds other adaptive widths; choose another --out, or pass --overwrite")
    return True
