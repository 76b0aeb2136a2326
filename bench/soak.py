"""Half an hour of everything on one attached model: memory stays flat, and logits those of a fresh process.

    python bench/soak.py [--model MODEL] [--parts noise run] [--minutes 30] [--threads N] [--json PATH]

Artifacts of three budgets and adaptive widths are made first, or taken from `--run`. Then every way of attaching
(`soak_modes.WAYS`) times every mode of use (`MODES`) runs once in a process of its own (`soak_fresh.py`), and its
tokens and logits are kept. noise: the same once more on memory full of noise, which must change nothing. run: one long
process attaches one way after the other, at random; each serves a few operations, among them threads
(`soak_threads.py`). One of `--every` operations, and all in threads, repeat a kept case and must give the same bits;
the others have prompts, lengths and batches of their own. Between two attachments, at rest, bytes in use, resident
memory and live objects are counted (`soak_meter.py`). control: the long process once more with nothing attached, in the
modes that need no attachment: what torch and transformers keep by themselves.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
from soak_fresh import difference, digests, name_of, references
from soak_meter import COUNTS, KINDS, Meter
from soak_modes import ATTACHED, MODES, PLAIN, WAYS, Bed, Found, use
from soak_threads import PARALLEL, side_by_side

from kvcalib.evaluation.provenance import machine, now, versions
from kvcalib.files import write_json
from kvcalib.model.loading import load_model
from kvcalib.rundir import RunDir
from kvcalib.stages import allocate, build, fisher, fit_nuq, friendliness, tiers
from kvcalib.stages.dial import budget_of

BITS = {"lowest": 1.5, "low": 2.5, "middle": 3.0, "high": 4.0}
PARTS = ("noise", "run", "control")
REST = 8.0
"""Seconds between two samples at rest."""


def make_artifacts(folder: Path, model_id: str, model: Any) -> None:
    """`low`, `middle`, `high` and `adaptive` under `folder`, of one calibration; nothing if they are there."""
    if all((folder / name).exists() for name in (*BITS, "adaptive")):
        return
    run = RunDir(folder / "run", create=True)
    fisher.run(run, model_id, fisher.FisherSettings(samples=8, seq_len=256), model=model)
    fit_nuq.run(run, fit_nuq.FitNuqSettings())
    friendliness.run(run)
    for name, bits in BITS.items():
        found, widths = allocate.run(run, allocate.AllocateSettings(budget=bits))
        build.run(run, folder / name, None, None, 0, True, widths, budget_of(found), found.options)
    tiers.run(run, [folder / "lowest", folder / "middle"], folder / "adaptive", tiers.TierSettings(budget=2.0), True)


class Soak:
    """The long process.

    Attributes:
        expected: hashes of what a fresh process gave, which `kept` holds whole.
        done, compared: operations by mode, and results that were compared.
        other_bits: results that were not the same.
    """

    def __init__(
        self, options: argparse.Namespace, beds: list[Bed], kept: Path, expected: dict[str, dict[str, str]]
    ) -> None:
        self.options, self.beds, self.kept, self.expected = options, beds, kept, expected
        self.dice = random.Random(options.seed)
        self.meter = Meter(tuple(bed.model for bed in beds))
        self.done: Counter[str] = Counter()
        self.compared: Counter[str] = Counter()
        self.attached: Counter[str] = Counter()
        self.other_bits: list[dict[str, Any]] = []

    def check(self, way: str, mode: str, seed: int, found: Found, where: str) -> None:
        self.compared[where] += 1
        name = name_of(way, mode, seed)
        if digests(found) != self.expected[name]:
            said = difference(found, self.kept / f"{name}.safetensors")
            case = {"way": way, "mode": mode, "seed": seed, "where": where}
            self.other_bits.append(case | {"operation": self.done.total(), "found": said})

    def step(self, way: str) -> None:
        """One operation of the attached model."""
        options, bed = self.options, self.beds[0]
        mode = self.dice.choice([*options.modes, *PARALLEL])
        if mode in PARALLEL:
            for given, found in side_by_side(mode, self.beds, way, self.dice, options):
                self.check(*given, found, mode)
        elif self.dice.randrange(options.every) == 0:
            seed = self.dice.randrange(options.seeds)
            self.check(way, mode, seed, use(bed, mode, seed), mode)
        else:
            use(bed, mode, self.dice.randrange(1000, 1 << 30))
        self.done[mode] += 1

    def run(self, seconds: float) -> None:
        bed, began, rested = self.beds[0], time.monotonic(), 0.0
        while time.monotonic() - began < seconds or self.attached.total() < self.options.rounds:
            way = self.dice.choice(self.options.ways)
            # Artifacts that are read anew each time, and artifacts that several attachments share.
            bed.attach(way, keep=self.dice.randrange(2) == 0)
            self.attached[way] += 1
            for _ in range(self.dice.randint(2, 8)):
                self.step(way)
            bed.detach()
            if time.monotonic() - rested > min(REST, seconds / 20):
                bed.kept.clear()
                self.meter.sample(self.done.total())
                rested = time.monotonic()

    def report(self) -> dict[str, Any]:
        measured = self.meter.report()
        return {
            "operations": self.done.total(), "by_mode": dict(self.done), "attached": dict(self.attached),
            "compared": dict(self.compared), "other_bits": self.other_bits, "measured": measured,
            "holds": {
                "bytes in use are flat": measured["memory"]["in_use"] == "flat",
                "resident memory is flat": measured["memory"]["settled"] == "flat",
                "no kind of object grows": measured["slopes"]["in_use_per_hour"] is not None and not measured["grown"],
                "bits of a fresh process": not self.other_bits and self.compared.total() > 0,
            },
            "samples": self.meter.columns(),
        }  # fmt: skip


def soak(options: argparse.Namespace, before: dict[str, Any]) -> dict[str, Any]:
    """Everything but printing: the body of the JSON, in which the parts of `before` that are not asked for stay."""
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    make_artifacts(options.run, options.model, load_model(options.model))
    body = before | {
        "bench": "soak", "model": Path(options.model).name, "machine": machine(), "versions": versions(), "bits": BITS,
    }  # fmt: skip
    kept = options.run / "fresh"
    if {"noise", "run"} & set(options.parts):
        expected = references(options, kept)
        body["ways"] = {way: WAYS[way] for way in options.ways}
    if "noise" in options.parts:
        noisy = references(options, options.run / "noise", noise=True)
        others = [name for name, found in noisy.items() if found != expected[name]]
        body["noise"] = {"date": now(), "cases": len(noisy), "other_bits": others}
    if "run" in options.parts:
        body["run"] = long_run(options, kept, expected)
    if "control" in options.parts:
        modes = [mode for mode in options.modes if mode not in ATTACHED]
        plain = argparse.Namespace(**vars(options) | {"ways": [PLAIN], "modes": modes})
        kept = options.run / "plain"
        body["control"] = long_run(plain, kept, references(plain, kept))
    return body


def long_run(options: argparse.Namespace, kept: Path, expected: dict[str, dict[str, str]]) -> dict[str, Any]:
    beds = [Bed(load_model(options.model), options.run, options.scale) for _ in range(3)]
    long = Soak(options, beds, kept, expected)
    began, cpu = now(), time.process_time()
    long.run(60 * options.minutes)
    named = ("minutes", "threads", "every", "seeds", "scale", "seed", "modes")
    about = {"date": began, "cpu_seconds": time.process_time() - cpu, "cases": len(expected)}
    return about | {name: getattr(options, name) for name in named} | long.report()


def show(everything: dict[str, Any], console: Console) -> None:
    if "noise" in everything:
        found = everything["noise"]
        console.print(f"memory full of noise: {found['cases']} cases, other bits in {found['other_bits'] or 'none'}")
    for name in ("run", "control"):
        if name in everything:
            show_run(everything, name, console)


def show_run(everything: dict[str, Any], part: str, console: Console) -> None:
    body = everything[part]
    title = "soak" if part == "run" else "control, nothing attached"
    table = Table(title=f"{title}, {everything['model']}, {body['minutes']:g} minutes; {everything['machine']}")
    for name in ("mode", "operations", "compared", "other bits"):
        table.add_column(name, justify="left" if name == "mode" else "right", no_wrap=True)
    wrong = Counter(row["where"] for row in body["other_bits"])
    for mode, count in [*body["by_mode"].items(), ("all", body["operations"])]:
        compared = sum(body["compared"].values()) if mode == "all" else body["compared"].get(mode, 0)
        table.add_row(mode, str(count), str(compared), str(wrong.total() if mode == "all" else wrong[mode]))
    console.print(table)
    samples, measured = body["samples"], body["measured"]
    late = [i for i, s in enumerate(samples["seconds"]) if s >= samples["seconds"][-1] / 3]
    table = Table(title=f"at rest, {len(late)} samples of the last two thirds")
    for name in ("what", "first", "least", "most", "last"):
        table.add_column(name, justify="left" if name == "what" else "right", no_wrap=True)
    for name in (*KINDS, *COUNTS):
        mine = [samples[name][i] for i in late]
        table.add_row(name, *(f"{x:.0f}" for x in (mine[0], min(mine), max(mine), mine[-1])))
    console.print(table)
    lines = [
        f"{name}: {fit['slope']:+.0f} bytes, 95 % {fit['low']:+.0f} to {fit['high']:+.0f}"
        for name, fit in measured["slopes"].items()
        if fit is not None
    ]
    lines += [
        f"{name}: {measured['memory'][name]}; flat is surely less than {limit:.0f} bytes an hour"
        for name, limit in measured["limits_per_hour"].items()
    ]
    lines += [f"grew: {row['what']} from {row['before']:g} to {row['after']:g}" for row in measured["grown"]]
    lines += [f"other bits: {row}" for row in body["other_bits"][:20]]
    lines += [f"{'PASS' if holds else 'FAIL'}  {claim}" for claim, holds in body["holds"].items()]
    for line in lines:
        console.print(line, highlight=False)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--rounds", type=int, default=1, help="attachments at the least, however long they take")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch, in every process")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--every", type=int, default=4, help="one operation of so many repeats a kept case")
    parser.add_argument("--seeds", type=int, default=1, help="kept cases of each way and mode")
    parser.add_argument("--scale", type=int, default=1, help="factor on all lengths")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=["noise", "run"], help="the others stay in the JSON"
    )
    parser.add_argument("--run", type=Path, default=Path("artifacts/bench-soak"), help="artifacts, kept for next time")
    parser.add_argument("--show", action="store_true", help="print what the JSON holds and measure nothing")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "soak.json")
    return parser


def main() -> None:
    options = arguments().parse_args()
    body = json.loads(options.json.read_text()) if options.json.is_file() else {}
    if not options.show:
        body = soak(options, body)
        write_json(options.json, body)
    show(body, Console(width=120))


if __name__ == "__main__":
    main()
