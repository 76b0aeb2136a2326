"""One text, one way of reading it, many contenders: figures that compare point by point.

Without `step` a sequence is one pass; with `step` it goes through in passes of so many tokens; with `prompt` the first
share of it is a prompt in one pass, then evicted, and what follows it alone is scored. These are the protocols of
`perplexity.py` and `continuation.py`, for anything that is a `Contender`. The unquantized model's logits are kept from
one contender to the next where memory allows.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvcalib.evaluation.contender import ArtifactContender, Contender, Unquantized
from kvcalib.evaluation.continuation import split
from kvcalib.evaluation.divergence import compare_logits
from kvcalib.evaluation.passes import batches, next_tokens
from kvcalib.evaluation.perplexity import check_finite
from kvcalib.evaluation.trials import Session, cache_bytes, tokens_kept
from kvcalib.runtime.loader import Artifact, attach, detach, prove
from kvcalib.runtime.tiers import Adaptive

MOST_KEPT = 2**30
"""Bytes of unquantized logits that are kept."""


@dataclass(frozen=True)
class Figures:
    """Losses in nats per token, sizes in bytes of one sequence's cache, of `tokens` scored positions."""

    tokens: int
    nll: float
    fp16_nll: float
    kld: float
    top1_agreement: float
    cache_bytes: float
    fp16_cache_bytes: float
    kept: float


class AdaptiveContender(ArtifactContender):
    """An artifact attached with adaptive widths; the tokens of a pass see each other exactly."""

    def __init__(self, artifact: Artifact, adaptive: Adaptive, recent: int | None = None) -> None:
        super().__init__(artifact, recent=recent, prefill="exact")
        self.adaptive = adaptive

    @contextlib.contextmanager
    def run(self, model: PreTrainedModel) -> Iterator[Session]:
        """See `Contender`."""
        rotations = prove(model, sorted(self.artifact.quantizers))
        attachment = attach(model, self.artifact, self.sinks, self.recent, rotations, "exact", self.adaptive)
        try:
            yield Session(model, attachment, "exact")
        finally:
            detach(model)


class Reading:
    """`sequences [N, T]` (int64 token ids) and how `model` reads them.

    Args:
        step: tokens of a pass; whole sequences if None. prompt: share of a sequence that is its prompt, not scored.

    Raises:
        ValueError: `prompt` is out of range, or given without `step`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sequences: np.ndarray,
        step: int | None = None,
        prompt: float | None = None,
        batch_size: int = 1,
    ) -> None:
        if prompt is not None and step is None:
            raise ValueError("prompt is given without step; say how many tokens a pass of the continuation has")
        self.model, self.sequences, self.step, self.batch_size = model, sequences, step, batch_size
        self.first = 0 if prompt is None else split(sequences.shape[1], prompt)
        self._kept: dict[int, tuple[Tensor, float]] = {}
        self._bytes = 0

    @torch.no_grad()
    def measure(self, contender: Contender, on_batch: Callable[[int], None] | None = None) -> Figures:
        """Every sequence read on the contender's caches, against the unquantized model.

        Raises:
            NonFiniteActivations: the logits have NaN or infinities. Else as `contender.run`.
        """
        sums = dict.fromkeys(("kld", "agree", "nll", "expected_nll"), 0.0)
        held = exact = kept = 0.0
        done = 0
        for ids in batches(self.model, self.sequences, self.batch_size):
            expected, exact = self._expected(done, ids)
            with contender.run(self.model) as session:
                logits, cache = self._read(session, ids)
                held = contender.nbytes(cache) / len(ids)
                kept = tokens_kept(cache)
                del cache
            targets = next_tokens(ids[:, self.first :]).flatten()
            compared = compare_logits(expected.flatten(0, 1), logits.flatten(0, 1), targets)
            for name, values in compared.items():
                sums[name] += float(values.sum())
            done += len(ids)
            if on_batch is not None:
                on_batch(done)
        rows, length = len(self.sequences), self.sequences.shape[1] - self.first
        nll, exact_nll = (sums[name] / (rows * (length - 1)) for name in ("nll", "expected_nll"))
        check_finite(nll, exact_nll)
        return Figures(
            tokens=rows * length,
            nll=nll,
            fp16_nll=exact_nll,
            kld=sums["kld"] / (rows * length),
            top1_agreement=sums["agree"] / (rows * length),
            cache_bytes=held,
            fp16_cache_bytes=exact,
            kept=kept,
        )

    def _read(self, session: Session, ids: Tensor) -> tuple[Tensor, DynamicCache]:
        """Logits of the scored positions `[B, T - first, V]`, and the cache that was read."""
        if self.first:
            cache, _ = session.read(ids[:, : self.first])
        else:
            cache = session.new_cache()
        return session.decode(ids[:, self.first :], cache, self.step or ids.shape[1]), cache

    def _expected(self, start: int, ids: Tensor) -> tuple[Tensor, float]:
        """The same on the model's own cache, and that cache's bytes per row."""
        if start in self._kept:
            return self._kept[start]
        with Unquantized().run(self.model) as session:
            logits, cache = self._read(session, ids)
        found = logits, cache_bytes(cache) / len(ids)
        if self._bytes + logits.nbytes <= MOST_KEPT:
            self._kept[start] = found
            self._bytes += logits.nbytes
        return found


def effective_bits(figures: Figures) -> float:
    """All bytes times 8 over the elements of the unquantized cache; NaN where that holds nothing."""
    return 16 * figures.cache_bytes / figures.fp16_cache_bytes if figures.fp16_cache_bytes else math.nan
