"""Stage `report`: a run, its artifacts and their measures to one HTML file.

Given a run, the report is of the artifact beside it that was built last in size: the one of the smallest budget. Given
an artifact, its run is looked for beside it. Both belong together if they name the same calibration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kvcalib import __version__
from kvcalib.artifact import store
from kvcalib.artifact.manifest import Manifest
from kvcalib.calibration.statistics import READABLE, Calibration, CalibrationInfo
from kvcalib.calibration.validate import read_info
from kvcalib.errors import CorruptFile, InputError, KvcalibError
from kvcalib.evaluation.comparison import Comparison
from kvcalib.evaluation.perplexity import Evaluation
from kvcalib.files import read_json, read_tensors, write_bytes
from kvcalib.model.footprint import Footprint, footprint
from kvcalib.report.data import Density, Measurement, Predicted, Report, SweepPoint
from kvcalib.report.document import document
from kvcalib.rundir import CALIBRATION, RunDir
from kvcalib.runtime.loader import load
from kvcalib.stages import report_data as data
from kvcalib.stages.progress import note
from kvcalib.stages.sweep_store import Store

EVALUATIONS = "eval.json"


@dataclass(frozen=True)
class Subject:
    """What a report is of: a run, its artifact and the others of the same calibration, smallest first."""

    run: RunDir | None
    artifact: Path | None
    others: Sequence[Path] = ()


def run(
    target: str | Path,
    out: Path | None = None,
    comparisons: Sequence[Path] = (),
    sweep: Path | None = None,
    model: str | None = None,
) -> Path:
    """Write the report of a run or an artifact; returns where it is: `TARGET.html` beside it unless `out` says.

    Args:
        comparisons: files that `kvcalib eval --compare ... --json` wrote. Without any, the run's own measures.
        sweep: the results of `kvcalib sweep`.
        model: folder or Hub id of the model, whose config says how large its weights are; default: the one named.

    Raises:
        InputError: there is neither a run nor an artifact, or a file is missing. CorruptFile: a file is damaged, or
            is not what it should be.
    """
    folder = Path(target)
    # Of an artifact on the Hub there is no folder to write beside.
    path = out or (beside(folder) if folder.exists() else Path(folder.name + ".html"))
    if path.is_dir():
        raise InputError(f"--out {path}: is a folder, expected a file such as report.html")
    return write(find(target), path, comparisons, sweep, model)


def write(
    subject: Subject,
    path: Path,
    comparisons: Sequence[Path] = (),
    sweep: Path | None = None,
    model: str | None = None,
) -> Path:
    """The same of what was found, to `path`; what lies there is replaced."""
    write_bytes(path, document(gather(subject, comparisons, sweep, model), __version__).encode())
    return path


def beside(folder: Path) -> Path:
    """`NAME.html` beside a folder, which need not be there yet."""
    whole = folder.resolve()
    return (folder.parent if folder.name == whole.name else whole.parent) / (whole.name + ".html")


def find(target: str | Path) -> Subject:
    """The run and the artifacts that `target` and its neighbours are; an artifact may be on the Hub."""
    folder = Path(target)
    if (folder / "run.json").is_file():
        run_dir = RunDir(folder)
        fingerprint = _calibration(run_dir).fingerprint
        artifacts = _artifacts(folder, fingerprint)
        return Subject(run_dir, artifacts[0] if artifacts else None, artifacts[1:])
    if folder.is_dir() and not (folder / store.MANIFEST).is_file():
        raise InputError(
            f"{folder}: holds neither a run (run.json) nor an artifact ({store.MANIFEST}); give the folder of one, as "
            "kvcalib fisher --run or kvcalib build --out wrote it"
        )
    if not folder.is_dir():
        return Subject(None, load(target).path)
    fingerprint = store.read_manifest(folder).calibration.fingerprint
    others = [path for path in _artifacts(folder, fingerprint) if path.resolve() != folder.resolve()]
    for candidate in (folder.with_name(folder.name + ".run"), *_neighbours(folder)):
        if (candidate / CALIBRATION).is_file() and (candidate / "run.json").is_file():
            run_dir = RunDir(candidate)
            if _calibration(run_dir).fingerprint == fingerprint:
                return Subject(run_dir, folder, others)
    return Subject(None, folder, others)


def gather(
    subject: Subject, comparisons: Sequence[Path] = (), sweep: Path | None = None, model: str | None = None
) -> Report:
    """The numbers of a report."""
    artifact = None if subject.artifact is None else load(subject.artifact)
    info = None if subject.run is None else _calibration(subject.run)
    compared = [read_comparison(path) for path in comparisons]
    measurements = [data.from_comparison(c) for c in compared]
    if not measurements and subject.run is not None:
        measurements = _own_measures(subject)
    manifest = None if artifact is None else artifact.manifest
    name = manifest.model.name if manifest else info.model.name if info else ""
    densities, rule = list[Density](), ""
    if artifact is not None and subject.run is not None:
        densities, rule = data.densities(artifact, Calibration.load(subject.run.file(CALIBRATION))[0])
    return Report(
        model=name,
        artifact=None if artifact is None or artifact.path is None else artifact.path.name,
        budget=manifest.budget.asked if manifest and manifest.budget else None,
        layers=[] if artifact is None else data.layers(artifact),
        densities=densities,
        densities_rule=rule,
        predicted=_predicted(subject, measurements),
        measurements=measurements,
        memory=None if artifact is None else data.memory(artifact, _footprint(subject, name, model)),
        sweep=[] if sweep is None else read_sweep(sweep),
        provenance=data.provenance(manifest, info, measurements),
        created=max((c.created for c in compared), default=None),
    )


def read_comparison(path: Path) -> Comparison:
    """The comparison in a file; CorruptFile if it is none."""
    found = read_json(path)
    if not isinstance(found, dict) or found.get("format") != "kvcalib-comparison":
        raise CorruptFile(
            f"{path}: field 'format' is missing or not 'kvcalib-comparison'; give what "
            "`kvcalib eval ARTIFACT --compare fp16,... --json FILE` wrote"
        )
    try:
        return Comparison.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CorruptFile(f"{path}: {where} is {first['input']!r}: {first['msg']}; measure again") from None


def read_sweep(path: Path) -> list[SweepPoint]:
    """The measured points of a sweep; those that failed are left out.

    Raises:
        InputError: there is no such file. CorruptFile: it holds something else.
    """
    if not path.is_file():
        raise InputError(f"{path}: not found; give the JSONL file that kvcalib sweep wrote")
    found = ((record.name, record.measures) for record in Store(path).read().values())
    return [SweepPoint(name, m.effective_bits, m.kld, m.delta_nll) for name, m in found if m is not None]


def _own_measures(subject: Subject) -> list[Measurement]:
    """What `demo`, `run` or `eval --json RUN/eval.json` left in the run."""
    assert subject.run is not None
    path = subject.run.file(EVALUATIONS)
    if not path.is_file():
        return []
    found: Any = read_json(path)
    rows = found if isinstance(found, list) else [found]
    try:
        evaluations = [Evaluation.model_validate(row) for row in rows]
    except ValidationError as error:
        first = error.errors()[0]
        raise CorruptFile(
            f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}; run kvcalib eval again"
        ) from None
    return data.from_evaluations(evaluations)


def _predicted(subject: Subject, measurements: Sequence[Measurement]) -> list[Predicted]:
    """Of all artifacts at hand those that were measured, each where it was measured first."""
    paths = [path for path in (subject.artifact, *subject.others) if path is not None]
    manifests = {path.name: store.read_manifest(path) for path in paths}
    found: dict[str, Predicted] = {}
    for contender in (c for where in measurements for c in where.contenders):
        manifest = manifests.get(contender.name)
        if manifest is None or not contender.ours or contender.failed or contender.name in found:
            continue
        loss = sum(layer.key.predicted_loss + layer.value.predicted_loss for layer in manifest.layers)
        found[contender.name] = Predicted(
            contender.name, contender.bits, loss, contender.kld.value, contender.delta_nll.value
        )
    return sorted(found.values(), key=lambda p: p.bits)


def _footprint(subject: Subject, name: str, given: str | None) -> Footprint | None:
    """The size of the model that is given or that the run names; None, and a note, where its config is not at hand."""
    if given is not None:
        return footprint(given)
    record = None if subject.run is None else subject.run.record("fisher")
    known = name if record is None else str(record["settings"].get("model", name))
    try:
        return footprint(known, network=False)
    except KvcalibError:
        note(f"report: the config of {known!r} is not at hand, its weights are not counted; give it with --model")
        return None


def _calibration(run_dir: RunDir) -> CalibrationInfo:
    """What the run's calibration says of itself, its tensors left on disk."""
    path = run_dir.file(CALIBRATION)
    if not path.is_file():
        raise InputError(f"{run_dir.path}: no {CALIBRATION} there; run `kvcalib fisher MODEL --run {run_dir.path}`")
    return read_info(path, read_tensors(path, [])[1], CalibrationInfo, READABLE)


def _neighbours(folder: Path) -> list[Path]:
    parent = folder.resolve().parent
    return sorted(path for path in parent.iterdir() if path.is_dir() and not path.name.startswith("."))


def _artifacts(folder: Path, fingerprint: str) -> list[Path]:
    """The artifacts beside `folder` of that calibration, smallest first."""
    found: list[tuple[float, str, Path]] = []
    for path in _neighbours(folder):
        if not (path / store.MANIFEST).is_file():
            continue
        try:
            manifest = store.read_manifest(path)
        except KvcalibError:
            continue  # not what was asked about
        if manifest.calibration.fingerprint == fingerprint:
            found.append((_size(manifest), path.name, path))
    return [path for _, _, path in sorted(found)]


def _size(manifest: Manifest) -> float:
    key, value = manifest.mean_bits
    return manifest.budget.planned if manifest.budget else (key + value) / 2
