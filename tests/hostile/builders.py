"""An artifact whose every part can be made to lie before it is signed anew.

`write` puts the pieces together without kvcalib's own writer: tensors, their records in the manifest, the safetensors
header, the file hashes, the digest. Each step can be changed by a function, and all that comes after it is consistent
with the change. So what refuses the result is the check that the lie is meant for, not a hash.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvcalib.model.identity import ModelIdentity, identify
from kvcalib.quant.packing import Layout
from tests.tiny import SHAPE, tiny_llama

LAYERS, HEADS, DIM = SHAPE["num_hidden_layers"], SHAPE["num_key_value_heads"], SHAPE["head_dim"]
MANIFEST, TENSORS, CARD = "manifest.json", "tensors.safetensors", "README.md"
TYPES = {
    np.dtype("<f4"): ("F32", "float32"), np.dtype("<i2"): ("I16", "int16"), np.dtype("u1"): ("U8", "uint8"),
    np.dtype("<f8"): ("F64", "float64"), np.dtype("<i8"): ("I64", "int64"), np.dtype("<f2"): ("F16", "float16"),
}  # fmt: skip
Body = dict[str, Any]
Arrays = dict[str, np.ndarray]
# Where outliers are counted, and how many: both kinds occur.
SCOPES = {(0, "key"): ("token", 2), (0, "value"): ("head", 1), (1, "key"): ("head", 0), (1, "value"): ("token", 0)}


# Both scopes, keys and values.
FEEDBACK = {(0, "key"), (0, "value"), (1, "value")}
BASIS = {(1, "value")}


@lru_cache(maxsize=1)
def identity() -> ModelIdentity:
    """The tiny model's, so that what loads can be attached to it."""
    return identify(tiny_llama())


