"""All stages in a row: `kvcalib run` for one artifact, `kvcalib demo` for the embedded model at four widths."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from kvcalib.evaluation.perplexity import Evaluation
from kvcalib.model.loading import BUILTIN, load_model
from kvcalib.recipe import Recipe
from kvcalib.rundir import RunDir
from kvcalib.stages import build, evaluate, fisher, fit_nuq, friendliness
from kvcalib.stages.evaluate import EvalSettings
from kvcalib.stages.fisher import FisherSettings
from kvcalib.stages.fit_nuq import FitNuqSettings

DEMO_BITS = (8, 4, 3, 2)


@dataclass
class Outcome:
    """What a pipeline made: artifacts, their measures, the run's folder and the seconds that its stages took."""

    artifacts: list[Path]
    evaluations: list[Evaluation]
    run_dir: Path
    seconds: float


def run(recipe: Recipe, overwrite: bool = False) -> Outcome:
    """Every stage of `recipe`, up-to-date ones skipped; the model is loaded once."""
    return _run(recipe, {recipe.out: (recipe.fit.key_bits, recipe.fit.value_bits)}, overwrite)


def demo(out: Path) -> Outcome:
    """The whole road on the embedded model and text, offline: artifacts of 8, 4, 3 and 2 bits under `out`."""
    recipe = Recipe(
        model=BUILTIN,
        out=out / "nuq3",
        run_dir=out / "run",
        fisher=FisherSettings(samples=16, seq_len=512),
        fit=FitNuqSettings(key_bits=3, value_bits=3),
        evaluate=EvalSettings(samples=16, seq_len=512),
    )
    return _run(recipe, {out / f"nuq{bits}": (bits, bits) for bits in DEMO_BITS}, overwrite=True)


def _run(recipe: Recipe, artifacts: dict[Path, tuple[int, int]], overwrite: bool) -> Outcome:
    RunDir.check_free(recipe.run_path)
    settings = recipe.fisher
    began = time.monotonic()
    model = load_model(recipe.model, settings.dtype, settings.device, settings.revision, settings.trust_remote_code)
    run_dir = RunDir(recipe.run_path, create=True)
    fisher.run(run_dir, recipe.model, settings, overwrite, model)
    fit_nuq.run(run_dir, recipe.fit)
    friendliness.run(run_dir)
    for path, (key_bits, value_bits) in artifacts.items():
        build.run(run_dir, path, key_bits, value_bits, recipe.recent, overwrite)
    measured = []
    if recipe.evaluate is not None:
        chosen = recipe.evaluate
        if chosen.data == settings.data and not chosen.skip:
            # The same file or data set: what calibrated must not also judge.
            chosen = chosen.model_copy(update={"skip": -(-settings.samples * settings.seq_len // chosen.seq_len)})
        measured = evaluate.run(list(artifacts), recipe.model, chosen, run_dir.file("eval.json"), model)
    return Outcome(list(artifacts), measured, run_dir.path, time.monotonic() - began)
