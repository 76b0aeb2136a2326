"""What a sweep will cost, before it runs: points, stages, time, memory and disk. It writes to a temporary folder only.

Figures are measured. Where this machine has measured points of the grid before, they are what those took; else a probe
runs every stage that is needed on a few sequences, once to warm up and once for the clock, and is scaled.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvcalib.artifact.store import MANIFEST
from kvcalib.model.loading import input_device, pick_device
from kvcalib.rundir import CALIBRATION, RunDir
from kvcalib.runtime.tiers import RULE
from kvcalib.stages import progress
from kvcalib.stages.sweep_grid import Grid, Point
from kvcalib.stages.sweep_store import Record, SweepDir
from kvcalib.stages.sweep_work import Work, calibrates, machine, peak_memory

PROBED = 2
"""Sequences that the probe calibrates on, and those that it measures."""

STAGES = ("fisher", "fit-nuq", "build", "tiers")


@dataclass(frozen=True)
class Need:
    """One stage: how often it runs, and how many of those are done."""

    total: int
    done: int

    @property
    def left(self) -> int:
        """Runs that are missing."""
        return self.total - self.done


@dataclass(frozen=True)
class Plan:
    """What a sweep has to do: stages, and points by kind (`measure plain`, `measure evicting`, ...)."""

    points: int
    done: int
    failed: int
    stages: dict[str, Need]
    left: list[Point]


@dataclass(frozen=True)
class Cost:
    """Seconds of one run of each stage, bytes of memory of one process, bytes of disk still needed, and how known."""

    seconds: dict[str, float]
    memory: float
    disk: float
    free: float
    how: str

    def total(self, plan: Plan) -> float:
        """Seconds of one process that does everything that is left."""
        return sum(self.seconds.get(name, 0.0) * need.left for name, need in plan.stages.items())


def plan(grid: Grid, folder: SweepDir, retry_failed: bool = False) -> Plan:
    """Points and stages of `grid`, those left and those done; reads only."""
    known = folder.store.read()
    points = {grid.key(p): p for p in grid.points}
    failed = [key for key in points if key in known and known[key].status == "failed"]
    settled = {key for key in points if key in known and not (retry_failed and known[key].status == "failed")}
    left = [p for key, p in points.items() if key not in settled]
    wanted: dict[str, dict[str, bool]] = {name: {} for name in STAGES}
    for p in points.values():
        for stage, name, there in _stages(grid, folder, p):
            wanted[stage][name] = there
    needed = {(stage, name) for p in left for stage, name, _ in _stages(grid, folder, p)}
    stages = {}
    for stage, names in wanted.items():
        missing = sum(not there and (stage, name) in needed for name, there in names.items())
        if names:
            stages[stage] = Need(len(names), len(names) - missing)
    for kind in dict.fromkeys(p.kind for p in points.values()):
        total = sum(p.kind == kind for p in points.values())
        stages[f"measure {kind}"] = Need(total, total - sum(p.kind == kind for p in left))
    return Plan(len(points), len(points) - len(left), len(failed), stages, left)


def _stages(grid: Grid, folder: SweepDir, point: Point) -> list[tuple[str, str, bool]]:
    """Stage, folder and whether it has run, of everything that a point needs."""
    if point.baseline is not None:
        if not calibrates(point.baseline):
            return []
        name = grid.names(point).calibrated
        return [("fisher", name, _ran(folder, name, "fisher"))]
    names = grid.names(point)
    found = [
        ("fisher", names.calibrated, _ran(folder, names.calibrated, "fisher")),
        ("fit-nuq", names.fitted, _ran(folder, names.fitted, "fit-nuq")),
        *(("build", name, (folder.artifact(name) / MANIFEST).is_file()) for name in names.built.values()),
    ]
    if names.mixed is not None:
        found.append(("tiers", names.mixed, (folder.artifact(names.mixed) / RULE).is_file()))
    return found


def _ran(folder: SweepDir, name: str, stage: str) -> bool:
    path = folder.run(name)
    return (path / "run.json").is_file() and RunDir(path).record(stage) is not None


def estimate(grid: Grid, folder: SweepDir, todo: Plan) -> Cost:
    """Time, memory and disk of what is left.

    Raises:
        KvcalibError: as the sweep itself would, where the probe meets it.
    """
    free = shutil.disk_usage(_existing(folder.path)).free
    if not todo.left:
        return Cost({}, 0.0, 0.0, free, "nothing is left to do")
    device = machine(pick_device("cpu" if grid.calibrate.device == "map" else grid.calibrate.device))
    keys = {grid.key(p) for p in grid.points}
    known = [r for k, r in folder.store.read().items() if k in keys and r.status == "done" and r.machine == device]
    seconds = _measured(known)
    wanted = {name for name, need in todo.stages.items() if need.left}
    if known and wanted <= set(seconds):
        how = f"measured: means over {len(known)} points of this grid that this machine has done"
        memory = max(record.memory for record in known)
        return Cost(seconds, memory, _disk(todo, *_sizes(folder, 1.0)), free, how)
    return _probe(grid, todo, free)


def _measured(records: Sequence[Record]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for record in records:
        kind = Point.model_validate(record.settings["point"]).kind
        for stage, value in record.seconds.items():
            runs = record.runs.get(stage, 1)
            found.setdefault(f"measure {kind}" if stage == "measure" else stage, []).append(value / runs)
    return {name: statistics.fmean(values) for name, values in found.items()}


def _probe(grid: Grid, todo: Plan, free: float) -> Cost:
    """One point of each kind, on `PROBED` sequences, in a temporary folder."""
    kinds = {p.kind: p for p in reversed(todo.left)}
    calibrate, text = grid.calibrate, grid.evaluate
    sampled = min(PROBED, calibrate.samples), min(PROBED, text.samples)
    small = grid.model_copy(
        update={
            "calibrate": calibrate.model_copy(update={"samples": sampled[0]}),
            "evaluate": text.model_copy(update={"samples": sampled[1], "skip": grid.skip}),
        }
    )
    seconds: dict[str, float] = {}
    progress.bars(False)
    try:
        for _ in range(2):  # compiled on the first, timed on the second
            with tempfile.TemporaryDirectory(prefix="kvcalib-probe-") as place:
                folder = SweepDir(Path(place) / "sweep")
                work = Work(small, folder)
                for kind, point in kinds.items():
                    work.measure(point)
                    for stage, value in work.seconds.items():
                        name = f"measure {kind}" if stage == "measure" else stage
                        seconds[name] = value / work.runs.get(stage, 1)
                tokens = [min(calibrate.keep_tokens, n * calibrate.seq_len) for n in (calibrate.samples, sampled[0])]
                scale = {"fisher": calibrate.samples / sampled[0], "fit-nuq": tokens[0] / tokens[1]}
                scale |= {f"measure {kind}": text.samples / sampled[1] for kind in kinds}
                sizes = _sizes(folder, tokens[0] / tokens[1])
                grown = sizes[0] - _sizes(folder, 1.0)[0]
                memory = peak_memory(input_device(work.model)) + grown
                del work
    finally:
        progress.bars(True)
    how = (
        f"probed: one point of each kind, calibrated on {sampled[0]} and measured on {sampled[1]} sequences, scaled to "
        f"{calibrate.samples} and {text.samples} (fisher, measuring: by sequences; fit-nuq, disk: by sampled tokens)"
    )
    scaled = {name: value * scale.get(name, 1.0) for name, value in seconds.items()}
    return Cost(scaled, memory, _disk(todo, *sizes), free, how)


def _sizes(folder: SweepDir, tokens: float) -> tuple[float, float, float]:
    """Bytes of a calibration with `tokens` times the sample that is there, of codebooks, and of an artifact."""
    runs, artifacts = folder.path / "runs", folder.path / "artifacts"
    calibrations = [p.stat().st_size for p in runs.glob(f"fisher-*/{CALIBRATION}")]
    codebooks = [
        sum(f.stat().st_size for f in p.rglob("*") if f.is_file() and f.name != CALIBRATION) for p in runs.glob("fit-*")
    ]
    built = [sum(f.stat().st_size for f in p.rglob("*") if f.is_file()) for p in artifacts.glob("*")]
    first, second, third = (statistics.fmean(sizes) if sizes else 0.0 for sizes in (calibrations, codebooks, built))
    return first * tokens, second, third


def _disk(todo: Plan, calibration: float, codebooks: float, artifact: float) -> float:
    """Bytes that what is left will take."""
    counts = {name: need.left for name, need in todo.stages.items()}
    built = counts.get("build", 0) + counts.get("tiers", 0)
    return counts.get("fisher", 0) * calibration + counts.get("fit-nuq", 0) * codebooks + built * artifact


def _existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
