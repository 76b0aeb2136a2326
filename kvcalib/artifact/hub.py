"""Where an artifact is: a local folder, or a repository on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from kvcalib.artifact.store import CARD, MANIFEST, TENSORS
from kvcalib.errors import InputError


def locate(path: str | Path, revision: str | None = None) -> Path:
    """The local folder of an artifact; a Hub id (`owner/name`) is downloaded (the artifact's three files only).

    Raises:
        InputError: neither a folder nor a repository that can be reached.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder
    name = str(path)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise InputError(f"{name}: no such folder; give an artifact folder, or a Hub id like owner/name")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[MANIFEST, TENSORS, CARD]))
    except (HFValidationError, RepositoryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{name}: neither a local folder nor an artifact on the Hub that can be reached ({reason})"
        ) from None
