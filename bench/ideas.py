"""Ideas for a lower KLD at the same bytes, one by one, against rounding to the nearest: a simulation.

    python bench/ideas.py [--model MODEL] [--data SRC] [--eval-data SRC] [--others SRC:SRC ...] [--json PATH]
    python bench/ideas.py --show [--json PATH]          print what the JSON holds

One calibration (16 x 512 tokens), then every idea's codebooks, widths by the budget as `allocate --budget` finds them
(predicted loss, groups of 16, no outliers: what the budget chooses on both models), and the KLD of 16 x 512 held-out
tokens, each sequence in one pass. Keys and values are replaced by what storage would show (`ideas_store.py`); bytes are
counted by the formula of the plan. `feedback` is what `fit-nuq --value-basis none` makes; that and nearest rounding are
measured on packed storage too, to show that the simulation is what is built.

Every row is written at once; the same command goes on where it was stopped. Delete the JSON to measure anew.

Ratios are of mean KLDs on the same sequences, with their standard error by leaving out one sequence at a time.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
from ideas_plan import Idea, Subject, measure, plan
from ideas_store import exact_logits, replay

from kvcalib.evaluation.provenance import machine, now, versions
from kvcalib.files import write_json
from kvcalib.model.loading import BUILTIN, load_model, load_tokenizer
from kvcalib.model.text import token_sequences
from kvcalib.rundir import RunDir
from kvcalib.runtime.loader import load
from kvcalib.stages import allocate, build, evaluate, fisher, fit_nuq
from kvcalib.stages.dial import budget_of

BUDGETS = (2.4, 3.4)
LOW_BUDGETS = (1.3, 1.7)
"""Effective bits at which vectors are tried: about 1 and 1.5 bits of codes on rows of 128 channels."""
HELD = "held out"
PROTOCOL = (
    "simulation; {} x {} tokens calibrate, as many held-out ones evaluate (half as many on other text), each sequence "
    "in one pass, every token as stored; KLD is the mean of KL(unquantized || quantized), nats"
)


BASE = Idea("base", "nearest rounding")
FED = Idea("base", "feedback", feedback=True)
IDEAS = (
    BASE,
    FED,
    Idea("1", "feedback, widths by what it leaves", feedback=True, widths_know=True),
    Idea("1b", "V scale per token and head", scope="head"),
    Idea("1b", "feedback, V scale per token and head", scope="head", feedback=True),
    Idea("3", "no correction", correction="none"),
    Idea("3", "mean only, tokens alike", correction="mean"),
    Idea("3", "mean and deviation, tokens alike", correction="plain"),
    Idea("3", "temperature, over tokens", temperature="tokens"),
    Idea("3", "temperature, as attention sees", temperature="attention"),
    Idea("3", "feedback, temperature as attention sees", temperature="attention", feedback=True),
    Idea("4", "key pairs by PCA", key_map="pca"),
    Idea("4", "key pairs by Fisher", key_map="fisher"),
    Idea("4", "V by PCA", value_map="spread"),
    Idea("4", "V by both, no scale", value_map="both", static=True),
    Idea("4", "V by KLT, no scale", value_map="klt", static=True),
    Idea("4", "V as it is, no scale", static=True),
    Idea("4", "feedback, key pairs by PCA", key_map="pca", feedback=True),
    Idea("4", "feedback, V by PCA", value_map="spread", feedback=True),
    Idea("4", "feedback, V as it is, no scale", static=True, feedback=True),
    Idea("4", "feedback, V by PCA, no scale", value_map="spread", static=True, feedback=True),
    Idea("4", "the same, its bits unspent", value_map="spread", static=True, feedback=True, spend=False),
    Idea("4", "feedback, V by KLT, no scale", value_map="klt", static=True, feedback=True),
    Idea("4", "feedback, K by PCA of the head", key_map="spread", feedback=True),
    Idea("4", "feedback, K by PCA of 16 channels", key_map="blocks", feedback=True),
    Idea(
        "4", "feedback, K of 16, V by PCA, no scale", key_map="blocks", value_map="spread", static=True, feedback=True
    ),
)
LOW = (
    BASE,
    Idea("5", "free channels", group=0),
    Idea("5", "vectors of 2", vector=2),
    Idea("5", "vectors of 4", vector=4),
)


def ratio(row: dict[str, Any], base: dict[str, Any]) -> tuple[float, float]:
    """KLD over the base's on the same sequences, and its standard error by the jackknife."""
    a, b = np.array(row["sequence_kld"]), np.array(base["sequence_kld"])
    without = (a.sum() - a) / (b.sum() - b)
    return a.sum() / b.sum(), float(np.sqrt((len(a) - 1) / len(a) * np.square(without - without.mean()).sum()))


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows beside `nearest rounding` of the same model, text and budget."""
    where = ("model", "budget", "evaluated")
    bases = {tuple(r.get(w) for w in where): r for r in rows if r["name"] == BASE.name or r.get("own")}
    for row in rows:
        row["ratio"], row["ratio_error"] = ratio(row, bases[tuple(row.get(w) for w in where)])
    return rows


def packed(model_id: str, model: Any, data: str, eval_data: str, sizes: tuple[int, int], budgets: tuple[float, ...]):
    """What `kvcalib run` builds, outliers by the budget, on real packed storage; and the same without feedback."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        run = RunDir(Path(folder) / "run", create=True)
        fisher.run(run, model_id, fisher.FisherSettings(data=data, samples=sizes[0], seq_len=sizes[1]), model=model)
        for feedback in (False, True):
            fit_nuq.run(run, fit_nuq.FitNuqSettings(feedback=feedback, value_basis="none"))
            for bits in budgets:
                found, widths = allocate.run(run, allocate.AllocateSettings(budget=bits))
                path = Path(folder) / f"{bits:g}-{feedback}"
                build.run(run, path, None, None, 0, True, widths, budget_of(found), found.options)
                options = sorted({str(option) for option in found.options.values()})
                rows.append({"budget": bits, "feedback": feedback, "options": options, "path": path})
        settings = evaluate.EvalSettings(data=eval_data, samples=sizes[0], seq_len=sizes[1])
        found = evaluate.run([load(row.pop("path")) for row in rows], model_id, settings, model=model)
    return [
        {**row, "kld": one.kld, "effective_bits": one.long_cache_bits} for row, one in zip(rows, found, strict=True)
    ]


