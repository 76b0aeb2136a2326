"""`allocate --check N`: the N best distinct plans of one budget, measured with the model, and the best of them kept.

A predicted loss adds up errors that are taken to be small, independent and alike in every layer. Where that is a little
wrong, the best plan lies near the predicted one. So beside the method's own plan compete, all within the same budget:

- the same method with the losses of keys, or of values, counted double (another multiplier for the two halves), and
  with those of the first layers, or of the last, counted up to double;
- the same method with coarser units (heads, layers), which fit less to the sample;
- the other methods whose inputs are there.

The N with the least loss, as the chosen method predicts it, are built and evaluated on held-out text through the packed
runtime. The least KLD wins. The processes of a launch share the sequences, and batches that are done are kept in the
run's `parts` until the plan is written.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from kvcalib.allocation.fisher import Per
from kvcalib.errors import InputError
from kvcalib.evaluation.perplexity import evaluate
from kvcalib.launch import Launch
from kvcalib.rundir import RunDir
from kvcalib.runtime.loader import load
from kvcalib.stages import build
from kvcalib.stages.allocators import Allocator, Name, Proposal, Tables, by_loss, predicted, weighted
from kvcalib.stages.fit_nuq import ROLES, Codebooks
from kvcalib.stages.kept import Kept
from kvcalib.stages.measure import Subject
from kvcalib.stages.progress import progress

PARTS = "check"
TILT = 2.0
COARSER: dict[Per, tuple[Per, ...]] = {"channel": ("head", "layer"), "head": ("layer",), "layer": ()}


class Checked(BaseModel):
    """One plan, as predicted and as measured; losses in nats per token."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    plan: str
    mean_width: float
    effective_bits: float
    predicted: float = Field(description="By the chosen method.")
    kld: float
    delta_nll: float
    kept: bool


@dataclass(frozen=True, eq=False)
class Candidate:
    """A plan within the budget: what it is called, the plan, and the widths of all layers, exact ones included."""

    name: str
    plan: Proposal
    widths: dict[Name, torch.Tensor]
    bits: float
    predicted: float


def proposers(tables: Tables, per: Per, group: int) -> dict[str, Allocator]:
    """The solver on `tables`, tilted and with coarser units, by name."""
    last = max(1, max(layer for layer, _ in tables))

    def tilt(share: Callable[[Name], float]) -> Allocator:
        return by_loss(weighted(tables, lambda name: TILT ** share(name)), per, group)

    found = {
        "keys double": tilt(lambda name: float(name[1] == "key")),
        "values double": tilt(lambda name: float(name[1] == "value")),
        "first layers double": tilt(lambda name: 1 - name[0] / last),
        "last layers double": tilt(lambda name: name[0] / last),
    }
    return found | {f"per {unit}": by_loss(tables, unit, group) for unit in COARSER[per]}


def candidates(
    own: Candidate,
    others: dict[str, Allocator],
    fit: Callable[[Allocator], tuple[Proposal, dict[Name, torch.Tensor], float]],
    tables: Tables,
    count: int,
) -> list[Candidate]:
    """The `count` distinct plans of least loss as `tables` predict it, `own` among them; fewer if there are no more."""
    found = [own]
    for name, propose in others.items():
        try:
            plan, widths, bits = fit(propose)
        except InputError:
            continue  # this one has no plan of the budget
        if not any(all(torch.equal(widths[n], c.widths[n]) for n in widths) for c in found):
            found.append(Candidate(name, plan, widths, bits, sum(predicted(tables, plan.widths).values())))
    return [own, *sorted(found[1:], key=lambda c: c.predicted)[: count - 1]]


def measure(
    run_dir: RunDir,
    found: list[Candidate],
    codebooks: Codebooks,
    subject: Subject,
    sequences: np.ndarray,
    of: dict[str, Any],
    here: Launch,
) -> tuple[Candidate, list[Checked]]:
    """Build and evaluate every candidate, all under the codebooks' options; the one of least KLD, and the table.

    Args:
        of: what the candidates and the text follow from; batches that were measured for the same are not again.
        here: the processes that share the sequences; all of them call this.
    """
    options = {(layer, role): codebooks.option(layer, role) for layer in codebooks.layers for role in ROLES}
    with here.step("check"):
        model = subject.model
    kept = here.in_turn("check", lambda: _place(run_dir, of))
    shared = here.shares(run_dir.path)
    with tempfile.TemporaryDirectory(dir=run_dir.path, prefix=".check-") as own:
        folder = Path(here.same(own)) if shared else Path(own)
        with here.step("check"):
            for number, candidate in enumerate(found):
                if here.first or not shared:
                    build.run(run_dir, folder / str(number), widths=candidate.widths, options=options)
        with here.step("check"):
            artifacts = [load(folder / str(number)) for number in range(len(found))]
        with progress("check", len(sequences), "sequences") as show:
            results = evaluate(
                model, artifacts, sequences, batch_size=subject.batch_size, on_batch=show,
                keeper=Kept(here, kept, of, "check"),
            )  # fmt: skip
    best = min(range(len(found)), key=lambda i: results[i].kld)
    rows = [
        Checked(
            plan=candidate.name,
            mean_width=float(np.mean(np.concatenate([w.flatten().numpy() for w in candidate.plan.widths.values()]))),
            effective_bits=candidate.bits,
            predicted=candidate.predicted,
            kld=result.kld,
            delta_nll=result.delta_nll,
            kept=i == best,
        )
        for i, (candidate, result) in enumerate(zip(found, results, strict=True))
    ]
    return found[best], rows


def _place(run_dir: RunDir, of: dict[str, Any]) -> Path:
    """Where batches are kept; plans that a killed process had built are removed."""
    for left in run_dir.path.glob(".check-*"):
        shutil.rmtree(left, ignore_errors=True)
    return run_dir.parts(PARTS, of, discard=True) / "measured.jsonl"
