"""The table of `--dry-run`: what every stage takes, and what there is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from kvcalib.cli.terminal import out_console

if TYPE_CHECKING:
    from kvcalib.stages.dry_run import Estimate


def print_estimate(estimate: Estimate) -> None:
    """Every stage's time, memory and disk; then the whole, and what this machine has."""
    from kvcalib.report.words import many, size

    plan, machine = estimate.plan, estimate.machine
    table = Table(title="what it will take, nothing has been run")
    for column in ("stage", "time", "host memory", "GPU memory", "disk", "and while it runs"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for cost in estimate.costs:
        table.add_row(
            cost.stage,
            duration(cost.seconds),
            size(cost.host),
            size(cost.device) if cost.device else "-",
            size(cost.disk),
            size(cost.scratch) if cost.scratch else "-",
        )
    out_console.print(table)
    shape = f"{many(plan.model.parameters)} parameters, {len(plan.layers)} of {plan.model.depth} layers calibrated"
    lines = [
        f"{shape}, {plan.fisher.samples} x {plan.fisher.seq_len} tokens, {plan.rows} sequences a batch, "
        f"{plan.dtype} bytes a weight",
        f"in all {duration(estimate.seconds)}, at most {size(estimate.host)} of host memory"
        + (f", {size(estimate.device)} of GPU memory" if plan.on_gpu else "")
        + f" and {size(estimate.disk)} of disk",
        f"here: {size(machine.host_free)} of {size(machine.host)} host memory free"
        + (f", {size(machine.device)} free on {machine.device_name}" if plan.on_gpu else ", no GPU is used")
        + f", {size(machine.disk)} of disk free in {estimate.folder}",
    ]
    if plan.processes > 1:
        lines.insert(
            1, f"{plan.processes} processes, {plan.local} on this machine; memory of a stage is of one of them"
        )
    for line in lines:
        out_console.print(line, highlight=False)
    if estimate.host > machine.host_free:
        out_console.print("[yellow]note[/]: more host memory than is free now; something else may have to end first")


def duration(seconds: float) -> str:
    """Seconds in words: `8 s`, `12 min`, `3.4 h`, `2.1 days`."""
    for unit, length, digits in (("days", 86400.0, 1), ("h", 3600.0, 1), ("min", 60.0, 0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.{digits}f} {unit}"
    return f"{max(1, round(seconds))} s"
