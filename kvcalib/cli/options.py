"""The options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

BUDGET_HELP = "Budget in effective bits, every byte counted, such as 2.5: a width for every channel."
RunOption = Annotated[Path | None, typer.Option("--run", help="Folder of the run; each stage reads and writes there.")]
RunArgument = Annotated[Path, typer.Argument(help="Folder of a run (`kvcalib fisher --run`).", metavar="RUN")]
ModelArgument = Annotated[
    str, typer.Argument(help="Local folder, Hub id, or builtin (the demo model).", metavar="MODEL")
]
DataOption = Annotated[
    str,
    typer.Option(
        "--data", help="builtin, a .txt/.jsonl/.parquet file, wikitext2, c4, or a Hub data set owner/name:split:column."
    ),
]
DtypeOption = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16. auto: float32 on a CPU.")]
DeviceOption = Annotated[
    str, typer.Option(help="auto, cpu, cuda, cuda:N, or map: spread over GPUs, host memory and disk (large models).")
]
MemoryOption = Annotated[
    str | None,
    typer.Option(
        "--max-memory",
        metavar="DEVICE=SIZE,...",
        help="With --device map: what weights may take on this machine, as cpu=2GiB,0=20GiB; the rest stays on disk. "
        "Default: what is free.",
    ),
]
OffloadOption = Annotated[
    str | None,
    typer.Option(
        "--offload",
        metavar="FOLDER",
        help="With --device map: where weights go that cannot stay in their checkpoint, until the end. Default: the "
        "system's temporary folder.",
    ),
]
BatchOption = Annotated[int | None, typer.Option(min=1, help="Sequences per step; default: about 2048 tokens.")]
SeedOption = Annotated[int, typer.Option(help="Seed of the token sample and of random crops.")]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.")]
RemoteOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that the model brings. Off by default.")
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace what other settings wrote there.")]
OutliersOption = Annotated[
    float, typer.Option(min=0, max=0.05, help="Exact share of each token's elements (a fixed number, by rank).")
]
ChoicesOption = Annotated[
    bool | None,
    typer.Option(
        "--choices/--no-choices",
        help="Fit 0, 0.5, 1 and 2 % outliers, per token and per head, for a budget to choose among; with neither flag "
        "the share of --outliers, and none.",
    ),
]
SinksOption = Annotated[int, typer.Option(min=0, help="First tokens kept exact and left out of the fit.")]
KeyBitsOption = Annotated[
    int | None, typer.Option(min=1, max=8, help="One code width for all keys, without a budget (experts).")
]
ValueBitsOption = Annotated[
    int | None, typer.Option(min=1, max=8, help="One code width for all values, without a budget (experts).")
]
