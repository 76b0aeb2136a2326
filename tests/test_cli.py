"""The commands as a user meets them: the whole road, and every bad input with its exit code and one message."""

import errno
import json
import math
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from kvcalib import __version__
from kvcalib.artifact import store
from kvcalib.cli import app
from kvcalib.demo import MODEL_DIR
from kvcalib.files import hash_file
from tests.tiny import tiny_family, tiny_llama

ROOT = Path(__file__).parents[1]
VOCABULARY = 2048  # of the demo model's tokenizer
COMMANDS = (
    "demo",
    "run",
    "fisher",
    "merge",
    "fit-nuq",
    "friendliness",
    "allocate",
    "report",
    "tiers",
    "build",
    "refine",
    "eval",
    "sweep",
    "inspect",
    "verify",
    "validate",
    "export",
    "card",
    "push",
    "pull",
)
# As issue 2 lists them.
KEYS = {
    "nll", "ppl", "fp16_nll", "delta_nll", "kld", "top1_agreement", "effective_bits", "cache_bytes",
    "fp16_cache_bytes", "seq_len", "tokens", "sinks", "recent",
}  # fmt: skip
FISHER = ("--samples", 4, "--seq-len", 32, "--batch-size", 2, "--keep-tokens", 100)
EVAL = ("--samples", 2, "--seq-len", 32)
THREE = ("--key-bits", 3, "--value-bits", 3)


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def ok(*arguments):
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result


def refused(code, pattern, *arguments):
    """The command ends with `code` and one message that fits `pattern`."""
    result = invoke(*arguments)
    assert result.exit_code == code, f"exit code {result.exit_code}: {result.output}\n{result.exception!r}"
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    messages = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(messages) == 1, result.output
    assert re.search(pattern, messages[0]), messages[0]
    assert "Traceback" not in result.output
    return messages[0]


