"""Perplexity and divergence of packed caches against the unquantized model, on the same text.

With `prefill="quantized"` every sequence is one forward pass over an empty packed cache: attention reads what the cache
stored, for the prompt's own tokens too. That is the hardest protocol (no token but the sinks and the recent window is
ever exact). With "exact" the first half of a sequence is a prompt whose tokens see each other exactly, and the second
half, which alone is scored, reads what was stored, itself included: what serving with quantize-after-prefill does.

With `step` the text goes through in passes of so many tokens, as decoding does: the tokens of a pass see each other and
the recent window exactly and all others as stored. Adaptive widths are measured so, beside the artifacts themselves in
the same steps. Both read the same tokens exactly if the recent window is `step - 1` tokens longer than the window of
the adaptive widths: all queries that count have then seen a token in the pass before it leaves.

What evicts tokens is measured on continuations, in `continuation.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from transformers import PreTrainedModel

from kvcalib.errors import NonFiniteActivations
from kvcalib.evaluation import collect
from kvcalib.evaluation.collect import Alone, Keeper
from kvcalib.evaluation.divergence import compare_logits
from kvcalib.evaluation.passes import next_tokens, token_ids, total, unquantized
from kvcalib.model.rotary import Rotation
from kvcalib.runtime.loader import Artifact, Prefill, attach, check_fit, detach, prove
from kvcalib.runtime.tiers import Adaptive

PROTOCOL: dict[Prefill, str] = {
    "quantized": "each sequence in one forward pass on real packed storage, prompt included; KLD is the mean over "
    "positions of KL(unquantized || quantized)",
    "exact": "the first half of each sequence is an exact prefill, the second half is scored in one pass on real "
    "packed storage, its own tokens included; KLD is the mean over its positions of KL(unquantized || quantized)",
}
STEPPED = (
    "{} tokens a pass on real packed storage: a pass's own tokens and the recent window are exact, all others as "
    "stored; KLD is the mean over positions of KL(unquantized || quantized)"
)


class Evaluation(BaseModel):
    """Measures of one artifact; losses in nats per token, sizes in bytes of one sequence's cache."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    artifact: str
    nll: float
    ppl: float
    fp16_nll: float = Field(description="NLL of the unquantized model on the same tokens, in its own dtype.")
    delta_nll: float
    kld: float
    top1_agreement: float
    effective_bits: float = Field(
        description="All bytes of the packed layers times 8, per key or value element; layers that a plan kept exact "
        "count too, at 16 bits an element."
    )
    budget: float | None = Field(default=None, description="Effective bits that the artifact was asked to have.")
    long_cache_bits: float | None = Field(
        default=None, description="Those of the plan for this budget, without sinks, recent window and spare room."
    )
    cache_bytes: float = Field(description="Bytes of the cache of one sequence of seq_len tokens.")
    fp16_cache_bytes: float = Field(description="The same in 16 bit.")
    seq_len: int
    tokens: int
    sinks: int
    recent: int
    dtype: str
    prefill: Prefill
    protocol: str
    step: int | None = Field(default=None, description="Tokens of a pass; None: a sequence is one pass, or two.")
    adaptive: str | None = Field(default=None, description="The adaptive widths' folder.")
    host_bytes: float = Field(default=0.0, description="Of one sequence's exact copy in host memory.")
    prompt: int | None = Field(default=None, description="Tokens that are not scored; see `continuation.py`.")
    policy: str | None = Field(default=None, description="Eviction policy; None: every token stays.")
    eviction: dict[str, Any] | None = Field(default=None, description="What `attach` was told of eviction.")
    kept: float | None = Field(default=None, description="Tokens that a KV head holds at the end, mean over heads.")
    kept_of_prompt: float | None = Field(default=None, description="The same when the prompt has been evicted.")
    overlap: float | None = Field(default=None, description="Heavy-hitter overlap; see `heavy_hitters.py`.")
    captured: float | None = Field(default=None, description="Share of later attention to the prompt that stayed.")
    seconds_per_token: float | None = Field(default=None, description="Median pass of the continuation, per token.")
    fp16_seconds_per_token: float | None = Field(default=None, description="The same of the unquantized model.")
    delta_nll_error: float | None = Field(default=None, description="Standard error of delta_nll over sequences.")
    sequence_nll: list[float] | None = Field(default=None, description="NLL of each sequence, for paired comparison.")


