"""Every family: identity rotary and exact storage give the untouched model's logits, bit by bit."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kvcalib.errors import UnsupportedModel
from kvcalib.model.selftest import full_attention_layers
from kvcalib.model.taps import Taps
from kvcalib.runtime.loader import _PackedAttention, exact_cache, prove
from tests.tiny import tiny_family, tokens

FAMILIES = [
    "llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "phi", "phi3", "gemma2",
    "gemma3_text", "gpt_oss", "olmo2", "olmo3", "glm", "glm4", "cohere", "cohere2",
    "smollm3", "exaone4", "stablelm", "granite", "mixtral", "ernie4_5", "nemotron", "helium",
    "apertus", "minimax_m2", "seed_oss", "arcee", "starcoder2", "glm4_moe", "bitnet", "qwen2_moe",
    "olmo", "olmoe", "granitemoe",
]  # fmt: skip


def logits(model, cache, lengths=(9, 1, 1)):
    """Left-padded prefill and decode of 2 rows; logits of real tokens only."""
    ids = tokens(2, sum(lengths), seed=3)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    found, start = [], 0
    for length in lengths:
        stop = start + length
        seen = mask[:, :stop]
        positions = (seen.cumsum(-1) - 1).clamp(min=0)[:, start:stop]
        with torch.no_grad():
            out = model(
                input_ids=ids[:, start:stop],
                attention_mask=seen,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
        cache = out.past_key_values
        found.append(out.logits[mask[:, start:stop].bool()])
        start = stop
    return torch.cat(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_tapped_model_is_bit_exact(family):
    model = tiny_family(family)
    layers = full_attention_layers(model)
    assert layers, "the tiny model has nothing to quantize: the test would pass for nothing"
    rotations = prove(model, layers)
    expected = logits(model, None)
    with Taps(model, _PackedAttention(), rotations):
        cache = exact_cache(model, layers)
        found = logits(model, cache)
    assert torch.equal(found, expected)
    assert cache.layers[layers[-1]].get_seq_length() == 11
    assert torch.equal(logits(model, None), expected), "the model was not restored"


def test_layers_without_position_are_found():
    styles = {layer: r.style for layer, r in prove(tiny_family("smollm3"), [0, 1, 2, 3]).items()}
    assert styles == {0: "whole", 1: "whole", 2: "whole", 3: "none"}
    assert prove(tiny_family("phi"), [0])[0].style == "part"


def refused(family, **settings):
    config = AutoConfig.for_model(family, **settings)
    return AutoModelForCausalLM.from_config(config).eval()


SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97, "intermediate_size": 96}


@pytest.mark.parametrize(
    ("family", "settings", "reason"),
    [
        ("hunyuan_v1_dense", {"num_key_value_heads": 2, "head_dim": 16}, "norm after RoPE"),
        ("deepseek_v3", {"num_key_value_heads": 4, "q_lora_rank": 32, "n_routed_experts": 4,
                         "moe_intermediate_size": 32,
                         "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}, "latent"),
        ("llama4_text", {"num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 2, "intermediate_size_mlp": 96,
                         "layer_types": ["chunked_attention", "full_attention"]}, "complex rotary"),
        ("gpt_neox", {}, "position_embeddings"),
    ],
)  # fmt: skip
def test_families_that_cannot_work_say_why(family, settings, reason):
    model = refused(family, pad_token_id=0, **(SMALL | settings))
    with pytest.raises(UnsupportedModel, match=reason) as caught:
        prove(model, full_attention_layers(model))
    assert family in str(caught.value)


def test_gradients_of_other_attention_modules_do_not_pass(monkeypatch):
    """A rotation that is almost right is refused: one flipped sign in what the module's keys should be."""
    model = tiny_family("llama")
    module = model.model.layers[2].self_attn
    forward = type(module).forward

    def crooked(self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **kwargs):
        if self.layer_idx == 2:
            position_embeddings = (position_embeddings[0], -position_embeddings[1])
        return forward(self, hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)

    monkeypatch.setattr(type(module), "forward", crooked)
    with pytest.raises(UnsupportedModel, match="layer 2"):
        prove(model, [0, 1, 2, 3])
