"""Every mode of `generate()`: on packed caches it gives the tokens of the float simulation, step for step."""

import copy

import pytest
import torch

from kvcalib.runtime.loader import prove
from tests.runtime.simulated import simulated
from tests.runtime.talk import CASES, WINDOW, Talk, attached, with_values

MODES = {
    "greedy": lambda t: t.run(t.prompt()),
    "left-padded": lambda t: t.run(t.prompt(3)),
    "one token": lambda t: t.run(t.prompt(1, 1)),
    "one new token": lambda t: t.run(t.prompt(2), 1),
    "sampling": lambda t: t.run(t.prompt(3), do_sample=True),
    "several samples": lambda t: t.run(t.prompt(2), do_sample=True, num_return_sequences=3),
    "beam search": lambda t: t.run(t.prompt(2), num_beams=3),
    "beam sampling": lambda t: t.run(t.prompt(2), num_beams=3, do_sample=True),
    "several beams": lambda t: t.run(t.prompt(2), num_beams=4, num_return_sequences=3),
    "prompt lookup": lambda t: t.run(t.echo(), prompt_lookup_num_tokens=4),
    "chunked prefill": lambda t: t.run(t.prompt(3), prefill_chunk_size=8),
    "embeddings": lambda t: t.run(t.embedded(2)),
    "turns": Talk.turns,
    "turns of a batch": lambda t: t.turns(3),
    "turns of chunks": lambda t: t.turns(2, prefill_chunk_size=3),
    "reset": Talk.reset,
    "contrastive": Talk.contrastive,
    "roll back": Talk.roll_back,
}


def both(case, mode, seed=9, **settings):
    """What a mode gives on packed caches and on simulated ones."""
    with simulated(*case, **settings) as new_cache:
        expected = mode(Talk(case[0], new_cache, seed))
    with attached(*case, **settings) as new_cache:
        found = mode(Talk(case[0], new_cache, seed))
    return found, expected


def check_same(case, mode, **settings):
    """The tokens of the simulation.

    A value halfway between two levels may round either way, which one run in some hundred shows in its tokens; that it
    happens again on another prompt is no accident.
    """
    found, expected = both(case, mode, **settings)
    if not torch.equal(found, expected):
        found, expected = both(case, mode, seed=10, **settings)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("name", CASES)
def test_mode_gives_the_tokens_of_the_simulation(case, name, mode):
    check_same(case(name), mode)


@pytest.mark.parametrize("name", CASES)
def test_the_simulation_does_quantize(case, name):
    model = case(name)[0]

    def logits(talk):
        return model(**talk.prompt(3), past_key_values=talk.new_cache()).logits

    with torch.no_grad():
        found, expected = both(case(name), logits)
        plain = model(**Talk(model).prompt(3)).logits
    real = Talk(model).prompt(3)["attention_mask"].bool()
    error = (found - plain)[real].std() / plain[real].std()
    assert (found - expected)[real].std() / plain[real].std() < 0.05 * error
    assert error > 0.03
    changed = [(both(case(name), MODES[m])[0] != MODES[m](Talk(model))).any() for m in ("left-padded", "sampling")]
    assert any(changed), "3 bits change no token: the tests of the modes show nothing"


EXACT = [{"sinks": 3, "recent": 4}, {"exact_prefill": True}, {"sinks": 3, "recent": 4, "exact_prefill": True}]
SOME = ["left-padded", "several samples", "beam search", "prompt lookup", "turns of chunks", "contrastive", "roll back"]


@pytest.mark.parametrize("mode", SOME)
@pytest.mark.parametrize("settings", EXACT, ids=lambda s: " ".join(s))
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gemma3_text inside the window"])
def test_sinks_recent_tokens_and_exact_prefill(case, name, settings, mode):
    check_same(case(name), MODES[mode], **settings)


@pytest.mark.parametrize("mode", ["left-padded", "roll back"])
@pytest.mark.parametrize("relative", [False, True])
def test_values_relative_to_their_tokens_or_not(case, relative, mode):
    model, artifact, rotations = case("llama")
    parts = model, with_values(artifact, relative), rotations
    check_same(parts, MODES[mode])
    check_same(parts, MODES[mode], sinks=2, recent=3, exact_prefill=True)
    with attached(*parts, recent=3) as new_cache:
        cache = new_cache()
        Talk(model).run(Talk(model).prompt(), past_key_values=cache)
        assert all(("value.zero" in layer.packed.tensors()) == relative for layer in cache.layers)


@pytest.mark.parametrize("name", CASES)
def test_exact_prefill_is_the_model_itself(case, name):
    """The prompt's own pass, bit by bit; what comes after reads what was stored."""
    model, artifact, rotations = case(name)
    inputs = Talk(model).prompt(3, 2 * WINDOW)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        plain = model(**inputs).logits
        with attached(model, artifact, rotations, exact_prefill=True) as new_cache:
            cache = new_cache()
            found = model(**inputs, past_key_values=cache).logits
            later = step(model, inputs, cache)
    assert torch.equal(found[real], plain[real])
    with simulated(*case(name), exact_prefill=True) as new_cache, torch.no_grad():
        stored = new_cache()
        model(**inputs, past_key_values=stored)
        assert torch.allclose(later, step(model, inputs, stored), atol=1e-3)


def step(model, inputs, cache):
    """Logits of one more token."""
    seen = torch.cat([inputs["attention_mask"], torch.ones(len(inputs["input_ids"]), 1, dtype=torch.long)], 1)
    new = torch.full((len(seen), 1), 7)
    return model(new, attention_mask=seen, position_ids=seen.sum(1, keepdim=True) - 1, past_key_values=cache).logits


class Drafted:
    """Assisted decoding with `draft` as the assistant."""

    def __init__(self, draft, **settings):
        draft.generation_config.update(
            num_assistant_tokens=4, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0
        )
        self.settings = {"assistant_model": draft} | settings

    def __call__(self, talk):
        return talk.run(talk.prompt(), 2 * WINDOW, **self.settings)


@pytest.mark.parametrize("name", CASES)
def test_assisted_by_a_draft_model(case, name):
    """The draft is the exact model: some of its tokens are taken, some refused, past the window too."""
    draft = copy.deepcopy(case(name)[0])
    check_same(case(name), Drafted(draft))


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gemma3_text inside the window", "mistral all sliding"])
def test_assisted_by_a_draft_model_that_is_attached(case, name):
    model, artifact, rotations = case(name)
    draft = copy.deepcopy(model)
    mine = draft, artifact, prove(draft, list(rotations))
    found = []
    for seed in (9, 10):
        with simulated(*mine, recent=3), simulated(*case(name)):
            expected = Drafted(draft)(Talk(model, seed=seed))
        with attached(*mine, recent=3), attached(*case(name)):
            found.append(torch.equal(Drafted(draft)(Talk(model, seed=seed)), expected))
            Drafted(draft, do_sample=True)(Talk(model))
    assert any(found)
