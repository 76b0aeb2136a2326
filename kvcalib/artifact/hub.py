"""Artifacts on the Hugging Face Hub: where one is, fetching it, publishing it.

Only an artifact's files travel, in both directions: `manifest.json`, `tensors.safetensors`, `README.md`, and the known
files of `exports/`. What is fetched is checked against its hashes before it is used, and a fetch names the commit.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from kvcalib.artifact import store
from kvcalib.artifact.exports import FILES, FOLDER
from kvcalib.artifact.manifest import Manifest
from kvcalib.artifact.store import CARD, MANIFEST, TENSORS
from kvcalib.errors import CorruptFile, FolderInUse, InputError
from kvcalib.folders import recover

PATTERNS = [MANIFEST, TENSORS, CARD, *(f"{FOLDER}/{name}" for name in sorted(FILES))]
MAIN = "main"
NO_ID = "is no Hub id, expected owner/name or owner/name@revision"
NO_FOLDER = "no such folder; give an artifact folder, or a Hub id like owner/name@revision"
_REPO = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
_IGNORED = {".gitattributes", CARD}
_ERRORS = (HfHubHTTPError, HTTPError, OfflineModeIsEnabled, LocalEntryNotFoundError, HFValidationError, OSError)


@dataclass(frozen=True)
class Reference:
    """A repository on the Hub, and the branch, tag or commit that was asked for."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


@dataclass(frozen=True)
class Fetched:
    """A local copy of an artifact on the Hub, and the commit it is of."""

    folder: Path
    commit: str


def parse(name: str, revision: str | None = None, otherwise: str = NO_ID) -> Reference:
    """`owner/name` or `owner/name@revision` taken apart.

    Raises:
        InputError: it is no such name (the message is `otherwise`), or its revision and `revision` differ.
    """
    repo, at, given = name.partition("@")
    if not _REPO.fullmatch(repo) or (at and not given):
        raise InputError(f"{name or repr(name)}: {otherwise}")
    if given and revision is not None and given != revision:
        raise InputError(f"{name}: names revision {given!r}, and revision {revision!r} is given as well; give one")
    return Reference(repo, given or revision)


def locate(path: str | Path, revision: str | None = None) -> Path:
    """The local folder of an artifact; a Hub id (`owner/name`, `owner/name@revision`) is fetched.

    A folder of that name wins, whatever characters are in it.

    Raises:
        InputError: neither a folder nor an artifact on the Hub that can be reached.
    """
    folder = Path(path)
    if not folder.exists():
        recover(folder)
    return folder if folder.is_dir() else fetch(parse(str(path), revision, NO_FOLDER)).folder


def fetch(reference: Reference, again: bool = False) -> Fetched:
    """A copy of the artifact in the Hub's download cache, where it stays; its commit is settled before any file.

    Args:
        again: download even what is in the cache.

    Raises:
        InputError: no such repository or revision, no access, no connection and no copy, or no artifact in it.
    """
    api = HfApi()
    try:
        info = api.model_info(reference.repo, revision=reference.revision)
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise explain(reference, error) from None
    except _ERRORS as error:
        return _cached(reference, error)
    commit = str(info.sha)
    files = {sibling.rfilename for sibling in info.siblings or []}
    if not {MANIFEST, TENSORS, CARD} <= files:
        lacking = next(name for name in (MANIFEST, TENSORS, CARD) if name not in files)
        raise InputError(
            f"{reference}: the repository on the Hub is no artifact of kvcalib (no {lacking}); check its name, or push "
            "one with `kvcalib push`"
        )
    try:
        folder = api.snapshot_download(
            reference.repo, revision=commit, allow_patterns=PATTERNS, force_download=again, max_workers=2
        )
    except _ERRORS as error:
        raise explain(reference, error) from None
    return Fetched(Path(folder), commit)


def _cached(reference: Reference, error: Exception) -> Fetched:
    """The copy that an earlier fetch left, when the Hub cannot be asked."""
    try:
        folder = Path(HfApi().snapshot_download(
            reference.repo, revision=reference.revision, allow_patterns=PATTERNS, local_files_only=True
        ))  # fmt: skip
    except _ERRORS:
        raise explain(reference, error) from None
    if not (folder / MANIFEST).is_file():
        raise explain(reference, error) from None
    return Fetched(folder, folder.name)


