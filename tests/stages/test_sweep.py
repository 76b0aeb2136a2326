"""Sweeps as they are run: shared stages, resuming after a kill, sharing by processes, failures, plan and cost."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from kvcalib.demo import MODEL_DIR
from kvcalib.errors import FolderInUse, InputError
from kvcalib.evaluation.perplexity import evaluate
from kvcalib.model.loading import load_model, load_tokenizer
from kvcalib.model.text import token_sequences
from kvcalib.runtime.loader import load
from kvcalib.stages import fisher, fit_nuq, sweep, sweep_cost
from kvcalib.stages.sweep_grid import read_grid
from kvcalib.stages.sweep_store import Store, SweepDir
from kvcalib.stages.sweep_work import Work
from tests.test_cli import VOCABULARY, ok, refused
from tests.tiny import tiny_llama, tokens

ROOT = Path(__file__).parents[2]
SMALL = {"calibrate": {"samples": 4, "seq_len": 32}, "evaluate": {"samples": 2, "seq_len": 32}}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A tiny model with the demo's tokenizer, and text."""
    home = tmp_path_factory.mktemp("sweep")
    tiny_llama(vocab_size=VOCABULARY).save_pretrained(home / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL_DIR / name, home / "model")
    lines = [json.dumps({"input_ids": row}) + "\n" for row in tokens(12, 32, seed=3).tolist()]
    (home / "text.jsonl").write_text("".join(lines))
    return home


def write(home, folder, **body):
    """A grid's file in `folder`; `body` in place of the defaults."""
    whole = {"model": str(home / "model"), "data": str(home / "text.jsonl"), **SMALL, "grid": {"bits": [3, 4]}}
    (folder / "grid.yaml").write_text(yaml.safe_dump(whole | body))
    return folder / "grid.yaml"


def run(path, out, **more):
    return sweep.run(read_grid(path), out, **more)


@pytest.fixture
def counted(monkeypatch):
    """How often each stage and each point ran in this process."""
    calls = {"fisher": 0, "fit-nuq": 0, "points": []}
    for module, name in ((fisher, "fisher"), (fit_nuq, "fit-nuq")):

        def counting(*args, _run=module.run, _name=name, **kwargs):
            calls[_name] += 1
            return _run(*args, **kwargs)

        monkeypatch.setattr(module, "run", counting)
    measure = Work.measure
    monkeypatch.setattr(Work, "measure", lambda self, point: (calls["points"].append(point), measure(self, point))[1])
    return calls


def test_shared_stages_run_once_and_figures_are_those_of_eval(home, tmp_path, counted):
    path = write(home, tmp_path, grid={"bits": [3, 4], "outliers": [0, 0.02], "recent": [0, 8], "baselines": "fp16"})
    out = tmp_path / "out"
    found = run(path, out)
    assert (counted["fisher"], counted["fit-nuq"], len(counted["points"])) == (1, 2, 9)
    assert len(list((out / "artifacts").iterdir())) == 4
    assert [r.status for r in found.records] == ["done"] * 9
    # The same point by the road of `kvcalib eval`.
    grid = read_grid(path)
    point = next(p for p in grid.points if (p.bits, p.outliers, p.recent) == (3, 0.02, 8))
    artifact = load(out / "artifacts" / grid.names(point).built[3.0])
    assert artifact.manifest.budget.asked == 3
    assert {layer.key.outliers for layer in artifact.manifest.layers} == {1}
    text = token_sequences(str(home / "text.jsonl"), load_tokenizer(str(home / "model")), 2, 32, "evaluate", 0, skip=4)
    (expected,) = evaluate(load_model(str(home / "model")), [artifact], text, recent=8, batch_size=2)
    record = next(r for r in found.records if r.key == grid.key(point))
    assert record.measures.kld == pytest.approx(expected.kld, rel=1e-4)
    assert record.measures.cache_bytes == expected.cache_bytes
    assert (record.name, record.settings["point"]["recent"]) == ("3 bits, outliers 0.02, recent 8", 8)
    # Again: nothing is left; wider: only what is new.
    assert run(path, out).front == found.front
    wider = write(
        home, tmp_path, grid={"bits": [3, 4, 5], "outliers": [0, 0.02], "recent": [0, 8], "baselines": "fp16"}
    )
    assert len(run(wider, out).records) == 13
    assert (counted["fisher"], counted["fit-nuq"], len(counted["points"])) == (1, 2, 13)


