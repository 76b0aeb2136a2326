"""What a report is made of, as plain numbers; `stages/report.py` fills it in.

Losses are in nats per token, sizes in bytes, times in seconds. A field that is None was not measured; its section says
which command would.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Estimate:
    """A mean, and its 95 % interval where there is one."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Recall:
    """Retrieval at one length and depth: `share` of what was to be recalled, 0 to 1, and its NLL.

    Attributes:
        blind: NLL of the unquantized model whose prompt does not hold what is to be recalled.
    """

    kind: str
    length: int
    depth: float
    share: float
    nll: float
    blind: float | None = None


@dataclass(frozen=True)
class Contender:
    """One way to keep the cache, measured.

    Attributes:
        family: what its points are joined by, and what the legend says; ours: kvcalib's artifacts.
        failed: why it could not be measured; its other figures then mean nothing.
    """

    name: str
    family: str
    ours: bool
    bits: float
    cache_bytes: float
    ppl: float
    delta_nll: Estimate
    kld: Estimate
    top1: Estimate
    kld_p99: float | None = None
    prefill_seconds: float | None = None
    decode_seconds: float | None = None
    peak_bytes: float | None = None
    greedy_agreement: float | None = None
    greedy_first: float | None = None
    tasks: Mapping[str, float] = field(default_factory=dict)
    recall: Sequence[Recall] = ()
    failed: str | None = None


@dataclass(frozen=True)
class Measurement:
    """Contenders on one model and text.

    Attributes:
        fp16_nll: of the unquantized model. fp16_bytes: its cache of one sequence, at 16 bits an element.
        about: further facts for the section on provenance, name and value. notes: what a reader should know.
    """

    data: str
    samples: int
    seq_len: int
    fp16_nll: float
    fp16_bytes: float
    protocol: str
    contenders: Sequence[Contender]
    about: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Layer:
    """One layer of an artifact. Per role, keys first: `(key, value)`.

    Attributes:
        bits: mean code width. by_head: the same of each KV head.
        outliers: exact share of a token's elements. loss: predicted.
        fisher: mean Fisher of each channel, heads one after another.
        error: mean relative error of stored tokens. alpha, share: what eviction should use.
    """

    index: int
    bits: tuple[float, float]
    by_head: tuple[Sequence[float], Sequence[float]]
    outliers: tuple[float, float]
    loss: tuple[float, float]
    fisher: tuple[Sequence[float], Sequence[float]]
    error: tuple[float, float] | None = None
    overlap: float | None = None
    alpha: float | None = None
    share: float | None = None


@dataclass(frozen=True)
class Density:
    """A channel's sampled values against its codebook.

    Attributes:
        edges: of the histogram's bins, one more than `density`.
        density, weighted: share of the tokens, and of the Fisher weight, in each bin.
        centroids: the codebook. outside: share of the tokens beyond the edges. unit: what the edges are in.
    """

    layer: int
    role: str
    head: int
    channel: int
    why: str
    width: int
    edges: Sequence[float]
    density: Sequence[float]
    weighted: Sequence[float]
    centroids: Sequence[float]
    outside: float
    unit: str


@dataclass(frozen=True)
class Predicted:
    """An artifact's predicted loss, and what was measured."""

    name: str
    bits: float
    loss: float
    kld: float
    delta_nll: float


@dataclass(frozen=True)
class CacheLayer:
    """Bytes per token of one layer's keys and values; `window` tokens at most, None for all."""

    exact: float
    packed: float
    window: int | None = None


@dataclass(frozen=True)
class Memory:
    """What decides how many tokens fit.

    Attributes:
        weights: bytes of the model's parameters at 16 bits; None if its config is not at hand.
        context: the longest context that the model's config names.
    """

    layers: Sequence[CacheLayer]
    weights: float | None = None
    context: int | None = None


@dataclass(frozen=True)
class SweepPoint:
    """One measured setting of a sweep."""

    name: str
    bits: float
    kld: float
    delta_nll: float


@dataclass(frozen=True)
class Report:
    """Everything of one report; what is None or empty was not there.

    Attributes:
        artifact: the name of the artifact that it is of. budget: effective bits that were asked for.
        densities_rule: how their channels were chosen. provenance: groups of names and values.
        created: when the latest of the measures was made, as they say themselves.
    """

    model: str
    artifact: str | None
    budget: float | None = None
    layers: Sequence[Layer] = ()
    densities: Sequence[Density] = ()
    densities_rule: str = ""
    predicted: Sequence[Predicted] = ()
    measurements: Sequence[Measurement] = ()
    memory: Memory | None = None
    sweep: Sequence[SweepPoint] = ()
    provenance: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    created: str | None = None
