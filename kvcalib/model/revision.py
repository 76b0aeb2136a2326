"""Which commit of a repository on the Hub: settled once, before any file, and used for all of them.

A branch can move between two downloads. Config, tokenizer, weights and code of a model are asked for by one commit, and
so is a data set; what is recorded says which.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled

Kind = Literal["model", "dataset"]
MAIN = "main"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_ERRORS = (HfHubHTTPError, HTTPError, OfflineModeIsEnabled, HFValidationError, OSError)
_KNOWN: dict[tuple[str, str, str, str | None], str] = {}
"""What this process has asked before, by the Hub's address, kind, name and revision."""


def commit_of(name: str, revision: str | None = None, kind: Kind = "model") -> str | None:
    """The commit that `revision` (a branch, a tag; `main` if None) of the repository `name` is at.

    Asked of the Hub, or, if that cannot be reached, what the last download left in the cache. The answer holds for the
    rest of the process.

    Returns:
        None where it cannot be told: there is no such repository or revision, no access, no connection and no copy.
        Loading then says why.
    """
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    if not _REPO.fullmatch(name):
        return None
    asked = (constants.ENDPOINT, kind, name, revision)
    if asked not in _KNOWN:
        api = HfApi()
        try:
            info = (api.model_info if kind == "model" else api.dataset_info)(name, revision=revision)
            found = info.sha
        except _ERRORS as error:
            answered = getattr(error, "response", None) is not None
            found = None if answered else _cached(name, revision or MAIN, kind)
        if found is None:
            return None
        _KNOWN[asked] = str(found)
        _remember(name, revision or MAIN, kind, str(found))
    return _KNOWN[asked]


def _cached(name: str, revision: str, kind: Kind) -> str | None:
    """The commit that the download cache has for a branch or tag."""
    path = _reference(name, revision, kind)
    if path is None or not path.is_file():
        return None
    found = path.read_text(encoding="utf-8", errors="replace").strip()
    return found if _COMMIT.fullmatch(found) else None


def _remember(name: str, revision: str, kind: Kind, commit: str) -> None:
    """Note it in the download cache, as a download by branch does and one by commit does not: for work offline."""
    path = _reference(name, revision, kind)
    if path is None or _cached(name, revision, kind) == commit:
        return
    with contextlib.suppress(OSError):  # a cache that cannot be written serves without it
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(commit, encoding="utf-8")


def _reference(name: str, revision: str, kind: Kind) -> Path | None:
    """The cache's file for a branch or tag; None if its name leads elsewhere."""
    place = Path(revision)
    if place.is_absolute() or ".." in place.parts:
        return None
    return Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}" / "refs" / place
