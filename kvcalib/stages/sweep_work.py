"""What one process of a sweep does for a point: the stages that it shares with other points, then the measuring.

A calibration, a set of codebooks and an artifact are made once for all points that need them, by whichever process
needs them first; the others wait at a lock.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from kvcalib.artifact.store import MANIFEST
from kvcalib.evaluation.baselines import CALIBRATES, find
from kvcalib.evaluation.contender import ArtifactContender, Contender
from kvcalib.evaluation.ways import AdaptiveContender, Figures, Reading, effective_bits
from kvcalib.files import write_error
from kvcalib.model.identity import identify
from kvcalib.model.loading import load_tokenizer
from kvcalib.model.text import token_sequences
from kvcalib.rundir import CALIBRATION, RunDir
from kvcalib.runtime.loader import Prefill, load
from kvcalib.runtime.tiers import RULE, load_adaptive
from kvcalib.stages import allocate, build, calibrated, fisher, fit_nuq, tiers
from kvcalib.stages.dial import budget_of
from kvcalib.stages.fisher import check_vocabulary
from kvcalib.stages.progress import note
from kvcalib.stages.sweep_grid import Grid, Names, Point
from kvcalib.stages.sweep_store import Measures, Subject, SweepDir


class Work:
    """Model and text of a grid, loaded once, and the sweep's folder.

    Args:
        device: in place of the grid's, for this process.
        process: its number among those of this machine, and how many they are, where no launcher says so.

    Raises:
        InputError, UnsupportedModel: the model or the text cannot be had.
    """

    def __init__(
        self, grid: Grid, folder: SweepDir, device: str | None = None, process: tuple[int, int] | None = None
    ) -> None:
        self.grid, self.folder = grid, folder
        given, text = grid.calibrate, grid.evaluate
        tokenizer = load_tokenizer(grid.model, given.revision, given.trust_remote_code)
        self.sequences: np.ndarray = token_sequences(
            text.data, tokenizer, text.samples, text.seq_len, "evaluate", text.seed, grid.skip
        )
        if len(self.sequences) < text.samples:
            note(f"sweep: data {text.data!r} gives {len(self.sequences)} sequences, not {text.samples}")
        self.model: Any = given.load(grid.model, device, process)
        check_vocabulary(self.model, self.sequences, text.data)
        self.reading = Reading(
            self.model, self.sequences, grid.step, grid.prompt, text.batch_size or max(1, 2048 // text.seq_len)
        )
        self.subject = Subject(
            weights_sha256=identify(self.model).weights_sha256,
            text_sha256=hashlib.sha256(self.sequences.astype("<i8").tobytes()).hexdigest(),
            dtype=str(self.model.dtype).removeprefix("torch."),
        )
        self.seconds: dict[str, float] = {}
        self.runs: dict[str, int] = {}

    def measure(self, point: Point) -> Measures:
        """Figures of a point; `seconds` and `runs` say how long and how often each stage ran for it.

        Raises:
            KvcalibError: a stage refuses the point's settings, as a budget that no plan meets.
        """
        self.seconds, self.runs = {}, {}
        contender = self.contender(point)
        with self._timed("measure"):
            found = self.reading.measure(contender)
        return _measures(found)

    def contender(self, point: Point) -> Contender:
        """What the point measures, made if it is not there."""
        if point.baseline is not None:
            return self._baseline(point.baseline)
        settings = self.grid.settings(point)
        names = self.grid.names(point)
        built = {bits: self.artifact(point, names, bits) for bits in names.built}
        recent = settings.recent_tokens
        if names.mixed is None:
            eviction = settings.evictions[0] if settings.evictions else None
            prefill: Prefill = "exact" if self.grid.way == "steps" else "quantized"
            return ArtifactContender(load(built[point.bits or 0.0]), None, None, recent, prefill, eviction)
        path = self.folder.artifact(names.mixed)
        with self.folder.lock(names.mixed):
            if not (path / RULE).is_file():
                with self._timed("tiers"):
                    chosen = tiers.TierSettings(budget=point.bits or 0.0)
                    tiers.run(RunDir(self.folder.run(names.fitted)), list(built.values()), path, chosen)
        return AdaptiveContender(load(built[min(built)]), load_adaptive(path), recent)

    def artifact(self, point: Point, names: Names, bits: float) -> Any:
        """The folder of an artifact of the point's settings at so many bits."""
        path = self.folder.artifact(names.built[bits])
        if (path / MANIFEST).is_file():
            return path
        run_dir = self.codebooks(point, names)
        # The widths lie in the run's folder, so one artifact of it is made at a time.
        with self.folder.lock(names.fitted):
            if not (path / MANIFEST).is_file():
                with self._timed("build"):
                    found, widths = allocate.run(run_dir, point.spending(bits))
                    build.run(run_dir, path, widths=widths, budget=budget_of(found), options=found.options)
        return path

    def codebooks(self, point: Point, names: Names) -> RunDir:
        """The run folder whose `fit-nuq` has the point's settings."""
        source = self.calibration(point, names)
        with self.folder.lock(names.fitted):
            run_dir = RunDir(self.folder.run(names.fitted), create=True)
            if run_dir.record("fit-nuq") is None:
                _share(source, run_dir)
                with self._timed("fit-nuq"):
                    fit_nuq.run(run_dir, point.fit())
        return run_dir

    def calibration(self, point: Point, names: Names) -> RunDir:
        """The run folder with the point's calibration."""
        with self.folder.lock(names.calibrated):
            run_dir = RunDir(self.folder.run(names.calibrated), create=True)
            if run_dir.record("fisher") is None:
                with self._timed("fisher"):
                    fisher.run(run_dir, self.grid.model, self.grid.fisher(point), model=self.model)
        return run_dir

    def _baseline(self, spec: str) -> Contender:
        sample = None
        if calibrates(spec):
            # Of this point only the calibration is used, which is the grid's.
            point = Point(baseline=spec, window=self.grid.calibrate.window)
            sample = calibrated.read(self.calibration(point, self.grid.names(point)))
        return find(spec, sample)

    @contextlib.contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - began
        self.runs[stage] = self.runs.get(stage, 0) + 1


def _share(source: RunDir, target: RunDir) -> None:
    """The calibration of one run in another: the same file under two names where the disk can do that."""
    path = target.output("fisher", CALIBRATION)
    with target.lock():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source.file(CALIBRATION), path)
            except OSError:
                shutil.copyfile(source.file(CALIBRATION), path)
        except OSError as error:
            raise write_error(path, error) from error
        target.finish("fisher", source.settings("fisher"), [CALIBRATION])


def _measures(found: Figures) -> Measures:
    return Measures(
        effective_bits=effective_bits(found),
        cache_bytes=found.cache_bytes,
        fp16_cache_bytes=found.fp16_cache_bytes,
        tokens=found.tokens,
        nll=found.nll,
        fp16_nll=found.fp16_nll,
        delta_nll=found.nll - found.fp16_nll,
        kld=found.kld,
        top1_agreement=found.top1_agreement,
        kept=found.kept,
    )


def calibrates(spec: str) -> bool:
    """Whether a baseline is fitted to a calibration."""
    return spec.split(":")[0] in CALIBRATES


def machine(device: torch.device) -> str:
    """Where something was timed: host, processor count and device."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return f"{platform.node()}, {os.cpu_count()} CPUs, {name}"


def peak_memory(device: torch.device) -> float:
    """Bytes at this process's peak: of the GPU where it computes on one, else resident."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return float(unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
