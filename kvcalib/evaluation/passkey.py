"""Passkey retrieval: a number in the middle of filler, asked for at the end (Mohtashami and Jaggi, arXiv 2305.16300).

The text up to the question is the prompt: one pass, then evicted, so a policy chooses without knowing what will be
asked. The question goes through in passes of a few tokens, the key's own tokens one by one, each after the right ones
before it. Two figures:

- *retrieved*: every token of the key was the most likely one. Greedy decoding writes the key if and only if this holds,
  since it then has the right tokens before it at every step.
- *score*: log-probability of the key's tokens, nats per token, higher is better. A model too small to retrieve still
  differs between caches that hold the key and caches that do not. Beside it stands the score of the unquantized model
  on the same text without the key.

Keys, their places and the text follow from the seed.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from transformers import PreTrainedModel

from kvcalib.errors import InputError
from kvcalib.evaluation.trials import Session, Trial, cache_bytes, tokens_kept
from kvcalib.model.loading import input_device
from kvcalib.model.rotary import Rotation
from kvcalib.model.text import encode
from kvcalib.runtime.loader import Prefill

DIGITS = 5
STEP = 8
INTRODUCTION = "Somewhere in this text stands a pass key. Find it and remember it."
FILLER = (
    "The grass is green.", "The sky is blue.", "The sun is bright.", "Here we go again.", "We walk there and back.",
)  # fmt: skip
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"
PROTOCOL = (
    "{prompts} prompts of {lengths} tokens, the key of {digits} digits at depths from 0 to 1; the text before the "
    "question in one pass ({prefill} prefill), evicted, the question in passes of {step} tokens, the key token by "
    "token; seed {seed}; without the key in the text the unquantized model's score is {blind:.3f}"
)


@dataclass(frozen=True)
class Needle:
    """One prompt: the token ids before the question, those of the question, and those of the key.

    Attributes:
        blind: the ids before the question of the same text without the key.
        length: tokens that were asked for, all three together; at most so many are there. depth: 0 (front) to 1 (end).
    """

    context: list[int]
    question: list[int]
    key: list[int]
    blind: list[int]
    length: int
    depth: float


class Cell(BaseModel):
    """Measures at one length and depth."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    length: int
    depth: float
    retrieved: bool
    score: float


class Passkey(BaseModel):
    """Measures of one trial; sizes are means over prompts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    artifact: str | None = Field(description="None: the unquantized model with its full cache.")
    policy: str | None
    eviction: dict[str, Any] | None
    retrieved: float = Field(description="Share of keys.")
    score: float = Field(description="Mean log-probability of a key's token, in nats.")
    blind_score: float = Field(description="The unquantized model's score without the key in the text.")
    digits: float = Field(description="Share of the keys' tokens that were the most likely one.")
    kept: float = Field(description="Tokens of the prompt that a KV head holds when the question comes.")
    cache_bytes: float = Field(description="At that time; of the unquantized model at 16 bits.")
    cells: list[Cell]
    protocol: str


def make_needles(tokenizer: Any, lengths: Sequence[int], count: int, seed: int = 0) -> list[Needle]:
    """`count` prompts of each length, depths spread evenly from 0 to 1.

    Raises:
        InputError: a length cannot hold the key and the question.
    """
    return [
        _needle(tokenizer, length, number / max(1, count - 1), random.Random(f"{seed}:{length}:{number}"))
        for length in lengths
        for number in range(count)
    ]


def _needle(tokenizer: Any, length: int, depth: float, generator: random.Random) -> Needle:
    digits = str(generator.randrange(10 ** (DIGITS - 1), 10**DIGITS))
    start = generator.randrange(len(FILLER))
    least = len(encode(tokenizer, _text(digits, depth, start, 0)))
    if length < least:
        raise InputError(
            f"length is {length} tokens, a pass key with its question takes {least}; give a larger --seq-len"
        )
    each = len(encode(tokenizer, " ".join(FILLER * 8))) / (8 * len(FILLER))
    sentences = int((length - least) / each) + 1
    while sentences and len(encode(tokenizer, _text(digits, depth, start, sentences))) > length:
        sentences -= 1
    text = _text(digits, depth, start, sentences)
    asked = text.rindex(QUESTION)
    whole = encode(tokenizer, text)
    while whole[-1] in tokenizer.all_special_ids:  # what ends a text is no digit
        whole.pop()
    # Tokens may reach over these ends; what two texts have in common belongs to the first.
    context = _common(whole, encode(tokenizer, text[:asked].rstrip()))
    question = _common(whole, encode(tokenizer, text[: asked + len(QUESTION)]))
    blind = encode(tokenizer, text[:asked].replace(NEEDLE.format(key=digits) + " ", "").rstrip())
    return Needle(whole[:context], whole[context:question], whole[question:], blind, length, depth)


def _text(digits: str, depth: float, start: int, sentences: int) -> str:
    filler = [FILLER[(start + i) % len(FILLER)] for i in range(sentences)]
    place = round(depth * sentences)
    needle = NEEDLE.format(key=digits)
    return " ".join([INTRODUCTION, *filler[:place], needle, *filler[place:], f"{QUESTION} {digits}"])


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens `a` and `b` have in common at the front; at least one of `a` is left over."""
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return min(same, len(a) - 1)


