"""Packed equals simulated, at every width and format, however the tokens come in."""

import numpy as np
import pytest
import torch

import kvcalib
from kvcalib.model.taps import Taps
from kvcalib.runtime.attention import chunked_attention
from kvcalib.runtime.cache import PackedCache
from kvcalib.runtime.layers import PackedLayer, chunks
from kvcalib.runtime.loader import prove
from tests.runtime.simulated import simulate
from tests.tiny import make_artifact, make_run, tiny_llama, tokens

LENGTH = 40


class Simulation:
    """Handler that attends to simulated keys and values of the whole sequence: no cache, no packing, no chunks."""

    def __init__(self, artifact):
        self.artifact = artifact

    def before(self, tap):
        pass

    def attend(self, call):
        pair = self.artifact.quantizers[call.tap.layer]
        batch, heads, length, dim = call.key.shape

        def quantized(x, q):
            return (
                simulate(x.transpose(1, 2).reshape(-1, heads, dim), q).view(batch, length, heads, dim).transpose(1, 2)
            )

        key, value = quantized(call.key, pair["key"]), quantized(call.value, pair["value"])
        return call.plain(call.rotate_new(call.query), call.rotate_new(key), value)


def padded(batch):
    ids = tokens(batch, LENGTH, seed=9)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, : 3 * row] = 0
    return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)


def nll(logits, ids, mask):
    logp = logits[:, :-1].double().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    return float(-(logp * mask[:, :-1]).sum() / mask[:, :-1].sum())


def run(model, ids, mask, positions, steps, cache):
    found, start = [], 0
    with torch.no_grad():
        for step in steps:
            stop = start + step
            out = model(
                input_ids=ids[:, start:stop], attention_mask=mask[:, :stop], position_ids=positions[:, start:stop],
                past_key_values=cache,
            )  # fmt: skip
            found.append(out.logits)
            start = stop
    return torch.cat(found, 1)


STEPS = {"one shot": [LENGTH], "chunks": [16, 1, 7, 16], "token by token": [1] * LENGTH}


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def runs(model, tmp_path_factory):
    """One fitted run per format; artifacts of every width are built from it."""
    folder = tmp_path_factory.mktemp("runs")
    settings = {
        "nuq": {}, "nf": {"format": "nf", "value_scale": "head"}, "int": {"format": "int"},
        "feedback": {"value_scale": "head", "feedback": True}, "basis": {"value_basis": "pca"},
    }  # fmt: skip
    return {name: make_run(folder / name, model, outliers=0.05, **fit) for name, fit in settings.items()}


