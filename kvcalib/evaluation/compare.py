"""Contenders on the same text: NLL, KLD, agreement and bytes of each, with paired bootstrap intervals.

Every batch goes through the unquantized model once and through each contender in turn. Without a prompt each sequence
is one forward pass over an empty cache: attention reads what the cache stored, for the prompt's own tokens too, and
every position counts. With a prompt the first tokens of a sequence go through in one pass, the rest in passes of a few
tokens as in decoding, and only the rest counts; that is how eviction and exact prefills show.

Per position: KL(unquantized || contender), whether the most likely token is the same, NLL of the token that follows.
The 99 % quantile is exact, over all positions (they are kept, 4 bytes each). Effective bits are a cache's bytes times 8
over the key and value elements of the unquantized cache of the same tokens, for all contenders alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from transformers import PreTrainedModel

from kvcalib.errors import InputError
from kvcalib.evaluation.bootstrap import FEWEST, REPLICATES, interval
from kvcalib.evaluation.collect import Alone, Keeper, collect
from kvcalib.evaluation.comparison import Comparison, Interval, PerSequence, Row
from kvcalib.evaluation.contender import Contender, Unquantized
from kvcalib.evaluation.contest import Batch, Sums, joined
from kvcalib.evaluation.continuation import MOST_STEP, STEP
from kvcalib.evaluation.failures import Failures
from kvcalib.evaluation.perplexity import check_finite
from kvcalib.evaluation.provenance import machine, now, versions

PROTOCOL = (
    "{how}; KLD is the mean over positions of KL(unquantized || contender), delta NLL and agreement are against the "
    "unquantized model; 95 % intervals by paired bootstrap over the {samples} sequences, {replicates} replicates, seed "
    "{seed}; effective bits: all bytes of a cache times 8 over the elements of the unquantized one"
)
ONE_PASS = "each sequence in one forward pass on real packed storage, prompt included, every position scored"
PROMPTED = (
    "the first {prompt} tokens of each sequence are a prompt in one pass, the rest goes through in passes of {step} "
    "tokens on real packed storage, its own included, and is scored alone"
)


def compare(
    model: PreTrainedModel,
    contenders: Sequence[Contender],
    sequences: np.ndarray,
    batch_size: int = 1,
    prompt: int = 0,
    step: int = STEP,
    seed: int = 0,
    replicates: int = REPLICATES,
    data: str = "",
    on_batch: Callable[[int], None] | None = None,
    failures: Failures | None = None,
    keeper: Keeper | None = None,
) -> Comparison:
    """Measure `contenders` on `sequences [N, T]` (int64 token ids), the unquantized model in the first row.

    Args:
        prompt: tokens of a sequence that are its prompt; 0: one pass, all of it scored. step: tokens of a pass behind
            it.
        seed: of the bootstrap. data: what the text is, for the record.
        failures: contenders in it are not run; those that fail are added, and become rows with `failed`.
        keeper: who measures which batch, and what is measured; see `collect.py`.

    Raises:
        InputError: two contenders have one name. ValueError: `prompt` or `step` is out of range.
        NonFiniteActivations: the unquantized model's logits have NaN or infinities.
        RuntimeError: a contender left the model other than it was.
    """
    length = sequences.shape[1]
    if prompt and not (0 < prompt <= length - 2 and 1 <= step <= MOST_STEP):
        raise ValueError(
            f"prompt is {prompt} and step {step}, expected 1 to {length - 2} of {length} tokens, and 1 to {MOST_STEP}"
        )
    failures = Failures() if failures is None else failures
    keeper = keeper or Alone()
    everyone = [Unquantized(), *(each for each in contenders if not isinstance(each, Unquantized))]
    check_names(everyone)
    batch = Batch(model, everyone, prompt, step, Failures(failures))
    found = collect(keeper, sequences, batch_size, batch.measure, on_batch)
    for part in found:  # of several reasons that of the first batch, whoever measured it
        for name, why in part["failed"].items():
            failures.setdefault(name, why)
    sums = {each.name: joined(found, each.name) for each in everyone}
    sums[everyone[0].name].bytes = found[-1]["exact_bytes"]
    shape = (len(sequences), length - prompt)
    with keeper.step():
        rows = [_row(each, sums, failures, shape, seed, replicates) for each in everyone]
    how = PROMPTED.format(prompt=prompt, step=step) if prompt else ONE_PASS
    return Comparison(
        model=str(model.config._name_or_path),
        dtype=str(model.dtype).removeprefix("torch."),
        data=data,
        samples=len(sequences),
        seq_len=length,
        fp16_nll=rows[0].nll,
        scored=len(sequences) * (length - prompt),
        prompt=prompt,
        seed=seed,
        protocol=PROTOCOL.format(how=how, samples=len(sequences), replicates=replicates, seed=seed),
        notes=_notes(rows, [each.name for each in everyone if each.evicts and not prompt], len(sequences)),
        created=now(),
        machine=machine(),
        versions=versions(),
        rows=rows,
    )


def difference(a: Row, b: Row, seed: int = 0, replicates: int = REPLICATES) -> Interval:
    """KLD of `a` less that of `b`, with the interval of the paired difference, rows of one comparison.

    Raises:
        ValueError: a row has no figures by sequence, or they are of different texts.
    """
    if a.per_sequence is None or b.per_sequence is None or len(a.per_sequence.kld) != len(b.per_sequence.kld):
        raise ValueError(f"rows {a.name!r} and {b.name!r} have no KLD of the same sequences to compare")
    apart = np.subtract(a.per_sequence.kld, b.per_sequence.kld)
    return interval(apart, np.ones(len(apart)), replicates, seed)


def check_names(contenders: Sequence[Contender]) -> None:
    """InputError if two contenders have one name."""
    names = [each.name for each in contenders]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{name!r} is compared twice; leave one out, or rename one of two artifacts' folders")


def _row(
    contender: Contender,
    sums: dict[str, Sums],
    failures: Failures,
    shape: tuple[int, int],
    seed: int,
    replicates: int,
) -> Row:
    mine, exact = sums[contender.name], sums[Unquantized.name]
    samples, scored = shape
    predicted, positions = np.full(samples, scored - 1.0), np.full(samples, float(scored))
    if contender.name not in failures:
        total, exact_total = sum(mine.nll) + sum(mine.kld), sum(exact.nll)
        if isinstance(contender, Unquantized):
            check_finite(total, exact_total)
        elif not math.isfinite(total):
            failures[contender.name] = "its logits are not finite; try --dtype float32 or bfloat16"
    if contender.name in failures:
        return _failed(contender, failures[contender.name], exact.bytes)
    nll = math.fsum(mine.nll) / predicted.sum()
    return Row(
        name=contender.name,
        source=contender.source,
        settings=contender.settings,
        effective_bits=16 * mine.bytes / exact.bytes,
        cache_bytes=mine.bytes,
        fp16_cache_bytes=exact.bytes,
        ppl=math.exp(min(nll, 700.0)),
        nll=nll,
        delta_nll=interval(np.subtract(mine.nll, exact.nll), predicted, replicates, seed),
        kld=interval(mine.kld, positions, replicates, seed),
        kld_p99=float(np.quantile(np.concatenate(mine.positions), 0.99)),
        top1_agreement=interval(mine.agree, positions, replicates, seed),
        per_sequence=PerSequence(
            nll=(np.array(mine.nll) / predicted).tolist(),
            kld=(np.array(mine.kld) / positions).tolist(),
            top1=(np.array(mine.agree) / positions).tolist(),
        ),
    )


def _failed(contender: Contender, why: str, exact_bytes: float) -> Row:
    nothing = Interval(value=0, low=0, high=0)
    return Row(
        name=contender.name, source=contender.source, settings=contender.settings, effective_bits=0, cache_bytes=0,
        fp16_cache_bytes=exact_bytes, ppl=0, nll=0, delta_nll=nothing, kld=nothing, kld_p99=0, top1_agreement=nothing,
        failed=why,
    )  # fmt: skip


def _notes(rows: Sequence[Row], evicting: Sequence[str], samples: int) -> list[str]:
    found = [f"{row.name}: not measured: {row.failed}" for row in rows if row.failed is not None]
    found += [
        f"{name}: lets tokens go behind a prompt; one pass shows its quantization alone, give --prompt, such as 0.5"
        for name in evicting
    ]
    if samples < FEWEST:
        found.append(
            f"only {samples} sequences: intervals from fewer than {FEWEST} are too narrow; give more --samples"
        )
    return found
