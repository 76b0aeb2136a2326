"""Adaptive widths: every mode of `generate()` as the float simulation; classes and bytes as counted independently."""

import copy
import functools
from dataclasses import replace

import pytest
import torch

from kvcalib.runtime.adaptive import AdaptiveLayer
from kvcalib.runtime.layers import PackedLayer
from tests.runtime import adaptive_talk
from tests.runtime.adaptive_talk import attached, simulated
from tests.runtime.talk import WINDOW, Talk, pair_of, with_values
from tests.runtime.test_generate import MODES, Drafted
from tests.tiny import tokens

FAMILIES = ["llama", "qwen3", "phi3", "gpt_oss", "cohere2", "gemma3_text"]


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """`case(name, signal)`: model, artifact, rotations and adaptive widths, made once."""

    @functools.cache
    def get(name, signal="late"):
        return adaptive_talk.make(tmp_path_factory.mktemp("adaptive"), name, signal, outliers=0.03)

    return get


def both(case, mode, seed=9, **settings):
    with simulated(*case, **settings) as new_cache:
        expected = mode(Talk(case[0], new_cache, seed))
    with attached(*case, **settings) as new_cache:
        found = mode(Talk(case[0], new_cache, seed))
    return found, expected


def check_same(case, mode, **settings):
    """See `test_generate.check_same`."""
    found, expected = both(case, mode, **settings)
    if not torch.equal(found, expected):
        found, expected = both(case, mode, seed=10, **settings)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("name", ["llama", "gpt_oss", "gemma3_text"])
def test_mode_gives_the_tokens_of_the_simulation(case, name, mode):
    check_same(case(name), mode)


SOME = ["left-padded", "beam search", "prompt lookup", "turns of chunks", "contrastive", "roll back", "reset"]


@pytest.mark.parametrize("mode", SOME)
@pytest.mark.parametrize("settings", [{"sinks": 2}, {"recent": 9}, {"sinks": 3, "recent": 7}], ids=str)
def test_sinks_and_longer_windows(case, settings, mode):
    check_same(case("llama"), MODES[mode], **settings)


@pytest.mark.parametrize("mode", SOME)
@pytest.mark.parametrize("signal", ["late", "peak"])
def test_choosing_again_from_the_exact_copy(case, signal, mode):
    model, artifact, rotations, adaptive = case("llama", signal)
    check_same((model, artifact, rotations, adaptive.with_exact("cpu", 3)), MODES[mode], sinks=1)


@pytest.mark.parametrize("relative", [False, True])
def test_values_relative_to_their_tokens_or_not(case, relative):
    model, artifact, rotations, adaptive = case("llama")
    tiers = tuple({index: pair_of(pair, relative) for index, pair in tier.items()} for tier in adaptive.tiers)
    parts = model, with_values(artifact, relative), rotations, replace(adaptive, tiers=tiers).with_exact("cpu", 3)
    check_same(parts, MODES["roll back"], sinks=1)
    with attached(*parts) as new_cache:
        cache = new_cache()
        Talk(model).run(Talk(model).prompt(), past_key_values=cache)
        assert cache.layers[0].pools.pools["value", 1].length
        assert ("zero" in cache.layers[0].pools.pools["value", 1].tensors()) == relative


def test_assisted_by_a_draft_model(case):
    check_same(case("llama"), Drafted(copy.deepcopy(case("llama")[0])))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("keep", ["no", "cpu"])
