"""Eviction in packed storage: every mode of `generate()` as a simulation that never moves a token."""

import copy
import functools

import pytest
import torch

import kvcalib
from kvcalib.runtime.evicting import EvictingLayer
from kvcalib.runtime.eviction import Eviction
from kvcalib.runtime.policies import Policy
from kvcalib.runtime.policies.qhitter import QHitter
from tests.runtime.evicting_talk import attached, simulated
from tests.runtime.talk import CASES, Talk, make, with_values
from tests.runtime.test_generate import MODES
from tests.tiny import tokens

NAMES = ["window", "h2o", "qhitter", "qhitter-published"]


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """`case(name, outliers)`: model, artifact and rotations, made once; with outliers heads cannot stand alone."""

    @functools.cache
    def get(name="llama", outliers=0.0, **fit):
        return make(tmp_path_factory.mktemp("evicting"), *CASES[name], outliers=outliers)

    return get


def settings(policy="h2o", keep=0.4, recent=0.1, alpha=0.6, **more):
    return Eviction(keep, recent, policy, alpha=alpha, **more)


def named(eviction):
    return f"{eviction.rule.name}-{eviction.keep:g}"


def both(case, mode, eviction, by_head=True, seed=9, **exact):
    with simulated(*case, eviction, eviction.alpha, by_head, **exact) as new_cache:
        expected = mode(Talk(case[0], new_cache, seed))
    with attached(*case, eviction, **exact) as new_cache:
        found = mode(Talk(case[0], new_cache, seed))
    return found, expected


def check_same(case, mode, eviction, by_head=True, **exact):
    """Two tokens may score alike to the last bit but one; then another seed tells a fault from a tie."""
    found, expected = both(case, mode, eviction, by_head, **exact)
    if not torch.equal(found, expected):
        found, expected = both(case, mode, eviction, by_head, seed=10, **exact)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("policy", ["h2o", "qhitter"])
def test_mode_gives_the_tokens_of_the_simulation(case, policy, mode):
    check_same(case(), mode, settings(policy))


SOME = ["left-padded", "beam search", "prompt lookup", "turns of chunks", "contrastive", "roll back", "reset"]


@pytest.mark.parametrize("mode", SOME)
@pytest.mark.parametrize("policy", ["h2o", "qhitter"])
def test_constant_memory_streaming(case, policy, mode):
    check_same(case(), MODES[mode], settings(policy, keep=14, recent=3, streaming=True))


@pytest.mark.parametrize("mode", ["left-padded", "turns of a batch"])
@pytest.mark.parametrize("policy", ["window", "qhitter-published"])
def test_other_policies(case, policy, mode):
    check_same(case(), MODES[mode], settings(policy))
    check_same(case(), MODES[mode], settings(policy, keep=14, recent=3, streaming=True))


@pytest.mark.parametrize("mode", SOME)
def test_rows_whose_heads_cannot_stand_alone(case, mode):
    check_same(case(outliers=0.03), MODES[mode], settings("qhitter"), by_head=False)


@pytest.mark.parametrize("outliers", [0.0, 0.03])
@pytest.mark.parametrize("relative", [False, True])
def test_values_relative_to_their_tokens_or_not(case, relative, outliers):
    model, artifact, rotations = case(outliers=outliers)
    parts = model, with_values(artifact, relative), rotations
    check_same(parts, MODES["turns of chunks"], settings("qhitter"), by_head=not outliers, sinks=3, recent=5)


@pytest.mark.parametrize("policy", NAMES)
def test_heads_that_shall_keep_the_same(case, policy):
    check_same(case(), MODES["turns of a batch"], settings(policy, per="layer"), by_head=False)


@pytest.mark.parametrize("mode", SOME)
@pytest.mark.parametrize("exact", [{"recent": 3}, {"sinks": 3, "recent": 5}], ids=str)
def test_exact_sinks_and_window(case, exact, mode):
    check_same(case(), MODES[mode], settings("qhitter"), **exact)


@pytest.mark.parametrize("mode", ["left-padded", "roll back", "turns of chunks"])
def test_exact_sinks_and_window_in_constant_memory(case, mode):
    check_same(case(), MODES[mode], settings("h2o", keep=15, recent=2), sinks=3, recent=5)


