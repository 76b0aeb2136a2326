"""Random lies: a seed and a number give one artifact, changed in one to three ways, signed anew or not."""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from tests.hostile.builders import CARD, MANIFEST, TENSORS, Arrays, Body, base, file_of, render, write

EXTREMES: list[Any] = [
    -1, 0, 1, 2, 3, 7, 8, 9, 15, 16, 31, 32, 33, 255, 256, 4096, 4097, 32767, 32768, 65535, 2**31 - 1, 2**31, 2**32,
    2**53 - 1, 2**53, 2**63 - 1, 2**63, 2**64, 10**18, 10**400, -(2**31), -(2**63), 0.0, -0.0, 0.5, 1.0, -1.5, 3.0,
    65504.0, 1e-320, 1e300, -1e300, float("nan"), float("inf"), True, False, None, "", "0", "key", "head", "row",
    "token", "float32", "int16", "uint8", "F32", "0" * 64, "A" * 64, "../../etc/passwd", "/dev/zero", "\x00", "\x1b[2J",
    "é", "😀", "\ud800", "x" * 5000, [], {}, [0], [[]], {"": 0}, [1] * 300,
]  # fmt: skip
NUMBERS = [0.0, -0.0, 1.0, -1.0, 1e-40, 65504.0, 65505.0, -65504.0, 3e38, -3e38, np.nan, np.inf, -np.inf]


@dataclass(frozen=True)
class Case:
    """One fuzzed artifact: what was done, and whether a file is not what its hash or digest was taken of."""

    kind: str
    altered: bool


