"""Files that are written whole or not at all, and safetensors files with one metadata key.

A write goes to a temporary name beside the target and is renamed. safetensors orders its metadata at random, so the
same content would give other bytes from run to run: all of ours have a single key, `kvcalib`, with canonical JSON.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save, save_file
from torch import Tensor

from kvcalib.errors import CorruptFile, InputError
from kvcalib.tensorfile import CheckedFile, raw_bytes
from kvcalib.untrusted import MAX_JSON_BYTES, parse_json, read_file

METADATA_KEY = "kvcalib"


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` atomically.

    Raises:
        InputError: the folder cannot be written or the disk is full; what was at `path` is untouched.
    """
    with replacing(path, len(content)) as temporary, open(temporary, "wb") as file:
        file.write(content)


@contextlib.contextmanager
def replacing(path: Path, size: int) -> Iterator[Path]:
    """A temporary name beside `path` to write to; renamed to `path` if all goes well, else removed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, SafetensorError):  # its writer wraps the system's error in one of its own
            code = errno.ENOSPC if "No space left" in str(error) else errno.EIO
            raise write_error(path, OSError(code, str(error)), size) from error
        if isinstance(error, OSError):
            raise write_error(path, error, size) from error
        raise


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left half written in `folder`; nobody else may be writing there."""
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            path.unlink()


def write_error(path: Path, error: OSError, size: int | None = None) -> InputError:
    """The error to show when writing `path` failed."""
    wanted = "" if size is None else f" ({size / 1e6:.1f} MB)"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return InputError(f"{path}: the disk is full, nothing was changed{wanted}; free space or choose another folder")
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return InputError(f"{path}: not writable ({error.strerror}); choose another folder")
    return InputError(f"{path}: cannot be written ({error.strerror or error})")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as sorted, indented JSON, atomically."""
    write_bytes(path, (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Parsed JSON of `path`; CorruptFile if it is not JSON, too large, or no regular file."""
    raw = read_file(path, MAX_JSON_BYTES)
    try:
        return parse_json(raw)
    except ValueError as error:
        raise CorruptFile(f"{path}: not valid JSON ({error}); it is damaged or not ours") from None


def encode_tensors(tensors: Mapping[str, Tensor], metadata: Any = None) -> bytes:
    """A safetensors file with `metadata` as its one key; the same content gives the same bytes."""
    return save(
        {name: t.detach().cpu().contiguous() for name, t in sorted(tensors.items())}, metadata=tensors_note(metadata)
    )


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Any = None) -> None:
    """Write the bytes of `encode_tensors` to `path` atomically, without a copy of them in memory.

    Raises:
        InputError: as `write_bytes`.
    """
    ready = {name: t.detach().cpu().contiguous() for name, t in sorted(tensors.items())}
    with replacing(path, sum(t.nbytes for t in ready.values())) as temporary:
        save_file(ready, temporary, metadata=tensors_note(metadata))


def tensors_note(metadata: Any) -> dict[str, str]:
    """The metadata of a safetensors file of ours."""
    return {METADATA_KEY: json.dumps(metadata, sort_keys=True, separators=(",", ":"))}


def read_tensors(path: Path, names: Iterable[str] | None = None) -> tuple[dict[str, Tensor], Any]:
    """`(tensors, metadata)` of a file made by `encode_tensors`.

    Args:
        names: the tensors to read, the others are left on disk; all if None.

    Raises:
        InputError: there is no such file. CorruptFile: it is truncated, damaged, lacks one of `names` or has no
            metadata of ours.
    """
    with CheckedFile(path) as file:
        note = file.metadata.get(METADATA_KEY)
        tensors = {name: file.read(name) for name in (sorted(file.entries) if names is None else names)}
    if note is None:
        raise CorruptFile(f"{path}: safetensors metadata has no key {METADATA_KEY!r}; it was not written by kvcalib")
    try:
        parsed = parse_json(note, finite=False)
    except ValueError as error:
        raise CorruptFile(
            f"{path}: its metadata is not valid JSON ({error}); the file is damaged, copy it again"
        ) from None
    if not isinstance(parsed, dict):
        raise CorruptFile(f"{path}: its metadata is {type(parsed).__name__}, expected an object; it is damaged")
    return tensors, parsed


def hash_bytes(content: bytes) -> str:
    """sha256 of `content`, in hex."""
    return hashlib.sha256(content).hexdigest()


def hash_file(path: Path) -> str:
    """sha256 of a file's content, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_tensor(tensor: Tensor) -> str:
    """sha256 of the tensor's bytes, row-major."""
    return hashlib.sha256(raw_bytes(tensor.detach().cpu().contiguous())).hexdigest()
