"""`generate()` on the fused kernels: the same tokens as on plain tensor operations, and the kernels really ran."""

import pytest
import torch

import kvcalib
from kvcalib.runtime import paths
from kvcalib.runtime.kernels import attention, encode
from tests.runtime.talk import with_values
from tests.tiny import make_artifact, tiny_family, tiny_llama, tokens


@pytest.fixture
def counted(monkeypatch):
    """How often each entry point of the kernels was called."""
    calls = {"read": 0, "write": 0}

    def count(module, name, what):
        function = getattr(module, name)

        def counting(*args, **kwargs):
            calls[what] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, counting)

    count(attention, "packed_attention", "read")
    count(encode, "packed_encode", "write")
    return calls


def generate(model, artifact, device, **settings):
    ids = tokens(2, 21, seed=4).to(device)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    kvcalib.attach(model, artifact, **settings)
    try:
        return model.generate(ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    finally:
        kvcalib.detach(model)


@pytest.mark.parametrize(("family", "relative"), [("llama", False), ("cohere2", True), ("gemma3_text", False)])
def test_generate_runs_on_the_kernels(tmp_path, monkeypatch, counted, device, family, relative):
    model = tiny_llama() if family == "llama" else tiny_family(family)
    artifact = with_values(make_artifact(tmp_path, model, key_bits=3, value_bits=3, sinks=1), relative)
    model = model.to(device)
    monkeypatch.setenv("KVCALIB_PATH", "torch")
    expected = generate(model, artifact, device, recent=3)
    assert counted == {"read": 0, "write": 0}
    monkeypatch.setenv("KVCALIB_PATH", "triton")
    found = generate(model, artifact, device, recent=3)
    layers = len(artifact.quantizers)
    assert counted["read"] >= 4 * layers
    assert counted["write"] >= 4 * layers
    assert torch.equal(found, expected)


def test_an_unknown_path_is_named(monkeypatch):
    monkeypatch.setenv("KVCALIB_PATH", "cuda")
    with pytest.raises(ValueError, match=r"KVCALIB_PATH is 'cuda', expected one of .*'triton'"):
        paths.forced()
