"""What loading allocates is a small multiple of what the files hold: the growth of a child's memory, measured."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

import kvcalib
from kvcalib.errors import KvcalibError
from kvcalib.files import read_tensors
from tests.hostile.builders import TENSORS, base, file_of, pieces, put, write

SPARE = 24 << 20
"""Bytes that the first load of a process may take on its own: libraries, tables, the heap's rounding."""
TIMES = 6


def peak(do) -> int:
    """Bytes by which the resident memory of a forked child grows at most, while it runs `do`."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
            before = resident("VmRSS")
            try:
                do()
                outcome = "loaded"
            except KvcalibError as error:
                outcome = str(error)
            os.write(writing, json.dumps([resident("VmHWM") - before, outcome]).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        grown, _ = json.loads(pipe.read())
    os.waitpid(child, 0)
    return grown


def resident(name: str) -> int:
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1))


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def wide(body, arrays):
    """Many heads whose channels have no bits, but for one of 8: padded, its codebook takes 64 times the file."""
    heads, dim = 2048, 256
    for layer in body["layers"]:
        layer["friendliness"] = None
        for role in ("key", "value"):
            layer[role].update(kv_heads=heads, head_dim=dim, words=1, scope="head", outliers=0, segment="head",
                               feedback=False, basis=False)  # fmt: skip
            prefix = f"layers.{layer['index']}.{role}."
            for name in ("feedback", "basis"):
                arrays.pop(prefix + name, None)
            widths = np.zeros((heads, dim), np.uint8)
            widths[0, 0] = 8
            word, shift = np.full((2, heads, dim), -1, np.int16), np.zeros((2, heads, dim), np.uint8)
            word[:, 0, 0], shift[1, 0, 0] = 0, 4
            named = {
                "widths": widths, "word": word, "shift": shift, "weight": np.ones((heads, dim), np.float32),
                "codebook": np.concatenate([np.arange(256), np.zeros(heads * dim - 1)]).astype(np.float32),
            }  # fmt: skip
            arrays |= {prefix + name: array for name, array in named.items()}
    return body, arrays


@pytest.fixture(scope="module", autouse=True)
def warm(tmp_path_factory):
    """What a process takes once is taken by the parent."""
    kvcalib.load(write(tmp_path_factory.mktemp("warm") / "a"))


def test_one_wide_channel_among_many_narrow_ones(tmp_path):
    folder = write(tmp_path / "a", given=wide(*base()))
    assert size(folder) > 30 << 20
    assert peak(lambda: kvcalib.load(folder)) < TIMES * size(folder) + SPARE
    # Padded it would not fit: the bound above would notice.
    assert 10 * TIMES * size(folder) < 2 * 2 * 2048 * 256 * 256 * 4


@pytest.mark.parametrize(
    "lie",
    [
        {"body": put("tensors", "layers.0.key.codebook", "shape", [10**9])},
        {"header": put("layers.0.key.codebook", "shape", [10**9])},
        {"header": put("layers.0.key.codebook", "data_offsets", [0, 10**12])},
        {"body": put("layers", 0, "key", "kv_heads", 1 << 40)},
        {"body": put("layers", 0, "key", "words", 1 << 40)},
        {"body": put("runtime", "sinks", 1 << 40)},
        {"raw": lambda content: (1 << 40).to_bytes(8, "little") + content[8:]},
        {"raw": lambda content: file_of(b"[" * 1_000_000, b"")},
    ],
    ids=["record", "shape", "offsets", "heads", "words", "sinks", "header", "brackets"],
)
def test_sizes_that_a_small_file_claims(tmp_path, lie):
    folder = write(tmp_path / "a", **lie)
    assert peak(lambda: kvcalib.load(folder)) < TIMES * size(folder) + SPARE


def test_a_table_of_a_billion_entries_that_is_there_only_as_a_hole(tmp_path):
    """A sparse file is as large as it says, and takes nothing: it must be refused before it is read."""
    folder = write(tmp_path / "a")
    with open(folder / TENSORS, "r+b") as file:
        file.truncate(4 << 30)
    assert peak(lambda: kvcalib.load(folder)) < SPARE
    header, data = pieces(base()[1])
    header["more"] = {"dtype": "F32", "shape": [1 << 30], "data_offsets": [len(data), len(data) + (4 << 30)]}
    body = file_of(header, data)
    (folder / TENSORS).write_bytes(body)
    with open(folder / TENSORS, "r+b") as file:
        file.truncate(len(body) + (4 << 30))
    assert peak(lambda: kvcalib.load(folder)) < SPARE
    # Of a file of tensors only those that are asked for are read.
    assert peak(lambda: read_tensors(folder / TENSORS, ["layers.0.key.word"])) < SPARE


def test_json_takes_a_bounded_multiple_of_its_text(tmp_path):
    """Some thirty times; that is why no more than 8 MiB of a manifest are parsed at all."""
    text = b'{"format": "kvcalib-artifact", "format_version": 3, "layers": [' + b'{"":0},' * 200_000 + b"0]}"
    folder = write(tmp_path / "a", text=lambda _: text)
    assert peak(lambda: kvcalib.load(folder)) < 48 * size(folder)
    folder = write(tmp_path / "b", text=lambda _: text + b" " * (9 << 20))
    assert peak(lambda: kvcalib.load(folder)) < SPARE
