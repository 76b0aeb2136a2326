"""Time and device memory of contenders, so that they compare: all take turns, round after round, and medians count.

A round of a contender is one sequence: a prompt in one pass, then tokens one by one. Its order changes from round to
round. The first round compiles and warms up and is not counted. Memory is the most that torch holds on the devices
while the sequence goes through, less what it held before (the model): the cache, and what the passes need beside it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcalib.evaluation.contender import Contender
from kvcalib.evaluation.failures import Failures
from kvcalib.model.loading import compute_devices

ROUNDS, NEW_TOKENS = 5, 32
PROTOCOL = (
    "costs: a prompt of {prompt} tokens in one pass, then {tokens} tokens one by one, batch 1; contenders take turns "
    "for {rounds} rounds after one that does not count, medians; seconds on this machine say nothing of another"
)


@dataclass(frozen=True)
class Costs:
    """Of one contender.

    Attributes:
        prefill_seconds: median over rounds. decode_seconds: per token; median over rounds of each round's median.
        peak_bytes: beyond the model, most of any round; None without a GPU.
    """

    prefill_seconds: float
    decode_seconds: float
    peak_bytes: float | None


@dataclass
class _Rounds:
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    peak: list[float] = field(default_factory=list)


def measure_costs(
    model: PreTrainedModel,
    contenders: Sequence[Contender],
    ids: Tensor,
    failures: Failures,
    tokens: int = NEW_TOKENS,
    rounds: int = ROUNDS,
    on_round: Callable[[int], None] | None = None,
) -> dict[str, Costs]:
    """By contender's name; `ids [1, T]`, of which the last `tokens` are decoded.

    Args:
        failures: contenders in it are not run; those that fail are added.

    Raises:
        ValueError: there is no token for the prompt, or no round.
    """
    if ids.shape[0] != 1 or not 0 < tokens < ids.shape[1] or rounds < 1:
        raise ValueError(f"ids have shape {tuple(ids.shape)}, {tokens} to decode in {rounds} rounds: no prompt is left")
    found = {each.name: _Rounds() for each in contenders}
    for number in range(rounds + 1):
        turn = number % max(1, len(contenders))
        for each in failures.standing([*contenders[turn:], *contenders[:turn]]):
            with failures.of(each):
                _round(model, each, ids, tokens, found[each.name] if number else _Rounds())
        if on_round is not None:
            on_round(number + 1)
    return {
        each.name: Costs(
            statistics.median(mine.prefill), statistics.median(mine.decode), max(mine.peak) if mine.peak else None
        )
        for each in failures.standing(contenders)
        for mine in [found[each.name]]
    }


def _round(model: PreTrainedModel, contender: Contender, ids: Tensor, tokens: int, mine: _Rounds) -> None:
    prompt, rest = ids[:, :-tokens], ids[:, -tokens:]
    devices = sorted((d for d in compute_devices(model) if d.type == "cuda"), key=str)
    with contender.run(model) as session:
        held = 0
        for device in devices:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            held += torch.cuda.memory_allocated(device)
        began = time.perf_counter()
        cache, _ = session.read(prompt)
        for device in devices:
            torch.cuda.synchronize(device)
        mine.prefill.append(time.perf_counter() - began)
        session.seconds.clear()
        session.decode(rest, cache)
        mine.decode.append(statistics.median(session.seconds))
        if devices:
            mine.peak.append(float(sum(torch.cuda.max_memory_allocated(device) for device in devices) - held))
