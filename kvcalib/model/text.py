"""Text to token sequences.

A source is `builtin` (English that every installation has, see `kvcalib.demo`), a file (.txt; .jsonl with `text` or
`input_ids` per line; .parquet with a `text` column), one of KVQuant's presets (`wikitext2`, `c4`), or a data set on the
Hub (`owner/name`, `owner/name:split`, `owner/name:split:column`; the name may end in `@` and a branch, tag or commit).

Documents are tokenized one by one (so each begins as the tokenizer begins a text), concatenated and cut into sequences
of equal length; the first ones are taken. The presets draw random crops instead, as KVQuant's code did.
"""

from __future__ import annotations

import json
import random
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from kvcalib.errors import InputError
from kvcalib.model.revision import commit_of

Split = Literal["calibrate", "evaluate"]
PRESETS = ("wikitext2", "c4")
SUFFIXES = (".txt", ".jsonl", ".parquet")
_CHARS_PER_TOKEN = 12
"""More text than this per token is not read from the builtin source."""


def token_sequences(
    source: str,
    tokenizer: Any,
    samples: int,
    seq_len: int,
    split: Split = "calibrate",
    seed: int = 0,
    skip: int = 0,
) -> np.ndarray:
    """Up to `samples` sequences of `seq_len` token ids: int64 `[N, seq_len]`, 1 <= N <= samples.

    `skip` leaves out that many sequences at the start; the presets and `builtin` have splits of their own instead.

    Raises:
        InputError: the source does not exist, is empty, cannot be read, or is shorter than one sequence.
    """
    if samples < 1 or seq_len < 2:
        raise InputError(f"--samples is {samples} and --seq-len is {seq_len}, expected at least 1 and 2")
    if source in PRESETS:
        return _crops(source, tokenizer, samples, seq_len, split, seed)
    first = skip * seq_len if source != "builtin" else 0
    # Eight bytes a token; a list of Python's numbers takes forty.
    needed, ids = samples * seq_len + first, array("q")
    documents = 0
    for document in _documents(source, split, needed):
        documents += 1
        ids.extend(document if isinstance(document, list) else encode(tokenizer, document))
        if len(ids) >= needed:
            break
    if not ids:
        what = "no text" if not documents else f"{documents} documents without any token"
        raise InputError(f"data {source!r}: {what}; give a source with at least {seq_len} tokens of text")
    left = np.frombuffer(ids, dtype=np.int64)[first:]
    if len(left) < seq_len:
        after = f" after the first {skip} sequences" if first else ""
        raise InputError(
            f"data {source!r}: {len(left)} tokens{after}, shorter than one sequence of {seq_len}; "
            "give more text or a smaller --seq-len"
        )
    count = min(samples, len(left) // seq_len)
    return left[: count * seq_len].reshape(count, seq_len)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of one document, special tokens as the tokenizer adds them, no length warning."""
    return tokenizer(text, verbose=False)["input_ids"]


def _documents(source: str, split: Split, needed: int) -> Iterator[str | list[int]]:
    if source == "builtin":
        from kvcalib.demo import documents

        yield from documents(split, max_chars=needed * _CHARS_PER_TOKEN)
        return
    path = Path(source).expanduser()
    if path.is_file():
        yield from _file_documents(path)
    elif path.suffix in SUFFIXES or path.exists() or source.startswith((".", "/", "~")):
        raise InputError(
            f"data {source!r}: no such file; give builtin, a file ({', '.join(SUFFIXES)}), {', '.join(PRESETS)}, or a "
            "Hub data set like owner/name:split:column"
        )
    else:
        yield from _hub_documents(source, split)


def _file_documents(path: Path) -> Iterator[str | list[int]]:
    if path.suffix not in SUFFIXES:
        raise InputError(f"data {str(path)!r}: suffix is {path.suffix!r}, expected one of {', '.join(SUFFIXES)}")
    if path.suffix == ".parquet":
        yield from _parquet_documents(path)
        return
    try:
        if path.suffix == ".txt":
            text = path.read_text(encoding="utf-8")
            if text.strip():
                yield text
            return
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _json_document(line, f"{path}:{number}")
    except UnicodeDecodeError as error:
        raise InputError(f"data {str(path)!r}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise InputError(f"data {str(path)!r}: cannot be read ({error.strerror})") from None


def _json_document(line: str, where: str) -> str | list[int]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON ({error})") from None
    if isinstance(row, dict):
        if isinstance(row.get("text"), str):
            return _clean(row["text"], where)
        ids = row.get("input_ids")
        if isinstance(ids, list) and all(type(i) is int and 0 <= i < 2**31 for i in ids):
            return ids
    fields = sorted(row) if isinstance(row, dict) else type(row).__name__
    raise InputError(f"{where}: has {fields}, expected a field 'text' (string) or 'input_ids' (list of token ids)")


def _clean(text: Any, where: str) -> str:
    """`text` if it is text that UTF-8 can write, else InputError."""
    if not isinstance(text, str):
        raise InputError(f"{where}: holds {type(text).__name__}, expected text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: not valid Unicode ({error.reason} at character {error.start})") from None
    return text


def _parquet_documents(path: Path) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"data {str(path)!r}: not a readable parquet file ({error})") from None
    if "text" not in file.schema_arrow.names:
        raise InputError(f"data {str(path)!r}: columns are {file.schema_arrow.names}, expected one named 'text'")
    try:
        for batch in file.iter_batches(columns=["text"]):
            yield from (_clean(row, f"data {str(path)!r}: column 'text'") for row in batch.column(0).to_pylist() if row)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"data {str(path)!r}: damaged parquet file ({error})") from None


def pinned_source(source: str) -> str:
    """`source` with the commit of the Hub's data set in its name, `owner/name@commit:split:column`, if it is one.

    So it can be recorded, and read again as it was.
    """
    name, colon, rest = source.partition(":")
    repo, at, revision = name.partition("@")
    if (
        source == "builtin"
        or source in PRESETS
        or source.startswith((".", "/", "~"))
        or Path(source).expanduser().exists()
    ):
        return source
    commit = commit_of(repo, revision if at else None, "dataset") if "/" in repo else None
    return source if commit is None else f"{repo}@{commit}{colon}{rest}"


def _hub_documents(source: str, split: Split) -> Iterable[str]:
    name, _, rest = source.partition(":")
    part, _, column = rest.partition(":")
    rows = load_hub_dataset(name, None, part or {"calibrate": "train", "evaluate": "test"}[split])
    column = column or "text"
    for row in rows:
        if column not in row:
            raise InputError(
                f"data {source!r}: columns are {sorted(row)}, expected {column!r}; give owner/name:split:column"
            )
        yield _clean(row[column], f"data {source!r}: column {column!r}")


def load_hub_dataset(name: str, config: str | None, split: str, **kwargs: Any) -> Iterator[dict[str, Any]]:
    """Rows of a Hub data set, streamed; InputError if it cannot be reached.

    Args:
        name: `owner/name` or `owner/name@revision`; all files are taken of the commit that this is at.
    """
    import datasets

    repo, at, revision = name.partition("@")
    commit = commit_of(repo, revision if at else None, "dataset") or (revision if at else None)
    if commit is not None:
        kwargs["revision"] = commit
    try:
        yield from datasets.load_dataset(repo, config, split=split, streaming=True, **kwargs)
    except GeneratorExit:
        raise
    except Exception as error:  # datasets raises a different class for every way of failing
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(
            f"data {name!r}: neither a file nor a Hub data set that can be reached, split {split!r} ({reason})"
        ) from error


def _crops(preset: str, tokenizer: Any, samples: int, seq_len: int, split: Split, seed: int) -> np.ndarray:
    """KVQuant's loaders: random crops of Wikitext-2 (joined by blank lines) or of C4 documents that are long enough."""
    rng = random.Random(seed)
    short = f"data {preset!r}: shorter than one sequence of {seq_len} tokens; give a smaller --seq-len"
    if preset == "wikitext2":
        rows = load_hub_dataset(
            "Salesforce/wikitext", "wikitext-2-raw-v1", {"calibrate": "train", "evaluate": "test"}[split]
        )
        ids = np.asarray(encode(tokenizer, "\n\n".join(row["text"] for row in rows)), dtype=np.int64)
        if len(ids) <= seq_len:
            raise InputError(short)
        if split == "evaluate":
            # The whole test text in order, as perplexities are quoted.
            count = min(samples, len(ids) // seq_len)
            return ids[: count * seq_len].reshape(count, seq_len)
        starts = [rng.randint(0, len(ids) - seq_len - 1) for _ in range(samples)]
        return np.stack([ids[s : s + seq_len] for s in starts])
    shard = {"calibrate": "en/c4-train.00000-of-01024.json.gz", "evaluate": "en/c4-validation.00000-of-00008.json.gz"}
    rows = load_hub_dataset("allenai/c4", None, "train", data_files={"train": shard[split]})
    crops = []
    for row in rows:
        document = encode(tokenizer, row["text"])
        if len(document) > seq_len:
            start = rng.randint(0, len(document) - seq_len - 1)
            crops.append(np.asarray(document[start : start + seq_len], dtype=np.int64))
        if len(crops) == samples:
            break
    if not crops:
        raise InputError(short)
    return np.stack(crops)
