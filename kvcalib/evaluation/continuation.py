"""What eviction costs: NLL and divergence of continuations whose prompt has been evicted.

The first tokens of a sequence are a prompt: one pass, after which the policy drops what it drops. The rest goes through
in passes of `step` tokens, few enough to count as decoding, and it alone is scored: what the passes of the continuation
predict, against the unquantized model with its full cache on the same tokens, in the same passes. All trials and the
unquantized model read the same tokens, so their NLLs compare sequence by sequence (paired).

The passes read what is stored, their own tokens included. Seconds are the median over passes, per token of one row.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from kvcalib.evaluation import collect, heavy_hitters
from kvcalib.evaluation.collect import Alone, Keeper
from kvcalib.evaluation.divergence import compare_logits
from kvcalib.evaluation.heavy_hitters import Drawn
from kvcalib.evaluation.passes import next_tokens, token_ids, total
from kvcalib.evaluation.perplexity import Evaluation, check_finite
from kvcalib.evaluation.trials import Session, Trial, cache_bytes, survivors, tokens_kept
from kvcalib.model.rotary import Rotation
from kvcalib.runtime.cache import PackedCache
from kvcalib.runtime.loader import Prefill, check_fit, prove

STEP, MOST_STEP = 8, 16
PROMPT = 0.75
PROTOCOL = (
    "the first {prompt} tokens of each sequence are a prompt in one pass ({prefill} prefill), then evicted; the rest "
    "goes through in passes of {step} tokens on real packed storage, their own tokens included, and is scored alone; "
    "delta NLL and KLD are against the unquantized model with its full cache on the same tokens, KLD is the mean over "
    "positions of KL(unquantized || quantized)"
)


@dataclass
class _Sums:
    """Of one trial, over a batch or all of them."""

    kld: float = 0.0
    agree: float = 0.0
    nll: list[float] = field(default_factory=list)  # of each sequence, mean over its tokens
    overlap: list[float] = field(default_factory=list)
    captured: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    kept: float = 0.0
    kept_of_prompt: float = 0.0
    bytes: float = 0.0
    host: float = 0.0
    bits: float = 0.0


def split(seq_len: int, prompt: float) -> int:
    """Tokens of a sequence that are its prompt: the share `prompt`, at least 1, and at least 2 tokens are left.

    Raises:
        ValueError: the share is not within 0 and 1, or the sequence has fewer than 3 tokens.
    """
    if not 0 < prompt < 1 or seq_len < 3:
        raise ValueError(
            f"prompt is {prompt} of sequences of {seq_len} tokens, expected a share between 0 and 1 of at least 3"
        )
    return min(max(1, round(prompt * seq_len)), seq_len - 2)


def evaluate_continuations(
    model: PreTrainedModel,
    trials: Sequence[Trial],
    sequences: np.ndarray,
    sinks: int | None = None,
    recent: int | None = None,
    batch_size: int = 1,
    on_batch: Callable[[int], None] | None = None,
    prefill: Prefill = "quantized",
    prompt: float = PROMPT,
    step: int = STEP,
    keeper: Keeper | None = None,
) -> list[Evaluation]:
    """Measure every trial on the continuations of `sequences [N, T]` (int64 token ids).

    Args:
        sinks, recent, prefill: as `attach`; `prefill` is how the prompt's pass reads.
        prompt: share of a sequence that is its prompt. step: tokens of a pass, at most 16.
        keeper: who measures which batch, and what is measured; see `collect.py`.

    Raises:
        ValueError: `step` or `prompt` is out of range, a trial has no artifact. UnsupportedModel, ArtifactMismatch: as
            `attach`. NonFiniteActivations: the logits have NaN or infinities.
    """
    if not 1 <= step <= MOST_STEP:
        raise ValueError(f"step is {step}, expected 1 to {MOST_STEP}: passes of more tokens are prompts to eviction")
    first = split(sequences.shape[1], prompt)
    keeper = keeper or Alone()
    with keeper.step():
        for trial in trials:
            if trial.artifact is None:
                raise ValueError("a trial has no artifact; the unquantized model is measured beside every trial")
            check_fit(trial.artifact, model)
        rotations: dict[int, Rotation] = prove(
            model, sorted({i for trial in trials if trial.artifact for i in trial.artifact.quantizers})
        )

    def measure(_: int, batch: np.ndarray) -> collect.Row:
        ids = token_ids(model, batch)
        exact, sums = _Sums(), [_Sums() for _ in trials]
        drawn: dict[int, Drawn] = {}
        if any(trial.eviction is not None for trial in trials):
            drawn = heavy_hitters.exact_attention(model, rotations, ids, first)
        with Trial(None).run(model, rotations) as session:
            expected = _continue(session, ids, first, step, exact, {})
        exact.nll = _compare(expected, expected, ids[:, first:], _Sums())
        for trial, mine in zip(trials, sums, strict=True):
            with trial.run(model, rotations, sinks, recent, prefill) as session:
                found = _continue(session, ids, first, step, mine, drawn)
            mine.nll = _compare(expected, found, ids[:, first:], mine)
        return {"exact": asdict(exact), "trials": [asdict(mine) for mine in sums]}

    rows = collect.collect(keeper, sequences, batch_size, measure, on_batch)
    exact = _joined([_Sums(**row["exact"]) for row in rows])
    sums = [_joined([_Sums(**row["trials"][number]) for row in rows]) for number in range(len(trials))]
    shape = (*sequences.shape, first, step)
    with keeper.step():
        return [
            _result(model, trial, mine, exact, shape, sinks, recent, prefill)
            for trial, mine in zip(trials, sums, strict=True)
        ]


def _joined(parts: Sequence[_Sums]) -> _Sums:
    """The sums of all batches; what a cache holds is taken from the last one."""
    found = replace(parts[-1], kld=sum(part.kld for part in parts), agree=sum(part.agree for part in parts))
    for name in ("nll", "overlap", "captured", "seconds"):
        setattr(found, name, [x for part in parts for x in getattr(part, name)])
    return found


def _continue(session: Session, ids: Tensor, first: int, step: int, mine: _Sums, drawn: dict[int, Drawn]) -> Tensor:
    """Logits of the continuation `[B, T - first, V]`; what the cache holds goes into `mine`."""
    cache, _ = session.read(ids[:, :first])
    kept = survivors(cache)
    mine.kept_of_prompt = tokens_kept(cache)
    for layer, positions in kept.items():
        if layer in drawn:
            mine.overlap += heavy_hitters.overlap(positions, drawn[layer].prompt).flatten().tolist()
            mine.captured += heavy_hitters.captured(positions, drawn[layer].later).flatten().tolist()
    logits = session.decode(ids[:, first:], cache, step)
    mine.seconds += session.seconds
    mine.kept, mine.bytes = tokens_kept(cache), cache_bytes(cache) / len(ids)
    mine.bits = cache.effective_bits() if isinstance(cache, PackedCache) else 16.0
    mine.host = cache.host_nbytes() / len(ids) if isinstance(cache, PackedCache) else 0.0
    return logits


def _compare(expected: Tensor, found: Tensor, ids: Tensor, mine: _Sums) -> list[float]:
    """NLL of each row's tokens, nats per token; KLD and agreement go into `mine`."""
    targets = next_tokens(ids)
    measured = compare_logits(expected.flatten(0, 1), found.flatten(0, 1), targets.flatten())
    mine.kld += total(measured["kld"])
    mine.agree += total(measured["agree"])
    nll: list[float] = (measured["nll"].view(targets.shape).numpy().sum(1) / (targets.shape[1] - 1)).tolist()
    return nll


