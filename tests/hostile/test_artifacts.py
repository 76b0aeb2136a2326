"""Artifacts with every lie we could think of, each signed so that only the check it is meant for can find it."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest

import kvcalib
from kvcalib.artifact import store
from kvcalib.errors import KvcalibError
from tests.hostile.builders import (
    CARD,
    DIM,
    HEADS,
    MANIFEST,
    TENSORS,
    base,
    drop,
    file_of,
    nested,
    pieces,
    put,
    render,
    sign,
    write,
)

KEY = "layers.0.key"
AXES = "layers.1.value.basis"
HUGE = 10**18


@pytest.fixture(autouse=True)
def nothing_hangs():
    """As the opening of a FIFO can: after 20 seconds the test fails."""
    previous = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs", pytrace=True))
    signal.setitimer(signal.ITIMER_REAL, 20)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, previous)


def refused(folder: Path, message: str) -> None:
    with pytest.raises(KvcalibError, match=message) as caught:
        kvcalib.load(folder)
    said = str(caught.value)
    assert said.isprintable()
    assert len(said) < 700


def test_the_truth_loads(tmp_path):
    loaded = kvcalib.load(write(tmp_path / "a"))
    body, arrays = base()
    assert sorted(loaded.quantizers) == [0, 1]
    for index, pair in loaded.quantizers.items():
        for role, quantizer in pair.items():
            name = f"layers.{index}.{role}"
            assert np.array_equal(quantizer.layout.widths.numpy(), arrays[f"{name}.widths"])
            assert np.array_equal(quantizer.codebook.ragged().numpy(), arrays[f"{name}.codebook"])
    assert loaded.manifest.calibration.data == body["calibration"]["data"]


# The manifest, signed

SPEC = ("layers", 0, "key")
FIELDS = {
    "version as text": (put("format_version", "3"), "format_version is '3'"),
    "version as a float": (put("format_version", 3.0), r"format_version is 3\.0"),
    "version true": (put("format_version", True), "format_version is True"),
    "a later version": (put("format_version", 5), "format_version is 5"),
    "another format": (put("format", "kvcalib-adaptive"), "format"),
    "unknown field": (put("colour", "red"), "colour"),
    "unknown field deep down": (put("layers", 1, "value", "colour", "red"), r"layers\.1\.value\.colour"),
    "a field less": (drop("layers", 0, "key", "words"), r"layers\.0\.key\.words"),
    "no layers field": (drop("layers"), "layers"),
    "layers as an object": (put("layers", {}), "layers"),
    "layers of nulls": (put("layers", [None]), r"layers\.0"),
    "layer twice": (lambda b: b["layers"][1].update(index=0), r"tensors: 'layers\.[01]\.|layers\[1\]\.index"),
    "keys in a basis of their own": (put("layers", 1, "key", "basis", True), r"layers\[1\]\.key\.basis is true"),
    "the same layer twice": (lambda b: b["layers"].insert(0, b["layers"][0]), r"layers\[1\]\.index is 0"),
    "layers in descending order": (lambda b: b["layers"].reverse(), r"layers\[1\]\.index is 0, expected more than 1"),
    "fewer layers in the model": (put("model", "num_hidden_layers", 1), r"layers\[1\]\.index is 1.*1 layers"),
    "10^18 kv heads": (put(*SPEC, "kv_heads", HUGE), r"layers\.0\.key\.kv_heads"),
    "2^50 kv heads": (put(*SPEC, "kv_heads", 1 << 50), r"layers\[0\]\.key"),
    "2^50 kv heads of scope head": (lambda b: b["layers"][1]["key"].update(kv_heads=1 << 50), "kv heads"),
    "no kv heads": (put(*SPEC, "kv_heads", 0), r"layers\.0\.key\.kv_heads is 0"),
    "-1 channels": (put(*SPEC, "head_dim", -1), r"layers\.0\.key\.head_dim is -1"),
    "10^4000 words": (put(*SPEC, "words", 10**4000), r"layers\.0\.key\.words"),
    "2^50 words": (put(*SPEC, "words", 1 << 50), r"layers\[0\]\.key\.words is 1125899906842624"),
    "a word too many": (lambda b: b["layers"][0]["key"].update(words=b["layers"][0]["key"]["words"] + 1), "words is"),
    "a word too few": (lambda b: b["layers"][0]["key"].update(words=b["layers"][0]["key"]["words"] - 1), "word"),
    "-3 words": (put(*SPEC, "words", -3), r"layers\.0\.key\.words is -3"),
    "words as text": (put(*SPEC, "words", "9" * 200), r"layers\.0\.key\.words"),
    "10^18 outliers": (put(*SPEC, "outliers", HUGE), r"layers\.0\.key\.outliers"),
    "2^50 outliers": (put(*SPEC, "outliers", 1 << 50), r"layers\[0\]\.key\.outliers"),
    "as many outliers as elements": (put(*SPEC, "outliers", HEADS * DIM), r"layers\[0\]\.key\.outliers is 32, exp"),
    "outliers of a head": (put("layers", 0, "value", "outliers", DIM), r"layers\[0\]\.value\.outliers is 16"),
    "-1 outliers": (put(*SPEC, "outliers", -1), r"layers\.0\.key\.outliers is -1"),
    "half an outlier": (put(*SPEC, "outliers", 0.5), r"layers\.0\.key\.outliers is 0\.5"),
    "outliers true": (put(*SPEC, "outliers", True), r"layers\.0\.key\.outliers is True"),
    "a scope of none": (put(*SPEC, "scope", "layer"), r"layers\.0\.key\.scope"),
    "segments that share words": (put("layers", 0, "key", "segment", "head"), r"layers\[0\]\.key.*segment"),
    "a group of 15": (put(*SPEC, "group", 15), r"layers\.0\.key\.group is 15"),
    "9 bits": (put(*SPEC, "mean_bits", 9.0), r"layers\.0\.key\.mean_bits is 9"),
    "loss of NaN": (put(*SPEC, "predicted_loss", float("nan")), "NaN is no number"),
    "infinite loss": (put(*SPEC, "predicted_loss", float("inf")), "Infinity is no number"),
    "negative loss": (put(*SPEC, "predicted_loss", -1.0), r"layers\.0\.key\.predicted_loss is -1"),
    "10^18 sinks": (put("runtime", "sinks", HUGE), r"runtime\.sinks"),
    "4097 sinks": (put("runtime", "sinks", 4097), r"runtime\.sinks is 4097"),
    "-1 recent": (put("runtime", "recent", -1), r"runtime\.recent is -1"),
    "2^60 recent": (put("runtime", "recent", 1 << 60), r"runtime\.recent"),
    "seed of 10^4000": (put("calibration", "seed", 10**4000), r"calibration\.seed"),
    "a budget of 0": (put("budget", "asked", 0.0), r"budget\.asked is 0"),
    "a null budget": (put("budget", None), "an optional field is null"),
    "refined by no steps": (put("refined", "steps", 0), r"refined\.steps is 0"),
    "refined from a divergence of nothing": (put("refined", "kld_before", 0.0), r"refined\.kld_before is 0"),
    "refined to a divergence below 0": (put("refined", "kld_after", -1e-9), r"refined\.kld_after is -1e-09"),
    "refined on a text of no hash": (put("refined", "fingerprint", "3"), r"refined\.fingerprint is '3'"),
    "refined with a field more": (put("refined", "colour", "red"), r"refined\.colour"),
    "a null refinement": (put("refined", None), "an optional field is null"),
    "errors of another number of heads": (put("layers", 1, "friendliness", "key_by_head", [0.1]), "key_by_head has 1"),
    "alpha of 2": (put("layers", 1, "friendliness", "alpha", 2.0), r"layers\.1\.friendliness\.alpha"),
    "a share of 0": (put("layers", 1, "friendliness", "share", 0.0), r"layers\.1\.friendliness\.share"),
    "a hash that is none": (put("calibration", "fingerprint", "../../etc/passwd"), r"calibration\.fingerprint"),
    "a lone surrogate": (put("model", "name", "\ud800"), "not valid JSON"),
    "a wrong dtype": (put("tensors", f"{KEY}.widths", "dtype", "int16"), r"layers\.0\.key\.widths\.dtype"),
    "a dtype of none": (put("tensors", f"{KEY}.widths", "dtype", "object"), r"tensors\.layers\.0\.key\.widths\.dtype"),
    "a billion entries": (put("tensors", f"{KEY}.codebook", "shape", [10**9]), r"layers\.0\.key\.codebook\.shape"),
    "a shape of 10^18": (put("tensors", f"{KEY}.weight", "shape", [HUGE, HUGE]), r"weight\.shape"),
    "no dimension": (put("tensors", f"{KEY}.codebook", "shape", []), r"layers\.0\.key\.codebook\.shape"),
    "a negative shape": (put("tensors", f"{KEY}.word", "shape", [-1, 2, 16]), r"word\.shape\.0 is -1"),
    "300 planes": (put("tensors", f"{KEY}.word", "shape", [300, HEADS, DIM]), r"layers\.0\.key\.word\.shape"),
    "a tensor that no layer has": (
        lambda b: b["tensors"].update({"../x": b["tensors"][f"{KEY}.word"]}), r"tensors: '\.\./x' is none",
    ),
    "no record of a tensor": (drop("tensors", f"{KEY}.word"), r"'layers\.0\.key\.word' is missing"),
    "a wrong tensor hash": (put("tensors", f"{KEY}.word", "sha256", "0" * 64), r"layers\.0\.key\.word\.sha256"),
    "a hash in capitals": (put("tensors", f"{KEY}.word", "sha256", "A" * 64), r"word\.sha256"),
    "a wrong file hash": (put("files", TENSORS, "0" * 64), r"tensors\.safetensors: its sha256"),
    "a wrong card hash": (put("files", CARD, "0" * 64), r"README\.md: its sha256"),
    "a path with ..": (lambda b: b["files"].update({"../secret": "0" * 64}), r"files names .*\.\./secret"),
    "an absolute path": (lambda b: b["files"].update({"/etc/passwd": "0" * 64}), "files names .*/etc/passwd"),
    "a path in place of a file": (lambda b: b.update(files={"/etc/passwd": "0" * 64}), "files names"),
    "no files": (put("files", {}), "files names"),
    "no hash of a file": (put("files", CARD, "x"), r"files\.README\.md"),
    "a key that steers a terminal": (put("\x1b[2J\x1b]0;x\x07", 1), "x1b"),
    "a key of a million letters": (put("x" * 1_000_000, 1), "xxx"),
    "a value of a million letters": (put(*SPEC, "scope", "x" * 1_000_000), "scope"),
    "300 000 layers": (lambda b: b.update(layers=[0] * 300_000), "lines"),
}  # fmt: skip


@pytest.mark.parametrize("name", FIELDS)
def test_manifest_that_lies(tmp_path, name):
    change, message = FIELDS[name]
    refused(write(tmp_path / "a", body=change), message)


# The manifest's bytes, as no JSON writer of ours gives them


def both(first: bytes, second: bytes):
    """The manifest with `second` behind the member `first`, signed over exactly these bytes."""

    def change(text: bytes) -> bytes:
        assert first in text
        return text.replace(first, first + second, 1)

    return change


TEXTS = {
    "nothing": (lambda t: b"", "not valid JSON"),
    "a list": (lambda t: b"[]", "format"),
    "a number": (lambda t: b"7", "format"),
    "100 000 lists": (lambda t: nested(100_000), "nested too deeply"),
    "900 lists": (lambda t: nested(900), "format"),
    "900 lists in a field": (
        lambda t: render(json.loads(t) | {"layers": 0}).replace(b'"layers": 0', b'"layers": ' + nested(900)),
        "is not written as a manifest is",
    ),
    "a list that does not end": (lambda t: b"[" * 200_000, "not valid JSON"),
    "UTF-16": (lambda t: t.decode().encode("utf-16"), "not valid JSON"),
    "UTF-32": (lambda t: t.decode().encode("utf-32"), "not valid JSON"),
    "a byte order mark": (lambda t: b"\xef\xbb\xbf" + t, "BOM"),
    "not UTF-8": (lambda t: t.replace(b"builtin", b"built\xffin"), "not valid JSON"),
    "a zero byte": (lambda t: t + b"\0", "not valid JSON"),
    "a blank at the end": (lambda t: t + b" ", "is not written as a manifest is"),
    "windows' line ends": (lambda t: t.replace(b"\n", b"\r\n"), "is not written as a manifest is"),
    "on one line": (lambda t: json.dumps(json.loads(t), sort_keys=True).encode(), "is not written as a manifest is"),
    "other order of keys": (lambda t: render_unsorted(json.loads(t)), "is not written as a manifest is"),
    "escapes": (lambda t: t.replace(b'"builtin"', b'"\\u0062uiltin"'), "is not written as a manifest is"),
    "a key twice": (both(b'"format": "kvcalib-artifact",', b'"format": "x",'), "'format' is given twice"),
    "a deep key twice": (both(b'"segment": "row",', b'\n"segment": "head",'), "key 'segment' is given twice"),
    "a digest twice": (lambda t: t[:-2] + b',"digest": "0"}\n', "key 'digest' is given twice"),
    "a digest of none": (lambda t: render(json.loads(t) | {"digest": None}), "digest"),
    "another digest": (lambda t: render(json.loads(t) | {"digest": "0" * 64}), "digest does not match"),
    "a digit of 10^5000": (lambda t: t.replace(b'"seed": 0', b'"seed": ' + b"9" * 5000), "not valid JSON"),
    "a million zeros on a line": (
        lambda t: t.replace(b'"layers": [', b'"layers": [0' + b",0" * 1_000_000 + b", ", 1),
        "is not written as a manifest is",
    ),
    "1e999": (lambda t: t.replace(b'"nll": 4.5', b'"nll": 1e999'), "beyond what a float"),
    "NaN": (lambda t: t.replace(b'"nll": 4.5', b'"nll": NaN'), "NaN is no number"),
    "9 MiB": (lambda t: t + b" " * (9 << 20), "expected at most"),
}  # fmt: skip


def render_unsorted(body: dict) -> bytes:
    return (json.dumps(dict(reversed(body.items())), indent=1, ensure_ascii=False) + "\n").encode()


@pytest.mark.parametrize("name", TEXTS)
def test_manifest_that_is_written_otherwise(tmp_path, name):
    change, message = TEXTS[name]
    refused(write(tmp_path / "a", text=change), message)


# Tensors, signed


def set_at(name: str, place, value):
    def change(arrays):
        arrays[name][place] = value

    return change


def scaled(name: str, factor: float):
    def change(arrays):
        arrays[name] *= np.float32(factor)

    return change


def cast(name: str, dtype: str):
    def change(arrays):
        arrays[name] = arrays[name].astype(dtype)

    return change


def cut(name: str, part):
    def change(arrays):
        arrays[name] = np.ascontiguousarray(arrays[name][part])

    return change


def first_wide(arrays, least: int = 1):
    """Head and channel of the first channel of layer 0's keys with `least` bits or more."""
    return tuple(int(i) for i in np.argwhere(arrays[f"{KEY}.widths"] >= least)[0])


