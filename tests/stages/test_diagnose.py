"""Diagnosis of models with planted faults, against hooks and eager attention of the untouched model."""

import json
import shutil

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from kvcalib.demo import MODEL_DIR
from kvcalib.errors import InputError
from kvcalib.model.diagnosis import advice
from kvcalib.rundir import RunDir
from kvcalib.stages import diagnose
from tests.test_cli import ok, refused
from tests.tiny import SHAPE, lively, make_run, tiny_family, tiny_llama, tokens

VOCABULARY = 2048
LENGTH = diagnose.SEQ_LEN


def qwen(layers=4, faulty=2, times=60.0):
    """A Qwen2 whose one key bias is `times` the others'."""
    shape = SHAPE | {"vocab_size": VOCABULARY, "num_hidden_layers": layers}
    shape.pop("head_dim")
    model = lively(Qwen2ForCausalLM(Qwen2Config(**shape)))
    with torch.no_grad():
        model.model.layers[faulty].self_attn.k_proj.bias.mul_(times)
    return model


def with_sink():
    """A Llama whose first layer attends to token 1 alone, through a channel that RoPE hardly turns."""
    model = tiny_llama(vocab_size=VOCABULARY, attention_bias=True)
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        embeddings = model.model.embed_tokens.weight
        embeddings[:, 0] = 0
        embeddings[1] = 0
        embeddings[1, 0] = 1
        model.model.layers[0].input_layernorm.weight.fill_(1)
        for head in range(4):
            attention.q_proj.weight[16 * head + 7] = 0
            attention.q_proj.bias[16 * head + 7] = 20
        for head in range(2):
            attention.k_proj.weight[16 * head + 7, 0] = 2
    return model


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Sequences that begin with token 1, which comes nowhere else."""
    rows = torch.randint(3, VOCABULARY, (4, LENGTH), generator=torch.Generator().manual_seed(5))
    rows[:, 0] = 1
    path = tmp_path_factory.mktemp("text") / "ids.jsonl"
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows.tolist()))
    return path, rows


def saved(model, folder):
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL_DIR / name, folder)
    return str(folder)


def projected(model, ids, name):
    """What the projection `name` of every layer gives for `ids`, `[n, channels]`, by hooks on the untouched model."""
    seen = {}
    handles = [
        getattr(layer.self_attn, name).register_forward_hook(
            lambda m, a, out, i=i: seen.__setitem__(i, out.flatten(0, 1))
        )
        for i, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return [seen[i].double() for i in range(len(seen))]


def test_a_planted_key_bias_is_found(tmp_path, data):
    model, (path, rows) = qwen(), data
    found = diagnose.of_model(model, saved(model, tmp_path), str(path))
    for layer, keys in zip(found, projected(model, rows, "k_proj"), strict=True):
        expected = keys.mean(0).abs() / keys.std(0, correction=0)
        assert layer.offsets.flatten().tolist() == pytest.approx(expected.tolist(), rel=1e-3)
        bias = model.model.layers[layer.index].self_attn.k_proj.bias
        assert layer.key_bias == pytest.approx(bias.norm().item())
    assert [layer.offset_share > 0.5 for layer in found] == [False, False, True, False]
    says = advice(found)
    assert says[0].startswith("layer 2: key bias")
    assert "times the median" in says[0]
    assert sum(line.startswith("layer") and "key bias" in line for line in says) == 1
    assert not any("key bias" in line for line in advice(diagnose.of_model(qwen(times=1.0), str(tmp_path), str(path))))


def test_a_planted_sink_is_found(tmp_path, data):
    model, (path, rows) = with_sink(), data
    found = diagnose.of_model(model, saved(model, tmp_path), str(path))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(input_ids=rows, output_attentions=True).attentions
    for layer, attention in zip(found, weights, strict=True):
        late = attention[:, :, LENGTH // 2 :, 0].double()
        assert layer.sink == pytest.approx(late.mean().item(), rel=1e-4)
        assert layer.sink_by_head == pytest.approx(late.unflatten(1, (2, 2)).mean((0, 2, 3)).tolist(), rel=1e-4)
    assert found[0].sink > 0.9 > 0.3 > found[1].sink
    assert any(line.startswith("layer 0: the first token draws") for line in advice(found))


def test_the_model_is_as_it_was(tmp_path):
    model = tiny_llama(vocab_size=VOCABULARY)
    with torch.no_grad():
        before = model(input_ids=tokens(1, 20)).logits
        diagnose.of_model(model, saved(model, tmp_path))
        assert torch.equal(model(input_ids=tokens(1, 20)).logits, before)


def test_a_run_tells_the_same_from_its_calibration(tmp_path):
    model = qwen()
    run = make_run(tmp_path / "run", model)
    found = diagnose.of_run(run)
    rows = tokens(4, 48, 1)  # what make_run calibrates on
    for layer, keys in zip(found, projected(model, rows, "k_proj"), strict=True):
        expected = keys.mean(0).abs() / keys.std(0, correction=0)
        assert layer.offsets.flatten().tolist() == pytest.approx(expected.tolist(), rel=1e-3)
        assert layer.key_bias == pytest.approx(model.model.layers[layer.index].self_attn.k_proj.bias.norm().item())
    assert advice(found)[0].startswith("layer 2: key bias")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(input_ids=rows, output_attentions=True).attentions
    # The sample keeps some of the sequences' first tokens: the mean over those is within the range over all.
    for layer, attention in zip(found, weights, strict=True):
        by_sequence = attention[:, :, 24:, 0].double().mean((1, 2))
        assert by_sequence.min() - 1e-6 <= layer.sink <= by_sequence.max() + 1e-6


def test_layers_behind_a_window_have_no_sink_to_show(tmp_path):
    found = diagnose.of_model(tiny_family("gemma3_text", vocab_size=VOCABULARY), str(MODEL_DIR))
    assert [layer.sink is None for layer in found] == [True, True, True, False]


def test_a_model_without_a_tokenizer_is_shown_random_tokens(tmp_path, capsys):
    tiny_llama().save_pretrained(tmp_path)
    found = diagnose.of_model(tiny_llama(), str(tmp_path))
    assert len(found) == 2
    assert "drawn at random" in capsys.readouterr().err
    with pytest.raises(InputError, match="tokenizer"):
        diagnose.of_model(tiny_llama(), str(tmp_path), "text.txt")


def test_the_command(tmp_path):
    faulty = saved(qwen(), tmp_path / "qwen")
    shown = ok("inspect", faulty).stdout
    assert "- layer 2: key bias" in shown
    assert "will collapse here" in shown
    shown = ok("inspect", saved(tiny_llama(vocab_size=VOCABULARY), tmp_path / "llama")).stdout
    assert "No key projection (k_proj) has a bias" in shown
    make_run(tmp_path / "run", qwen())
    shown = ok("inspect", tmp_path / "run").stdout
    assert "- layer 2: key bias" in shown
    (tmp_path / "empty").mkdir()
    refused(2, "no artifact, run or model there", "inspect", tmp_path / "empty")
    refused(2, "no such folder", "inspect", tmp_path / "none")
    RunDir(tmp_path / "bare", create=True)
    assert "has not run" in ok("inspect", tmp_path / "bare").stdout
    with pytest.raises(InputError, match="no calibration"):
        diagnose.of_run(RunDir(tmp_path / "bare"))