def base(seed: int = 0) -> tuple[Body, Arrays]:
    """A valid artifact for the tiny model, before it is signed: all widths from 0 to 8 occur."""
    chance = np.random.default_rng(seed)
    arrays: Arrays = {}
    layers = []
    for layer in range(LAYERS):
        specs = {}
        for role in ("key", "value"):
            widths = chance.permuted(np.resize(np.arange(9), HEADS * DIM)).reshape(HEADS, DIM).astype(np.uint8)
            if (layer, role) == (1, "key"):
                widths[:] = 3
            layout = Layout.build(torch.from_numpy(widths))
            book = [np.sort(chance.normal(0, 1, 1 << int(w))) for w in widths.ravel()]
            named = {
                "widths": widths, "codebook": np.concatenate(book).astype(np.float32), "word": layout.word.numpy(),
                "shift": layout.shift.numpy(), "weight": chance.random((HEADS, DIM)).astype(np.float32),
            }  # fmt: skip
            arrays |= {f"layers.{layer}.{role}.{name}": array for name, array in named.items()}
            scope, outliers = SCOPES[layer, role]
            feedback = (layer, role) in FEEDBACK
            if feedback:
                triangle = chance.normal(0, 0.3, (HEADS, DIM * (DIM - 1) // 2))
                arrays[f"layers.{layer}.{role}.feedback"] = triangle.astype(np.float32)
            if (layer, role) in BASIS:
                axes, _ = np.linalg.qr(chance.normal(0, 1, (HEADS, DIM, DIM)))
                arrays[f"layers.{layer}.{role}.basis"] = np.ascontiguousarray(axes, np.float32)
            specs[role] = {
                "kv_heads": HEADS, "head_dim": DIM, "words": layout.words, "segment": layout.segment, "group": 0,
                "scope": scope, "outliers": outliers, "feedback": feedback,
                "basis": (layer, role) in BASIS, "mean_bits": float(widths.mean()), "predicted_loss": 1e-05,
            }  # fmt: skip
        figures = {"key_error": 0.1, "value_error": 0.2, "alpha": 0.5, "key_by_head": [0.1] * HEADS}
        layers.append({"index": layer, **specs, "friendliness": figures if layer else None, "sliding": None})
    body = {
        "format": "kvcalib-artifact", "format_version": 4, "producer": {"name": "kvcalib", "version": "0.1.0"},
        "model": identity().model_dump(mode="json"),
        "calibration": {"data": "builtin", "sequences": 2, "tokens": 32, "sampled_tokens": 32, "seq_len": 16, "seed": 0,
                        "nll": 4.5, "fingerprint": "2" * 64},
        "fit": {"format": "nuq", "weights": "fisher_scale", "key_granularity": "channel", "value_granularity": "head",
                "outliers": 0.01, "sinks": 0, "qnorm": False, "solver": "exact"},
        "runtime": {"sinks": 1, "recent": 2}, "budget": {"asked": 4.5, "planned": 4.4},
        "refined": {"steps": 20, "data": "builtin", "fingerprint": "3" * 64, "held_out_fingerprint": "4" * 64,
                    "kld_before": 0.02, "kld_after": 0.01, "lr": 0.1, "seed": 0},
        "layers": layers,
    }  # fmt: skip
    return body, arrays


def render(body: Any) -> bytes:
    """Section 2 of docs/artifact.md."""
    return (json.dumps(body, sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def sign(body: Body) -> bytes:
    """The manifest with the digest that fits."""
    rest = {name: value for name, value in body.items() if name != "digest"}
    return render(rest | {"digest": sha256(render(rest))})


def file_of(header: Any, data: bytes) -> bytes:
    """A safetensors file of these pieces; `header` may be bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    return len(text).to_bytes(8, "little") + text + data


def pieces(arrays: Arrays) -> tuple[Body, bytes]:
    """Header and data of the arrays, without lies."""
    note = {"format": "kvcalib-artifact", "format_version": 4}
    header: Body = {"__metadata__": {"kvcalib": json.dumps(note, separators=(",", ":"))}}
    data = b""
    for name, array in arrays.items():
        content = array.tobytes()
        offsets = [len(data), len(data) + len(content)]
        header[name] = {"dtype": TYPES[array.dtype][0], "shape": list(array.shape), "data_offsets": offsets}
        data += content
    return header, data


def write(
    folder: Path,
    arrays: Callable[[Arrays], Any] | None = None,
    body: Callable[[Body], Any] | None = None,
    header: Callable[[Body], Any] | None = None,
    raw: Callable[[bytes], bytes] | None = None,
    text: Callable[[bytes], bytes] | None = None,
    after: Callable[[Path], Any] | None = None,
    given: tuple[Body, Arrays] | None = None,
) -> Path:
    """Write an artifact to `folder`; the functions change, in this order, what is not signed yet.

    Args:
        arrays: the tensors. body: the manifest with their records. header: the safetensors header. raw: the whole
            safetensors file. text: the signed manifest. after: the folder.
    """
    manifest, named = copy.deepcopy(given or base())
    if arrays is not None:
        arrays(named)
    manifest["tensors"] = {
        n: {"dtype": TYPES[a.dtype][1], "shape": list(a.shape), "sha256": sha256(a.tobytes())} for n, a in named.items()
    }
    top, data = pieces(named)
    if header is not None:
        header(top)
    content = file_of(top, data) if raw is None else raw(file_of(top, data))
    manifest["files"] = {TENSORS: sha256(content), CARD: sha256(b"# Card\n")}
    if body is not None:
        body(manifest)
    signed = sign(manifest)
    folder.mkdir(parents=True)
    (folder / MANIFEST).write_bytes(signed if text is None else text(signed))
    (folder / TENSORS).write_bytes(content)
    (folder / CARD).write_bytes(b"# Card\n")
    if after is not None:
        after(folder)
    return folder


def put(*path: Any) -> Callable[[Any], None]:
    """`put("layers", 0, "index", 7)` sets `value["layers"][0]["index"] = 7`."""
    *steps, last, found = path

    def change(value: Any) -> None:
        for step in steps:
            value = value[step]
        value[last] = found

    return change


def drop(*path: Any) -> Callable[[Any], None]:
    *steps, last = path

    def change(value: Any) -> None:
        for step in steps:
            value = value[step]
        del value[last]

    return change


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth
