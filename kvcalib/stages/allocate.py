"""Stage `allocate`: codebooks and a budget to a width for every channel (`allocation.py`).

How widths are found is `allocators.py`; this stage counts every byte of a budget in effective bits, and records the
plan and its plot. By loss, a budget is spent on options (outliers and scope) and widths together (`options.py`); a mean
code width leaves the options as `fit-nuq` was given them. Plans are worked out with one thread, so that they do not
depend on their number; what is measured takes all.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvcalib.allocation import spare
from kvcalib.calibration.statistics import Calibration
from kvcalib.errors import InputError
from kvcalib.files import write_bytes, write_tensors
from kvcalib.launch import Launch
from kvcalib.quant.packing import MAX_BITS
from kvcalib.rundir import ALLOCATION, ALLOCATION_PLOT, CALIBRATION, CODEBOOKS, RunDir
from kvcalib.stages.allocation import (
    AllocateSettings,
    Allocation,
    LayerPlan,
    Widths,
    drawing,
    load,
)
from kvcalib.stages.allocators import (
    EXACT,
    Allocator,
    Name,
    Proposal,
    Tables,
    by_loss,
    by_qaq,
    is_exact,
    loss_tables,
    measured_tables,
    predicted,
)
from kvcalib.stages.check import PARTS, Candidate, Checked, candidates, measure, proposers
from kvcalib.stages.fit_nuq import ROLES, Codebooks
from kvcalib.stages.measure import MeasureSettings, Subject, isolated, text_id
from kvcalib.stages.options import POSITION_BITS, row_bits, within
from kvcalib.stages.progress import note
from kvcalib.stages.threads import one_thread, threads

STAGE_VERSION = 4
CURVE = tuple(step / 4 for step in range(2, 25))
"""Mean code widths at which the curve of loss against budget is taken: 0.5 to 6 bits."""

RETRIES = 8
"""Into how many parts the bits that whole words took are cut, to find the plan that leaves the least unused."""

NEEDED = ("stages/fisher.json", CALIBRATION, "stages/fit-nuq.json", CODEBOOKS, "stages/allocate.json", ALLOCATION)


def run(
    run_dir: RunDir,
    settings: AllocateSettings,
    measuring: MeasureSettings | None = None,
    check: int = 0,
    plot: Path | None = None,
    model: Any = None,
    here: Launch | None = None,
) -> tuple[Allocation, Widths]:
    """Choose widths and write them into the run, and their plot beside them.

    Args:
        measuring: model and text of method kl and of `check`.
        check: how many plans are measured on held-out text, the best of which is kept; 0 for none.
        plot: where the plot goes; `allocation.svg` in the run if None.
        model: the loaded model, where the caller has it already.
        here: the processes that share what is measured; all of them call this, and work out the same plan from it,
            which the first one writes. This one alone if None.

    Raises:
        InputError: the budget is below the smallest plan or above the largest one; says which they are. The text or the
            model to measure with is missing. ArtifactMismatch: the model is another one than was calibrated.
    """
    here = here or Launch()
    here.supply(run_dir.path, NEEDED)
    with here.holding("allocate", run_dir.lock), one_thread() as usual:
        with here.step("allocate"):
            work = _Work(run_dir, settings, check, here)
            if settings.method == "kl" or check:
                work.read(Subject(work.calibration.info, measuring or MeasureSettings(), model, here))
            done = here.first and run_dir.up_to_date("allocate", work.recorded)
        if here.same(done):
            note("allocate: up to date")
            with here.step("allocate"):
                found, widths = load(run_dir)
        else:
            found, widths = work.plan(usual)
        with here.step("allocate"):
            if here.first:
                if not done:
                    work.write(found, widths)
                write_bytes(plot or run_dir.file(ALLOCATION_PLOT), drawing(found).encode())
        if check:
            here.in_turn("allocate", lambda: run_dir.drop_parts(PARTS))
    return found, widths


class _Work:
    """What one call of the stage has read, and its plan.

    Attributes:
        recorded: everything that the plan depends on.
    """

    def __init__(self, run_dir: RunDir, settings: AllocateSettings, check: int, here: Launch) -> None:
        self.run_dir, self.settings, self.check, self.here = run_dir, settings, check, here
        self.codebooks = Codebooks.load(run_dir)
        self.layers = _quantized(self.codebooks, settings)
        self.calibration, _ = Calibration.load(run_dir.file(CALIBRATION))
        self.recorded = {**settings.model_dump(mode="json"), "check": check}
        self.recorded |= {"codebooks": run_dir.output_hash("fit-nuq", CODEBOOKS)}
        self.recorded |= {"exact_layers": sorted(set(settings.exact_layers)), "stage_version": STAGE_VERSION}
        self.subject: Subject | None = None
        self.texts: dict[str, np.ndarray] = {}

    def read(self, subject: Subject) -> None:
        """The texts that are measured on."""
        self.subject = subject
        if self.settings.method == "kl":
            self.texts["kl"] = subject.sequences()
        if self.check:
            self.texts["check"] = subject.sequences(after=len(self.texts.get("kl", ())))
        self.recorded |= {f"{name}_text": [text_id(ids) for ids in found] for name, found in self.texts.items()}

    def plan(self, usual: int) -> tuple[Allocation, Widths]:
        """The plan, measured where the settings ask for it, with `usual` threads; else with one."""
        settings, calibration, layers = self.settings, self.calibration, self.layers
        others: dict[str, Allocator] = {}
        with self.here.step("allocate"):
            codebooks, by_solver = self.codebooks, settings.budget is not None and settings.method != "qaq"
            if by_solver:
                codebooks = within(
                    codebooks, calibration, layers, settings.budget or 0.0, settings.per, settings.group
                ).codebooks
            tables = loss_tables(codebooks, calibration, layers)
        if "kl" in self.texts and self.subject is not None:
            others[f"fisher per {settings.per}"] = by_loss(tables, settings.per, settings.group)
            with threads(usual):
                kl = isolated(self.run_dir, codebooks, layers, self.subject, self.texts["kl"], here=self.here)
            tables = measured_tables(tables, kl)
        with self.here.step("allocate"):
            propose = _method(settings, codebooks, calibration, tables)
            if by_solver:
                plan, widths, bits = _spent(codebooks, calibration, tables, settings)
            else:
                plan, widths, bits = fit(propose, codebooks, settings)
        bound, rows = plan.bound, list[Checked]()
        if "check" in self.texts and self.subject is not None:
            with self.here.step("allocate"):
                own = Candidate(settings.title, plan, widths, bits, plan.loss)
                others |= proposers(tables, settings.per, settings.group)
                if settings.method == "qaq":
                    others[f"fisher per {settings.per}"] = by_loss(tables, settings.per, settings.group)
                elif all(shape.scaling is not None for shape in calibration.info.layers):
                    others["qaq per head"] = by_qaq(codebooks, calibration, tables, "head")
                found = candidates(own, others, lambda p: fit(p, codebooks, settings), tables, self.check)
            with threads(usual):
                of = self.recorded | self.subject.settings.model_dump(mode="json")
                given = (codebooks, self.subject, self.texts["check"], of, self.here)
                best, rows = measure(self.run_dir, found, *given)
            plan, widths, bits = best.plan, best.widths, best.bits
        losses = predicted(tables, plan.widths)
        elements = sum(w.numel() for w in plan.widths.values())
        allocation = Allocation(
            settings=settings,
            codebooks=self.run_dir.output_hash("fit-nuq", CODEBOOKS),
            mean_width=sum(int(w.sum()) for w in plan.widths.values()) / elements,
            effective_bits=bits,
            loss=sum(losses.values()),
            bound=bound,
            curve=_curve(propose, elements),
            layers=[_layer_plan(layer, widths, losses) for layer in codebooks.layers],
            key_options={layer: codebooks.option(layer, "key") for layer in codebooks.layers},
            value_options={layer: codebooks.option(layer, "value") for layer in codebooks.layers},
            checked=rows,
        )
        return allocation, widths

    def write(self, allocation: Allocation, widths: Widths) -> None:
        """Write the plan into the run."""
        tensors = {f"layers.{layer}.{role}.widths": w for (layer, role), w in widths.items()}
        write_tensors(self.run_dir.output("allocate", ALLOCATION), tensors, allocation.model_dump(mode="json"))
        self.run_dir.finish("allocate", self.recorded, [ALLOCATION])


def _method(settings: AllocateSettings, codebooks: Codebooks, calibration: Calibration, tables: Tables) -> Allocator:
    if settings.per != "channel" and settings.method == "qaq":
        return by_qaq(codebooks, calibration, tables, settings.per, settings.as_published)
    return by_loss(tables, settings.per, settings.group)


def _spent(
    codebooks: Codebooks, calibration: Calibration, tables: Tables, settings: AllocateSettings
) -> tuple[Proposal, Widths, float]:
    """As `fit`, by the solver that counts whole words, under the codebooks' options."""
    layers = _quantized(codebooks, settings)
    best = within(codebooks, calibration, layers, settings.budget or 0.0, settings.per, settings.group, tables)
    widths: Widths = dict(sorted({**best.widths, **_exact(codebooks, settings)}.items()))
    return Proposal(best.widths, best.loss, best.bound), widths, best.effective_bits


