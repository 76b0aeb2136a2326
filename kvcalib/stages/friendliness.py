"""Stage `friendliness`: what storing does to each layer's tokens, and what that means for choosing which stay.

At 2, 3, 4, 8 and the chosen bits, per layer: relative errors of keys and values, how many heavy hitters quantized keys
still find, the weight of attention (alpha) and the share of the token budget that eviction should use. All of it from
the calibration file and the codebooks; `build` writes the same figures, at its own widths, into the artifact.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvcalib.allocation.contexts import SINKS, Contexts
from kvcalib.allocation.friendliness import (
    friendliness,
    quantiles,
    quantization_error,
    relative,
    token_friendliness,
)
from kvcalib.allocation.hitters import HEAVY, mean_where, overlap, quantized_attention
from kvcalib.allocation.shares import loss_curve, shares
from kvcalib.allocation.stakes import Stakes, output_fisher
from kvcalib.allocation.weights import attention_weight, score
from kvcalib.artifact.manifest import Friendliness
from kvcalib.calibration.statistics import Calibration, LayerShape
from kvcalib.files import read_json, write_bytes, write_json
from kvcalib.report.friendliness import LayerPoint, friendliness_plot
from kvcalib.rundir import CALIBRATION, CODEBOOKS, FRIENDLINESS, FRIENDLINESS_PLOT, RunDir
from kvcalib.stages.fit_nuq import ROLES, Codebooks, Role, exact_dtype, predicted_total, sample_without_sinks
from kvcalib.stages.progress import note, progress
from kvcalib.stages.threads import by_layer

WIDTHS = (2, 3, 4, 8)
STAGE_VERSION = 2


@dataclass(frozen=True)
class Errors:
    """Relative errors |x - x^| / |x| of one layer's sampled keys or values, sinks left out.

    Attributes:
        error: mean over tokens and heads. by_head: mean over tokens, `[H]`.
        quantiles: 10, 50 and 90 % quantile over tokens, `[H][3]`.
    """

    error: float
    by_head: list[float]
    quantiles: list[list[float]]


@dataclass(frozen=True)
class Selection:
    """What quantization means for choosing tokens, in the middle of the calibration's sequences.

    Attributes:
        overlap: share of the heavy hitters (top 20 % by mean attention per query) that quantized keys find too, mean
            over heads. by_head: the same, `[H]`.
        heavy_error, other_error: relative error of heavy hitters and of the other tokens, mean of keys and values.
        alpha: weight of attention in the layer's score (`allocation/weights.py`).
        share: the layer's part of the token budget, mean 1 over layers (`allocation/shares.py`). Both None where they
            were not asked for.
    """

    overlap: float
    by_head: list[float]
    heavy_error: float
    other_error: float
    alpha: float | None = None
    share: float | None = None


@dataclass(frozen=True)
class LayerFigures:
    """One layer at one choice of widths; `selection` is None where the calibration has no statistics for it."""

    index: int
    key: Errors
    value: Errors
    predicted_loss: float
    selection: Selection | None

    @property
    def friendliness(self) -> float:
        """The layer's figure in 0..1."""
        return friendliness(self.key.error, self.value.error)

    def manifest(self) -> Friendliness:
        """What an artifact records."""
        chosen = self.selection
        return Friendliness(
            key_error=self.key.error,
            value_error=self.value.error,
            key_by_head=self.key.by_head,
            value_by_head=self.value.by_head,
            overlap=None if chosen is None else chosen.overlap,
            alpha=None if chosen is None else chosen.alpha,
            share=None if chosen is None else chosen.share,
        )

    def record(self) -> dict[str, Any]:
        """The JSON of the stage's file."""
        return {
            "key_error": self.key.error,
            "value_error": self.value.error,
            "friendliness": self.friendliness,
            "predicted_loss": self.predicted_loss,
            "key": asdict(self.key),
            "value": asdict(self.value),
            "selection": None if self.selection is None else asdict(self.selection),
        }


