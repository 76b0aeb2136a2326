"""What surrounds the modes of `generate()`: the demo model, types, devices, compilers, other arguments, accidents."""

import copy
from dataclasses import replace

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from transformers.generation import BaseStreamer, StoppingCriteria

import kvcalib
from kvcalib.model.loading import BUILTIN, load_model, load_tokenizer
from kvcalib.rundir import RunDir
from kvcalib.runtime.cache import PackedCache
from kvcalib.stages import build, fisher, fit_nuq
from tests.runtime.simulated import simulated
from tests.runtime.talk import NEW, PROMPT, WINDOW, Talk, attached, longer
from tests.tiny import tokens

SENTENCES = ["The function returns", "A class that reads a file and", "This module provides"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo model and an artifact of 8 bits."""
    folder = tmp_path_factory.mktemp("demo")
    model, run = load_model(BUILTIN), RunDir(folder / "run", create=True)
    few = fisher.FisherSettings(samples=4, seq_len=256, keep_tokens=1024)
    fisher.run(run, BUILTIN, few, model=model)
    # Every element as near as it can be: feedback moves them for a smaller loss, and axes spread what is far out.
    near = fit_nuq.FitNuqSettings(key_bits=8, value_bits=8, outliers=0.02, feedback=False, value_basis="none")
    fit_nuq.run(run, near)
    build.run(run, folder / "artifact")
    return model, kvcalib.load(folder / "artifact")


@pytest.mark.parametrize(("rows", "penalty"), [(1, 1.0), (3, 1.0), (1, 1.2)])
def test_eight_bits_are_the_demo_model_for_128_tokens(demo, rows, penalty):
    """Greedy; the demo model soon repeats itself, unless repetition has its price."""
    model, artifact = demo
    tokenizer = load_tokenizer(BUILTIN)
    tokenizer.padding_side = "left"
    inputs = dict(tokenizer(SENTENCES[:rows], return_tensors="pt", padding=True, return_token_type_ids=False))
    expected = Talk(model).run(inputs, 128, repetition_penalty=penalty)
    with attached(model, artifact):
        found = Talk(model).run(inputs, 128, repetition_penalty=penalty, return_dict_in_generate=True)
    assert torch.equal(found.sequences, expected)
    assert found.past_key_values.effective_bits() < 12
    assert penalty == 1.0 or len(set(expected[0, -128:].tolist())) > 40


def chosen_from(logits, ids):
    """How far below the best each chosen token lies, in standard deviations of the logits."""
    scores = logits[:, PROMPT - 1 : -1].float()
    gap = scores.amax(-1) - scores.gather(2, ids[:, PROMPT:, None])[..., 0]
    return gap / scores.std(-1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gemma3_text inside the window"])
def test_half_types_choose_what_the_simulation_chooses(case, name, dtype):
    """Up to the noise of the type: each token is the simulation's best, or as good as that.

    By nearest rounding: with error feedback a code that the noise tips takes all those after it along.
    """
    model, artifact, _ = case(name)
    nearest = {
        layer: {role: replace(quantizer, feedback=None) for role, quantizer in pair.items()}
        for layer, pair in artifact.quantizers.items()
    }
    artifact = replace(artifact, quantizers=nearest)
    model = copy.deepcopy(model).to(dtype)
    with attached(model, artifact) as new_cache:
        talk = Talk(model, new_cache)
        ids = talk.run(talk.prompt(3))
        talk.run(talk.prompt(2), num_beams=3)
        talk.turns()
    inputs = longer(Talk(model).prompt(3), ids)
    with simulated(model, artifact) as new_cache, torch.no_grad():
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        logits = model(**inputs, position_ids=positions, past_key_values=new_cache()).logits
    assert chosen_from(logits, ids).max() < 0.1
    assert chosen_from(logits, Talk(model).run(Talk(model).prompt(3))).max() > 0.1


SPREAD = {
    "hooks": lambda m, _: dispatch_model(m, {"": "cpu"}, force_hooks=True),
    "layers": lambda m, _: dispatch_model(
        m,
        {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "cpu",
         "model.norm": "cpu", "lm_head": "cpu"},
        force_hooks=True,
    ),
    "offloaded to the cpu": lambda m, _: cpu_offload(m, torch.device("cpu"), offload_buffers=False),
    "offloaded to disk": lambda m, folder: disk_offload(m, folder, torch.device("cpu")),
    "one layer on disk": lambda m, folder: dispatch_model(
        m,
        {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu",
         "model.norm": "cpu", "lm_head": "cpu"},
        main_device="cpu", offload_dir=folder,
    ),
}  # fmt: skip


@pytest.mark.parametrize("spread", SPREAD.values(), ids=SPREAD)
def test_a_model_spread_by_accelerate(case, spread, tmp_path):
    model, artifact, rotations = case("llama")
    with attached(model, artifact, rotations):
        expected = Talk(model).run(Talk(model).prompt(2))
    model = spread(copy.deepcopy(model), tmp_path)
    with attached(model, artifact) as new_cache:
        talk = Talk(model, new_cache)
        assert torch.equal(talk.run(talk.prompt(2)), expected)
        assert torch.equal(talk.run(talk.prompt(2), num_beams=2)[:, :PROMPT], expected[:, :PROMPT])
        cache = new_cache()
        talk.run(talk.prompt(2), past_key_values=cache)
        cache.save(tmp_path / "cache.safetensors")
        again = kvcalib.load_cache(tmp_path / "cache.safetensors", model)
        inputs = longer(talk.prompt(2), torch.cat([expected, tokens(2, 3)], 1))
        assert torch.equal(talk.run(inputs, past_key_values=cache), talk.run(inputs, past_key_values=again))


@pytest.mark.parametrize(
    ("name", "whole"), [("llama", True), ("llama", False), ("gemma3_text inside the window", True)]
)
def test_a_compiled_model(case, name, whole):
    model, artifact, _ = case(name)
    model = copy.deepcopy(model)
    torch._dynamo.reset()
    with attached(model, artifact, sinks=2, recent=3) as new_cache, torch.no_grad():
        talk = Talk(model, new_cache)
        expected = talk.run(talk.prompt(2), 4)
        logits = model(**talk.prompt(2)).logits
        if whole:
            compiled = torch.compile(model, backend="eager")
        else:
            compiled = model
            model.forward = torch.compile(model.forward, backend="eager")
        assert torch.equal(Talk(compiled).run(talk.prompt(2), 4), expected)
        assert torch.allclose(compiled(**talk.prompt(2)).logits, logits, atol=1e-5)
    model.__dict__.pop("forward", None)
    torch._dynamo.reset()


class Heard(BaseStreamer):
    """A streamer that keeps what it is told."""

    def __init__(self):
        self.tokens = []
        self.ended = False

    def put(self, value):
        self.tokens.extend(value.reshape(-1).tolist())

    def end(self):
        self.ended = True


def test_streamers_hear_every_token(case):
    with attached(*case("llama")):
        talk, heard = Talk(case("llama")[0]), Heard()
        out = talk.run(talk.prompt(), streamer=heard)
    assert heard.tokens == out[0].tolist()
    assert heard.ended


@pytest.mark.parametrize("name", ["llama", "gemma3_text inside the window"])
def test_without_a_cache_attention_reads_packed_tokens_all_the_same(case, name):
    model = case(name)[0]
    with attached(*case(name)):
        talk = Talk(model)
        expected = talk.run(talk.prompt(3))
        out = talk.run(talk.prompt(3), use_cache=False, return_dict_in_generate=True)
    assert torch.equal(out.sequences, expected)
    assert out.past_key_values is None
    assert not torch.equal(expected, Talk(model).run(talk.prompt(3)))


def test_everything_that_generate_can_return(case):
    model = case("llama")[0]
    asked = dict.fromkeys(("output_scores", "output_logits", "output_hidden_states", "return_dict_in_generate"), True)
    with attached(*case("llama")):
        talk = Talk(model)
        expected = talk.run(talk.prompt(2))
        out = talk.run(talk.prompt(2), **asked)
        weights = talk.run(talk.prompt(2), **asked, output_attentions=True).attentions
    assert torch.equal(out.sequences, expected)
    assert len(out.scores) == len(out.logits) == len(out.hidden_states) == NEW
    assert isinstance(out.past_key_values, PackedCache)
    assert out.past_key_values.get_seq_length() == PROMPT + NEW - 1
    assert all(w is None for step in weights for w in step), "packed attention keeps no weights"


@pytest.mark.parametrize("kind", ["static", "dynamic", "offloaded", "quantized"])
def test_cache_implementation_is_overruled_with_a_warning(case, kind):
    model = case("llama")[0]
    with attached(*case("llama")):
        inputs = Talk(model).prompt(2)
        expected = Talk(model).run(inputs)
        with pytest.warns(UserWarning, match=f"{kind}.*packed cache"):
            out = model.generate(
                **inputs, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, cache_implementation=kind,
                return_dict_in_generate=True,
            )  # fmt: skip
    assert torch.equal(out.sequences, expected)
    assert isinstance(out.past_key_values, PackedCache)


class Fails(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.shape[1] > PROMPT + 3:
            raise KeyboardInterrupt
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_attached_models_survive_what_users_do(case, name):
    model, artifact, rotations = case(name)
    plain = Talk(model).run(Talk(model).prompt(2))
    with attached(model, artifact, rotations) as new_cache:
        talk = Talk(model, new_cache)
        expected = talk.run(talk.prompt(2))
        with pytest.raises(KeyboardInterrupt):
            talk.run(talk.prompt(2), stopping_criteria=[Fails()])
        assert torch.equal(talk.run(talk.prompt(2)), expected)
        with pytest.raises(IndexError):
            model(torch.full((1, 4), 10**6))
        assert torch.equal(talk.run(talk.prompt(2)), expected), "two generations on one attached model are alike"
        one, other = new_cache(), new_cache()
        first = [talk.run(talk.prompt(2), past_key_values=c) for c in (one, other)]
        inputs = longer(talk.prompt(2), torch.cat([first[0], tokens(2, 3)], 1))
        alone = talk.run(inputs, past_key_values=one)
        assert torch.equal(alone, talk.run(inputs, past_key_values=other))
    assert torch.equal(Talk(model).run(talk.prompt(2)), plain), "detached, the model is itself again"
    with pytest.raises(RuntimeError, match=r"kvcalib\.attach"):
        model(tokens(2, 1), past_key_values=one)
    with attached(model, artifact, rotations) as new_cache:
        assert torch.equal(Talk(model, new_cache).run(talk.prompt(2)), expected)


def test_two_caches_in_turn_do_not_mix(case):
    model, artifact, rotations = case("llama")
    with attached(model, artifact, rotations) as new_cache, torch.no_grad():
        ids = [tokens(1, 12, seed) for seed in (1, 2)]
        alone = [[model(i[:, a:b], past_key_values=c).logits for a, b in ((0, 8), (8, 9), (9, 12))]
                 for i, c in zip(ids, (new_cache(), new_cache()), strict=True)]  # fmt: skip
        caches = new_cache(), new_cache()
        for number, (a, b) in enumerate(((0, 8), (8, 9), (9, 12))):
            for i, c, expected in zip(ids, caches, alone, strict=True):
                assert torch.equal(model(i[:, a:b], past_key_values=c).logits, expected[number])


@pytest.mark.parametrize("recent", [0, 3])
def test_layers_with_a_window_forget_what_slid_out(case, recent):
    model, artifact, rotations = case("mistral all sliding")
    with attached(model, artifact, rotations, recent=recent) as new_cache:
        talk, cache = Talk(model, new_cache), new_cache()
        talk.run(talk.prompt(2), 60, past_key_values=cache)
    assert cache.get_seq_length() == PROMPT + 59
    assert all(layer.packed.length + layer.window.length <= WINDOW for layer in cache.layers)


@pytest.mark.parametrize(("sinks", "recent"), [(0, 0), (3, 4), (0, 30), (30, 0)])
def test_crop_goes_back_to_what_was_there(case, sinks, recent):
    """By nothing, inside the recent window, into the sinks, to nothing; then on as if it had never been longer."""
    model, artifact, rotations = case("llama")
    ids, more = tokens(2, 20, seed=4), tokens(2, 5, seed=5)
    with attached(model, artifact, rotations, sinks, recent) as new_cache, torch.no_grad():
        for length in (20, 18, 10, 2, 0):
            cropped, never = new_cache(), new_cache()
            model(ids, past_key_values=cropped)
            cropped.crop(length - 20)
            if length:
                model(ids[:, :length], past_key_values=never)
            assert cropped.get_seq_length() == length
            found, expected = (model(more, past_key_values=c).logits for c in (cropped, never))
            # What left the recent window before the crop stays quantized.
            if recent in (0, 30) or length == 0:
                assert torch.allclose(found, expected, atol=1e-4), length
            assert torch.isfinite(found).all()


@pytest.mark.parametrize("name", ["llama", "gemma3_text inside the window"])
def test_a_cache_cropped_to_nothing_takes_other_positions(case, name):
    model, artifact, rotations = case(name)
    with attached(model, artifact, rotations, 3, 4) as new_cache:
        talk, cache = Talk(model, new_cache), new_cache()
        cache.activate_past_recording()
        talk.run(talk.prompt(2), past_key_values=cache)
        cache.crop(-cache.get_seq_length())
        other = {what: t.flip(0) for what, t in talk.prompt(2).items()}
        assert torch.equal(talk.run(other, past_key_values=cache), talk.run(other))


def test_empty_caches_can_be_moved_about(case):
    model, artifact, rotations = case("gemma3_text inside the window")
    with attached(model, artifact, rotations) as new_cache:
        cache = new_cache()
        cache.reorder_cache(torch.tensor([0, 0]))
        cache.batch_select_indices(torch.tensor([0]))
        cache.batch_repeat_interleave(3)
        cache.crop(0)
        cache.crop(-3)
        cache.reset()
        assert cache.nbytes() == 0
        talk = Talk(model)
        assert torch.equal(talk.run(talk.prompt(2), past_key_values=cache), talk.run(talk.prompt(2)))


def test_a_copied_cache_goes_its_own_way_and_shares_the_codebooks(case):
    model, artifact, rotations = case("llama")
    with attached(model, artifact, rotations, 2, 3) as new_cache:
        talk, cache = Talk(model), new_cache()
        said = talk.run(talk.prompt(2), past_key_values=cache)
        other = copy.deepcopy(cache)
        inputs = longer(talk.prompt(2), torch.cat([said, tokens(2, 3)], 1))
        assert torch.equal(*(talk.run(inputs, past_key_values=c) for c in (cache, other)))
    assert other.layers[0].quantizers["key"] is artifact.quantizers[0]["key"]
    assert cache.layers[0].packed.tensors() is not other.layers[0].packed.tensors()


def test_a_cache_of_other_layers_is_refused(case):
    model, artifact, rotations = case("gemma3_text inside the window")
    full = case("gemma3_text")[1]
    with attached(model, artifact, rotations), pytest.raises(ValueError, match=r"layer 0.*new_cache"):
        model(tokens(1, 3), past_key_values=full.new_cache(model))