def fit(propose: Allocator, codebooks: Codebooks, settings: AllocateSettings) -> tuple[Proposal, Widths, float]:
    """The method's plan within the budget, the widths of all layers, exact ones included, and their effective bits.

    Raises:
        InputError: no plan of the method has so few bits, or so many.
    """
    exact = _exact(codebooks, settings)
    quantized = [(layer, role) for layer in _quantized(codebooks, settings) for role in ROLES]
    elements = sum(codebooks.get(*name, "weight").numel() for name in quantized)
    everything = elements + sum(w.numel() for w in exact.values())
    fixed = sum(row_bits(codebooks.quantizer(*name, 0, feedback=False)) for name in quantized) + POSITION_BITS
    fixed += EXACT * (everything - elements)
    if settings.budget is None:
        room = round((settings.widths or 0.0) * elements)
    else:
        smallest, largest = fixed / everything, (fixed + MAX_BITS * elements) / everything
        if not smallest <= settings.budget <= largest:
            kept = f" and layers {sorted({layer for layer, _ in exact})} exact" if exact else ""
            raise InputError(
                f"allocate: the budget is {settings.budget:g} effective bits; with {codebooks.settings.outliers:g} "
                f"outliers{kept} the smallest plan has {smallest:.3f} and the largest {largest:.3f}; choose one "
                f"between, or fit with fewer outliers"
            )
        room = int(settings.budget * everything - fixed)

    def attempt(room: int) -> tuple[Proposal, Widths, float]:
        plan = propose(room)
        if settings.budget is not None and plan.fill is not None:
            fuller = plan.fill(int(settings.budget * everything - fixed) // spare.WORD)
            # Heads whose words stand alone can take a word more than the row as a whole.
            if effective_bits(codebooks, {**fuller.widths, **exact}) <= settings.budget + 1e-9:
                plan = replace(fuller, bound=plan.bound)
        widths: Widths = dict(sorted({**plan.widths, **exact}.items()))
        return plan, widths, effective_bits(codebooks, widths)

    first, bound = room, None
    while True:
        try:
            found = attempt(room)
        except InputError as error:
            given = f"--widths {settings.widths:g}" if settings.budget is None else f"--budget {settings.budget:g}"
            raise InputError(
                f"allocate: {given} leaves {room} code bits per token, {room / elements:.3f} a channel: {error}; "
                "give another budget or method"
            ) from None
        bound = found[0].bound if room == first else bound
        excess = 0 if settings.budget is None else found[2] - settings.budget
        if excess <= 1e-9 or room == 0:
            break
        # Rows are whole words: what rounding added comes off the budget of the codes.
        room = max(0, room - max(1, int(excess * everything)))
    # A plan of more bits may fill its words better.
    for step in range(1, RETRIES):
        between = room + (first - room) * step // RETRIES
        other = attempt(between) if between > room else found
        if other[2] <= (settings.budget or 0) + 1e-9 and other[0].loss < found[0].loss:
            found = other
    plan, widths, bits = found
    return replace(plan, bound=bound), widths, bits


def effective_bits(codebooks: Codebooks, widths: Widths) -> float:
    """Bits of a token's rows in all layers, and of its position, per key or value element; exact ones have 16."""
    total = POSITION_BITS
    for (layer, role), chosen in widths.items():
        exact = is_exact(chosen)
        total += EXACT * chosen.numel() if exact else row_bits(codebooks.quantizer(layer, role, chosen, False))
    return total / sum(w.numel() for w in widths.values())


def _quantized(codebooks: Codebooks, settings: AllocateSettings) -> list[int]:
    """The layers that are not kept exact."""
    unknown = sorted(set(settings.exact_layers) - set(codebooks.layers))
    if unknown:
        raise InputError(f"--exact-layers names {unknown}, the run has layers {codebooks.layers}; name some of these")
    left = [layer for layer in codebooks.layers if layer not in settings.exact_layers]
    if not left:
        raise InputError("--exact-layers names every layer of the run; leave at least one to be quantized")
    return left


def _exact(codebooks: Codebooks, settings: AllocateSettings) -> Widths:
    return {
        (layer, role): torch.full(codebooks.get(layer, role, "weight").shape, EXACT, dtype=torch.uint8)
        for layer in sorted(set(settings.exact_layers))
        for role in ROLES
    }


def _curve(propose: Allocator, elements: int) -> list[tuple[float, float]]:
    """Predicted loss at `CURVE`; widths of which the method has no plan are left out."""
    found = []
    for mean in CURVE:
        try:
            found.append((mean, propose(int(mean * elements)).loss))
        except InputError:
            continue
    return found


def _layer_plan(layer: int, widths: Widths, losses: dict[Name, float]) -> LayerPlan:
    return LayerPlan(
        index=layer,
        key_bits=float(widths[layer, "key"].float().mean()),
        value_bits=float(widths[layer, "value"].float().mean()),
        key_loss=losses.get((layer, "key"), 0.0),
        value_loss=losses.get((layer, "value"), 0.0),
    )
