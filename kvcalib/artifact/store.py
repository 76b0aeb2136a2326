"""Artifacts on disk: `manifest.json`, `tensors.safetensors`, `README.md`, and exports beside them in `exports/`.

Reading checks everything that the manifest promises before anything is used: the manifest's own digest, the other
files' hashes, every tensor's dtype, shape and hash. Nothing is executed, no path inside an artifact is followed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from kvcalib.artifact.exports import FILES, FOLDER
from kvcalib.artifact.manifest import FORMAT_VERSION, Manifest, TensorRecord
from kvcalib.errors import CorruptFile, FolderInUse, InputError
from kvcalib.files import encode_tensors, hash_bytes, hash_file, hash_tensor, leftovers, read_tensors
from kvcalib.folders import recover, replacing_folder

MANIFEST, TENSORS, CARD = "manifest.json", "tensors.safetensors", "README.md"
MAX_MANIFEST_BYTES = 64 << 20
MAX_EXPORT_BYTES = 4 << 20


def write(folder: Path, manifest: Manifest, tensors: dict[str, Tensor], card: str, overwrite: bool = False) -> Manifest:
    """Write an artifact; its folder appears complete or not at all.

    `manifest.tensors` and `manifest.files` are filled in here. The same input gives the same bytes.

    Raises:
        FolderInUse: `folder` holds another artifact (unless `overwrite`) or anything that is not an artifact.
        InputError: it cannot be written; what was there is untouched.
    """
    records = {
        name: TensorRecord(dtype=str(t.dtype).removeprefix("torch."), shape=list(t.shape), sha256=hash_tensor(t))
        for name, t in sorted(tensors.items())
    }
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


def contents(folder: Path, links: bool = False) -> tuple[Manifest, dict[str, bytes]]:
    """An artifact's manifest and files by name, exports among them, everything checked as `read` does.

    Args:
        links: exports may be symbolic links, as in the Hub's download cache. Elsewhere a link could make any file of
            this machine travel: nothing says what an export's content must be.

    Raises:
        InputError, CorruptFile: see `read`. CorruptFile: an export is a link, or larger than any is.
    """
    manifest, _ = read(folder)
    names = [MANIFEST, TENSORS, CARD, *_exports(folder)]
    for name in names[3:]:
        if not links and (folder / name).is_symlink():
            raise CorruptFile(f"{folder / name}: is a symbolic link, expected a file; delete it, or export again")
        if (folder / name).stat().st_size > MAX_EXPORT_BYTES:
            raise CorruptFile(f"{folder / name}: larger than {MAX_EXPORT_BYTES} bytes, no export of ours is; delete it")
    return manifest, {name: (folder / name).read_bytes() for name in names}


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the artifact in `folder`, its digest checked.

    Raises:
        InputError: there is no artifact. CorruptFile: the manifest is damaged or of an unknown version.
    """
    path = folder / MANIFEST
    if not folder.exists():
        recover(folder)
    if not path.is_file():
        raise InputError(f"{folder}: no artifact there (no {MANIFEST}); give the folder that `kvcalib build` wrote")
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise CorruptFile(f"{path}: {path.stat().st_size} bytes, expected at most {MAX_MANIFEST_BYTES}")
    raw = path.read_bytes()
    try:
        body: Any = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CorruptFile(f"{path}: not valid JSON ({error}); the artifact is damaged, copy it again") from None
    if not isinstance(body, dict) or body.get("format") != "kvcalib-artifact":
        raise CorruptFile(f"{path}: field 'format' is missing or not 'kvcalib-artifact'; this is no artifact of ours")
    version = body.get("format_version")
    if version != FORMAT_VERSION:
        raise CorruptFile(
            f"{path}: format_version is {version!r}, this kvcalib reads {FORMAT_VERSION}; "
            "use the kvcalib that wrote it, or build it again"
        )
    body.pop("digest", None)
    try:
        manifest = Manifest.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CorruptFile(f"{path}: {where} is {first['input']!r}: {first['msg']}; build the artifact again") from None
    if manifest.encode() != raw:
        raise CorruptFile(f"{path}: its digest does not match its content; the artifact was altered or damaged")
    return manifest


def read(folder: Path) -> tuple[Manifest, dict[str, Tensor]]:
    """Manifest and tensors of the artifact in `folder`, everything checked.

    Raises:
        InputError, CorruptFile: as `read_manifest`; also a tensor or file that is not what the manifest says.
    """
    manifest = read_manifest(folder)
    tensors, _ = read_tensors(folder / TENSORS)
    for name in sorted(set(tensors) ^ set(manifest.tensors)):
        where = "not in the manifest" if name in tensors else f"missing from {TENSORS}"
        raise CorruptFile(f"{folder / TENSORS}: tensor {name!r} is {where}")
    for name, record in manifest.tensors.items():
        found = TensorRecord(
            dtype=str(tensors[name].dtype).removeprefix("torch."),
            shape=list(tensors[name].shape),
            sha256=hash_tensor(tensors[name]),
        )
        for field in ("dtype", "shape", "sha256"):
            if getattr(found, field) != getattr(record, field):
                raise CorruptFile(
                    f"{folder / TENSORS}: {name}.{field} is {getattr(found, field)}, the manifest says "
                    f"{getattr(record, field)}; the file is damaged, copy it again"
                )
    if set(manifest.files) != {TENSORS, CARD}:
        raise CorruptFile(f"{folder / MANIFEST}: files names {sorted(manifest.files)}, expected {[CARD, TENSORS]}")
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise CorruptFile(f"{path}: missing; the artifact is incomplete, copy it again")
        if hash_file(path) != expected:
            raise CorruptFile(f"{path}: its sha256 is not the manifest's; the file was altered or damaged")
    return manifest, tensors