@pytest.mark.parametrize("name", ["qwen3", "phi3", "gpt_oss", "cohere2", "gemma3_text"])
def test_families(case, name):
    check_same(case(name), MODES["left-padded"], settings("qhitter"))
    check_same(case(name), MODES["turns of a batch"], settings("h2o", keep=14, recent=3, streaming=True))


def filled(case, eviction, ids, mask=None, chunk=None, decode=0, **exact):
    """The cache after a prompt, given in chunks, and `decode` more tokens."""
    model, artifact, rotations = case
    with attached(model, artifact, rotations, eviction, **exact) as new_cache, torch.no_grad():
        cache = new_cache()
        prompt = ids.shape[1] - decode
        parts = [*ids[:, :prompt].split(chunk or prompt, 1), *(ids[:, prompt:].split(1, 1) if decode else ())]
        seen = 0
        for part in parts:
            seen += part.shape[1]
            given = {} if mask is None else {"attention_mask": mask[:, :seen]}
            if mask is not None:
                places = (mask.cumsum(1) - 1).clamp(min=0)
                given["position_ids"] = places[:, seen - part.shape[1] : seen]
            model(input_ids=part, past_key_values=cache, **given)
        if not decode:
            cache.evict()
        return cache


def kept(cache, row=0):
    """`{(layer, head): positions}` of one row."""
    return {
        (layer, head): positions[row, head][positions[row, head] >= 0].tolist()
        for layer, positions in cache.survivors().items()
        for head in range(positions.shape[1])
    }


CHUNKS = [settings(p) for p in NAMES] + [settings("qhitter", keep=24, recent=5), settings("h2o", keep=30, recent=4)]


@pytest.mark.parametrize("chunk", [17, 19, 40])
@pytest.mark.parametrize("eviction", CHUNKS, ids=named)
def test_chunks_of_a_prompt_give_the_same_survivors(case, eviction, chunk):
    # 80 tokens; no chunk is so short that it would count as decoding but those of constant memory.
    chunk = chunk if eviction.counted or 80 % chunk == 0 or 80 % chunk > 16 else 40
    ids = tokens(1, 80)
    assert kept(filled(case(), eviction, ids, chunk=chunk)) == kept(filled(case(), eviction, ids))
    if eviction.counted:
        assert kept(filled(case(), eviction, ids, chunk=3)) == kept(filled(case(), eviction, ids))


@pytest.mark.parametrize("exact", [{}, {"sinks": 2, "recent": 3}], ids=str)
@pytest.mark.parametrize("eviction", CHUNKS, ids=named)
def test_each_padded_row_is_evicted_as_if_alone(case, eviction, exact):
    if eviction.counted:
        # A block's tokens see the exact window as it is at the block's end, and blocks end where any row's do.
        exact = {name: n for name, n in exact.items() if name == "sinks"}
    ids, mask = tokens(3, 70), torch.ones(3, 70, dtype=torch.long)
    for row, pad in enumerate((0, 25, 58)):
        ids[row, :pad], mask[row, :pad] = 0, 0
    together = filled(case(), eviction, ids, mask, decode=9, **exact)
    for row, pad in enumerate((0, 25, 58)):
        alone = filled(case(), eviction, ids[row : row + 1, pad:], decode=9, **exact)
        assert kept(together, row) == kept(alone)


@pytest.mark.parametrize("eviction", [settings("qhitter", keep=0.3), settings("window", keep=9, recent=2)], ids=named)
@pytest.mark.parametrize("length", range(1, 21))
def test_short_prompts(case, eviction, length):
    cache = filled(case(), eviction, tokens(2, length + 3), decode=3)
    for positions in cache.survivors().values():
        assert positions.shape[2] <= max(9, length + 3)
        assert (positions[..., -1] == length + 2).all()


@pytest.mark.parametrize("recent", [0.3, 0.28, 0.2, 0.02])
def test_recent_tokens_never_make_a_layer_exceed_its_budget(case, recent):
    artifact = case()[1]
    eviction = settings("qhitter", keep=0.3, recent=recent)
    cache = filled(case(), eviction, tokens(2, 200), decode=60)
    held = [p.shape[2] for p in cache.survivors().values()]
    assert sum(held) <= 0.3 * 200 * len(held)
    given = {spec.index: spec.friendliness.share for spec in artifact.manifest.layers}
    assert held == [pytest.approx(60 * x, abs=6) for x in eviction.shared(given).values()]


