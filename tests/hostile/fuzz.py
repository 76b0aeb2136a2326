"""Fuzzing of artifacts: each of many random lies ends in a named error, or loads to what the specification allows.

    python -m tests.hostile.fuzz --count 20000 --seed 1 --json bench/results/fuzz.json

Cases run in forked children, in blocks, so that a crash of the interpreter is seen and told from the case that was at
work. While an artifact loads, an audit hook notes every file that is opened and everything that writes, runs or
connects; the address space of a child is bounded. What the oracle says is compared with what happened, in both
directions. Some of what loads is attached to a tiny model and run. Exit status 1 if anything went wrong.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
import torch

import kvcalib
from kvcalib.errors import ArtifactMismatch, KvcalibError
from kvcalib.runtime.loader import prove
from tests.hostile import mutations
from tests.hostile.oracle import fault
from tests.tiny import tiny_llama, tokens

BLOCK = 250
SECONDS = 1.0
ROOM = 512 << 20
"""Bytes of address space that a child may add to its parent's."""
PATIENCE = 60
EVERY = 8
"""Of the artifacts that load, one in so many is attached and run, besides all that are there to be valid."""
WRITING = (
    "os.",
    "shutil.",
    "subprocess.",
    "socket.",
    "tempfile.",
    "ctypes.",
    "pty.",
    "pickle.",
    "marshal.",
    "exec",
    "compile",
)
READING = ("os.listdir", "os.scandir")


@dataclass
class Found:
    """What became of one case: outcome is `refused`, `loaded`, or begins with `WRONG`."""

    number: int
    kind: str
    outcome: str
    seconds: float
    message: str = ""
    ran: bool = False


class Watch:
    """An audit hook that notes what happens between `start` and `stop`."""

    def __init__(self) -> None:
        self.on, self.folder, self.seen = False, "", list[str]()
        sys.addaudithook(self._note)

    def start(self, folder: Path) -> None:
        self.folder, self.seen, self.on = os.path.realpath(folder), [], True

    def stop(self) -> list[str]:
        self.on = False
        return self.seen

    def _note(self, event: str, given: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open":
            path, _, flags = given
            if isinstance(path, int):
                return  # a descriptor, whose opening was noted
            place = os.path.realpath(os.fsdecode(path))
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND):
                self.seen.append(f"opens {place} to write")
            elif os.path.commonpath([place, self.folder]) != self.folder:
                self.seen.append(f"opens {place}")
        elif event.startswith(WRITING) and event not in READING:
            self.seen.append(f"{event} {given[:1]!r}"[:200])


