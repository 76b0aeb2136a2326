"""The frontier: what each idea gains at equal bytes, at about 2.4, 2.9 and 3.4 effective bits, in one run.

    python bench/frontier.py [--model MODEL --data SRC --eval-data SRC] [--samples N] [--seq-len N] [--json PATH]
    python bench/frontier.py --show         print what the JSON holds
    python bench/frontier.py --readme       remake README's and docs/feedback.md's tables and plots from the JSON

The demo model on its own text; `--model` takes another first. Of each: one calibration (16 sequences); for every budget
an artifact for each of `IDEAS`, which has all ideas above it too; KVQuant's recipe, padded with exact first tokens to
our bytes; and all of them in one go through the held-out text, one pass a sequence (`evaluation/compare.py`). Other
methods' rows are those of `bench/quality.py` where its JSON has them of the same text and protocol, else measured too.
Then verbatim recall and greedy generations of what stands without and with the ideas, and decode steps in turn.

All that is done lies in `--work`, and the same command goes on there.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import shutil
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent))
from decode_cpu import Bench, timings, tokens
from frontier_tables import KVQUANT, remake, show
from quality import FAMILIES

from kvcalib import errors
from kvcalib.evaluation.baselines import CALIBRATES
from kvcalib.evaluation.comparison import Comparison
from kvcalib.evaluation.provenance import machine, now, versions
from kvcalib.files import hash_bytes, read_json, write_json
from kvcalib.model.loading import BUILTIN, load_model
from kvcalib.rundir import CALIBRATION, RunDir
from kvcalib.stages import allocate, build, compare, fisher, fit_nuq
from kvcalib.stages.compare import CompareSettings
from kvcalib.stages.dial import budget_of
from kvcalib.stages.evaluate import EvalSettings
from kvcalib.stages.measure import MeasureSettings

ROOT = Path(__file__).parents[1]
BUDGETS = (2.4, 2.9, 3.4)
SHARES, QNORM, WIDTHS, SINKS = (0, 0.01), (False, True), (2, 3, 4), 8
TASKS_OF = ("outliers", "kl")
"""Ideas whose recall and generations are measured, at the first and the last budget."""
DECODED = ("outliers", "feedback", "basis")
CONTEXTS, ROUNDS, STEPS = (512, 2048), 12, 6


@dataclass(frozen=True)
class Idea:
    """A row of the ablation: what `fit-nuq` and `allocate` are told."""

    name: str
    fit: fit_nuq.FitNuqSettings
    method: Literal["fisher", "kl"] = "fisher"


IDEAS = (
    Idea("fisher", fit_nuq.FitNuqSettings(choices=None, feedback=False, value_basis="none")),
    Idea("outliers", fit_nuq.FitNuqSettings(feedback=False, value_basis="none")),
    Idea("feedback", fit_nuq.FitNuqSettings(value_basis="none")),
    Idea("basis", fit_nuq.FitNuqSettings()),
    Idea("kl", fit_nuq.FitNuqSettings(), "kl"),
)


@dataclass(frozen=True)
class Subject:
    """A model with the text that it is calibrated and measured on."""

    name: str
    model: str
    data: str
    eval_data: str


@dataclass(frozen=True)
class Made:
    """An artifact, and the effective bits that its widths were planned for."""

    path: Path
    bits: float


def kept(path, of, make):
    """What `make` returned, of the file if it is there for the same `of`."""
    of = json.loads(json.dumps(of))
    if path.is_file() and (body := read_json(path))["of"] == of:
        return body["found"]
    found = make()
    write_json(path, {"of": of, "found": found})
    return found


def artifacts(subject, options, model) -> dict[tuple[str, float], Made]:
    """By idea and budget."""
    work = options.work / subject.name
    settings = fisher.FisherSettings(data=subject.data, samples=options.calibrate, seq_len=options.seq_len)
    calibration = RunDir(work / "calibration", create=True)
    fisher.run(calibration, subject.model, settings, model=model)
    measuring = MeasureSettings(model=subject.model)
    made = {}
    for idea in IDEAS:
        fitted = f"run-{'choices' if idea.fit.choices else 'given'}{'-feedback' * idea.fit.feedback}"
        fitted += "-basis" * (idea.fit.value_basis == "pca")
        run = RunDir(work / fitted, create=True)
        for name in (CALIBRATION, "stages/fisher.json"):
            run.file(name).parent.mkdir(exist_ok=True)
            shutil.copyfile(calibration.file(name), run.file(name))
        fit_nuq.run(run, idea.fit)
        for budget in options.budgets:
            path = work / f"{idea.name}-{budget:g}"
            asked = allocate.AllocateSettings(budget=budget, method=idea.method)
            found, widths = allocate.run(run, asked, measuring, model=model)
            build.run(run, path, None, None, 0, True, widths, budget_of(found), found.options)
            made[idea.name, budget] = Made(path, found.effective_bits)
    for budget in options.budgets:
        path = work / f"refine-{budget:g}"
        if refined(made["kl", budget].path, path, subject, options, model):
            made["refine", budget] = Made(path, made["kl", budget].bits)
    return made


def refined(base, out, subject, options, model) -> bool:
    """Whether there is a `base` with codebooks tuned by gradient; no if kvcalib cannot, or it was no better."""
    if not options.refine or importlib.util.find_spec("kvcalib.stages.refine") is None:
        return False
    from kvcalib.stages import refine

    def make():
        settings = refine.RefineSettings(data=subject.data, seq_len=options.seq_len, steps=options.refine)
        try:
            refine.run(base, out, settings, subject.model, overwrite=True, model=model)
        except errors.NoGain as error:
            return str(error)
        return ""

    return kept(out.with_suffix(out.suffix + ".json"), [identity(base), options.refine], make) == ""


def identity(artifact: Path) -> str:
    """Of an artifact: its manifest holds the hash of every tensor."""
    return hash_bytes((artifact / "manifest.json").read_bytes())


def padded(bits: float, sizes: dict[str, list[float]]) -> list[str]:
    """KVQuant's recipe at `bits` or the next size above: specs of the most code bits that fit, padded with sinks.

    Args:
        sizes: effective bits of each spec without sinks, and what one sink adds.
    """
    fitting = [spec for spec, (bare, _) in sizes.items() if bare <= bits + 1e-6]
    most = max(map(width_of, fitting), default=0)
    found = []
    for spec in (spec for spec in fitting if width_of(spec) == most):
        bare, each = sizes[spec]
        found.append(f"{spec}:sinks={math.ceil((bits - bare) / each - 1e-6)}")
    return found


def width_of(spec: str) -> int:
    return int(spec.split("bits=")[1].split(":")[0])


def kvquant_specs(subject, options, model, run, ours) -> list[str]:
    """The padded specs for the sizes of the artifacts `ours`, as measured."""
    bare = [f"{KVQUANT}:bits={b}:outliers={share}" for b in WIDTHS for share in SHARES]
    settings = EvalSettings(
        data=subject.eval_data, samples=options.batch_size, seq_len=options.seq_len, batch_size=options.batch_size
    )

    def make():
        # How large a cache is does not depend on how its codebooks were found.
        specs = tuple(f"{spec}:solver=exact:sinks={sinks}" for spec in bare for sinks in (0, SINKS))
        found = compare.run(ours, subject.model, settings, CompareSettings(specs=specs, run=run), None, model)
        bits = [row.effective_bits for row in found.rows[1:]]
        theirs = iter(bits[len(ours) :])
        sizes = {spec: [size, (more - size) / SINKS] for spec, size, more in zip(bare, theirs, theirs, strict=True)}
        return {"ours": bits[: len(ours)], "sizes": sizes}

    of = [bare, SINKS, settings.model_dump(mode="json"), [identity(path) for path in ours]]
    found = kept(options.work / subject.name / "kvquant.json", of, make)
    specs = [f"{spec}:qnorm={q}" for bits in found["ours"] for spec in padded(bits, found["sizes"]) for q in QNORM]
    return list(dict.fromkeys(specs))


def reused(options, found: Comparison) -> tuple[str, list] | None:
    """When and the rows that `bench/quality.py` measured on the same model and text by the same protocol."""
    if options.quality is None or not options.quality.is_file():
        return None
    for entry in read_json(options.quality)["comparisons"]:
        there = Comparison.model_validate(entry)
        same = ("model", "data", "samples", "seq_len", "dtype", "prompt", "protocol")
        if all(getattr(there, name) == getattr(found, name) for name in same) and math.isclose(
            there.fp16_nll, found.fp16_nll, rel_tol=1e-6
        ):
            return there.created, [row for row in there.rows if row.source != "kvcalib" and row.name != "fp16"]
    return None


def measure(subject, options):
    """All that the JSON says of one model."""
    model = load_model(subject.model, "float32")
    work = options.work / subject.name
    made = artifacts(subject, options, model)
    run = work / "calibration"
    largest = [
        max((one for (_, at), one in made.items() if at == budget), key=lambda one: one.bits).path
        for budget in options.budgets
    ]
    ours = [each.path for each in made.values()]
    settings = EvalSettings(
        data=subject.eval_data, samples=options.samples, seq_len=options.seq_len, batch_size=options.batch_size
    )
    # Where a file lies on one machine is nobody else's.
    names = {"model": subject.name, "data": Path(subject.eval_data).name}
    kvquant = tuple(kvquant_specs(subject, options, model, run, largest))
    asked = [settings.model_dump(mode="json"), [identity(path) for path in ours]]

    def text(paths, specs, name):
        def make():
            needed = any(spec.split(":")[0] in CALIBRATES for spec in specs)
            given = CompareSettings(specs=specs, run=run if needed else None)
            result = compare.run(paths, subject.model, settings, given, work / name, model, discard=True)
            return result.model_copy(update=names).model_dump(mode="json")

        return Comparison.model_validate(kept(work / f"kept-{name}", [asked, specs], make))

    found = text(ours, kvquant, "text.json")
    there = reused(options, found)
    if there is None:
        rest = tuple(f"{k}:{s}" for k, specs in FAMILIES.values() for s in specs)
        more = text([], rest, "others.json")
        there = more.created, [row for row in more.rows if row.name != "fp16"]
    when, others = there
    body = {
        "name": subject.name, "budgets": list(options.budgets), "comparison": found.model_dump(mode="json"),
        "others": [row.model_dump(mode="json", exclude={"per_sequence"}) for row in others], "others_measured": when,
    }  # fmt: skip
    ends = sorted({options.budgets[0], options.budgets[-1]})
    chosen = [made[idea, budget].path for budget in ends for idea in TASKS_OF]
    for task in options.tasks:
        given = CompareSettings(trials=options.trials, greedy=options.greedy)

        def make(task=task, given=given):
            result = compare.run_task(task, chosen, subject.model, settings, given, None, model)
            return result.model_copy(update=names).model_dump(mode="json")

        of = [asked[0], given.model_dump(mode="json"), [identity(path) for path in chosen]]
        body[task] = kept(work / f"{task}.json", of, make)
    if options.contexts:
        paths = {f"{idea}-{budget:g}": str(made[idea, budget].path) for budget in ends for idea in DECODED}
        of = [{name: identity(Path(path)) for name, path in paths.items()}, options.contexts, options.rounds, STEPS]
        body["decode"] = kept(work / "decode.json", of, lambda: decoded(subject.model, paths, options))
    return body


def decoded(model_name, paths, options):
    """Seconds of a decode step and of a prompt's pass by artifact and context, and their ratios.

    Ratios are to the artifact without feedback of the same budget: of each round's medians, then the median of rounds.
    """
    bench = Bench(model_name, paths)
    rows = []
    for context in options.contexts:
        ids = tokens(bench, context)
        caches = {kind: bench.fill(kind, ids) for kind in paths}
        steps = timings(bench, caches, ids, options.rounds, STEPS)
        by_round = {
            kind: [statistics.median(found[i : i + STEPS]) for i in range(0, len(found), STEPS)]
            for kind, found in steps.items()
        }
        prompts = {kind: [] for kind in paths}
        for number in range(max(2, options.rounds // 2)):
            for kind in paths if number % 2 == 0 else reversed(list(paths)):
                began = time.perf_counter()
                bench.fill(kind, ids)
                prompts[kind].append(time.perf_counter() - began)
        for kind in paths:
            without = "-".join([DECODED[0], kind.rpartition("-")[2]])
            rows.append({
                "cache": kind, "context": context, "without": without,
                "step_seconds": statistics.median(by_round[kind]), "prompt_seconds": statistics.median(prompts[kind]),
                "step_ratio": _ratio(by_round[kind], by_round[without]),
                "prompt_ratio": _ratio(prompts[kind], prompts[without]),
            })  # fmt: skip
    protocol = (
        f"float32, batch 1, {torch.get_num_threads()} threads; {options.rounds} rounds of {STEPS} decode steps, and "
        f"{max(2, options.rounds // 2)} of a prompt's pass in pieces of 512 with attaching, caches in turn; medians"
    )
    return {"rows": rows, "protocol": protocol, "machine": machine(), "versions": versions(), "created": now()}


def _ratio(mine, others):
    return statistics.median(a / b for a, b in zip(mine, others, strict=True))


def arguments(given=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model folder or Hub id, beside the demo's")
    parser.add_argument("--data", default="builtin", help="its calibration text")
    parser.add_argument("--eval-data", help="its held-out text; default: what follows in --data")
    parser.add_argument("--only", action="store_true", help="leave the demo model's part of the JSON as it is")
    parser.add_argument("--budgets", type=float, nargs="+", default=list(BUDGETS), help="effective bits")
    parser.add_argument("--calibrate", type=int, default=16, help="sequences to calibrate on")
    parser.add_argument("--samples", type=int, default=32, help="sequences to measure on")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--refine", type=int, default=40, help="gradient steps of `kvcalib refine`; 0 leaves it out")
    parser.add_argument("--tasks", nargs="*", default=list(compare.TASKS), help="recall, greedy")
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--greedy", type=int, default=512, help="tokens to generate")
    parser.add_argument("--contexts", type=int, nargs="*", default=list(CONTEXTS), help="of the decode steps")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--quality", type=Path, default=Path(__file__).parent / "results" / "quality.json")
    parser.add_argument("--work", type=Path, default=ROOT / "artifacts" / "bench-frontier")
    parser.add_argument("--show", action="store_true", help="print what the JSON holds and measure nothing")
    parser.add_argument("--readme", action="store_true", help="remake tables and plots from the JSON")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "frontier.json")
    return parser.parse_args(given)


def main():
    options = arguments()
    if options.readme:
        remake(read_json(options.json), ROOT)
        return
    if not options.show:
        subjects = []
        if options.model:
            where = (options.model, options.data, options.eval_data or options.data)
            subjects.append(Subject(Path(options.model).name, *where))
        if not options.only:
            subjects.append(Subject("demo", BUILTIN, BUILTIN, BUILTIN))
        before = read_json(options.json)["subjects"] if options.json.is_file() else []
        for subject in subjects:
            part = measure(subject, options)
            before = sorted([*(p for p in before if p["name"] != subject.name), part], key=lambda p: p["name"])
            write_json(options.json, {"bench": "frontier", "subjects": before})
    show(read_json(options.json), Console(width=160))


if __name__ == "__main__":
    main()
