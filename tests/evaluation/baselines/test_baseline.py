"""What every baseline must do, and specs."""

import pytest
import torch
from transformers import DynamicCache

from kvcalib.errors import InputError, UnsupportedModel
from kvcalib.evaluation.baselines import BASELINES, NAMES, find
from tests.tiny import tiny_family, tiny_llama, tokens

SPECS = {
    "hf-hqq": "hf-hqq:bits=2:group=16:residual=8",
    "hf-quanto": "hf-quanto:bits=2:group=16:residual=8",
    "int": "int:bits=2",
    "kivi": "kivi:bits=2:group=4:residual=8",
    "nf": "nf:bits=2",
    "turboquant": "turboquant:bits=2",
}
STEADY = {"int", "nf", "turboquant"}
"""What a token is stored as, and when, depends on that token alone: passes may be cut anywhere."""


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


PACKAGES = {"hf-hqq": "hqq", "hf-quanto": "optimum.quanto"}


def contender(name):
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name], reason="the extra [bench] is not installed")
    return find(SPECS[name])


def logits(model, session, ids, cuts=None, **kwargs):
    cache = session.new_cache()
    with torch.no_grad():
        return torch.cat(
            [
                model(input_ids=part, past_key_values=cache, **kwargs).logits
                for part in ids.split(cuts or [ids.shape[1]], 1)
            ],
            1,
        )


def test_every_baseline_is_tried():
    assert set(SPECS) == set(BASELINES)
    assert set(NAMES) == {"fp16", *BASELINES}


@pytest.mark.parametrize("name", SPECS)
def test_one_pass_shows_the_error_and_the_model_is_left_as_it_was(model, name):
    ids = tokens(2, 40)
    stock = DynamicCache(config=model.config)
    with torch.no_grad():
        exact = model(input_ids=ids, past_key_values=stock).logits
    with contender(name).run(model) as session:
        found = logits(model, session, ids)
    assert torch.isfinite(found).all()
    assert (found[:, :24] - exact[:, :24]).abs().amax() > 0.05
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, exact)


@pytest.mark.parametrize("name", sorted(STEADY))
def test_chunks_and_single_tokens_give_the_logits_of_one_pass(model, name):
    ids = tokens(2, 30)
    with contender(name).run(model) as session:
        whole = logits(model, session, ids)
        assert torch.allclose(logits(model, session, ids, [13, 10, 7]), whole, atol=2e-4)
        assert torch.allclose(logits(model, session, ids, [20] + [1] * 10), whole, atol=2e-4)


@pytest.mark.parametrize("name", sorted(STEADY))
def test_padding_on_the_left_changes_nothing(model, name):
    ids = tokens(2, 24)
    mask = torch.ones_like(ids)
    ids[0, :9], mask[0, :9] = 0, 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with contender(name).run(model) as session:
        both = logits(model, session, ids, attention_mask=mask, position_ids=positions)
        alone = logits(model, session, ids[:1, 9:])
    assert torch.allclose(both[0, 9:], alone[0], atol=2e-4)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("beams", [1, 2])
def test_generate_runs(model, name, beams):
    ids = tokens(2, 12)
    mask = torch.ones_like(ids)
    ids[0, :3], mask[0, :3] = 0, 0
    with contender(name).run(model) as session:
        made = model.generate(
            ids, attention_mask=mask, past_key_values=session.new_cache(), max_new_tokens=6, min_new_tokens=6,
            do_sample=False, num_beams=beams,
        )  # fmt: skip
    assert made.shape == (2, 18)


@pytest.mark.parametrize("name", SPECS)
def test_every_byte_is_counted(model, name):
    """At least what codes alone take, less than 16 bits an element would; a cache read twice as long holds more."""
    chosen = contender(name)
    with chosen.run(model) as session:
        cache, _ = session.read(tokens(1, 64))
        held = chosen.nbytes(cache)
        session.decode(tokens(1, 8, seed=1), cache)
        assert chosen.nbytes(cache) > held
    elements = 2 * 2 * 2 * 16 * 64
    assert elements * 2 / 8 < held < elements * 2


@pytest.mark.parametrize("name", SPECS)
def test_sliding_layers_stay_as_they_are(name):
    model = tiny_family("gemma3_text")
    stock = DynamicCache(config=model.config)
    with contender(name).run(model) as session:
        cache = session.new_cache()
        kinds = [type(layer) for layer in cache.layers]
        assert kinds[:3] == [type(layer) for layer in stock.layers[:3]]
        assert kinds[3] is not type(stock.layers[3])
        assert torch.isfinite(logits(model, session, tokens(1, 40))).all()


def test_a_model_that_only_slides_is_refused():
    model = tiny_llama()
    model.config.layer_types = ["sliding_attention"] * 2
    model.config.sliding_window = 8
    with pytest.raises(UnsupportedModel, match="no layer of this model keeps every token"), find("int").run(model):
        pass


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("kiwi", r"baseline is 'kiwi' \(in 'kiwi'\), expected one of: fp16, "),
        ("kivi:bit=2", r"baseline 'kivi' has no setting 'bit', expected one of: bits, key_bits"),
        ("kivi:bits=9", r"baseline 'kivi': bits is '9'.*less than or equal to 8.*kivi:bits=VALUE"),
        ("kivi:bits=two", r"bits is 'two'.*valid integer"),
        ("kivi:bits", r"'bits' is not setting=value; write a spec as kivi:setting=value"),
        ("kivi:bits=2:bits=3", r"'bits=3' is given twice"),
        ("fp16:bits=2", r"fp16 has no settings"),
    ],
)
def test_specs_that_are_refused(spec, message):
    with pytest.raises(InputError, match=message):
        find(spec)


def test_a_name_tells_the_settings_that_are_not_the_defaults():
    assert find("kivi").name == "kivi"
    assert find("kivi:residual=64:bits=2:key_bits=3").name == "kivi:key_bits=3:residual=64"
    assert find("fp16").name == "fp16"
    assert find(find("kivi:residual=64").name).settings["residual"] == 64