def nodes(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of everything within a JSON value."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += nodes(inner, (*path, key))
    return found


def change_json(body: Any, chance: random.Random) -> None:
    """One change anywhere in a JSON object, in place."""
    *steps, last = chance.choice(nodes(body))
    holder = body
    for step in steps:
        holder = holder[step]
    old = holder[last]
    action = chance.randrange(9)
    if action <= 2:
        holder[last] = copy.deepcopy(chance.choice(EXTREMES))
    elif action == 3:
        del holder[last]
    elif action == 4 and isinstance(holder, dict):
        holder[chance.choice(["colour", "", "index", "key", "digest", "../x", str(last) + " "])] = copy.deepcopy(old)
    elif action == 4:
        holder.insert(chance.randrange(len(holder) + 1), copy.deepcopy(old))
    elif action == 5 and type(old) in (int, float):
        holder[last] = chance.choice([old + 1, old - 1, old * 2, -old, float(old), str(old), old + 0.5])
    elif action == 6 and isinstance(old, str):
        holder[last] = chance.choice([old.upper(), old[:-1], old + "0", old[::-1], [old], old + "\n"])
    elif action == 7 and isinstance(old, list):
        chance.shuffle(old)
    else:
        *steps, other = chance.choice(nodes(body))
        for step in steps:
            body = body[step]
        holder[last] = copy.deepcopy(body[other])


def change_bytes(content: bytes, chance: random.Random) -> bytes:
    """A few bytes flipped, removed, repeated, put in or cut off."""
    made = bytearray(content)
    for _ in range(chance.choice([1, 1, 1, 2, 8])):
        at = chance.randrange(len(made) + 1)
        action = chance.randrange(6)
        if action <= 2 and at < len(made):
            made[at] ^= 1 << chance.randrange(8)
        elif action == 3:
            del made[at : at + chance.choice([1, 8, 100])]
        elif action == 4:
            made[at:at] = chance.choice([b"\0", b"\xff" * 8, b"{", b"]", b'"', b"9" * 30, bytes(made[at : at + 40])])
        else:
            del made[at:]
    return bytes(made)


def change_arrays(arrays: Arrays, chance: random.Random) -> None:
    """One tensor: values, dtype, shape, or another tensor's content."""
    name = chance.choice(list(arrays))
    array = arrays[name]
    action = chance.randrange(10)
    if action <= 4:
        flat, most = array.reshape(-1), 1 if action else 5
        for _ in range(most):
            at = chance.randrange(flat.size)
            if array.dtype.kind == "f":
                flat[at] = chance.choice([*NUMBERS, float(flat[at]) * 2, float(flat[at]) + 1e-3])
            else:
                low, high = (-32768, 32767) if array.dtype == np.dtype("<i2") else (0, 255)
                near = chance.choice(
                    [int(flat[at]) + 1, int(flat[at]) - 1, 0, 1, 8, 31, 32, low, high, chance.randint(low, high)]
                )
                flat[at] = min(max(int(near), low), high)
    elif action == 5:
        with np.errstate(all="ignore"):
            arrays[name] = array.astype(chance.choice(["<f4", "<i2", "u1", "<f8", "<i8", "<f2"]))
    elif action == 6:
        arrays[name] = chance.choice([array[:-1], array[None], array.reshape(-1), array[::-1], array[:0]]).copy()
    elif action == 7:
        arrays[name] = arrays[chance.choice(list(arrays))].copy()
    elif action == 8:
        del arrays[name]
    else:
        arrays[chance.choice(["layers.0.key.colour", "layers.2.key.word", "", "../x"])] = array.copy()


def harmless(arrays: Arrays, chance: random.Random) -> None:
    """A change that leaves a valid artifact: numbers within their range, channels that swap their places in the row."""
    role = chance.choice(["key", "value"])
    prefix = f"layers.{chance.randrange(2)}.{role}."
    action = chance.randrange(6)
    if action == 5 and prefix + "basis" in arrays:
        arrays[prefix + "basis"] = np.roll(-arrays[prefix + "basis"], chance.randrange(16), axis=2)
    elif action == 4 and prefix + "feedback" in arrays:
        arrays[prefix + "feedback"] *= np.float32(10.0 ** chance.uniform(-30, 4))
    elif action == 0:
        arrays[prefix + "weight"] *= np.float32(10.0 ** chance.uniform(-30, 18))
    elif action == 1:
        arrays[prefix + "codebook"] *= np.float32(10.0 ** chance.uniform(-30, 3))
    elif action == 2:
        arrays[prefix + "codebook"][:] = np.float32(chance.choice([0.0, 1.0, -65504.0, 65504.0]))
    else:
        widths = arrays[prefix + "widths"]
        places = np.argwhere(widths == widths[0, 0])
        (h, d), (other, e) = (tuple(places[chance.randrange(len(places))]) for _ in range(2))
        for table in ("word", "shift"):
            t = arrays[prefix + table]
            t[:, h, d], t[:, other, e] = t[:, other, e].copy(), t[:, h, d].copy()


def harmless_fields(body: Body, chance: random.Random) -> None:
    """Fields that may have any value of their range."""
    action = chance.randrange(6)
    if action == 0:
        body["runtime"] = {"sinks": chance.choice([0, 1, 4096]), "recent": chance.choice([0, 3, 2**53 - 1])}
    elif action == 1:
        body["calibration"]["data"] = chance.choice(["", "é😀", "\x1b[2J", "/etc/passwd", "x" * 10_000, "a\nb"])
    elif action == 2:
        for layer in body["layers"]:
            for role in ("key", "value"):
                groups = layer[role]["head_dim"] if layer[role]["scope"] == "head" else 32
                layer[role]["outliers"] = chance.randrange(groups)
    elif action == 3:
        body.pop("budget", None)
        body.pop("refined", None)
    elif action == 4:
        body["layers"][1]["friendliness"] = chance.choice(
            [None, {"key_error": 0.0, "value_error": 1e300, "share": 1e-9}]
        )
    else:
        for layer in body["layers"]:
            layer[chance.choice(["key", "value"])]["scope"] = chance.choice(["token", "head"])


def change_header(header: Body, chance: random.Random) -> None:
    """One change of the safetensors header, offsets more often than the rest."""
    names = [name for name, entry in header.items() if isinstance(entry, dict) and "shape" in entry]
    if chance.random() < 0.5 or not names:
        change_json(header, chance)
        return
    name, other = chance.choice(names), chance.choice(names)
    entry = header[name]
    action = chance.randrange(4)
    if action == 0:
        entry["data_offsets"] = [chance.choice([0, 1, 8, 2000, 2**31, 2**63, -1]) for _ in range(2)]
    elif action == 1:
        entry["data_offsets"] = copy.deepcopy(header[other].get("data_offsets"))
    elif action == 2:
        header[name], header[other] = header[other], header[name]
    else:
        entry["shape"] = chance.choice([[1, 1, 1], [2, 16], [16, 2], [0, 2, 16], [10**18], header[other]["shape"]])


def disturb(folder: Path, chance: random.Random) -> None:
    """Something on the file system: links, FIFOs, folders, files that are missing, swapped or more."""
    name = chance.choice([MANIFEST, TENSORS, CARD])
    path, action = folder / name, chance.randrange(10)
    if action == 0:
        path.unlink()
    elif action in (1, 2, 3):
        outside = folder.parent / "outside.bin"
        path.rename(outside)
        path.symlink_to(
            chance.choice([outside, Path("..") / outside.name, Path(name), Path("/dev/zero"), Path("none")])
        )
    elif action == 4:
        path.unlink()
        os.mkfifo(path)
    elif action == 5:
        path.unlink()
        path.mkdir()
    elif action == 6:
        other = folder / chance.choice([MANIFEST, TENSORS, CARD])
        first, second = path.read_bytes(), other.read_bytes()
        path.write_bytes(second)
        other.write_bytes(first)
    elif action == 7:
        path.write_bytes(chance.choice([b"", b"\0", b"{}", b"[" * 5000, path.read_bytes() * 2]))
    elif action == 8:
        (folder / "exports").mkdir()
        os.mkfifo(folder / "exports" / "cache_config.json")
    else:
        (folder / chance.choice(["model.py", "pytorch_model.bin", "..x", "manifest.json.bak"])).write_bytes(
            b"import os"
        )


def make(folder: Path, seed: int, number: int) -> Case:
    """Write case `number` to `folder`."""
    chance = random.Random(f"{seed}:{number}")
    kind = chance.choice([*SIGNED, *SIGNED, *UNSIGNED])
    times = chance.choice([1, 1, 1, 2, 3])

    def repeat(change: Callable[[Any, random.Random], None]) -> Callable[[Any], None]:
        return lambda value: [change(value, chance) for _ in range(times)] and None

    def in_header(content: bytes) -> bytes:
        length = int.from_bytes(content[:8], "little")
        return file_of(change_bytes(content[8 : 8 + length], chance), content[8 + length :])

    valid: dict[str, Any] = {"arrays": repeat(harmless), "body": repeat(harmless_fields)}
    signed: dict[str, dict[str, Any]] = {
        "fields": {"body": repeat(change_json)},
        "tensors": {"arrays": repeat(change_arrays)},
        "header": {"header": repeat(change_header)},
        "header bytes": {"raw": in_header},
        "file bytes": {"raw": lambda content: change_bytes(content, chance)},
        "harmless": valid,
    }
    write(folder, given=_base(chance.randrange(8)), **signed.get(kind, valid if kind == "several" else {}))
    before = {name: (folder / name).read_bytes() for name in (MANIFEST, TENSORS, CARD)}
    if kind in UNSIGNED:
        disturb(folder, chance) if kind == "files" else _alter(folder, kind, chance)
    now = [(folder / name).read_bytes() if _plain(folder / name) else content for name, content in before.items()]
    return Case(kind, now != list(before.values()))


SIGNED = ("fields", "tensors", "header", "header bytes", "file bytes", "harmless")
UNSIGNED = ("fields unsigned", "tensors unsigned", "bytes unsigned", "several", "files")


def _plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


@lru_cache(maxsize=8)
def _base(seed: int) -> tuple[Body, Arrays]:
    return base(seed)


def _alter(folder: Path, kind: str, chance: random.Random) -> None:
    """Change what has been signed."""
    if kind == "fields unsigned":
        body = json.loads((folder / MANIFEST).read_bytes())
        change_json(body, chance)
        (folder / MANIFEST).write_bytes(render(body))
        return
    path = folder / {"tensors unsigned": TENSORS}.get(kind, chance.choice([MANIFEST, TENSORS, CARD]))
    content = path.read_bytes()
    if kind == "tensors unsigned":
        # Within the numbers, so that the header is whole.
        at = len(content) - 1 - chance.randrange(2000)
        made = content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1 :]
    else:
        made = change_bytes(content, chance)
    path.write_bytes(made)
