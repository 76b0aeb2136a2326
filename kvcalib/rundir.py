"""A run's folder: where each stage's output lies, what is up to date, and who may write.

    run.json                    what this folder is
    calibration.safetensors     `kvcalib fisher`
    codebooks.safetensors       `kvcalib fit-nuq`
    friendliness.json           `kvcalib friendliness`
    friendliness.svg            its plot
    allocation.safetensors      `kvcalib allocate`
    allocation.svg              its plot
    kl.jsonl                    measurements of `kvcalib allocate --method kl`, one a line
    stages/NAME.json            the settings and inputs a stage ran with, and the hash of what it wrote

A stage whose recorded settings are the same is up to date and skipped.
"""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvcalib.errors import CorruptFile, FolderInUse, InputError
from kvcalib.files import hash_file, read_json, write_error, write_json
from kvcalib.model.identity import hash_json

RUN_FORMAT = {"format": "kvcalib-run", "format_version": 1}
CALIBRATION, PARTIAL, CODEBOOKS = "calibration.safetensors", "calibration.partial.safetensors", "codebooks.safetensors"
FRIENDLINESS, FRIENDLINESS_PLOT = "friendliness.json", "friendliness.svg"
ALLOCATION = "allocation.safetensors"
ALLOCATION_PLOT, KL_MEASURES = "allocation.svg", "kl.jsonl"


class RunDir:
    """The folder `path` of one run.

    Raises:
        FolderInUse: it holds files that no run of kvcalib wrote.
        InputError: `create` is False and there is no run, or the folder cannot be made.
    """

    def __init__(self, path: Path | str, create: bool = False) -> None:
        self.path = Path(path)
        marker = self.path / "run.json"
        if not marker.is_file():
            if not create:
                raise InputError(
                    f"{self.path}: no run there (no run.json); start one with `kvcalib fisher MODEL --run DIR`"
                )
            self.check_free(self.path)
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise write_error(self.path, error) from error
            write_json(marker, RUN_FORMAT)
        found = read_json(marker)
        if found != RUN_FORMAT:
            raise FolderInUse(
                f"{marker}: is {found}, expected {RUN_FORMAT}; it was written by another version or program"
            )

    @staticmethod
    def check_free(path: Path) -> None:
        """FolderInUse if `path` holds files that no run of kvcalib wrote; a run may be there, or nothing."""
        if (path / "run.json").is_file() or not path.exists():
            return
        if not path.is_dir() or any(path.iterdir()):
            raise FolderInUse(f"{path}: is not empty and holds no run of kvcalib; choose another folder")

    def file(self, name: str) -> Path:
        """Path of one of the run's files."""
        return self.path / name

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Only one process may write; FolderInUse for the second."""
        try:
            handle = open(self.path / ".lock", "w")  # noqa: SIM115
        except OSError as error:
            raise write_error(self.path / ".lock", error) from error
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise FolderInUse(f"{self.path}: another kvcalib process is working in this run; wait for it") from None
            try:
                yield
            finally:
                (self.path / ".lock").unlink(missing_ok=True)

    def record(self, stage: str) -> dict[str, Any] | None:
        """What `stage` ran with, or None if it has not run."""
        path = self.path / "stages" / f"{stage}.json"
        if not path.is_file():
            return None
        record = read_json(path)
        for field in ("settings", "outputs"):
            if not (isinstance(record, dict) and isinstance(record.get(field), dict)):
                raise CorruptFile(
                    f"{path}: field {field!r} is missing or no object; delete the file to run the stage again"
                )
        return record

    def settings(self, stage: str) -> dict[str, Any]:
        """The settings `stage` ran with; InputError that names the missing command if it has not run."""
        record = self.record(stage)
        if record is None:
            raise InputError(
                f"{self.path}: stage {stage!r} has not run; run `kvcalib {stage} ...` on this folder first"
            )
        return record["settings"]

    def up_to_date(self, stage: str, settings: dict[str, Any]) -> bool:
        """Whether `stage` ran with exactly `settings` and its output is still what it wrote."""
        record = self.record(stage)
        if record is None or record["settings"] != settings:
            return False
        return all(
            (self.path / name).is_file() and hash_file(self.path / name) == digest
            for name, digest in record["outputs"].items()
        )

    def refuse_other(self, stage: str, settings: dict[str, Any]) -> None:
        """FolderInUse, naming the first setting that differs, if `stage` ran with other settings."""
        record = self.record(stage)
        if record is None or record["settings"] == settings:
            return
        old = record["settings"]
        name = next(k for k in sorted(set(old) | set(settings)) if old.get(k) != settings.get(k))
        raise FolderInUse(
            f"{self.path}: holds another run: {stage} ran with {name}={old.get(name)!r}, now {settings.get(name)!r}; "
            "choose another folder, or pass --overwrite"
        )

    def finish(self, stage: str, settings: dict[str, Any], outputs: list[str]) -> None:
        """Record that `stage` wrote `outputs` with `settings`."""
        digests = {name: hash_file(self.path / name) for name in outputs}
        write_json(self.path / "stages" / f"{stage}.json", {"settings": settings, "outputs": digests})


def fingerprint(settings: dict[str, Any]) -> str:
    """sha256 of a stage's settings."""
    return hash_json(settings)
