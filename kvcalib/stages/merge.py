"""Stage `merge`: the calibrations of several runs to a new run whose stage `fisher` is done.

The runs may come from machines that never met. The sums are added exactly, so the tensors are those, bit by bit, of one
run over all of the text, if that run's batches are theirs. A sequence that two of them have would count twice and is
refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvcalib.calibration.merging import Merger
from kvcalib.calibration.statistics import VERSION, Calibration, CalibrationInfo
from kvcalib.errors import InputError
from kvcalib.rundir import CALIBRATION, RunDir
from kvcalib.stages.progress import note


def run(sources: Sequence[Path], out: Path, overwrite: bool = False) -> Calibration:
    """Merge `sources`, run folders or calibration files, into the run `out`.

    Raises:
        InputError: fewer than two are given, one has no calibration, or they do not go together. FolderInUse: `out`
            holds something else.
    """
    if len(sources) < 2:
        raise InputError(f"merge: {len(sources)} run is given, expected two or more")
    files = [_file(source) for source in sources]
    if any(out.resolve() == source.resolve() for source in sources):
        raise InputError(f"merge: --out {out} is one of the runs to merge; choose another folder")
    RunDir.check_free(out)
    merger = Merger.of(files)
    recorded = _recorded(merger.info)
    run_dir = RunDir(out, create=True)
    with run_dir.lock():
        if run_dir.up_to_date("fisher", recorded):
            note("merge: up to date")
        else:
            if not overwrite:
                run_dir.refuse_other("fisher", recorded)
            merger.write(run_dir.output("fisher", CALIBRATION))
            run_dir.finish("fisher", recorded, [CALIBRATION])
            run_dir.drop_parts("fisher")
    return Calibration.load(run_dir.file(CALIBRATION))[0]


def _file(source: Path) -> Path:
    """The calibration file of a run, or the file that is given."""
    if not source.is_dir():
        return source
    run_dir = RunDir(source)
    run_dir.settings("fisher")
    return run_dir.file(CALIBRATION)


def _recorded(info: CalibrationInfo) -> dict[str, Any]:
    """What the new run's stage `fisher` ran with, so to say: no command has these settings."""
    names = ("merged", "data", "seq_len", "keep_tokens", "window", "seed")
    return {
        **info.model_dump(mode="json", include=set(names)),
        "samples": info.sequences,
        "model": info.model.name,
        "weights_sha256": info.model.weights_sha256,
        "rope_parameters_sha256": info.model.rope_parameters_sha256,
        "stage_version": VERSION,
    }
