"""One, two and four processes, and a process that is killed: the same bytes of everything that a run holds.

The processes are forked from a prepared one, so that each test does not import torch and transformers again.
"""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest

from kvcalib import launch
from kvcalib.errors import FolderInUse
from kvcalib.model.loading import load_model
from kvcalib.rundir import RunDir
from kvcalib.stages import allocate, build, compare, evaluate, fisher, fit_nuq, friendliness, ledger
from kvcalib.stages.allocate import AllocateSettings
from kvcalib.stages.compare import CompareSettings
from kvcalib.stages.evaluate import EvalSettings
from kvcalib.stages.fisher import FisherSettings
from kvcalib.stages.fit_nuq import FitNuqSettings
from kvcalib.stages.kept import beside
from kvcalib.stages.measure import MEASURED_WIDTHS, MeasureSettings
from tests.test_cli import VOCABULARY, llama

LAUNCHES = {"two": (2, False), "four": (4, False), "two on two disks": (2, True)}
"""Processes, and whether each has a disk of its own."""
TIMES = ("seconds_per_token", "fp16_seconds_per_token", "created", "artifact")
FIT = FitNuqSettings()


def common(home: Path) -> dict:
    """Settings that all measurements share."""
    return {"data": str(home / "data.jsonl"), "batch_size": 2}


def plain(home: Path, samples: int = 5) -> EvalSettings:
    return EvalSettings(**common(home), samples=samples, seq_len=32, skip=4)


def everything(home: Path, folder: Path, here: launch.Launch) -> None:
    """All stages after `fisher` in the run folder `folder/run`, by the processes of `here`."""
    run, name = here.in_turn("test", lambda: RunDir(folder / "run", create=True)), str(home / "model")
    model = load_model(name)
    fit_nuq.run(run, FIT, here)
    measuring = MeasureSettings(**common(home), model=name, samples=3)
    allocate.run(run, AllocateSettings(widths=2.5, method="kl"), measuring, model=model, here=here)
    allocate.run(run, AllocateSettings(budget=5.0), measuring, 2, model=model, here=here)
    with here.step("build"):
        if here.first:
            friendliness.run(run)
            build.run(run, folder / "artifact", 2, 2)
    here.supply_folder(folder / "artifact")
    artifacts = [folder / "artifact"]
    evaluate.run(artifacts, name, plain(home), folder / "plain.json", model, here)
    evicting = plain(home).model_copy(update={"keep": 0.5})
    evaluate.run(artifacts, name, evicting, folder / "evicting.json", model, here)
    against = CompareSettings(specs=("kivi:bits=2",), greedy=4)
    compare.run(artifacts, name, plain(home), against, folder / "compare.json", model, here)


def told(path: Path) -> object:
    """A JSON without times and names of folders."""

    def without(value):
        if isinstance(value, dict):
            return {k: without(v) for k, v in value.items() if k not in TIMES}
        return [without(v) for v in value] if isinstance(value, list) else value

    return without(json.loads(path.read_text()))


def _start(rank: int, size: int, port: int, home: str, folder: str, answer) -> None:
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    import torch

    torch.set_num_threads(1)
    everything(Path(home), Path(folder), launch.here())
    answer.send("done")


def _killed(home: str, folder: str, stage: str) -> None:
    """A process that is killed in the middle of `stage`: after a layer, or while it writes the third line."""
    import torch

    torch.set_num_threads(1)
    place, name, count = Path(folder), str(Path(home) / "model"), 0
    fit_layer, append = fit_nuq.fit_layer, ledger.Ledger.append

    def fit(calibration, layer, settings):
        if layer == 1:
            while not (place / "run/parts/fit-nuq/layer-0.safetensors").exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return fit_layer(calibration, layer, settings)

    def write(self, rows):
        nonlocal count
        count += 1
        if count > 3:
            with open(self.path, "ab") as file:
                file.write(b'{"torn": ')
            os.kill(os.getpid(), signal.SIGKILL)
        append(self, rows)

    if stage == "fit-nuq":
        fit_nuq.fit_layer = fit
        fit_nuq.run(RunDir(place / "run"), FIT, launch.Launch())
    ledger.Ledger.append = write
    if stage == "kl":
        measuring = MeasureSettings(**common(Path(home)), model=name, samples=3)
        allocate.run(RunDir(place / "run"), AllocateSettings(widths=2.5, method="kl"), measuring)
    evaluate.run([place / "artifact"], name, plain(Path(home)), place / "new.json")


@pytest.fixture(scope="module")
def context():
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["tests.stages.test_processes"])
    return found


