import pytest
import torch
from transformers import DynamicCache

from kvcalib.evaluation.baselines import find
from kvcalib.evaluation.baselines.baseline import Place
from kvcalib.evaluation.baselines.stored import Codec, StoredLayer
from kvcalib.evaluation.baselines.tapped import TappedBaseline
from kvcalib.runtime.loader import prove
from tests.tiny import tiny_family, tiny_llama, tokens


class Exact(Codec):
    """Everything as it came, in 16 bits."""

    def encode(self, x, exact):
        return {"x": x.to(exact)}

    def decode(self, rows):
        return rows["x"].float()


class ExactBaseline(TappedBaseline):
    label = "exact"
    accepts = find("int").accepts

    def layer(self, place: Place):
        return StoredLayer(Exact(), Exact())


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_keys_stored_before_rope_give_the_models_logits(family):
    """With exact storage nothing is lost: prefill, chunks and steps, a padded row beside another."""
    model = tiny_family(family).to(torch.float32)
    ids = tokens(2, 20)
    mask = torch.ones_like(ids)
    ids[0, :6], mask[0, :6] = 0, 0
    stock, logits = DynamicCache(config=model.config), {}
    with ExactBaseline().run(model) as session, torch.no_grad():
        cache = session.new_cache()
        for end in (9, 17, 18, 19, 20):
            begin = cache.get_seq_length()
            kwargs = {
                "input_ids": ids[:, begin:end],
                "attention_mask": mask[:, :end],
                "position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, begin:end],
            }
            logits[end] = model(**kwargs, past_key_values=cache).logits
    with torch.no_grad():
        begin = 0
        for end, found in logits.items():
            kwargs = {
                "input_ids": ids[:, begin:end],
                "attention_mask": mask[:, :end],
                "position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, begin:end],
            }
            expected = model(**kwargs, past_key_values=stock).logits
            assert torch.allclose(found[1], expected[1], atol=0.02), end
            assert torch.allclose(found[0, max(0, 6 - begin) :], expected[0, max(0, 6 - begin) :], atol=0.02), end
            begin = end


def test_positions_count():
    baseline = ExactBaseline()
    with baseline.run(tiny_llama()) as session:
        cache, _ = session.read(tokens(1, 10))
    assert baseline.nbytes(cache) == 10 * (2 * 2 * 2 * 16 * 2 + 4)


def test_other_caches_are_refused_and_taps_come_off():
    model = tiny_llama()
    with ExactBaseline().run(model), pytest.raises(ValueError, match=r"given a DynamicCache.*session\.new_cache"):
        model(tokens(1, 4), past_key_values=DynamicCache(config=model.config))
    prove(model, [0, 1])
