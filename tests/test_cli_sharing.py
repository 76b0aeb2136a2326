"""`export`, `card`, `push` and `pull` as a user meets them."""

import json

import pytest
import yaml

from kvcalib.stages import build
from tests.stages.test_sharing import comparison
from tests.test_cli import ok, refused, snapshot
from tests.tiny import make_run, tiny_llama


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharing")
    build.run(make_run(folder / "run", tiny_llama()), folder / "artifact")
    return folder


def test_export(home, tmp_path):
    shown = ok("export", home / "run", "--to", "vllm-scales", "--out", tmp_path / "v").stdout
    assert "key scale" in shown
    assert "predicted losses: nats per token" in shown
    assert f"export: {tmp_path / 'v/kv_scales.safetensors'}" in shown
    shown = ok("export", home / "run", "--to", "modelopt", "--effective-bits", 8, "--out", tmp_path / "m.json").stdout
    assert "8.000 effective bits" in shown
    layers = json.loads((tmp_path / "m.json").read_bytes())["quantization"]["kv_cache_quantized_layers"]
    assert {x["quant_algo"] for x in layers.values()} == {"FP8"}
    shown = ok("export", home / "artifact", "--to", "modelopt", "--out", tmp_path / "e").stdout
    assert "estimated" in shown
    shown = ok("export", home / "artifact", "--to", "hf", "--backend", "quanto", "--out", tmp_path / "h").stdout
    assert "optimum-quanto" in shown
    assert json.loads((tmp_path / "h/cache_config.json").read_bytes())["nbits"] in (2, 4)


def test_export_refuses(home, tmp_path):
    out = ("--out", tmp_path / "out")
    refused(2, "--to is 'gguf', expected one of modelopt", "export", home / "run", "--to", "gguf", *out)
    refused(2, "holds no sample.*kvcalib fisher --run", "export", home / "artifact", "--to", "sglang-scales", *out)
    refused(2, "--effective-bits is 3", "export", home / "run", "--to", "modelopt", "--effective-bits", 3, *out)
    refused(2, "--tp-size is 0", "export", home / "run", "--to", "sglang-scales", "--tp-size", 0, *out)
    refused(2, "--module is", "export", home / "run", "--to", "vllm-scales", "--module", "x", *out)
    refused(2, "--backend is 'awq'", "export", home / "artifact", "--to", "hf", "--backend", "awq", *out)
    refused(2, "no such folder", "export", tmp_path / "none", "--to", "hf", *out)
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine.json").write_text("{}")
    refused(4, "--overwrite", "export", home / "artifact", "--to", "hf", "--out", tmp_path / "mine.json")
    assert (tmp_path / "mine.json").read_text() == "{}"


def test_card(tmp_path):
    build.run(make_run(tmp_path / "run", tiny_llama()), tmp_path / "a")
    name = json.loads((tmp_path / "a/manifest.json").read_bytes())["model"]["name"]
    (tmp_path / "c.json").write_text(comparison(name).model_dump_json())
    ok("card", tmp_path / "a", "--comparison", tmp_path / "c.json", "--license", "mit")
    text = (tmp_path / "a/README.md").read_text()
    assert yaml.safe_load(text.split("---")[1])["license"] == "mit"
    assert "| fp16 | 2.51 |" in text
    assert "intact" in ok("verify", tmp_path / "a").stdout
    before = snapshot(tmp_path / "a")
    refused(2, "no such file", "card", tmp_path / "a", "--comparison", tmp_path / "none")
    refused(2, "--license", "card", tmp_path / "a", "--license", "My License")
    refused(2, "no such folder", "card", tmp_path / "none")
    assert snapshot(tmp_path / "a") == before


def test_push_and_pull_refuse(home, tmp_path):
    refused(2, "is no Hub id", "push", home / "artifact", "name")
    refused(2, "no such folder", "push", tmp_path / "none", "a/b")
    refused(2, "no artifact there", "push", tmp_path, "a/b")
    refused(2, "HF_HUB_OFFLINE", "push", home / "artifact", "a/b")
    refused(2, "is no Hub id", "pull", "name", "--out", tmp_path / "out")
    refused(2, "HF_HUB_OFFLINE", "pull", "a/b", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