@pytest.mark.parametrize("format", ["nuq", "nf", "int", "feedback", "basis"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_packed_equals_simulated(model, runs, tmp_path, format, bits):
    from kvcalib.stages import build

    build.run(runs[format], tmp_path / "a", bits, bits)
    artifact = kvcalib.load(tmp_path / "a")
    rotations = prove(model, list(artifact.quantizers))
    for batch in (1, 3):
        ids, mask, positions = padded(batch)
        with Taps(model, Simulation(artifact), rotations), torch.no_grad():
            expected = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        for steps in STEPS.values():
            kvcalib.attach(model, artifact)
            found = run(model, ids, mask, positions, steps, artifact.new_cache(model))
            kvcalib.detach(model)
            within = 2e-3 if format == "feedback" else 1e-4
            assert abs(nll(found, ids, mask) - nll(expected, ids, mask)) < within
            real = mask.bool()
            # Logits are not compared one by one: a value halfway between two levels may round either way, and every
            # later token sees it. That rows decode to the simulation is `test_quantizer.py`.
        exact = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        if bits <= 4:
            assert (exact - expected)[real].abs().max() > 1e-2, "the simulation quantizes nothing"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_generate_runs_packed_in_every_dtype(tmp_path, dtype):
    model = tiny_llama()
    artifact = make_artifact(tmp_path, model, key_bits=4, value_bits=4)
    model = model.to(dtype)
    attachment = kvcalib.attach(model, artifact)
    ids, mask, _ = padded(3)
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=12, min_new_tokens=12, do_sample=False, return_dict_in_generate=True
    )
    cache = out.past_key_values
    assert isinstance(cache, PackedCache)
    assert cache.get_seq_length() == LENGTH + 11
    assert all(isinstance(layer, PackedLayer) for layer in cache.layers)
    assert cache.effective_bits() < 16
    words = cache.tensors()[
        "layers.0.key.words" if "layers.0.key.words" in cache.tensors() else next(iter(cache.tensors()))
    ]
    assert words.dtype == torch.int32
    # Greedy decoding is teacher forcing of itself: one forward pass over a fresh cache must choose the same tokens.
    if dtype == torch.float32:
        seen = torch.cat([mask, torch.ones(3, 12, dtype=mask.dtype)], 1)
        logits = run(
            model, out.sequences, seen, (seen.cumsum(-1) - 1).clamp(min=0), [LENGTH + 12], attachment.make_cache()
        )
        assert torch.equal(logits[:, LENGTH - 1 : -1].argmax(-1), out.sequences[:, LENGTH:])
    kvcalib.detach(model)


def test_detach_restores_the_model(tmp_path):
    model = tiny_llama()
    ids = tokens(1, 20)
    with torch.no_grad():
        before = model(ids).logits
        artifact = make_artifact(tmp_path, model, key_bits=2, value_bits=2)
        kvcalib.attach(model, artifact)
        attached = model(ids).logits
        with pytest.raises(RuntimeError, match="attached already"):
            kvcalib.attach(model, artifact)
        kvcalib.detach(model)
        kvcalib.detach(model)
        after = model(ids).logits
    assert torch.equal(before, after)
    assert not torch.allclose(before, attached, atol=1e-2)
    assert "_prepare_cache_for_generation" not in vars(model)


def test_a_stock_cache_in_an_attached_model_is_refused(tmp_path):
    from transformers import DynamicCache

    model = tiny_llama()
    kvcalib.attach(model, make_artifact(tmp_path, model))
    with pytest.raises(ValueError, match=r"DynamicCache.*artifact\.new_cache"):
        model(tokens(1, 4), past_key_values=DynamicCache(config=model.config))


def test_an_artifact_for_other_heads_is_refused(tmp_path):
    artifact = make_artifact(tmp_path, tiny_llama())
    with pytest.raises(kvcalib.errors.ArtifactMismatch, match=r"kv_heads is 2, this model has 4"):
        kvcalib.attach(tiny_llama(num_key_value_heads=4), artifact)
    with pytest.raises(kvcalib.errors.ArtifactMismatch, match="num_hidden_layers is 3, expected 2"):
        kvcalib.attach(tiny_llama(num_hidden_layers=3), artifact)
    with pytest.warns(UserWarning, match="weights_sha256"):
        kvcalib.attach(tiny_llama(seed=5), artifact)


@pytest.mark.parametrize("steps", list(STEPS.values()), ids=list(STEPS))
def test_sinks_and_recent_tokens_are_exact_per_row(model, tmp_path, steps):
    artifact = make_artifact(tmp_path, model, key_bits=1, value_bits=1)
    ids, mask, positions = padded(3)
    kvcalib.attach(model, artifact, sinks=4, recent=6)
    cache = artifact.new_cache(model, sinks=4, recent=6)
    run(model, ids, mask, positions, steps, cache)
    plain = artifact.new_cache(model, sinks=0, recent=0)
    seen = {}

    class Spy(PackedLayer):
        def update(self, key_states, value_states, *args, **kwargs):
            seen.setdefault("key", []).append(key_states)
            return super().update(key_states, value_states)

    layer = cache.layers[0]
    spy = Spy(*(layer.quantizers[n] for n in ("key", "value")))
    plain.layers[0] = spy
    run(model, ids, mask, positions, steps, plain)
    kvcalib.detach(model)
    exact = torch.cat(seen["key"], 2)
    view = layer.view(layer.seen, torch.zeros(1, layer.seen, dtype=torch.int32))
    keys = torch.cat([k for _, k, _ in chunks(view, 16)], 2)
    assert keys.shape == exact.shape
    for row in range(3):
        first = 3 * row
        held = (keys[row] == exact[row]).all(0).all(-1)
        assert held[first : first + 4].all(), "sinks are the first real tokens of a row"
        assert held[-6:].all()
        assert not held[first + 4 : -6].any()


def test_every_byte_is_counted(model, tmp_path):
    artifact = make_artifact(tmp_path, model, key_bits=3, value_bits=3)
    kvcalib.attach(model, artifact, sinks=2, recent=4)
    cache = artifact.new_cache(model, sinks=2, recent=4)
    ids, mask, positions = padded(3)
    run(model, ids, mask, positions, [24, 1, 15], cache)
    kvcalib.detach(model)

    def walk(thing, found, visited):
        if id(thing) in visited:
            return
        visited.add(id(thing))
        if isinstance(thing, torch.Tensor):
            found.append(thing)
        elif isinstance(thing, dict):
            for part in thing.values():
                walk(part, found, visited)
        elif isinstance(thing, (list, tuple)):
            for part in thing:
                walk(part, found, visited)
        elif hasattr(thing, "__dict__") and not isinstance(thing, type):
            for name, part in vars(thing).items():
                # Codebooks and layouts belong to the artifact; `valid` is the present call's mask.
                if name not in ("quantizers", "valid", "_view"):
                    walk(part, found, visited)

    found = []
    walk(cache, found, set())
    assert cache.nbytes() == sum(t.untyped_storage().nbytes() for t in found)
    elements = 2 * 3 * LENGTH * 2 * 32
    assert cache.effective_bits() == pytest.approx(cache.nbytes() * 8 / elements)


def test_uniform_widths_take_their_bits(model, tmp_path):
    artifact = make_artifact(tmp_path, model, key_bits=2, value_bits=4, outliers=0)
    kvcalib.attach(model, artifact)
    cache = artifact.new_cache(model)
    with torch.no_grad():
        model(tokens(2, 64), past_key_values=cache)
    kvcalib.detach(model)
    held = cache.tensors()
    assert held["layers.0.key.words"].nbytes == 2 * 64 * 32 * 2 // 8
    assert held["layers.0.value.words"].nbytes == 2 * 64 * 32 * 4 // 8


def test_crop_select_repeat_and_reorder_follow_the_rows(model, tmp_path):
    artifact = make_artifact(tmp_path, model, key_bits=4, value_bits=4)
    ids, mask, positions = padded(3)
    kvcalib.attach(model, artifact, sinks=2)
    cache = artifact.new_cache(model, sinks=2)
    run(model, ids, mask, positions, [LENGTH], cache)
    cache.crop(-10)
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
    rows = torch.tensor([2, 0]).repeat_interleave(2)[torch.tensor([3, 0, 1, 2])]
    assert cache.get_seq_length() == LENGTH - 10
    again = artifact.new_cache(model, sinks=2)
    run(model, ids[rows], mask[rows], positions[rows], [LENGTH - 10], again)
    rest = slice(LENGTH - 10, LENGTH)
    with torch.no_grad():
        a, b = (
            model(
                ids[rows][:, rest], attention_mask=mask[rows], position_ids=positions[rows][:, rest], past_key_values=c
            ).logits
            for c in (cache, again)
        )
    kvcalib.detach(model)
    assert torch.allclose(a, b, atol=1e-4)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.nbytes() == 0


def test_room_grows_by_an_eighth_and_appends_move_little():
    from kvcalib.runtime.storage import MIN_ROOM, Rows

    rows = Rows()
    rows.append({"x": torch.zeros(1, 1000, 4)})
    moved, pointer = 0, rows.tensors()["x"].data_ptr()
    for step in range(3000):
        rows.append({"x": torch.full((1, 1, 4), float(step))})
        if rows.tensors()["x"].data_ptr() != pointer:
            pointer = rows.tensors()["x"].data_ptr()
            moved += rows.length
        assert rows.tensors()["x"].shape[1] <= rows.length + max(MIN_ROOM, rows.length // 8)
    assert rows.read(0, 4000)["x"][0, 1000:, 0].tolist() == [float(s) for s in range(3000)]
    assert moved < 10 * 4000


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("kind", ["causal", "bool", "float"])
def test_chunked_attention_equals_float64(softcap, sink, kind):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 5, 8, generator=generator)
    k, v = (torch.randn(2, 2, 19, 8, generator=generator) for _ in range(2))
    logits = torch.randn(4, generator=generator) if sink else None
    causal = torch.arange(19)[None] <= torch.arange(14, 19)[:, None]
    allowed = causal.expand(2, 1, 5, 19).clone()
    if kind != "causal":
        allowed[1, ..., :6] = False
    mask = {"causal": None, "bool": allowed, "float": torch.where(allowed, 0.0, torch.finfo(torch.float32).min)}[kind]
    chunks = ((s, k[:, :, s : s + 4], v[:, :, s : s + 4]) for s in range(0, 19, 4))
    found = chunked_attention(q, chunks, lambda x, _: x, mask, 19, 0.3, softcap, logits)
    scores = torch.einsum("bhqd,bhkd->bhqk", q.double(), k.repeat_interleave(2, 1).double()) * 0.3
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~allowed, -np.inf)
    if sink:
        scores = torch.cat([scores, logits.double().view(1, 4, 1, 1).expand(2, 4, 5, 1)], -1)
    weights = scores.softmax(-1)[..., :19]
    expected = torch.einsum("bhqk,bhkd->bqhd", weights, v.repeat_interleave(2, 1).double())
    assert torch.allclose(found.double(), expected, atol=1e-5)