def pull(reference: Reference, out: Path, overwrite: bool = False) -> tuple[Manifest, str]:
    """Fetch an artifact into the folder `out`, which appears whole and checked, or not at all: manifest and commit.

    Raises:
        InputError: see `fetch`. CorruptFile: what the Hub has is damaged. FolderInUse: `out` holds something else.
    """
    fetched = fetch(reference)
    try:
        manifest, content = store.contents(fetched.folder)
    except CorruptFile:
        # The copy in the cache may be what is damaged.
        fetched = fetch(Reference(reference.repo, fetched.commit), again=True)
        manifest, content = store.contents(fetched.folder)
    store.install(out, content, overwrite)
    return manifest, fetched.commit


def push(
    content: dict[str, bytes],
    reference: Reference,
    private: bool = False,
    message: str | None = None,
) -> str:
    """Publish an artifact's files in one commit; what the repository holds beside them stays: the commit.

    The repository is made if there is none, and so is the branch. Exports that are no longer there are removed.

    Args:
        content: from `store.contents`.
        reference: its revision is a branch; `main` if None.
        private: make it private; an existing public repository is refused, not changed.

    Raises:
        InputError: no access, no connection, or a public repository although `private`.
        FolderInUse: the repository holds files and is no artifact.
    """
    api, branch = HfApi(), reference.revision or MAIN
    try:
        api.create_repo(reference.repo, private=private or None, exist_ok=True)
        info = api.model_info(reference.repo)
        if private and info.private is False:
            raise InputError(f"{reference.repo}: is public, and --private is given; make it private on the Hub first")
        if branch != MAIN:
            api.create_branch(reference.repo, branch=branch, exist_ok=True)
            info = api.model_info(reference.repo, revision=branch)
        there = {sibling.rfilename for sibling in info.siblings or []}
        if MANIFEST not in there and there - _IGNORED:
            raise FolderInUse(
                f"{reference}: holds {sorted(there - _IGNORED)[0]} and no artifact; choose another repository"
            )
        stale = sorted(name for name in there if name in PATTERNS and name not in content)
        done = api.create_commit(
            reference.repo,
            [
                *(CommitOperationAdd(name, content[name]) for name in sorted(content)),
                *(CommitOperationDelete(name) for name in stale),
            ],
            commit_message=message or "Artifact of kvcalib",
            revision=branch,
            parent_commit=info.sha,
        )
    except _ERRORS as error:
        raise explain(reference, error, writing=True) from None
    return str(done.oid)


def explain(reference: Reference, error: Exception, writing: bool = False) -> InputError:
    """The error to show for one of the Hub's: what is the matter, and the remedy."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    shown = str(error).strip()
    reason = shown.splitlines()[0] if shown else type(error).__name__
    reason = "HF_HUB_OFFLINE is set" if isinstance(error, OfflineModeIsEnabled) else reason
    login = "log in with `hf auth login`" + (" and a token that may write" if writing else "")
    if isinstance(error, GatedRepoError):
        return InputError(f"{reference}: is gated on the Hub; accept its terms on its page there, and {login}")
    if isinstance(error, RevisionNotFoundError):
        return InputError(
            f"{reference}: the repository is on the Hub, but has no revision {reference.revision!r}; give a branch, a "
            "tag or a commit that it has"
        )
    missing = isinstance(error, RepositoryNotFoundError)  # what the client makes of a 401, too
    if (writing and missing) or (not missing and status in (401, 403)):
        return InputError(f"{reference}: the Hub does not let you {'write' if writing else 'read'} it; {login}")
    if missing:
        return InputError(
            f"{reference}: no such folder here and no such repository on the Hub; check the name, and if it is "
            f"private, {login}"
        )
    if isinstance(error, HFValidationError):
        return InputError(f"{reference}: no such folder, and no name that the Hub allows ({reason})")
    if status is not None:
        return InputError(f"{reference}: the Hub answered with an error ({reason}); try again later")
    return InputError(
        f"{reference}: no such folder here, and the Hub cannot be reached ({reason}); check the connection and "
        "the variable HF_HUB_OFFLINE, or give a local folder"
        if not writing
        else f"{reference}: the Hub cannot be reached ({reason}); check the connection and the variable HF_HUB_OFFLINE"
    )
