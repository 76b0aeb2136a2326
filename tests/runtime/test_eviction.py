"""Settings of eviction: budgets, and messages for what does not go together."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvcalib
from kvcalib.runtime.eviction import Eviction
from tests.tiny import make_artifact, tiny_llama


@given(st.floats(0.02, 1), st.integers(1, 5000), st.floats(0.5, 2))
def test_a_share_is_never_exceeded_but_by_the_least(keep, seen, share):
    eviction = Eviction(keep, policy="h2o")
    assert eviction.budget(seen, share) <= max(8, keep * share * seen + 1e-6, 0)
    assert eviction.budget(seen, share) >= min(8, seen)
    assert eviction.budget(seen, 1) >= math.floor(keep * seen - 1e-6)


@pytest.mark.parametrize(("keep", "recent", "seen", "budget", "recents"), [
    (0.2, 0.05, 1000, 200, 50), (0.2, None, 1000, 200, 50), (0.07, 0, 100, 8, 1), (0.2, 0.05, 5, 8, 1),
    (64, None, 9, 64, 16), (64, 4, 9999, 64, 4), (1, None, 100, 100, 25), (0.29, 0.05, 100, 29, 5),
])  # fmt: skip
def test_budgets(keep, recent, seen, budget, recents):
    eviction = Eviction(keep, recent, "h2o")
    assert (eviction.budget(seen, 1), eviction.recents(seen)) == (budget, recents)


@pytest.mark.parametrize(("given", "message"), [
    ({"keep": 0}, r"keep is 0, expected a share in 0..1 or a whole number of tokens from 2 on"),
    ({"keep": 1.5}, r"keep is 1.5, expected a share"),
    ({"keep": -0.2}, r"keep is -0.2, expected a share"),
    ({"keep": math.nan}, r"keep is nan, expected a share"),
    ({"keep": 0.7, "recent": 0.4}, r"keep is 0.7 and recent 0.4, together 1.1, expected at most 1"),
    ({"keep": 0.2, "recent": 0.3}, r"recent is 0.3, expected at most keep, which is 0.2"),
    ({"keep": 0.2, "recent": -1}, r"recent is -1, expected"),
    ({"keep": 0.2, "recent": 64}, r"keep is a share \(0.2\) and recent is tokens \(64\); give both alike"),
    ({"keep": 64, "recent": 0.05}, r"keep is tokens \(64\) and recent is a share \(0.05\); give both alike"),
    ({"keep": 3}, r"keep is 3 tokens, expected at least 7: 4 sinks, the 1 recent ones and some to choose"),
    ({"keep": 0.2, "policy": "best"}, r"policy is 'best', expected one of full, window, h2o, qhitter-published,"),
    ({"keep": 0.2, "per": "token"}, r"per is 'token', expected one of"),
    ({"keep": 0.2, "alpha": 2}, r"alpha is 2, expected 0..1"),
])  # fmt: skip
def test_what_does_not_go_together_is_named(given, message):
    with pytest.raises(ValueError, match=message):
        Eviction(**given)


@pytest.fixture(scope="module")
def model_and_artifact(tmp_path_factory):
    model = tiny_llama()
    return model, make_artifact(tmp_path_factory.mktemp("eviction"), model, outliers=0.03)


def test_a_share_of_nothing_names_the_smallest_workable_one(model_and_artifact):
    model, artifact = model_and_artifact
    message = r"keep is 0.004, of 512 tokens that is 2, expected at least 8: 4 sinks and some to choose; the smallest "
    with pytest.raises(ValueError, match=message + r"workable keep is 0.016"):
        kvcalib.attach(model, artifact, keep=0.004)
    Eviction(0.016).within(512)
    # Nothing is left behind by what was refused.
    kvcalib.attach(model, artifact, keep=0.1, policy="h2o")
    kvcalib.detach(model)


def test_heads_that_cannot_keep_tokens_of_their_own(model_and_artifact):
    model, artifact = model_and_artifact
    with pytest.raises(ValueError, match="per is 'head', but the artifact ranks outliers over all heads of a token"):
        kvcalib.attach(model, artifact, keep=0.2, policy="h2o", per="head")
    cache = kvcalib.attach(model, artifact, keep=0.2, policy="h2o").make_cache()
    kvcalib.detach(model)
    assert not cache.layers[0].by_head


def test_settings_of_eviction_without_keep(model_and_artifact):
    model, artifact = model_and_artifact
    with pytest.raises(ValueError, match="streaming is True and recent None, but there is no keep"):
        kvcalib.attach(model, artifact, streaming=True)
    with pytest.raises(ValueError, match=r"recent 0.05, but there is no keep"):
        kvcalib.attach(model, artifact, recent=0.05)


def test_streaming_without_a_context_asks_for_tokens(model_and_artifact):
    with pytest.raises(ValueError, match="names no longest context"):
        Eviction(0.2, streaming=True).within(None)
    assert Eviction(0.25, streaming=True).within(512).keep == 128
    with pytest.raises(ValueError, match="keep is 600 tokens with streaming, expected at most 512"):
        Eviction(600, streaming=True).within(512)
    assert Eviction(0.2).within(None).keep == 0.2


def test_a_policy_that_asks_for_what_an_old_artifact_lacks(model_and_artifact):
    model, artifact = model_and_artifact
    layers = [
        spec.model_copy(update={"friendliness": spec.friendliness.model_copy(update={"alpha": None})})
        for spec in artifact.manifest.layers
    ]
    old = kvcalib.runtime.loader.Artifact(
        artifact.manifest.model_copy(update={"layers": layers}), artifact.quantizers, artifact.path
    )
    with pytest.raises(kvcalib.errors.ArtifactMismatch, match=r"layer 0 has no friendliness.alpha, which policy"):
        kvcalib.attach(model, old, keep=0.2)
    kvcalib.attach(model, old, eviction=Eviction(0.2, alpha=0.5))
    kvcalib.detach(model)


@given(st.lists(st.floats(0.5, 3), min_size=1, max_size=8), st.floats(0.05, 1), st.floats(0, 1))
def test_what_a_layer_cannot_use_goes_to_the_others(raw, keep, part):
    shares = {i: x * len(raw) / sum(raw) for i, x in enumerate(raw)}
    recent = min(keep * part, 1 - keep) if keep < 1 else None
    eviction = Eviction(keep, recent, "h2o")
    least, most = min(1, 1.25 * eviction.last / keep), 1 / keep
    found = eviction.shared(shares)
    assert sum(found.values()) == pytest.approx(len(raw))
    assert max(found.values()) <= most + 1e-9
    assert min(found.values()) >= least - 1e-9
    if least <= min(shares.values()) and max(shares.values()) <= most:
        assert found == pytest.approx(shares)
    between = [i for i in found if least + 1e-6 < found[i] < most - 1e-6]
    for i, j in itertools.pairwise(between):
        assert found[i] / found[j] == pytest.approx(shares[i] / shares[j], rel=1e-4)
    assert max(Eviction(100, streaming=True).within(200).shared(shares).values()) <= 2 + 1e-9
