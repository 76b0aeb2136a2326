"""Exported files against their consumers: schemas as these document them, and their own code where it is installed."""

import contextlib
import json
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import DynamicCache, QuantizedCache

from kvcalib.artifact.exports import FILES, NAMES, TARGETS, Facts, LayerFacts
from kvcalib.artifact.exports.hf import TransformersCache, mean_width
from kvcalib.artifact.exports.modelopt import ModelOpt
from kvcalib.artifact.exports.sglang import SGLangScales
from kvcalib.artifact.exports.vllm import VLLMScales
from kvcalib.errors import FolderInUse, InputError
from kvcalib.model.identity import identify
from tests.tiny import tiny_llama, tokens

# NVIDIA/Model-Optimizer#2272: kv_cache_quantized_layers, schema version 1.
MODELOPT = {
    "type": "object",
    "required": ["producer", "quantization"],
    "properties": {
        "producer": {"type": "object", "required": ["name", "version"]},
        "quantization": {
            "type": "object",
            "additionalProperties": False,
            "required": ["quant_algo", "kv_cache_quant_algo", "kv_cache_quantized_layers", "kv_cache_schema_version"],
            "properties": {
                "quant_algo": {"const": "MIXED_PRECISION"},
                "quantized_layers": {"const": {}},
                "kv_cache_quant_algo": {"const": "MIXED_PRECISION"},
                "group_size": {"const": 16},
                "exclude_modules": {"type": "array", "items": {"type": "string"}},
                "kv_cache_schema_version": {"const": 1},
                "kv_cache_quantized_layers": {
                    "type": "object",
                    "minProperties": 1,
                    "patternProperties": {
                        r"^model\.layers\.\d+\.self_attn$": {
                            "type": "object",
                            "additionalProperties": False,
                            "required": ["quant_algo"],
                            "properties": {"quant_algo": {"enum": ["FP8", "NVFP4"]}},
                        }
                    },
                    "additionalProperties": False,
                },
            },
        },
    },
}
# SGLang 0.5.23, sglang/srt/model_loader/weight_utils.py, QuantParamSchema.
SGLANG = {
    "type": "object",
    "required": ["model_type", "kv_cache"],
    "properties": {
        "model_type": {"type": "string"},
        "kv_cache": {
            "type": "object",
            "required": ["dtype", "scaling_factor"],
            "properties": {
                "dtype": {"const": "float8_e4m3fn"},
                "scaling_factor": {
                    "type": "object",
                    "patternProperties": {
                        r"^\d+$": {
                            "type": "object",
                            "patternProperties": {r"^\d+$": {"type": "number", "exclusiveMinimum": 0}},
                            "additionalProperties": False,
                        }
                    },
                    "additionalProperties": False,
                },
            },
        },
    },
}


@pytest.fixture(scope="module")
def model():
    return tiny_llama(num_hidden_layers=4)


def facts(model, missing=(), **changed) -> Facts:
    """Four layers of two heads of 16; NVFP4, FP8, NVFP4, unquantized."""
    layers = [
        LayerFacts(
            index=i, kv_heads=2, head_dim=16, key_bits=3.0, value_bits=2.0, key_scale=0.1 + i, value_scale=0.2 + i,
            shared_scale=0.3 + i, format=("NVFP4", "FP8", "NVFP4", None)[i], losses={"FP8": 1e-5, "NVFP4": 1e-4},
        )
        for i in range(4) if i not in missing
    ]  # fmt: skip
    return Facts("here", "0.1.0", identify(model), [LayerFacts(**(vars(x) | changed)) for x in layers])


def body(export, found, name=None):
    return json.loads(export.files(found)[name or export.names[0]])


# All targets


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
def test_every_target(target, model, tmp_path):
    export = target()
    found = facts(model)
    assert export.files(found) == target().files(facts(model))
    assert set(export.files(found)) == set(target.names) <= FILES
    assert target.name in NAMES
    assert all(note.strip() for note in export.notes(found))
    paths = export.write(found, tmp_path / "out")
    assert [p.name for p in paths] == list(target.names)
    assert export.write(found, tmp_path / "out") == paths  # the same again is no conflict
    named = tmp_path / ("mine" + paths[0].suffix)
    assert export.write(found, named)[0] == named
    assert named.read_bytes() == paths[0].read_bytes()
    paths[0].write_bytes(b"{}")
    with pytest.raises(FolderInUse, match=r"other content.*--overwrite"):
        export.write(found, tmp_path / "out")
    assert paths[0].read_bytes() == b"{}"
    export.write(found, tmp_path / "out", overwrite=True)
    assert paths[0].read_bytes() == named.read_bytes()