def test_a_grid_with_eviction_and_one_with_adaptive_widths(home, tmp_path):
    evicting = run(write(home, tmp_path, grid={"bits": 4, "keep": [None, 0.4], "policy": "h2o"}), tmp_path / "out")
    plain, h2o = (r.measures for r in evicting.records)
    assert h2o.cache_bytes < plain.cache_bytes
    assert h2o.kept < plain.kept == 32
    body = {"grid": {"bits": 4, "adaptive": [False, True], "window": 3}, "tiers": [3, 5]}
    body |= {"evaluate": {"samples": 1, "seq_len": 32, "step": 4}}
    mixed = run(write(home, tmp_path, **body), tmp_path / "out")
    assert [r.status for r in mixed.records] == ["done"] * 2
    assert mixed.records[0].measures.kld != mixed.records[1].measures.kld
    assert mixed.records[1].runs == {"build": 2, "tiers": 1, "measure": 1}


def test_baselines_stand_beside(home, tmp_path):
    path = write(home, tmp_path, grid={"bits": 3, "baselines": ["fp16", "int:bits=4"]})
    ours, exact, integer = run(path, tmp_path / "out").records
    assert (exact.measures.kld, exact.measures.effective_bits) == (0, 16)
    assert integer.measures.kld > 0
    assert 4 < integer.measures.effective_bits < 16
    assert ours.measures.nll != integer.measures.nll


def test_a_baseline_that_is_fitted_takes_the_grids_calibration(home, tmp_path, counted):
    path = write(home, tmp_path, grid={"baselines": ["kvquant-published"]})
    todo = sweep_cost.plan(read_grid(path), SweepDir(tmp_path / "out", create=False))
    assert {name: need.left for name, need in todo.stages.items()} == {"fisher": 1, "measure baseline": 1}
    (record,) = run(path, tmp_path / "out").records
    assert (record.status, record.error, record.runs) == ("done", None, {"fisher": 1, "measure": 1})
    assert record.measures.kld > 0
    assert (counted["fisher"], counted["fit-nuq"]) == (1, 0)


