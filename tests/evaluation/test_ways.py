"""Every way of reading gives the figures that `eval` gives, from code of its own."""

import pytest
import torch
from transformers import DynamicCache

from kvcalib.evaluation import ways
from kvcalib.evaluation.contender import ArtifactContender, Contender, Unquantized
from kvcalib.evaluation.continuation import evaluate_continuations
from kvcalib.evaluation.perplexity import evaluate
from kvcalib.evaluation.trials import Trial
from kvcalib.evaluation.ways import AdaptiveContender, Reading, effective_bits
from kvcalib.runtime.eviction import Eviction
from kvcalib.runtime.loader import load
from kvcalib.runtime.tiers import load_adaptive
from kvcalib.stages import build, tiers
from tests.tiny import make_run, tiny_llama, tokens

TEXT = tokens(3, 40, seed=9).numpy()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, its run's folder, and artifacts of 2 and 4 bits."""
    home = tmp_path_factory.mktemp("ways")
    model = tiny_llama()
    run = make_run(home / "run", model)
    for bits in (2, 4):
        build.run(run, home / f"a{bits}", bits, bits)
    return model, run, {bits: load(home / f"a{bits}") for bits in (2, 4)}


def same(found, expected):
    assert (found.nll, found.fp16_nll) == pytest.approx((expected.nll, expected.fp16_nll), rel=1e-6)
    assert (found.kld, found.top1_agreement) == pytest.approx((expected.kld, expected.top1_agreement), rel=1e-4)
    assert (found.cache_bytes, found.fp16_cache_bytes) == (expected.cache_bytes, expected.fp16_cache_bytes)
    assert found.tokens == expected.tokens


@pytest.mark.parametrize("batch", [1, 2])
def test_text_in_one_pass(made, batch):
    model, _, artifacts = made
    found = Reading(model, TEXT, batch_size=batch).measure(ArtifactContender(artifacts[2]))
    (expected,) = evaluate(model, [artifacts[2]], TEXT, batch_size=batch)
    same(found, expected)
    assert found.kld > 0.001
    assert effective_bits(found) == 16 * expected.cache_bytes / expected.fp16_cache_bytes


def test_steps_and_adaptive_widths(made, tmp_path):
    model, run, artifacts = made
    tiers.run(run, [a.path for a in artifacts.values()], tmp_path / "mixed", tiers.TierSettings(budget=4.5))
    adaptive = load_adaptive(tmp_path / "mixed")
    reading = Reading(model, TEXT, step=4)
    fixed = reading.measure(ArtifactContender(artifacts[2], recent=8, prefill="exact"))
    mixed = reading.measure(AdaptiveContender(artifacts[2], adaptive, recent=8))
    expected = evaluate(model, [artifacts[2]], TEXT, recent=8, step=4, adaptive=adaptive)
    same(fixed, expected[0])
    same(mixed, expected[1])
    assert fixed.kld != pytest.approx(mixed.kld)


def test_continuations_after_eviction(made):
    model, _, artifacts = made
    eviction = Eviction(keep=0.4, policy="h2o")
    found = Reading(model, TEXT, step=4, prompt=0.5).measure(ArtifactContender(artifacts[4], eviction=eviction))
    (expected,) = evaluate_continuations(model, [Trial(artifacts[4], eviction)], TEXT, prompt=0.5, step=4)
    same(found, expected)
    assert found.kept == expected.kept < 40


def test_the_unquantized_model_is_itself_and_is_read_once(made, monkeypatch):
    model, *_ = made
    passes = []
    handle = model.register_forward_pre_hook(lambda *_: passes.append(1))
    reading = Reading(model, TEXT)
    found = reading.measure(Unquantized())
    assert (found.kld, found.nll, found.top1_agreement, effective_bits(found)) == (0, found.fp16_nll, 1, 16)
    assert len(passes) == 2 * len(TEXT)
    reading.measure(Unquantized())
    assert len(passes) == 3 * len(TEXT)
    monkeypatch.setattr(ways, "MOST_KEPT", 0)
    bare = Reading(model, TEXT)
    assert [bare.measure(Unquantized()).nll for _ in range(2)] == [found.nll] * 2
    assert len(passes) == 7 * len(TEXT)
    handle.remove()


class Counted(Contender):
    """The stock cache, counted in its own way."""

    name = "counted"

    def run(self, model):
        return Unquantized().run(model)

    def nbytes(self, cache):
        assert isinstance(cache, DynamicCache)
        return 7.0 * len(cache.layers[0].keys)


def test_any_contender(made):
    model, *_ = made
    found = Reading(model, TEXT, batch_size=3).measure(Counted())
    assert found.cache_bytes == 7.0
    assert torch.isfinite(torch.tensor(found.nll))


def test_a_prompt_needs_steps(made):
    with pytest.raises(ValueError, match="prompt is given without step"):
        Reading(made[0], TEXT, prompt=0.5)