def test_memory_of_the_process_agrees(tmp_path):
    """At 8 K tokens the resident memory grows by what `nbytes` says, within 15 %."""
    import gc

    import psutil

    model = tiny_llama(num_key_value_heads=4, head_dim=64, num_hidden_layers=4)
    artifact = make_artifact(tmp_path, model, key_bits=4, value_bits=4)

    def fill(cache, steps, size):
        for step in range(steps):
            x = torch.randn(4, 4, size, 64, generator=torch.Generator().manual_seed(step))
            for layer in range(4):
                cache.layers[layer].update(x, x)

    fill(artifact.new_cache(model), 2, 512)
    gc.collect()
    _trim()
    before = psutil.Process().memory_info().rss
    cache = artifact.new_cache(model)
    fill(cache, 16, 512)
    gc.collect()
    _trim()
    grown = psutil.Process().memory_info().rss - before
    assert cache.get_seq_length() == 8192
    assert cache.nbytes() > 30e6
    assert grown == pytest.approx(cache.nbytes(), rel=0.15)


@pytest.mark.parametrize("bits", [2, 4])
def test_a_step_allocates_less_than_an_eighth_of_a_copy(tmp_path, bits):
    """What one decode step holds at most, through torch and numpy, against the cache in float32."""
    import tracemalloc

    from torch.profiler import ProfilerActivity, profile

    model = tiny_llama(num_key_value_heads=2, head_dim=64)
    artifact = make_artifact(tmp_path, model, key_bits=bits, value_bits=bits)
    kvcalib.attach(model, artifact)
    cache, ids = artifact.new_cache(model), tokens(1, 2048)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)
        tracemalloc.start()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            model(ids[:, :1], past_key_values=cache)
        compiled = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    kvcalib.detach(model)
    held = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert 0 < peak + compiled < 2 * 2 * 2048 * 2 * 64 * 4 / 8


def _trim():
    import ctypes

    ctypes.CDLL("libc.so.6").malloc_trim(0)
