"""A comparison against the same figures worked out by hand, its intervals, and contenders that fail or damage."""

import math

import numpy as np
import pytest
import torch
from transformers import DynamicCache

import kvcalib
from kvcalib.errors import InputError, NonFiniteActivations
from kvcalib.evaluation.compare import compare, difference
from kvcalib.evaluation.comparison import Comparison
from kvcalib.evaluation.contender import ArtifactContender, Unquantized
from kvcalib.evaluation.continuation import evaluate_continuations
from kvcalib.evaluation.failures import Failures
from kvcalib.evaluation.trials import Trial
from kvcalib.runtime.eviction import Eviction
from tests.evaluation.contenders import Custom, Refusing, Rude, no_values, one_late
from tests.tiny import make_artifact, tiny_llama, tokens

ROWS, LENGTH = 6, 40


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def artifact(model, tmp_path_factory):
    return make_artifact(tmp_path_factory.mktemp("a"), model, key_bits=2, value_bits=2)


@pytest.fixture(scope="module")
def ids():
    return tokens(ROWS, LENGTH)


def by_hand(exact, found, ids):
    """Of each position: KLD, agreement; of each predicted token: NLL; straight from the definitions, in float64."""
    p, q = exact.double().softmax(-1), found.double().softmax(-1)
    kld = (p * (p.log() - q.log())).sum(-1)
    same = (exact.argmax(-1) == found.argmax(-1)).double()
    nll = torch.stack([-q[row, :-1].log()[range(LENGTH - 1), ids[row, 1:]] for row in range(len(ids))])
    return kld, same, nll


def test_figures_are_those_worked_out_by_hand(model, artifact, ids):
    found = compare(model, [ArtifactContender(artifact, "two")], ids.numpy(), batch_size=4, data="random", seed=7)
    exact_row, row = found.rows
    with torch.no_grad():
        exact = model(ids).logits
        kvcalib.attach(model, artifact)
        packed = model(ids).logits
        cache = artifact.new_cache(model)
        model(ids[:1], past_key_values=cache)
        kvcalib.detach(model)
    kld, same, nll = by_hand(exact, packed, ids)
    _, _, exact_nll = by_hand(exact, exact, ids)
    assert row.nll == pytest.approx(nll.mean().item(), abs=1e-5)
    assert row.ppl == pytest.approx(math.exp(nll.mean().item()), rel=1e-5)
    assert row.kld.value == pytest.approx(kld.mean().item(), rel=1e-4)
    assert row.kld_p99 == pytest.approx(np.quantile(kld.numpy(), 0.99), rel=1e-4)
    assert row.top1_agreement.value == pytest.approx(same.mean().item(), abs=1e-12)
    assert row.delta_nll.value == pytest.approx((nll - exact_nll).mean().item(), abs=1e-5)
    assert row.per_sequence.kld == pytest.approx(kld.mean(1).tolist(), rel=1e-4)
    assert row.per_sequence.nll == pytest.approx(nll.mean(1).tolist(), rel=1e-4)
    assert row.per_sequence.top1 == pytest.approx(same.mean(1).tolist())
    elements = 2 * 2 * LENGTH * 32  # layers, keys and values, tokens, channels
    assert row.fp16_cache_bytes == 2 * elements
    assert row.cache_bytes == cache.nbytes()
    assert row.effective_bits == pytest.approx(8 * row.cache_bytes / elements)
    assert found.fp16_nll == exact_row.nll == pytest.approx(exact_nll.mean().item(), abs=1e-5)
    assert (found.samples, found.seq_len, found.scored, found.seed) == (ROWS, LENGTH, ROWS * LENGTH, 7)
    assert "every position scored" in found.protocol
    assert "over the 6 sequences" in found.protocol
    assert row.kld.value > 0.01, "2 bits on a random model cannot be free: did the packed cache run?"


def test_intervals_hold_the_value_and_are_those_of_the_sequences(model, artifact, ids):
    row = compare(model, [ArtifactContender(artifact, "two")], ids.numpy(), batch_size=6, seed=7).rows[1]
    for found, of in ((row.kld, row.per_sequence.kld), (row.top1_agreement, row.per_sequence.top1)):
        assert found.low < found.value < found.high
        assert min(of) <= found.low
        assert found.high <= max(of)
        drawn = np.random.default_rng(7).integers(0, ROWS, (10_000, ROWS))
        means = np.array(of)[drawn].mean(1)
        assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), rel=1e-9)
    assert row.delta_nll.low < row.delta_nll.value < row.delta_nll.high


def test_an_exact_contender_loses_nothing(model, artifact, ids):
    contenders = [Custom("own"), ArtifactContender(artifact, "recent", recent=LENGTH)]
    found = compare(model, contenders, ids.numpy(), batch_size=6)
    assert [row.name for row in found.rows] == ["fp16", "own", "recent"]
    for row in found.rows:
        assert row.kld.value == pytest.approx(0, abs=1e-6)
        assert row.kld_p99 == pytest.approx(0, abs=1e-5)
        assert row.delta_nll.value == pytest.approx(0, abs=1e-6)
        assert row.top1_agreement.value == 1
    bits = [row.effective_bits for row in found.rows]
    assert bits == pytest.approx([16, 16, 32], rel=0.02)  # a stock cache counts at 16 bits, a packed one as it is held
    assert found.rows[0].kld.value == 0


def test_planted_faults_are_caught(model, ids):
    contenders = [Custom("own"), Custom("no values", no_values, 1), Custom("one late", one_late)]
    _, own, *damaged = compare(model, contenders, ids.numpy(), batch_size=6).rows
    for row in damaged:
        assert row.kld.low > 0.05 > own.kld.high
        apart = difference(row, own)
        assert 0 < apart.low < apart.value < apart.high
        assert apart.value == pytest.approx(row.kld.value - own.kld.value)