def crossed(texts: dict[str, tuple[np.ndarray, np.ndarray]], name: str, model: Any, budget: float):
    """Calibration on each of `texts` (ids to calibrate, ids to evaluate) and on all mixed, measured on each."""
    calibrations = {source: pair[0] for source, pair in texts.items()}
    share = len(next(iter(calibrations.values()))) // len(texts)
    calibrations["mixed"] = np.concatenate([ids[: share + (i == 0)] for i, ids in enumerate(calibrations.values())])
    expected = {source: exact_logits(model, pair[1]) for source, pair in texts.items()}
    nothing = next(iter(texts.values()))[1][:1]
    rows = []
    for source, ids in calibrations.items():
        subject = Subject.make(name, model, ids, nothing)
        for idea in (BASE, FED):
            stored, bits = plan(subject, idea, budget)
            for target, (_, sequences) in texts.items():
                kld = replay(model, subject.rotations, stored, sequences, expected[target])
                rows.append({
                    "model": name, "part": "6", "name": f"{idea.name}, calibrated on {source}", "evaluated": target,
                    "budget": budget, "effective_bits": bits, "kld": float(kld.mean()), "sequence_kld": kld.tolist(),
                    "own": idea == BASE and source == target,
                })  # fmt: skip
    return rows


def show(body: dict[str, Any], console: Console) -> None:
    """One table for every model and part."""
    for name in dict.fromkeys(row["model"] for row in body["rows"]):
        for parts, title in ((("base", "1", "1b", "3", "4", "5"), "ideas"), (("6",), "calibration on other text")):
            mine = [r for r in body["rows"] if r["model"] == name and r["part"] in parts]
            columns = list(dict.fromkeys((r["budget"], r.get("evaluated", HELD)) for r in mine))
            table = Table(title=f"{name}, {title}: KLD over `nearest rounding`, standard error, effective bits")
            for column in ("", "", *(f"{text}, {bits:g}" for bits, text in columns)):
                table.add_column(column)
            for part, label in dict.fromkeys((r["part"], r["name"]) for r in mine):
                cells = [part, label]
                for column in columns:
                    row = next((r for r in mine if r["name"] == label and r["part"] == part
                                and (r["budget"], r.get("evaluated", HELD)) == column), None)  # fmt: skip
                    cells.append("" if row is None else f"{row['ratio']:.3f} ±{row['ratio_error']:.3f} "
                                 f"({row['kld']:.4f} at {row['effective_bits']:.3f})")  # fmt: skip
                table.add_row(*cells)
            if mine:
                console.print(table)
        for row in body["packed"]:
            if row["model"] == name:
                console.print(f"{name}, packed{', feedback' * row['feedback']}: KLD {row['kld']:.5f} at "
                              f"{row['effective_bits']:.3f} bits, {', '.join(row['options'])}")  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=BUILTIN)
    parser.add_argument("--data", default=BUILTIN, help="calibration text")
    parser.add_argument("--eval-data", help="held-out text; default: --data")
    parser.add_argument("--others", nargs="*", default=[], help="CALIBRATE:EVALUATE texts of other kinds")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--parts", nargs="*", default=["1", "1b", "3", "4", "5", "6"])
    parser.add_argument("--show", action="store_true", help="print what the JSON holds and measure nothing")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "ideas.json")
    options = parser.parse_args()
    console = Console(width=160)
    if not options.show:
        run(options, console)
    show(json.loads(options.json.read_text()), console)


