"""One layer's keys or values rounded: against hooks that round a projection's output, and against the packed cache."""

import pytest
import torch
from transformers import DynamicCache

import kvcalib
from kvcalib.evaluation.isolated import Probe, isolated_kl
from kvcalib.runtime.loader import prove
from tests.tiny import make_artifact, tiny_family, tiny_llama, tokens


def kl(expected, found):
    p, q = expected.double().log_softmax(-1), found.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).sum(1).tolist()


def through(quantizer, sinks):
    """A hook that sends a projection's output `[B, T, H * D]` through the quantizer, but for the first tokens."""

    def hook(module, args, output):
        heads, dim = quantizer.layout.widths.shape
        rows = output.reshape(-1, heads, dim)
        stored = quantizer.decode(quantizer.encode(rows, torch.float16)).reshape(output.shape)
        return torch.cat([output[:, :sinks], stored[:, sinks:]], 1)

    return hook


@pytest.mark.parametrize("sinks", [0, 3])
def test_equals_hooks_on_the_projections(tmp_path, sinks):
    """In a Llama the projections' outputs are the un-rotated keys and the values."""
    model = tiny_llama()
    artifact = make_artifact(tmp_path, model, key_bits=2, value_bits=3)
    ids = tokens(2, 30)
    probes = [
        Probe(layer, role, pair[role], sinks)
        for layer, pair in artifact.quantizers.items()
        for role in ("key", "value")
    ]
    with torch.no_grad():
        exact = model(ids).logits
        for probe, found in isolated_kl(model, prove(model, [0, 1]), ids, probes):
            attention = model.model.layers[probe.layer].self_attn
            projection = attention.k_proj if probe.role == "key" else attention.v_proj
            handle = projection.register_forward_hook(through(probe.quantizer, sinks))
            assert found == pytest.approx(kl(exact, model(ids).logits), rel=1e-3, abs=1e-4)
            assert min(found) > 0.1
            handle.remove()
    assert torch.equal(model(ids).logits, exact), "the taps were left on"


def test_equals_the_packed_cache_where_the_other_role_hardly_errs(tmp_path):
    model = tiny_llama(num_hidden_layers=1)
    artifact = make_artifact(tmp_path, model, key_bits=2, value_bits=8)
    ids = tokens(2, 40)
    probe = Probe(0, "key", artifact.quantizers[0]["key"])
    ((_, found),) = isolated_kl(model, prove(model, [0]), ids, [probe])
    with torch.no_grad():
        exact = model(ids).logits
        kvcalib.attach(model, artifact)
        packed = kl(exact, model(ids).logits)
        kvcalib.detach(model)
    assert found == pytest.approx(packed, rel=0.02)


def test_families_with_key_norms_are_rounded_after_them(tmp_path):
    """qwen3 normalizes keys between projection and rotation; the packed cache stores what comes after."""
    model = tiny_family("qwen3", num_hidden_layers=2, layer_types=["full_attention"] * 2)
    artifact = make_artifact(tmp_path, model, key_bits=2, value_bits=2)
    ids = tokens(1, 40)
    probe = Probe(1, "key", artifact.quantizers[1]["key"])
    ((_, found),) = isolated_kl(model, prove(model, [0, 1]), ids, [probe])
    norm = model.model.layers[1].self_attn.k_norm

    def hook(module, args, output):  # [B, T, H, D]
        stored = probe.quantizer.decode(probe.quantizer.encode(output.flatten(0, 1), torch.float16))
        return stored.reshape(output.shape)

    with torch.no_grad():
        exact = model(ids, past_key_values=DynamicCache(config=model.config)).logits
        handle = norm.register_forward_hook(hook)
        assert found == pytest.approx(kl(exact, model(ids).logits), rel=1e-3)
        handle.remove()