def test_heads_keep_tokens_of_their_own_and_never_more_than_the_budget(case):
    eviction = settings("h2o", keep=0.3, recent=0.1)
    cache = filled(case(), eviction, tokens(2, 100), decode=40)
    for positions in cache.survivors().values():
        assert positions.shape[2] <= 30
        assert (positions.diff(dim=-1) > 0).all(), "in the order they came, no token twice"
        assert (positions[:, 0] != positions[:, 1]).any()
        assert (positions[..., :4] == torch.arange(4)).all(), "sinks"
        assert (positions[..., -10:] == torch.arange(90, 100)).all(), "recent tokens"


@pytest.mark.parametrize("relative", [False, True])
def test_bytes_are_those_of_the_tokens_held(case, relative):
    eviction = settings("qhitter", keep=32, recent=4)
    model, artifact, rotations = case()
    artifact, total = with_values(artifact, relative), 0
    cache = filled((model, artifact, rotations), eviction, tokens(2, 300), chunk=50)
    for spec in artifact.manifest.layers:
        key, value = (artifact.quantizers[spec.index][role] for role in ("key", "value"))
        heads = key.layout.widths.shape[0]
        token = 4 * (key.layout.words + value.layout.words)  # codes
        token += heads * ((2 + 2) * relative + 1 + 4 + 4)  # zero, scale, friendliness, position, attention drawn
        mine = 2 * int(32 * spec.friendliness.share) * token
        assert cache.layers[spec.index].nbytes == mine
        total += mine
    assert cache.nbytes() == total, "positions of tokens gone are not kept"
    assert cache.survivors().keys() == {0, 1}


def test_memory_is_flat_and_tokens_are_moved_once_a_block(case, monkeypatch):
    moves = []
    move = EvictingLayer._keep
    monkeypatch.setattr(EvictingLayer, "_keep", lambda self, stay: (moves.append(stay.shape[2]), move(self, stay))[1])
    model, artifact, rotations = case()
    eviction = settings("h2o", keep=48, recent=8, streaming=True)
    sizes = []
    with attached(model, artifact, rotations, eviction) as new_cache, torch.no_grad():
        cache = new_cache()
        for part in tokens(1, 900).split(1, 1):
            model(input_ids=part, past_key_values=cache)
            sizes.append(cache.nbytes())
    assert len(set(sizes[60:])) == 1
    assert len(moves) == 2 * len(range(48, 900, 3))  # a block is 48 / 16 tokens


def test_streaming_goes_beyond_the_context_in_the_cache_s_own_positions(case):
    model, artifact, rotations = case()
    assert model.config.max_position_embeddings == 512
    asked = []
    eviction = settings("window", keep=0.125, recent=0.05, streaming=True)
    with attached(model, artifact, rotations, eviction) as new_cache, torch.no_grad():
        cache = new_cache()
        for part in tokens(1, 700).split(10, 1):
            logits = model(input_ids=part, past_key_values=cache).logits
            asked.append(int(cache.layers[0]._positions().max()))
    assert cache.get_seq_length() == 700
    assert torch.isfinite(logits).all()
    assert max(asked) < 64, "64 is an eighth of the longest context"
    assert cache.survivors()[0].max() == 699


