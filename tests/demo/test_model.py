"""The demo model: it loads, has the shape its page tells, is small, and has learnt from its training."""

import json
import math
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from kvcalib.demo import MODEL_DIR, documents

VOCABULARY = 2048
SIZE_LIMIT = 8_000_000  # bytes


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL_DIR)


def test_shape_and_type_as_declared() -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype="auto")
    config = model.config
    assert model.dtype == torch.bfloat16
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (VOCABULARY, 256, 4)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 64)
    assert model.model.layers[0].self_attn.k_proj.weight.shape == (2 * 64, 256)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert 2_000_000 <= model.num_parameters() <= 4_000_000


def test_folder_is_small_and_has_every_file() -> None:
    sizes = {path.name: path.stat().st_size for path in MODEL_DIR.iterdir()}
    weights, tokens = {"config.json", "model.safetensors"}, {"tokenizer.json", "tokenizer_config.json"}
    assert set(sizes) == {*weights, *tokens, "generation_config.json", "README.md"}
    assert sizes["model.safetensors"] <= SIZE_LIMIT
    told = json.loads((MODEL_DIR / "tokenizer_config.json").read_text())
    assert told["tokenizer_class"] == "TokenizersBackend"


def test_tokenizer_begins_documents_and_gives_the_text_back(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "The cache — é, 漢, \t and `code()`\n\nanother paragraph."
    ids = tokenizer(text).input_ids
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 0, 1)
    assert ids[0] == 0
    assert 0 not in ids[1:]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer) == VOCABULARY


def test_tokenizer_is_made_for_this_text(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "\n\n".join(documents("evaluate", 20_000))
    assert len(text) / len(tokenizer(text).input_ids) > 2.5  # bytes would give 1


def test_perplexity_is_far_below_uniform_and_near_the_page(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    stream = torch.cat([torch.tensor(tokenizer(text).input_ids) for text in documents("evaluate", 40_000)])
    windows = stream[: 4 * 512].view(4, 512)
    with torch.inference_mode():
        found = math.exp(float(model(input_ids=windows, labels=windows).loss))
        shuffled = windows[:, torch.randperm(512, generator=torch.Generator().manual_seed(0))]
        without_order = math.exp(float(model(input_ids=shuffled, labels=shuffled).loss))
    page = (MODEL_DIR / "README.md").read_text()
    told = float(re.search(r"held-out perplexity \| \*\*([\d.]+)\*\*", page)[1])
    assert found < VOCABULARY / 20
    assert found < without_order / 5  # it predicts from what stands before, not from how often tokens occur
    assert told / 3 < found < told * 3  # four windows only, and other packages may be installed