def test_killed_in_the_middle_nothing_is_lost_and_nothing_repeated(home, tmp_path, counted):
    path = write(home, tmp_path, grid={"bits": [3, 4], "recent": list(range(6))})
    out, total = tmp_path / "out", 12
    process = subprocess.Popen(
        [sys.executable, "-m", "kvcalib", "sweep", str(path), "--out", str(out)],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    results = out / "results.jsonl"
    while process.poll() is None and (not results.is_file() or results.read_bytes().count(b"\n") < 3):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = results.read_bytes()
    done = before.count(b"\n")
    assert 3 <= done < total, "it was not killed in the middle"
    found = run(path, out)
    assert results.read_bytes().startswith(before)
    lines = [json.loads(line)["key"] for line in results.read_text().splitlines()]
    assert len(lines) == len(set(lines)) == total
    assert len(counted["points"]) == total - done
    assert (counted["fisher"], counted["fit-nuq"]) == (0, 0)
    assert [r.status for r in found.records] == ["done"] * total


def test_two_processes_share_a_grid(home, tmp_path):
    path = write(home, tmp_path, grid={"bits": [3, 4], "recent": list(range(3)), "baselines": "fp16"})
    out = tmp_path / "out"
    shown = ok("sweep", path, "--out", out, "--workers", 2).stdout
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert len(lines) == len({line["key"] for line in lines}) == 7
    assert {line["status"] for line in lines} == {"done"}
    # Made once, by one of the two.
    assert sum(line["runs"].get("fisher", 0) for line in lines) == 1
    assert sum(line["runs"].get("fit-nuq", 0) for line in lines) == 1
    assert sum(line["runs"].get("build", 0) for line in lines) == 2
    assert "7 points" in shown
    assert (out / "pareto.svg").read_text().startswith("<svg")
    front = json.loads((out / "pareto.json").read_text())["front"]
    by_key = {line["key"]: line["measures"] for line in lines}
    for row in front:
        mine = by_key[row["key"]]
        better = [
            m for m in by_key.values() if m["kld"] < mine["kld"] and m["effective_bits"] <= mine["effective_bits"]
        ]
        assert not better
    assert len(front) >= 2


def test_what_another_process_holds_is_left_to_it(home, tmp_path, counted):
    path = write(home, tmp_path, grid={"bits": [3, 4]})
    first = run(path, tmp_path / "first").records
    grid, folder = read_grid(path), SweepDir(tmp_path / "out")
    held, free = map(grid.key, grid.points)
    with folder.lock(f"point-{held}"):
        other = threading.Thread(target=run, args=(path, tmp_path / "out"))
        other.start()
        while free not in folder.store.read():
            time.sleep(0.01)
        assert held not in folder.store.read()
        folder.store.append(first[0])
    other.join()
    assert [p.bits for p in counted["points"]] == [3, 4, 4]


def test_what_a_dead_process_held_is_taken_over_but_not_for_ever(home, tmp_path, counted):
    path = write(home, tmp_path, grid={"bits": [3, 4]})
    grid, folder = read_grid(path), SweepDir(tmp_path / "out")
    once, twice = map(grid.key, grid.points)
    (folder.path / "locks").mkdir(exist_ok=True)
    (folder.path / "locks" / f"begun-{once}").write_text("begun\n")
    (folder.path / "locks" / f"begun-{twice}").write_text("begun\nbegun\n")
    found = run(path, tmp_path / "out")
    assert [r.status for r in found.records] == ["done", "failed"]
    assert "2 processes died" in found.failed[0].error
    assert not list((folder.path / "locks").glob("begun-*"))
    assert not run(path, tmp_path / "out", retry_failed=True).failed
    assert [p.bits for p in counted["points"]] == [3, 4]


def test_failed_points_are_recorded_and_retried_on_demand(home, tmp_path, counted):
    path = write(home, tmp_path, grid={"bits": [0.1, 3]})
    found = run(path, tmp_path / "out")
    (failed,) = found.failed
    assert failed.measures is None
    assert "0.1" in failed.error
    assert len(found.front) == 1
    assert len(run(path, tmp_path / "out").failed) == 1
    assert [p.bits for p in counted["points"]] == [0.1, 3]
    run(path, tmp_path / "out", retry_failed=True)
    assert [p.bits for p in counted["points"]] == [0.1, 3, 0.1]
    assert len(Store(tmp_path / "out" / "results.jsonl").path.read_text().splitlines()) == 3
    shown = ok("sweep", path, "--out", tmp_path / "out").stdout
    assert "failed: 0.1 bits" in shown


def test_results_of_another_model_are_refused(home, tmp_path):
    shutil.copytree(home / "model", tmp_path / "model")
    path = write(tmp_path, tmp_path, data=str(home / "text.jsonl"), grid={"bits": 3})
    run(path, tmp_path / "out")
    tiny_llama(seed=5, vocab_size=VOCABULARY).save_pretrained(tmp_path / "model")
    path = write(tmp_path, tmp_path, data=str(home / "text.jsonl"), grid={"bits": [3, 4]})
    with pytest.raises(FolderInUse, match=r"'3 bits' has weights_sha256 .* the model or the text has changed"):
        run(path, tmp_path / "out")


def _die(answer):
    os.kill(os.getpid(), signal.SIGKILL)


def _refuse(answer):
    answer.send(FolderInUse("other results"))


def test_workers_that_die_or_cannot_start_are_told(home, tmp_path, monkeypatch):
    path = write(home, tmp_path, model=str(tmp_path / "gone"))
    with pytest.raises(InputError, match="gone"):
        run(path, tmp_path / "out", workers=2)
    context = multiprocessing.get_context("fork")
    for target, kind, said in ((_die, InputError, "was killed by SIGKILL; nothing"), (_refuse, FolderInUse, "other")):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=target, args=(theirs,))
        process.start()
        theirs.close()
        error = sweep._answer(process, ours)
        process.join()
        assert isinstance(error, kind)
        assert said in str(error)
    path = write(home, tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sweep, "launched", lambda: sweep.Share(0, 2))
    with pytest.raises(InputError, match="--workers is 2 under a launcher of 2 processes"):
        run(path, tmp_path / "out", workers=2)