def overlap(arrays):
    (h, d), (other, e) = (tuple(i) for i in np.argwhere(arrays[f"{KEY}.widths"] == 4)[:2])
    for table in ("word", "shift"):
        arrays[f"{KEY}.{table}"][0, h, d] = arrays[f"{KEY}.{table}"][0, other, e]


def at_wide(table: str, value: int, least: int = 1):
    def change(arrays):
        h, d = first_wide(arrays, least)
        arrays[f"{KEY}.{table}"][0, h, d] = value

    return change


def at_none(table: str, value: int):
    def change(arrays):
        h, d = (int(i) for i in np.argwhere(arrays[f"{KEY}.widths"] == 0)[0])
        arrays[f"{KEY}.{table}"][0, h, d] = value

    return change


def one_plane_more(arrays):
    for table, nothing in (("word", -1), ("shift", 0)):
        planes = arrays[f"layers.1.key.{table}"]
        arrays[f"layers.1.key.{table}"] = np.concatenate([planes, np.full_like(planes[:1], nothing)])


ARRAYS = {
    "9 bits": (set_at(f"{KEY}.widths", (1, 3), 9), r"layers\[0\]\.key: widths\[1\]\[3\] is 9"),
    "255 bits": (set_at(f"{KEY}.widths", (0, 0), 255), r"widths\[0\]\[0\] is 255"),
    "widths that ask for more centroids": (set_at(f"{KEY}.widths", ..., 8), r"codebook has .* expected 8192"),
    "widths that ask for fewer": (set_at(f"{KEY}.widths", ..., 0), r"codebook has .* expected 32"),
    "a codebook of one less": (cut(f"{KEY}.codebook", slice(0, -1)), "codebook has"),
    "a codebook in two dimensions": (cut(f"{KEY}.codebook", None), r"codebook\.shape"),
    "a centroid of NaN": (set_at(f"{KEY}.codebook", 5, np.nan), r"codebook\[5\] is nan"),
    "an infinite centroid": (set_at(f"{KEY}.codebook", -1, np.inf), r"codebook\[\d+\] is inf"),
    "a centroid of 1e38": (set_at(f"{KEY}.codebook", -1, 1e38), r"codebook\[\d+\] is 9\.99"),
    "centroids that fall": (cut(f"{KEY}.codebook", slice(None, None, -1)), "does not ascend"),
    "a codebook in float64": (cast(f"{KEY}.codebook", "<f8"), r"tensors\.layers\.0\.key\.codebook\.dtype"),
    "a codebook in float16": (cast(f"{KEY}.codebook", "<f2"), r"codebook\.dtype"),
    "widths in int16": (cast(f"{KEY}.widths", "<i2"), r"widths\.dtype is 'int16'"),
    "words in int64": (cast(f"{KEY}.word", "<i8"), r"word\.dtype"),
    "shifts in int16": (cast(f"{KEY}.shift", "<i2"), r"shift\.dtype"),
    "weights of NaN": (set_at(f"{KEY}.weight", (0, 0), np.nan), r"layers\[0\]\.key: weight"),
    "weights below 0": (set_at(f"{KEY}.weight", (0, 0), -1), r"layers\[0\]\.key: weight"),
    "infinite weights": (set_at(f"{KEY}.weight", (0, 0), np.inf), r"layers\[0\]\.key: weight"),
    "weights of fewer heads": (cut(f"{KEY}.weight", slice(0, 1)), r"weight\.shape is \[1, 16\], expected \[2, 16\]"),
    "feedback of NaN": (set_at(f"{KEY}.feedback", (0, 0), np.nan), r"layers\[0\]\.key: feedback holds"),
    "feedback of 1e6": (set_at(f"{KEY}.feedback", (1, 119), -1e6), r"layers\[0\]\.key: feedback holds"),
    "feedback of a channel too few": (cut(f"{KEY}.feedback", (slice(None), slice(1, None))),
                                      r"key\.feedback is float32 \[2, 119\], expected float32 \[2, 120\]"),
    "feedback of fewer heads": (cut(f"{KEY}.feedback", slice(0, 1)), r"key\.feedback is float32 \[1, 120\]"),
    "axes of NaN": (set_at(AXES, (0, 3, 3), np.nan), r"layers\[1\]\.value: basis of head 0 is not orthogonal"),
    "axes too long": (scaled(AXES, 1.001), r"layers\[1\]\.value: basis of head 0 .* up to 0\.002 off"),
    "an axis twice": (set_at(AXES, (1, slice(None), 0), 0.25), r"layers\[1\]\.value: basis of head 1"),
    "axes of fewer heads": (cut(AXES, slice(0, 1)), r"value\.basis is float32 \[1, 16, 16\], expected float32 \[2, 16"),
    "axes in float64": (cast(AXES, "<f8"), r"value\.basis\.dtype is 'float64'"),
    "feedback in int16": (cast(f"{KEY}.feedback", "<i2"), r"key\.feedback is int16"),
    "widths turned round": (cut(f"{KEY}.widths", slice(0, 1)), r"widths\.shape is \[1, 16\], expected \[2, 16\]"),
    "a word beyond the row": (at_wide("word", 32767), r"word\[0\]\[0\]\[\d+\] is 32767, expected 0\.\."),
    "a word below 0": (at_wide("word", -32768), r"word\[0\]\[0\]\[\d+\] is -32768"),
    "no word where the width wants one": (at_wide("word", -1), r"word\[0\].* is -1"),
    "a word where the width wants none": (at_none("word", 0), r"word\[0\].* is 0, expected .* else -1"),
    "a shift where the width wants none": (at_none("shift", 5), r"shift\[0\].* is 5, expected .* 0 where"),
    "a shift of 255": (at_wide("shift", 255), r"shift\[0\]\[0\]\[\d+\] is 255"),
    "a shift of 32": (at_wide("shift", 32), r"shift\[0\]\[0\]\[\d+\] is 32"),
    "a field that leaves its word": (at_wide("shift", 29, least=4), r"shift\[0\]\[0\]\[\d+\] is 29"),
    "fields that overlap": (overlap, "overlap"),
    "a plane less": (lambda a: [cut(f"{KEY}.{t}", slice(0, 2))(a) for t in ("word", "shift")], "word has shape"),
    "a plane too many": (one_plane_more, r"layers\[1\]\.key: word has shape \[3, 2, 16\]"),
    "shifts of another shape": (cut(f"{KEY}.shift", slice(0, 2)), r"shift\.shape is"),
    "a tensor more": (lambda a: a.update({"layers.0.key.colour": a[f"{KEY}.word"]}), r"colour' is none"),
    "a tensor less": (lambda a: a.pop(f"{KEY}.shift"), r"'layers\.0\.key\.shift' is missing"),
    "a layer more": (lambda a: a.update({n.replace(".0.", ".7."): t for n, t in a.items()}), r"layers\.7"),
}  # fmt: skip