def snapshot(folder):
    """Every file below `folder` with its hash; empty folders do not count."""
    return {str(p.relative_to(folder)): hash_file(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def save(model, folder):
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL_DIR / name, folder)
    return folder


def llama(folder, seed=0, **overrides):
    return save(tiny_llama(seed, vocab_size=VOCABULARY, **overrides), folder)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def model(home):
    return llama(home / "model")


@pytest.fixture(scope="module")
def data(home):
    path = home / "data.jsonl"
    rows = np.random.default_rng(0).integers(3, VOCABULARY, (6, 32)).tolist()
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def road(home, model, data):
    """A run whose stages are done, and its artifact; tests that write work on copies."""
    ok("fisher", model, "--run", home / "run", "--data", data, *FISHER)
    ok("fit-nuq", home / "run", *THREE)
    ok("friendliness", home / "run")
    ok("build", home / "run", "--out", home / "nuq3")
    return home


@pytest.fixture
def run(road, tmp_path):
    return shutil.copytree(road / "run", tmp_path / "run")


@pytest.fixture
def artifact(road, tmp_path):
    return shutil.copytree(road / "nuq3", tmp_path / "nuq3")


# The road


def test_version():
    assert ok("--version").stdout == f"kvcalib {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command):
    assert "Usage:" in ok(command, "--help").stdout
    assert command in ok("--help").stdout


def test_every_command_is_listed_here():
    names = {c.name or c.callback.__name__ for c in app.registered_commands}
    assert names == set(COMMANDS)


def test_allocated_widths_are_built(run, tmp_path):
    shown = ok("allocate", run, "--budget", 5, "--group", 0).stdout
    assert "mean code width" in shown
    assert "effective bits" in shown
    ok("build", run, "--out", tmp_path / "mixed")
    mean = store.read_manifest(tmp_path / "mixed").mean_bits
    ok("build", run, "--out", tmp_path / "plain", "--key-bits", 4, "--value-bits", 4)
    assert store.read_manifest(tmp_path / "plain").mean_bits == (4, 4)
    assert mean != (4, 4)
    widths = [t.flatten() for name, t in store.read(tmp_path / "mixed")[1].items() if name.endswith("widths")]
    assert len(torch.cat(widths).unique()) > 1


def test_outliers_are_chosen_with_the_widths(run, tmp_path):
    ok("fit-nuq", run, "--choices", "--outliers", 0.05)
    shown = ok("allocate", run, "--budget", 5).stdout
    assert "0 %" in shown
    ok("build", run, "--out", tmp_path / "a")
    specs = [spec for layer in store.read_manifest(tmp_path / "a").layers for spec in (layer.key, layer.value)]
    assert min(spec.outliers for spec in specs) == 0
    most = max(100 * spec.outliers / (spec.kv_heads * spec.head_dim) for spec in specs if spec.scope == "token")
    assert f"{most:.3g} % outliers" in ok("inspect", tmp_path / "a").stdout


def test_a_budget_that_cannot_be_met_is_refused(run):
    refused(2, r"budget is 0\.2 effective bits.*smallest plan has", "allocate", run, "--budget", 0.2)
    refused(2, r"one of --budget", "allocate", run)
    refused(2, r"group", "allocate", run, "--budget", 4, "--group", 7)


def test_stages_leave_their_files_and_nothing_else(road):
    assert {name for name in snapshot(road / "run") if "/" not in name} == {
        "run.json", "calibration.safetensors", "codebooks.safetensors", "friendliness.json",
        "friendliness.svg",
    }  # fmt: skip
    assert set(snapshot(road / "nuq3")) == {"manifest.json", "tensors.safetensors", "README.md"}


def test_inspect_and_verify(road):
    shown = ok("inspect", road / "nuq3").stdout
    assert "llama" in shown
    assert "keys 3.00 bit, values 3.00 bit" in shown
    assert "2 of 2 quantized" in shown
    assert "seq_len = 32" in ok("inspect", road / "run").stdout
    assert "intact" in ok("verify", road / "nuq3").stdout


def test_eval_writes_the_measures(road, model, data, tmp_path):
    ok("build", road / "run", "--out", tmp_path / "nuq8", "--key-bits", 8, "--value-bits", 8)
    measure = ("--model", model, "--data", data, *EVAL, "--sinks", 1, "--json")
    shown = ok("eval", road / "nuq3", tmp_path / "nuq8", *measure, tmp_path / "both.json").stdout
    assert "nuq3" in shown
    assert "protocol: " in shown
    narrow, wide = json.loads((tmp_path / "both.json").read_text())
    for row in (narrow, wide):
        assert set(row) == KEYS | {
            "artifact", "dtype", "prefill", "protocol", "budget", "long_cache_bits", "step", "adaptive", "host_bytes",
            "prompt", "policy", "eviction", "kept", "kept_of_prompt", "overlap", "captured", "seconds_per_token",
            "fp16_seconds_per_token", "delta_nll_error", "sequence_nll",
        }  # fmt: skip
        assert row["policy"] is row["prompt"] is None
        assert row["budget"] is None
        assert row["ppl"] == pytest.approx(math.exp(row["nll"]))
        assert row["delta_nll"] == pytest.approx(row["nll"] - row["fp16_nll"])
        assert (row["seq_len"], row["tokens"], row["sinks"], row["recent"]) == (32, 64, 1, 0)
        assert row["fp16_cache_bytes"] == 2 * 2 * 2 * 16 * 32 * 2  # layers, K and V, heads, head_dim, tokens, bytes
    assert 0 < wide["kld"] < narrow["kld"] / 20
    assert narrow["effective_bits"] < wide["effective_bits"]
    ok("eval", road / "nuq3", *measure, tmp_path / "one.json")
    one = json.loads((tmp_path / "one.json").read_text())
    assert one == pytest.approx(narrow)


def test_adaptive_widths_are_measured_beside_their_artifacts(road, model, data, tmp_path):
    paths = [tmp_path / f"nuq{b}" for b in (1, 4)]
    for bits, path in zip((1, 4), paths, strict=True):
        ok("build", road / "run", "--out", path, "--key-bits", bits, "--value-bits", bits)
    shown = ok("tiers", road / "run", *paths, "--budget", 4, "--out", tmp_path / "two").stdout
    assert "2 tiers, chosen from the first 5 queries" in shown
    measure = ("--model", model, "--data", data, *EVAL, "--adaptive", tmp_path / "two", "--step", 3)
    shown = ok("eval", *paths, *measure, "--keep-exact", "cpu", "--every", 6, "--json", tmp_path / "three.json").stdout
    assert "bytes per token in host memory" in shown
    low, high, two = json.loads((tmp_path / "three.json").read_text())
    assert (two["adaptive"], two["step"], two["recent"]) == (str(tmp_path / "two"), 3, 7)
    assert low["kld"] > two["kld"] > high["kld"]
    # Both roles, 2 heads of 16 channels in float32 and two float32 beside, 2 layers, 32 tokens and room for 64 more.
    assert two["host_bytes"] <= 2 * 96 * (2 * 2 * 16 * 4 + 2 * 4)
    assert (low["host_bytes"], low["adaptive"]) == (0, None)
    copied = shutil.copytree(road / "run", tmp_path / "copied")
    ok("build", copied, "--out", tmp_path / "three", "--bits", 3)
    shown = ok("eval", tmp_path / "three", *measure, "--json", tmp_path / "e.json").stdout
    plain, two = json.loads((tmp_path / "e.json").read_text())
    assert (plain["budget"], two["budget"], two["long_cache_bits"]) == (3, None, None)
    assert shown.count("add to the budget") <= 1
    refused(2, "no adaptive widths there", "eval", paths[0], "--model", model, "--adaptive", tmp_path)
    refused(2, "--keep-exact is 'cpu' without --adaptive", "eval", paths[0], "--model", model, "--keep-exact", "cpu")
    refused(2, "budget is 1 effective bits, these artifacts take", "tiers", road / "run", *paths, "--budget", 1,
            "--out", tmp_path / "x")  # fmt: skip


def test_stages_are_up_to_date_the_second_time(run, model, data):
    before = snapshot(run)
    assert "up to date" in ok("fisher", model, "--run", run, "--data", data, *FISHER).stderr
    assert "up to date" in ok("fit-nuq", run, *THREE).stderr
    assert "up to date" in ok("friendliness", run).stderr
    assert snapshot(run) == before


def test_build_again_changes_nothing(road, artifact):
    before = snapshot(artifact)
    ok("build", road / "run", "--out", artifact)
    assert snapshot(artifact) == before


def recipe(folder, model, data, **fit):
    path = folder / "recipe.yaml"
    fisher = {"data": str(data), "samples": 4, "seq_len": 32}
    body = {"model": str(model), "out": str(folder / "out"), "fisher": fisher, "fit": fit, "evaluate": None}
    path.write_text(json.dumps(body))  # JSON is YAML
    return path


def test_same_bytes_in_two_processes(model, data, tmp_path):
    path = recipe(tmp_path, model, data)
    env = os.environ | {"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"}
    other = subprocess.Popen(
        [sys.executable, "-m", "kvcalib", "run", path, "--out", tmp_path / "other"],
        cwd=ROOT,
        env=env,
        stdout=subprocess.DEVNULL,
    )
    ok("run", path)
    assert other.wait(120) == 0
    assert snapshot(tmp_path / "other") == snapshot(tmp_path / "out")
    assert snapshot(tmp_path / "other.run") == snapshot(tmp_path / "out.run")


def test_validate(model, data, tmp_path):
    assert "valid" in ok("validate", recipe(tmp_path, model, data)).stdout
    assert "2.5 effective bits" in ok("validate", recipe(tmp_path, model, data)).stdout
    assert "keys 4 bit, values 3 bit" in ok("validate", recipe(tmp_path, model, data, key_bits=4)).stdout
    refused(2, "fit.key_bits is 9: .*less than or equal to 8", "validate", recipe(tmp_path, model, data, key_bits=9))
    refused(2, "colour is 1", "validate", recipe(tmp_path, model, data, colour=1))
    refused(2, "no such file", "validate", recipe(tmp_path, model, tmp_path / "none.txt"))
    refused(2, "no such folder", "validate", recipe(tmp_path, tmp_path / "none", data))
    refused(2, "cannot be read", "validate", tmp_path / "none.yaml")
    assert snapshot(tmp_path).keys() == {"recipe.yaml"}


# Models that cannot be used


def test_missing_model(tmp_path, data):
    refused(2, "no such folder", "fisher", tmp_path / "none", "--run", tmp_path / "run", "--data", data)
    refused(2, "cannot be loaded|no usable tokenizer", "fisher", "owner/none", "--run", tmp_path / "run")
    assert snapshot(tmp_path) == {}
    refused(2, "no such folder", "run", tmp_path / "none", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "reason"), [("gpt2", "rotary|position_embeddings"), ("deepseek_v3", "multi-head latent attention")]
)
def test_unsupported_family(tmp_path, data, family, reason):
    if family == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=64))
    else:
        model = tiny_family(family, vocab_size=VOCABULARY)
    save(model, tmp_path / "model")
    message = refused(3, reason, "fisher", tmp_path / "model", "--run", tmp_path / "run", "--data", data, *FISHER)
    assert family in message


