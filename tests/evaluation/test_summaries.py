"""Summaries: reading rows, where a summary ends, ROUGE against its own formula, greedy text against `generate`."""

import json
from collections import Counter

import pytest
import torch
from transformers import GenerationConfig

from kvcalib.demo import MODEL_DIR
from kvcalib.errors import InputError
from kvcalib.evaluation.summaries import (
    Article,
    ended,
    evaluate_summaries,
    prompt_ids,
    read_articles,
    rouge,
    shortened,
)
from kvcalib.evaluation.trials import Trial
from kvcalib.model.loading import load_tokenizer
from kvcalib.runtime.eviction import Eviction
from kvcalib.runtime.loader import prove
from tests.tiny import make_artifact, tiny_llama

CONTEXT, NEW = 96, 12
GOOD = {"article": "Words.", "summary_gt": "Word."}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(MODEL_DIR))


@pytest.fixture(scope="module")
def model():
    return tiny_llama(vocab_size=2048, max_position_embeddings=CONTEXT, pad_token_id=1, bos_token_id=0, eos_token_id=0)


@pytest.fixture(scope="module")
def artifact(model, tmp_path_factory):
    return make_artifact(tmp_path_factory.mktemp("a"), model, key_bits=2, value_bits=2)


def test_rows_are_read_in_order(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{**GOOD, "article": f"Number {i}.", "temperature": 0.3} for i in range(4)]
    path.write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    assert read_articles(path) == [Article(f"Number {i}.", "Word.") for i in range(4)]
    assert len(read_articles(path, 2)) == 2


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ('{"article": "a"}', r"a\.jsonl:3: field 'summary_gt' is missing, found \['article'\]"),
        ('{"text": "a", "summary_gt": "b"}', r"a\.jsonl:3: field 'article' is missing"),
        ('{"article": 3, "summary_gt": "b"}', r"a\.jsonl:3: 'article' is int, expected text"),
        ('["a"]', r"a\.jsonl:3: is a list"),
        ('{"article": ', r"a\.jsonl:3: not valid JSON"),
    ],
)
def test_a_bad_row_is_named(tmp_path, second, message):
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n\n{second}\n")
    with pytest.raises(InputError, match=message):
        read_articles(path)


def test_no_rows_and_no_file(tmp_path):
    (tmp_path / "a.jsonl").write_text(" \n")
    with pytest.raises(InputError, match="no rows"):
        read_articles(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not UTF-8"):
        read_articles(tmp_path / "b.jsonl")
    with pytest.raises(InputError, match="No such file"):
        read_articles(tmp_path / "c.jsonl")


@pytest.mark.parametrize(
    ("text", "summary", "over"),
    [
        ("A fire burns.", "A fire burns.", False),
        (" A fire burns.\nArticle: next", "A fire burns.", True),
        ("\n\n A fire", "A fire", False),
        ("A fire###more", "A fire", True),
        ("A fire##", "A fire##", False),
        ("###", "", True),
        ("\n", "", False),
        ("", "", False),
    ],
)
def test_where_a_summary_ends(text, summary, over):
    assert shortened(text) == summary
    assert ended(text) is over


def test_rouge_is_its_formula():
    found = ["the cat sat on mat red", "dogs bark", ""]
    expected = ["a cat sat on the red mat", "cats meow loud", "words"]
    scores = {name: [] for name in ("rouge1", "rouge2", "rougeL")}
    for a, b in zip(map(str.split, found), map(str.split, expected), strict=True):
        for n in (1, 2):
            grams = [Counter(tuple(x[i : i + n]) for i in range(len(x) - n + 1)) for x in (a, b)]
            scores[f"rouge{n}"].append(f_measure((grams[0] & grams[1]).total(), *(g.total() for g in grams)))
        table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
        scores["rougeL"].append(f_measure(table[-1][-1], len(a), len(b)))
    result = rouge(found, expected)
    for name, each in scores.items():
        assert result[name] == pytest.approx(sum(each) / 3)
    assert result["rouge1"] > result["rougeL"] > result["rouge2"] > 0


def f_measure(hits, found, expected):
    return 2 * hits / (found + expected) if hits else 0.0


def test_long_articles_lose_their_front(tokenizer):
    text = "Every token of this article counts. " * 9
    whole = tokenizer(text).input_ids
    assert prompt_ids(tokenizer, text, len(whole)) == (whole, False)
    cut, was = prompt_ids(tokenizer, text, 20)
    assert was
    assert (cut[0], cut[1:]) == (tokenizer.bos_token_id, whole[-19:])


def test_summaries_are_what_generate_writes(model, tokenizer, artifact):
    articles = [
        Article("The cache keeps what matters. " * 4, "the cache keeps what matters"),
        Article("", "nothing"),
        Article("A long article about nothing much. " * 30, "long"),
    ]
    rotations = prove(model, list(artifact.quantizers))
    trials = [Trial(artifact), Trial(artifact, Eviction(0.5, 0.1, "h2o"))]
    results = evaluate_summaries(model, tokenizer, rotations, trials, articles, recent=0, new_tokens=NEW)
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=1, eos_token_id=0)
    for article, text in zip(articles, results[0].summaries, strict=True):
        ids, cut = prompt_ids(tokenizer, article.text, CONTEXT - NEW)
        assert len(ids) <= CONTEXT - NEW
        assert cut == (article.summary == "long")
        said = model.generate(torch.tensor([ids]), generation_config=config)[0, len(ids) :]
        assert text == shortened(tokenizer.decode(said, skip_special_tokens=True))
    plain, packed, evicted = results
    assert (plain.artifact, plain.same, plain.effective_bits) == (None, 1, 16)
    assert (packed.policy, evicted.policy) == (None, "h2o")
    assert (plain.articles, plain.cut, plain.empty) == (3, 1, 1)
    assert "1 cut at the front to 84 tokens, 1 without text" in plain.protocol
    assert plain.rouge1 == pytest.approx(rouge(plain.summaries, [a.summary for a in articles])["rouge1"])
    assert evicted.kept < 0.8 * packed.kept
    assert packed.cache_bytes < plain.cache_bytes / 2


def test_an_exact_window_says_the_same(model, tokenizer, artifact):
    articles = [Article("The cache keeps what matters.", "a"), Article("Another article.", "b")]
    rotations = prove(model, list(artifact.quantizers))
    exact, coarse = (
        evaluate_summaries(model, tokenizer, rotations, [Trial(artifact)], articles, recent=recent, new_tokens=NEW)[1]
        for recent in (CONTEXT, 0)
    )
    assert exact.same == 1
    assert coarse.same < 1, "2 bits on a random model must change some word"


def test_a_context_without_room(model, tokenizer, artifact):
    with pytest.raises(InputError, match="context is 96 tokens, no room"):
        evaluate_summaries(model, tokenizer, {}, [], [Article("a", "b")], new_tokens=CONTEXT)
