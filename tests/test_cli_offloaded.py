"""The whole road with the model's weights split over memory and disk: the bytes are those of the in-memory run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from kvcalib import attach, load
from kvcalib.cli import app
from kvcalib.evaluation.isolated import Probe, isolated_kl
from kvcalib.model.loading import load_model
from kvcalib.recipe import Recipe
from kvcalib.runtime.cache import PackedCache
from kvcalib.runtime.loader import prove
from kvcalib.stages.loading import ModelSettings

ROOT = Path(__file__).parents[1]
MAP = ("--device", "map", "--max-memory", "cpu=8MiB")  # of 13.9 MB: embeddings and a layer, three layers stay on disk
SPLIT = "model: weights are 5.0 MB on cpu, 8.9 MB on disk"
TEXT = ("--samples", "2", "--seq-len", "48", "--batch-size", "2")
FISHER = ("fisher", "builtin", *TEXT, "--keep-tokens", "64", "--run")


def kvcalib(*arguments):
    done = CliRunner().invoke(app, [str(each) for each in arguments])
    assert done.exit_code == 0, done.output
    return done


def artifact_of(run):
    kvcalib("fit-nuq", run)
    kvcalib("build", run, "--key-bits", 3, "--value-bits", 2, "--out", run.with_name(f"{run.name}-artifact"))
    return run.with_name(f"{run.name}-artifact")


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The demo model calibrated in memory, and by `accelerate launch` with most of it on disk; both built."""
    home = tmp_path_factory.mktemp("runs")
    launch = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes=1", "--num_machines=1")
    quiet = ("--mixed_precision=no", "--dynamo_backend=no")
    command = (sys.executable, *launch, *quiet, "-m", "kvcalib", *FISHER, home / "launched", *MAP)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run([str(each) for each in command], cwd=home, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert SPLIT in done.stderr
    kvcalib(*FISHER, home / "memory")
    return {name: (home / name, artifact_of(home / name)) for name in ("memory", "launched")}


def test_launched_from_disk_is_the_artifact_of_the_run_in_memory(runs):
    (expected, built), (found, same) = runs["memory"], runs["launched"]
    assert (found / "calibration.safetensors").read_bytes() == (expected / "calibration.safetensors").read_bytes()
    assert (found / "stages/fisher.json").read_bytes() == (expected / "stages/fisher.json").read_bytes()
    assert len(content(built)) == 3
    assert content(same) == content(built)


def test_either_run_goes_on_from_the_other(runs):
    """Where the weights are says nothing of the result, so it is no other setting."""
    run, _ = runs["memory"]
    assert "up to date" in kvcalib(*FISHER, run, *MAP).stderr


def test_eval_measures_the_same(runs, tmp_path):
    _, artifact = runs["memory"]
    command = ("eval", artifact, "--model", "builtin", *TEXT, "--json")
    kvcalib(*command, tmp_path / "memory.json")
    assert SPLIT in kvcalib(*command, tmp_path / "map.json", *MAP).stderr
    expected, found = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("memory", "map"))
    assert found == expected
    assert found["kld"] > 0


def test_generate_on_the_packed_cache_is_the_same(runs):
    artifact, ids = load(runs["memory"][1]), torch.arange(3, 40)[None]
    split = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    split |= {f"model.layers.{layer}": "disk" if layer % 2 else "cpu" for layer in range(4)}
    written = []
    for device_map in (None, split, {"": "disk"}):
        model = load_model("builtin", device_map=device_map)
        attach(model, artifact)
        out = model.generate(ids, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)
        assert isinstance(out.past_key_values, PackedCache)
        written.append((out.sequences, torch.stack(out.logits)))
    for sequences, logits in written[1:]:
        assert torch.equal(sequences, written[0][0])
        assert torch.equal(logits, written[0][1])


def test_measured_kl_is_the_same(runs):
    """What `allocate --method kl` measures with the model."""
    ids = torch.arange(3, 40)[None]
    quantizers = load(runs["memory"][1]).quantizers
    probes = [Probe(layer, role, quantizers[layer][role]) for layer, role in ((0, "key"), (2, "value"))]
    measured = []
    for device_map in (None, {"": "disk"}):
        model = load_model("builtin", device_map=device_map)
        measured.append([kl for _, kl in isolated_kl(model, prove(model, [0, 1, 2, 3]), ids, probes)])
    assert measured[1] == measured[0]
    assert min(kl[0] for kl in measured[0]) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--device", "map", "--max-memory", "cpu=2"), "--max-memory is 'cpu=2': the size of cpu is '2'; expected"),
        (("--max-memory", "cpu=2GiB"), "--max-memory is 'cpu=2GiB' and --device 'auto': only --device map"),
        (("--device", "cpu", "--offload", "x"), "--offload is 'x' and --device 'cpu': only --device map"),
        (("--device", "map", "--max-memory", "99=2GiB"), "--max-memory is '99=2GiB': GPU 99 is named, but torch sees"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", [("fisher", "builtin", "--run", "none"), ("inspect", "builtin")])
def test_bad_place_is_one_message(command, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, [*command, *options])
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_recipe_has_the_same_settings():
    placed = {"device": "map", "max_memory": "cpu=2GiB", "offload": "spilled"}
    recipe = Recipe(model="builtin", out="out", fisher=placed).changed(evaluate={"device": "map"})
    assert ModelSettings.model_validate(recipe.fisher.model_dump(include=set(placed))).max_memory == "cpu=2GiB"
    with pytest.raises(ValueError, match=r"evaluate\.max_memory is 'cpu=3GiB', expected that of fisher, 'cpu=2GiB'"):
        recipe.changed(evaluate={"max_memory": "cpu=3GiB"})
