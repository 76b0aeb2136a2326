"""Files that are written whole or not at all, and safetensors files with one metadata key.

A write goes to a temporary name beside the target, onto the disk, and is renamed. The temporary file is locked while
its writer lives, so that what a killed process left can be told from what another one is writing, and is removed by
the next write of the same file. safetensors orders its metadata at random, so the same content would give other bytes
from run to run: all of ours have a single key, `kvcalib`, with canonical JSON.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvcalib.errors import CorruptFile, NotWritable
from kvcalib.tensorfile import DTYPES as TYPES
from kvcalib.tensorfile import CheckedFile, raw_bytes
from kvcalib.untrusted import MAX_JSON_BYTES, parse_json, read_file

METADATA_KEY = "kvcalib"
DTYPES = {dtype: name for name, dtype in TYPES.items()}
"""What a safetensors file calls a type."""
_UNSYNCED = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EBADF)
"""What file systems say that cannot put a folder onto the disk."""
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{1,8}\.(?P<kind>tmp|old)", re.DOTALL)


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` atomically.

    Raises:
        NotWritable: the folder cannot be written or the disk is full; what was at `path` is untouched.
    """
    with replacing(path, len(content)) as temporary, open(temporary, "wb") as file:
        file.write(content)


@contextlib.contextmanager
def replacing(path: Path, size: int | None = None) -> Iterator[Path]:
    """An empty file beside `path` to write into; renamed to `path` if all goes well, else removed.

    What is no file (a pipe, a device, `/dev/stdout`) is written to as it is.

    Raises:
        NotWritable: the block, or the rename, met an error of the system.
    """
    temporary, handle = None, -1
    try:
        if is_stream(path):
            yield path
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent, path.name)
        temporary, handle = claim(path)
        yield temporary
        os.fsync(handle)
        os.replace(temporary, path)
        temporary = None
        sync_folder(path.parent)
    except OSError as error:
        raise write_error(path, error, size) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        if handle >= 0:
            os.close(handle)


def is_stream(path: Path) -> bool:
    """Whether `path` is there and cannot be replaced by a file: a pipe, a device, a name of one."""
    return path.exists() and not path.is_dir() and (not path.is_file() or path.parent == Path("/dev"))


def claim(path: Path, folder: bool = False) -> tuple[Path, int]:
    """A new file, or folder, under a temporary name beside `path`, and the descriptor that holds its lock."""
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        if folder:
            temporary.mkdir()
        handle = os.open(temporary, os.O_RDONLY if folder else os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        with contextlib.suppress(OSError):  # a file system without locks: then nothing is taken for a leftover either
            fcntl.flock(handle, fcntl.LOCK_EX)
        if is_at(handle, temporary):
            return temporary, handle
        os.close(handle)  # in the moment before it was locked it was taken for a leftover


def is_at(handle: int, path: Path) -> bool:
    """Whether `path` still is what was opened as `handle`."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path, follow_symlinks=False))  # noqa: PTH116
    except OSError:
        return False


def remove_leftovers(folder: Path, name: str | None = None, kind: str = "tmp") -> None:
    """Remove what killed processes left half written in `folder`: of the file or folder `name`, or of all.

    What a living process is writing stays.
    """
    for path in leftovers(folder, name, kind):
        with contextlib.suppress(OSError):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def leftovers(folder: Path, name: str | None = None, kind: str = "tmp") -> list[Path]:
    """Temporary files and folders in `folder` whose writers are dead; of `name`, or of all."""
    try:
        found = [path for path in folder.iterdir() if _is_temporary(path.name, name, kind)]
    except OSError:
        return []
    return sorted(path for path in found if _abandoned(path))


def _is_temporary(found: str, name: str | None, kind: str) -> bool:
    # One pattern for all names: `re` would keep the last 512 that it compiled.
    parts = _TEMPORARY.fullmatch(found)
    return parts is not None and parts["kind"] == kind and name in (None, parts["name"])


def _abandoned(path: Path) -> bool:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Put the names in `folder` onto the disk: without that a new or renamed file can be lost with the power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _UNSYNCED:
            raise
    finally:
        os.close(handle)


def write_error(path: Path, error: OSError, size: int | None = None) -> NotWritable:
    """The error to show when writing `path` failed."""
    wanted = "" if size is None else f" ({size / 1e6:.1f} MB)" if size > 1e5 else f" ({size / 1e3:.1f} kB)"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NotWritable(
            f"{path}: the disk is full, nothing was changed{wanted}; free space and start again, or choose another "
            "folder"
        )
    if error.errno == errno.EFBIG:
        return NotWritable(
            f"{path}: too large for this disk or for the limit of this process, nothing was changed{wanted}; raise the "
            "limit (ulimit -f), or choose another folder"
        )
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return NotWritable(f"{path}: not writable ({error.strerror}); choose another folder")
    if error.errno == errno.EIO:
        return NotWritable(
            f"{path}: cannot be written, the disk reports an error ({error.strerror}); check the disk, or choose "
            "another folder"
        )
    return NotWritable(f"{path}: cannot be written ({error.strerror or error}); choose another name or folder")


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
    """A safetensors file with `metadata` as its one key; the same content gives the same bytes.

    The library's own writer goes through `numpy.ctypeslib`, which keeps a type for every size of a tensor for ever.
    """
    header, order, _ = layout({name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}, metadata)
    return b"".join([header, *(flat_bytes(tensors[name]) for name in order)])


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Any = None) -> None:
    """Write the bytes of `encode_tensors` to `path` atomically, without a copy of them in memory.

    The library's own writer makes a temporary file that a killed process leaves behind under a name of its choice.

    Raises:
        NotWritable: as `write_bytes`.
    """
    header, order, size = layout({name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}, metadata)
    with replacing(path, size) as temporary, open(temporary, "wb") as file:
        file.write(header)
        for name in order:
            file.write(flat_bytes(tensors[name]))


def layout(specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Any) -> tuple[bytes, list[str], int]:
    """A safetensors file's header with the length before it, its tensors in their order, and its size in bytes."""
    rank = {dtype: number for number, dtype in enumerate(DTYPES)}
    order = sorted(specs, key=lambda name: (rank[specs[name][0]], name))
    header: dict[str, Any] = {"__metadata__": tensors_note(metadata)}
    end = 0
    for name in order:
        dtype, shape = specs[name]
        start, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text, order, 8 + len(text) + end


def flat_bytes(tensor: Tensor) -> Any:
    """The tensor's bytes, row-major, as a buffer."""
    return raw_bytes(tensor.detach().cpu().contiguous())


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
    return hashlib.sha256(flat_bytes(tensor)).hexdigest()