class Runner:
    """A tiny model and what one case needs; made once, before any fork."""

    def __init__(self, seed: int) -> None:
        self.seed, self.watch = seed, Watch()
        torch.set_num_threads(1)
        self.model = tiny_llama()
        self.rotations = prove(self.model, [0, 1])
        self.prompt = tokens(1, 9)
        with tempfile.TemporaryDirectory() as place:
            # Compiles the loops, and lets every library import what it imports late.
            self.run(kvcalib.load(mutations.write(Path(place) / "a")))
            for number in range(40):
                self.case(Path(place) / "b", number)

    def run(self, artifact: kvcalib.Artifact) -> bool:
        """Attach and run a few tokens: whether the logits are finite."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kvcalib.attach(self.model, artifact, rotations=self.rotations)
        try:
            cache = artifact.new_cache(self.model)
            with torch.no_grad():
                out = self.model(self.prompt, past_key_values=cache).logits
                steps = [self.model(self.prompt[:, i : i + 1], past_key_values=cache).logits for i in range(3)]
            return all(bool(torch.isfinite(logits).all()) for logits in (out, *steps))
        finally:
            kvcalib.detach(self.model)

    def case(self, root: Path, number: int) -> Found:
        """Write, load and judge case `number` in a folder that is removed afterwards."""
        root.mkdir()
        try:
            (root / "beside").write_text("untouched")
            case = mutations.make(root / "artifact", self.seed, number)
            expected, before = fault(root / "artifact"), tree(root)
            for attempt in range(2):
                found = self._load(root / "artifact", number, case.kind)
                # A pause of the machine is no fault: what takes over a second does so twice.
                if found.seconds <= SECONDS or attempt:
                    break
            if tree(root) != before:
                found.outcome = "WRONG: the folder or its surroundings changed"
            elif found.seconds > SECONDS:
                found.outcome = "WRONG: takes over a second"
            elif found.outcome == "loaded" and case.altered:
                found.outcome = "WRONG: loads, although its bytes are not what was signed"
            elif found.outcome == "loaded" and expected is not None:
                found.outcome, found.message = "WRONG: loads, although the specification forbids it", expected
            elif found.outcome.startswith("refused") and expected is None:
                found.outcome = "WRONG: refused, although the specification allows it"
            return found
        finally:
            shutil.rmtree(root)

    def _load(self, folder: Path, number: int, kind: str) -> Found:
        self.watch.start(folder)
        started, artifact, message = time.perf_counter(), None, ""
        try:
            artifact = kvcalib.load(folder)
            outcome = "loaded"
        except KvcalibError as error:
            outcome, message = f"refused: {type(error).__name__}", str(error)
        except Exception as error:
            outcome, message = f"WRONG: {type(error).__name__}", str(error)
        seconds, seen = time.perf_counter() - started, self.watch.stop()
        found = Found(number, kind, outcome, seconds, message)
        if seen:
            found.outcome, found.message = "WRONG: it did more than read its files", seen[0]
        elif not message.isprintable() or len(message) > 1000:
            found.outcome = "WRONG: a message that is no line"
        if artifact is not None and (kind == "harmless" or number % EVERY == 0):
            try:
                found.ran = True
                if not self.run(artifact):
                    found.outcome = "WRONG: logits are not finite"
            except ArtifactMismatch:
                found.ran = False  # the model's fields were changed: it is another's artifact
            except Exception as error:
                found.outcome, found.message = f"WRONG: running it, {type(error).__name__}", str(error)
        return found


def tree(root: Path) -> dict[str, tuple[int, ...]]:
    """Every file, folder and link below `root`, with what would change if anybody wrote to it."""
    found = {}
    for path in (root, *root.rglob("*")):
        at = path.lstat()
        found[str(path)] = (at.st_mode, at.st_size, at.st_mtime_ns, at.st_ino)
    return found


def fuzz(count: int, seed: int, room: Path, block: int = BLOCK) -> Iterator[Found]:
    """Cases `0 .. count - 1`, in forked children of `block` cases each."""
    runner, number = Runner(seed), 0
    while number < count:
        for found in in_child(runner, room, number, min(count, number + block)):
            number = found.number + 1
            yield found


def in_child(runner: Runner, room: Path, first: int, last: int) -> Iterator[Found]:
    """What a child finds, line by line; if it dies or stands still, the case it was at is to blame."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reading)
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, size + ROOM))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            for number in range(first, last):
                signal.alarm(PATIENCE)
                found = runner.case(room / str(os.getpid()), number)
                os.write(writing, (json.dumps(asdict(found)) + "\n").encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    number = first
    with os.fdopen(reading, encoding="utf-8") as lines:
        for line in lines:
            found = Found(**json.loads(line))
            number = found.number + 1
            yield found
    _, status = os.waitpid(child, 0)
    shutil.rmtree(room / str(child), ignore_errors=True)
    if status:
        how = os.waitstatus_to_exitcode(status)
        name = f"exit status {how}" if how >= 0 else signal.Signals(-how).name
        yield Found(number, "?", f"WRONG: the interpreter ended with {name}", math.nan)


def reason(message: str) -> str:
    """A message without its path and without what differs from case to case: which check it was."""
    said = message.split("/")[-1].partition(": ")[2]
    return re.sub(r"'[^']*'|\"[^\"]*\"|[\[({][^\])}]*[\])}]|-?\d[\d.e+]*", "_", said)[:60]


def summary(found: list[Found], count: int, seed: int, wall: float) -> dict[str, Any]:
    """Counts by outcome and kind, the slowest case, and every fault."""
    wrong = [one for one in found if one.outcome.startswith("WRONG")]
    times = sorted(one.seconds for one in found)
    kinds: dict[str, Counter[str]] = {}
    for one in found:
        kinds.setdefault(one.kind, Counter())[one.outcome.split(":")[0]] += 1
    return {
        "count": count, "seed": seed, "outcomes": dict(sorted(Counter(one.outcome for one in found).items())),
        "kinds": {name: dict(sorted(counts.items())) for name, counts in sorted(kinds.items())},
        "reasons": dict(Counter(reason(one.message) for one in found if one.message).most_common(60)),
        "attached_and_run": sum(one.ran for one in found),
        "seconds_to_load": {"median": times[len(times) // 2], "longest": times[-1]},
        "wall_seconds": round(wall, 1),
        "wrong": [asdict(one) for one in wrong[:50]],
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version(),
                    "torch": torch.__version__, "numpy": numpy.__version__, "kvcalib": kvcalib.__version__},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Fuzz artifacts; see the module's page.")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    started, found = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as room:
        for one in fuzz(options.count, options.seed, Path(room)):
            found.append(one)
            if one.outcome.startswith("WRONG"):
                print(f"case {one.number} ({one.kind}): {one.outcome} {one.message}", file=sys.stderr, flush=True)
            elif one.number % 1000 == 999:
                print(f"{one.number + 1} of {options.count}", file=sys.stderr, flush=True)
    result = summary(found, options.count, options.seed, time.perf_counter() - started)
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: result[name] for name in ("outcomes", "attached_and_run", "seconds_to_load")}, indent=1))
    sys.exit(1 if result["wrong"] else 0)


if __name__ == "__main__":
    main()
