"""What a sweep knows: one line of JSON per measured point (`ledger.py`), and who is measuring which.

A claim is a lock on a file of the point's key: the kernel gives it back when its process ends, however it ends.
"""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvcalib.errors import FolderInUse
from kvcalib.files import read_json, write_error, write_json
from kvcalib.stages.ledger import Ledger

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
        again = "delete the line, its point is then measured again, or give another file with --jsonl"
        self._ledger = Ledger(path, again)

    def read(self) -> dict[str, Record]:
        """The last line of every key, in the order of the file.

        Raises:
            CorruptFile: a line other than a torn last one is no result; names file and line.
        """
        found: dict[str, Record] = {}
        for number, line in self._ledger.lines():
            try:
                record = Record.model_validate_json(line)
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(str(part) for part in first["loc"])
                raise self._ledger.damaged(number, f"{where + ': ' if where else ''}{first['msg']}") from None
            found.pop(record.key, None)
            found[record.key] = record
        return found

    def append(self, record: Record) -> None:
        """Write a line; it is on disk when this returns.

        Raises:
            InputError: the file cannot be written.
        """
        self._ledger.append([record.model_dump(mode="json")])


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
