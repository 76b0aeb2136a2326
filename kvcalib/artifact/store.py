"""Artifacts on disk: `manifest.json`, `tensors.safetensors`, `README.md`, and exports beside them in `exports/`.

Reading checks everything before anything is used: the manifest's own digest, the other files' hashes, every tensor's
dtype, shape and hash, and that all of it fits together (`check.py`). Nothing is executed, no path or link that lies in
an artifact is followed out of it, nothing is allocated that the files do not hold.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from kvcalib.artifact.check import check_manifest, check_tensors
from kvcalib.artifact.exports import FILES, FOLDER
from kvcalib.artifact.manifest import FORMAT_VERSION, Manifest, TensorRecord, decode
from kvcalib.errors import CorruptFile, FolderInUse, InputError
from kvcalib.files import METADATA_KEY, encode_tensors, hash_bytes, hash_tensor, leftovers
from kvcalib.folders import recover, replacing_folder
from kvcalib.tensorfile import CheckedFile
from kvcalib.untrusted import first_fault, parse_json, read_file, shown

MANIFEST, TENSORS, CARD = "manifest.json", "tensors.safetensors", "README.md"
MAX_MANIFEST_BYTES = 8 << 20
MAX_EXPORT_BYTES = MAX_CARD_BYTES = 4 << 20
NOTE = f'{{"format":"kvcalib-artifact","format_version":{FORMAT_VERSION}}}'
"""The metadata of `tensors.safetensors`."""


def write(folder: Path, manifest: Manifest, tensors: dict[str, Tensor], card: str, overwrite: bool = False) -> Manifest:
    """Write an artifact; its folder appears complete or not at all.

    `manifest.tensors` and `manifest.files` are filled in here. The same input gives the same bytes.

    Raises:
        FolderInUse: `folder` holds another artifact (unless `overwrite`) or anything that is not an artifact.
        InputError: it cannot be written; what was there is untouched.
    """
    records = {name: TensorRecord.of(t) for name, t in sorted(tensors.items())}
    body = encode_tensors(tensors, {"format": manifest.format, "format_version": FORMAT_VERSION})
    files = {TENSORS: hash_bytes(body), CARD: hash_bytes(card.encode())}
    manifest = manifest.model_copy(update={"tensors": records, "files": files})
    install(folder, {MANIFEST: manifest.encode(), TENSORS: body, CARD: card.encode()}, overwrite)
    return manifest


def with_card(content: dict[str, bytes], manifest: Manifest, card: str) -> dict[str, bytes]:
    """`content`, an artifact's files by name, with another card and the manifest that has its hash."""
    files = {**manifest.files, CARD: hash_bytes(card.encode())}
    return {**content, CARD: card.encode(), MANIFEST: manifest.model_copy(update={"files": files}).encode()}


def install(folder: Path, content: dict[str, bytes], overwrite: bool = False) -> None:
    """Make `folder` hold the artifact `content`, files by name; it appears complete or not at all.

    Raises:
        FolderInUse, InputError: as `write`.
    """
    recover(folder)
    if folder.exists() and _settled(folder, content, overwrite):
        return
    size = sum(len(data) for data in content.values())
    with replacing_folder(folder, lambda: not _settled(folder, content, overwrite), size) as temporary:
        for name, data in content.items():
            (temporary / name).parent.mkdir(exist_ok=True)
            (temporary / name).write_bytes(data)


def _settled(folder: Path, content: dict[str, bytes], overwrite: bool) -> bool:
    """True if `folder` already holds `content`; FolderInUse if something else that may not be replaced."""
    if not folder.is_dir():
        raise FolderInUse(f"{folder}: is a file, expected a folder for the artifact; choose another --out")
    present = {p.name for p in folder.iterdir()}
    if not present:
        return False
    known = {MANIFEST, TENSORS, CARD, *({FOLDER} if len(_exports(folder)) == _entries(folder / FOLDER) else ())}
    if MANIFEST not in present or present - known:
        strange = sorted(present - known)[:3] or sorted(present)[:3]
        raise FolderInUse(f"{folder}: holds {', '.join(strange)}, which is no artifact; choose another --out")
    if all((folder / name).is_file() and (folder / name).read_bytes() == data for name, data in content.items()):
        return True
    if not overwrite:
        raise FolderInUse(
            f"{folder}: holds another artifact (manifest.json differs); choose another --out, or pass --overwrite"
        )
    return False


def _entries(folder: Path) -> int:
    """How many exports, or other things, lie in `folder`; what a killed process left half written is none."""
    return len(set(folder.iterdir()) - set(leftovers(folder))) if folder.is_dir() else 0


def _exports(folder: Path) -> list[str]:
    """Names, relative to `folder`, of the exports that lie in the artifact there: known names only."""
    inside = folder / FOLDER
    if inside.is_symlink() or not inside.is_dir():
        return []
    return [f"{FOLDER}/{p.name}" for p in sorted(inside.iterdir()) if p.name in FILES and p.is_file()]


def contents(folder: Path) -> tuple[Manifest, dict[str, bytes]]:
    """An artifact's manifest and files by name, exports among them, everything checked as `read` does.

    Raises:
        InputError, CorruptFile: see `read`. CorruptFile: an export is a link, which could make any file of this
            machine travel, or larger than any is; the Hub's cache may link to its blobs.
    """
    manifest, _ = read(folder)
    held = {name: read_file(inside(folder, name), MAX_EXPORT_BYTES) for name in _exports(folder)}
    for name in (TENSORS, CARD):
        path = inside(folder, name)
        held[name] = read_file(path, path.stat().st_size)
        if hash_bytes(held[name]) != manifest.files[name]:
            raise CorruptFile(f"{path}: was altered while it was read; try again")
    return manifest, {MANIFEST: manifest.encode(), **held}


