"""All stages in a row: `kvcalib run` for one artifact, `kvcalib demo` for the embedded model at four budgets.

The processes of a launch run every stage together. What is not shared out (friendliness, artifacts, the report) the
first one makes while the others wait.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from kvcalib.evaluation.perplexity import Evaluation
from kvcalib.launch import Launch
from kvcalib.model.loading import BUILTIN
from kvcalib.recipe import DEFAULT_BITS, Recipe
from kvcalib.rundir import RunDir
from kvcalib.stages import allocate, build, compare, evaluate, fisher, fit_nuq, friendliness, report
from kvcalib.stages.allocate import AllocateSettings
from kvcalib.stages.compare import CompareSettings
from kvcalib.stages.dial import budget_of, check_budget
from kvcalib.stages.evaluate import EvalSettings
from kvcalib.stages.fisher import FisherSettings
from kvcalib.stages.measure import MeasureSettings

DEMO_BITS = (6.0, 4.0, 3.0, DEFAULT_BITS)
"""Effective bits of the demo's artifacts; the last one's widths stay in its run."""
DEMO_AGAINST = (
    "kvquant-published:bits=3", "kvquant-published:bits=2", "turboquant:bits=4", "turboquant:bits=3",
    "turboquant:bits=2", "kivi:bits=3:residual=0", "kivi:bits=2:residual=0", "nf:bits=4", "nf:bits=3", "int:bits=4",
    "int:bits=3",
)  # fmt: skip
"""What the demo's report sets them beside."""
COMPARISON = "compare.json"


@dataclass
class Outcome:
    """What a pipeline made: artifacts, their measures, the run's folder, the report and the seconds that it took."""

    artifacts: list[Path]
    evaluations: list[Evaluation]
    run_dir: Path
    report: Path
    seconds: float


def run(recipe: Recipe, overwrite: bool = False, here: Launch | None = None) -> Outcome:
    """Every stage of `recipe`, up-to-date ones skipped; the model is loaded once by each process of `here`."""
    return _run(recipe, {recipe.out: recipe.allocate}, report.beside(recipe.out), overwrite, here or Launch())


def demo(out: Path, here: Launch | None = None) -> Outcome:
    """The whole road on the embedded model and text, offline: artifacts of several budgets, under `out`."""
    recipe = Recipe(
        model=BUILTIN,
        out=out / f"nuq{DEFAULT_BITS:g}",
        run_dir=out / "run",
        fisher=FisherSettings(samples=16, seq_len=512),
        evaluate=EvalSettings(samples=16, seq_len=512),
    )
    artifacts: dict[Path, AllocateSettings | None] = {
        out / f"nuq{bits:g}": AllocateSettings(budget=bits) for bits in DEMO_BITS
    }
    return _run(recipe, artifacts, out / "report.html", True, here or Launch(), DEMO_AGAINST)


def _run(
    recipe: Recipe,
    artifacts: dict[Path, AllocateSettings | None],
    page: Path,
    overwrite: bool,
    here: Launch,
    against: tuple[str, ...] = (),
) -> Outcome:
    settings = recipe.fisher
    began = time.monotonic()
    with here.step("run"):
        RunDir.check_free(recipe.run_path)
        model = settings.load(recipe.model, here.own_device(settings.device))
        for spending in artifacts.values():
            if spending is not None and spending.budget is not None and not spending.exact_layers:
                check_budget(model, spending.budget, recipe.fit)
    run_dir = here.in_turn("run", lambda: RunDir(recipe.run_path, create=True))
    fisher.run(run_dir, recipe.model, settings, overwrite, model, here)
    fit_nuq.run(run_dir, recipe.fit, here)
    with here.step("friendliness"):
        if here.first:
            friendliness.run(run_dir)
    for path, spending in artifacts.items():
        widths, budget, options, planned_on = None, None, None, None
        if spending is not None:
            measuring = MeasureSettings(model=recipe.model)
            found, widths = allocate.run(run_dir, spending, measuring, model=model, here=here)
            budget, options, planned_on = budget_of(found), found.options, found.codebooks
        with here.step("build"):
            if here.first:
                build.run(run_dir, path, None, None, recipe.recent, overwrite, widths, budget, options, planned_on)
        here.supply_folder(path)
    measured = []
    if recipe.evaluate is not None:
        chosen = recipe.evaluate
        if chosen.data == settings.data and not chosen.skip:
            # The same file or data set: what calibrated must not also judge.
            chosen = chosen.model_copy(update={"skip": -(-settings.samples * settings.seq_len // chosen.seq_len)})
        path = run_dir.file("eval.json")  # the run's own: whatever lies there is of this recipe or outdated
        measured = evaluate.run(list(artifacts), recipe.model, chosen, path, model, here, discard=True)
    comparisons = []
    if against and recipe.evaluate is not None:
        few = recipe.evaluate.model_copy(update={"samples": 12})
        comparisons = [run_dir.file(COMPARISON)]
        beside = CompareSettings(specs=against, run=run_dir.path)
        compare.run(list(artifacts), recipe.model, few, beside, comparisons[0], model, here, True)
    *others, last = artifacts
    with here.step("report"):
        if here.first:
            report.write(report.Subject(run_dir, last, others), page, comparisons)
    return Outcome(list(artifacts), measured, run_dir.path, page, time.monotonic() - began)
