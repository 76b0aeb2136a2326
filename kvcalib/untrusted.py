"""Reading what others may have written: regular files of a bounded size, JSON with no surprises.

Nothing here waits, writes, or believes a size that a file states of itself.
"""

from __future__ import annotations

import json
import math
import os
import reprlib
import stat
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import ValidationError

from kvcalib.errors import CorruptFile, InputError

MAX_JSON_BYTES = 16 << 20
"""The largest JSON that is parsed. Parsed, it takes up to some thirty times as much memory."""
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother, _REPR.maxlong = 2, 80, 80, 40


def shown(value: Any) -> str:
    """`value` for a message: its `repr`, cut short, so that no file can flood or steer a terminal."""
    return _REPR.repr(value)


def first_fault(error: ValidationError) -> str:
    """The first field that pydantic refused, what it is and what is wrong with it, in one short line."""
    first = error.errors(include_url=False, include_context=False)[0]
    where = shown(".".join(str(part) for part in first["loc"]))[1:-1]
    return f"{where} is {shown(first['input'])}: {first['msg']}"


def open_file(path: Path) -> BinaryIO:
    """The regular file at `path`, open for reading.

    A FIFO or a device in its place is refused without being opened: opening alone can hang or have effects.

    Raises:
        InputError: there is nothing, or it may not be read. CorruptFile: it is no regular file, or a loop of links.
    """
    try:
        _check_regular(path, path.stat())
        # Without O_NONBLOCK a FIFO that took the file's place since would hang.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        file = os.fdopen(handle, "rb", buffering=0)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path}: not found") from None
    except (OSError, ValueError) as error:
        raise CorruptFile(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    try:
        _check_regular(path, os.fstat(handle))
    except BaseException:
        file.close()
        raise
    return file


def _check_regular(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise CorruptFile(f"{path}: is no regular file; copy the folder again")


def read_file(path: Path, most: int) -> bytes:
    """The content of the regular file at `path`.

    Raises:
        InputError, CorruptFile: as `open_file`; CorruptFile: it has more than `most` bytes.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise CorruptFile(f"{path}: {size} bytes, expected at most {most}")
        # One byte more than allowed: the file may have grown since.
        parts, left = [], most + 1
        while left and (part := file.read(min(left, 1 << 20))):
            parts.append(part)
            left -= len(part)
    if not left:
        raise CorruptFile(f"{path}: more than the {most} bytes that are expected at most")
    return b"".join(parts)


def parse_json(raw: bytes | str, finite: bool = True) -> Any:
    """The value of a JSON text in UTF-8.

    Args:
        finite: refuse NaN and numbers that are infinite as float64.

    Raises:
        ValueError: it is no such text, begins with a byte order mark, names a key twice in one object, or is nested
            deeper than Python's recursion goes.
    """
    numbers: dict[str, Any] = {"parse_constant": _no_constant, "parse_float": _finite} if finite else {}
    try:
        return json.loads(raw if isinstance(raw, str) else raw.decode(), object_pairs_hook=_once, **numbers)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"key {shown(name)} is given twice")
            seen.add(name)
    return made


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{shown(text)} is beyond what a float can hold")
    return number
