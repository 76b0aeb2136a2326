"""What a sweep knows: one line of JSON per measured point, and who is measuring which.

A line is appended under a lock and is on disk before the lock is released. A process that is killed while it writes
leaves a torn last line, which readers pass over and the next writer cuts off. A claim is a lock on a file of the
point's key: the kernel gives it back when its process ends, however it ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvcalib.errors import CorruptFile, FolderInUse, InputError
from kvcalib.files import read_json, write_error, write_json

SWEEP_FORMAT = {"format": "kvcalib-sweep", "format_version": 1}


class Subject(BaseModel):
    """What was measured on; the points of one file agree in it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weights_sha256: str
    text_sha256: str
    dtype: str


class Measures(BaseModel):
    """Figures of one point; losses in nats per token, sizes in bytes of one sequence's cache."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    effective_bits: float = Field(description="16 x cache_bytes / fp16_cache_bytes: of all layers and all tokens.")
    cache_bytes: float
    fp16_cache_bytes: float
    tokens: int = Field(description="Scored.")
    nll: float
    fp16_nll: float
    delta_nll: float
    kld: float
    top1_agreement: float
    kept: float | None = Field(default=None, description="Tokens that a KV head holds at the end, where some go.")


class Record(BaseModel):
    """One line."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: str = Field(description="sha256 of `settings`.")
    name: str
    status: Literal["done", "failed"]
    settings: dict[str, Any]
    subject: Subject
    measures: Measures | None = None
    error: str | None = None
    seconds: dict[str, float] = Field(description="Of the stages that this point had to run, and of measuring it.")
    runs: dict[str, int] = Field(description="How often each of these stages ran.")
    memory: float = Field(description="Bytes at the process's peak so far: of the GPU, or resident.")
    machine: str
    device: str
    created: str = Field(description="UTC, ISO 8601.")


class Store:
    """The results in the JSONL file `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Record]:
        """The last line of every key, in the order of the file.

        Raises:
            CorruptFile: a line other than a torn last one is no result; names file and line.
        """
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read ({error.strerror}); give a file with --jsonl") from None
        found: dict[str, Record] = {}
        lines = content.split(b"\n")
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = Record.model_validate_json(line)
            except ValidationError as error:
                if number == len(lines):  # no newline behind it: the process was killed while it wrote
                    break
                first = error.errors()[0]
                where = ".".join(str(part) for part in first["loc"])
                raise CorruptFile(
                    f"{self.path}: line {number}: {where + ': ' if where else ''}{first['msg']}; delete the line, its "
                    "point is then measured again, or give another file with --jsonl"
                ) from None
            found.pop(record.key, None)
            found[record.key] = record
        return found

    def append(self, record: Record) -> None:
        """Write a line; it is on disk when this returns.

        Raises:
            InputError: the file cannot be written.
        """
        line = record.model_dump_json().encode() + b"\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                _mend(file)
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise write_error(self.path, error, len(line)) from error


def _mend(file: Any) -> None:
    """Cut off a torn last line; a whole one that only lacks its newline gets it."""
    size = file.seek(0, os.SEEK_END)
    if not size:
        return
    file.seek(0)
    tail = file.read().rpartition(b"\n")[2]
    if not tail:
        return
    try:
        json.loads(tail)
        file.write(b"\n")
    except ValueError:
        file.truncate(size - len(tail))
    file.seek(0, os.SEEK_END)


def _strangers(folder: Path) -> bool:
    """Whether `folder` holds anything but what a sweep that is just beginning has put there."""
    return any(p.name not in ("locks", "sweep.json") and not p.name.startswith(".sweep.json") for p in folder.iterdir())


@contextlib.contextmanager
def exclusive(path: Path, wait: bool = True) -> Iterator[bool]:
    """Whether this process alone holds `path` until the end of the block; with `wait` it waits until it does."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = open(path, "a")  # noqa: SIM115
    except OSError as error:
        raise write_error(path, error) from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


class SweepDir:
    """The folder of a sweep: calibrations and codebooks in `runs`, `artifacts`, locks, and the front.

    Raises:
        FolderInUse: it holds files that no sweep wrote. InputError: it cannot be made.
    """

    def __init__(self, path: Path, jsonl: Path | None = None, create: bool = True) -> None:
        self.path = path
        self.store = Store(jsonl or path / "results.jsonl")
        marker = path / "sweep.json"
        if marker.is_file():
            found = read_json(marker)
            if found != SWEEP_FORMAT:
                raise FolderInUse(f"{marker}: is {found}, expected {SWEEP_FORMAT}; another version wrote it")
            return
        if path.exists() and (not path.is_dir() or _strangers(path)):
            raise FolderInUse(f"{path}: is not empty and holds no sweep of kvcalib; choose another folder with --out")
        if create:
            with exclusive(path / "locks" / "sweep"):
                write_json(marker, SWEEP_FORMAT)

    def lock(self, name: str, wait: bool = True) -> contextlib.AbstractContextManager[bool]:
        """`exclusive` of something in this folder."""
        return exclusive(self.path / "locks" / name, wait)

    def run(self, name: str) -> Path:
        """The run folder of that name."""
        return self.path / "runs" / name

    def artifact(self, name: str) -> Path:
        """The folder of an artifact, or of adaptive widths."""
        return self.path / "artifacts" / name
