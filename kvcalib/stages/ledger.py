"""Measurements that survive kill -9: one line of JSON each, only ever added to.

A line is appended under a lock, so that several processes may write one file, and is on the disk when `append` returns.
A process that is killed while it writes leaves a torn last line, which readers pass over and the next writer cuts off.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from kvcalib.errors import CorruptFile, InputError
from kvcalib.files import write_error


class Ledger:
    """The lines of the file `path`.

    Args:
        remedy: what to do about a damaged line, the end of its error's message.
    """

    def __init__(self, path: Path, remedy: str = "delete the line, it is then measured again") -> None:
        self.path, self.remedy = path, remedy

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Number and content of every whole line.

        Raises:
            InputError: there is a file that cannot be read.
        """
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read ({error.strerror}); name another file") from None
        *whole, last = content.split(b"\n")
        for number, line in enumerate(whole, 1):
            if line.strip():
                yield number, line
        if last.strip() and _is_json(last):  # it only lacks its newline
            yield len(whole) + 1, last

    def rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Number and object of every whole line.

        Raises:
            CorruptFile: a line is no JSON object; names file and line.
        """
        for number, line in self.lines():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise self.damaged(number, f"not valid JSON ({error})") from None
            if not isinstance(row, dict):
                raise self.damaged(number, f"is {type(row).__name__}, expected an object")
            yield number, row

    def damaged(self, number: int, what: str) -> CorruptFile:
        """The error for a line that cannot be used."""
        return CorruptFile(f"{self.path}: line {number}: {what}; {self.remedy}")

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add a line per row, all in one write.

        Raises:
            InputError: the file cannot be written; what was in it is still there.
        """
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a+b", buffering=0) as file:  # nothing is left over to be written later
                fcntl.flock(file, fcntl.LOCK_EX)
                before = _mend(file)
                try:
                    left = memoryview(content)
                    while left:
                        left = left[file.write(left) :]
                    os.fsync(file.fileno())
                except BaseException:  # a full disk, or Ctrl-C: as it was before
                    os.ftruncate(file.fileno(), before)
                    if not before:
                        self.path.unlink(missing_ok=True)
                    raise
        except OSError as error:
            raise write_error(self.path, error, len(content)) from error


def _mend(file: Any) -> int:
    """Cut off a torn last line; a whole one that only lacks its newline gets it. The size that the file then has."""
    size = file.seek(0, os.SEEK_END)
    if not size:
        return 0
    file.seek(0)
    tail = file.read().rpartition(b"\n")[2]
    if not tail:
        return int(size)
    if _is_json(tail):
        file.write(b"\n")
    else:
        file.truncate(size - len(tail))
    return int(file.seek(0, os.SEEK_END))


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True