def test_who_fails_becomes_a_row_and_the_others_go_on(model, artifact, ids):
    overflowing = Custom("overflowing", lambda key, value: (key, value * torch.inf))
    exact = ArtifactContender(artifact, "exact", prefill="exact")
    failures = Failures({"known": "it has failed before"})
    contenders = [Refusing(), Custom("crashing", lambda key, value: key.nothing), overflowing, exact]
    found = compare(model, [*contenders, Custom("known"), Custom("own")], ids.numpy(), batch_size=2, failures=failures)
    failed = {row.name: row.failed for row in found.rows}
    assert list(failed) == ["fp16", "refusing", "crashing", "overflowing", "exact", "known", "own"]
    assert failed["fp16"] is failed["own"] is None
    assert failed["refusing"] == "this model's layers are not for it"
    assert failed["crashing"].startswith("AttributeError: 'Tensor' object has no attribute 'nothing' (test_compare.py:")
    assert "not finite" in failed["overflowing"]
    assert "one pass with an exact prefill shows no error" in failed["exact"]
    assert failed["known"] == "it has failed before"
    assert set(failures) == set(failed) - {"fp16", "own"}
    assert "refusing: not measured: this model's layers are not for it" in found.notes
    assert found.rows[-1].kld.value == pytest.approx(0, abs=1e-6)
    assert found.rows[1].kld.value == found.rows[1].cache_bytes == 0


def test_one_pass_says_that_it_shows_no_eviction(model, artifact, ids):
    contenders = [ArtifactContender(artifact, "plain"), ArtifactContender(artifact, "h2o", eviction=Eviction(0.5, 0.2))]
    found = compare(model, contenders, ids.numpy(), batch_size=6)
    assert found.rows[2].kld.value == pytest.approx(found.rows[1].kld.value, rel=1e-3)
    assert [line for line in found.notes if "quantization alone" in line and line.startswith("h2o: ")]
    prompted = compare(model, contenders, ids.numpy(), batch_size=6, prompt=20)
    assert prompted.rows[2].kld.value > 1.1 * prompted.rows[1].kld.value
    assert not [line for line in prompted.notes if "quantization alone" in line]


def test_the_unquantized_models_own_failure_is_no_row(ids):
    broken = tiny_llama()
    broken.lm_head.weight.data[0] = torch.nan
    with pytest.raises(NonFiniteActivations, match="the unquantized model's NLL is not finite"):
        compare(broken, [Custom("own")], ids.numpy())


def test_a_contender_must_leave_the_model_as_it_was(ids):
    with pytest.raises(RuntimeError, match="contender 'rude' left the model changed"):
        compare(tiny_llama(), [Rude()], ids.numpy())


def test_with_a_prompt_the_rest_is_scored_as_continuations_are(model, artifact, ids):
    eviction = Eviction(0.5, 0.2, "h2o")
    contenders = [ArtifactContender(artifact, "two"), ArtifactContender(artifact, "h2o", eviction=eviction)]
    found = compare(model, contenders, ids.numpy(), batch_size=3, prompt=30, step=4)
    expected = evaluate_continuations(
        model, [Trial(artifact), Trial(artifact, eviction)], ids.numpy(), batch_size=3, prompt=0.75, step=4
    )
    for row, wanted in zip(found.rows[1:], expected, strict=True):
        assert row.nll == pytest.approx(wanted.nll, rel=1e-6)
        assert row.kld.value == pytest.approx(wanted.kld, rel=1e-6)
        assert row.delta_nll.value == pytest.approx(wanted.delta_nll, abs=1e-6)
        assert row.top1_agreement.value == pytest.approx(wanted.top1_agreement)
        assert row.cache_bytes == pytest.approx(wanted.cache_bytes, rel=0.1)  # a batch shares its positions
    assert (found.prompt, found.scored) == (30, 10 * ROWS)
    assert "the first 30 tokens of each sequence are a prompt" in found.protocol


def test_bytes_are_the_contenders_own_word(model, ids):
    class Counting(Custom):
        def nbytes(self, cache: DynamicCache) -> float:
            return 100.0 * cache.layers[0].keys.shape[0]

    row = compare(model, [Counting("counting")], ids.numpy(), batch_size=4).rows[1]
    assert row.cache_bytes == 100
    assert row.effective_bits == pytest.approx(800 / (2 * 2 * LENGTH * 32))


def test_json_round_trip(model, ids):
    found = compare(model, [Custom("own", no_values), Refusing()], ids.numpy(), batch_size=6, data="x")
    text = found.model_dump_json()
    assert Comparison.model_validate_json(text) == found
    assert {"torch", "transformers", "python"} <= set(found.versions)
    assert found.created.endswith("+00:00")


def test_few_sequences_are_noted(model, ids):
    assert any("only 2 sequences" in line for line in compare(model, [], ids[:2].numpy()).notes)
    many = compare(model, [], tokens(10, 5).numpy(), batch_size=10)
    assert many.notes == []


def test_names_and_prompts_are_checked(model, ids):
    with pytest.raises(InputError, match="'own' is compared twice"):
        compare(model, [Custom("own"), Custom("own")], ids.numpy())
    assert len(compare(model, [Unquantized()], ids[:1].numpy()).rows) == 1
    with pytest.raises(ValueError, match="prompt is 39 and step 8, expected 1 to 38 of 40 tokens"):
        compare(model, [], ids.numpy(), prompt=39)
    a, b = (compare(model, [], ids[:n].numpy()).rows[0] for n in (1, 2))
    with pytest.raises(ValueError, match="no KLD of the same sequences"):
        difference(a, b)