def run(run_dir: RunDir) -> dict[str, Any]:
    """Measure every layer of the run and write `friendliness.json` and `friendliness.svg`.

    Returns:
        `{"chosen": [key bits, value bits], "layers": [{"index", "bits": {"2": figures, ...}, "chosen": figures}]}`;
        figures are what `LayerFigures.record` gives.
    """
    with run_dir.lock():
        codebooks = Codebooks.load(run_dir)
        chosen = codebooks.settings.bits
        pairs = sorted({(bits, bits) for bits in (*WIDTHS, *chosen.values())} | {(chosen["key"], chosen["value"])})
        recorded = {
            "codebooks": run_dir.output_hash("fit-nuq", CODEBOOKS),
            "widths": [list(pair) for pair in pairs],
            "chosen": list(chosen.values()),
            "stage_version": STAGE_VERSION,
        }
        if run_dir.up_to_date("friendliness", recorded):
            note("friendliness: up to date")
            return read_json(run_dir.file(FRIENDLINESS))
        calibration, _ = Calibration.load(run_dir.file(CALIBRATION))
        found = {}
        with progress("friendliness", len(pairs), "widths") as show:
            for done, (key_bits, value_bits) in enumerate(pairs, 1):
                widths: dict[Role, int | Tensor] = {"key": key_bits, "value": value_bits}
                weigh = [key_bits, value_bits] == list(chosen.values())
                every = dict.fromkeys(codebooks.layers, widths)
                found[key_bits, value_bits] = measure(codebooks, calibration, every, weigh)
                show(done)
        table = {
            "chosen": list(chosen.values()),
            "layers": [
                {
                    "index": layer,
                    "bits": {str(key): figures[i].record() for (key, value), figures in found.items() if key == value},
                    "chosen": found[chosen["key"], chosen["value"]][i].record(),
                }
                for i, layer in enumerate(codebooks.layers)
            ],
        }
        write_json(run_dir.output("friendliness", FRIENDLINESS), table)
        plot = _plot(calibration, chosen, found).encode()
        write_bytes(run_dir.output("friendliness", FRIENDLINESS_PLOT), plot)
        run_dir.finish("friendliness", recorded, [FRIENDLINESS, FRIENDLINESS_PLOT])
    return table


def measure(
    codebooks: Codebooks,
    calibration: Calibration,
    widths: Mapping[int, Mapping[Role, int | Tensor]],
    weigh: bool = True,
) -> list[LayerFigures]:
    """The figures of the layers in `widths`, each at one width, or one per channel `[H, D]`, for keys and for values.

    Args:
        weigh: whether to find alpha and share too; shares are of the budget of these layers.

    Layers are measured side by side, one thread each; a worker holds one layer of the calibration.
    """

    def one(layer: int) -> tuple[LayerFigures, Tensor | None]:
        return _layer(codebooks, calibration, layer, widths[layer], weigh)

    found = by_layer(one, list(widths), os.cpu_count() or 1)
    curves = [curve for _, curve in found if curve is not None]
    if not curves or len(curves) < len(found):
        return [figures for figures, _ in found]
    figures = []
    for (layer, _), share in zip(found, shares(curves), strict=True):
        assert layer.selection is not None
        figures.append(replace(layer, selection=replace(layer.selection, share=share)))
    return figures


def _layer(
    codebooks: Codebooks, calibration: Calibration, layer: int, widths: Mapping[Role, int | Tensor], weigh: bool
) -> tuple[LayerFigures, Tensor | None]:
    """One layer's figures without its share, and the loss that eviction costs it by share."""
    data = calibration.layer(layer)
    keep = sample_without_sinks(calibration, codebooks.settings.sinks)
    change, errors, figures = {}, {}, {}
    for role in ROLES:
        x = data[f"sample.{role}"]
        change[role] = quantization_error(codebooks.quantizer(layer, role, widths[role]), x, exact_dtype(x.dtype))
        errors[role] = relative(change[role], x)
        kept = errors[role][keep]
        figures[role] = Errors(float(kept.double().mean()), kept.double().mean(0).tolist(), quantiles(kept))
    loss = sum(predicted_total(codebooks, layer, role, widths[role]) for role in ROLES)
    shape = next(s for s in calibration.info.layers if s.index == layer)
    selection, curve = _selection(calibration, shape, data, codebooks.settings.sinks, change, errors, weigh)
    return LayerFigures(layer, figures["key"], figures["value"], loss, selection), curve


