"""One batch of a comparison: every contender on the same sequences, as a row of plain numbers.

Of each contender the row has the sums of each sequence, and the KLD of every position (base64 of float32, exact).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcalib.errors import InputError
from kvcalib.evaluation.collect import Row, packed, unpacked
from kvcalib.evaluation.contender import Contender
from kvcalib.evaluation.divergence import compare_logits
from kvcalib.evaluation.failures import Failures
from kvcalib.evaluation.passes import next_tokens, token_ids, unquantized
from kvcalib.evaluation.trials import Session

PROBE = 16
"""Tokens by which a model is seen to be as it was."""


@dataclass
class Sums:
    """Of one contender: sums over the scored positions of each sequence, and every position's KLD."""

    nll: list[float] = field(default_factory=list)
    kld: list[float] = field(default_factory=list)
    agree: list[float] = field(default_factory=list)
    positions: list[np.ndarray] = field(default_factory=list)
    bytes: float = 0.0


@dataclass
class Batch:
    """What measures a batch: the unquantized model once, and each of `everyone` that has not failed here."""

    model: PreTrainedModel
    everyone: Sequence[Contender]
    prompt: int
    step: int
    failures: Failures
    probed: bool = False

    def measure(self, number: int, batch: np.ndarray) -> Row:
        """The figures of one batch, as JSON."""
        ids = token_ids(self.model, batch)
        expected, exact_bytes = unquantized(self.model, ids)
        expected, scored = expected[:, self.prompt :], ids[:, self.prompt :]
        exact, *others = self.everyone
        known = set(self.failures)
        found = {exact.name: _figures(expected, expected, scored)}
        probe = None if self.probed else unquantized(self.model, ids[:1, :PROBE])[0]
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
                _check_restored(self.model, ids[:1, :PROBE], probe, each)
        self.probed = True
        failed = {name: why for name, why in self.failures.items() if name not in known}
        return {"exact_bytes": exact_bytes, "found": found, "failed": failed}


def _figures(expected: Tensor, found: Tensor, ids: Tensor) -> Row:
    """The sums of each sequence of a batch, and every position's KLD: logits `[B, t, V]` of the tokens `ids [B, t]`."""
    measured = compare_logits(expected.flatten(0, 1), found.flatten(0, 1), next_tokens(ids).flatten())
    sums = {name: measured[name].view(ids.shape).numpy().sum(1).tolist() for name in ("nll", "kld", "agree")}
    return sums | {"positions": packed(measured["kld"].numpy())}


def joined(batches: Sequence[Row], name: str) -> Sums:
    """The sums of a contender over all batches; of one that failed, over those before."""
    parts = [batch["found"][name] for batch in batches if name in batch["found"]]
    joined = Sums(bytes=next((part["bytes"] for part in parts if part.get("bytes") is not None), 0.0))
    for part in parts:
        joined.nll += part["nll"]
        joined.kld += part["kld"]
        joined.agree += part["agree"]
        joined.positions.append(unpacked(part["positions"]))
    return joined


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


def _check_restored(model: PreTrainedModel, ids: Tensor, before: Tensor, contender: Contender) -> None:
    """RuntimeError unless the model gives the logits that it gave before `contender` ran on it."""
    after = unquantized(model, ids)[0]
    if not torch.allclose(before.float(), after.float(), rtol=1e-3, atol=1e-3, equal_nan=True):
        raise RuntimeError(f"contender {contender.name!r} left the model changed; its `run` must restore it")
