"""Three faults planted in the packed runtime: which measures see them, and that a usual one does not.

Each fault is of a kind that has shipped: values of one layer lost at prefill, keys turned to the position next to their
own, one head read with another's codebook. KLD of a compared text and verbatim recall must both catch each. A one-shot
perplexity through transformers' quantized cache does not even see the first: that cache hands the prompt's own keys and
values to attention as they came.
"""

import contextlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import Cache
from transformers.cache_utils import QuantizedLayer

from kvcalib.demo import MODEL_DIR
from kvcalib.evaluation.compare import compare, difference
from kvcalib.evaluation.contender import ArtifactContender
from kvcalib.evaluation.failures import Failures
from kvcalib.evaluation.recall import make_plants, measure_recall
from kvcalib.model.loading import load_model, load_tokenizer
from kvcalib.model.text import token_sequences
from kvcalib.quant.codebook import Codebook
from tests.copying import copying_llama
from tests.tiny import make_artifact


def no_values_at_prefill(layer):
    take = layer._take
    layer._take = lambda key, value: take(key, value * 0 if value.shape[2] > 1 else value)


def turned_by_one(layer):
    view = layer.view
    layer.view = lambda count, positions: view(count, positions + 1)


def heads_swapped(layer):
    key = layer.quantizers["key"]
    other = [1, 0, *range(2, len(key.codebook.centroids))]
    wrong = replace(key, codebook=Codebook(key.codebook.widths, key.codebook.centroids[other]))
    view = layer.view
    layer.view = lambda count, positions: replace(view(count, positions), key=wrong)


FAULTS = {fault.__name__: fault for fault in (no_values_at_prefill, turned_by_one, heads_swapped)}


class Planted(ArtifactContender):
    """An artifact whose caches have a fault in one layer."""

    def __init__(self, artifact, fault, layer=1):
        super().__init__(artifact, fault.__name__)
        self.fault, self.layer = fault, layer

    @contextlib.contextmanager
    def run(self, model):
        with super().run(model) as session:
            make = session.new_cache

            def new_cache():
                cache = make()
                self.fault(cache.layers[self.layer])
                return cache

            session.new_cache = new_cache
            yield session


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    model = load_model(str(MODEL_DIR), "float32")
    return model, make_artifact(tmp_path_factory.mktemp("demo"), model, key_bits=4, value_bits=4)


@pytest.fixture(scope="module")
def sequences():
    return token_sequences("builtin", load_tokenizer(str(MODEL_DIR)), 12, 96, "evaluate")


@pytest.fixture(scope="module")
def rows(demo, sequences):
    model, artifact = demo
    contenders = [ArtifactContender(artifact, "sound"), *(Planted(artifact, fault) for fault in FAULTS.values())]
    return {row.name: row for row in compare(model, contenders, sequences, batch_size=6).rows}


@pytest.mark.parametrize("fault", FAULTS)
def test_divergence_catches_it(rows, fault):
    sound, faulty = rows["sound"], rows[fault]
    assert sound.failed is None
    assert faulty.failed is None
    assert difference(faulty, sound).low > sound.kld.high
    assert faulty.cache_bytes == sound.cache_bytes


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_verbatim_recall_catches_it(fault, tmp_path):
    model = copying_llama(heads=2)
    text = np.random.default_rng(0).permutation(512).reshape(4, 128)
    artifact = make_artifact(tmp_path, model, key_bits=8, value_bits=8)
    # This model tells positions apart in its first layer only.
    layer = 0 if fault is turned_by_one else 1
    contenders = [ArtifactContender(artifact, "sound"), Planted(artifact, fault, layer)]
    plants = make_plants(text, [100], "text", trials=2)
    found = measure_recall(model, contenders, plants, [], "text", Failures(), batch_size=10)
    for sound, faulty in zip(found["sound"], found[fault.__name__], strict=True):
        assert sound.exact == 1
        assert faulty.exact == 0
        assert faulty.nll > sound.nll + 1


class Losing(QuantizedLayer):
    """transformers' quantized layer with the first fault, and worse: what it stores is nothing but zeros."""

    def _quantize(self, tensor, axis):
        return torch.zeros_like(tensor)

    def _dequantize(self, stored):
        return stored


@torch.no_grad()
def test_one_shot_perplexity_through_transformers_cache_misses_the_first(demo, sequences, rows):
    model, _ = demo
    ids = torch.from_numpy(sequences[:4])
    layers = model.config.num_hidden_layers

    def passes(*cuts):
        cache = Cache(layers=[Losing(residual_length=1) for _ in range(layers)])
        parts = [model(part, past_key_values=cache).logits for part in ids.tensor_split(cuts, 1)]
        return torch.cat(parts, 1)

    def nll(logits):
        return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))

    sound = nll(model(ids).logits)
    assert nll(passes()) == sound
    # The loss is there: whoever reads the cache finds it. And our measure is of what the cache stored.
    assert nll(passes(48)) > sound + 0.1
    assert rows["no_values_at_prefill"].delta_nll.low > 0
