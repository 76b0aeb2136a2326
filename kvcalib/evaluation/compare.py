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
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcalib.errors import InputError
from kvcalib.evaluation.bootstrap import FEWEST, REPLICATES, interval
from kvcalib.evaluation.collect import Alone, Keeper, collect, packed, unpacked
from kvcalib.evaluation.collect import Row as Figures
from kvcalib.evaluation.comparison import Comparison, Interval, PerSequence, Row
from kvcalib.evaluation.contender import Contender, Unquantized
from kvcalib.evaluation.continuation import MOST_STEP, STEP
from kvcalib.evaluation.divergence import compare_logits
from kvcalib.evaluation.failures import Failures
from kvcalib.evaluation.passes import next_tokens, token_ids, unquantized
from kvcalib.evaluation.perplexity import check_finite
from kvcalib.evaluation.provenance import machine, now, versions
from kvcalib.evaluation.trials import Session

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
_PROBE = 16


@dataclass
class _Sums:
    """Of one contender: sums over the scored positions of each sequence, and every position's KLD."""

    nll: list[float] = field(default_factory=list)
    kld: list[float] = field(default_factory=list)
    agree: list[float] = field(default_factory=list)
    positions: list[np.ndarray] = field(default_factory=list)
    bytes: float = 0.0


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
    batch = _Batch(model, everyone, prompt, step, Failures(failures))
    found = collect(keeper, sequences, batch_size, batch.measure, on_batch)
    for part in found:  # of several reasons that of the first batch, whoever measured it
        for name, why in part["failed"].items():
            failures.setdefault(name, why)
    sums = {each.name: _joined(found, each.name) for each in everyone}
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


@torch.no_grad()
def _logits(contender: Contender, session: Session, ids: Tensor, prompt: int, step: int) -> tuple[Tensor, float]:
    """Logits behind the prompt `[B, T - prompt, V]`, and bytes of the cache."""
    if prompt:
        cache, _ = session.read(ids[:, :prompt])
        logits = session.decode(ids[:, prompt:], cache, step)
    else:
        if session.prefill == "exact":
            raise InputError("one pass with an exact prefill shows no error; give --prompt, such as 0.5")
        cache = session.new_cache()
        logits = session.model(input_ids=ids, past_key_values=cache).logits
    return logits, contender.nbytes(cache)


@dataclass
class _Batch:
    """What measures a batch: the unquantized model once, and each of `everyone` that has not failed here."""

    model: PreTrainedModel
    everyone: Sequence[Contender]
    prompt: int
    step: int
    failures: Failures
    probed: bool = False

    def measure(self, number: int, batch: np.ndarray) -> Figures:
        """The figures of one batch, as JSON."""
        ids = token_ids(self.model, batch)
        expected, exact_bytes = unquantized(self.model, ids)
        expected, scored = expected[:, self.prompt :], ids[:, self.prompt :]
        exact, *others = self.everyone
        known = set(self.failures)
        found = {exact.name: _figures(expected, expected, scored)}
        probe = None if self.probed else unquantized(self.model, ids[:1, :_PROBE])[0]
        for each in self.failures.standing(others):
            size = None
            with self.failures.of(each):
                with each.run(self.model) as session:
                    if not number:  # of one sequence alone, which shares its positions with no other
                        size = _logits(each, session, ids[:1], self.prompt, self.step)[1]
                    logits, _ = _logits(each, session, ids, self.prompt, self.step)
                found[each.name] = _figures(expected, logits, scored) | {"bytes": size}
                del logits
            if probe is not None:
                _check_restored(self.model, ids[:1, :_PROBE], probe, each)
        self.probed = True
        failed = {name: why for name, why in self.failures.items() if name not in known}
        return {"exact_bytes": exact_bytes, "found": found, "failed": failed}


def _figures(expected: Tensor, found: Tensor, ids: Tensor) -> Figures:
    """The sums of each sequence of a batch, and every position's KLD: logits `[B, t, V]` of the tokens `ids [B, t]`."""
    measured = compare_logits(expected.flatten(0, 1), found.flatten(0, 1), next_tokens(ids).flatten())
    sums = {name: measured[name].view(ids.shape).numpy().sum(1).tolist() for name in ("nll", "kld", "agree")}
    return sums | {"positions": packed(measured["kld"].numpy())}


def _joined(batches: Sequence[Figures], name: str) -> _Sums:
    """The sums of a contender over all batches; of one that failed, over those before."""
    parts = [batch["found"][name] for batch in batches if name in batch["found"]]
    joined = _Sums(bytes=next((part["bytes"] for part in parts if part.get("bytes") is not None), 0.0))
    for part in parts:
        joined.nll += part["nll"]
        joined.kld += part["kld"]
        joined.agree += part["agree"]
        joined.positions.append(unpacked(part["positions"]))
    return joined


def _check_restored(model: PreTrainedModel, ids: Tensor, before: Tensor, contender: Contender) -> None:
    """RuntimeError unless the model gives the logits that it gave before `contender` ran on it."""
    after = unquantized(model, ids)[0]
    if not torch.allclose(before.float(), after.float(), rtol=1e-3, atol=1e-3, equal_nan=True):
        raise RuntimeError(f"contender {contender.name!r} left the model changed; its `run` must restore it")


def _row(
    contender: Contender,
    sums: dict[str, _Sums],
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
