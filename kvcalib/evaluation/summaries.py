"""Summarisation: ROUGE of greedy summaries, by the unquantized model and by each trial.

Rows are XSUM-style JSON lines, `article` (the whole prompt, demonstrations included if there are any) and `summary_gt`.
The prompt goes through in one pass, then token by token, at most 64 tokens. A summary ends at "###" or at a newline,
once it has begun: line breaks before its first word do not count. Of an article that does not fit into the model's
context the front is cut off, because the instruction stands at the end; what the tokenizer puts before every text
stays.

F measures of ROUGE-1, -2 and -L (Lin, 2004) by `rouge-score`, with stemming, mean over rows. A summary of no words
scores 0 and counts.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from transformers import PreTrainedModel

from kvcalib.errors import InputError
from kvcalib.evaluation.trials import Session, Trial, cache_bytes, tokens_kept
from kvcalib.model.loading import input_device
from kvcalib.model.rotary import Rotation
from kvcalib.model.text import encode
from kvcalib.runtime.cache import PackedCache
from kvcalib.runtime.loader import Prefill

FIELDS = ("article", "summary_gt")
NEW_TOKENS = 64
STOP = "###"
MEASURES = ("rouge1", "rouge2", "rougeL")
PROTOCOL = (
    "greedy, at most {new} tokens, up to the first '###' or newline after a word; the article in one pass ({prefill} "
    "prefill), evicted, then token by token; {rows} articles of {tokens:.0f} tokens on average, {cut} cut at the front "
    "to {room} tokens, {empty} without text; F measures of rouge-score with stemming, a summary without words scores 0"
)


@dataclass(frozen=True)
class Article:
    """One row of the data: the prompt, and the summary that a person wrote."""

    text: str
    summary: str


class Summaries(BaseModel):
    """Measures of one trial; sizes are means over articles, at the end of each summary."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    artifact: str | None = Field(description="None: the unquantized model with its full cache.")
    policy: str | None
    eviction: dict[str, Any] | None
    rouge1: float
    rouge2: float
    rougeL: float
    same: float = Field(description="Share of summaries that are the unquantized model's, word for word.")
    articles: int
    cut: int = Field(description="Articles that were cut to fit.")
    empty: int = Field(description="Articles without text.")
    cache_bytes: float = Field(description="Of one article; of the unquantized model at 16 bits.")
    effective_bits: float
    kept: float
    protocol: str
    summaries: list[str]


