"""Models whose weights are on disk or in host memory: what is read of them, and that they compute the same bits."""

import copy
import gc
import weakref

import accelerate
import pytest
import torch

from kvcalib.errors import InputError
from kvcalib.model.identity import UNKNOWN_WEIGHTS, hash_weights
from kvcalib.model.loading import compute_devices, execution_device, input_device, load_model
from kvcalib.model.offloaded import elements, is_offloaded, parameters, places
from tests.tiny import calibrate, lively, tiny_family, tiny_llama, tokens

DISK = {"": "disk"}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Tied weights in bfloat16, untied ones with biases, experts that are put together while loading."""
    folder = tmp_path_factory.mktemp("models")
    tiny_llama(tie_word_embeddings=True).to(torch.bfloat16).save_pretrained(folder / "tied")
    tiny_family("qwen2").save_pretrained(folder / "biased")
    tiny_family("mixtral").save_pretrained(folder / "experts")
    return folder


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("name", ["tied", "biased", "experts"])
def test_model_on_disk_is_the_one_in_memory(saved, name):
    inside, outside = load_model(str(saved / name)), load_model(str(saved / name), device_map=DISK)
    names = {each for each, _ in inside.named_parameters()}
    assert {p.device.type for p in outside.parameters()} == {"meta"}
    assert outside.dtype == inside.dtype == torch.float32
    assert places(outside) == {"disk": sum(4 * p.numel() for p in inside.parameters())}
    assert input_device(outside) == execution_device(outside) == CPU
    assert compute_devices(outside) == {CPU}
    # A module that has run is put away anew: nothing may depend on which objects its parameters are.
    for _ in range(2):
        assert {each for each, _ in parameters(outside)} == names
        for each in names:
            flat = inside.get_parameter(each).reshape(-1)
            assert torch.equal(elements(outside, each), flat)
            assert torch.equal(elements(outside, each, 7), flat[::7])
        assert hash_weights(outside) == hash_weights(inside)
        assert torch.equal(logits(outside, tokens(2, 9)), logits(inside, tokens(2, 9)))


def test_another_weight_on_disk_is_another_model(saved, tmp_path):
    changed = load_model(str(saved / "biased"))
    with torch.no_grad():
        changed.model.layers[3].self_attn.k_proj.bias[0] += 1
    changed.save_pretrained(tmp_path)
    assert hash_weights(load_model(str(tmp_path), device_map=DISK)) != hash_weights(load_model(str(saved / "biased")))


def test_weights_in_host_memory_are_read_too():
    """What a GPU has no room for; accelerate's own function stands in for the GPU."""
    model = tiny_llama()
    held = accelerate.cpu_offload(copy.deepcopy(model), execution_device=CPU)
    assert is_offloaded(held)
    assert hash_weights(held) == hash_weights(model)
    assert places(held) == {"cpu": sum(4 * p.numel() for p in model.parameters())}


def test_weights_that_are_nowhere():
    with torch.device("meta"):
        model = type(tiny_llama())(tiny_llama().config)
    assert hash_weights(model) == UNKNOWN_WEIGHTS
    with pytest.raises(LookupError, match=r"embed_tokens\.weight"):
        elements(model, "model.embed_tokens.weight")


def test_folder_for_what_cannot_stay_in_its_checkpoint(saved, tmp_path):
    """Experts are put together while loading, so they are written anew, and removed with the model."""
    spilled = tmp_path / "spilled" / "here"
    plain = load_model(str(saved / "biased"), device="map", max_memory="cpu=0", offload=spilled)
    assert list(spilled.iterdir()) == []
    experts = load_model(str(saved / "experts"), device="map", max_memory="cpu=0", offload=spilled)
    assert list(spilled.rglob("*experts*.safetensors"))
    del experts, plain
    gc.collect()
    assert list(spilled.iterdir()) == []


def test_folder_that_cannot_be_made(saved, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--offload is '.*file/in': no folder can be made there"):
        load_model(str(saved / "tied"), device="map", offload=tmp_path / "file" / "in")


def test_processes_of_a_machine_share_its_memory(saved, monkeypatch):
    size = sum(4 * p.numel() for p in load_model(str(saved / "biased")).parameters())
    whole = f"cpu={2 * size / 1000:.0f}KB"
    assert places(load_model(str(saved / "biased"), device="map", max_memory=whole)) == {"cpu": size}
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    found = places(load_model(str(saved / "biased"), device="map", max_memory=whole))
    assert found["disk"] + found.get("cpu", 0) == size
    assert found.get("cpu", 0) <= size / 2
    assert places(load_model(str(saved / "biased"), device="map", max_memory=whole, process=(0, 1))) == {"cpu": size}


# The calibration pass


@pytest.mark.parametrize("name", ["tied", "biased"])
def test_calibration_is_the_same_bit_by_bit(saved, name):
    inside, outside = load_model(str(saved / name)), load_model(str(saved / name), device_map=DISK)
    expected, found = calibrate(inside), calibrate(outside)
    assert found.info == expected.info
    assert (found.info.layers[0].key_bias_norm is None) == (name == "tied")
    assert found.tensors.keys() == expected.tensors.keys()
    assert [n for n, t in found.tensors.items() if not torch.equal(t, expected.tensors[n])] == []
    assert any(t.any() for n, t in found.tensors.items() if "fisher_sum" in n)
    assert all(p.requires_grad for p in outside.parameters())
    assert {p.device.type for p in outside.parameters()} == {"meta"}  # every weight was put away again


def test_pass_holds_the_weights_of_one_layer(tmp_path, monkeypatch):
    """Autograd would keep every weight until its turn comes in the backward pass."""
    lively(tiny_llama(num_hidden_layers=6)).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), device_map=DISK)
    loaded, most = [], []
    put = accelerate.hooks.set_module_tensor_to_device

    def counted(module, name, device, **more):
        put(module, name, device, **more)
        if str(device) != "meta":
            loaded.append(weakref.ref(module._parameters[name]))
            most.append(sum(ref() is not None for ref in loaded))

    monkeypatch.setattr(accelerate.hooks, "set_module_tensor_to_device", counted)
    calibrate(model)
    assert len(most) > 6 * 9 * 4
    assert max(most) <= 9 + 2  # a layer, and the matrix of the logits