@pytest.mark.parametrize("parameter", ["self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj"])
def test_nan_in_activations(tmp_path, data, parameter):
    """A NaN in the MLP of layer 0 shows first in layer 1's keys."""
    model = tiny_llama(vocab_size=VOCABULARY)
    layer = 0 if "mlp" in parameter else 1
    with torch.no_grad():
        model.get_parameter(f"model.layers.{layer}.{parameter}.weight")[0, 0] = torch.nan
    save(model, tmp_path / "model")
    arguments = ("fisher", tmp_path / "model", "--run", tmp_path / "run", "--data", data, *FISHER)
    message = refused(2, r"layer 1\b.*NaN", *arguments)
    assert re.search("fisher|forward|backward", message)
    assert "calibration.safetensors" not in snapshot(tmp_path / "run")


def test_nan_in_the_evaluated_model(road, tmp_path, data):
    model = tiny_llama(vocab_size=VOCABULARY)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    save(model, tmp_path / "model")
    refused(2, "NaN|not finite", "eval", road / "nuq3", "--model", tmp_path / "model", "--data", data, *EVAL)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 1), ("num_hidden_layers", 3), ("hidden_size", 32), ("num_attention_heads", 8),
        ("vocab_size", VOCABULARY + 1), ("num_key_value_heads", 1), ("head_dim", 32),
    ],
)  # fmt: skip
def test_artifact_of_another_model(road, tmp_path, data, field, value):
    other = save(tiny_llama(**({"vocab_size": VOCABULARY} | {field: value})), tmp_path / "other")
    name = field.replace("num_key_value", "kv")
    message = refused(
        3,
        rf"{name} is ({value}\b|\d+, this model has {value}\b)",
        "eval",
        road / "nuq3",
        "--model",
        other,
        "--data",
        data,
        *EVAL,
        "--json",
        tmp_path / "j",
    )
    assert "nuq3" in message
    assert not (tmp_path / "j").exists()