@dataclass(frozen=True)
class Answer:
    """What a session made of one prompt.

    Attributes:
        cell: whether the key was retrieved, and its score. right: share of the key's tokens that were the most likely.
        kept, bytes: tokens and bytes of the cache when the question came.
    """

    cell: Cell
    right: float
    kept: float
    bytes: float


def evaluate_passkey(
    model: PreTrainedModel,
    rotations: Mapping[int, Rotation],
    trials: Sequence[Trial],
    needles: Sequence[Needle],
    sinks: int | None = None,
    recent: int | None = None,
    prefill: Prefill = "quantized",
    seed: int = 0,
    on_prompt: Callable[[int], None] | None = None,
) -> list[Passkey]:
    """The unquantized model's measures, and those of every trial.

    Args:
        rotations: what `prove` returned for all layers of all artifacts.
        sinks, recent, prefill: as `attach`. seed: what `make_needles` was given, for the protocol.

    Raises:
        UnsupportedModel, ArtifactMismatch: as `attach`.
    """
    everyone = [Trial(None), *trials]
    found: list[list[Answer]] = [[] for _ in everyone]
    blind = []
    for done, needle in enumerate(needles, 1):
        for trial, mine in zip(everyone, found, strict=True):
            with trial.run(model, rotations, sinks, recent, prefill) as session:
                mine.append(ask(session, needle))
        blind.append(blind_score(model, needle))
        if on_prompt is not None:
            on_prompt(done)
    protocol = PROTOCOL.format(
        prompts=len(needles), lengths=", ".join(map(str, sorted({n.length for n in needles}))), digits=DIGITS,
        prefill=prefill, step=STEP, seed=seed, blind=statistics.fmean(blind),
    )  # fmt: skip
    return [
        Passkey(
            artifact=trial.where,
            policy=trial.policy,
            eviction=trial.described,
            retrieved=statistics.fmean(each.cell.retrieved for each in mine),
            score=statistics.fmean(each.cell.score for each in mine),
            blind_score=statistics.fmean(blind),
            digits=statistics.fmean(each.right for each in mine),
            kept=statistics.fmean(each.kept for each in mine),
            cache_bytes=statistics.fmean(each.bytes for each in mine),
            cells=[each.cell for each in mine],
            protocol=protocol,
        )
        for trial, mine in zip(everyone, found, strict=True)
    ]


def ask(session: Session, needle: Needle) -> Answer:
    """One prompt on a new cache of `session`."""
    cache, _ = session.read(torch.tensor([needle.context], device=input_device(session.model)))
    kept, held = tokens_kept(cache), cache_bytes(cache)
    score, right = _scores(session, needle.question, needle.key, cache)
    cell = Cell(length=needle.length, depth=needle.depth, retrieved=bool(right.all()), score=float(score.mean()))
    return Answer(cell, float(right.double().mean()), kept, held)


def blind_score(model: PreTrainedModel, needle: Needle) -> float:
    """The unquantized model's score of the key that it has not seen."""
    session = Session(model, None)
    cache, _ = session.read(torch.tensor([needle.blind], device=input_device(model)))
    return float(_scores(session, needle.question, needle.key, cache)[0].mean())


def _scores(session: Session, question: list[int], key: list[int], cache: Any) -> tuple[Tensor, Tensor]:
    """Of each token of the key: its log-probability after the right ones, and whether it was the most likely."""
    device = input_device(session.model)
    asked = session.decode(torch.tensor([question], device=device), cache, STEP)[0, -1:]
    told = [session.decode(torch.tensor([[token]], device=device), cache)[0] for token in key[:-1]]
    logits = torch.cat([asked, *told]).float()
    target = torch.tensor(key, device=device)
    scores = logits.log_softmax(-1).gather(1, target[:, None])[:, 0]
    return scores.cpu(), (logits.argmax(-1) == target).cpu()
