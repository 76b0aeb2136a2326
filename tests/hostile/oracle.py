"""Is this folder an artifact? Written from docs/artifact.md alone, in plain Python: it shares no code with the reader.

`fault(folder)` names the first thing that the specification forbids, or gives None.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Check = Callable[[Any], bool]
PLANES = {0: [], 1: [1], 2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [4, 4]}
KINDS = {"F32": ("float32", 4, "<f4"), "I16": ("int16", 2, "<i2"), "U8": ("uint8", 1, "u1")}
PARTS = {"widths": "u1", "codebook": "<f4", "word": "<i2", "shift": "u1", "weight": "<f4"}
NOTE = '{"format":"kvcalib-artifact","format_version":4}'
MOST = 2**53 - 1


class Forbidden(Exception):
    """What the specification forbids."""


def integer(low: int, high: int = MOST) -> Check:
    return lambda x: type(x) is int and low <= x <= high


def real(low: float = -math.inf, high: float = math.inf, above: bool = False) -> Check:
    return lambda x: type(x) is float and math.isfinite(x) and low <= x <= high and not (above and x == low)


def one_of(*values: Any) -> Check:
    return lambda x: any(type(x) is type(v) and x == v for v in values)


def text(pattern: str = r"(?s).*") -> Check:
    return lambda x: type(x) is str and re.fullmatch(pattern, x) is not None


def or_null(check: Check) -> Check:
    return lambda x: x is None or check(x)


def listed(check: Check) -> Check:
    return lambda x: type(x) is list and all(check(y) for y in x)


HASH = "[0-9a-f]{64}"
ROLE: dict[str, Check] = {
    "kv_heads": integer(1), "head_dim": integer(1), "words": integer(0), "segment": one_of("head", "row"),
    "group": one_of(0, 16), "scope": one_of("token", "head"), "outliers": integer(0), "feedback": one_of(True, False),
    "basis": one_of(True, False), "mean_bits": real(0, 8), "predicted_loss": real(0),
}  # fmt: skip
FRIENDLY: dict[str, Check] = {"key_error": real(0), "value_error": real(0)}
FRIENDLY_MAY: dict[str, Check] = {
    "key_by_head": listed(real(0)), "value_by_head": listed(real(0)), "overlap": real(0, 1), "alpha": real(0, 1),
    "share": real(0, above=True),
}  # fmt: skip


def fields(value: Any, must: dict[str, Check], may: dict[str, Check] | None = None) -> bool:
    known = must | (may or {})
    return (
        type(value) is dict
        and set(must) <= set(value) <= set(known)
        and all(known[name](found) for name, found in value.items())
    )


def friendly(value: Any) -> bool:
    return fields(value, FRIENDLY, FRIENDLY_MAY)


def role(value: Any) -> bool:
    return fields(value, ROLE)


LAYER: dict[str, Check] = {
    "index": integer(0), "key": role, "value": role, "friendliness": or_null(friendly), "sliding": or_null(integer(1)),
}  # fmt: skip
TOP: dict[str, Check] = {
    "format": one_of("kvcalib-artifact"),
    "format_version": one_of(4),
    "digest": text(HASH),
    "producer": lambda x: fields(x, {"name": one_of("kvcalib"), "version": text()}),
    "model": lambda x: fields(x, {
        "name": text(), "revision": or_null(text()), "model_type": text(), "num_hidden_layers": integer(1),
        "hidden_size": integer(1), "num_attention_heads": integer(1), "vocab_size": integer(1),
        "rope_parameters_sha256": text(HASH), "weights_sha256": text(f"{HASH}|unknown"),
    }),
    "calibration": lambda x: fields(x, {
        "data": text(), "sequences": integer(1), "tokens": integer(1), "sampled_tokens": integer(1),
        "seq_len": integer(2), "seed": integer(-MOST), "nll": real(), "fingerprint": text(HASH),
    }),
    "fit": lambda x: fields(x, {
        "format": one_of("nuq", "nf", "int"), "weights": one_of("fisher_scale", "fisher", "none"),
        "key_granularity": one_of("layer", "head", "channel"), "value_granularity": one_of("layer", "head", "channel"),
        "outliers": real(0, 0.5), "sinks": integer(0, 4096), "qnorm": one_of(True, False),
        "solver": one_of("exact", "lloyd"),
    }),
    "runtime": lambda x: fields(x, {"sinks": integer(0, 4096), "recent": integer(0)}),
    "layers": listed(lambda x: fields(x, LAYER)),
    "tensors": lambda x: type(x) is dict and all(fields(y, {
        "dtype": one_of("float32", "int16", "uint8"), "shape": listed(integer(1)), "sha256": text(HASH),
    }) for y in x.values()),
    "files": lambda x: fields(x, {"tensors.safetensors": text(HASH), "README.md": text(HASH)}),
}  # fmt: skip
MAY: dict[str, Check] = {
    "budget": lambda x: fields(x, {"asked": real(0, above=True), "planned": real(0, above=True)}),
    "refined": lambda x: fields(x, {
        "steps": integer(1), "data": text(), "fingerprint": text(HASH), "held_out_fingerprint": text(HASH),
        "kld_before": real(0, above=True), "kld_after": real(0), "lr": real(0, above=True), "seed": integer(0),
    }),
}  # fmt: skip


def fault(folder: Path) -> str | None:
    """The first thing that the specification forbids in the artifact at `folder`; None if nothing."""
    try:
        manifest = read_manifest(content(folder, "manifest.json", 8 << 20))
        arrays = read_tensors(content(folder, "tensors.safetensors"), manifest)
        card = content(folder, "README.md", 4 << 20)
        need(hashlib.sha256(card).hexdigest() == manifest["files"]["README.md"], "hash of the card")
        for layer in manifest["layers"]:
            for name in ("key", "value"):
                prefix = f"layers.{layer['index']}.{name}."
                mine = {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
                check_role(layer[name], mine)
    except Forbidden as error:
        return str(error)
    return None


def need(condition: bool, what: str) -> None:
    if not condition:
        raise Forbidden(what)


def content(folder: Path, name: str, most: int = 1 << 40) -> bytes:
    path = folder / name
    need(os.path.lexists(path), f"{name} is missing")
    found = path.lstat()
    need(stat.S_ISREG(found.st_mode), f"{name} is no regular file")
    need(found.st_size <= most, f"{name} is too large")
    return path.read_bytes()


def parse(raw: bytes) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        need(len({name for name, _ in pairs}) == len(pairs), "a key twice")
        return dict(pairs)

    def refuse(name: str) -> None:
        raise Forbidden(name)

    try:
        found = json.loads(raw.decode("utf-8"), object_pairs_hook=once, parse_constant=refuse)
        json.dumps(found, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise Forbidden(f"no JSON: {error}") from None
    return found


def read_manifest(raw: bytes) -> dict[str, Any]:
    need(raw.count(b"\n") <= 200_000, "lines")
    body = parse(raw)
    need(type(body) is dict and body.get("format") == "kvcalib-artifact", "format")
    need(type(body.get("format_version")) is int and body["format_version"] == 4, "version")

    def render(value: Any) -> bytes:
        return (json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode()

    need(render(body) == raw, "encoding")
    rest = {name: value for name, value in body.items() if name != "digest"}
    need(hashlib.sha256(render(rest)).hexdigest() == body.get("digest"), "digest")
    for name, check in (TOP | MAY).items():
        need(check(body[name]) if name in body else name in MAY, f"field {name}")
    need(set(body) <= set(TOP | MAY), "unknown field")
    names = {
        f"layers.{layer['index']}.{role}.{name}"
        for layer in body["layers"]
        for role in ("key", "value")
        for name in (*PARTS, *(n for n in ("feedback", "basis") if layer[role][n]))
    }
    need(set(body["tensors"]) == names, "tensors that no layer has, or too few")
    indices = [layer["index"] for layer in body["layers"]]
    need(indices == sorted(set(indices)), "order of layers")
    need(all(i < body["model"]["num_hidden_layers"] for i in indices), "index of a layer")
    for layer in body["layers"]:
        need(not layer["key"]["basis"], "keys in a basis of their own")
        for name in ("key", "value"):
            by_head = (layer["friendliness"] or {}).get(f"{name}_by_head")
            need(by_head is None or len(by_head) == layer[name]["kv_heads"], "figures by head")
    return body


def read_tensors(raw: bytes, manifest: dict[str, Any]) -> dict[str, np.ndarray]:
    need(hashlib.sha256(raw).hexdigest() == manifest["files"]["tensors.safetensors"], "hash of the tensors' file")
    need(len(raw) >= 8, "no header")
    length = int.from_bytes(raw[:8], "little")
    need(8 + length <= len(raw) and length <= 16 << 20, "length of the header")
    header, data = parse(raw[8 : 8 + length]), raw[8 + length :]
    need(type(header) is dict and header.pop("__metadata__", None) == {"kvcalib": NOTE}, "metadata")
    need(set(header) == set(manifest["tensors"]), "names of tensors")
    arrays, taken = {}, []
    for name, entry in header.items():
        need(type(entry) is dict and set(entry) == {"dtype", "shape", "data_offsets"}, "entry of the header")
        record = manifest["tensors"][name]
        need(type(entry["dtype"]) is str and entry["dtype"] in KINDS, "dtype")
        kind, size, code = KINDS[entry["dtype"]]
        need(kind == record["dtype"], "dtype of the record")
        need(listed(integer(1))(entry["shape"]) and entry["shape"] == record["shape"], "shape of the record")
        need(listed(integer(0))(entry["data_offsets"]) and len(entry["data_offsets"]) == 2, "offsets")
        start, stop = entry["data_offsets"]
        need(stop - start == size * math.prod(entry["shape"]) and stop <= len(data), "bytes of a tensor")
        need(hashlib.sha256(data[start:stop]).hexdigest() == record["sha256"], "hash of a tensor")
        taken.append((start, stop))
        arrays[name] = np.frombuffer(data[start:stop], code).reshape(entry["shape"])
    end = 0
    for start, stop in sorted(taken):
        need(start == end, "gap or overlap")
        end = stop
    need(end == len(data), "bytes that no tensor has")
    return arrays


def check_role(spec: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    heads, dim, count = spec["kv_heads"], spec["head_dim"], spec["words"]
    kinds = PARTS | {name: "<f4" for name in ("feedback", "basis") if spec[name]}
    if spec["basis"]:
        need(arrays["basis"].shape == (heads, dim, dim), "shape of basis")
        for axes in arrays["basis"].astype(np.float64):
            need(bool((abs(axes.T @ axes - np.eye(dim)) <= 1e-4).all()), "basis")
    if spec["feedback"]:
        need(dim > 1 and arrays["feedback"].shape == (heads, dim * (dim - 1) // 2), "shape of feedback")
        need(all(abs(x) <= 65504 for x in arrays["feedback"].ravel().tolist()), "feedback")
    need(set(arrays) == set(kinds), "tensors of a layer")
    need(all(arrays[name].dtype == np.dtype(kind) for name, kind in kinds.items()), "dtype of a layer's tensor")
    elements = dim if spec["scope"] == "head" else heads * dim
    need(elements <= 32768 and spec["outliers"] < elements, "outliers")
    widths = arrays["widths"]
    need(widths.shape == (heads, dim) and widths.max() <= 8, "widths")
    need(arrays["weight"].shape == (heads, dim), "shape of weight")
    need(all(math.isfinite(x) and x >= 0 for x in arrays["weight"].ravel().tolist()), "weight")
    need(arrays["codebook"].ndim == 1, "codebook")
    book, at = arrays["codebook"].tolist(), 0
    for width in widths.ravel().tolist():
        mine = book[at : at + 2**width]
        need(len(mine) == 2**width and all(abs(c) <= 65504 for c in mine), "centroids")
        need(all(a <= b for a, b in itertools.pairwise(mine)), "order of centroids")
        at += 2**width
    need(at == len(book), "codebook")
    check_layout(widths, arrays["word"], arrays["shift"], count, spec["segment"])


def check_layout(widths: np.ndarray, word: np.ndarray, shift: np.ndarray, count: int, segment: str) -> None:
    heads, dim = widths.shape
    planes = max([1, *(len(PLANES[w]) for w in widths.ravel().tolist())])
    need(word.shape == shift.shape == (planes, heads, dim), "shape of the layout's tables")
    taken: set[int] = set()
    owners: dict[int, set[int]] = {}
    for p in range(planes):
        for h in range(heads):
            for d in range(dim):
                sizes = PLANES[int(widths[h, d])]
                w, s = int(word[p, h, d]), int(shift[p, h, d])
                if p >= len(sizes):
                    need(w == -1 and s == 0, "a plane that is none")
                    continue
                need(0 <= w < count and s + sizes[p] <= 32, "a field outside the row or its word")
                bits = set(range(32 * w + s, 32 * w + s + sizes[p]))
                need(not bits & taken, "fields share bits")
                taken |= bits
                owners.setdefault(w, set()).add(h)
    need(count <= 32768 and set(owners) == set(range(count)), "words that hold no field")
    need(segment == "row" or all(len(who) == 1 for who in owners.values()), "heads share words")