@pytest.mark.parametrize(("outliers", "relative"), [(0.0, False), (0.0, True), (0.03, False)])
@pytest.mark.parametrize("eviction", [settings(p) for p in NAMES] + [settings("h2o", keep=20, recent=3)], ids=named)
def test_a_saved_cache_goes_on_as_if_it_had_not_been(case, eviction, outliers, relative, tmp_path):
    model, artifact, rotations = case(outliers=outliers)
    artifact = with_values(artifact, relative)
    ids = tokens(2, 90)
    kvcalib.attach(model, artifact, 2, 3, rotations, eviction=eviction)
    try:
        cache = artifact.new_cache(model, 2, 3, eviction=eviction)
        with torch.no_grad():
            model(input_ids=ids[:, :60], past_key_values=cache)
            for i in range(60, 75):
                model(input_ids=ids[:, i : i + 1], past_key_values=cache)
            cache.save(tmp_path / "cache.safetensors")
            again = artifact.load_cache(
                tmp_path / "cache.safetensors", model, cache=artifact.new_cache(model, 2, 3, eviction=eviction)
            )
            for i in range(75, 90):
                expected = model(input_ids=ids[:, i : i + 1], past_key_values=cache).logits
                found = model(input_ids=ids[:, i : i + 1], past_key_values=again).logits
                assert torch.equal(found, expected)
        other = Eviction(0.5, 0.1, "h2o", alpha=0.6)
        with pytest.raises(kvcalib.errors.ArtifactMismatch, match="eviction was"):
            artifact.load_cache(
                tmp_path / "cache.safetensors", model, cache=artifact.new_cache(model, 2, 3, eviction=other)
            )
    finally:
        kvcalib.detach(model)


def test_a_copy_and_a_move_go_on_alike(case):
    model, artifact, rotations = case()
    eviction = settings("qhitter")
    ids = tokens(1, 60)
    with attached(model, artifact, rotations, eviction) as new_cache, torch.no_grad():
        cache = new_cache()
        model(input_ids=ids[:, :40], past_key_values=cache)
        model(input_ids=ids[:, 40:41], past_key_values=cache)
        copied = copy.deepcopy(cache)
        for layer in copied.layers:
            layer.offload()
            layer.prefetch()
        for i in range(41, 60):
            first, second = (model(input_ids=ids[:, i : i + 1], past_key_values=c).logits for c in (cache, copied))
            assert torch.equal(first, second)


def test_prefill_exact_scores_with_exact_keys(case):
    model, artifact, rotations = case()
    ids = tokens(1, 60)
    found = []
    for prefill in ("quantized", "exact"):
        kvcalib.attach(model, artifact, rotations=rotations, prefill=prefill, eviction=settings("h2o"))
        try:
            cache = artifact.new_cache(model, eviction=settings("h2o"))
            with torch.no_grad():
                logits = model(input_ids=ids, past_key_values=cache).logits
        finally:
            kvcalib.detach(model)
        found.append((logits, cache.layers[0].marks.read(0, 60)["drawn"].clone()))
    with torch.no_grad():
        stock = model(input_ids=ids).logits
    assert torch.allclose(found[1][0], stock, atol=1e-4)
    assert not torch.allclose(found[0][0], stock, atol=1e-2)
    assert not torch.allclose(found[0][1], found[1][1], atol=1e-3)
    # Each query pays 1 in all for each of the group's heads, whichever keys it reads.
    for _, drawn in found:
        assert torch.allclose(drawn.sum(1), torch.full((1, 2), 2 * 60.0))


class Farthest(Policy):
    """A policy of one's own: the oldest stay."""

    name = "farthest"

    def score(self, held):
        return -held.position.float()


def test_a_policy_of_one_s_own(case):
    cache = filled(case(), Eviction(0.5, 0.1, Farthest()), tokens(1, 40))
    assert kept(cache)[0, 0] == [*range(16), *range(36, 40)]


def test_keep_and_recent_reach_the_cache_through_attach_and_generate(case):
    model, artifact, rotations = case()
    kvcalib.attach(model, artifact, rotations=rotations, keep=0.5, recent=0.125, policy="h2o")
    try:
        said = model.generate(
            tokens(1, 64), max_new_tokens=20, min_new_tokens=20, do_sample=False, return_dict_in_generate=True
        )
    finally:
        kvcalib.detach(model)
    cache = said.past_key_values
    assert cache.get_seq_length() == 83
    assert cache.survivors()[0].shape[2] <= 41


def test_age_norm_reaches_the_policy(case):
    model, artifact, rotations = case()
    for given in (True, False):
        attachment = kvcalib.attach(model, artifact, rotations=rotations, keep=0.5, age_norm=given)
        try:
            rule = attachment.eviction.rule
            assert isinstance(rule, QHitter)
            assert rule.age_norm is given
        finally:
            kvcalib.detach(model)