def inside(folder: Path, name: str) -> Path:
    """The path of an artifact's file `name`, which must not lead out of its folder.

    Links are followed in one case: in the Hub's download cache, `snapshots/COMMIT` holds links to the files in `blobs`
    beside `snapshots`.

    Raises:
        CorruptFile: it is a link to anywhere else.
    """
    path = folder / name
    if not path.is_symlink():
        return path
    home = Path(os.path.realpath(folder))
    target = Path(os.path.realpath(path))
    if home.parent.name == "snapshots" and target.parent == home.parent.parent / "blobs" and not target.is_symlink():
        return target
    raise CorruptFile(f"{path}: is a symbolic link, expected a file; copy the artifact with its files, or pull it")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the artifact in `folder`: its digest, and that it is consistent, checked.

    Raises:
        InputError: there is no artifact. CorruptFile: the manifest is damaged or of an unknown version.
    """
    path = folder / MANIFEST
    if not os.path.lexists(folder):
        recover(folder)
    if not os.path.lexists(path):
        raise InputError(f"{folder}: no artifact there (no {MANIFEST}); give the folder that `kvcalib build` wrote")
    raw = read_file(inside(folder, MANIFEST), MAX_MANIFEST_BYTES)
    try:
        body: Any = parse_json(raw)
    except ValueError as error:
        raise CorruptFile(f"{path}: not valid JSON ({error}); the artifact is damaged, copy it again") from None
    if not isinstance(body, dict) or body.get("format") != "kvcalib-artifact":
        raise CorruptFile(f"{path}: field 'format' is missing or not 'kvcalib-artifact'; this is no artifact of ours")
    version = body.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise CorruptFile(
            f"{path}: format_version is {shown(version)}, this kvcalib reads {FORMAT_VERSION}; "
            "use the kvcalib that wrote it, or build it again"
        )
    try:
        manifest = decode(raw, body)
        check_manifest(manifest)
    except ValidationError as error:
        raise CorruptFile(f"{path}: {first_fault(error)}; build the artifact again") from None
    except ValueError as error:
        raise CorruptFile(f"{path}: {error}; the artifact was altered or damaged, copy or build it again") from None
    return manifest


def read(folder: Path) -> tuple[Manifest, dict[str, Tensor]]:
    """Manifest and tensors of the artifact in `folder`, everything checked.

    Raises:
        InputError, CorruptFile: as `read_manifest`; also a tensor or file that is not what the manifest says, or
            tensors that do not fit together.
    """
    manifest = read_manifest(folder)
    if set(manifest.files) != {TENSORS, CARD}:
        names = shown(sorted(manifest.files))
        raise CorruptFile(f"{folder / MANIFEST}: files names {names}, expected {[CARD, TENSORS]}")
    for name in (TENSORS, CARD):
        if not os.path.lexists(folder / name):
            raise CorruptFile(f"{folder / name}: missing; the artifact is incomplete, copy it again")
    tensors = dict(_tensors(inside(folder, TENSORS), manifest))
    if hash_bytes(read_file(inside(folder, CARD), MAX_CARD_BYTES)) != manifest.files[CARD]:
        raise CorruptFile(f"{folder / CARD}: its sha256 is not the manifest's; the file was altered or damaged")
    try:
        check_tensors(manifest, tensors)
    except ValueError as error:
        raise CorruptFile(f"{folder}: {error}; build the artifact again") from None
    return manifest, tensors


def _tensors(path: Path, manifest: Manifest) -> Iterator[tuple[str, Tensor]]:
    """The tensors of `path` by name, none read before all have the dtype and shape of the manifest, each hashed."""
    with CheckedFile(path, hashing=True) as file:
        if file.metadata != {METADATA_KEY: NOTE}:
            raise CorruptFile(f"{path}: its metadata is {shown(file.metadata)}, expected {NOTE} as its one key's value")
        for name in sorted(set(file.entries) ^ set(manifest.tensors)):
            where = "not in the manifest" if name in file.entries else f"missing from {TENSORS}"
            raise CorruptFile(f"{path}: tensor {shown(name)} is {where}")
        for name, entry in file.entries.items():
            record = manifest.tensors[name]
            found = {"dtype": str(entry.dtype).removeprefix("torch."), "shape": list(entry.shape)}
            for field, value in found.items():
                if value != getattr(record, field):
                    raise CorruptFile(
                        f"{path}: {name}.{field} is {shown(value)}, the manifest says {shown(getattr(record, field))}; "
                        "the file is damaged, copy it again"
                    )
        for name in file.entries:
            tensor = file.read(name)
            if (found_hash := hash_tensor(tensor)) != manifest.tensors[name].sha256:
                raise CorruptFile(
                    f"{path}: {name}.sha256 is {found_hash}, the manifest says {manifest.tensors[name].sha256}; the "
                    "file is damaged, copy it again"
                )
            yield name, tensor
        if file.digest.hexdigest() != manifest.files[TENSORS]:
            raise CorruptFile(f"{path}: its sha256 is not the manifest's; the file was altered or damaged")
