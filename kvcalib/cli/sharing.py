"""The commands `export`, `card`, `push` and `pull`: an artifact for other programs and other people."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from kvcalib.cli.commands import app
from kvcalib.cli.options import OverwriteOption
from kvcalib.cli.tables import print_path
from kvcalib.cli.terminal import errors, make_settings, out_console, quiet_libraries

if TYPE_CHECKING:
    from kvcalib.artifact.exports import Facts, LayerFacts

ComparisonOption = Annotated[
    Path | None, typer.Option(help="A file of `kvcalib eval --compare ... --json`: its table goes into the card.")
]
LicenseOption = Annotated[
    str | None, typer.Option(metavar="ID", help="License of the artifact for the card, such as apache-2.0.")
]
LocalArtifact = Annotated[Path, typer.Argument(help="An artifact's folder.", metavar="ARTIFACT")]


@app.command()
def export(
    source: Annotated[
        str, typer.Argument(help="An artifact (folder or Hub id), or a run's folder.", metavar="ARTIFACT|RUN")
    ],
    to: Annotated[
        str, typer.Option(metavar="TARGET", help="modelopt, vllm-scales, sglang-scales (from a RUN), or hf.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder, or name of the main file; default: exports/ inside ARTIFACT or RUN.")
    ] = None,
    effective_bits: Annotated[
        float, typer.Option(help="modelopt: bits per element at most, 4.5 (all NVFP4) to 16 (none quantized).")
    ] = 6.0,
    module: Annotated[
        str, typer.Option(help="modelopt, vllm-scales: name of a layer's attention module, {} for its index.")
    ] = "model.layers.{}.self_attn",
    tp_size: Annotated[int, typer.Option(help="sglang-scales: ranks of tensor parallelism of the server.")] = 1,
    backend: Annotated[str, typer.Option(help="hf: hqq or quanto.")] = "hqq",
    overwrite: OverwriteOption = False,
) -> None:
    """Files that other programs read: KV-cache formats or FP8 scales by layer, or a transformers cache_config."""
    with errors():
        quiet_libraries()
        from kvcalib.stages import export as stage

        settings = make_settings(
            stage.ExportSettings, effective_bits=effective_bits, module=module, tp_size=tp_size, backend=backend
        )
        done = stage.run(source, to, out, settings, overwrite)
        _print_layers(to, done.facts)
        if to == "modelopt":
            out_console.print(f"{stage.bits_of(done.facts):.3f} effective bits", highlight=False)
        for note in done.notes:
            out_console.print(f"- {note}", highlight=False, markup=False, soft_wrap=True)
        for path in done.paths:
            print_path("export", path)


def _print_layers(to: str, facts: Facts) -> None:
    """What was found for each layer, in the columns of the target `to`."""

    def scale(found: float | None) -> str:
        return "" if found is None else f"{found:.5f}"

    columns: dict[str, Callable[[LayerFacts], str]] = {
        "format": lambda layer: layer.format or "unquantized",
        "key scale": lambda layer: scale(layer.key_scale),
        "value scale": lambda layer: scale(layer.value_scale),
        "scale": lambda layer: scale(layer.shared_scale),
        "FP8 loss": lambda layer: f"{layer.losses['FP8']:.1e}",
        "NVFP4 loss": lambda layer: f"{layer.losses['NVFP4']:.1e}",
    }
    shown = {
        "modelopt": ("format", "FP8 loss", "NVFP4 loss"),
        "vllm-scales": ("key scale", "value scale", "FP8 loss"),
        "sglang-scales": ("scale", "FP8 loss"),
    }.get(to, ())
    if not shown:
        return
    table = Table(title=to)
    for column in ("layer", *shown):
        table.add_column(column, justify="right")
    for layer in facts.layers:
        table.add_row(str(layer.index), *(columns[column](layer) for column in shown))
    out_console.print(table)
    unit = "estimated, up to one factor for all" if facts.estimated else "nats per token"
    out_console.print(f"predicted losses: {unit}", highlight=False)


@app.command()
def card(artifact: LocalArtifact, comparison: ComparisonOption = None, license: LicenseOption = None) -> None:
    """Write an artifact's README.md anew, with measured figures. The manifest has its hash, and changes with it."""
    with errors():
        quiet_libraries()
        from kvcalib.stages import sharing as stage

        print_path("card", stage.refresh_card(artifact, comparison, license))


@app.command()
def push(
    artifact: LocalArtifact,
    repository: Annotated[str, typer.Argument(help="Where to on the Hub; it is made if needed.", metavar="OWNER/NAME")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="Branch; made if needed. Default: main.")
    ] = None,
    message: Annotated[str | None, typer.Option(help="Message of the commit.")] = None,
    comparison: ComparisonOption = None,
    license: LicenseOption = None,
) -> None:
    """Publish an artifact on the Hugging Face Hub, checked first; only its own files travel."""
    with errors():
        quiet_libraries()
        from kvcalib.stages import sharing as stage

        reference, commit = stage.push(artifact, repository, private, revision, message, comparison, license)
        out_console.print(f"{reference.repo} at commit {commit}", highlight=False, soft_wrap=True)
        out_console.print(f'kvcalib.load("{reference.repo}@{commit}")', highlight=False, markup=False, soft_wrap=True)


@app.command()
def pull(
    name: Annotated[str, typer.Argument(help="Hub id; with @ a branch, tag or commit.", metavar="OWNER/NAME[@REV]")],
    out: Annotated[Path | None, typer.Option(help="Folder; default: artifacts/NAME.")] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Fetch an artifact from the Hugging Face Hub into a folder, every hash checked."""
    with errors():
        quiet_libraries()
        from kvcalib.stages import sharing as stage

        folder, reference, commit = stage.pull(name, out, overwrite)
        out_console.print(f"{reference.repo} at commit {commit}", highlight=False, soft_wrap=True)
        print_path("artifact", folder)
