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


class Greedy(_Frozen):
    """How greedy generations differ from the unquantized model's."""

    prompts: int
    tokens: int = Field(description="Generated per prompt.")
    first_difference: float = Field(description="Median index of the first differing token; `tokens` if none differs.")
    identical: float = Field(description="Share of prompts whose generation is the same throughout.")
    agreement: float = Field(description="Share of positions with the same token, mean over prompts.")


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
    protocol: str
    created: str = Field(description="UTC, ISO 8601.")
    machine: str
    versions: dict[str, str]
    rows: list[Row]