def run(options: argparse.Namespace, console: Console) -> None:
    """The parts that are asked for and that the JSON does not have of this text; a row is there as soon as it is."""
    began = time.process_time()
    sizes, own = (options.samples, options.seq_len), (options.data, options.eval_data or options.data)
    name = "demo" if options.model == BUILTIN else Path(options.model).name
    model, tokenizer = load_model(options.model, "float32"), load_tokenizer(options.model)
    protocol = PROTOCOL.format(*sizes)
    before = json.loads(options.json.read_text()) if options.json.is_file() else {}
    same = before.get("protocol") == protocol and before.get("data") == [Path(text).name for text in own]
    rows: list[dict[str, Any]] = [row for row in before["rows"] if row["model"] == name] if same else []
    built: list[dict[str, Any]] = before["packed"] if same else []
    done = {(row["part"], row["name"], row["budget"]) for row in rows}
    asked = [(idea, bits) for bits in BUDGETS for idea in IDEAS] + [(i, bits) for bits in LOW_BUDGETS for i in LOW]
    left = [(i, b) for i, b in asked if i.part in ("base", *options.parts) and (i.part, i.name, b) not in done]

    spent = before["cpu_seconds"] if same else 0.0

    def ids(source, split):
        return token_sequences(source, tokenizer, *sizes, split)

    def keep():
        write_json(options.json, {
            "bench": "ideas",
            "protocol": protocol,
            "data": [Path(text).name for text in own],
            "rows": with_ratios(rows), "packed": built, "cpu_seconds": spent + time.process_time() - began,
            "machine": machine(), "versions": versions(), "created": now(),
        })  # fmt: skip

    if left:
        subject = Subject.make(name, model, ids(own[0], "calibrate"), ids(own[1], "evaluate"))
        for idea, bits in left:
            rows.append(measure(subject, idea, bits))
            console.print(f"{bits:g} {idea.name}: {rows[-1]['kld']:.5f} ({rows[-1]['seconds']:.1f} s)")
            keep()
        del subject
    if "6" in options.parts and not any(part == "6" for part, *_ in done):
        pairs = dict.fromkeys([own, *(tuple(pair.split(":")) for pair in options.others)])
        half = -(-sizes[0] // 2)
        texts = {Path(a).stem: (ids(a, "calibrate"), ids(b, "evaluate")[:half]) for a, b in pairs}
        rows += crossed(texts, name, model, BUDGETS[0])
        keep()
    if not built:
        built += [{"model": name, **row} for row in packed(options.model, model, *own, sizes, BUDGETS)]
        keep()


if __name__ == "__main__":
    main()
