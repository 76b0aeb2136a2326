"""Cards and the Hub: an artifact's card with measured figures, pushed and pulled whole.

A comparison is what `eval --compare` wrote. Its table goes into the card as it is: figures, intervals and protocol.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from kvcalib.artifact import hub, store
from kvcalib.artifact.card import Measured, card, without_folders
from kvcalib.artifact.manifest import Manifest
from kvcalib.errors import CorruptFile, InputError
from kvcalib.evaluation.comparison import Comparison, Interval, Row
from kvcalib.runtime.loader import load

HEAD = ["contender", "effective bits", "cache MiB", "PPL", "delta NLL", "KLD", "KLD 99 %", "top-1 %"]
MIB = 1 << 20


def read_comparison(path: Path) -> Comparison:
    """The comparison in the file `path`.

    Raises:
        InputError: there is none. CorruptFile: it is something else, or damaged.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; `kvcalib eval ARTIFACT --compare ... --json {path}` writes one")
    try:
        return Comparison.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise CorruptFile(
            f"{path}: is no comparison of kvcalib: {where}: {first['msg']}; give the file that `kvcalib eval --compare "
            "... --json` wrote"
        ) from None


def measured(comparison: Comparison, manifest: Manifest, mine: str | None = None) -> Measured:
    """The table of a card; `mine` is the name under which the artifact was compared.

    Raises:
        InputError: the comparison is of another model than the artifact's.
    """
    named, expected = (name.rstrip("/").rsplit("/", 1)[-1] for name in (comparison.model, manifest.model.name))
    if named != expected:
        raise InputError(
            f"the comparison's model is {comparison.model!r}, the artifact's {manifest.model.name!r}; give a "
            "comparison of the artifact's model"
        )
    text = (
        f"{comparison.protocol} {comparison.samples} sequences of {comparison.seq_len} tokens of "
        f"{without_folders(comparison.data)}, "
        f"{comparison.dtype}, {comparison.machine}, {comparison.created[:10]}. The unquantized model's NLL is "
        f"{comparison.fp16_nll:.4f} nats per token. In brackets: 95 % intervals, by paired bootstrap over sequences."
    )
    return Measured(text, HEAD, [_cells(row) for row in comparison.rows], mine)


def _cells(row: Row) -> list[str]:
    if row.failed is not None:
        return [row.name, f"failed: {row.failed}", *[""] * (len(HEAD) - 2)]
    return [
        row.name,
        f"{row.effective_bits:.2f}",
        f"{row.cache_bytes / MIB:.2f}",
        f"{row.ppl:.3f}",
        _interval(row.delta_nll, "+.4f"),
        _interval(row.kld, ".4f"),
        f"{row.kld_p99:.3f}",
        _interval(row.top1_agreement, ".2f", 100),
    ]


def _interval(found: Interval, form: str, times: float = 1.0) -> str:
    value, low, high = (format(times * x, form) for x in (found.value, found.low, found.high))
    return f"{value} ({low} to {high})"


def with_new_card(folder: Path, comparison: Path | None, license: str | None) -> tuple[Manifest, dict[str, bytes]]:
    """The artifact in `folder`, checked whole, its card made anew: manifest and files by name."""
    load(folder)
    manifest, content = store.contents(folder)
    table = None if comparison is None else measured(read_comparison(comparison), manifest, folder.resolve().name)
    content = store.with_card(content, manifest, card(manifest, table, license))
    return manifest, content


def refresh_card(folder: Path, comparison: Path | None = None, license: str | None = None) -> Path:
    """Write the card of the artifact in `folder` anew, with a comparison's table; its path.

    The manifest records the card's hash, so it changes too: what refers to the artifact by its manifest (adaptive
    widths, saved caches) has to be made again.

    Raises:
        InputError, CorruptFile: no whole artifact, or no comparison of its model.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the folder of an artifact")
    _, content = with_new_card(folder, comparison, license)
    store.install(folder, content, overwrite=True)
    return folder / store.CARD


def push(
    folder: Path,
    repo: str,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    comparison: Path | None = None,
    license: str | None = None,
) -> tuple[hub.Reference, str]:
    """Publish the artifact in `folder`, checked whole first: where, and the commit.

    Args:
        comparison, license: a card with these is pushed; the local artifact keeps the one it has.

    Raises:
        InputError, CorruptFile, FolderInUse: see `hub.push`.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the folder of an artifact")
    reference = hub.parse(repo, revision)
    if comparison is None and license is None:
        load(folder)
        _, content = store.contents(folder)
    else:
        _, content = with_new_card(folder, comparison, license)
    return reference, hub.push(content, reference, private, message)


def pull(name: str, out: Path | None = None, overwrite: bool = False) -> tuple[Path, hub.Reference, str]:
    """Fetch the artifact `name` (`owner/name@revision`) into a folder: which, from where, and the commit.

    Args:
        out: default: `artifacts/` and the repository's name.

    Raises:
        InputError, CorruptFile, FolderInUse: see `hub.pull`.
    """
    reference = hub.parse(name)
    out = out or Path("artifacts") / reference.repo.split("/")[1]
    _, commit = hub.pull(reference, out, overwrite)
    load(out)
    return out, reference, commit