def together(context, home, folders):
    """Everything by as many processes as folders."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank, folder in enumerate(folders):
        ours, theirs = context.Pipe(duplex=False)
        given = (rank, len(folders), port, str(home), str(folder), theirs)
        started.append((context.Process(target=_start, args=given), ours))
        started[-1][0].start()
        theirs.close()
    assert [ours.recv() for _, ours in started] == ["done"] * len(folders)
    for process, _ in started:
        process.join()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Model, text and a run that is calibrated."""
    folder = tmp_path_factory.mktemp("processes")
    llama(folder / "model")
    rows = np.random.default_rng(0).integers(3, VOCABULARY, (14, 32)).tolist()
    (folder / "data.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    settings = FisherSettings(**common(folder), samples=4, seq_len=32, keep_tokens=128)
    fisher.run(RunDir(folder / "calibrated", create=True), str(folder / "model"), settings)
    return folder


@pytest.fixture(scope="module")
def one(home, context):
    """Everything by one process, as new as those of the launches: this one has run other tests before."""
    shutil.copytree(home / "calibrated", home / "one" / "run")
    together(context, home, [home / "one"])
    return home / "one"


@pytest.fixture(scope="module", params=LAUNCHES)
def many(request, context, home):
    """The folder of the first of several processes."""
    size, apart = LAUNCHES[request.param]
    folders = [home / request.param / (str(rank) if apart else "0") for rank in range(size)]
    shutil.copytree(home / "calibrated", folders[0] / "run")
    together(context, home, folders)
    return folders[0]


@pytest.fixture
def killed(context, home, one, tmp_path):
    """A function that makes a folder in which a process was killed in the middle of a stage."""

    def kill(stage: str) -> Path:
        shutil.copytree(home / "calibrated" if stage == "fit-nuq" else one / "run", tmp_path / "run")
        shutil.copytree(one / "artifact", tmp_path / "artifact")
        for name in ("kl.jsonl", "stages/allocate.json"):
            (tmp_path / "run" / name).unlink(missing_ok=True)
        process = context.Process(target=_killed, args=(str(home), str(tmp_path), stage))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        return tmp_path

    return kill


def test_files_of_the_run_are_the_same_bytes(one, many):
    for name in ("codebooks.safetensors", "allocation.safetensors", "friendliness.json", "allocation.svg"):
        assert (many / "run" / name).read_bytes() == (one / "run" / name).read_bytes(), name
    for folder in (one, many):
        assert not (folder / "run" / "parts").exists()
        assert not [p for p in folder.rglob("*") if p.name.endswith((".tmp", ".jsonl")) and p.name != "kl.jsonl"]


def test_artifacts_are_the_same_bytes(one, many):
    names = sorted(p.name for p in (one / "artifact").iterdir())
    assert names == sorted(p.name for p in (many / "artifact").iterdir())
    assert all((many / "artifact" / n).read_bytes() == (one / "artifact" / n).read_bytes() for n in names)


def test_every_measurement_is_made_once(one, many):
    mine, others = (sorted((f / "run" / "kl.jsonl").read_text().splitlines()) for f in (one, many))
    assert mine == others
    assert len(mine) == 3 * 2 * 2 * len(MEASURED_WIDTHS)


@pytest.mark.parametrize("name", ["plain.json", "evicting.json", "compare.json"])
def test_figures_are_the_same_to_the_last_bit(one, many, name):
    assert told(many / name) == told(one / name)


def test_a_killed_fit_goes_on(killed, one, monkeypatch, capsys):
    folder, fitted, fit_layer = killed("fit-nuq"), [], fit_nuq.fit_layer
    assert [p.name for p in (folder / "run/parts/fit-nuq").glob("layer-*")] == ["layer-0.safetensors"]
    monkeypatch.setattr(fit_nuq, "fit_layer", lambda c, i, s: fitted.append(i) or fit_layer(c, i, s))
    fit_nuq.run(RunDir(folder / "run"), FIT)
    assert fitted == [1]
    assert "1 of 2 layers are there, 1 are left" in capsys.readouterr().err
    assert (folder / "run/codebooks.safetensors").read_bytes() == (one / "run/codebooks.safetensors").read_bytes()
    assert not (folder / "run/parts").exists()


def test_parts_of_other_settings_are_not_used(killed, monkeypatch):
    folder, fitted, fit_layer = killed("fit-nuq"), [], fit_nuq.fit_layer
    monkeypatch.setattr(fit_nuq, "fit_layer", lambda c, i, s: fitted.append(i) or fit_layer(c, i, s))
    fit_nuq.run(RunDir(folder / "run"), FIT.model_copy(update={"outliers": 0.0}))
    assert sorted(fitted) == [0, 1]


def test_killed_measurements_of_kl_go_on(killed, one, home, capsys):
    folder = killed("kl")
    path, total = folder / "run" / "kl.jsonl", 3 * 2 * 2 * len(MEASURED_WIDTHS)
    there = path.read_bytes().count(b"\n")
    assert 0 < there < total
    measuring = MeasureSettings(**common(home), model=str(home / "model"), samples=3)
    allocate.run(RunDir(folder / "run"), AllocateSettings(widths=2.5, method="kl"), measuring)
    assert f"kl: {there} of {total} measurements are there, {total - there} are left" in capsys.readouterr().err
    assert sorted(path.read_text().splitlines()) == sorted((one / "run" / "kl.jsonl").read_text().splitlines())


def test_a_killed_eval_goes_on_and_another_is_refused(killed, one, home, capsys):
    folder = killed("eval")
    partial, name = folder / "new.json.partial.jsonl", str(home / "model")
    before = partial.read_bytes()
    assert before.count(b"\n") == 3  # what is measured, and two of three batches
    with pytest.raises(FolderInUse, match=r"new\.json\.partial\.jsonl.*samples=5, now 4.*delete the file"):
        evaluate.run([folder / "artifact"], name, plain(home, 4), folder / "new.json")
    other = plain(home).model_copy(update={"sinks": 3})
    with pytest.raises(FolderInUse, match="sinks=None, now 3"):
        evaluate.run([folder / "artifact"], name, other, folder / "new.json")
    assert partial.read_bytes() == before
    capsys.readouterr()
    evaluate.run([folder / "artifact"], name, plain(home), folder / "new.json")
    assert "eval: 2 of 3 batches are there, 1 are left" in capsys.readouterr().err
    assert told(folder / "new.json") == told(one / "plain.json")
    assert not partial.exists()


def test_a_pipeline_discards_what_another_eval_left(one, home, tmp_path, capsys):
    name, result = str(home / "model"), tmp_path / "new.json"
    beside(result).write_text(json.dumps({"of": {"samples": 4}}) + "\n" + json.dumps({"batch": 0, "row": {}}) + "\n")
    evaluate.run([one / "artifact"], name, plain(home), result, discard=True)
    assert "batches are there" not in capsys.readouterr().err
    assert told(result) == told(one / "plain.json")
