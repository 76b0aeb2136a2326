"""What in a model makes its KV cache hard to quantize, layer by layer, and what to do about it. Arithmetic alone.

Four things break quantizers that were not fitted to the model at hand: a large bias of the key projection (Qwen2.5:
norms of 605 and 921 against a median of 22, llama.cpp#21385), channels whose mean is far from zero against their
spread, attention that rests on the first token, and heads with heavy tails.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FAR_BIAS = 5.0
"""Times the median norm from which on a layer's key bias is named."""
OFFSET = 3.0
"""|mean| over standard deviation from which on a channel is dominated by its offset."""
MANY_OFFSETS = 0.1
"""Share of such channels from which on a layer is named."""
SINK = 0.3
"""Share of the attention on the first token from which on a layer is named."""
BEYOND = 4.0
"""Standard deviations from which on an element is an outlier: 0.006 % of a normal variable's."""
HEAVY = 0.005
"""Share of outliers from which on a head is named."""


@dataclass(frozen=True)
class LayerDiagnosis:
    """One layer.

    Attributes:
        key_bias: norm of the key projection's bias, None if it has none.
        offsets: `[H, D]`, |mean| over standard deviation of each key channel before RoPE.
        sink: share of later queries' attention that the first token draws, mean over queries and heads; None if no
            first token was seen. sink_by_head: the same of each KV head.
        key_outliers, value_outliers: share of elements beyond `BEYOND` standard deviations, of each KV head.
    """

    index: int
    key_bias: float | None
    offsets: Tensor
    sink: float | None
    sink_by_head: Sequence[float]
    key_outliers: Sequence[float]
    value_outliers: Sequence[float]

    @property
    def offset_share(self) -> float:
        """Share of key channels that are dominated by their offset."""
        return float((self.offsets > OFFSET).double().mean())

    @property
    def worst_offset(self) -> float:
        """The largest |mean| over standard deviation."""
        return float(self.offsets.max())


def offset_ratio(total: Tensor, squares: Tensor, count: int) -> Tensor:
    """|mean| over standard deviation, from float64 sums of x and of x squared over `count` tokens, of any shape."""
    mean = total.double() / count
    variance = (squares.double() / count - mean.square()).clamp(min=0)
    # A channel that never moves has no spread at all: what rounding leaves of it stands in.
    floor = (1e-6 * mean.abs()).clamp(min=torch.finfo(torch.float64).tiny)
    return mean.abs() / torch.maximum(variance.sqrt(), floor)


def key_outliers(x: Tensor) -> list[float]:
    """Share of elements of keys `[n, H, D]` beyond `BEYOND` standard deviations of their own channel, by head."""
    x = x.double()
    far = (x - x.mean(0)).abs() > BEYOND * x.std(0, correction=0)
    return far.double().mean((0, 2)).tolist()


def value_outliers(x: Tensor) -> list[float]:
    """The same of values `[n, H, D]`, beyond those of their head: values of one token share a scale."""
    x = x.double().transpose(0, 1).flatten(1)
    far = (x - x.mean(1, keepdim=True)).abs() > BEYOND * x.std(1, correction=0, keepdim=True)
    return far.double().mean(1).tolist()


def sink_share(drawn: Tensor, queries: int, group: int) -> list[float]:
    """Share of the attention of `queries` later queries, each of `group` heads, that first tokens drew, by KV head.

    Args:
        drawn: `[n, H]`, attention that each of n first tokens drew from these queries, summed over queries and group.
    """
    return (drawn.double() / (queries * group)).mean(0).tolist() if len(drawn) else []


def bias_median(layers: Sequence[LayerDiagnosis]) -> float | None:
    """Median norm of the key biases; None if there are none."""
    known = [layer.key_bias for layer in layers if layer.key_bias is not None]
    return statistics.median(known) if known else None


def advice(layers: Sequence[LayerDiagnosis]) -> list[str]:
    """What to do, in plain sentences: one for every finding, or one that there is none."""
    says = [*_biases(layers), *_offsets(layers), *_sinks(layers), *_tails(layers)]
    if not says:
        says.append("Nothing stands out: the default settings will do.")
    if bias_median(layers) is None:
        says.append(
            "No key projection (k_proj) has a bias: the collapse of Qwen2.5 under int caches is not to be feared."
        )
    return says


def _biases(layers: Sequence[LayerDiagnosis]) -> list[str]:
    middle = bias_median(layers)
    if middle is None:
        return []
    return [
        f"layer {layer.index}: key bias {layer.key_bias:.3g}, {layer.key_bias / middle:.0f} times the median of "
        f"{middle:.3g}: per-channel offsets are needed. kvcalib's codebooks have them; caches with one scale per token "
        "(int, q4_0) will collapse here."
        for layer in layers
        if layer.key_bias is not None and middle > 0 and layer.key_bias > FAR_BIAS * middle
    ]


def _offsets(layers: Sequence[LayerDiagnosis]) -> list[str]:
    named = [layer for layer in layers if layer.offset_share >= MANY_OFFSETS]
    if not named:
        return []
    worst = max(named, key=lambda layer: layer.worst_offset)
    most = max(layer.offset_share for layer in named)
    return [
        f"{_which(named)}: up to {100 * most:.0f} % of the key channels lie farther from zero than {OFFSET:g} standard "
        f"deviations (layer {worst.index}: {worst.worst_offset:.0f}). Keep keys per channel and before RoPE, as "
        "kvcalib does (--granularity channel, the default); one codebook per head or layer spends its levels "
        "on the offsets."
    ]


def _sinks(layers: Sequence[LayerDiagnosis]) -> list[str]:
    named = [layer for layer in layers if layer.sink is not None and layer.sink >= SINK]
    if not named:
        return []
    most = max(named, key=lambda layer: layer.sink or 0.0)
    return [
        f"{_which(named)}: the first token draws {100 * (most.sink or 0):.0f} % of the attention (layer {most.index}). "
        "Keep the first tokens exact: kvcalib fit-nuq RUN --sinks 4."
    ]


def _tails(layers: Sequence[LayerDiagnosis]) -> list[str]:
    says = []
    for role, get in (("key", "key_outliers"), ("value", "value_outliers")):
        heads = [(share, layer.index, h) for layer in layers for h, share in enumerate(getattr(layer, get))]
        heavy = [entry for entry in heads if entry[0] >= HEAVY]
        if heavy:
            share, index, head = max(heavy)
            says.append(
                f"{len(heavy)} of {len(heads)} {role} heads have heavy tails, most of all layer {index}, head {head}: "
                f"{100 * share:.2g} % of its elements lie beyond {BEYOND:g} standard deviations. Let the budget choose "
                "outliers: kvcalib fit-nuq RUN --choices."
            )
    return says


def _which(layers: Sequence[LayerDiagnosis]) -> str:
    names = [str(layer.index) for layer in layers]
    if len(names) == 1:
        return f"layer {names[0]}"
    if len(names) > 8:
        return f"{len(names)} layers, {names[0]} to {names[-1]}"
    return f"layers {', '.join(names[:-1])} and {names[-1]}"