def test_logits_are_the_simulation_and_are_quantized(case, name, keep):
    """Token by token, in two padded rows: the same logits, the same tiers, of which there are several."""
    model, artifact, rotations, adaptive = case(name)
    mine = model, artifact, rotations, adaptive.with_exact(keep, 4)

    def logits(talk):
        inputs, cache, out = talk.prompt(2, 2 * WINDOW), talk.new_cache(), []
        for stop in (9, *range(10, 2 * WINDOW + 1)):
            start = stop - 1 if stop > 9 else 0
            mask = inputs["attention_mask"][:, :stop]
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, start:]
            part = inputs["input_ids"][:, start:stop]
            out.append(model(part, attention_mask=mask, position_ids=positions, past_key_values=cache).logits)
        talk.cache = cache
        return torch.cat(out, 1)

    real = Talk(model).prompt(2, 2 * WINDOW)["attention_mask"].bool()
    with torch.no_grad():
        plain = model(**Talk(model).prompt(2, 2 * WINDOW)).logits
        with simulated(*mine) as new_cache:
            one = Talk(model, new_cache)
            expected = logits(one)
        with attached(*mine) as new_cache:
            other = Talk(model, new_cache)
            found = logits(other)
    error = (expected - plain)[real].std()
    assert error > 0.03 * plain[real].std()
    assert (found - expected)[real].std() < 0.05 * error
    used = set()
    for layer in one.cache.rules:
        tag, marks = other.cache.layers[layer].pools.tag(), one.cache.marks(layer)
        same = [tag & 15 == marks[:, : tag.shape[1], 2], tag >> 4 == marks[:, : tag.shape[1], 3]]
        assert torch.stack(same).float().mean() > 0.95
        used |= set(tag.unique().tolist())
    assert len(used) > 2
    assert (sum(other.cache.layers[layer].requantized for layer in one.cache.rules) > 0) == (keep == "cpu")