def test_a_file_in_the_way(model, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(FolderInUse, match="is a file"):
        ModelOpt().write(facts(model), tmp_path / "out")


# ModelOpt


def test_modelopt(model):
    found = body(ModelOpt(), facts(model))
    jsonschema.validate(found, MODELOPT)
    assert found["quantization"]["kv_cache_quantized_layers"] == {
        "model.layers.0.self_attn": {"quant_algo": "NVFP4"},
        "model.layers.1.self_attn": {"quant_algo": "FP8"},
        "model.layers.2.self_attn": {"quant_algo": "NVFP4"},
    }
    assert any("unquantized: layers 3" in note for note in ModelOpt().notes(facts(model)))
    assert any("layers 0, 2" in note for note in ModelOpt().notes(facts(model, missing=(0, 2))))
    named = body(ModelOpt(module="language_model.layers.{}.attn"), facts(model))
    assert "language_model.layers.1.attn" in named["quantization"]["kv_cache_quantized_layers"]


@pytest.mark.parametrize("module", ["model.layers", "{}.{}", "{0}", "a.{}.{b}"])
def test_modules_without_one_place_are_refused(module, model):
    with pytest.raises(InputError, match="--module"):
        ModelOpt(module=module).files(facts(model))


def test_modelopt_with_nothing_quantized(model):
    with pytest.raises(InputError, match="every layer stays unquantized"):
        ModelOpt().files(facts(model, format=None))


def test_modelopts_own_converter_reads_it(model):
    converter = pytest.importorskip("modelopt.torch.export.convert_hf_config")
    converted = converter.convert_hf_quant_config_format(body(ModelOpt(), facts(model)))
    assert converted["quant_method"] == "modelopt"
    assert converted["quant_algo"] == "MIXED_PRECISION"
    assert converted["config_groups"] == {}


# vLLM


def test_vllm_scales(model, tmp_path):
    scales, config = VLLMScales().write(facts(model), tmp_path)
    found = load_file(scales)
    assert set(found) == {f"model.layers.{i}.self_attn.{x}_scale" for i in range(4) for x in "kv"}
    assert found["model.layers.2.self_attn.k_scale"].tolist() == pytest.approx([2.1])
    assert found["model.layers.2.self_attn.v_scale"].tolist() == pytest.approx([2.2])
    assert all(t.shape == (1,) and t.dtype == torch.float32 for t in found.values())
    with safe_open(scales, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    scheme = json.loads(config.read_bytes())["kv_cache_scheme"]
    assert scheme == {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    assert any("layer 1" in note for note in VLLMScales().notes(facts(model, missing=(1,))))


def test_the_pages_lines_put_scales_into_a_checkpoint(model, tmp_path):
    """The Python lines of docs/exports.md, run as they stand, on a checkpoint in several files."""
    page = (Path(__file__).parents[3] / "docs/exports.md").read_text()
    lines = next(part for part in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "kv_scales" in part)
    model.save_pretrained(tmp_path / "my-model", max_shard_size="100KB")
    VLLMScales().write(facts(model), tmp_path / "exports")
    subprocess.run([sys.executable, "-c", lines], cwd=tmp_path, check=True)
    index = json.loads((tmp_path / "my-model/model.safetensors.index.json").read_bytes())["weight_map"]
    mine = {name for name, file in index.items() if file == "kv_scales.safetensors"}
    assert mine == set(load_file(tmp_path / "my-model/kv_scales.safetensors"))
    assert len(index) == len(mine) + len(dict(model.state_dict()))
    assert len(set(index.values())) > 2
    config = json.loads((tmp_path / "my-model/config.json").read_bytes())
    assert config["quantization_config"]["kv_cache_scheme"]["num_bits"] == 8
    assert config["model_type"] == "llama"


def test_compressed_tensors_reads_the_config(model):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    found = body(VLLMScales(), facts(model), "quantization_config.json")
    config = quantization.QuantizationConfig.model_validate(found)
    assert (config.kv_cache_scheme.num_bits, config.kv_cache_scheme.type) == (8, "float")


def test_vllm_loads_scales(model, tmp_path):
    utils = pytest.importorskip("vllm.model_executor.model_loader.weight_utils")
    tensors = pytest.importorskip("vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors")
    scales, config = VLLMScales().write(facts(model), tmp_path)
    method = tensors.CompressedTensorsKVCacheMethod(
        tensors.CompressedTensorsConfig.from_config(json.loads(config.read_bytes()))
    )
    expected = {f"model.layers.{i}.self_attn.attn.{x}_scale": None for i in range(4) for x in "kv"}
    assert {utils.maybe_remap_kv_scale_name(name, expected) for name in load_file(scales)} == set(expected)
    layer = torch.nn.Module()
    layer.num_kv_heads, layer.kv_cache_dtype = 2, "fp8"
    method.create_weights(layer)
    for name in ("k", "v", "q", "prob"):
        layer.register_buffer(f"_{name}_scale", torch.tensor(1.0))
        layer.register_buffer(f"_{name}_scale_cpu", torch.tensor(1.0))
    for letter in "kv":
        parameter = getattr(layer, f"{letter}_scale")
        loader = getattr(parameter, "weight_loader", utils.default_weight_loader)
        loader(parameter, load_file(scales)[f"model.layers.3.self_attn.{letter}_scale"])
    method.process_weights_after_loading(layer)
    assert (layer._k_scale_float, layer._v_scale_float) == pytest.approx((3.1, 3.2))


# SGLang


def test_sglang_scales(model):
    found = body(SGLangScales(tp_size=2), facts(model, missing=(1,)))
    jsonschema.validate(found, SGLANG)
    assert found["model_type"] == "llama"
    ranks = found["kv_cache"]["scaling_factor"]
    assert list(ranks) == ["0", "1"]
    assert ranks["0"] == ranks["1"] == {"0": 0.3, "1": 1.0, "2": 2.3, "3": 3.3}
    assert any("layer 1" in note for note in SGLangScales().notes(facts(model, missing=(1,))))


def test_sglang_loads_scales(model, tmp_path):
    utils = pytest.importorskip("sglang.srt.model_loader.weight_utils")
    (path,) = SGLangScales(tp_size=2).write(facts(model), tmp_path)
    for rank in (0, 1):
        found = dict(utils.kv_cache_scales_loader(str(path), rank, 2, 4, "llama"))
        assert found == {i: 0.3 + i for i in range(4)}


# transformers


@pytest.mark.parametrize(
    ("key", "value", "backend", "nbits"),
    [(3, 2, "hqq", 3), (2, 2, "hqq", 2), (2.2, 2.2, "hqq", 2), (4, 7, "hqq", 4), (7, 8, "hqq", 8), (0, 0, "hqq", 2),
     (3, 3, "quanto", 4), (2.4, 2.4, "quanto", 2)],
)  # fmt: skip
def test_hf_takes_the_nearest_width(key, value, backend, nbits, model):
    found = facts(model, key_bits=key, value_bits=value)
    assert mean_width(found) == (key + value) / 2
    assert TransformersCache(backend).config(found)["nbits"] == nbits


def test_hf_refuses_what_transformers_would(model):
    with pytest.raises(InputError, match="--backend is 'fp8'"):
        TransformersCache("fp8").files(facts(model))
    with pytest.raises(InputError, match="sliding window"):
        TransformersCache().files(facts(model, sliding=8))
    with pytest.raises(InputError, match="head_dim is 20"):
        TransformersCache().files(facts(model, head_dim=20))


@pytest.mark.parametrize("backend", ["hqq", "quanto"])
def test_transformers_takes_the_arguments(backend, model):
    """Without the backend's package, too: then that is all that its own class has against them."""
    for width in (2, 3, 4, 8):
        config = TransformersCache(backend).config(facts(model, key_bits=width, value_bits=width))
        with contextlib.suppress(ImportError):  # any other error is about the arguments
            assert len(QuantizedCache(config=model.config, **config).layers) == 4


@pytest.mark.parametrize("width", [2, 3, 4, 8])
@pytest.mark.parametrize(("backend", "package"), [("hqq", "hqq"), ("quanto", "optimum.quanto")])
def test_transformers_generates_with_it(backend, package, width, model):
    pytest.importorskip(package)
    found = facts(model, key_bits=width, value_bits=width)
    config = body(TransformersCache(backend), found) | {"residual_length": 8}
    cache = QuantizedCache(config=model.config, **config)
    prompt = tokens(1, 23)
    settings = {"max_new_tokens": 12, "do_sample": False}
    told = model.generate(prompt, past_key_values=cache, **settings)
    by_name = model.generate(prompt, cache_implementation="quantized", cache_config=config, **settings)
    assert torch.equal(told, by_name)
    assert told.shape[1] > prompt.shape[1]
    exact = DynamicCache(config=model.config)
    model.generate(prompt, past_key_values=exact, **settings)
    layer, right = cache.layers[0], exact.layers[0].keys[:, :, :23]
    error = (layer._dequantize(layer._quantized_keys)[:, :, :23] - right).norm() / right.norm()
    low, high = {2: (0.2, 0.8), 3: (0.05, 0.4), 4: (0.03, 0.2), 8: (0.001, 0.02)}[config["nbits"]]
    assert low < error < high  # really quantized, and still the keys
