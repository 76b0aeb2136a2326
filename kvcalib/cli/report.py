"""The command `report`: a run or an artifact to one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvcalib.cli.commands import app
from kvcalib.cli.tables import print_path
from kvcalib.cli.terminal import errors, quiet_libraries


@app.command()
def report(
    target: Annotated[str, typer.Argument(help="A run's or an artifact's folder.", metavar="RUN|ARTIFACT")],
    comparison: Annotated[
        list[Path] | None,
        typer.Option(help="What `kvcalib eval --compare ... --json FILE` wrote. May be given again."),
    ] = None,
    sweep: Annotated[Path | None, typer.Option(help="The JSONL file of a `kvcalib sweep`.")] = None,
    model: Annotated[
        str | None, typer.Option(help="The model, for the size of its weights; default: the one that is named.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="File of the report; default: beside the target, its name.html.")
    ] = None,
) -> None:
    """One HTML file to show around: size and cost, plots, tables, protocol. It needs no network."""
    with errors():
        quiet_libraries()
        from kvcalib.stages import report as stage

        print_path("report", stage.run(target, out, comparison or (), sweep, model))
