"""The command `inspect`: what an artifact or a run is, and what in a model makes its cache hard to quantize."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from kvcalib.cli.commands import app
from kvcalib.cli.options import (
    DataOption,
    DeviceOption,
    DtypeOption,
    MemoryOption,
    OffloadOption,
    RemoteOption,
    RevisionOption,
)
from kvcalib.cli.tables import print_manifest, print_run
from kvcalib.cli.terminal import errors, make_settings, out_console, quiet_libraries
from kvcalib.errors import InputError

if TYPE_CHECKING:
    from kvcalib.model.diagnosis import LayerDiagnosis


@app.command()
def inspect(
    target: Annotated[
        str, typer.Argument(help="An artifact's, a run's or a model's folder, or a model's Hub id, or builtin.")
    ],
    data: DataOption = "builtin",
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    max_memory: MemoryOption = None,
    offload: OffloadOption = None,
    revision: RevisionOption = None,
    trust_remote_code: RemoteOption = False,
) -> None:
    """What an artifact or a run is; key bias, offsets, sinks and outliers of a model's layers, and what to do."""
    with errors():
        folder = Path(target)
        if (folder / "run.json").is_file():
            print_run(folder)
            if (folder / "calibration.safetensors").is_file():
                _diagnose_run(folder)
        elif (folder / "manifest.json").is_file():
            _inspect_artifact(folder)
        elif folder.is_dir() and not (folder / "config.json").is_file():
            raise InputError(
                f"{target}: no artifact, run or model there (no manifest.json, run.json or config.json); give the "
                "folder of one"
            )
        else:
            quiet_libraries()
            from kvcalib.stages import diagnose
            from kvcalib.stages.loading import ModelSettings

            settings = make_settings(
                ModelSettings, dtype=dtype, device=device, max_memory=max_memory, offload=offload, revision=revision,
                trust_remote_code=trust_remote_code,
            )  # fmt: skip
            model = settings.load(target)
            print_diagnosis(diagnose.of_model(model, target, data, revision))


def _inspect_artifact(folder: Path) -> None:
    from kvcalib.artifact import store
    from kvcalib.stages.report import find

    print_manifest(store.read_manifest(folder))
    run = find(folder).run
    if run is not None:
        _diagnose_run(run.path)


def _diagnose_run(folder: Path) -> None:
    from kvcalib.rundir import RunDir
    from kvcalib.stages import diagnose

    out_console.print(f"[bold]the model, as calibrated in {folder.name}[/]", highlight=False)
    print_diagnosis(diagnose.of_run(RunDir(folder)))


def print_diagnosis(layers: Sequence[LayerDiagnosis]) -> None:
    """A row for every layer, and what to do."""
    from kvcalib.model.diagnosis import BEYOND, OFFSET, advice, bias_median

    median = bias_median(layers)
    table = Table(title="what makes keys and values hard to quantize")
    biased = ["key\nbias", "over\nmedian"] if median is not None else []
    measured = ("offset\nchannels", "largest\noffset", "on first\ntoken", "key\noutliers", "value\noutliers")
    for column in ("layer", *biased, *measured):
        table.add_column(column, justify="right")
    for layer in layers:
        bias = []
        if median is not None:
            known = layer.key_bias is not None
            bias = [f"{layer.key_bias:.3g}" if known else "", f"{(layer.key_bias or 0) / median:.1f}" if median else ""]
        table.add_row(
            str(layer.index), *bias, f"{100 * layer.offset_share:.1f} %", f"{layer.worst_offset:.1f}",
            "" if layer.sink is None else f"{100 * layer.sink:.1f} %", _heads(layer.key_outliers),
            _heads(layer.value_outliers),
        )  # fmt: skip
    out_console.print(table)
    out_console.print(
        f"offset: |mean| over standard deviation of a key channel before RoPE, counted from {OFFSET:g} on; on first "
        f"token: of the attention of a sequence's later half; outliers: elements beyond {BEYOND:g} standard "
        "deviations, by KV head",
        highlight=False,
        soft_wrap=True,
    )
    for line in advice(layers):
        out_console.print(f"- {line}", highlight=False, soft_wrap=True, markup=False)


def _heads(shares: Sequence[float]) -> str:
    """Percent of each head, or, of many, the least and the most."""
    shown = [f"{100 * share:.2f}" for share in shares]
    if len(shown) > 4:
        return f"{100 * min(shares):.2f} to {100 * max(shares):.2f} %"
    return " ".join(shown) + " %"
