"""English text that every installation already has: the docstrings of Python and of the installed packages.

Calibrating and evaluating need English prose, and a tool that works offline cannot download any. Python's
standard library and kvcalib's dependencies bring some with them. Their files are parsed, never imported.

What is guaranteed, whatever is installed:

* A file belongs to one split, by the SHA-256 of its name `package/relative/path.py`: 90 % train, 5 %
  calibrate, 5 % evaluate. The name alone decides, so a file keeps its split when other packages come or go.
* No paragraph stands in two splits. Evaluate keeps its paragraphs, calibrate leaves out those of evaluate,
  and train leaves out those of both. Two paragraphs are the same when their letters are (`paragraph_key`):
  case, digits, spaces and punctuation do not count.
* No paragraph stands twice in one split: the first document keeps it.
* Documents come in the order of their file's hash, so any beginning of a split is a mixture of the packages.

What is not: paragraphs that differ in one word are two, and another version of a package has other text.
"""

import ast
import hashlib
import importlib.machinery
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args

Split = Literal["train", "calibrate", "evaluate"]

_PACKAGES = """
accelerate anyio click datasets dateutil filelock fsspec huggingface_hub jinja2 joblib jsonschema mpmath
narwhals networkx numba numpy packaging pandas psutil pyarrow pydantic pygments rich safetensors scipy sklearn
sympy tokenizers torch tqdm transformers typer yaml
"""
PACKAGES: tuple[str, ...] = tuple(_PACKAGES.split())
"""Read beside the standard library, which is named `python`; one that is not installed is passed over."""

MIN_CHARS = 400
"""A shorter document is dropped: its context is too short to learn or to measure anything from."""

# The first of these keeps a paragraph that several have; train is last, so that the others need not read it.
_KEEPERS: tuple[Split, ...] = ("evaluate", "calibrate", "train")

_SKIPPED_FOLDERS = {"test", "tests", "_internal", "site-packages", "dist-packages", "_vendor", "__pycache__"}
_REFERENCES = {"topics.py", "_torch_docs.py", "_tensor_docs.py", "_add_newdocs.py", "_add_newdocs_scalars.py"}

# Prose has many of these, tables and code have few.
_COMMON_TEXT = """
a an and any are as at be been but by can does each for from given has have how if in into is it its may
more must no not of on one only or other same should so such than that the then there these they this to
used when where which will with you
"""
_COMMON_WORDS = frozenset(_COMMON_TEXT.split())
_MIN_WORDS, _MIN_COMMON, _MIN_PLAIN = 8, 0.25, 0.94

_UNDERLINE = re.compile(r"^[-=~^*#_.+|]{3,}[-=~^*#_.+| ]*$")
_TABLE_HEAD = re.compile(r"^\*{0,2}[\w.*`, ]+ : .*$|^:r?type\b.*$")
_ITEM_HEAD = re.compile(
    r"^(?:[-*+•] |\d+[.)] "  # of a list
    r"|:\w+(?: [^:]*)?: "  # :param name:
    r"|`*\*{0,2}\w+`* ?(?:\([^()]*\))?(?::| --?) "  # name (type): description
    r"|`*\*{0,2}\w+`* ?\([^()]*\):$)"
)
_ROLE = re.compile(r":[a-z:+-]+:`~?\.?(?:([^`<]+?) ?<[^`]*>|([^`]*))`")
_LINK = re.compile(r"`([^`<]+?) ?<[^`>]*>`_{1,2}|\[([^\]]+)\]\([^)]*\)")
_MARKUP = re.compile(r"`+(?:_{1,2}(?!\w))?|\*\*|\[[\w.*]+\]_")
_LOOSE = re.compile(r" +([.,;:](?: |$))")  # where a footnote's mark stood
_NOT_LETTERS = re.compile(r"[^a-z]+")
_NOT_PLAIN = re.compile(r"[^A-Za-z ,.'-]")
_WORD = re.compile(r"[A-Za-z']+")


def documents(split: Split, max_chars: int | None = None) -> list[str]:
    """The documents of a split, one for each file: paragraphs of one line each, joined by an empty line.

    `max_chars` ends the list once that many characters are reached; the last document is cut after a word.
    Raises ValueError for another split's name and for `max_chars` below 1.
    """
    if split not in get_args(Split):
        raise ValueError(f"split is {split!r}, expected one of {', '.join(get_args(Split))}; choose one")
    if max_chars is not None and max_chars < 1:
        raise ValueError(f"max_chars is {max_chars}, expected at least 1; leave it out to read everything")
    files = _files()
    seen: set[str] = set()
    for before in _KEEPERS[: _KEEPERS.index(split)]:
        for path in files[before]:
            seen.update(map(paragraph_key, paragraphs(path)))
    found: list[str] = []
    left = max_chars
    for path in files[split]:
        kept = []
        for paragraph in paragraphs(path):
            key = paragraph_key(paragraph)
            if key not in seen:
                seen.add(key)
                kept.append(paragraph)
        document = "\n\n".join(kept)
        if len(document) < MIN_CHARS:
            continue
        if left is not None and len(document) >= left:
            found.append(document if len(document) == left else document[:left].rsplit(maxsplit=1)[0])
            break
        found.append(document)
        left = None if left is None else left - len(document)
    return found


