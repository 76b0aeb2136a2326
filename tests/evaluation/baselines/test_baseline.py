"""What every baseline must do, and specs."""

import itertools

import pytest
import torch
from transformers import DynamicCache, PreTrainedConfig

from kvcalib.demo import MODEL_DIR
from kvcalib.errors import InputError, UnsupportedModel
from kvcalib.evaluation.baselines import BASELINES, CALIBRATES, NAMES, find
from kvcalib.evaluation.baselines.stored import Codec
from kvcalib.model.loading import load_model
from kvcalib.quant.packing import Layout
from kvcalib.quant.quantizer import Quantizer
from kvcalib.stages.calibrated import sample_of
from tests.tiny import calibrate, tiny_family, tiny_llama, tokens

SPECS = {
    "hf-hqq": "hf-hqq:bits=2:group=16:residual=8",
    "hf-quanto": "hf-quanto:bits=2:group=16:residual=8",
    "int": "int:bits=2",
    "kivi": "kivi:bits=2:group=4:residual=8",
    "kvquant-published": "kvquant-published:bits=2:outliers=0.05:sinks=2",
    "nf": "nf:bits=2",
    "qaq-published": "qaq-published:lowest=1:highest=3:window=3:outliers=0.1",
    "qhitter-published": "qhitter-published:bits=2",
    "turboquant": "turboquant:bits=2",
}
STEADY = {"int", "kvquant-published", "nf", "turboquant"}
"""What a token is stored as, and when, depends on that token alone: passes may be cut anywhere."""


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


PADDED = STEADY | {"hf-quanto", "qaq-published", "qhitter-published"}
"""A row's tokens are stored as they would be alone, whatever stands before or beside them."""
FINE = {
    "hf-hqq": "hf-hqq:bits=8:group=16",
    "hf-quanto": "hf-quanto:bits=4:group=2",
    "int": "int:bits=8",
    "kivi": "kivi:bits=8:group=4:residual=4",
    "kvquant-published": "kvquant-published:bits=8:outliers=0.05",
    "nf": "nf:bits=8",
    "qaq-published": "qaq-published:lowest=8:highest=8:outliers=0.45",
    "qhitter-published": "qhitter-published:bits=8:keep=1",
    "turboquant": "turboquant:bits=8",
}
PACKAGES = {"hf-hqq": "hqq", "hf-quanto": "optimum.quanto"}


_SAMPLES = {}


def contender(name, model, spec=None):
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name], reason="the extra [bench] is not installed")
    spec = SPECS[name] if spec is None else spec
    if name not in CALIBRATES:
        return find(spec)
    shape = (model.config.model_type, model.config.hidden_size, model.config.num_hidden_layers)
    if shape not in _SAMPLES:
        _SAMPLES[shape] = sample_of(calibrate(model, samples=2, seq_len=32, keep=64), "the test")
    return find(spec, _SAMPLES[shape])


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
    with contender(name, model).run(model) as session:
        found = logits(model, session, ids)
    assert torch.isfinite(found).all()
    assert (found[:, :24] - exact[:, :24]).abs().amax() > 0.05
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, exact)


@pytest.mark.parametrize("name", sorted(STEADY))
def test_chunks_and_single_tokens_give_the_logits_of_one_pass(model, name):
    ids = tokens(2, 30)
    with contender(name, model).run(model) as session:
        whole = logits(model, session, ids)
        assert torch.allclose(logits(model, session, ids, [13, 10, 7]), whole, atol=2e-4)
        assert torch.allclose(logits(model, session, ids, [20] + [1] * 10), whole, atol=2e-4)


@pytest.mark.parametrize("name", FINE)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_fine_settings_come_close_to_the_exact_model(name, family):
    """A prompt in two pieces, then single tokens, a padded row beside another; soft caps and attention sinks too."""
    model = tiny_family(family)
    ids = tokens(2, 24)
    mask = torch.ones_like(ids)
    ids[0, :5], mask[0, :5] = 0, 0
    # Q-Hitter lets tokens go with the second pass.
    cuts = (0, 24) if name == "qhitter-published" else (0, 12, 20, 21, 22, 23, 24)
    with contender(name, model, FINE[name]).run(model) as session:
        found = in_pieces(model, session.new_cache(), ids, mask, cuts)
    exact = in_pieces(model, DynamicCache(config=model.config), ids, mask, cuts)
    for row, first in ((0, 5), (1, 0)):
        error = (found - exact)[row, first:].abs().mean() / exact[row, first:].abs().mean()
        # QAQ's grid is centred on the mean, not the middle, and clips what lies beyond it at any width.
        assert error < (0.15 if name == "qaq-published" else 0.05)


