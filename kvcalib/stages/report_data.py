"""What a report shows, taken out of artifacts, calibrations and measures as plain numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from kvcalib.artifact.card import refinement
from kvcalib.artifact.manifest import LayerSpec, Manifest, TensorSpec
from kvcalib.calibration.statistics import Calibration, CalibrationInfo
from kvcalib.evaluation.comparison import Comparison, Interval, Row
from kvcalib.evaluation.perplexity import Evaluation
from kvcalib.model.footprint import Footprint
from kvcalib.quant.quantizer import Quantizer
from kvcalib.report.data import CacheLayer, Contender, Density, Estimate, Layer, Measurement, Memory, Recall
from kvcalib.runtime.loader import Artifact
from kvcalib.stages.fit_nuq import Role, exact_dtype
from kvcalib.stages.options import POSITION_BITS, row_bits

T = TypeVar("T")
OURS = "kvcalib"
SHOWN_LAYERS, BINS = 4, 72
INSIDE = 0.998
"""Share of the sampled values that a histogram covers."""
RULE = (
    "Of {layers}, the key channel with the greatest mean Fisher, the key channel with the median one, and the value "
    "channel with the greatest. Centroids are fitted to the values as weighted by Fisher."
)


def layers(artifact: Artifact) -> list[Layer]:
    """The artifact's layers."""
    found = []
    for spec in artifact.manifest.layers:
        pair = artifact.quantizers[spec.index]
        quantizers, specs = (pair["key"], pair["value"]), (spec.key, spec.value)
        friendly = spec.friendliness
        found.append(
            Layer(
                index=spec.index,
                bits=(spec.key.mean_bits, spec.value.mean_bits),
                by_head=_two([q.layout.widths.float().mean(1).tolist() for q in quantizers]),
                outliers=_two([_exact_share(s) for s in specs]),
                loss=(spec.key.predicted_loss, spec.value.predicted_loss),
                fisher=_two([q.weight.flatten().tolist() for q in quantizers]),
                error=None if friendly is None else (friendly.key_error, friendly.value_error),
                overlap=None if friendly is None else friendly.overlap,
                alpha=None if friendly is None else friendly.alpha,
                share=None if friendly is None else friendly.share,
            )
        )
    return found


def memory(artifact: Artifact, size: Footprint | None) -> Memory:
    """Bytes per token of every layer, at 16 bits and in the artifact; layers that it leaves out stay at 16 bits."""
    position = POSITION_BITS / 8
    found = []
    for spec in artifact.manifest.layers:
        exact = 2.0 * sum(s.kv_heads * s.head_dim for s in (spec.key, spec.value))
        packed = sum(row_bits(q) for q in artifact.quantizers[spec.index].values()) / 8
        found.append(CacheLayer(exact, packed + position, spec.sliding))
        position = 0.0  # once for all layers
    if size is None:
        return Memory(found)
    for index, (heads, head_dim, window) in size.layers.items():
        if index not in artifact.quantizers:
            exact = 4.0 * heads * head_dim
            found.append(CacheLayer(exact, exact, window))
    return Memory(found, 2.0 * size.parameters, size.context)


def densities(artifact: Artifact, calibration: Calibration) -> tuple[list[Density], str]:
    """Histograms of chosen channels of chosen layers, and the rule by which they were chosen."""
    specs = artifact.manifest.layers
    shown = [specs[i] for i in _evenly(len(specs), SHOWN_LAYERS)]
    found = [one for spec in shown for one in _of_layer(artifact, spec, calibration)]
    every = "every layer" if len(shown) == len(specs) else f"{len(shown)} of {len(specs)} layers, evenly spaced"
    return found, RULE.format(layers=every)


