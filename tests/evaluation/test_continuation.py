"""Continuations, against the same passes made by hand."""

import math

import numpy as np
import pytest
import torch

import kvcalib
from kvcalib.evaluation.continuation import evaluate_continuations, split
from kvcalib.evaluation.trials import Trial
from kvcalib.runtime.eviction import Eviction
from tests.tiny import make_artifact, tiny_llama, tokens

ROWS, LENGTH, FIRST, STEP = 4, 64, 48, 5
BUDGET = {"keep": 0.4, "recent": 0.1}


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def artifact(model, tmp_path_factory):
    return make_artifact(tmp_path_factory.mktemp("a"), model, key_bits=3, value_bits=3)


@pytest.fixture(scope="module")
def ids():
    return tokens(ROWS, LENGTH)


@pytest.fixture(scope="module")
def results(model, artifact, ids):
    evictions = (None, Eviction(1.0, policy="full"), Eviction(0.4, 0.1, "h2o"), Eviction(0.4, 0.1, "window"))
    trials = [Trial(artifact, eviction) for eviction in evictions]
    return evaluate_continuations(model, trials, ids.numpy(), batch_size=3, step=STEP)


def by_hand(model, artifact, row, **keep):
    """Logits of one row's continuation, and its cache."""
    kvcalib.attach(model, artifact, **keep)
    try:
        cache = artifact.new_cache(model) if not keep else kvcalib.runtime.loader.attachment_of(model).make_cache()
        with torch.no_grad():
            model(row[:, :FIRST], past_key_values=cache)
            cache.evict()
            parts = [
                model(row[:, i : min(i + STEP, LENGTH)], past_key_values=cache).logits
                for i in range(FIRST, LENGTH, STEP)
            ]
    finally:
        kvcalib.detach(model)
    return torch.cat(parts, 1), cache


@pytest.mark.parametrize(
    ("number", "keep"),
    [(0, {}), (2, BUDGET | {"policy": "h2o"}), (3, BUDGET | {"policy": "window"})],
)
def test_rows_equal_passes_made_by_hand(model, artifact, ids, results, number, keep):
    found = results[number]
    with torch.no_grad():
        exact = model(ids).logits[:, FIRST:].double().log_softmax(-1)
    nll, agree, kld = [], [], []
    for row in range(ROWS):
        logits, cache = by_hand(model, artifact, ids[row : row + 1], **keep)
        q = logits.double().log_softmax(-1)[0]
        target = ids[row, FIRST + 1 :, None]
        nll.append(-q[:-1].gather(1, target).mean().item())
        kld.append((exact[row].exp() * (exact[row] - q)).sum(-1).mean().item())
        agree.append((q.argmax(-1) == exact[row].argmax(-1)).double().mean().item())
    expected = [-exact[row, :-1].gather(1, ids[row, FIRST + 1 :, None]).mean().item() for row in range(ROWS)]
    assert found.sequence_nll == pytest.approx(nll, abs=1e-4)
    assert found.fp16_nll == pytest.approx(np.mean(expected), abs=1e-5)
    assert found.delta_nll == pytest.approx(np.mean(nll) - np.mean(expected), abs=1e-4)
    error = np.std(np.subtract(nll, expected), ddof=1) / math.sqrt(ROWS)
    assert found.delta_nll_error == pytest.approx(error, abs=1e-4)
    assert found.kld == pytest.approx(np.mean(kld), abs=1e-4)
    assert found.top1_agreement == pytest.approx(np.mean(agree), abs=0.02)
    held = [(kept >= 0).sum(-1).double().mean().item() for kept in cache.survivors().values()]
    assert found.kept == pytest.approx(np.mean(held) if held else LENGTH)
    assert found.cache_bytes == pytest.approx(cache.nbytes(), rel=0.1)  # a batch shares its positions


def test_what_the_rows_say(results):
    plain, full, h2o, window = results
    assert full.nll == pytest.approx(plain.nll, abs=1e-5)
    assert (full.policy, plain.policy, plain.eviction) == ("full", None, None)
    assert (full.overlap, full.captured) == (1, pytest.approx(1))
    assert plain.overlap is None
    assert plain.kept == LENGTH
    for evicted in (h2o, window):
        assert evicted.kept == math.floor(0.4 * LENGTH)
        assert evicted.kept_of_prompt == math.floor(0.4 * FIRST)
        assert evicted.kld > 2 * plain.kld
        assert evicted.cache_bytes < 0.7 * plain.cache_bytes
        assert 0 < evicted.captured < 1
        assert evicted.eviction["keep"] == 0.4
    assert h2o.overlap > window.overlap
    assert abs(h2o.nll - window.nll) > 1e-3
    for row in results:
        assert row.tokens == ROWS * (LENGTH - FIRST)
        assert (row.prompt, row.step, row.seq_len) == (FIRST, STEP, LENGTH)
        assert row.seconds_per_token > 0
        assert row.fp16_seconds_per_token > 0
        assert row.fp16_cache_bytes == 2 * 2 * 2 * 16 * LENGTH * 2
        assert "the first 48 tokens" in row.protocol


def test_batches_do_not_change_the_result(model, artifact, ids, results):
    trials = [Trial(artifact, Eviction(0.4, 0.1, "h2o"))]
    alone = evaluate_continuations(model, trials, ids.numpy(), batch_size=1, step=STEP)[0]
    assert alone.sequence_nll == pytest.approx(results[2].sequence_nll, abs=1e-4)
    assert alone.overlap == pytest.approx(results[2].overlap)


def test_an_exact_prefill_is_closer(model, artifact, ids, results):
    exact = evaluate_continuations(model, [Trial(artifact)], ids.numpy(), batch_size=4, step=STEP, prefill="exact")[0]
    assert exact.kld < results[0].kld
    assert exact.prefill == "exact"
    assert "exact prefill" in exact.protocol


def test_split():
    assert split(1024, 0.75) == 768
    assert split(3, 0.99) == 1
    assert split(100, 0.001) == 1
    for prompt, length in ((0, 10), (1, 10), (0.5, 2)):
        with pytest.raises(ValueError, match="expected a share between 0 and 1"):
            split(length, prompt)


@pytest.mark.parametrize("step", [0, 17])
def test_steps_that_are_no_decoding(model, artifact, ids, step):
    with pytest.raises(ValueError, match=f"step is {step}, expected 1 to 16"):
        evaluate_continuations(model, [Trial(artifact)], ids.numpy(), step=step)
