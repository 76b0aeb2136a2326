"""The command `refine`: an artifact's codebooks tuned by gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvcalib.cli.commands import app
from kvcalib.cli.options import (
    BatchOption,
    DataOption,
    DeviceOption,
    DtypeOption,
    MemoryOption,
    OffloadOption,
    OverwriteOption,
    RemoteOption,
    RevisionOption,
)
from kvcalib.cli.tables import print_path
from kvcalib.cli.terminal import errors, make_settings, out_console, quiet_libraries


@app.command()
def refine(
    artifact: Annotated[str, typer.Argument(help="An artifact (folder or Hub id).", metavar="ARTIFACT")],
    out: Annotated[Path, typer.Option(help="Folder of the refined artifact.")],
    model: Annotated[
        str | None, typer.Option(help="Model folder or Hub id; default: the one the artifact names.")
    ] = None,
    data: DataOption = "builtin",
    steps: Annotated[int, typer.Option(min=0, help="Gradient steps at most; 0 copies the artifact.")] = 100,
    samples: Annotated[int, typer.Option(min=1, help="Sequences to train on.")] = 128,
    held_out: Annotated[int, typer.Option(min=1, help="Sequences after them, to measure on and never train on.")] = 16,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens per sequence.")] = 512,
    lr: Annotated[
        float, typer.Option(help="Learning rate: of the first step, as a share of what storing takes from a channel.")
    ] = 0.05,
    every: Annotated[int, typer.Option(min=1, help="Steps between two looks at the held-out text.")] = 10,
    patience: Annotated[int, typer.Option(min=1, help="Looks without a new best after which it ends.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the order of the sequences, and of random crops.")] = 0,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    max_memory: MemoryOption = None,
    offload: OffloadOption = None,
    batch_size: BatchOption = None,
    revision: RevisionOption = None,
    trust_remote_code: RemoteOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Codebooks tuned by gradient on the KL divergence to the unquantized model; widths and bytes stay."""
    with errors():
        quiet_libraries()
        from kvcalib.artifact.card import refinement
        from kvcalib.stages import refine as stage

        settings = make_settings(
            stage.RefineSettings, data=data, steps=steps, samples=samples, held_out=held_out, seq_len=seq_len, lr=lr,
            every=every, patience=patience, seed=seed, dtype=dtype, device=device, max_memory=max_memory,
            offload=offload, batch_size=batch_size, revision=revision, trust_remote_code=trust_remote_code,
        )  # fmt: skip
        found = stage.run(artifact, out, settings, model, overwrite).refined
        if found is not None and steps:
            out_console.print(refinement(found), highlight=False, markup=False, soft_wrap=True)
        print_path("artifact", out)
