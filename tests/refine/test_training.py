"""Training on a tiny random model: the loss it goes down, its gradient, and that it can go on anywhere."""

import numpy as np
import pytest
import torch

from kvcalib.errors import NonFiniteActivations
from kvcalib.evaluation.perplexity import evaluate
from kvcalib.model.taps import Taps
from kvcalib.refine.training import Refinement, Schedule, Standing
from kvcalib.runtime.loader import Artifact, prove
from tests.tiny import make_artifact, tiny_family, tiny_llama, tokens

TRAINING, HELD_OUT = tokens(12, 40, 5).numpy(), tokens(3, 40, 6).numpy()


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def artifact(tmp_path_factory, model):
    return make_artifact(tmp_path_factory.mktemp("artifact"), model, key_bits=2, value_bits=1)


def refinement(model, artifact, sinks=0, recent=0, **schedule):
    settings = {"steps": 12, "lr": 0.05, "batch_size": 4, "every": 4} | schedule
    rotations = prove(model, sorted(artifact.quantizers))
    return Refinement(model, rotations, artifact.quantizers, TRAINING, HELD_OUT, Schedule(**settings), sinks, recent)


def trained(it):
    with it.at_work():
        it.begin()
        while not it.done:
            it.advance()
    return it


@pytest.mark.parametrize(("sinks", "recent"), [(0, 0), (2, 5)])
def test_a_look_is_what_the_packed_cache_gives(model, artifact, sinks, recent):
    it = refinement(model, artifact, sinks, recent)
    with it.at_work():
        it.begin()
    ((step, kld),) = it.standing.looks
    (expected,) = evaluate(model, [artifact], HELD_OUT, sinks, recent)
    assert step == 0
    assert kld == pytest.approx(expected.kld, rel=1e-4)
    assert kld > 0.05


def test_a_sliding_layer_keeps_no_sinks(tmp_path):
    model = tiny_family("gemma3_text", sliding_window=8)
    artifact = make_artifact(tmp_path, model, layers=[0, 1, 2, 3], key_bits=2, value_bits=2)
    it = refinement(model, artifact, sinks=3)
    with it.at_work():
        it.begin()
    (expected,) = evaluate(model, [artifact], HELD_OUT, 3)
    assert it.standing.best[1] == pytest.approx(expected.kld, rel=1e-3)


def test_gradient_of_the_last_layer_equals_finite_differences(model, artifact):
    """There nothing is stored after it, so that the straight-through choice plays no part."""
    it = refinement(model, artifact)
    ids = torch.from_numpy(TRAINING[:4])
    with it.at_work():
        it._divergence(ids).backward()
        for centroids in it.layers[1].values():
            fixed, gradient, step = centroids.quantizer, centroids.values.grad, 1e-3
            for place in gradient.abs().topk(3).indices.tolist():
                there, found = centroids.values[place].item(), []
                with torch.no_grad():
                    for by in (step, -step):
                        centroids.values[place] = there + by
                        centroids.quantizer.encode = fixed.encode  # no code changes
                        found.append(float(it._divergence(ids)))
                    centroids.values[place] = there
                assert gradient[place].item() == pytest.approx((found[0] - found[1]) / (2 * step), rel=0.02)


def test_it_gets_better_in_the_packed_cache(model, artifact):
    before = {i: {r: q.codebook.ragged().clone() for r, q in p.items()} for i, p in artifact.quantizers.items()}
    it = trained(refinement(model, artifact))
    better = Artifact(artifact.manifest, it.best())
    was, now = evaluate(model, [artifact, better], HELD_OUT)
    assert now.kld < 0.97 * was.kld
    assert now.kld == pytest.approx(it.standing.best[1], rel=1e-4)
    assert now.effective_bits == was.effective_bits
    for layer, pair in better.quantizers.items():
        for role, quantizer in pair.items():
            old = artifact.quantizers[layer][role]
            assert torch.equal(old.codebook.ragged(), before[layer][role]), "the artifact itself was changed"
            assert torch.equal(quantizer.layout.word, old.layout.word)
            padded = quantizer.codebook.centroids
            assert (padded[..., 1:] >= padded[..., :-1]).all()
            assert not torch.equal(quantizer.codebook.ragged(), before[layer][role])


def test_it_goes_on_anywhere_with_the_same_numbers(model, artifact):
    whole = trained(refinement(model, artifact))
    first = refinement(model, artifact)
    with first.at_work():
        first.begin()
        for _ in range(5):
            first.advance()
    kept = {name: tensor.clone() for name, tensor in first.tensors().items()}
    standing = Standing(first.standing.step, list(first.standing.looks))
    second = refinement(model, artifact)
    second.resume(standing, kept)
    with second.at_work():
        while not second.done:
            second.advance()
    assert second.standing == whole.standing
    expected = whole.tensors()
    assert set(expected) == set(second.tensors())
    assert all(torch.equal(tensor, expected[name]) for name, tensor in second.tensors().items())


def test_a_rate_too_hot_ends_early_and_keeps_what_there_was(model, artifact):
    it = trained(refinement(model, artifact, steps=100, lr=300.0, every=2, patience=2))
    assert it.standing.step == 4
    assert it.standing.best[0] == 0
    for layer, pair in it.best().items():
        for role, quantizer in pair.items():
            assert torch.equal(quantizer.codebook.ragged(), artifact.quantizers[layer][role].codebook.ragged())


def test_the_model_is_as_it_was(model, artifact):
    ids = tokens(1, 20)
    with torch.no_grad():
        before = model(ids).logits
    assert all(p.requires_grad for p in model.parameters())
    it = refinement(model, artifact, steps=1)
    trained(it)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
    Taps(model, it._handler, it.rotations).remove()  # which a tapped model refuses


def test_an_infinite_weight_is_named(artifact):
    model = tiny_llama()
    it = refinement(model, artifact)
    with it.at_work():
        it.begin()
        with torch.no_grad():
            model.lm_head.weight[0] = torch.inf
        with pytest.raises(NonFiniteActivations, match="divergence of step 0 is nan"):
            it.advance()


def test_order_and_rate():
    schedule = Schedule(10, 0.5, 4, seed=3)
    taken = np.concatenate([schedule.batch(step, 6) for step in range(9)])
    for epoch in range(6):
        assert sorted(taken[6 * epoch : 6 * epoch + 6]) == list(range(6))
    assert taken[:6].tolist() != taken[6:12].tolist()
    assert (schedule.batch(4, 6) == Schedule(10, 0.5, 4, seed=3).batch(4, 6)).all()
    assert taken.tolist() != np.concatenate([Schedule(10, 0.5, 4, seed=4).batch(s, 6) for s in range(9)]).tolist()
    rates = [schedule.rate(step) for step in range(11)]
    assert rates[0] == 0.5
    assert rates[5] == pytest.approx(0.25)
    assert rates[10] == pytest.approx(0)
    assert rates == sorted(rates, reverse=True)
