"""Method kl and --check, through the command line: measured, resumed, refused, and the best plan kept."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from kvcalib.evaluation.isolated import Probe, isolated_kl
from kvcalib.files import read_tensors, write_tensors
from kvcalib.model.loading import load_model
from kvcalib.rundir import RunDir
from kvcalib.runtime.loader import prove
from kvcalib.stages import allocate, measure
from kvcalib.stages.fit_nuq import Codebooks
from tests.test_cli import FISHER, ROOT, VOCABULARY, invoke, llama, ok, refused, snapshot

SAMPLES = ("--samples", 3)
LINES = 3 * 2 * 2 * len(measure.MEASURED_WIDTHS)  # sequences, layers, keys and values


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("measure")


@pytest.fixture(scope="module")
def model(home):
    return llama(home / "model")


@pytest.fixture(scope="module")
def data(home):
    path = home / "data.jsonl"
    rows = np.random.default_rng(0).integers(3, VOCABULARY, (12, 32)).tolist()
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def fitted(home, model, data):
    ok("fisher", model, "--run", home / "run", "--data", data, *FISHER)
    ok("fit-nuq", home / "run")
    return home / "run"


@pytest.fixture(scope="module")
def measured(fitted, home, model):
    """A run whose KL was measured."""
    shutil.copytree(fitted, home / "measured")
    ok("allocate", home / "measured", "--widths", 2.5, "--method", "kl", "--model", model, *SAMPLES)
    return home / "measured"


@pytest.fixture
def run(fitted, tmp_path):
    return shutil.copytree(fitted, tmp_path / "run")


@pytest.fixture
def done(measured, tmp_path):
    return shutil.copytree(measured, tmp_path / "run")


def lines(run):
    return [json.loads(line) for line in (run / "kl.jsonl").read_text().splitlines()]


def test_a_line_holds_what_was_measured(measured, model, data):
    """One line, measured here once more: the text is what follows the four calibration sequences."""
    found = lines(measured)
    assert len(found) == LINES
    row = next(r for r in found if (r["layer"], r["role"], r["bits"]) == (1, "value", 2))
    texts = [json.loads(line)["input_ids"] for line in data.read_text().splitlines()]
    ids = next(t for t in texts if measure.text_id(np.array(t)) == row["text"])
    assert ids in texts[4:7]
    loaded = load_model(str(model))
    probe = Probe(1, "value", Codebooks.load(RunDir(measured)).quantizer(1, "value", 2))
    ((_, kl),) = isolated_kl(loaded, prove(loaded, [0, 1]), torch.tensor([ids]), [probe])
    assert row["kl"] == pytest.approx(kl[0], rel=1e-4)
    assert row["tokens"] == 32


def test_predicted_losses_of_the_plan_are_the_measurements(measured, model):
    """At one width per layer the losses are the very figures of the file."""
    found, widths = allocate.load(RunDir(measured))
    assert found.settings.method == "kl"
    ok("allocate", measured, "--widths", 3, "--per", "layer", "--method", "kl", "--model", model, *SAMPLES)
    found, widths = allocate.load(RunDir(measured))
    for layer in found.layers:
        for role, loss in (("key", layer.key_loss), ("value", layer.value_loss)):
            bits = int(widths[layer.index, role][0, 0])
            mine = [r for r in lines(measured) if (r["layer"], r["role"], r["bits"]) == (layer.index, role, bits)]
            assert loss == pytest.approx(sum(r["kl"] for r in mine) / sum(r["tokens"] for r in mine))
    assert len(lines(measured)) == LINES, "nothing is measured twice"


def test_killed_measurements_go_on(run, model, measured):
    """kill -9 in the middle, a torn last line, then the same command: the same plan, and nothing measured twice."""
    command = ["allocate", run, "--widths", "2.5", "--method", "kl", "--model", model, *SAMPLES, "--batch-size", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "kvcalib", *map(str, command)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    path, deadline = run / "kl.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if path.is_file() and path.read_bytes().count(b"\n") >= 5:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = path.read_bytes()
    whole = before.count(b"\n")
    assert 5 <= whole < LINES
    assert not (run / "allocation.safetensors").exists()
    path.write_bytes(before[:-7])
    shown = ok(*command).stderr
    assert f"kl: {whole - 1} of {LINES} measurements are there, {LINES - whole + 1} are left" in shown
    kept = [line for line in path.read_text().splitlines() if line.endswith("}")]
    assert len(kept) == len({json.dumps(json.loads(line), sort_keys=True) for line in kept}) == LINES
    mine, other = (allocate.load(RunDir(folder)) for folder in (run, measured))
    if other[0].settings == mine[0].settings:
        assert all(torch.equal(mine[1][name], other[1][name]) for name in mine[1])
    losses = {(r["text"], r["layer"], r["role"], r["bits"]): r["kl"] for r in map(json.loads, kept)}
    for r in lines(measured):
        place = (r["text"], r["layer"], r["role"], r["bits"])
        assert losses[place] == pytest.approx(r["kl"], rel=1e-3, abs=1e-5)


def test_more_samples_only_add(done, model):
    shown = ok("allocate", done, "--widths", 2.5, "--method", "kl", "--model", model, "--samples", 5).stderr
    assert f"{LINES} of {LINES // 3 * 5} measurements are there" in shown
    assert len(lines(done)) == LINES // 3 * 5


def test_other_codebooks_are_measured_anew(done, model):
    ok("fit-nuq", done, "--outliers", 0.05)
    ok("allocate", done, "--widths", 2.5, "--method", "kl", "--model", model, "--samples", 1)
    assert len(lines(done)) == LINES + LINES // 3
    assert len({r["key"] for r in lines(done)}) == 2


def test_the_second_time_is_up_to_date(done, model):
    before = snapshot(done)
    command = ("allocate", done, "--widths", 2.5, "--method", "kl", "--model", model, *SAMPLES)
    ok(*command)
    assert "allocate: up to date" in ok(*command).stderr
    assert snapshot(done)["kl.jsonl"] == before["kl.jsonl"]


def test_check_keeps_the_best_of_what_it_measured(run, model):
    command = ("allocate", run, "--budget", 5, "--check", 4, "--model", model, "--samples", 2, "--group", 0)
    shown = ok(*command).stdout
    assert "plans on held-out text" in shown
    found, widths = allocate.load(RunDir(run))
    rows = found.checked
    assert len(rows) == 4
    assert rows[0].plan == "fisher per channel"
    assert [r.kept for r in rows].count(True) == 1
    best = next(r for r in rows if r.kept)
    assert best.kld == min(r.kld for r in rows)
    assert len({r.kld for r in rows}) == 4, "the plans are distinct"
    assert all(r.effective_bits <= 5 for r in rows)
    # The method's own plan comes first, whatever whole words of 32 channels cost it.
    assert [r.predicted for r in rows[1:]] == sorted(r.predicted for r in rows[1:])
    assert (best.effective_bits, best.predicted) == (found.effective_bits, pytest.approx(found.loss))
    assert sum(float(w.float().sum()) for w in widths.values()) / 128 == pytest.approx(best.mean_width)
    # No folder of theirs is left, and what was kept is what is built.
    assert not [p for p in run.iterdir() if p.name.startswith(".check")]
    ok("build", run, "--out", run.parent / "a")
    assert "up to date" in ok(*command).stderr


def test_a_checked_plan_measures_as_eval_does(run, model, data, tmp_path):
    ok("allocate", run, "--widths", 2, "--check", 1, "--model", model, "--data", data, "--samples", 4)
    (row,) = allocate.load(RunDir(run))[0].checked
    ok("build", run, "--out", tmp_path / "a")
    ok("eval", tmp_path / "a", "--model", model, "--data", data, "--skip", 4, "--samples", 4, "--seq-len", 32,
       "--json", tmp_path / "j")  # fmt: skip
    measured = json.loads((tmp_path / "j").read_text())
    assert row.kld == pytest.approx(measured["kld"], rel=1e-4)
    assert row.effective_bits == pytest.approx(measured["effective_bits"], abs=0.2)  # of 32 tokens: positions alike


# What cannot be


def test_measuring_needs_the_model_and_the_text(run, model, data, tmp_path):
    before = snapshot(run)
    kl = ("allocate", run, "--widths", 2, "--method", "kl")
    refused(2, "local model 'model', of which only the name is recorded.*--model", *kl)
    refused(2, "local model 'model'.*--model", "allocate", run, "--widths", 2, "--check", 2)
    refused(2, "no such folder", *kl, "--model", tmp_path / "none")
    refused(2, "no such file", *kl, "--model", model, "--data", tmp_path / "none.txt")
    refused(2, "gives 12 sequences of 32.*12 are not held out.*--data", *kl, "--check", 1, "--model", model)
    (tmp_path / "short.txt").write_text("a few words")
    refused(2, "shorter than one sequence of 32", *kl, "--model", model, "--data", tmp_path / "short.txt")
    assert snapshot(run) == before


def test_another_model_is_refused(run, model, tmp_path):
    before = snapshot(run)
    other = llama(tmp_path / "other", seed=1)
    for method in (("--method", "kl"), ("--check", 1)):
        refused(3, "calibrated on 'model': this model's weights_sha256", "allocate", run, "--widths", 2, *method,
                "--model", other, "--samples", 1)  # fmt: skip
    larger = llama(tmp_path / "larger", num_hidden_layers=3)
    refused(
        3, "num_hidden_layers is 3, expected 2", "allocate", run, "--widths", 2, "--method", "kl", "--model", larger
    )
    assert {n: h for n, h in snapshot(run).items() if n != ".lock"} == before


@pytest.mark.parametrize("width", [9, 16, 255])
def test_a_width_that_the_storage_does_not_know(run, tmp_path, width):
    ok("allocate", run, "--widths", 2)
    tensors, note = read_tensors(run / "allocation.safetensors")
    tensors["layers.1.key.widths"][1, 3] = width
    write_tensors(run / "allocation.safetensors", tensors, note)
    message = rf"layers\.1\.key\.widths\[1\]\[3\] is {width}, expected 0\.\.8, or 16 in all"
    refused(2, message, "build", run, "--out", tmp_path / "a")
    assert not (tmp_path / "a").exists()
    tensors["layers.1.key.widths"][1, 3] = 7
    write_tensors(run / "allocation.safetensors", tensors, note)
    ok("build", run, "--out", tmp_path / "a")


def test_half_a_layer_cannot_be_exact(run, tmp_path):
    ok("allocate", run, "--widths", 2)
    tensors, note = read_tensors(run / "allocation.safetensors")
    tensors["layers.1.key.widths"][:] = 16
    write_tensors(run / "allocation.safetensors", tensors, note)
    refused(2, r"key\.widths\[0\]\[0\] is 16, .* 16 in all keys and values", "build", run, "--out", tmp_path / "a")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("layers.0.key.widths"), r"layers\.0\.key\.widths is missing"),
        (lambda t: t.update({"layers.7.key.widths": torch.zeros(2, 16)}), r"layers\.7\.key\.widths is no layer's"),
        (
            lambda t: t.update({"layers.0.key.widths": torch.zeros(2, 15)}),
            r"float32 \[2, 15\], expected uint8 \[2, 16\]",
        ),
    ],
)
def test_a_plan_that_does_not_fit(run, tmp_path, change, message):
    ok("allocate", run, "--widths", 2)
    tensors, note = read_tensors(run / "allocation.safetensors")
    change(tensors)
    write_tensors(run / "allocation.safetensors", tensors, note)
    refused(2, message + ".*kvcalib allocate", "build", run, "--out", tmp_path / "a")


def test_a_plan_of_another_run(run, model, data, tmp_path):
    """Copied from a run of another model, it names other codebooks."""
    ok("allocate", run, "--widths", 2)
    other = llama(tmp_path / "other", seed=1)
    ok("fisher", other, "--run", tmp_path / "second", "--data", data, *FISHER)
    ok("fit-nuq", tmp_path / "second")
    ok("allocate", tmp_path / "second", "--widths", 3)
    shutil.copy(tmp_path / "second" / "allocation.safetensors", run)
    refused(2, "other codebooks.*kvcalib allocate", "build", run, "--out", tmp_path / "a")
    ok("allocate", run, "--widths", 2)
    ok("build", run, "--out", tmp_path / "a")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--widths", 2, "--method", "hessian"), "--method is 'hessian'.*'fisher', 'kl' or 'qaq'"),
        (("--widths", 2, "--per", "row"), "--per is 'row'"),
        (("--widths", 2, "--method", "qaq", "--per", "channel"), "--per is channel, but qaq"),
        (("--widths", 2, "--as-published"), "--as-published is about qaq, --method is fisher"),
        (("--widths", 2, "--exact-layers", "one"), "--exact-layers is 'one'.*0,5"),
        (("--widths", 2, "--exact-layers", "0,9"), r"--exact-layers names \[9\], the run has layers \[0, 1\]"),
        (("--widths", 2, "--exact-layers", "0,1"), "names every layer"),
        (("--widths", 9), "--widths is 9"),
        (("--budget", 0), "--budget is 0"),
        (("--budget", 0.1), "smallest plan has"),
        (("--budget", 15), "largest"),
        (
            ("--widths", 0.3, "--method", "qaq", "--as-published"),
            r"--widths 0\.3 leaves \d+ code bits.*qaq's plans take",
        ),
        (("--widths", 2, "--check", -1), "--check"),
        (("--widths", 2, "--method", "kl", "--samples", 0), "--samples"),
    ],
)
def test_bad_options(run, arguments, message):
    before = snapshot(run)
    refused(2, message, "allocate", run, *arguments)
    assert snapshot(run) == before


def test_stages_that_have_not_run(run, tmp_path):
    refused(2, "no run there", "allocate", tmp_path / "none", "--widths", 2)
    (run / "stages" / "fit-nuq.json").unlink()
    refused(2, "run `kvcalib fit-nuq", "allocate", run, "--widths", 2)
    (run / "stages" / "fisher.json").unlink()
    refused(2, "run `kvcalib f", "allocate", run, "--widths", 2)


def test_exact_layers_are_shown_and_not_built(run, model, data, tmp_path):
    shown = ok("allocate", run, "--budget", 10, "--exact-layers", "1", "--plot", tmp_path / "p.svg").stdout
    assert re.search(r"1 │ exact", shown)
    assert "exact: layers 1" in (tmp_path / "p.svg").read_text()
    assert "p.svg" in shown
    ok("build", run, "--out", tmp_path / "a")
    assert "1 of 2 quantized" in ok("inspect", tmp_path / "a").stdout
    ok("eval", tmp_path / "a", "--model", model, "--data", data, "--samples", 2, "--seq-len", 32)


def test_a_plot_that_cannot_be_written(run, tmp_path):
    (tmp_path / "file").write_text("mine")
    result = invoke("allocate", run, "--widths", 2, "--plot", tmp_path / "file" / "p.svg")
    assert result.exit_code == 2
    assert os.fspath(tmp_path / "file") in result.stderr
