"""The size of a model from its config, against the model itself."""

import pytest

from kvcalib.errors import InputError
from kvcalib.model.footprint import footprint
from kvcalib.model.loading import load_model
from tests.tiny import tiny_family, tiny_llama


def test_builtin_counts_what_the_model_has():
    model, found = load_model("builtin"), footprint("builtin")
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.context == model.config.max_position_embeddings
    assert found.layers == dict.fromkeys(range(4), (2, 64, None))


def test_sliding_layers_have_their_window(tmp_path):
    model = tiny_family("gemma3_text")
    model.config.save_pretrained(tmp_path)
    windows = [window for _, _, window in footprint(str(tmp_path)).layers.values()]
    assert windows == [32, 32, 32, None]


def test_heads_without_grouping(tmp_path):
    tiny_llama(num_key_value_heads=4).config.save_pretrained(tmp_path)
    assert footprint(str(tmp_path)).layers[0] == (4, 16, None)


def test_the_hub_is_asked_only_where_it_may_be(monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.getaddrinfo", lambda host, *rest, **more: asked.append(host) or [])
    with pytest.raises(InputError, match="not on this machine"):
        footprint("nobody/has-this-model", network=False)
    assert asked == []


def test_what_is_no_model_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for name in (str(tmp_path), str(tmp_path / "none")):
        with pytest.raises(InputError, match="model"):
            footprint(name)
