"""Stage `friendliness`: relative quantization error of each layer's tokens, at 2, 3, 4, 8 and the chosen bits."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kvcalib.allocation.friendliness import friendliness, relative_error
from kvcalib.calibration.statistics import Calibration
from kvcalib.files import write_json
from kvcalib.rundir import CALIBRATION, CODEBOOKS, FRIENDLINESS, RunDir
from kvcalib.stages.fit_nuq import ROLES, Codebooks, Role, exact_dtype, predicted_total, sample_without_sinks
from kvcalib.stages.progress import note, progress

WIDTHS = (2, 3, 4, 8)
STAGE_VERSION = 1


def run(run_dir: RunDir) -> dict[str, Any]:
    """Measure every layer of the run and write `friendliness.json`.

    Returns:
        `{"layers": [{"index", "bits": {"2": {"key_error", "value_error", "friendliness", "predicted_loss"}, ...}}]}`
    """
    codebooks = Codebooks.load(run_dir)
    chosen = tuple(sorted({*WIDTHS, codebooks.settings.key_bits, codebooks.settings.value_bits}))
    record = run_dir.record("fit-nuq") or {}
    recorded = {"codebooks": record["outputs"][CODEBOOKS], "widths": list(chosen), "stage_version": STAGE_VERSION}
    with run_dir.lock():
        if run_dir.up_to_date("friendliness", recorded):
            from kvcalib.files import read_json

            note("friendliness: up to date")
            return read_json(run_dir.file(FRIENDLINESS))
        calibration, _ = Calibration.load(run_dir.file(CALIBRATION))
        layers = []
        with progress("friendliness", len(codebooks.layers), "layers") as show:
            for done, layer in enumerate(codebooks.layers, 1):
                layers.append({"index": layer, "bits": _layer(codebooks, calibration, layer, chosen)})
                show(done)
        table = {"layers": layers}
        write_json(run_dir.file(FRIENDLINESS), table)
        run_dir.finish("friendliness", recorded, [FRIENDLINESS])
    return table


def layer_error(codebooks: Codebooks, calibration: Calibration, layer: int, role: Role, bits: int | Tensor) -> float:
    """Mean relative error of one layer's sampled keys or values (sinks left out) at one width or one per channel."""
    keep = sample_without_sinks(calibration, codebooks.settings.sinks)
    x = calibration.layer(layer)[f"sample.{role}"][keep]
    return float(relative_error(codebooks.quantizer(layer, role, bits), x, exact_dtype(x.dtype)).double().mean())


def _layer(codebooks: Codebooks, calibration: Calibration, layer: int, widths: tuple[int, ...]) -> dict[str, Any]:
    table = {}
    for bits in widths:
        key, value = (layer_error(codebooks, calibration, layer, role, bits) for role in ROLES)
        loss = sum(predicted_total(codebooks, layer, role, bits) for role in ROLES)
        table[str(bits)] = {
            "key_error": key,
            "value_error": value,
            "friendliness": friendliness(key, value),
            "predicted_loss": loss,
        }
    return table
