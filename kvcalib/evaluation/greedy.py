"""Divergence of greedy generations from the unquantized model's.

Each prompt is a batch of its own: one pass, then the most likely token goes in, `tokens` times, past any end-of-text
token, so that all generations have one length. Both generations run freely: after the first difference they read
different texts, and positions that agree behind it agree by chance or because a phrase is likely in both. The index of
the first difference is therefore the figure to trust; agreement over all positions is what users see.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcalib.errors import InputError
from kvcalib.evaluation.comparison import Greedy
from kvcalib.evaluation.contender import Contender, Unquantized
from kvcalib.evaluation.failures import Failures
from kvcalib.evaluation.passes import batches
from kvcalib.evaluation.trials import Session
from kvcalib.runtime.loader import longest_context

TOKENS, PROMPTS = 512, 8
PROTOCOL = (
    "greedy: {prompts} prompts of {prompt} tokens of the text, one by one, each in one pass, then {tokens} tokens one "
    "at a time, past any end of text, against the unquantized model's own generation"
)


def generate(session: Session, prompt: Tensor, tokens: int) -> list[int]:
    """The `tokens` greedy tokens behind `prompt [1, P]`."""
    cache, logits = session.read(prompt)
    written = [int(logits[0].argmax())]
    while len(written) < tokens:
        last = torch.tensor([written[-1:]], device=prompt.device)
        written.append(int(session.decode(last, cache)[0, -1].argmax()))
    return written


def room(model: PreTrainedModel, prompt: int, tokens: int = TOKENS) -> int:
    """At most `tokens`, as many as fit behind a prompt of `prompt` tokens into the model's context.

    Raises:
        InputError: not one fits.
    """
    longest = longest_context(model)
    fitting = tokens if longest is None else min(tokens, longest - prompt)
    if fitting < 1:
        raise InputError(
            f"greedy: a prompt of {prompt} tokens leaves no room in the model's context of {longest}; give a smaller "
            "--seq-len"
        )
    return fitting


def measure_greedy(
    model: PreTrainedModel,
    contenders: Sequence[Contender],
    prompts: np.ndarray,
    tokens: int,
    failures: Failures,
    on_prompt: Callable[[int], None] | None = None,
) -> dict[str, Greedy]:
    """By contender's name; `prompts [N, P]` (int64 token ids).

    Args:
        failures: contenders in it are not run; those that fail are added.
    """
    exact: list[list[int]] = []
    found: dict[str, list[list[int]]] = {each.name: [] for each in contenders}
    for done, ids in enumerate(batches(model, prompts, 1), 1):
        with Unquantized().run(model) as session:
            exact.append(generate(session, ids, tokens))
        for each in failures.standing(contenders):
            if isinstance(each, Unquantized):
                found[each.name].append(exact[-1])
                continue
            with failures.of(each), each.run(model) as session:
                found[each.name].append(generate(session, ids, tokens))
        if on_prompt is not None:
            on_prompt(done)
    return {each.name: divergence(exact, found[each.name]) for each in failures.standing(contenders)}


def divergence(expected: Sequence[Sequence[int]], found: Sequence[Sequence[int]]) -> Greedy:
    """Measures of generations of one length.

    Raises:
        ValueError: they are not as many, or of different lengths.
    """
    if len({len(each) for each in (*expected, *found)}) != 1 or len(expected) != len(found):
        raise ValueError("expected as many generations on both sides, all of one length")
    same = np.array(expected) == np.array(found)
    tokens = same.shape[1]
    first = [tokens if row.all() else int(row.argmin()) for row in same]
    return Greedy(
        prompts=len(same),
        tokens=tokens,
        first_difference=float(statistics.median(first)),
        identical=float(same.all(1).mean()),
        agreement=float(same.mean()),
    )
