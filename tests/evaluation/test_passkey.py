"""Pass keys: the prompts themselves, scores against one forward pass, retrieval against `generate`."""

import dataclasses
import itertools

import pytest
import torch
from transformers import GenerationConfig

from kvcalib.demo import MODEL_DIR
from kvcalib.errors import InputError
from kvcalib.evaluation.passkey import DIGITS, QUESTION, evaluate_passkey, make_needles
from kvcalib.evaluation.trials import Trial
from kvcalib.model.loading import load_tokenizer
from kvcalib.runtime.eviction import Eviction
from kvcalib.runtime.loader import prove
from tests.tiny import make_artifact, tiny_llama

LENGTHS, COUNT = (110, 170), 3


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(MODEL_DIR))


@pytest.fixture(scope="module")
def model():
    return tiny_llama(vocab_size=2048, pad_token_id=1, bos_token_id=0, eos_token_id=0)


@pytest.fixture(scope="module")
def artifact(model, tmp_path_factory):
    return make_artifact(tmp_path_factory.mktemp("a"), model, key_bits=3, value_bits=3)


@pytest.fixture(scope="module")
def needles(tokenizer):
    return make_needles(tokenizer, LENGTHS, COUNT, seed=5)


def digits(tokenizer, needle):
    return tokenizer.decode(needle.key).strip()


def test_prompts_hold_the_key_at_their_depth(tokenizer, needles):
    assert [(n.length, n.depth) for n in needles] == [(length, d) for length in LENGTHS for d in (0, 0.5, 1)]
    keys = {digits(tokenizer, needle) for needle in needles}
    assert len(keys) == len(needles)
    for needle in needles:
        key = digits(tokenizer, needle)
        assert len(key) == DIGITS
        assert key.isdigit()
        ids = needle.context + needle.question + needle.key
        assert needle.length - 15 < len(ids) <= needle.length
        assert ids[0] == tokenizer.bos_token_id
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert text.endswith(f"{QUESTION} {key}")
        assert text.count(key) == 3
        assert text == tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True)
        assert key not in tokenizer.decode(needle.context + needle.question).removesuffix(key)[-len(QUESTION) :]
        assert key not in tokenizer.decode(needle.blind)
        place = tokenizer.decode(needle.context).index(key) / len(tokenizer.decode(needle.context))
        assert abs(place - needle.depth) < 0.4
    for shallow, deep in itertools.pairwise(needles):
        if shallow.length == deep.length:
            first, second = (tokenizer.decode(n.context).index(digits(tokenizer, n)) for n in (shallow, deep))
            assert first < second


def test_prompts_follow_from_the_seed(tokenizer, needles):
    assert make_needles(tokenizer, LENGTHS, COUNT, seed=5) == needles
    assert make_needles(tokenizer, LENGTHS[1:], COUNT, seed=5) == needles[COUNT:]
    other = make_needles(tokenizer, LENGTHS, COUNT, seed=6)
    assert all(a.key != b.key for a, b in zip(other, needles, strict=True))


def test_a_length_that_is_too_short(tokenizer):
    with pytest.raises(InputError, match=r"length is 20 tokens, a pass key with its question takes \d+; .*--seq-len"):
        make_needles(tokenizer, [20], 1)


def scores(model, context, question, key):
    """Log-probabilities of the key's tokens, in one forward pass."""
    with torch.no_grad():
        logits = model(torch.tensor([context + question + key])).logits[0].double().log_softmax(-1)
    first = len(context) + len(question) - 1
    return [float(logits[first + i, token]) for i, token in enumerate(key)]


def test_scores_are_those_of_one_pass(model, artifact, needles):
    rotations = prove(model, list(artifact.quantizers))
    trials = [Trial(artifact), Trial(artifact, Eviction(0.3, 0.1, "window"))]
    plain, packed, evicted = evaluate_passkey(model, rotations, trials, needles, seed=5)
    expected = [sum(scores(model, n.context, n.question, n.key)) / len(n.key) for n in needles]
    assert [cell.score for cell in plain.cells] == pytest.approx(expected, abs=1e-4)
    assert plain.score == pytest.approx(sum(expected) / len(expected), abs=1e-4)
    blind = [sum(scores(model, n.blind, n.question, n.key)) / len(n.key) for n in needles]
    assert packed.blind_score == pytest.approx(sum(blind) / len(blind), abs=1e-4)
    assert [(c.length, c.depth) for c in evicted.cells] == [(n.length, n.depth) for n in needles]
    assert packed.score != pytest.approx(plain.score, abs=1e-5)
    assert evicted.score != pytest.approx(packed.score, abs=1e-5)
    assert plain.kept == pytest.approx(sum(len(n.context) for n in needles) / len(needles))
    assert evicted.kept < 0.31 * plain.kept
    assert evicted.cache_bytes < 0.6 * packed.cache_bytes < 0.6 * plain.cache_bytes
    assert "seed 5" in plain.protocol


def test_retrieved_is_what_greedy_decoding_writes(model, artifact, needles):
    needle = needles[0]
    ids = torch.tensor([needle.context + needle.question])
    config = GenerationConfig(max_new_tokens=4, do_sample=False, pad_token_id=1, eos_token_id=None)
    said = model.generate(ids, generation_config=config)[0, ids.shape[1] :].tolist()
    right = dataclasses.replace(needle, key=said)
    wrong = dataclasses.replace(needle, key=[*said[:2], (said[2] + 1) % 2048, said[3]])
    rotations = prove(model, list(artifact.quantizers))
    plain = evaluate_passkey(model, rotations, [], [right, wrong])[0]
    assert [cell.retrieved for cell in plain.cells] == [True, False]
    assert plain.retrieved == 0.5
    assert 0.5 < plain.digits < 1
