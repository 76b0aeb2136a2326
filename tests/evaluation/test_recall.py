"""Recall on a model that copies by construction: trials as they are described, scores of one pass, damage caught."""

import itertools

import numpy as np
import pytest
import torch

from kvcalib.demo import MODEL_DIR
from kvcalib.errors import InputError
from kvcalib.evaluation import passkey, recall
from kvcalib.evaluation.contender import ArtifactContender, Unquantized
from kvcalib.evaluation.failures import Failures
from kvcalib.evaluation.recall import ASKED, CUE, choose_passage, make_keys, make_plants, measure_recall
from kvcalib.evaluation.trials import Session
from kvcalib.model.loading import load_tokenizer
from tests.copying import copying_llama
from tests.evaluation.contenders import Custom, Refusing, no_values, one_late
from tests.tiny import make_artifact, tiny_llama

SIZE = CUE + ASKED
LENGTHS = (80, 130)


@pytest.fixture(scope="module")
def model():
    return copying_llama()


@pytest.fixture(scope="module")
def text():
    """Every token once, so that what follows a token is never in doubt."""
    return np.random.default_rng(0).permutation(512).reshape(4, 128)


@pytest.mark.parametrize("passage", recall.PASSAGES)
def test_trials_hold_the_passage_at_their_depth(text, passage):
    plants = make_plants(text, LENGTHS, passage, trials=2, depths=(0, 0.5, 1), seed=3, special=range(100))
    assert [(p.length, p.depth) for p in plants] == [(n, d) for n in LENGTHS for _ in range(2) for d in (0, 0.5, 1)]
    stream = text.flatten().tolist()
    for plant in plants:
        planted = plant.cue + plant.asked
        body = plant.length - 2 * SIZE
        place = {0: 0, 0.5: body // 2, 1: body}[plant.depth]
        assert (len(plant.cue), len(plant.asked)) == (CUE, ASKED)
        assert plant.context[place : place + SIZE] == planted
        assert len(plant.context) + SIZE == plant.length
        around = plant.context[:place] + plant.context[place + SIZE :]
        assert len(plant.blind) == len(plant.context)
        assert plant.blind[:body] == around
        cut = stream if passage == "random" else [t for t in stream if t not in planted]
        starts = range(len(stream) - SIZE + 1)
        in_text = any(stream[i : i + SIZE] == planted for i in starts)
        assert in_text == (passage == "text")
        if passage == "random":
            assert len(set(planted)) == SIZE
            assert min(planted) >= 100  # `special` are no part of it
        else:
            at = cut.index(plant.blind[0])
            assert plant.blind == cut[at : at + len(plant.blind)]
    for shallow, deep in itertools.pairwise(plants[:3]):
        assert (shallow.asked, shallow.blind) == (deep.asked, deep.blind)
    assert plants[0].asked != plants[3].asked


def test_trials_follow_from_the_seed(text):
    again = [make_plants(text, LENGTHS, "random", seed=s) for s in (1, 1, 2)]
    assert again[0] == again[1]
    assert all(a.asked != b.asked for a, b in zip(again[0], again[2], strict=True))
    assert make_plants(text, LENGTHS[1:], "random", seed=1) == again[0][len(again[0]) // 2 :]


def test_texts_without_room_are_refused(text):
    with pytest.raises(InputError, match="length is 63 tokens, a passage of 32 tokens twice takes 64"):
        make_plants(text, [63], "text")
    with pytest.raises(InputError, match=r"the text has 512 tokens, a trial takes 513; give more --samples"):
        make_plants(text, [513], "text")
    with pytest.raises(InputError, match="the text repeats itself"):
        make_plants(np.zeros(400, dtype=int), [100], "text")


def test_the_model_copies_and_blind_it_does_not(model, text):
    plants = make_plants(text, LENGTHS, "text", trials=2)
    found = measure_recall(model, [Unquantized()], plants, [], "text", Failures(), batch_size=3)["fp16"]
    assert [(p.length, p.depth) for p in found] == [(n, d) for n in LENGTHS for d in recall.DEPTHS]
    for point in found:
        assert (point.kind, point.passage, point.trials) == ("verbatim", "text", 2)
        assert (point.exact, point.tokens) == (1, 1)
        assert point.nll < 0.01
        assert point.blind_nll > 5


def test_scores_are_those_of_one_pass(text):
    """On a model that does not copy, where every figure differs."""
    model = tiny_llama(vocab_size=512)
    plants = make_plants(text, [90], "random", trials=3, depths=(0.3, 0.9))
    found = measure_recall(model, [Unquantized()], plants, [], "random", Failures(), batch_size=4)["fp16"]
    for depth, point in zip((0.3, 0.9), found, strict=True):
        nll, right, blind = [], [], []
        for plant in (p for p in plants if p.depth == depth):
            for context, into in ((plant.context, nll), (plant.blind, blind)):
                ids = torch.tensor([context + plant.cue + plant.asked])
                with torch.no_grad():
                    logits = model(ids).logits[0].double()
                for number, token in enumerate(plant.asked):
                    place = len(context) + CUE + number - 1
                    into.append(float(logits[place].logsumexp(0) - logits[place, token]))
                    if into is nll:
                        right.append(int(logits[place].argmax()) == token)
        assert point.nll == pytest.approx(np.mean(nll), rel=1e-4)
        assert point.blind_nll == pytest.approx(np.mean(blind), rel=1e-4)
        assert point.tokens == pytest.approx(np.mean(right))
        assert point.exact == 0


@pytest.mark.parametrize(("fault", "layer"), [(no_values, 0), (no_values, 1), (one_late, 1)])
def test_planted_faults_are_caught(model, text, fault, layer):
    plants = make_plants(text, [100], "text", trials=2)
    contenders = [Custom("own"), Custom("faulty", fault, layer)]
    found = measure_recall(model, contenders, plants, [], "text", Failures(), batch_size=10)
    for own, faulty in zip(found["own"], found["faulty"], strict=True):
        assert (own.exact, own.tokens) == (1, 1)
        assert faulty.exact == 0
        assert faulty.tokens < 0.2
        assert faulty.nll > own.nll + 1


def test_packed_caches_recall_by_their_bits(model, text, tmp_path):
    plants = make_plants(text, [100], "random", trials=2)
    artifacts = [make_artifact(tmp_path / str(b), model, key_bits=b, value_bits=b) for b in (8, 1)]
    contenders = [Unquantized(), *(ArtifactContender(a, n) for a, n in zip(artifacts, ("8", "1"), strict=True))]
    found = measure_recall(model, contenders, plants, [], "random", Failures(), batch_size=10)
    tokens, nll = ({n: np.mean([getattr(p, what) for p in f]) for n, f in found.items()} for what in ("tokens", "nll"))
    assert tokens["8"] == pytest.approx(tokens["fp16"], abs=0.02)
    assert tokens["fp16"] > 0.9
    assert nll["8"] == pytest.approx(nll["fp16"], rel=0.1)
    assert tokens["1"] < 0.95 * tokens["fp16"]
    assert nll["1"] > nll["fp16"] + 0.1


def test_random_passages_are_for_models_that_copy(model, text):
    plants = make_plants(text, [100], "random", trials=2)
    passage, share = choose_passage(model, plants, batch_size=5)
    assert (passage, share > 0.8) == ("random", True)
    passage, share = choose_passage(tiny_llama(vocab_size=512), plants, batch_size=5)
    assert (passage, share < 0.1) == ("text", True)


def test_pass_keys_are_those_of_passkey(text):
    tokenizer = load_tokenizer(str(MODEL_DIR))
    model = tiny_llama(vocab_size=2048)
    needles = make_keys(tokenizer, [100], trials=2, depths=3, seed=4)
    assert [n.depth for n in needles] == [0, 0.5, 1, 0, 0.5, 1]
    assert len({tuple(n.key) for n in needles}) == 6
    found = measure_recall(model, [Unquantized()], [], needles, "text", Failures())["fp16"]
    answers = [passkey.ask(Session(model, None), needle) for needle in needles]
    for number, point in enumerate(found):
        mine = [answers[number], answers[number + 3]]
        assert (point.kind, point.passage, point.trials, point.length) == ("passkey", None, 2, 100)
        assert point.nll == pytest.approx(-np.mean([a.cell.score for a in mine]))
        assert point.tokens == pytest.approx(np.mean([a.right for a in mine]))
        assert point.blind_nll == pytest.approx(
            -np.mean([passkey.blind_score(model, needles[i]) for i in (number, number + 3)])
        )


def test_who_fails_is_left_out(model, text):
    plants = make_plants(text, [80], "text", trials=1, depths=(0.5,))
    failures, told = Failures(), []
    found = measure_recall(
        model, [Refusing(), Custom("own")], plants, [], "text", failures, on_trial=told.append
    )  # fmt: skip
    assert list(found) == ["own"]
    assert list(failures) == ["refusing"]
    assert told[-1] == 2