def _of_layer(artifact: Artifact, spec: LayerSpec, calibration: Calibration) -> list[Density]:
    data = calibration.layer(spec.index)
    found = []
    roles: tuple[Role, ...] = ("key", "value")
    for role in roles:
        quantizer = artifact.quantizers[spec.index][role]
        x, fisher = quantizer.along(data[f"sample.{role}"]), data[f"sample.{role}_fisher"]
        if quantizer.basis is not None:
            fisher = quantizer.along(data[f"sample.{role}_gradient"]).square()
        normal = _normal(quantizer, x) if quantizer.relative else (x.float(), torch.ones(x.shape[0], x.shape[1]))
        order = quantizer.weight.flatten().argsort(descending=True, stable=True)
        chosen = [(int(order[0]), "greatest Fisher")]
        if role == "key":
            chosen.append((int(order[len(order) // 2]), "median Fisher"))
        for place, why in chosen:
            head, channel = divmod(place, quantizer.weight.shape[1])
            values = normal[0][:, head, channel]
            weight = fisher[:, head, channel] * normal[1][:, head].square()
            width = int(quantizer.layout.widths[head, channel])
            centroids = quantizer.codebook.centroids[head, channel, : 1 << width].tolist()
            unit = _unit(role, quantizer)
            found.append(_density(spec.index, role, head, channel, why, width, values, weight, centroids, unit))
    return found


def _unit(role: Role, quantizer: Quantizer) -> str:
    if role == "key":
        return "key, before rotation"
    return "value, relative to its token's scale" if quantizer.basis is None else "value, along the head's own axis"


def _normal(quantizer: Quantizer, x: Tensor) -> tuple[Tensor, Tensor]:
    """Values `[n, H, D]` relative to their group's zero and scale, as the codebook has them; the scale `[n, H]`."""
    rows = quantizer.encode(x, exact_dtype(x.dtype))
    heads = x.shape[1]
    zero, scale = (rows[name].float().expand(-1, heads) for name in ("zero", "scale"))
    return (x.float() - zero[..., None]) / torch.where(scale > 0, scale, 1.0)[..., None], scale


def _density(
    layer: int,
    role: Role,
    head: int,
    channel: int,
    why: str,
    width: int,
    values: Tensor,
    weight: Tensor,
    centroids: list[float],
    unit: str,
) -> Density:
    x, w = values.double().numpy(), weight.double().numpy()
    low, high = np.quantile(x, [(1 - INSIDE) / 2, (1 + INSIDE) / 2])
    low, high = min(low, *centroids, low), max(high, *centroids, high)
    margin = 0.03 * (high - low) or 1.0
    edges = np.linspace(low - margin, high + margin, BINS + 1)
    counts, _ = np.histogram(x, edges)
    weighted, _ = np.histogram(x, edges, weights=w)
    return Density(
        layer, role, head, channel, why, width, edges.tolist(), (counts / len(x)).tolist(),
        (weighted / max(w.sum(), 1e-300)).tolist(), centroids, float(1 - counts.sum() / len(x)), unit,
    )  # fmt: skip


def from_comparison(found: Comparison) -> Measurement:
    """The contenders of a comparison."""
    return Measurement(
        data=found.data,
        samples=found.samples,
        seq_len=found.seq_len,
        fp16_nll=found.fp16_nll,
        fp16_bytes=found.rows[0].fp16_cache_bytes if found.rows else 0.0,
        protocol=found.protocol.rstrip("."),
        contenders=[_contender(row) for row in found.rows],
        about={
            "model": f"{found.model}, {found.dtype}",
            **found.protocols,
            "seed": str(found.seed),
            "machine": found.machine,
            "versions": ", ".join(f"{name} {version}" for name, version in sorted(found.versions.items())),
            "measured": found.created,
            "sources": "; ".join(dict.fromkeys(f"{_family(r)}: {r.source}" for r in found.rows if r.source)),
        },
        notes=[line.rstrip(".") for line in found.notes],
    )


def _contender(row: Row) -> Contender:
    tokens = row.greedy
    return Contender(
        name=row.name,
        family=_family(row),
        ours=row.source == OURS,
        bits=row.effective_bits,
        cache_bytes=row.cache_bytes,
        ppl=row.ppl,
        delta_nll=_estimate(row.delta_nll),
        kld=_estimate(row.kld),
        top1=_estimate(row.top1_agreement),
        kld_p99=row.kld_p99,
        prefill_seconds=row.prefill_seconds,
        decode_seconds=row.decode_seconds,
        peak_bytes=row.peak_bytes,
        greedy_agreement=None if tokens is None else tokens.agreement,
        greedy_first=None if tokens is None else tokens.first_difference,
        tasks=row.tasks or {},
        recall=[
            Recall(p.kind, p.length, p.depth, p.exact if p.kind == "passkey" else p.tokens, p.nll, p.blind_nll)
            for p in row.recall or ()
        ],
        failed=row.failed,
    )


def _family(row: Row) -> str:
    return OURS if row.source == OURS else row.name.split(":")[0]


def _estimate(found: Interval) -> Estimate:
    return Estimate(found.value, found.low, found.high)


def from_evaluations(found: Sequence[Evaluation]) -> list[Measurement]:
    """The same of `eval` without contenders; what was measured alike stands together."""
    groups: dict[tuple[object, ...], list[Evaluation]] = {}
    for one in found:
        if one.policy is None and one.adaptive is None:
            groups.setdefault((one.tokens, one.seq_len, one.protocol, one.sinks, one.recent), []).append(one)
    return [
        Measurement(
            data="evaluation text",
            samples=max(1, rows[0].tokens // rows[0].seq_len),
            seq_len=rows[0].seq_len,
            fp16_nll=rows[0].fp16_nll,
            fp16_bytes=rows[0].fp16_cache_bytes,
            protocol=f"{rows[0].protocol}; {rows[0].sinks} sinks, {rows[0].recent} recent, {rows[0].prefill} prefill",
            contenders=[
                _unquantized(rows[0]),
                *(
                    Contender(
                        name=Path(one.artifact).name,
                        family=OURS,
                        ours=True,
                        bits=one.effective_bits,
                        cache_bytes=one.cache_bytes,
                        ppl=one.ppl,
                        delta_nll=Estimate(one.delta_nll),
                        kld=Estimate(one.kld),
                        top1=Estimate(one.top1_agreement),
                    )
                    for one in rows
                ),
            ],
            about={"model's dtype": rows[0].dtype},
        )
        for rows in groups.values()
    ]


def _unquantized(one: Evaluation) -> Contender:
    zero = Estimate(0.0)
    ppl = math.exp(min(one.fp16_nll, 700.0))
    return Contender("fp16", "fp16", False, 16.0, one.fp16_cache_bytes, ppl, zero, zero, Estimate(1.0))


def provenance(
    manifest: Manifest | None, info: CalibrationInfo | None, measurements: Sequence[Measurement]
) -> dict[str, Mapping[str, str]]:
    """Groups of names and values."""
    found: dict[str, Mapping[str, str]] = {}
    if manifest is not None:
        found["Artifact"] = {
            "made by": f"kvcalib {manifest.producer.version}, format version {manifest.format_version}",
            "sha256 of tensors": manifest.files.get("tensors.safetensors", ""),
            "codebooks": f"{manifest.fit.format}, keys per {manifest.fit.key_granularity}, values per "
            f"{manifest.fit.value_granularity}, weights {manifest.fit.weights}, {manifest.fit.solver} solver",
            **({} if manifest.refined is None else {"refined": refinement(manifest.refined)}),
            "exact tokens": f"{manifest.runtime.sinks} sinks, {manifest.runtime.recent} recent",
            "layers": f"{len(manifest.layers)} of {manifest.model.num_hidden_layers} quantized",
        }
    model = manifest.model if manifest else info.model if info else None
    if model is not None:
        found["Model"] = {
            "name": model.name,
            "revision": model.revision or "not recorded",
            "type": f"{model.model_type}, {model.num_hidden_layers} layers, hidden size {model.hidden_size}",
            "sha256 of weights": model.weights_sha256,
        }
    source = manifest.calibration if manifest else info
    if source is not None:
        found["Calibration"] = {
            "text": source.data,
            "tokens": f"{source.tokens} in {source.sequences} sequences of {source.seq_len}",
            "seed": str(source.seed),
            "NLL, unquantized": f"{source.nll:.4f} nats per token",
            "fingerprint": source.fingerprint,
        }
    for where in measurements:
        title = f"Measured on {where.data}, {where.samples} × {where.seq_len} tokens"
        found[title] = {"protocol": where.protocol, **{n: v for n, v in where.about.items() if v}}
    return found


def _exact_share(spec: TensorSpec) -> float:
    groups = spec.kv_heads if spec.scope == "head" else 1
    return spec.outliers * groups / (spec.kv_heads * spec.head_dim)


def _evenly(count: int, most: int) -> list[int]:
    if count <= most:
        return list(range(count))
    return [round(k * (count - 1) / (most - 1)) for k in range(most)]


def _two(values: Sequence[T]) -> tuple[T, T]:
    first, second = values
    return first, second
