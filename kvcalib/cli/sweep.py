"""The command `sweep`: a grid of settings, measured, and its Pareto front."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from kvcalib.cli.commands import app
from kvcalib.cli.tables import print_path
from kvcalib.cli.terminal import errors, out_console, quiet_libraries

if TYPE_CHECKING:
    from kvcalib.stages.sweep import Outcome
    from kvcalib.stages.sweep_cost import Cost, Plan
    from kvcalib.stages.sweep_grid import Grid


@app.command()
def sweep(
    grid: Annotated[Path, typer.Argument(help="Settings to combine (YAML).", metavar="GRID.yaml")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would take, after a short probe; run and write nothing.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the sweep; default: the grid's `out`, else artifacts/ + its name.")
    ] = None,
    jsonl: Annotated[
        Path | None, typer.Option(help="Results, one line per point; default: results.jsonl in the folder.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes on this machine, its GPUs in turn.")] = 1,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Measure failed points again.")] = False,
) -> None:
    """Measure every combination of a grid's settings, and draw loss against size. Resumes; processes share the work."""
    with errors():
        quiet_libraries()
        from kvcalib.stages import sweep as stage
        from kvcalib.stages import sweep_cost
        from kvcalib.stages.sweep_grid import read_grid
        from kvcalib.stages.sweep_store import SweepDir

        given = read_grid(grid)
        folder = out or given.out or Path("artifacts") / grid.stem
        if dry_run:
            there = SweepDir(folder, jsonl, create=False)
            plan = sweep_cost.plan(given, there, retry_failed)
            _print_plan(given, plan, sweep_cost.estimate(given, there, plan))
            return
        found = stage.run(given, folder, jsonl, workers, retry_failed)
        if found is not None:
            _print_outcome(given, found, jsonl or folder / "results.jsonl")


def _print_plan(grid: Grid, plan: Plan, cost: Cost) -> None:
    """Stages with their seconds, then the sums."""
    failed = f", {plan.failed} failed before" if plan.failed else ""
    _say(f"{plan.points} points, {plan.done} done{failed}, {len(plan.left)} to measure ({grid.way})")
    table = Table()
    for number, column in enumerate(("stage", "runs", "done", "left", "seconds\nof one", "seconds\nof all left")):
        table.add_column(column, justify="right" if number else "left")
    for name, need in plan.stages.items():
        one = cost.seconds.get(name)
        shown = ("", "") if one is None or not need.left else (f"{one:.2f}", f"{one * need.left:.1f}")
        table.add_row(name, str(need.total), str(need.done), str(need.left), *shown)
    out_console.print(table)
    if plan.left:
        _say(
            f"about {_duration(cost.total(plan))} of one process (several share it, and are faster where cores or GPUs "
            f"are idle), at least {_size(cost.memory)} of memory per process, {_size(cost.disk)} of disk "
            f"({_size(cost.free)} are free)"
        )
    _say(cost.how)


def _print_outcome(grid: Grid, found: Outcome, results: Path) -> None:
    """Every point by rising bits, those on the front marked."""
    table = Table(title=f"{grid.model}: {len(found.records)} points")
    columns = ("", "effective\nbits", "cache bytes", "delta\nNLL", "KLD", "top-1\nagreement", "front")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    measured = [(r, r.measures) for r in found.records if r.measures is not None]
    for record, m in sorted(measured, key=lambda pair: (pair[1].effective_bits, pair[0].name)):
        table.add_row(
            record.name, f"{m.effective_bits:.3f}", f"{m.cache_bytes:.0f}", f"{m.delta_nll:+.5f}", f"{m.kld:.5f}",
            f"{100 * m.top1_agreement:.2f} %", "*" if record.key in found.front else "",
        )  # fmt: skip
    out_console.print(table)
    loss = "KLD" if grid.metric == "kld" else "delta NLL"
    _say(
        f"front (*): no other point has at most its bits and at most its {loss}, and less of one; effective bits: all "
        "bytes of the cache x 8 / elements of the unquantized one"
    )
    for record in found.failed:
        _say(f"failed: {record.name}: {record.error}")
    print_path("results", results)
    print_path("plot", found.plot)


def _say(line: str) -> None:
    out_console.print(line, highlight=False, soft_wrap=True, markup=False)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
