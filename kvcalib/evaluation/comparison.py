"""What a comparison found: one JSON that tables, plots and the report are made from."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Interval(_Frozen):
    """A mean and its 95 % interval, by paired bootstrap over sequences."""

    value: float
    low: float
    high: float


class RecallPoint(_Frozen):
    """Retrieval at one length and depth."""

    kind: Literal["passkey", "verbatim"]
    length: int = Field(description="Tokens of the prompt.")
    depth: float = Field(description="Where in the prompt the text to recall stands, 0 to 1.")
    trials: int
    exact: float = Field(description="Share of trials in which every token was recalled.")
    tokens: float = Field(description="Share of tokens recalled, mean over trials (teacher forcing).")
    nll: float = Field(description="Of the tokens to recall, nats per token.")
    blind_nll: float | None = Field(
        default=None, description="The same of the unquantized model whose prompt does not hold the text to recall."
    )
    passage: Literal["random", "text"] | None = Field(default=None, description="Verbatim: what was planted.")


class Greedy(_Frozen):
    """How greedy generations differ from the unquantized model's."""

    prompts: int
    tokens: int = Field(description="Generated per prompt.")
    first_difference: float = Field(description="Median index of the first differing token; `tokens` if none differs.")
    identical: float = Field(description="Share of prompts whose generation is the same throughout.")
    agreement: float = Field(description="Share of positions with the same token, mean over prompts.")


class PerSequence(_Frozen):
    """Means over the scored positions of each sequence, in the order of the text; for paired differences of rows."""

    nll: list[float]
    kld: list[float]
    top1: list[float]


class Row(_Frozen):
    """Measures of one contender; losses in nats per token, sizes in bytes of one sequence's cache, times in seconds."""

    name: str
    source: str
    settings: dict[str, Any]
    effective_bits: float = Field(description="8 x cache_bytes per key or value element of the unquantized cache.")
    cache_bytes: float
    fp16_cache_bytes: float
    ppl: float
    nll: float
    delta_nll: Interval
    kld: Interval
    kld_p99: float = Field(description="99 % quantile over positions.")
    top1_agreement: Interval
    prefill_seconds: float | None = Field(default=None, description="Median, of one sequence.")
    decode_seconds: float | None = Field(default=None, description="Median per token behind the prompt.")
    peak_bytes: float | None = Field(
        default=None, description="Most device memory beyond the model's own while a sequence goes through; GPU only."
    )
    per_sequence: PerSequence | None = None
    recall: list[RecallPoint] | None = None
    greedy: Greedy | None = None
    tasks: dict[str, float] | None = Field(default=None, description="lm-evaluation-harness metrics by task/metric.")
    failed: str | None = Field(default=None, description="Why it could not be measured; the figures are then 0.")


class Comparison(_Frozen):
    """All contenders on one model and text."""

    format: Literal["kvcalib-comparison"] = "kvcalib-comparison"
    format_version: Literal[1] = 1
    model: str
    dtype: str
    data: str
    samples: int
    seq_len: int
    fp16_nll: float
    scored: int = Field(default=0, description="Positions that KLD and agreement are means over.")
    prompt: int = Field(default=0, description="Tokens at the front of a sequence that are not scored; 0: one pass.")
    seed: int = Field(default=0, description="Of the bootstrap, the passages and the pass keys.")
    protocol: str
    protocols: dict[str, str] = Field(default_factory=dict, description="Of recall, greedy and costs.")
    notes: list[str] = Field(default_factory=list, description="What a reader of the figures should know.")
    created: str = Field(description="UTC, ISO 8601.")
    machine: str
    versions: dict[str, str]
    rows: list[Row]


class TaskRow(_Frozen):
    """One contender on one task."""

    name: str
    source: str
    settings: dict[str, Any]
    recall: list[RecallPoint] | None = None
    greedy: Greedy | None = None
    failed: str | None = None


class TaskComparison(_Frozen):
    """Contenders on one task alone: the JSON of `eval --task recall` and `--task greedy`."""

    format: Literal["kvcalib-task"] = "kvcalib-task"
    format_version: Literal[1] = 1
    task: Literal["recall", "greedy"]
    model: str
    dtype: str
    data: str
    seed: int
    protocol: str
    notes: list[str] = Field(default_factory=list)
    created: str = Field(description="UTC, ISO 8601.")
    machine: str
    versions: dict[str, str]
    rows: list[TaskRow]