def _result(
    model: PreTrainedModel,
    trial: Trial,
    mine: _Sums,
    exact: _Sums,
    shape: tuple[int, int, int, int],
    sinks: int | None,
    recent: int | None,
    prefill: Prefill,
) -> Evaluation:
    assert trial.artifact is not None
    count, seq_len, first, step = shape
    tokens = count * (seq_len - first)
    nll, exact_nll = statistics.fmean(mine.nll), statistics.fmean(exact.nll)
    check_finite(nll, exact_nll)
    # Adaptive widths have a budget of their own, not that of the artifact they are attached with.
    default, budget = trial.artifact.manifest.runtime, None if trial.adaptive else trial.artifact.manifest.budget
    return Evaluation(
        artifact=str(trial.artifact.path or trial.artifact.manifest.model.name),
        nll=nll,
        ppl=math.exp(min(nll, 700.0)),
        fp16_nll=exact_nll,
        delta_nll=nll - exact_nll,
        kld=mine.kld / tokens,
        top1_agreement=mine.agree / tokens,
        effective_bits=mine.bits,
        budget=None if budget is None else budget.asked,
        long_cache_bits=None if budget is None else budget.planned,
        cache_bytes=mine.bytes,
        fp16_cache_bytes=exact.bytes,
        seq_len=seq_len,
        tokens=tokens,
        sinks=default.sinks if sinks is None else sinks,
        recent=default.recent if recent is None else recent,
        dtype=str(model.dtype).removeprefix("torch."),
        prefill=prefill,
        protocol=PROTOCOL.format(prompt=first, prefill=prefill, step=step),
        step=step,
        prompt=first,
        adaptive=None if trial.adaptive is None else str(trial.adaptive.path or "adaptive"),
        host_bytes=mine.host,
        policy=trial.policy,
        eviction=trial.described,
        kept=mine.kept,
        kept_of_prompt=mine.kept_of_prompt,
        overlap=statistics.fmean(mine.overlap) if mine.overlap else None,
        captured=statistics.fmean(mine.captured) if mine.captured else None,
        seconds_per_token=statistics.median(mine.seconds),
        fp16_seconds_per_token=statistics.median(exact.seconds),
        delta_nll_error=standard_error(mine.nll, exact.nll),
        sequence_nll=mine.nll,
    )


def standard_error(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Of the mean of the paired differences a - b; None for fewer than two."""
    if len(a) < 2:
        return None
    return statistics.stdev(x - y for x, y in zip(a, b, strict=True)) / math.sqrt(len(a))