def test_shares_begin_apart(home, tmp_path, monkeypatch):
    """Process 1 of 2 measures the odd points first, then what is left."""
    path = write(home, tmp_path, grid={"bits": [3], "recent": [0, 1, 2, 3]})
    monkeypatch.setattr(sweep, "launched", lambda: sweep.Share(1, 2, "cpu"))
    assert run(path, tmp_path / "out") is None
    order = [r.settings["point"]["recent"] for r in Store(tmp_path / "out" / "results.jsonl").read().values()]
    assert order == [1, 3, 0, 2]


def everything(folder):
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in sorted(folder.rglob("*"))}


def test_dry_run_writes_nothing_and_knows_what_is_left(home, tmp_path, monkeypatch):
    path = write(home, tmp_path, grid={"bits": [3, 4], "recent": [0, 8], "baselines": "fp16"})
    out, probes = tmp_path / "out", tmp_path / "probes"
    probes.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(probes))
    before = everything(tmp_path)
    shown = ok("sweep", path, "--out", out, "--dry-run").stdout
    assert everything(tmp_path) == before | {"probes": (probes).stat().st_mtime_ns}
    assert "5 points, 0 done, 5 to measure" in shown
    assert "probed: one point of each kind" in shown
    grid = read_grid(path)
    run(write(home, tmp_path, grid={"bits": [3]}), out)
    before = everything(out)
    todo = sweep_cost.plan(grid, SweepDir(out, create=False))
    # recent None and 0 are two settings, so all five points are left, but the stages before them are done for 3 bits.
    needs = {name: (need.total, need.done) for name, need in todo.stages.items()}
    assert needs == {
        "fisher": (1, 1),
        "fit-nuq": (1, 1),
        "build": (2, 1),
        "measure plain": (4, 0),
        "measure baseline": (1, 0),
    }
    cost = sweep_cost.estimate(grid, SweepDir(out, create=False), todo)
    assert everything(out) == before
    assert cost.total(todo) == pytest.approx(
        cost.seconds["build"] + 4 * cost.seconds["measure plain"] + cost.seconds["measure baseline"]
    )


def test_cost_is_what_it_took_where_that_is_known(home, tmp_path):
    out = tmp_path / "out"
    run(write(home, tmp_path, grid={"bits": [3, 4], "recent": [0, 8]}), out)
    grid = read_grid(write(home, tmp_path, grid={"bits": [3, 4, 5], "recent": [0, 8]}))
    folder = SweepDir(out)
    todo = sweep_cost.plan(grid, folder)
    cost = sweep_cost.estimate(grid, folder, todo)
    records = list(folder.store.read().values())
    assert "measured: means over 4 points" in cost.how
    assert cost.seconds["measure plain"] == pytest.approx(sum(r.seconds["measure"] for r in records) / 4)
    assert cost.memory == max(r.memory for r in records) > 50e6
    built = [sum(f.stat().st_size for f in p.iterdir()) for p in (out / "artifacts").iterdir()]
    assert cost.disk == pytest.approx(sum(built) / 2)
    todo = sweep_cost.plan(read_grid(write(home, tmp_path, grid={"bits": [3], "recent": [0]})), folder)
    assert not todo.left
    assert "nothing is left" in ok("sweep", tmp_path / "grid.yaml", "--out", out, "--dry-run").stdout


def test_the_command_refuses_what_it_cannot_use(home, tmp_path):
    (tmp_path / "bad.yaml").write_text("model: builtin\ngrid: {bits: two}\n")
    refused(2, "grid.bits.0 is 'two'", "sweep", tmp_path / "bad.yaml")
    refused(2, "cannot be read", "sweep", tmp_path / "none.yaml")
    refused(2, "grid.bits.0 is 'two'", "validate", tmp_path / "bad.yaml")
    assert "valid; model" in ok("validate", write(home, tmp_path)).stdout
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("")
    refused(4, "holds no sweep of kvcalib", "sweep", write(home, tmp_path), "--out", tmp_path / "taken")
    assert [p.name for p in (tmp_path / "taken").iterdir()] == ["file"]