def evaluate(
    model: PreTrainedModel,
    artifacts: Sequence[Artifact],
    sequences: np.ndarray,
    sinks: int | None = None,
    recent: int | None = None,
    batch_size: int = 1,
    on_batch: Callable[[int], None] | None = None,
    prefill: Prefill = "quantized",
    step: int | None = None,
    adaptive: Adaptive | None = None,
    keeper: Keeper | None = None,
) -> list[Evaluation]:
    """Measure every artifact on `sequences [N, T]` (int64 token ids); the unquantized logits are computed once.

    Args:
        prefill, step: see the module; `step` makes `prefill` "exact" for every pass.
        adaptive: measured as one more result, attached with the first artifact; `step` is then 1 if None, and `recent`
            for all as long as the module says, if None.
        keeper: who measures which batch, and what is measured; see `collect.py`.

    Raises:
        UnsupportedModel, ArtifactMismatch: as `attach`. NonFiniteActivations: the logits have NaN or infinities.
    """
    keeper = keeper or Alone()
    measured: list[tuple[Artifact, Adaptive | None]] = [(artifact, None) for artifact in artifacts]
    if adaptive is not None:
        measured.append((artifacts[0], adaptive))
        step = 1 if step is None else step
        recent = adaptive.rule.window + step - 1 if recent is None else recent
    prefill = "exact" if step else prefill
    with keeper.step():
        for artifact in artifacts:
            check_fit(artifact, model)
        rotations: dict[int, Rotation] = prove(model, sorted({i for a in artifacts for i in a.quantizers}))
    first = sequences.shape[1] // 2 if prefill == "exact" and not step else 0

    @torch.no_grad()
    def measure(_: int, batch: np.ndarray) -> collect.Row:
        ids = token_ids(model, batch)
        targets = next_tokens(ids[:, first:]).flatten()
        logits, exact_bytes = unquantized(model, ids)
        expected = logits[:, first:].flatten(0, 1)
        del logits
        row: collect.Row = {"exact_bytes": exact_bytes, "measured": []}
        for artifact, widths in measured:
            chosen = {layer: rotations[layer] for layer in artifact.quantizers}
            attachment = attach(model, artifact, sinks, recent, chosen, prefill, widths)
            try:
                cache = attachment.make_cache()
                if first:
                    model(input_ids=ids[:, :first], past_key_values=cache, logits_to_keep=1)
                    attachment.prefill = "quantized"
                passes = torch.split(ids[:, first:], step or ids.shape[1], 1)
                found = torch.cat([model(input_ids=part, past_key_values=cache).logits for part in passes], 1)
            finally:
                detach(model)
            held = [cache.nbytes() / len(ids), cache.effective_bits(), cache.host_nbytes() / len(ids)]
            compared = compare_logits(expected, found.flatten(0, 1), targets)
            row["measured"].append({name: total(values) for name, values in compared.items()} | {"held": held})
        return row

    rows = collect.collect(keeper, sequences, batch_size, measure, on_batch)
    shape = (*sequences[:, first:].shape, sequences.shape[1])
    with keeper.step():
        return [
            _result(model, artifact, shape, rows, number, sinks, recent, prefill, step, widths)
            for number, (artifact, widths) in enumerate(measured)
        ]


def check_finite(nll: float, exact_nll: float) -> None:
    """NonFiniteActivations if one of two NLLs is NaN or infinite."""
    if not (math.isfinite(nll) and math.isfinite(exact_nll)):
        which = "unquantized" if not math.isfinite(exact_nll) else "quantized"
        raise NonFiniteActivations(f"eval: the {which} model's NLL is not finite; try --dtype float32 or bfloat16")


def _result(
    model: PreTrainedModel,
    artifact: Artifact,
    shape: tuple[int, int, int],
    rows: Sequence[collect.Row],
    number: int,
    sinks: int | None,
    recent: int | None,
    prefill: Prefill,
    step: int | None,
    adaptive: Adaptive | None,
) -> Evaluation:
    """Measures of what stands at `number` of each batch; `shape` is sequences, scored positions of each, tokens."""
    count, scored, seq_len = shape
    mine = [row["measured"][number] for row in rows]
    positions, predicted = count * scored, count * (scored - 1)
    summed = {name: sum(batch[name] for batch in mine) for name in ("kld", "agree", "expected_nll", "nll")}
    held, exact_bytes = mine[-1]["held"], rows[-1]["exact_bytes"]
    nll, exact_nll = summed["nll"] / predicted, summed["expected_nll"] / predicted
    check_finite(nll, exact_nll)
    # Adaptive widths have a budget of their own, not that of the artifact they are attached with.
    default, budget = artifact.manifest.runtime, None if adaptive else artifact.manifest.budget
    return Evaluation(
        artifact=str(artifact.path or artifact.manifest.model.name),
        nll=nll,
        ppl=math.exp(min(nll, 700.0)),
        fp16_nll=exact_nll,
        delta_nll=nll - exact_nll,
        kld=summed["kld"] / positions,
        top1_agreement=summed["agree"] / positions,
        effective_bits=held[1],
        budget=None if budget is None else budget.asked,
        long_cache_bits=None if budget is None else budget.planned,
        cache_bytes=held[0],
        fp16_cache_bytes=exact_bytes,
        seq_len=seq_len,
        tokens=positions,
        sinks=default.sinks if sinks is None else sinks,
        recent=default.recent if recent is None else recent,
        dtype=str(model.dtype).removeprefix("torch."),
        prefill=prefill,
        protocol=STEPPED.format(step) if step else PROTOCOL[prefill],
        step=step,
        adaptive=str(adaptive.path or "adaptive") if adaptive else None,
        host_bytes=held[2],
    )
