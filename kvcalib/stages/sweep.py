"""Stage `sweep`: a grid to one line of results per point, by one process or many, and their Pareto front.

Processes find their points by claims (`sweep_store.py`): each begins with its own share and then takes what nobody else
has. So any number of processes may work on one folder, started by `--workers`, by `accelerate launch` or by hand, and
what one of them leaves when it is killed another does.
"""

from __future__ import annotations

import datetime
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvcalib import launch
from kvcalib.errors import FolderInUse, InputError, KvcalibError
from kvcalib.evaluation.failures import reason
from kvcalib.files import write_bytes, write_json
from kvcalib.model.loading import input_device, resolve
from kvcalib.report import pareto
from kvcalib.stages import progress
from kvcalib.stages.progress import note
from kvcalib.stages.sweep_grid import Grid, Metric, Point
from kvcalib.stages.sweep_store import Record, Subject, SweepDir
from kvcalib.stages.sweep_work import Work, machine, peak_memory

FRONT, PLOT = "pareto.json", "pareto.svg"
DEATHS = 2
"""Processes that may die of one point before it counts as failed."""

LOSS: dict[Metric, tuple[str, str]] = {"kld": ("kld", "KLD, nats per token"), "nll": ("delta_nll", "rise of NLL, nats")}
"""Metric to the field of `Measures` and its axis."""


@dataclass(frozen=True)
class Share:
    """Which of how many processes this is, its device (None: as the grid says), and whether all are on this machine."""

    index: int = 0
    count: int = 1
    device: str | None = None
    here: bool = False


@dataclass(frozen=True)
class Outcome:
    """All points' records in the grid's order, the keys on the front by rising bits, and where the plot is."""

    records: list[Record]
    front: list[str]
    plot: Path

    @property
    def failed(self) -> list[Record]:
        """Points that could not be measured."""
        return [record for record in self.records if record.status == "failed"]


def run(
    grid: Grid, out: Path, jsonl: Path | None = None, workers: int = 1, retry_failed: bool = False
) -> Outcome | None:
    """Measure every point of `grid` that has no result yet; None in all processes of a launch but the first.

    Args:
        out: the sweep's folder. jsonl: the results' file, `results.jsonl` in the folder if None.
        workers: processes to start on this machine; 1 under `accelerate launch`, which starts them.
        retry_failed: points that failed before are measured again.

    Raises:
        FolderInUse: `out` holds something else, or results of another model or text. InputError: the model or text
            cannot be had, or a worker died. CorruptFile: the results' file is damaged.
    """
    mine = launched()
    if workers > 1 and mine.count > 1:
        raise InputError(f"--workers is {workers} under a launcher of {mine.count} processes; give one of the two")
    resolve(grid.model)  # before processes are started
    folder = SweepDir(out, jsonl)
    known = folder.store.read()
    again = {key: r.created for key, r in known.items() if r.status == "failed"} if retry_failed else {}
    todo = [p for p in grid.points if (key := grid.key(p)) not in known or key in again]
    if len(todo) > 1 and workers > 1:
        _spawn(grid, folder, min(workers, len(todo)), again)
    elif todo:
        work(grid, folder, mine, again)
    return finish(grid, folder) if mine.index == 0 else None


def launched() -> Share:
    """What the launcher says of this process."""
    found = launch.here()
    return Share(found.rank, found.size, found.device)


def work(grid: Grid, folder: SweepDir, share: Share, again: dict[str, str]) -> None:
    """Measure points until none is left, here or elsewhere.

    Args:
        again: keys of failed points that are to be measured again, with the time of the failure.
    """
    device = share.device if grid.calibrate.device == "auto" else None
    done = Work(grid, folder, device, (share.index, share.count) if share.here else None)
    points = {grid.key(p): p for p in grid.points}
    _check_subject(folder, points, done.subject)
    ranked = sorted(enumerate(points), key=lambda item: ((item[0] - share.index) % share.count != 0, item[0]))
    keys = [key for _, key in ranked]
    # What others hold is waited for at the end: they may die, and then it is ours.
    for wait in (False, True):
        keys = [key for key in keys if not _settle(grid, folder, done, key, points[key], again, wait, len(points))]


def _settle(
    grid: Grid, folder: SweepDir, done: Work, key: str, point: Point, again: dict[str, str], wait: bool, total: int
) -> bool:
    """Whether the point has a result now; measures it unless another process does."""
    with folder.lock(f"point-{key}", wait) as mine:
        if not mine:
            return False
        known = folder.store.read()
        if key in known and again.get(key) != known[key].created:
            return True
        attempts = folder.path / "locks" / f"begun-{key}"
        died = 0 if key in again else _lines(attempts)
        record: dict[str, Any] = {}
        if died >= DEATHS:
            record = {
                "status": "failed",
                "error": f"{died} processes died while they measured it (out of memory?); try again with "
                "--retry-failed and fewer --workers",
            }
        else:
            attempts.write_text("begun\n" * (died + 1))
            try:
                record = {"status": "done", "measures": done.measure(point)}
            except (KeyboardInterrupt, FolderInUse):  # not of this point alone
                attempts.unlink(missing_ok=True)
                raise
            except Exception as error:
                record = {"status": "failed", "error": reason(error)}
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
        device = input_device(done.model)
        made = Record(
            key=key,
            name=point.name(grid.varying),
            settings=grid.described(point),
            subject=done.subject,
            seconds={} if died >= DEATHS else {name: round(value, 4) for name, value in done.seconds.items()},
            runs={} if died >= DEATHS else done.runs,
            memory=peak_memory(device),
            machine=machine(device),
            device=str(device),
            created=datetime.datetime.now(datetime.UTC).isoformat(),
            **record,
        )
        folder.store.append(made)
        attempts.unlink(missing_ok=True)
        measured = len(set(folder.store.read()) & set(map(grid.key, grid.points)))
        note(f"sweep: {measured}/{total} {made.name}: {_said(made, grid.metric)}", everyone=True)
    return True