def test_artifact_of_another_family(road, tmp_path, data):
    other = save(tiny_family("qwen2", vocab_size=VOCABULARY), tmp_path / "other")
    wrong = "model_type is 'qwen2', expected 'llama'"
    refused(3, wrong, "eval", road / "nuq3", "--model", other, "--data", data, *EVAL)


def test_artifact_of_other_weights_is_a_warning(road, tmp_path, data):
    other = llama(tmp_path / "other", seed=1)
    assert "weights_sha256" in ok("eval", road / "nuq3", "--model", other, "--data", data, *EVAL).stderr


# Texts that cannot be used


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("short.txt", "a few words", r"\d+ tokens, shorter than one sequence of 32"),
        ("empty.txt", "", "no text"),
        ("blank.txt", " \n\n", "no text"),
        ("alien.jsonl", '{"input_ids": [' + "5000," * 200 + "5000]}", "token id 5000 found, the model has 2048"),
        ("bad.jsonl", "{", r"bad\.jsonl:1: not valid JSON"),
        ("data.csv", "a,b", r"suffix is '\.csv'"),
    ],
)
def test_bad_text(road, model, tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    refused(2, message, "fisher", model, "--run", tmp_path / "run", "--data", tmp_path / name, *FISHER)
    refused(2, message, "eval", road / "nuq3", "--model", model, "--data", tmp_path / name, *EVAL)
    assert not (tmp_path / "run" / "calibration.safetensors").exists()


# Options


@pytest.mark.parametrize("bits", [-1, 0, 9])
def test_code_widths_out_of_range(run, model, tmp_path, bits):
    before = snapshot(run)
    for option in ("--key-bits", "--value-bits"):
        wrong = f"{option}.*{bits}.*1<=x<=8|{option} is {bits}"
        refused(2, wrong, "fit-nuq", run, option, bits)
        refused(2, wrong, "build", run, "--out", tmp_path / "a", option, bits)
        refused(2, wrong, "run", model, "--out", tmp_path / "a", option, bits)
    assert snapshot(run) == before
    assert snapshot(tmp_path).keys() == {f"run/{name}" for name in before}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--granularity", "row"), "--granularity is 'row'.*'layer', 'head' or 'channel'"),
        (("--format", "fp4"), "--format is 'fp4'"),
        (("--outliers", "0.2"), "--outliers.*0.2"),
        (("--solver", "lloyd", "--format", "int"), "--solver lloyd"),
        (("--sinks", "32"), "--sinks 32"),
        (("--nonsense",), "--nonsense"),
        (("--bits", "three"), "--bits.*three"),
    ],
)
def test_bad_option_of_fit_nuq(run, arguments, message):
    before = snapshot(run)
    refused(2, message, "fit-nuq", run, *arguments)
    assert snapshot(run) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dtype", "int8"), "--dtype is 'int8'"),
        (("--device", "gpu"), "--device is 'gpu'"),
        (("--samples", "0"), "--samples.*0"),
        (("--seq-len", "1"), "--seq-len.*1"),
        (("--seed", "99999999999999999999"), "seed"),
    ],
)
def test_bad_option_of_fisher(model, data, tmp_path, arguments, message):
    refused(2, message, "fisher", model, "--run", tmp_path / "run", "--data", data, *FISHER, *arguments)
    assert "calibration.safetensors" not in snapshot(tmp_path)