@pytest.mark.parametrize("signal", ["late", "peak"])
@pytest.mark.parametrize("chunk", [40, 7])
def test_tiers_are_those_of_full_attention_matrices(case, signal, chunk):
    """One exact pass, or chunks with a window so long that all is exact: transformers' own weights say the tiers."""
    model, artifact, rotations, adaptive = case("llama", signal)
    n, length = adaptive.rule.window, 40
    inputs = Talk(model).prompt(3, length)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    layers = {t.index: t for t in adaptive.rule.layers}
    with torch.no_grad():
        matrices = eager(**inputs, output_attentions=True).attentions
        with attached(model, artifact, rotations, adaptive, recent=0 if chunk == 40 else 36) as new_cache:
            cache = new_cache()
            positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
            for start in range(0, length, chunk):
                part = slice(start, start + chunk)
                mask = inputs["attention_mask"][:, : start + chunk]
                model(
                    inputs["input_ids"][:, part],
                    attention_mask=mask,
                    position_ids=positions[:, part],
                    past_key_values=cache,
                )
    for index, limits in layers.items():
        tag = cache.layers[index].pools.tag()
        assert tag.shape[1] == (length - n if chunk == 40 else 4)
        weights = matrices[index] * inputs["attention_mask"][:, None, :, None]
        for row in range(3):
            for t in range(tag.shape[1]):
                drawn = torch.stack([weights[row, :, t + back, t] for back in range(n)])
                signal_value = drawn.max() if signal == "peak" else drawn[n // 2 :].mean()
                for shift, expected in ((0, limits.key), (4, limits.value)):
                    close = any(abs(float(signal_value) - limit) < 1e-5 for limit in expected)
                    assert close or int(tag[row, t]) >> shift & 15 == sum(float(signal_value) >= x for x in expected)


def row_bytes(quantizer):
    """Bytes of one token's row, from docs/artifact.md."""
    words = 4 * quantizer.layout.words
    groups = quantizer.layout.widths.shape[0] if quantizer.scope == "head" else 1
    index = 1 if quantizer.layout.widths.numel() // groups <= 256 else 2
    return words + groups * (quantizer.outliers * (2 + index) + (4 if quantizer.relative else 0))


@pytest.mark.parametrize("keep", ["no", "cpu"])
@pytest.mark.parametrize("sinks", [0, 2])
def test_live_bytes_are_counted_to_the_byte(case, sinks, keep):
    model, artifact, rotations, adaptive = case("llama")
    adaptive = adaptive.with_exact(keep)
    inputs = Talk(model).prompt(3, 40)
    with torch.no_grad(), attached(model, artifact, rotations, adaptive, sinks) as new_cache:
        cache = new_cache()
        model(**inputs, past_key_values=cache)
    n, heads, dim = adaptive.rule.window, 2, 16
    expected = 3 * 40 * 4 if cache.positions()["position"].shape[0] == 3 else 40 * 4
    used = set()
    for index in artifact.quantizers:
        layer = cache.layers[index]
        for tag in layer.pools.tag().flatten().tolist():
            used.add(tag)
            for role, c in (("key", tag % 16), ("value", tag // 16)):
                sink = c == len(adaptive.tiers)
                expected += heads * dim * 4 if sink else row_bytes(adaptive.tiers[c][index][role])
        expected += 3 * (40 - n)  # tags
        # A window's room is what the pass needed, or what dropping from its front left of it.
        room = layer.window.tensors()["key"].shape[1]
        assert n <= room <= 40
        # Of five queries the last three count.
        expected += 3 * room * (2 * heads * dim * 4 + 3 * 4 + (1 if sinks else 0))
    assert len(used) > 2
    assert cache.nbytes() == expected
    assert cache.effective_bits() == expected * 8 / (len(artifact.quantizers) * 3 * 40 * 2 * heads * dim)
    host = len(artifact.quantizers) * 3 * 40 * (2 * heads * dim * 4 + 9)
    assert cache.host_nbytes() == (host if keep == "cpu" else 0)


def test_spare_room_is_counted_and_bounded(case):
    """Decoding grows the pools by a sixteenth at most, and `nbytes` is what the tensors are."""
    model, artifact, rotations, adaptive = case("llama")
    with torch.no_grad(), attached(model, artifact, rotations, adaptive) as new_cache:
        cache, ids = new_cache(), tokens(2, 120)
        for t in range(120):
            model(ids[:, t : t + 1], past_key_values=cache)
    assert cache.nbytes() == sum(t.numel() * t.element_size() for t in cache.tensors().values())
    pools = cache.layers[0].pools
    for rows in pools.pools.values():
        for tensor in rows.tensors().values():
            assert rows.length <= tensor.shape[1] <= rows.length + max(16, rows.length // 16)
    assert sum(rows.length for (role, _), rows in pools.pools.items() if role == "key") == 2 * pools.length


def test_layers_with_a_sliding_window_keep_their_widths(tmp_path):
    import kvcalib
    from kvcalib.model.selftest import attention_layers
    from kvcalib.stages import build, tiers
    from tests.runtime.talk import HYBRID
    from tests.tiny import make_run, tiny_family

    model = tiny_family("cohere2", **HYBRID)
    run = make_run(tmp_path / "run", model, layers=sorted(attention_layers(model)))
    for b in (1, 3):
        build.run(run, tmp_path / f"bits{b}", b, b)
    tiers.run(run, [tmp_path / "bits1", tmp_path / "bits3"], tmp_path / "two", tiers.TierSettings(budget=3.5))
    attachment = kvcalib.attach(model, tmp_path / "bits3", adaptive=tmp_path / "two")
    cache = attachment.make_cache()
    assert [type(layer) for layer in cache.layers] == [PackedLayer, AdaptiveLayer]
    Talk(model).run(Talk(model).prompt(2), past_key_values=cache)
    assert cache.layers[1].pools.length == cache.get_seq_length() - 5
    kvcalib.detach(model)


def test_a_window_shorter_than_what_is_observed_is_refused(case):
    adaptive = case("llama")[3]
    made = adaptive.layer(0, 0, 2)
    assert made.recent == adaptive.rule.window
    with pytest.raises(ValueError, match="recent is 2, expected at least the 5 queries"):
        AdaptiveLayer(made.tiers, made.rule, 5, 2)
    with pytest.raises(ValueError, match="key has thresholds"):
        AdaptiveLayer(made.tiers[:2], made.rule, 5)
