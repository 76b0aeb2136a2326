"""Adaptive widths with eviction: every mode of `generate()` as the float simulation of both."""

import copy
import functools
import itertools

import pytest
import torch

import kvcalib
from kvcalib.errors import ArtifactMismatch, CorruptFile
from kvcalib.runtime.eviction import Eviction
from tests.runtime import adaptive_talk
from tests.runtime.evicting_adaptive_talk import attached, simulated
from tests.runtime.talk import Talk
from tests.runtime.test_generate import MODES
from tests.runtime.test_saved import rewritten
from tests.tiny import tokens

SOME = ["left-padded", "beam search", "prompt lookup", "turns of chunks", "roll back", "reset"]


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """`case(name, keep_exact)`: model, artifact, rotations and adaptive widths, made once."""

    @functools.cache
    def made(name):
        return adaptive_talk.make(tmp_path_factory.mktemp("both"), name, outliers=0.03)

    def get(name="llama", keep_exact="no"):
        model, artifact, rotations, adaptive = made(name)
        return model, artifact, rotations, adaptive.with_exact(keep_exact, every=5)

    return get


def settings(policy="h2o", keep=0.5, recent=0.2, alpha=0.6, **more):
    return Eviction(keep, recent, policy, alpha=alpha, **more)


def check_same(case, mode, eviction, **exact):
    """See `test_evicting.check_same`."""
    for seed in (9, 10):
        with simulated(*case, eviction, **exact) as new_cache:
            expected = mode(Talk(case[0], new_cache, seed))
        with attached(*case, eviction, **exact) as new_cache:
            found = mode(Talk(case[0], new_cache, seed))
        if torch.equal(found, expected):
            return
    assert torch.equal(found, expected)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_mode_gives_the_tokens_of_the_simulation(case, mode):
    check_same(case(), mode, settings("qhitter"))


@pytest.mark.parametrize("mode", SOME)
def test_attention_alone(case, mode):
    check_same(case(), MODES[mode], settings("h2o"))


@pytest.mark.parametrize("mode", SOME)
@pytest.mark.parametrize("policy", ["qhitter", "window", "qhitter-published"])
def test_choosing_again_from_the_exact_copy(case, policy, mode):
    check_same(case(keep_exact="cpu"), MODES[mode], settings(policy))


@pytest.mark.parametrize("mode", SOME)
@pytest.mark.parametrize("exact", [{"sinks": 2}, {"sinks": 3, "recent": 7}], ids=str)
def test_sinks_and_longer_windows(case, exact, mode):
    check_same(case(), MODES[mode], settings("qhitter"), **exact)


@pytest.mark.parametrize("name", ["gpt_oss", "qwen3", "phi3"])
def test_families(case, name):
    check_same(case(name), MODES["left-padded"], settings("qhitter"))


@torch.no_grad()
def passes(case, eviction, cuts, rows=2, length=60, decode=6):
    """A cache that `length` tokens went into in parts that begin at `cuts`, then `decode` single ones; last logits."""
    model = case[0]
    ids = tokens(rows, length + decode)
    with attached(*case, eviction) as new_cache:
        cache = new_cache()
        edges = [0, *cuts, *range(length, length + decode + 1)]
        for first, last in itertools.pairwise(edges):
            logits = model(ids[:, first:last], past_key_values=cache).logits[:, -1]
    return cache, logits


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("keep_exact", ["no", "cpu"])
def test_a_prompt_goes_in_block_by_block(case, keep_exact, streaming):
    """With a number to keep: a prompt in one pass is one in passes of a block, and memory is constant."""
    eviction = settings("h2o", keep=32, recent=20, streaming=streaming)
    here = case(keep_exact=keep_exact)
    at_once, expected = passes(here, eviction, [])
    in_blocks, found = passes(here, eviction, range(2, 60, 2))
    assert torch.allclose(found, expected, atol=1e-5)
    for layer, kept in at_once.survivors().items():
        assert torch.equal(kept, in_blocks.survivors()[layer])
        assert kept.shape[-1] <= 32
    longer, _ = passes(here, eviction, range(2, 120, 2), length=120)
    for layer in longer.tapped:
        held = longer.layers[layer]
        assert held.slots <= 32
        assert held.store.pools.length + held.store.window.length == held.slots
        assert held.host_tensors().keys() == ({f"host.{n}" for n in ("key", "value", "drawn", "trust", "counted")}
                                              if keep_exact == "cpu" else set())  # fmt: skip
        assert all(t.shape[1] <= 32 + 17 for t in held.host_tensors().values())