def test_missing_argument():
    refused(2, "MODEL", "fisher")


# Files that are damaged or of another time


@pytest.mark.parametrize("keep", [0, 100, -1])
def test_truncated_safetensors(artifact, model, data, keep):
    path = artifact / "tensors.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    before = snapshot(artifact)
    refused(2, r"tensors\.safetensors.*truncated", "verify", artifact)
    refused(2, r"tensors\.safetensors.*truncated", "eval", artifact, "--model", model, "--data", data, *EVAL)
    assert snapshot(artifact) == before


def test_truncated_files_of_a_run(run, tmp_path):
    for name, command in (
        ("codebooks", ("build", run, "--out", tmp_path / "a")),
        ("calibration", ("fit-nuq", run, "--sinks", 1)),
    ):
        path = run / f"{name}.safetensors"
        path.write_bytes(path.read_bytes()[:1000])
        refused(2, rf"{name}\.safetensors.*truncated", *command)
    assert not (tmp_path / "a").exists()


def test_manifest_of_an_unknown_version(artifact, model, data):
    path = artifact / "manifest.json"
    path.write_text(path.read_text().replace('"format_version": 4', '"format_version": 5'))
    for command in (("verify", artifact), ("inspect", artifact), ("eval", artifact, "--model", model, "--data", data)):
        refused(2, r"manifest\.json: format_version is 5, this kvcalib reads 4", *command)


def test_verify_names_the_altered_file(artifact):
    for name in ("README.md", "tensors.safetensors", "manifest.json"):
        intact = (artifact / name).read_bytes()
        (artifact / name).write_bytes(intact[:-5] + bytes([intact[-5] ^ 1]) + intact[-4:])
        refused(2, re.escape(name), "verify", artifact)
        (artifact / name).write_bytes(intact)
    ok("verify", artifact)


def test_nothing_there(tmp_path):
    for command in ("verify", "inspect", "eval"):
        refused(2, "no such folder|no artifact", command, tmp_path / "none")
        refused(2, "no artifact", command, tmp_path)
    for command in (("fit-nuq", tmp_path), ("friendliness", tmp_path), ("build", tmp_path, "--out", tmp_path / "a")):
        refused(2, "no run there", *command)
    assert snapshot(tmp_path) == {}


def test_stage_before_has_not_run(run, tmp_path):
    (run / "stages" / "fit-nuq.json").unlink()
    for command in (("friendliness", run), ("build", run, "--out", tmp_path / "a")):
        refused(2, "run `kvcalib fit-nuq", *command)


def test_codebooks_of_another_calibration_are_not_built(run, model, data, tmp_path):
    """Else the artifact would name a calibration that its codebooks were not fitted on."""
    ok("fisher", model, "--run", run, "--data", data, *FISHER, "--seed", 1, "--overwrite")
    refused(2, "fit-nuq", "build", run, "--out", tmp_path / "a")
    ok("fit-nuq", run)
    ok("build", run, "--out", tmp_path / "a")


# Folders that are in use


def test_folder_of_another_run(run, data, tmp_path, model):
    before = snapshot(run)
    refused(4, "seed=0, now 1.*--overwrite", "fisher", model, "--run", run, "--data", data, *FISHER, "--seed", 1)
    other = llama(tmp_path / "other", seed=1)
    refused(4, "model|weights_sha256", "fisher", other, "--run", run, "--data", data, *FISHER)
    assert snapshot(run) == before
    ok("fisher", model, "--run", run, "--data", data, *FISHER, "--seed", 1, "--overwrite")
    assert snapshot(run)["calibration.safetensors"] != before["calibration.safetensors"]