def _selection(
    calibration: Calibration,
    shape: LayerShape,
    data: Mapping[str, Tensor],
    sinks: int,
    change: Mapping[Role, Tensor],
    errors: Mapping[Role, Tensor],
    weigh: bool,
) -> tuple[Selection | None, Tensor | None]:
    """Overlap, errors and alpha of one layer, and its loss curve; None without statistics or without enough tokens."""
    info = calibration.info
    if "sample.attention_slope" not in data:
        return None, None
    where = calibration.tensors["sample.sequence"], calibration.tensors["sample.position"]
    contexts = Contexts.find(*where, info.seq_len // 2, shape.sliding, max(SINKS, sinks))
    if contexts is None:
        return None, None
    early = data["sample.attention_early"]
    drawn = quantized_attention(early, data["sample.attention_slope"], change["key"])
    exact, quantized = (contexts.gather(x) / contexts.queries[:, None] for x in (early, drawn))
    key, value = (contexts.gather(errors[role]) for role in ROLES)
    found = overlap(contexts, exact, quantized)
    heavy, both = contexts.best(exact, HEAVY), (key + value) / 2
    selection = Selection(
        overlap=float(found.mean()),
        by_head=found.tolist(),
        heavy_error=mean_where(both, heavy),
        other_error=mean_where(both, contexts.free[:, None] & ~heavy),
    )
    stakes = _stakes(calibration, shape, data, contexts, drawn, change["value"]) if weigh else None
    if stakes is None:
        return selection, None
    friendly = token_friendliness(key, value)
    alpha = attention_weight(contexts, quantized, friendly, stakes)
    curve = loss_curve(contexts, score(contexts, quantized, friendly, alpha), stakes)
    return replace(selection, alpha=alpha), curve


def _stakes(
    calibration: Calibration,
    shape: LayerShape,
    data: Mapping[str, Tensor],
    contexts: Contexts,
    drawn: Tensor,
    change: Tensor,
) -> Stakes | None:
    """What the tokens of `contexts` are worth; None if no sampled token tells what an output is worth.

    Args:
        drawn: `[n, H]`, early attention with quantized keys. change: `[n, H, D]`, what quantization does to values.
    """
    middle = calibration.info.seq_len // 2
    later = calibration.tensors["sample.position"] >= middle
    early, square = data["sample.attention_early"], data["sample.attention_later_square"]
    fisher = output_fisher(data["sample.value_fisher"][later], square[later])
    if fisher is None:
        return None
    group = shape.query_heads // shape.kv_heads
    queries = (calibration.info.seq_len - middle) * group
    scale = (fisher / 2).sqrt()
    return Stakes(
        mean=contexts.gather((data["sample.attention_sum"] - early).clamp(min=0) / queries),
        square=contexts.gather(square / queries),
        value=contexts.gather(data["sample.value"].float() * scale),
        noise=contexts.gather((change * scale).square().sum(-1)),
        drift=contexts.gather((drawn / early.clamp(min=torch.finfo(torch.float32).tiny) - 1).square()),
        group=group,
    )


def _plot(
    calibration: Calibration, chosen: dict[Role, int], found: Mapping[tuple[int, int], Sequence[LayerFigures]]
) -> str:
    """The plot of the run's figures."""
    bits = chosen["key"], chosen["value"]
    layers = [
        LayerPoint(
            index=figures.index,
            key_error=figures.key.error,
            value_error=figures.value.error,
            missed={
                pair[0]: 1 - chosen_then.overlap
                for pair, other in found.items()
                if pair[0] == pair[1] and (chosen_then := other[i].selection) is not None
            },
            alpha=None if figures.selection is None else figures.selection.alpha,
            share=None if figures.selection is None else figures.selection.share,
        )
        for i, figures in enumerate(found[bits])
    ]
    name = calibration.info.model.name.rstrip("/").rsplit("/", 1)[-1]
    return friendliness_plot(f"Friendliness of {name}", f"keys {bits[0]} bit, values {bits[1]} bit", layers)
