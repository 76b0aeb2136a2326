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
    parts/NAME/                 what a stage has done so far, and the settings it is for; gone when it is finished

A stage whose recorded settings are the same is up to date and skipped.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvcalib.errors import CorruptFile, FolderInUse, InputError
from kvcalib.files import hash_file, read_json, remove_leftovers, write_error, write_json
from kvcalib.model.identity import hash_json
from kvcalib.untrusted import shown

RUN_FORMAT = {"format": "kvcalib-run", "format_version": 1}
CALIBRATION, CODEBOOKS = "calibration.safetensors", "codebooks.safetensors"
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
                f"{marker}: is {shown(found)}, expected {RUN_FORMAT}; it was written by another version or program"
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
        """Only one process, or launch, may write; FolderInUse for the second.

        What a killed process was writing is removed: whoever holds the lock is alone.
        """
        path = self.path / ".lock"
        while True:
            try:
                handle = open(path, "w")  # noqa: SIM115
            except OSError as error:
                raise write_error(path, error) from error
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                handle.close()
                raise FolderInUse(f"{self.path}: another kvcalib process is working in this run; wait for it") from None
            # Whoever held it before may have removed the file that was locked here: then it keeps nobody out.
            if path.exists() and os.path.samestat(os.fstat(handle.fileno()), path.stat()):
                break
            handle.close()
        with handle:
            remove_leftovers(self.path)
            remove_leftovers(self.path / "stages")
            try:
                yield
            finally:
                path.unlink(missing_ok=True)

    def parts(self, stage: str, settings: dict[str, Any], discard: bool = False) -> Path:
        """The folder in which `stage` keeps what it has done so far with `settings`, made if there is none.

        Args:
            discard: what was done with other settings is removed, not refused.

        Raises:
            FolderInUse: it was left by a run with other settings; names the first that differs.
        """
        folder = self.path / "parts" / stage
        marker = folder / "settings.json"
        try:
            found = read_json(marker) if marker.is_file() else None
        except CorruptFile:
            found = None
        if found is not None and found != settings and not discard:
            raise FolderInUse(
                f"{self.path}: holds an unfinished run: {stage} was started with {difference(found, settings)}; start "
                "it with the same settings to go on, choose another folder, or pass --overwrite to begin anew"
            )
        if found != settings:
            self.drop_parts(stage)
            write_json(marker, settings)
        return folder

    def drop_parts(self, stage: str) -> None:
        """Remove what `stage` kept of its work in progress."""
        folder = self.path / "parts" / stage
        try:
            (folder / "settings.json").unlink(missing_ok=True)  # first: without it the rest is nothing
            shutil.rmtree(folder)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise write_error(folder, error) from error
        with contextlib.suppress(OSError):  # other stages' parts are there
            folder.parent.rmdir()

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
        for name in record["outputs"]:
            if Path(name).name != name or name == "..":
                raise CorruptFile(
                    f"{path}: outputs names {shown(name)}, expected files of the run; delete it to run the stage again"
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
        raise FolderInUse(
            f"{self.path}: holds another run: {stage} ran with {difference(record['settings'], settings)}; choose "
            "another folder, or pass --overwrite"
        )

    def finish(self, stage: str, settings: dict[str, Any], outputs: list[str]) -> None:
        """Record that `stage` wrote `outputs` with `settings`."""
        digests = {name: hash_file(self.path / name) for name in outputs}
        write_json(self.path / "stages" / f"{stage}.json", {"settings": settings, "outputs": digests})


def difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The first setting in which `new` differs from `old`, in words."""
    name = next(k for k in sorted(set(old) | set(new)) if old.get(k) != new.get(k))
    return f"{name}={old.get(name)!r}, now {new.get(name)!r}"


def fingerprint(settings: dict[str, Any]) -> str:
    """sha256 of a stage's settings."""
    return hash_json(settings)
