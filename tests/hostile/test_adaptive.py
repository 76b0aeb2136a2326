"""Folders of adaptive widths that lie; their tiers are artifacts, which `test_artifacts.py` is about."""

from __future__ import annotations

import os

import pytest

import kvcalib
from kvcalib.errors import KvcalibError
from tests.hostile.builders import MANIFEST, nested, put, sha256, sign, write

HUGE = 10**18


def adaptive(folder, body=None, text=None):
    """Two tiers and the rule over them, signed after `body` has changed it."""
    for tier in range(2):
        write(folder / f"tier-{tier}")
    hashes = [sha256((folder / f"tier-{tier}" / MANIFEST).read_bytes()) for tier in range(2)]
    layers = [{"index": i, "key": [0.5], "value": [0.5], "mean": 0.1} for i in range(2)]
    rule = {
        "format": "kvcalib-adaptive", "format_version": 1, "signal": "late", "window": 4, "bits": 3.0, "tiers": hashes,
        "layers": layers,
    }  # fmt: skip
    if body is not None:
        body(rule)
    signed = sign(rule)
    (folder / "adaptive.json").write_bytes(signed if text is None else text(signed))
    return folder


def test_the_truth_loads(tmp_path):
    assert kvcalib.load_adaptive(adaptive(tmp_path / "a")).rule.window == 4


CASES = {
    "unknown field": ({"body": put("colour", 1)}, "colour"),
    "window of 10^18": ({"body": put("window", HUGE)}, "window"),
    "window of 0": ({"body": put("window", 0)}, "window is 0"),
    "bits of NaN": ({"body": put("bits", float("nan"))}, "NaN is no number"),
    "a threshold of NaN": ({"body": put("layers", 0, "key", [float("nan")])}, "NaN is no number"),
    "a threshold below 0": ({"body": put("layers", 0, "key", [-1.0])}, r"layers\.0\.key\.0 is -1"),
    "a threshold more": ({"body": put("layers", 0, "key", [0.1, 0.2])}, "expected 1 ascending thresholds"),
    "a layer that no tier has": ({"body": put("layers", 0, "index", 5)}, "other layers"),
    "a layer of 10^18": ({"body": put("layers", 0, "index", HUGE)}, r"layers\.0\.index"),
    "a layer twice": ({"body": put("layers", 1, "index", 0)}, "other layers"),
    "one tier": ({"body": lambda b: b["tiers"].pop()}, "tiers"),
    "tiers that are not there": ({"body": lambda b: b["tiers"].append("0" * 64)}, "tier-2: missing"),
    "a million tiers": ({"body": put("tiers", ["x"] * 1_000_000)}, "tiers"),
    "a tier that is a path": ({"body": put("tiers", 1, "../../etc/passwd")}, "another artifact than"),
    "a key twice": (
        {"text": lambda t: t.replace(b'"window": 4', b'"window": 4, "window": 4')},
        "'window' is given twice",
    ),
    "another digest": ({"text": lambda t: t.replace(b'"window": 4', b'"window": 5')}, "digest"),
    "deep": ({"text": lambda t: nested(100_000)}, "nested too deeply"),
    "a list": ({"text": lambda t: b"[]"}, "not the JSON of adaptive widths"),
}


@pytest.mark.parametrize("name", CASES)
def test_rule_that_lies(tmp_path, name):
    lie, message = CASES[name]
    refused(adaptive(tmp_path / "a", **lie), message)


def test_tiers_and_rules_that_are_links_or_fifos(tmp_path):
    folder = adaptive(tmp_path / "a")
    for name in ("tier-1", "adaptive.json"):
        (folder / name).rename(tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
        refused(folder, f"{name}.* link")
        (folder / name).unlink()
        os.mkfifo(folder / name)
        refused(folder, name)
        (folder / name).unlink()
        (tmp_path / name).rename(folder / name)
    assert kvcalib.load_adaptive(folder)


def refused(folder, message):
    with pytest.raises(KvcalibError, match=message) as caught:
        kvcalib.load_adaptive(folder)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 700
