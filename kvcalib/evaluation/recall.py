"""Recall at several lengths and depths: passages repeated word for word, and pass keys.

*Verbatim*: a passage is planted in real text; at the end its first `CUE` tokens come again, and the model should go on
as the passage did. The text up to the cue is a prompt in one pass, the rest goes through in passes of a few tokens,
each token after the right ones (teacher forcing). Of the passage's other tokens: the share that was the most likely
one, the share of trials in which all were, and their NLL. Greedy decoding repeats the passage if and only if all were.

A passage is tokens drawn at random, which no knowledge of language helps to guess, or a stretch of text from elsewhere.
Small models cannot copy random tokens at all, whatever the cache; `choose_passage` tries the unquantized model first.
Beside every figure stands the NLL of the unquantized model whose prompt lacks the passage (blind): where a cache comes
near it, the passage is lost.

*Pass keys* are those of `passkey.py`.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcalib.errors import InputError
from kvcalib.evaluation import passkey
from kvcalib.evaluation.comparison import RecallPoint
from kvcalib.evaluation.contender import Contender
from kvcalib.evaluation.failures import Failures
from kvcalib.evaluation.passkey import Needle, make_needles
from kvcalib.evaluation.trials import Session
from kvcalib.model.loading import input_device

Passage = Literal["random", "text"]
PASSAGES: tuple[Passage, ...] = ("random", "text")
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
TRIALS = 4
CUE, ASKED = 8, 24
STEP = 8
RECALLS = 0.5
"""Share of random passages' tokens from which on a model counts as one that copies."""
PROTOCOL = (
    "recall: depths {depths}, {trials} trials at each length and depth, the text before the question in one pass; "
    "verbatim: {passage} of {size} tokens in the text, asked for by its first {cue}, teacher forcing in passes of "
    "{step}; passkey: {digits} digits, token by token; blind: the unquantized model without the passage or key; seed "
    "{seed}"
)
_TRIES = 50


@dataclass(frozen=True)
class Plant:
    """One trial, as token ids.

    Attributes:
        context: text with the passage. blind: as many tokens of the text without it.
        cue, asked: the passage's first tokens, and the others.
        length: of context, cue and asked together. depth: 0 (front) to 1 (right before the cue).
    """

    context: list[int]
    blind: list[int]
    cue: list[int]
    asked: list[int]
    length: int
    depth: float


def make_plants(
    text: np.ndarray,
    lengths: Sequence[int],
    passage: Passage,
    trials: int = TRIALS,
    depths: Sequence[float] = DEPTHS,
    seed: int = 0,
    special: Collection[int] = (),
) -> list[Plant]:
    """`trials` of each length and depth; those of one length and number share text and passage at all depths.

    Args:
        text: int64 token ids, any shape, read as one text. special: ids that are no text, left out of random passages.

    Raises:
        InputError: a length cannot hold the passage twice, the text is shorter than a length, or it says everything
            twice.
    """
    size = CUE + ASKED
    stream: list[int] = np.asarray(text).reshape(-1).tolist()
    known = sorted(set(stream) - set(special))
    plants = []
    for length in lengths:
        if length < 2 * size:
            raise InputError(
                f"length is {length} tokens, a passage of {size} tokens twice takes {2 * size}; give a larger --seq-len"
            )
        if len(stream) < length:
            raise InputError(f"recall: the text has {len(stream)} tokens, a trial takes {length}; give more --samples")
        for number in range(trials):
            generator = random.Random(f"{seed}:{length}:{number}")
            window, planted = _draw(stream, known, length - size, passage, generator)
            body, cue, asked = window[: length - 2 * size], planted[:CUE], planted[CUE:]
            for depth in depths:
                place = round(depth * len(body))
                context = [*body[:place], *planted, *body[place:]]
                plants.append(Plant(context, window, cue, asked, length, depth))
    return plants


def _draw(
    stream: list[int], known: list[int], count: int, passage: Passage, generator: random.Random
) -> tuple[list[int], list[int]]:
    """`count` tokens of the text and a passage whose cue is not among them."""
    size = CUE + ASKED
    for _ in range(_TRIES):
        start = generator.randrange(len(stream) - size + 1)
        rest = stream[:start] + stream[start + size :]
        if passage == "text":
            planted = stream[start : start + size]
        else:
            planted = generator.sample(known, size) if len(known) >= size else generator.choices(known, k=size)
        first = generator.randrange(len(rest) - count + 1)
        window = rest[first : first + count]
        cue = planted[:CUE]
        if all(window[i : i + CUE] != cue for i in range(count - CUE + 1)):
            return window, planted
    raise InputError(f"recall: the text repeats itself, {_TRIES} passages were in it already; give other --data")


@torch.no_grad()
def score(session: Session, contexts: Sequence[Sequence[int]], plants: Sequence[Plant]) -> tuple[Tensor, Tensor]:
    """After each context: NLL of the tokens asked for, and whether they were the most likely; `[N, ASKED]` on the CPU.

    Args:
        contexts: of one length, a batch.
    """
    device = input_device(session.model)
    cache, _ = session.read(torch.tensor([list(each) for each in contexts], device=device))
    given = torch.tensor([[*each.cue, *each.asked] for each in plants], device=device)
    logits = session.decode(given[:, :-1], cache, STEP)[:, len(plants[0].cue) - 1 :].float()
    target = given[:, len(plants[0].cue) :]
    nll = -logits.log_softmax(-1).gather(2, target[..., None])[..., 0]
    return nll.double().cpu(), (logits.argmax(-1) == target).cpu()