@pytest.mark.parametrize("name", ARRAYS)
def test_tensors_that_lie(tmp_path, name):
    change, message = ARRAYS[name]
    refused(write(tmp_path / "a", arrays=change), message)


# The safetensors header, signed

WORD = f"{KEY}.word"


def offsets(change):
    def apply(header):
        header[WORD]["data_offsets"] = change(*header[WORD]["data_offsets"])

    return apply


def empty(shape):
    return {"dtype": "U8", "shape": shape, "data_offsets": [0, 0]}


HEADERS = {
    "offsets that overlap": (offsets(lambda a, b: [a - 2, b - 2]), "no overlap and no gap"),
    "offsets with a gap": (offsets(lambda a, b: [a + 2, b + 2]), "no overlap and no gap"),
    "offsets out of the file": (offsets(lambda a, b: [HUGE, HUGE + b - a]), "no overlap and no gap"),
    "offsets below 0": (offsets(lambda a, b: [a - b, 0]), "data_offsets .* expected a start and an end"),
    "offsets in reverse": (offsets(lambda a, b: [b, a]), "expected a start and an end"),
    "three offsets": (offsets(lambda a, b: [a, b, b]), "expected a start and an end"),
    "offsets as text": (offsets(lambda a, b: [str(a), str(b)]), "expected a start and an end"),
    "offsets as floats": (offsets(lambda a, b: [float(a), float(b)]), "expected a start and an end"),
    "offsets true": (offsets(lambda a, b: [False, True]), "expected a start and an end"),
    "two names for the same bytes": (lambda h: h.update(other=dict(h[WORD])), "no overlap and no gap"),
    "a shape that is too large": (put(WORD, "shape", [10**9, 10**9]), "does not"),
    "a shape that is too small": (put(WORD, "shape", [1]), "does not"),
    "a shape of 10^4000": (put(WORD, "shape", [10**4000, 0]), "does not"),
    "a shape of 10^18 by 0": (lambda h: h.update(empty=empty([0, HUGE])), "span 0 bytes, its shape"),
    "a shape below 0": (put(WORD, "shape", [-1, -1]), "expected at most 8 counts"),
    "a shape of floats": (put(WORD, "shape", [2.0, 2.0]), "expected at most 8 counts"),
    "9 dimensions": (put(WORD, "shape", [1] * 9), "expected at most 8 counts"),
    "no shape": (drop(WORD, "shape"), "expected dtype, shape and data_offsets"),
    "another dtype of that size": (put(WORD, "dtype", "F16"), r"layers\.0\.key\.word\.dtype is 'float16'"),
    "a dtype of another size": (put(WORD, "dtype", "F64"), "does not"),
    "a dtype of none": (put(WORD, "dtype", "PICKLE"), "dtype of"),
    "a dtype that is a list": (put(WORD, "dtype", []), "dtype of"),
    "an entry that is a list": (put(WORD, []), "expected dtype, shape and data_offsets"),
    "an unknown field": (put(WORD, "colour", 1), "expected dtype, shape and data_offsets"),
    "an empty tensor more": (lambda h: h.update(empty=empty([0])), "'empty' is not in the manifest"),
    "another name": (lambda h: h.update({"../../x": h.pop(WORD)}), r"tensor '\.\./\.\./x' is not in the manifest"),
    "no metadata": (drop("__metadata__"), "its metadata is"),
    "metadata of another version": (put("__metadata__", "kvcalib", '{"format":"kvcalib-artifact","format_version":5}'),
                                    "its metadata is"),
    "a metadata key more": (put("__metadata__", "format", "pt"), "its metadata is"),
    "metadata that is no text": (put("__metadata__", "kvcalib", 1), "no object of strings"),
    "metadata that is a list": (put("__metadata__", []), "no object of strings"),
    "a dimension of a billion": (put(WORD, "shape", [10**9]), "does not"),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_header_that_lies(tmp_path, name):
    change, message = HEADERS[name]
    refused(write(tmp_path / "a", header=change), message)


def with_header(change):
    """The file with the text of its header changed, and its length said truly."""

    def apply(content: bytes) -> bytes:
        length = int.from_bytes(content[:8], "little")
        return file_of(change(content[8 : 8 + length]), content[8 + length :])

    return apply


def length(value: int):
    return lambda content: (value % 2**64).to_bytes(8, "little") + content[8:]


FILES = {
    "nothing": (lambda c: b"", "no header"),
    "7 bytes": (lambda c: c[:7], "no header"),
    "8 bytes": (lambda c: c[:8], "header claims"),
    "a header of 2^64 - 1": (length(-1), "header claims 18446744073709551615"),
    "a header of 2^63": (length(1 << 63), "header claims"),
    "a header of the whole file": (lambda c: length(len(c) - 8)(c), "not a readable safetensors file"),
    "a header of nothing": (length(0), "not a readable safetensors file"),
    "a header one byte short": (lambda c: length(int.from_bytes(c[:8], "little") - 1)(c), "not a readable safetensors"),
    "a header that is a list": (with_header(lambda t: b"[]"), "header is list"),
    "a header of 100 000 lists": (with_header(lambda t: nested(100_000)), "nested too deeply"),
    "a header that is no UTF-8": (with_header(lambda t: t.replace(b"key", b"k\xffy", 1)), "not a readable safetensors"),
    "a header with a byte order mark": (with_header(lambda t: b"\xef\xbb\xbf" + t), "BOM"),
    "a name twice": (with_header(lambda t: t[:-1] + b"," + t[1:]), "is given twice"),
    "NaN in the header": (with_header(lambda t: t.replace(b"[0,", b"[NaN,", 1)), "NaN is no number"),
    "a byte behind the last tensor": (lambda c: c + b"\0", "1 bytes lie behind its last tensor"),
    "a byte less": (lambda c: c[:-1], "beyond the"),
    "half of it": (lambda c: c[: len(c) // 2], "beyond the"),
    "zeros": (lambda c: bytes(len(c)), "not a readable safetensors"),
    "a pickle": (lambda c: b"\x80\x04cos\nsystem\n(S'true'\ntR." + c, "header claims"),
    "a zip file": (lambda c: b"PK\x03\x04" + bytes(100), "not a readable safetensors"),
    "17 MiB of header": (with_header(lambda t: t + b" " * (17 << 20)), "header claims"),
}


@pytest.mark.parametrize("name", FILES)
def test_file_of_tensors_that_is_none(tmp_path, name):
    change, message = FILES[name]
    refused(write(tmp_path / "a", raw=change), message)


def test_blanks_behind_the_header_do_no_harm(tmp_path):
    """As the format has it: the library itself pads with them."""
    assert kvcalib.load(write(tmp_path / "a", raw=with_header(lambda text: text + b"   ")))


# The folder


def in_place_of(name: str, make):
    """The file `name` moved out of the folder, and something else in its place: `make(place, moved)`."""

    def change(folder: Path) -> None:
        moved = folder.parent / f"outside-{name}"
        (folder / name).rename(moved)
        make(folder / name, moved)

    return change


def chain(place: Path, moved: Path) -> None:
    (place.parent / "b").symlink_to(moved)
    place.symlink_to("b")


THINGS = {
    "a link": lambda place, moved: place.symlink_to(moved),
    "a relative link": lambda place, moved: place.symlink_to(f"../{moved.name}"),
    "links in a row": chain,
    "a link to itself": lambda place, moved: place.symlink_to(place.name),
    "a link to nothing": lambda place, moved: place.symlink_to(place.parent / "nothing"),
    "a link to a device": lambda place, moved: place.symlink_to("/dev/zero"),
    "a link to a file of the system": lambda place, moved: place.symlink_to("/etc/passwd"),
    "a FIFO": lambda place, moved: os.mkfifo(place),
    "a link to a FIFO": lambda place, moved: (os.mkfifo(place.parent / "f"), place.symlink_to("f")),
    "a folder": lambda place, moved: place.mkdir(),
    "nothing": lambda place, moved: None,
}


@pytest.mark.parametrize("name", [MANIFEST, TENSORS, CARD])
@pytest.mark.parametrize("thing", THINGS)
def test_something_else_in_a_files_place(tmp_path, name, thing):
    refused(write(tmp_path / "a", after=in_place_of(name, THINGS[thing])), name.replace(".", r"\."))


@pytest.mark.parametrize("name", [MANIFEST, TENSORS, CARD])
def test_socket_in_a_files_place(tmp_path, name, monkeypatch):
    import socket

    folder = write(tmp_path / "a")
    (folder / name).unlink()
    monkeypatch.chdir(folder)  # paths of sockets are short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(name)
        refused(folder, "no regular file")


def test_folder_named_by_a_link_is_the_users_choice(tmp_path):
    write(tmp_path / "a")
    (tmp_path / "b").symlink_to("a")
    assert kvcalib.load(tmp_path / "b").path == tmp_path / "b"


def snapshot(root: Path, blobs: str = "blobs") -> Path:
    """An artifact as it lies in the Hub's download cache."""
    made, folder = write(root / "made"), root / "repo" / "snapshots" / "c0ffee"
    folder.mkdir(parents=True)
    (root / "repo" / blobs).mkdir()
    for i, path in enumerate(sorted(made.iterdir())):
        path.rename(root / "repo" / blobs / str(i))
        (folder / path.name).symlink_to(f"../../{blobs}/{i}")
    return folder


def test_links_of_the_hubs_cache_are_followed(tmp_path):
    folder = snapshot(tmp_path)
    assert kvcalib.load(folder).manifest.model.model_type == "llama"
    assert set(store.contents(folder)[1]) == {MANIFEST, TENSORS, CARD}


def test_links_of_a_folder_that_only_looks_like_the_hubs_cache(tmp_path):
    refused(snapshot(tmp_path / "a", blobs="other"), "symbolic link")
    folder = snapshot(tmp_path / "b")
    outside = folder.parents[1] / "blobs" / "1"
    outside.rename(tmp_path / "secret")
    outside.symlink_to(tmp_path / "secret")
    refused(folder, "symbolic link")
    folder = snapshot(tmp_path / "c")
    (folder.parents[1] / "blobs").rename(tmp_path / "elsewhere")
    (folder.parents[1] / "blobs").symlink_to(tmp_path / "elsewhere")
    refused(folder, "symbolic link")


def test_exports_that_are_links_do_not_travel(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "cache_config.json").write_text("{}")
    folder = write(tmp_path / "a", after=lambda f: (f / "exports").symlink_to(outside))
    assert set(store.contents(folder)[1]) == {MANIFEST, TENSORS, CARD}
    (folder / "exports").unlink()
    (folder / "exports").mkdir()
    (folder / "exports" / "cache_config.json").symlink_to(outside / "cache_config.json")
    with pytest.raises(KvcalibError, match="symbolic link"):
        store.contents(folder)
    assert kvcalib.load(folder)  # exports are no part of what is loaded


def test_fifo_among_the_exports_is_left_alone(tmp_path):
    folder = write(tmp_path / "a")
    (folder / "exports").mkdir()
    os.mkfifo(folder / "exports" / "cache_config.json")
    assert set(store.contents(folder)[1]) == {MANIFEST, TENSORS, CARD}
    assert kvcalib.load(folder)


def test_card_of_5_mib(tmp_path):
    folder = write(tmp_path / "a")
    (folder / CARD).write_bytes(b"x" * (5 << 20))
    refused(folder, r"README\.md: 5242880 bytes, expected at most")


def test_many_lies_at_once_are_still_one_line(tmp_path):
    body, arrays = base()
    body |= {"layers": "x", "model": [], "tensors": None, "files": 3}
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / MANIFEST).write_bytes(sign(body))
    (tmp_path / "a" / TENSORS).write_bytes(file_of(*pieces(arrays)))
    refused(tmp_path / "a", r"manifest\.json")
