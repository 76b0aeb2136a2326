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
    staged/NAME/                what a stage has just finished, on its way to the places above

A stage whose recorded settings are the same is up to date and skipped.

A stage's files and its record belong together, and no system call renames several files at once. So they are written to
`staged/NAME/`, the record last: with `record.json` the folder is complete, and from then on the stage counts as
finished. What is there is moved into place at once, or, if the process is killed before or meanwhile, by the next one.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvcalib.errors import CorruptFile, FolderInUse, InputError, KvcalibError
from kvcalib.files import hash_file, is_at, leftovers, read_json, remove_leftovers, sync_folder, write_error, write_json
from kvcalib.model.identity import hash_json
from kvcalib.untrusted import shown

RUN_FORMAT = {"format": "kvcalib-run", "format_version": 1}
CALIBRATION, CODEBOOKS = "calibration.safetensors", "codebooks.safetensors"
FRIENDLINESS, FRIENDLINESS_PLOT = "friendliness.json", "friendliness.svg"
ALLOCATION = "allocation.safetensors"
ALLOCATION_PLOT, KL_MEASURES = "allocation.svg", "kl.jsonl"
RECORD = "record.json"
_HELD: set[tuple[int, Path]] = set()
"""Locks that this process holds as the only writer."""
OLD = 3600.0
"""Seconds after which a sign of a launch has lost its process."""


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
        self._settle()

    @staticmethod
    def check_free(path: Path) -> None:
        """FolderInUse if `path` holds files that no run of kvcalib wrote; a run may be there, or nothing."""
        if (path / "run.json").is_file() or not path.exists():
            return
        # A process that was killed while it began a run has left no more than a part of its marker.
        if not path.is_dir() or set(path.iterdir()) - set(leftovers(path, "run.json")):
            raise FolderInUse(f"{path}: is not empty and holds no run of kvcalib; choose another folder")

    def file(self, name: str) -> Path:
        """Path of one of the run's files."""
        return self.path / name

    @contextlib.contextmanager
    def lock(self, shared: bool = False) -> Iterator[None]:
        """Only one process, or launch, may write; FolderInUse for the second, and for readers.

        What a killed process was writing is removed, or moved into place if it was complete: whoever holds the lock is
        alone. The kernel gives the lock back when its holder ends, however it ends.

        Args:
            shared: for reading several files that belong together; there may be many readers, and no writer but this
                process itself.
        """
        path = self.path / ".lock"
        held = (os.getpid(), path.resolve())
        if shared and held in _HELD:
            yield
            return
        self._settle()
        try:
            handle = _locked(path, shared)
        except BlockingIOError:
            raise FolderInUse(f"{self.path}: another kvcalib process is working in this run; wait for it") from None
        except OSError as error:
            if not shared:
                raise write_error(path, error) from error
            handle = None  # who cannot write here cannot lock it either, and hardly anybody else writes
        try:
            if not shared:
                _HELD.add(held)
                self._recover()
            yield
        finally:
            if handle is not None:
                if not shared:
                    _HELD.discard(held)
                    with contextlib.suppress(KvcalibError):  # what did not fit onto the disk shall not fill it
                        self._recover()
                _unlock(handle, path)

    def _settle(self) -> None:
        """Move into place what a killed process finished, if nobody is at work here."""
        if not (self.path / "staged").is_dir():
            return
        path = self.path / ".lock"
        with contextlib.suppress(OSError):
            handle = _locked(path, shared=False, patience=0)
            try:
                self._recover()
            finally:
                _unlock(handle, path)

    def _recover(self) -> None:
        """Finish or remove what a killed process was at; the lock is held."""
        remove_leftovers(self.path)
        remove_leftovers(self.path / "stages")
        for sign in self.path.glob(".launch-*"):  # `launch.disks` needs them for a moment
            with contextlib.suppress(OSError):
                if time.time() - sign.stat().st_mtime > OLD:
                    sign.unlink()
        try:
            for folder in _folders(self.path / "staged"):
                if (folder / RECORD).is_file():
                    self._put(folder)
                else:
                    shutil.rmtree(folder)
            for folder in _folders(self.path / "parts"):
                marker, record = folder / "settings.json", self.path / "stages" / f"{folder.name}.json"
                if not marker.is_file() or (
                    record.is_file() and read_json(marker) == self.settings(folder.name)  # finished, not yet removed
                ):
                    self.drop_parts(folder.name)
        except OSError as error:
            raise write_error(self.path, error) from error
        for name in ("staged", "parts"):
            with contextlib.suppress(OSError):
                (self.path / name).rmdir()

    def output(self, stage: str, name: str) -> Path:
        """Where `stage` writes its file `name`; `finish` moves it to its place together with the record."""
        return self.path / "staged" / stage / name

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

    def output_hash(self, stage: str, name: str) -> str:
        """sha256 of a stage's file, as recorded; "None" if the stage has not run or wrote no such file."""
        return str((self.record(stage) or {}).get("outputs", {}).get(name))

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
        """Record that `stage` wrote `outputs` with `settings`: all of it is there afterwards, or nothing.

        Args:
            outputs: names in the run's folder, each written to `output(stage, name)`, or in place already.

        Raises:
            NotWritable: the record cannot be written; the files of the run are as they were.
        """
        staged = {name: self.output(stage, name) for name in outputs}
        digests = {name: hash_file(path if path.is_file() else self.path / name) for name, path in staged.items()}
        folder = self.path / "staged" / stage
        write_json(folder / RECORD, {"settings": settings, "outputs": digests})
        try:
            self._put(folder)
        except OSError as error:
            raise write_error(folder, error) from error

    def _put(self, folder: Path) -> None:
        """Move a stage's finished files to their places, its record last."""
        record = self.path / "stages" / f"{folder.name}.json"
        record.parent.mkdir(exist_ok=True)
        for path in sorted(folder.iterdir()):
            if path.name != RECORD:
                os.replace(path, self.path / path.name)
        sync_folder(self.path)
        os.replace(folder / RECORD, record)
        sync_folder(record.parent)
        folder.rmdir()
        with contextlib.suppress(OSError):  # another stage's files are there
            folder.parent.rmdir()


def _locked(path: Path, shared: bool, patience: int = 10) -> int:
    """The descriptor of `path`, made if it is not there, and locked; BlockingIOError if another process has it.

    Args:
        patience: hundredths of a second to try for: readers that leave hold it alone for a moment.
    """
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            # Whoever held it before may have removed the file that was locked here: then it keeps nobody out.
            if is_at(handle, path):
                return handle
        except BlockingIOError:
            if not patience:
                os.close(handle)
                raise
            patience -= 1
            time.sleep(0.01)
        os.close(handle)


def _unlock(handle: int, path: Path) -> None:
    """Give a lock back; the last one takes the file away."""
    with contextlib.suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if is_at(handle, path):
            path.unlink()
    os.close(handle)


def _folders(parent: Path) -> list[Path]:
    return sorted(path for path in parent.iterdir() if path.is_dir()) if parent.is_dir() else []


def difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The first setting in which `new` differs from `old`, in words."""
    name = next(k for k in sorted(set(old) | set(new)) if old.get(k) != new.get(k))
    return f"{name}={old.get(name)!r}, now {new.get(name)!r}"


def fingerprint(settings: dict[str, Any]) -> str:
    """sha256 of a stage's settings."""
    return hash_json(settings)
