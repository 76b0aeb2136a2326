"""Loading a model: what is wrong with it is said in one line."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, GPT2Config, T5Config, ViTConfig

from kvcalib.demo import MODEL_DIR
from kvcalib.errors import InputError, UnsupportedModel
from kvcalib.model.loading import load_model, load_tokenizer, pick_device, resolve
from tests.tiny import tiny_llama, tokens


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "llama"
    tiny_llama().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "llama")


def change_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def refused(kind, name, message, load=load_model, **arguments):
    with pytest.raises(kind, match=message) as caught:
        load(str(name), **arguments)
    assert "\n" not in str(caught.value)
    assert str(name) in str(caught.value) or "--" in str(caught.value)


# What works


def test_loaded_model_is_the_saved_one(folder):
    model = load_model(str(folder))
    ids = tokens(1, 8)
    assert not model.training
    assert model.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(model(ids).logits, tiny_llama()(ids).logits)


def test_dtype_is_taken(folder):
    assert load_model(str(folder), dtype="bfloat16").dtype == torch.bfloat16
    assert load_model("builtin").dtype == torch.float32  # the checkpoint is bfloat16, which is slow on a CPU


def test_relative_folder(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert load_model("llama").config.hidden_size == 64
    assert load_model("./llama").config.hidden_size == 64


def test_resolve(folder):
    assert resolve("builtin") == str(MODEL_DIR)
    assert resolve(str(folder)) == str(folder)
    assert resolve("owner/name") == "owner/name"


def test_builtin_tokenizer():
    assert load_tokenizer("builtin")("a").input_ids[0] == 0


# What does not


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_missing_folder(tmp_path, load):
    refused(InputError, tmp_path / "none", "no such folder", load)


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_folder_without_config(tmp_path, load):
    refused(InputError, tmp_path, "no config.json", load)


def test_file_instead_of_a_folder(folder):
    refused(InputError, folder / "config.json", "no such folder")


@pytest.mark.parametrize("keep", [0, 5, 500, -500])
def test_truncated_weights(folder, keep):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    refused(InputError, folder, "cannot be loaded")


def test_missing_weights(folder):
    (folder / "model.safetensors").unlink()
    refused(InputError, folder, r"model\.safetensors")


def test_weights_that_lack_a_tensor(folder):
    """transformers would make it up at random, and the calibration would be of another model."""
    name = "model.layers.1.self_attn.k_proj.weight"
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused(InputError, folder, name)


def test_weights_of_other_shapes(folder):
    change_config(folder, intermediate_size=32)
    refused(InputError, folder, "mlp|shape|size|match")


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_config_that_is_no_json_object(folder, text):
    (folder / "config.json").write_text(text)
    refused(InputError, folder, "cannot be loaded")


def test_config_with_a_field_of_the_wrong_type(folder):
    change_config(folder, hidden_size="wide")
    refused(InputError, folder, "hidden_size")


def test_unknown_model_type(folder):
    change_config(folder, model_type="nosuch")
    refused(UnsupportedModel, folder, "nosuch")


@pytest.mark.parametrize(
    ("config", "message"), [(T5Config(d_model=32), "encoder-decoder"), (ViTConfig(hidden_size=32), "no causal LM")]
)
def test_model_that_is_no_causal_lm(tmp_path, config, message):
    config.save_pretrained(tmp_path)
    refused(UnsupportedModel, tmp_path, message)


@pytest.mark.parametrize("dtype", ["int8", "float64", "", "Float32"])
def test_bad_dtype(dtype):
    refused(InputError, "builtin", f"--dtype is '{dtype}', expected one of auto, float32", dtype=dtype)


@pytest.mark.parametrize("device", ["gpu", "", "cuda:x", "meta"])
def test_bad_device(device):
    refused(InputError, "builtin", f"--device is '{device}'", device=device)


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_missing_gpu(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(InputError, "builtin", "torch sees no GPU; use --device cpu", device=device)


def test_auto_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == torch.device("cuda")


@pytest.mark.parametrize(
    "files", [{}, {"tokenizer.json": "{"}, {"tokenizer.json": "{}"}, {"tokenizer.json": '{"model": 3}'}]
)
def test_no_usable_tokenizer(folder, files):
    for name, text in files.items():
        (folder / name).write_text(text)
    refused(InputError, folder, "no usable tokenizer", load_tokenizer)


# The Hub


def test_hub_model_that_cannot_be_reached(monkeypatch):
    def unreachable(*_, **__):
        raise OSError("We couldn't connect to the Hub\nCheck your connection")

    monkeypatch.setattr(AutoConfig, "from_pretrained", unreachable)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", unreachable)
    for load in (load_model, load_tokenizer):
        refused(InputError, "owner/name", "We couldn't connect to the Hub", load)


@pytest.mark.parametrize("name", ["owner/name", "no such name", "a/b/c", "-x"])
def test_hub_id_offline_or_impossible(name):
    refused(InputError, name, "cannot be loaded")
    refused(InputError, name, "no usable tokenizer", load_tokenizer)


def test_revision_is_passed_on(monkeypatch):
    seen = {}

    def remember(where, **arguments):
        seen.update(arguments, where=where)
        return GPT2Config()

    monkeypatch.setattr(AutoConfig, "from_pretrained", remember)
    with pytest.raises(InputError):
        load_model("owner/name", revision="abc")
    assert (seen["where"], seen["revision"], seen["trust_remote_code"]) == ("owner/name", "abc", False)
