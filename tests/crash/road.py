"""The road of a small model, stage by stage: the commands, and what they leave when nothing disturbs them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.crash.stem import Ended, Stem
from tests.test_cli import VOCABULARY, save
from tests.tiny import tiny_llama

ROWS, LENGTH = 16, 24


class Road:
    """The stages' commands on the folder `work`, and the folder's state before and after each.

    Attributes:
        ended: how each stage went, undisturbed: its seconds and its operations on files.
    """

    def __init__(self, home: Path, stem: Stem) -> None:
        self.home, self.stem, self.work = home, stem, home / "work"
        save(tiny_llama(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48), home / "model")
        for seed, name in enumerate(("data.jsonl", "other.jsonl")):
            rows = np.random.default_rng(seed).integers(3, VOCABULARY, (ROWS, LENGTH)).tolist()
            (home / name).write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
        self.commands = dict(_commands(home, self.work))
        self.ended: dict[str, Ended] = {}
        (home / "states").mkdir()
        # Somewhere else first, so that everything is compiled.
        for _, args in _commands(home, home / "elsewhere"):
            stem.warm(*args)
        self.work.mkdir()
        for stage, args in self.commands.items():
            self.keep(f"before {stage}")
            self.ended[stage] = stem.ok(*args, work=self.work)
            self.keep(f"after {stage}")

    def keep(self, name: str) -> None:
        shutil.copytree(self.work, self.home / "states" / name, symlinks=True)

    def put(self, state: Path | str) -> None:
        """Make the folder what it was in a state: the name of one, or a folder with it."""
        shutil.rmtree(self.work)
        shutil.copytree(self.home / "states" / state, self.work, symlinks=True)

    def run(self, stage: str, **fate: Any) -> Ended:
        return self.stem.run(*self.commands[stage], work=self.work, **fate)

    def restart(self, stage: str, why: str) -> Ended:
        """Start the stage again: it must end in the bytes of the undisturbed run, and leave nothing else."""
        ended = self.run(stage)
        assert ended.code == 0, f"{why}: {ended.err}"
        expected = tree(self.home / "states" / f"after {stage}")
        assert differences(tree(self.work), expected) == [], why
        return ended


def _commands(home: Path, work: Path) -> Iterator[tuple[str, tuple[Any, ...]]]:
    model, data = home / "model", home / "data.jsonl"
    run, small, large = work / "run", work / "small", work / "large"
    text = ("--samples", 6, "--seq-len", LENGTH)
    passing = (*text, "--batch-size", 1, "--keep-tokens", 64)
    yield "fisher", ("fisher", model, "--run", run, "--data", data, *passing)
    yield "fit-nuq", ("fit-nuq", run, "--key-bits", 3, "--value-bits", 3)
    yield "friendliness", ("friendliness", run)
    yield "allocate", ("allocate", run, "--budget", 4)
    yield "build", ("build", run, "--out", small)
    kl = ("--method", "kl", "--model", model, "--samples", 2)
    yield "allocate kl", ("allocate", run, "--budget", 6, *kl)
    yield "build large", ("build", run, "--out", large)
    judged = ("--data", data, "--samples", 2, "--seq-len", LENGTH)
    yield "eval", ("eval", small, large, "--model", model, *judged, "--json", work / "eval.json")
    yield "tiers", ("tiers", run, small, large, "--out", work / "tiers", "--budget", 5)
    yield "tiers again", ("tiers", run, small, large, "--out", work / "tiers", "--budget", 4.5, "--overwrite")
    yield "card", ("card", small, "--license", "mit")
    yield "build again", ("build", run, "--out", small, "--overwrite")
    yield "export", ("export", run, "--to", "vllm-scales", "--out", work / "exports")
    yield "report", ("report", run)
    other = ("fit-nuq", run, "--key-bits", 3, "--value-bits", 3, "--sinks", 2)
    yield "fit-nuq again", other
    yield "fisher b", ("fisher", model, "--run", work / "b", "--data", home / "other.jsonl", *passing)
    yield "merge", ("merge", run, work / "b", "--out", work / "both")
    yield "run", ("run", model, "--data", data, *text, "--out", work / "whole", "--bits", 4, "--eval-data", data)


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every file below `folder` with its bytes, every folder with None."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def differences(found: dict[str, bytes | None], expected: dict[str, bytes | None]) -> list[str]:
    """The names that are too many, missing, or of other bytes."""
    return sorted(
        f"{'is missing' if name not in found else 'is too many' if name not in expected else 'differs'}: {name}"
        for name in set(found) | set(expected)
        if name not in found or name not in expected or found[name] != expected[name]
    )