def _said(record: Record, metric: Metric) -> str:
    if record.measures is None:
        return f"failed: {record.error}"
    field, _ = LOSS[metric]
    return (
        f"{record.measures.effective_bits:.3f} effective bits, {field} {getattr(record.measures, field):.5f}, "
        f"{sum(record.seconds.values()):.1f} s"
    )


def _lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.is_file() else 0


def _check_subject(folder: SweepDir, points: Collection[str], subject: Subject) -> None:
    """FolderInUse if results of these points were measured on another model or text."""
    for key, record in folder.store.read().items():
        if key in points and record.status == "done" and record.subject != subject:
            name = next(n for n in Subject.model_fields if getattr(record.subject, n) != getattr(subject, n))
            raise FolderInUse(
                f"{folder.store.path}: the result of {record.name!r} has {name} {getattr(record.subject, name)!r}, now "
                f"it is {getattr(subject, name)!r}: the model or the text has changed; give another --out and --jsonl"
            )


def _spawn(grid: Grid, folder: SweepDir, count: int, again: dict[str, str]) -> None:
    """`count` processes on this machine, on its GPUs in turn."""
    context = multiprocessing.get_context("spawn")
    gpus = torch.cuda.device_count() if grid.calibrate.device == "auto" else 0
    threads = max(1, torch.get_num_threads() // count)
    started = []
    for index in range(count):
        ours, theirs = context.Pipe(duplex=False)
        share = Share(index, count, f"cuda:{index % gpus}" if gpus else None, here=True)
        given = (grid.model_dump(mode="json"), folder.path, folder.store.path, share, again, threads, theirs)
        process = context.Process(target=_worker, args=given, name=f"sweep-{index}")
        process.start()
        theirs.close()
        started.append((process, ours))
    try:
        errors = [_answer(process, ours) for process, ours in started]
    finally:
        for process, _ in started:
            process.terminate()
            process.join()
    for error in errors:
        if error is not None:
            raise error


def _answer(process: Any, ours: Any) -> Exception | None:
    """What a worker ended with."""
    error: Exception | None
    try:
        error = ours.recv()
    except EOFError:
        process.join()
        code = process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        error = InputError(
            f"sweep: worker {process.name} {how}; nothing that was measured is lost: start the command again to go on, "
            "with fewer --workers if memory was short"
        )
    return error


def _worker(grid: Any, path: Path, jsonl: Path, share: Share, again: dict[str, str], threads: int, answer: Any) -> None:
    """One spawned process: `work`, and its error if there was one."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    progress.bars(False)
    torch.set_num_threads(threads)
    try:
        work(Grid.model_validate(grid), SweepDir(path, jsonl), share, again)
        answer.send(None)
    except KvcalibError as error:
        answer.send(error)
    except KeyboardInterrupt:
        os._exit(130)


def _end_with(sentinel: int) -> None:
    """End this process when its parent has: nobody would wait for it."""
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def finish(grid: Grid, folder: SweepDir) -> Outcome:
    """The front of what there is, written beside the results as JSON and plot."""
    known = folder.store.read()
    keys = [key for key in map(grid.key, grid.points) if key in known]
    field, axis = LOSS[grid.metric]
    points = {
        key: pareto.Point(
            known[key].name, m.effective_bits, getattr(m, field), known[key].settings["point"]["baseline"] is None
        )
        for key in keys
        if (m := known[key].measures) is not None
    }
    best = pareto.front(points.values())
    front = sorted((key for key, p in points.items() if p in best), key=lambda k: (points[k].bits, k))
    said = (
        f"{len(points)} points, {len(front)} on the front; {grid.evaluate.samples} sequences of {grid.evaluate.seq_len}"
    )
    heading = f"{grid.model}: {axis} against effective bits"
    svg = pareto.pareto_plot(heading, f"{said} tokens, {grid.way}", points.values(), axis, log=grid.metric == "kld")
    write_bytes(folder.path / PLOT, svg.encode())
    rows = [{"key": k, "name": points[k].name, "effective_bits": points[k].bits, field: points[k].loss} for k in front]
    write_json(folder.path / FRONT, {"metric": grid.metric, "way": grid.way, "points": len(points), "front": rows})
    return Outcome([known[key] for key in keys], front, folder.path / PLOT)