def split_of(name: str) -> Split:
    """The split of the file `package/relative/path.py`: the first 8 hex digits of its SHA-256, modulo 100."""
    place = int(hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:8], 16) % 100
    return "train" if place < 90 else "calibrate" if place < 95 else "evaluate"


def paragraph_key(paragraph: str) -> str:
    """What makes two paragraphs the same: their letters, in lower case."""
    return _NOT_LETTERS.sub("", paragraph.lower())


def paragraphs(path: Path) -> list[str]:
    """The English paragraphs of a Python file's docstrings, in order; none if it cannot be read or parsed."""
    try:
        source = path.read_bytes()
        if b'"""' not in source and b"'''" not in source:
            return []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escapes
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    texts = _long_strings(tree) if path.name in _REFERENCES else _docstrings(tree)
    return [paragraph for text in texts for paragraph in prose(text)]


def prose(docstring: str) -> Iterator[str]:
    """The paragraphs of a docstring that are English, each on one line, without doctests, tables and code."""
    lines: list[str] = []
    verbatim = False  # inside a doctest, until the next empty line, or inside a fence, until its end
    fence = False
    raws = [*docstring.splitlines(), ""]
    for raw, after in zip(raws, [*raws[1:], ""], strict=True):
        line = raw.strip()
        if after.strip() and _indent(after) > _indent(raw) and len(line.split()) <= 8:
            line = ""  # the heading of a section or the type that a description below explains
        if line.startswith("```"):
            fence, line = not fence, ""
        elif fence:
            continue
        verbatim = bool(line) and (verbatim or line.startswith((">>>", "... ", "$ ", ".. ")))
        if line and _UNDERLINE.match(line):
            lines = lines[:-1]  # the heading above it
            line = ""
        head = _ITEM_HEAD.match(line)
        if verbatim or not line or head or _TABLE_HEAD.match(line):
            text = _plain(" ".join(lines))
            if _is_english(text):
                yield text
            lines = []
        if head:
            line = line[head.end() :].strip()
        if line and not verbatim and not _TABLE_HEAD.match(line):
            lines.append(line)


def _files() -> dict[Split, list[Path]]:
    """Every Python file of the standard library and of `PACKAGES`, by split, in the order of the hash."""
    found: dict[Split, list[tuple[str, str]]] = {"train": [], "calibrate": [], "evaluate": []}
    for package, folder in _folders():
        for root, folders, names in os.walk(folder):
            folders[:] = [each for each in folders if each not in _SKIPPED_FOLDERS]
            inside = package + root[len(folder) :].replace(os.sep, "/")
            for each in names:
                if each.endswith(".py"):
                    name = f"{inside}/{each}"
                    order = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()
                    found[split_of(name)].append((order, root + os.sep + each))
    return {split: [Path(path) for _, path in sorted(files)] for split, files in found.items()}


def _folders() -> Iterator[tuple[str, str]]:
    yield "python", sysconfig.get_paths()["stdlib"]
    for package in PACKAGES:
        spec = importlib.machinery.PathFinder.find_spec(package)  # neither imports nor asks what is imported
        for folder in (spec.submodule_search_locations if spec else None) or ():
            yield package, os.fspath(folder)


def _docstrings(node: ast.AST) -> Iterator[str]:
    """The docstrings of a module, of its classes and of their functions, in the order of the file."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)
        if text:
            yield text
    if isinstance(node, ast.Module | ast.ClassDef | ast.If | ast.Try):
        for child in node.body:
            yield from _docstrings(child)


def _long_strings(tree: ast.Module) -> Iterator[str]:
    """Every long string of a file that is all documentation: a table of topics, calls that add docstrings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) >= 200:
            yield node.value


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _plain(text: str) -> str:
    text = _ROLE.sub(lambda found: found[1] or found[2], text)
    text = _LINK.sub(lambda found: found[1] or found[2], text)
    return _LOOSE.sub(r"\1", " ".join(_MARKUP.sub("", text).split()))


def _is_english(text: str) -> bool:
    if not text.isascii() or not text.endswith((".", "!", "?", ":")):
        return False
    words = _WORD.findall(text)
    if len(words) < _MIN_WORDS or len(_NOT_PLAIN.findall(text)) > (1 - _MIN_PLAIN) * len(text):
        return False
    return sum(word.lower() in _COMMON_WORDS for word in words) >= _MIN_COMMON * len(words)