def in_pieces(model, cache, ids, mask, cuts):
    """Logits of `ids`, which go in from one cut to the next."""
    positions, parts = (mask.cumsum(1) - 1).clamp(min=0), []
    with torch.no_grad():
        for begin, end in itertools.pairwise(cuts):
            parts.append(
                model(
                    ids[:, begin:end],
                    attention_mask=mask[:, :end],
                    position_ids=positions[:, begin:end],
                    past_key_values=cache,
                ).logits
            )
    return torch.cat(parts, 1)


@pytest.mark.parametrize("name", sorted(PADDED))
def test_padding_on_the_left_changes_nothing(model, name):
    ids = tokens(2, 24)
    mask = torch.ones_like(ids)
    ids[0, :9], mask[0, :9] = 0, 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with contender(name, model).run(model) as session:
        both = logits(model, session, ids, attention_mask=mask, position_ids=positions)
        alone = logits(model, session, ids[:1, 9:])
    assert torch.allclose(both[0, 9:], alone[0], atol=2e-4)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("beams", [1, 2])
def test_generate_runs(model, name, beams):
    ids = tokens(2, 12)
    mask = torch.ones_like(ids)
    ids[0, :3], mask[0, :3] = 0, 0
    with contender(name, model).run(model) as session:
        made = model.generate(
            ids, attention_mask=mask, past_key_values=session.new_cache(), max_new_tokens=6, min_new_tokens=6,
            do_sample=False, num_beams=beams,
        )  # fmt: skip
    assert made.shape == (2, 18)


@pytest.fixture(scope="module")
def demo():
    return load_model(str(MODEL_DIR))


@pytest.mark.parametrize("name", SPECS)
def test_defaults_generate_on_the_demo_model(demo, name):
    """Greedy decoding with default settings; the cache holds fewer bytes than 16-bit elements would take."""
    ids = tokens(1, 300, seed=3)
    chosen = contender(name, demo, name)
    with chosen.run(demo) as session:
        cache = session.new_cache()
        made = demo.generate(ids, past_key_values=cache, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert made.shape == (1, 304)
    assert cache.get_seq_length() == 303
    assert chosen.nbytes(cache) < 0.6 * 303 * 4 * 2 * 2 * 64 * 2


def reachable(thing, found):
    """Memory of every tensor that hangs on a cache, by address; what belongs to the model is left out."""
    if isinstance(thing, torch.Tensor) and not hasattr(thing, "__tensor_flatten__"):
        found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    elif isinstance(thing, (list, tuple, dict)):
        for part in thing.values() if isinstance(thing, dict) else thing:
            reachable(part, found)
    elif hasattr(thing, "__dict__") and not isinstance(thing, (type, Codec, Layout, Quantizer, PreTrainedConfig)):
        for name, part in vars(thing).items():
            if name != "valid":  # what the pass under way said of its tokens
                reachable(part, found)
    return found


@pytest.mark.parametrize("name", SPECS)
def test_every_byte_is_counted(name):
    """The bytes are those of all memory that can be reached from the cache, after a prompt and after decoding."""
    model = tiny_llama().to(torch.bfloat16)
    chosen = contender(name, model)
    with chosen.run(model) as session:
        cache, _ = session.read(tokens(2, 64))
        assert chosen.nbytes(cache) == sum(reachable(cache, {}).values())
        session.decode(tokens(2, 5, seed=1), cache)
        assert chosen.nbytes(cache) == sum(reachable(cache, {}).values())
        cache.reorder_cache(torch.tensor([1, 1]))
        cache.batch_select_indices(torch.tensor([0]))
        session.decode(tokens(1, 1, seed=1), cache)
        assert chosen.nbytes(cache) == sum(reachable(cache, {}).values())


@pytest.mark.parametrize("name", SPECS)
def test_sliding_layers_stay_as_they_are(name):
    model = tiny_family("gemma3_text")
    stock = DynamicCache(config=model.config)
    with contender(name, model).run(model) as session:
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
