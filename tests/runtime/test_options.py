"""Layers that differ in outliers and scope, keys from values too: every path reads and writes them alike."""

import pytest
import torch

import kvcalib
from kvcalib.runtime.loader import prove
from kvcalib.stages import build
from kvcalib.stages.fit_nuq import Choices, Option
from tests.runtime.talk import Talk, attached
from tests.runtime.test_generate import MODES, check_same
from tests.tiny import make_run, tiny_llama, tokens

OPTIONS = {
    (0, "key"): Option(outliers=0.0, scope="token"),
    (0, "value"): Option(outliers=0.05, scope="head"),
    (1, "key"): Option(outliers=0.05, scope="token"),
    (1, "value"): Option(outliers=0.0, scope="token"),
    (2, "key"): Option(outliers=0.03, scope="token"),
    (2, "value"): Option(outliers=0.0, scope="head"),
}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A tiny model with the artifact of `OPTIONS` and widths of 2 to 4, and its rotations."""
    folder = tmp_path_factory.mktemp("mixed")
    model = tiny_llama(num_hidden_layers=3)
    run = make_run(folder / "run", model, outliers=0.03, choices=Choices(outliers=(0.0, 0.05)))
    widths = {name: torch.full((2, 16), 2 + i % 3, dtype=torch.uint8) for i, name in enumerate(OPTIONS)}
    build.run(run, folder / "artifact", widths=widths, options=OPTIONS)
    artifact = kvcalib.load(folder / "artifact")
    return model, artifact, prove(model, list(artifact.quantizers))


def test_the_artifact_is_of_these_options(mixed):
    counts = {("token", 0.0): 0, ("head", 0.0): 0, ("token", 0.03): 1, ("token", 0.05): 2, ("head", 0.05): 1}
    for (layer, role), option in OPTIONS.items():
        quantizer = mixed[1].quantizers[layer][role]
        assert quantizer.outliers == counts[option.scope, option.outliers]
        assert quantizer.scope == option.scope


@pytest.mark.parametrize("mode", ["greedy", "left-padded", "beam search", "chunked prefill", "turns of a batch"])
def test_generate_gives_the_tokens_of_the_simulation(mixed, mode):
    check_same(mixed, MODES[mode])


@pytest.mark.parametrize(("path", "settings"), [("native", {}), ("native", {"sinks": 2, "recent": 3}), ("triton", {})])
def test_paths_agree(mixed, path, settings, monkeypatch):
    """Prefill and two decode steps, one of two tokens."""
    if path == "triton":
        pytest.importorskip("triton")
    model = mixed[0]
    ids = tokens(1, 12)

    def logits(chosen):
        monkeypatch.setenv("KVCALIB_PATH", chosen)
        with attached(*mixed, **settings) as new_cache, torch.no_grad():
            cache = new_cache()
            steps = [model(part, past_key_values=cache).logits for part in (ids[:, :9], ids[:, 9:10], ids[:, 10:])]
            return torch.cat(steps, 1), cache.effective_bits()

    expected, bits = logits("torch")
    found, same = logits(path)
    plain = model(ids).logits
    assert same == bits
    assert (found - expected).std() < 0.02 * (expected - plain).std()


def test_a_cache_goes_on_after_it_was_saved(mixed, tmp_path):
    model = mixed[0]
    with attached(*mixed) as new_cache, torch.no_grad():
        cache = new_cache()
        model(tokens(2, 20), past_key_values=cache)
        cache.save(tmp_path / "cache.safetensors")
        again = kvcalib.load_cache(tmp_path / "cache.safetensors", model)
        step = Talk(model).prompt(2, 1)["input_ids"]
        assert torch.equal(model(step, past_key_values=cache).logits, model(step, past_key_values=again).logits)