def read_articles(path: str | Path, most: int | None = None) -> list[Article]:
    """The first `most` rows of a .jsonl file.

    Raises:
        InputError: the file is missing or has no rows; a line is not a JSON object, lacks a field or holds something
            else than text there. Names the line.
    """
    path = Path(path).expanduser()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise InputError(
            f"data {str(path)!r}: {reason}; give a .jsonl file with {' and '.join(FIELDS)} per line"
        ) from None
    numbered = [(f"{path}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise InputError(f"data {str(path)!r}: no rows; give a .jsonl file with {' and '.join(FIELDS)} per line")
    return [_article(line, where) for where, line in numbered[:most]]


def _article(line: str, where: str) -> Article:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: is a {type(row).__name__}, expected an object with {' and '.join(FIELDS)}")
    for name in FIELDS:
        if name not in row:
            raise InputError(f"{where}: field {name!r} is missing, found {sorted(row)}; add it, as text")
        if not isinstance(row[name], str):
            raise InputError(f"{where}: {name!r} is {type(row[name]).__name__}, expected text")
    return Article(row["article"], row["summary_gt"])


def prompt_ids(tokenizer: Any, text: str, room: int) -> tuple[list[int], bool]:
    """At most `room` token ids of `text`, its end if it has more, and whether it was cut."""
    ids = encode(tokenizer, text)
    if len(ids) <= room:
        return ids, False
    head: list[int] = []
    for before, of_text in zip(encode(tokenizer, ""), ids, strict=False):
        if before != of_text or len(head) == room - 1:
            break
        head.append(before)
    return head + ids[len(ids) - (room - len(head)) :], True


def shortened(text: str) -> str:
    """A summary up to where it ends; `STOP` or a newline behind its first word ends it."""
    return text.strip().split(STOP)[0].strip().split("\n")[0].strip()


def ended(text: str) -> bool:
    """Whether nothing that follows `text` can belong to the summary."""
    begun = text.lstrip()
    return STOP in begun or "\n" in begun


def rouge(found: Sequence[str], expected: Sequence[str]) -> dict[str, float]:
    """Mean F measures over pairs of summaries.

    Raises:
        InputError: rouge-score is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ModuleNotFoundError as error:
        raise InputError(
            f"--task summaries needs the package rouge-score ({error}); pip install 'kvcalib[eval]', or rouge-score"
        ) from None
    scorer = RougeScorer(list(MEASURES), use_stemmer=True)
    scores = [scorer.score(target, text) for target, text in zip(expected, found, strict=True)]
    return {name: statistics.fmean(score[name].fmeasure for score in scores) for name in MEASURES}


@dataclass
class _Said:
    """Of one trial."""

    texts: list[str] = field(default_factory=list)
    bytes: list[float] = field(default_factory=list)
    bits: list[float] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)


def evaluate_summaries(
    model: PreTrainedModel,
    tokenizer: Any,
    rotations: Mapping[int, Rotation],
    trials: Sequence[Trial],
    articles: Sequence[Article],
    sinks: int | None = None,
    recent: int | None = None,
    prefill: Prefill = "quantized",
    new_tokens: int = NEW_TOKENS,
    on_article: Callable[[int], None] | None = None,
) -> list[Summaries]:
    """The unquantized model's measures, and those of every trial.

    Args:
        rotations: what `prove` returned for all layers of all artifacts.
        sinks, recent, prefill: as `attach`.

    Raises:
        InputError: the model's context has no room for a prompt. UnsupportedModel, ArtifactMismatch: as `attach`.
    """
    rouge([], []) if not articles else rouge(["a"], ["a"])  # before the model runs for an hour
    longest = int(model.config.get_text_config(decoder=True).max_position_embeddings)
    room = longest - new_tokens
    if room < 1:
        raise InputError(f"the model's context is {longest} tokens, no room for a prompt and {new_tokens} new ones")
    prompts = [prompt_ids(tokenizer, article.text, room) for article in articles]
    everyone = [Trial(None), *trials]
    said = [_Said() for _ in everyone]
    stops = _end_tokens(model, tokenizer)
    for done, (ids, _) in enumerate(prompts, 1):
        for trial, mine in zip(everyone, said, strict=True):
            if not ids:
                mine.texts.append("")
                continue
            with trial.run(model, rotations, sinks, recent, prefill) as session:
                _summarise(session, tokenizer, ids, new_tokens, stops, mine)
        if on_article is not None:
            on_article(done)
    protocol = PROTOCOL.format(
        new=new_tokens, prefill=prefill, rows=len(articles), room=room,
        tokens=statistics.fmean(len(ids) for ids, _ in prompts), cut=sum(cut for _, cut in prompts),
        empty=sum(not article.text.strip() for article in articles),
    )  # fmt: skip
    return [
        _result(trial, mine, said[0], articles, prompts, protocol) for trial, mine in zip(everyone, said, strict=True)
    ]


def _summarise(session: Session, tokenizer: Any, ids: list[int], new_tokens: int, stops: set[int], mine: _Said) -> None:
    """Greedy tokens after `ids` until one of `stops`, or until the text has ended."""
    device = input_device(session.model)
    cache, logits = session.read(torch.tensor([ids], device=device))
    written: list[int] = []
    text = ""
    while len(written) < new_tokens:
        token = int(logits[0].argmax())
        if token in stops:
            break
        written.append(token)
        text = tokenizer.decode(written, skip_special_tokens=True)
        if ended(text) or len(written) == new_tokens:
            break
        logits = session.decode(torch.tensor([[token]], device=device), cache)[:, -1]
    mine.texts.append(shortened(text))
    mine.bytes.append(cache_bytes(cache))
    mine.bits.append(cache.effective_bits() if isinstance(cache, PackedCache) else 16.0)
    mine.kept.append(tokens_kept(cache))


def _end_tokens(model: PreTrainedModel, tokenizer: Any) -> set[int]:
    """Tokens that end a text: those of the model's generation settings, and the tokenizer's."""
    named = getattr(model.generation_config, "eos_token_id", None)
    every = named if isinstance(named, list) else [named]
    return {int(i) for i in (*every, tokenizer.eos_token_id) if i is not None}


def _result(
    trial: Trial,
    mine: _Said,
    exact: _Said,
    articles: Sequence[Article],
    prompts: Sequence[tuple[list[int], bool]],
    protocol: str,
) -> Summaries:
    return Summaries(
        artifact=trial.where,
        policy=trial.policy,
        eviction=trial.described,
        **rouge(mine.texts, [article.summary for article in articles]),
        same=statistics.fmean(a == b for a, b in zip(mine.texts, exact.texts, strict=True)),
        articles=len(articles),
        cut=sum(cut for _, cut in prompts),
        empty=sum(not article.text.strip() for article in articles),
        cache_bytes=statistics.fmean(mine.bytes or [0.0]),
        effective_bits=statistics.fmean(mine.bits or [0.0]),
        kept=statistics.fmean(mine.kept or [0.0]),
        protocol=protocol,
        summaries=mine.texts,
    )
