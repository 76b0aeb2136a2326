"""Stage `build`: codebooks and bits to an artifact."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from kvcalib import __version__
from kvcalib.artifact import store
from kvcalib.artifact.card import card
from kvcalib.artifact.check import check_tensors
from kvcalib.artifact.manifest import (
    Budget,
    LayerSpec,
    Manifest,
    Producer,
    RuntimeDefaults,
    TensorSpec,
)
from kvcalib.artifact.manifest import (
    Calibration as CalibrationRecord,
)
from kvcalib.calibration.statistics import Calibration, CalibrationInfo, rope_pairs
from kvcalib.errors import FolderInUse, InputError
from kvcalib.quant.quantizer import Quantizer
from kvcalib.rundir import CALIBRATION, CODEBOOKS, RunDir
from kvcalib.stages.allocators import is_exact
from kvcalib.stages.fit_nuq import ROLES, Codebooks, Options, Role, predicted_total
from kvcalib.stages.friendliness import measure
from kvcalib.stages.threads import threads


def run(
    run_dir: RunDir,
    out: Path,
    key_bits: int | None = None,
    value_bits: int | None = None,
    recent: int = 0,
    overwrite: bool = False,
    widths: dict[tuple[int, Role], Tensor] | None = None,
    budget: Budget | None = None,
    options: Options | None = None,
    planned_on: str | None = None,
) -> Manifest:
    """Build the artifact `out`; bits default to those that `fit-nuq` was given.

    Args:
        widths: by layer and role, a width per channel `[H, D]` (0..8, 0 meaning its mean) in place of one for all. A
            layer with 16 throughout stays exact: it is left out, and the model's own cache keeps it.
        budget: effective bits that were asked for and that the plan has, to be recorded.
        options: by layer and role, outliers and scope in place of those that `fit-nuq` was given.
        planned_on: the hash of the codebooks that `widths` were chosen for.

    Raises:
        InputError: a stage before has not run, or fitted no codebooks of an option. FolderInUse: `out` holds something
            else, another process is writing in the run, or has fitted it anew since `widths` were chosen.
    """
    with run_dir.lock(shared=True):
        if planned_on is not None and planned_on != run_dir.output_hash("fit-nuq", CODEBOOKS):
            raise FolderInUse(f"{run_dir.path}: its codebooks have changed since the widths were chosen; build again")
        codebooks = Codebooks.load(run_dir).under(options or {})
        calibration, _ = Calibration.load(run_dir.file(CALIBRATION))
    bits: dict[Role, int] = {
        "key": codebooks.settings.key_bits if key_bits is None else key_bits,
        "value": codebooks.settings.value_bits if value_bits is None else value_bits,
    }
    tensors: dict[str, Tensor] = {}
    layers = []
    exact = {layer for (layer, _), w in (widths or {}).items() if is_exact(w)}
    chosen_of: dict[int, dict[Role, int | Tensor]] = {
        layer: {role: (widths or {}).get((layer, role), bits[role]) for role in ROLES}
        for layer in codebooks.layers
        if layer not in exact
    }
    friendliness = {figures.index: figures.manifest() for figures in measure(codebooks, calibration, chosen_of)}
    for layer, chosen in chosen_of.items():
        specs = {}
        shape = next(s for s in calibration.info.layers if s.index == layer)
        pairs: dict[Role, Tensor | None] = {"key": torch.tensor(rope_pairs(shape.partner)), "value": None}
        for role in ROLES:
            quantizer = codebooks.quantizer(layer, role, chosen[role])
            with threads(1):
                loss = predicted_total(codebooks, layer, role, chosen[role])
            specs[role] = _spec(quantizer, loss, pairs[role])
            tensors.update(quantizer_tensors(quantizer, f"layers.{layer}.{role}"))
        layers.append(
            LayerSpec(
                index=layer,
                key=specs["key"],
                value=specs["value"],
                friendliness=friendliness[layer],
                sliding=shape.sliding,
            )
        )
    manifest = Manifest(
        producer=Producer(version=__version__),
        model=calibration.info.model,
        calibration=_calibration(calibration.info, len(calibration.tensors["sample.hash"])),
        fit=codebooks.settings.manifest(),
        runtime=RuntimeDefaults(sinks=codebooks.settings.sinks, recent=recent),
        budget=budget,
        layers=layers,
        tensors={},
        files={},
    )
    try:
        check_tensors(manifest, tensors)
    except ValueError as error:
        # No reader would take it; what the model computed is beyond what the format holds.
        raise InputError(f"{out}: cannot be built: {error}") from None
    return store.write(out, manifest, tensors, card(manifest), overwrite)


def quantizer_tensors(quantizer: Quantizer, prefix: str) -> dict[str, Tensor]:
    """The tensors that make up `quantizer` in an artifact; see docs/artifact.md."""
    tensors = {
        f"{prefix}.widths": quantizer.layout.widths,
        f"{prefix}.codebook": quantizer.codebook.ragged(),
        f"{prefix}.word": quantizer.layout.word,
        f"{prefix}.shift": quantizer.layout.shift,
        f"{prefix}.weight": quantizer.weight,
    }
    if quantizer.basis is not None:
        tensors[f"{prefix}.basis"] = quantizer.basis.matrix
    if quantizer.feedback is not None:
        tensors[f"{prefix}.feedback"] = quantizer.feedback.triangle
    return tensors


def _spec(quantizer: Quantizer, loss: float, pairs: Tensor | None) -> TensorSpec:
    heads, head_dim = quantizer.layout.widths.shape
    return TensorSpec(
        kv_heads=heads,
        head_dim=head_dim,
        words=quantizer.layout.words,
        segment=quantizer.layout.segment,
        group=16 if quantizer.layout.groups(pairs) else 0,
        scope=quantizer.scope,
        outliers=quantizer.outliers,
        feedback=quantizer.feedback is not None,
        basis=quantizer.basis is not None,
        mean_bits=quantizer.layout.bits / (heads * head_dim),
        predicted_loss=loss,
    )


def _calibration(info: CalibrationInfo, sampled: int) -> CalibrationRecord:
    return CalibrationRecord(
        data=info.data,
        sequences=info.sequences,
        tokens=info.tokens,
        sampled_tokens=sampled,
        seq_len=info.seq_len,
        seed=info.seed,
        nll=info.nll,
        fingerprint=info.fingerprint,
    )