def test_folder_of_another_artifact(run, artifact):
    before = snapshot(artifact)
    refused(4, "another artifact.*--overwrite", "build", run, "--out", artifact, "--key-bits", 2)
    assert snapshot(artifact) == before
    ok("build", run, "--out", artifact, "--key-bits", 2, "--overwrite")
    assert "keys 2.00 bit" in ok("inspect", artifact).stdout


@pytest.mark.parametrize("option", [(), ("--overwrite",)])
def test_folder_with_foreign_files(run, model, data, tmp_path, option):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    before = snapshot(mine)
    refused(4, "mine: .*", "fisher", model, "--run", mine, "--data", data, *FISHER, *option)
    refused(4, "thesis.txt", "build", run, "--out", mine, *option)
    refused(4, "mine|thesis.txt", "run", model, "--data", data, "--out", mine, "--samples", 2, "--seq-len", 32, *option)
    assert snapshot(mine) == before


# Writes that fail, and Ctrl-C


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("failure", "code", "message"), [(full_disk, 2, "the disk is full"), (interrupt, 130, "interrupted")]
)
def test_failed_write_changes_nothing(run, artifact, model, data, tmp_path, monkeypatch, failure, code, message):
    (tmp_path / "measures.json").write_text("mine")
    before = snapshot(tmp_path)
    monkeypatch.setattr(os, "fsync", failure)
    refused(code, message, "fisher", model, "--run", tmp_path / "new", "--data", data, *FISHER)
    refused(code, message, "fisher", model, "--run", run, "--data", data, *FISHER, "--seed", 1, "--overwrite")
    refused(code, message, "fit-nuq", run, "--sinks", 1)
    refused(code, message, "build", run, "--out", artifact, "--key-bits", 2, "--overwrite")
    refused(code, message, "build", run, "--out", tmp_path / "fresh")
    refused(
        code, message, "eval", artifact, "--model", model, "--data", data, *EVAL, "--json", tmp_path / "measures.json"
    )
    monkeypatch.undo()
    assert snapshot(tmp_path) == before


def test_ctrl_c_is_resumed_to_the_same_bytes(tmp_path):
    """Ctrl-C at a terminal in the middle of `fisher`, then the same command again."""
    rows = np.random.default_rng(1).integers(3, VOCABULARY, (30, 32)).tolist()
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    command = ["fisher", "builtin", "--data", str(tmp_path / "data.jsonl"), "--samples", "30", "--seq-len", "32",
               "--batch-size", "1", "--keep-tokens", "500", "--run"]  # fmt: skip
    shown = interrupted([*command, str(tmp_path / "broken")])
    assert [line for line in shown.splitlines() if "error:" in line] == ["error: interrupted"]
    assert "Traceback" not in shown
    assert any(name.startswith("parts/fisher/") for name in snapshot(tmp_path / "broken"))
    assert "calibration.safetensors" not in snapshot(tmp_path / "broken")

    assert re.search(r"going on after \d+ of 30 sequences", ok(*command, tmp_path / "broken").stderr)
    ok(*command, tmp_path / "whole")
    assert snapshot(tmp_path / "broken") == snapshot(tmp_path / "whole")


def interrupted(arguments):
    """Run kvcalib at a terminal, press Ctrl-C once three sequences are done; what the terminal showed."""
    terminal, inside = pty.openpty()
    env = os.environ | {"OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen(
        [sys.executable, "-m", "kvcalib", *arguments], cwd=ROOT, env=env, stdout=inside, stderr=inside
    )
    os.close(inside)
    shown, pressed, deadline = b"", False, time.monotonic() + 120
    try:
        while time.monotonic() < deadline:
            try:
                chunk = os.read(terminal, 65536)
            except OSError:  # Linux says EIO when the other end has closed
                break
            if not chunk:
                break
            shown += chunk
            done = [int(n) for n in re.findall(rb"(\d+)/30", shown)]
            if not pressed and done and 3 <= done[-1] < 24:
                process.send_signal(signal.SIGINT)
                pressed = True
        assert process.wait(10) == 130, shown
    finally:
        os.close(terminal)
        process.kill()
        process.wait()
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode()).replace("\r", "")
