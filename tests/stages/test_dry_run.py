"""`--dry-run`: what it says against what a run takes, and what it refuses."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from kvcalib.demo import MODEL_DIR
from kvcalib.errors import DoesNotFit, InputError, UnsupportedModel
from kvcalib.stages import dry_run
from kvcalib.stages.fisher import FisherSettings
from tests.tiny import tiny_family

SETTINGS = FisherSettings(samples=4, seq_len=512)


@pytest.fixture(autouse=True)
def no_probe(monkeypatch):
    monkeypatch.setattr(dry_run, "PROBE_SECONDS", 0.0)


def large(folder: Path) -> str:
    """The config of a Llama of 70 billion parameters, and nothing else."""
    LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
        vocab_size=128256, tie_word_embeddings=False, dtype="bfloat16",
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


def test_peak_memory_is_within_a_quarter_on_two_sizes(tmp_path):
    """The kernel's own figure of a process that calibrates."""
    for name, shape in {"a": (256, 704, 4, 4, 2, 2048), "b": (512, 1408, 6, 8, 4, 8192)}.items():
        hidden, inner, layers, heads, kv_heads, vocabulary = shape
        folder = tmp_path / name
        LlamaForCausalLM(
            LlamaConfig(
                hidden_size=hidden,
                intermediate_size=inner,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                num_key_value_heads=kv_heads,
                head_dim=64,
                vocab_size=vocabulary,
                max_position_embeddings=512,
            )
        ).save_pretrained(folder)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (folder / file).write_bytes((Path(MODEL_DIR) / file).read_bytes())
    started = {
        name: subprocess.Popen(
            [sys.executable, "-c", PEAK, str(tmp_path / name), str(tmp_path / f"run-{name}")],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for name in "ab"
    }  # fmt: skip
    for name, process in started.items():
        out, err = process.communicate()
        assert process.returncode == 0, err
        said = dry_run.run(str(tmp_path / name), SETTINGS, tmp_path).costs[0]
        assert said.host == pytest.approx(int(out.split()[-1]), rel=0.25)


# A child's peak begins with that of its parent, so it is set back first.
PEAK = """
import sys
open("/proc/self/clear_refs", "w").write("5")
from kvcalib.cli import app
try:
    app(["fisher", sys.argv[1], "--run", sys.argv[2], "--samples", "4", "--seq-len", "512"], standalone_mode=False)
except SystemExit as end:
    if end.code:
        raise
with open("/proc/self/status") as status:
    print(next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM")))
"""


def test_reads_the_config_only(tmp_path):
    found = dry_run.run(large(tmp_path), SETTINGS, tmp_path)
    assert found.plan.model.parameters == 70_553_706_496
    assert [cost.stage for cost in found.costs] == ["fisher", "fit-nuq", "friendliness", "allocate", "build", "eval"]
    assert found.host > 2.8e11
    assert all(cost.seconds > 0 and cost.host > 0 for cost in found.costs)


def test_what_does_not_fit_is_refused_with_a_remedy(tmp_path):
    found = dry_run.run(large(tmp_path), SETTINGS, tmp_path)
    room = dataclasses.replace(found.machine, host=1e12, host_free=1e12, disk=1e12)
    dataclasses.replace(found, machine=room).check()
    with pytest.raises(DoesNotFit, match=r"host memory: this machine has 64 GB, fisher takes .*282 GB of weights"):
        dataclasses.replace(found, machine=dataclasses.replace(room, host=64e9)).check()
    with pytest.raises(DoesNotFit, match=r"10 MB of disk are free, the run takes .*--keep-tokens"):
        dataclasses.replace(found, machine=dataclasses.replace(room, disk=10e6)).check()
    on_gpu = dataclasses.replace(found, plan=dataclasses.replace(found.plan, on_gpu=True, dtype=2))
    on_gpu = dataclasses.replace(on_gpu, costs=[dataclasses.replace(found.costs[0], device=1.6e11)])
    with pytest.raises(DoesNotFit, match=r"H100: has 80 GB of memory, a pass takes 160 GB .*--device map"):
        dataclasses.replace(on_gpu, machine=dataclasses.replace(room, device=80e9, device_name="H100")).check()


def test_a_model_that_is_spread_is_not_refused_for_its_weights(tmp_path):
    found = dry_run.run(large(tmp_path), SETTINGS.model_copy(update={"device": "map"}), tmp_path)
    small = dataclasses.replace(found.machine, host=64e9, disk=1e12)
    dataclasses.replace(found, machine=small).check()


def test_large_batches_are_the_remedy_where_they_are_the_reason(tmp_path):
    settings = FisherSettings(samples=64, seq_len=4096, batch_size=64)
    found = dry_run.run("builtin", settings, tmp_path)
    small = dataclasses.replace(found.machine, host=1e9, disk=1e12)
    with pytest.raises(DoesNotFit, match=r"smaller --batch-size \(now 64\)"):
        dataclasses.replace(found, machine=small).check()


def test_layers_are_those_that_fisher_would_take(tmp_path):
    tiny_family("gemma3_text").config.save_pretrained(tmp_path)
    assert list(dry_run.run(str(tmp_path), SETTINGS, tmp_path).plan.layers) == [3]
    every = dry_run.run(str(tmp_path), SETTINGS.model_copy(update={"sliding": "yes"}), tmp_path)
    assert list(every.plan.layers) == [0, 1, 2, 3]


def test_nothing_to_quantize_is_refused(tmp_path):
    config = tiny_family("mistral").config
    config.sliding_window = 16
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="none of its 4 layers attends in full"):
        dry_run.run(str(tmp_path), SETTINGS.model_copy(update={"sliding": "no"}), tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        dry_run.run(str(tmp_path / "none"), SETTINGS, tmp_path)


def test_containers_limit_counts(monkeypatch, tmp_path):
    for name, text in (("memory.max", "1000\n"), ("memory.current", "400\n")):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(dry_run, "CGROUP", tmp_path)
    assert dry_run._contained(5000, 700) == (1000, 600)
    (tmp_path / "memory.max").write_text("max\n")
    assert dry_run._contained(5000, 700) == (5000, 700)