def choose_passage(model: PreTrainedModel, plants: Sequence[Plant], batch_size: int = 1) -> tuple[Passage, float]:
    """What the model should be asked for, and the share of tokens that it recalls of `plants`, all of random passages.

    "random" if the unquantized model recalls at least `RECALLS` of them, else "text".
    """
    session = Session(model, None)
    right = [score(session, [each.context for each in part], part)[1] for part in _parts(plants, batch_size)]
    share = float(torch.cat(right).double().mean())
    return ("random" if share >= RECALLS else "text"), share


def measure_recall(
    model: PreTrainedModel,
    contenders: Sequence[Contender],
    plants: Sequence[Plant],
    needles: Sequence[Needle],
    passage: Passage,
    failures: Failures,
    batch_size: int = 1,
    on_trial: Callable[[int], None] | None = None,
) -> dict[str, list[RecallPoint]]:
    """By contender's name: a point for each length and depth, verbatim, then pass keys.

    Args:
        passage: what `plants` were made of. needles: pass keys, asked one by one; plants go in batches.
        failures: contenders in it are not run; those that fail are added.
    """
    blind = _blind(model, plants, batch_size)
    blind_keys = [-passkey.blind_score(model, needle) for needle in needles]
    found, done = {}, 0
    for each in failures.standing(contenders):
        before = done
        with failures.of(each), each.run(model) as session:
            verbatim: list[_Trial] = []
            for part in _parts(plants, batch_size):
                nll, right = score(session, [plant.context for plant in part], part)
                verbatim += [
                    _Trial(plant.length, plant.depth, bool(hit.all()), float(hit.double().mean()), float(loss.mean()))
                    for plant, loss, hit in zip(part, nll, right, strict=True)
                ]
                done = _tell(on_trial, done + len(part))
            keys = []
            for needle in needles:
                answer = passkey.ask(session, needle)
                cell = answer.cell
                keys.append(_Trial(cell.length, cell.depth, cell.retrieved, answer.right, -cell.score))
                done = _tell(on_trial, done + 1)
            found[each.name] = [
                *_points("verbatim", verbatim, blind, passage), *_points("passkey", keys, blind_keys, None)
            ]  # fmt: skip
        done = _tell(on_trial, before + len(plants) + len(needles))
    return found


def _blind(model: PreTrainedModel, plants: Sequence[Plant], batch_size: int) -> list[float]:
    """NLL of what each plant asks for without the passage in the text; the same at all depths, so measured once."""
    session = Session(model, None)
    texts = {(plant.length, *plant.cue, *plant.asked): plant for plant in plants}
    found: dict[tuple[int, ...], float] = {}
    for part in _parts(list(texts.values()), batch_size):
        losses = score(session, [plant.blind for plant in part], part)[0].mean(1).tolist()
        found |= zip([(plant.length, *plant.cue, *plant.asked) for plant in part], losses, strict=True)
    return [found[plant.length, *plant.cue, *plant.asked] for plant in plants]


def make_keys(
    tokenizer: Any, lengths: Sequence[int], trials: int = TRIALS, depths: int = len(DEPTHS), seed: int = 0
) -> list[Needle]:
    """`trials` pass keys of each length at each of `depths` depths from 0 to 1; see `passkey.make_needles`."""
    return [needle for number in range(trials) for needle in make_needles(tokenizer, lengths, depths, seed + number)]


@dataclass(frozen=True)
class _Trial:
    length: int
    depth: float
    exact: bool
    tokens: float
    nll: float


def _points(
    kind: Literal["passkey", "verbatim"], trials: Sequence[_Trial], blind: Sequence[float], passage: Passage | None
) -> Iterator[RecallPoint]:
    """Means over the trials of each length and depth, in their order."""
    cells: dict[tuple[int, float], list[tuple[_Trial, float]]] = {}
    for trial, without in zip(trials, blind, strict=True):
        cells.setdefault((trial.length, trial.depth), []).append((trial, without))
    for (length, depth), pairs in sorted(cells.items()):
        yield RecallPoint(
            kind=kind,
            length=length,
            depth=depth,
            trials=len(pairs),
            exact=statistics.fmean(trial.exact for trial, _ in pairs),
            tokens=statistics.fmean(trial.tokens for trial, _ in pairs),
            nll=statistics.fmean(trial.nll for trial, _ in pairs),
            blind_nll=statistics.fmean(without for _, without in pairs),
            passage=passage,
        )


def _parts(plants: Sequence[Plant], batch_size: int) -> Iterator[list[Plant]]:
    """In order, at most `batch_size` of one length at a time."""
    for _, group in groupby(plants, key=lambda plant: plant.length):
        same = list(group)
        yield from (same[start : start + batch_size] for start in range(0, len(same), batch_size))


def _tell(on_trial: Callable[[int], None] | None, done: int) -> int:
    if on_trial is not None:
        on_trial(done)
    return done