@pytest.mark.parametrize("keep_exact", ["no", "cpu"])
@pytest.mark.parametrize(
    "eviction", [settings("qhitter"), settings("h2o", keep=32, recent=20), None], ids=["share", "number", "none"]
)
def test_a_saved_cache_goes_on_as_if_it_had_not_been(case, eviction, keep_exact, tmp_path):
    here = case(keep_exact=keep_exact)
    model, ids = here[0], tokens(2, 80)
    with torch.no_grad(), attached(*here, eviction, sinks=2) as new_cache:
        mine = new_cache()
        mask = torch.ones(2, 60, dtype=torch.long)
        mask[1, :7] = 0
        model(ids[:, :60], attention_mask=mask, past_key_values=mine)
        mine.save(tmp_path / "cache.safetensors")
        loaded = kvcalib.load_cache(tmp_path / "cache.safetensors", model)
        copied = copy.deepcopy(mine)
        assert loaded.nbytes() <= mine.nbytes()
        assert loaded.host_nbytes() <= mine.host_nbytes()
        for part in ids[:, 60:].split(1, 1):
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
            out = [model(part, attention_mask=mask, past_key_values=c).logits for c in (mine, loaded, copied)]
            assert torch.equal(out[0], out[1])
            assert torch.equal(out[0], out[2])
    others = case(keep_exact="cpu" if keep_exact == "no" else "no")
    with attached(*others, eviction, sinks=2), pytest.raises(ArtifactMismatch, match="adaptive was"):
        kvcalib.load_cache(tmp_path / "cache.safetensors", model)


def test_a_damaged_store_is_refused(case, tmp_path):
    here = case(keep_exact="cpu")
    model = here[0]
    with torch.no_grad(), attached(*here, None) as new_cache:
        cache = new_cache()
        model(tokens(2, 60), past_key_values=cache)
        cache.save(tmp_path / "cache.safetensors")

        def refused(change, match):
            rewritten(tmp_path / "cache.safetensors", tmp_path / "bad.safetensors", change)
            with pytest.raises(CorruptFile, match=match):
                kvcalib.load_cache(tmp_path / "bad.safetensors", model)

        names = [n for n in cache.layers[0].live() if n.startswith("pools.")]
        rows = next(n for n in names if n.endswith("words"))

        def changed(name, make):
            def change(tensors, header):
                tensors[f"layers.0.{name}"] = make(tensors[f"layers.0.{name}"])

            return change

        refused(changed("pools.tag", lambda t: torch.full_like(t, 255)), "class above 3")
        refused(changed("pools.tag", torch.zeros_like), "lacks|expected")
        refused(changed(rows, lambda t: t[:, 1:]), "expected")
        refused(changed("recent.drawn", lambda t: t.half()), "recent.drawn")
        refused(changed("since", lambda t: t + 99), "since is")
        refused(changed("host.key", lambda t: t[:, 1:]), "host")


def test_heads_cannot_choose_for_themselves(case):
    model, artifact, rotations, adaptive = case()
    with pytest.raises(ValueError, match="per is 'head', but with adaptive widths"):
        kvcalib.attach(model, artifact, rotations=rotations, adaptive=adaptive, eviction=settings(per="head"))


def test_bytes_shrink_with_the_tokens(case):
    full, _ = passes(case(), settings("full", keep=1.0, recent=0.2), [], length=900)
    some, _ = passes(case(), settings("h2o", keep=0.3, recent=0.1), [], length=900)
    assert some.nbytes() < 0.45 * full.nbytes()
