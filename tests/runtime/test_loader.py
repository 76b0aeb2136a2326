"""Artifacts of every kind of width, on families of every kind of attention."""

import pytest
import torch

import kvcalib
from kvcalib.runtime.layers import PackedLayer
from kvcalib.stages import build
from tests.model.test_families import logits
from tests.runtime.test_cache import Simulation, nll, padded, run
from tests.tiny import make_artifact, make_run, tiny_family, tiny_llama


def test_a_width_for_every_channel_from_file_to_logits(tmp_path):
    model = tiny_llama()
    generator = torch.Generator().manual_seed(0)
    widths = {(i, r): torch.randint(0, 9, (2, 16), generator=generator) for i in (0, 1) for r in ("key", "value")}
    manifest = build.run(make_run(tmp_path / "run", model), tmp_path / "artifact", widths=widths)
    artifact = kvcalib.load(tmp_path / "artifact")
    for (layer, role), expected in widths.items():
        quantizer = artifact.quantizers[layer][role]
        assert torch.equal(quantizer.layout.widths.long(), expected)
        spec = getattr(manifest.layers[layer], role)
        assert spec.mean_bits == pytest.approx(expected.float().mean().item())
        assert quantizer.layout.words == -(-int(expected.sum()) // 32) or quantizer.layout.segment == "head"
    ids, mask, positions = padded(3)
    rotations = kvcalib.runtime.loader.prove(model, [0, 1])
    with kvcalib.runtime.loader.Taps(model, Simulation(artifact), rotations), torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    kvcalib.attach(model, artifact)
    found = run(model, ids, mask, positions, [30, 1, 9], artifact.new_cache(model))
    kvcalib.detach(model)
    assert abs(nll(found, ids, mask) - nll(expected, ids, mask)) < 1e-4


FAMILIES = ["qwen2", "qwen3_moe", "phi", "glm", "smollm3", "gemma2", "gemma3_text", "gpt_oss", "cohere2", "olmo3"]


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_layers_beside_stock_ones_stay_near_the_model(tmp_path, family):
    """8 bits: soft caps, sink logits, NoPE and sliding layers all have to be right."""
    model = tiny_family(family)
    artifact = make_artifact(tmp_path, model, key_bits=8, value_bits=8, outliers=0.05)
    expected = logits(model, None)
    kvcalib.attach(model, artifact)
    cache = artifact.new_cache(model)
    found = logits(model, cache)
    out = model.generate(padded(2)[0], max_new_tokens=4, do_sample=False)
    kvcalib.detach(model)
    assert out.shape[1] <= 44
    packed = [isinstance(layer, PackedLayer) for layer in cache.layers]
    assert packed == [i in artifact.quantizers for i in range(len(packed))]
    assert any(packed)
    assert not torch.equal(found, expected), "nothing was quantized"
    probability = expected.softmax(-1)
    kld = (probability * (expected.log_softmax(-1) - found.log_softmax(-1))).sum(-1).mean()
    assert kld < 0.02
