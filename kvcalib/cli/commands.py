"""The commands: parse, call one stage, print. No arithmetic.

Results go to standard output, progress and notes to standard error. Exit codes: 0 done, 2 bad usage or input, 3 the
model or artifact does not fit, 4 the folder holds something else, 130 interrupted, 143 ended by SIGTERM.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from kvcalib import __version__
from kvcalib.cli.options import (
    BUDGET_HELP,
    BatchOption,
    ChoicesOption,
    DataOption,
    DeviceOption,
    DtypeOption,
    KeyBitsOption,
    MemoryOption,
    ModelArgument,
    OffloadOption,
    OutliersOption,
    OverwriteOption,
    RemoteOption,
    RevisionOption,
    RunArgument,
    RunOption,
    SeedOption,
    SinksOption,
    ValueBitsOption,
)
from kvcalib.cli.planning import print_estimate
from kvcalib.cli.tables import (
    print_allocated,
    print_allocation,
    print_calibration,
    print_evaluations,
    print_friendliness,
    print_path,
)
from kvcalib.cli.terminal import (
    Commands,
    errors,
    make_settings,
    numbers,
    one_dial,
    out_console,
    quiet_libraries,
    speaks,
)
from kvcalib.errors import InputError

app = typer.Typer(
    cls=Commands,
    help="Calibrate a language model's KV cache for 2 to 4 bits, and measure what it costs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


LAUNCHED = ("demo", "run", "fisher", "merge", "fit-nuq", "allocate", "eval", "sweep")
"""Commands of which the processes of a launch do a share each; all others the first process does alone."""


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """kvcalib."""
    if context.invoked_subcommand not in LAUNCHED and not speaks():
        raise typer.Exit
    if version:
        print(f"kvcalib {__version__}")
        raise typer.Exit


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the run and its artifacts.")] = Path("artifacts/demo"),
) -> None:
    """The whole road on the embedded model, offline, in minutes on two cores."""
    with errors():
        quiet_libraries()
        from kvcalib import launch
        from kvcalib.stages import pipeline

        here = launch.here()
        done = pipeline.demo(out, here)
        if not here.first:
            return
        print_friendliness(done.run_dir)
        print_evaluations(done.evaluations)
        out_console.print(f"stages took {done.seconds:.0f} s", highlight=False)
        for path in done.artifacts[-1:]:
            print_path("artifact of the smallest budget", path)
        print_path("report", done.report)


@app.command()
def run(
    target: Annotated[
        str, typer.Argument(metavar="PIPELINE.yaml|MODEL", help="A recipe, or a model folder or Hub id.")
    ],
    data: Annotated[
        str | None, typer.Option(help="Calibration text; what follows it in a file is evaluated on.")
    ] = None,
    bits: Annotated[float | None, typer.Option(help=f"{BUDGET_HELP} Default: the recipe's, or 2.5.")] = None,
    key_bits: KeyBitsOption = None,
    value_bits: ValueBitsOption = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the artifact.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Calibration sequences.")] = None,
    seq_len: Annotated[int | None, typer.Option(min=2, help="Tokens per sequence.")] = None,
    eval_data: Annotated[str | None, typer.Option(help="Evaluation text; default: --data.")] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    max_memory: MemoryOption = None,
    offload: OffloadOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """All stages: fisher, fit-nuq, friendliness, allocate, build, eval."""
    with errors():
        uniform = one_dial(bits, key_bits, value_bits)
        quiet_libraries()
        from kvcalib import launch
        from kvcalib.recipe import DEFAULT_BITS, Recipe, read_recipe
        from kvcalib.stages import pipeline

        if target.endswith((".yaml", ".yml")):
            recipe = read_recipe(Path(target))
        else:
            name = target.rstrip("/").rsplit("/", 1)[-1].lower()
            width = f"k{key_bits or 3}v{value_bits or 3}" if uniform else f"{bits or DEFAULT_BITS:g}"
            recipe = Recipe(model=target, out=Path("artifacts") / f"{name}-nuq{width}")
        places = {"dtype": dtype, "device": device, "max_memory": max_memory, "offload": offload}
        where = {name: value for name, value in places.items() if value not in ("auto", None)}
        calibrating = {"samples": samples, "seq_len": seq_len, "data": data}
        judging = {"seq_len": seq_len, "data": eval_data or data}
        recipe = recipe.changed(
            bits, key_bits, value_bits, out,
            where | {name: value for name, value in calibrating.items() if value is not None},
            where | {name: value for name, value in judging.items() if value is not None},
        )  # fmt: skip
        here = launch.here()
        done = pipeline.run(recipe, overwrite, here)
        if not here.first:
            return
        print_friendliness(done.run_dir)
        print_evaluations(done.evaluations)
        print_path("artifact", recipe.out)
        print_path("report", done.report)


@app.command()
def fisher(
    model: ModelArgument,
    run: RunOption = None,
    data: DataOption = "builtin",
    samples: Annotated[int, typer.Option(min=1, help="Sequences.")] = 16,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens per sequence.")] = 2048,
    keep_tokens: Annotated[int, typer.Option(min=16, help="Tokens kept whole; bounds memory and disk.")] = 8192,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    max_memory: MemoryOption = None,
    offload: OffloadOption = None,
    batch_size: BatchOption = None,
    window: Annotated[int, typer.Option(min=1, help="Queries of the windowed attention maximum.")] = 5,
    sliding: Annotated[
        str, typer.Option(help="Quantize layers with a sliding window too: yes, no, auto (if there are no others).")
    ] = "auto",
    seed: SeedOption = 0,
    revision: RevisionOption = None,
    trust_remote_code: RemoteOption = False,
    overwrite: OverwriteOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what this and all later stages will take; reads the config only.")
    ] = False,
) -> None:
    """Fisher information of pre-RoPE keys and of values, and all other statistics, from text."""
    with errors():
        quiet_libraries()
        from kvcalib.rundir import RunDir
        from kvcalib.stages import fisher as stage

        settings = make_settings(
            stage.FisherSettings, data=data, samples=samples, seq_len=seq_len, keep_tokens=keep_tokens, dtype=dtype,
            device=device, max_memory=max_memory, offload=offload, batch_size=batch_size, window=window, seed=seed,
            revision=revision, trust_remote_code=trust_remote_code, sliding=sliding,
        )  # fmt: skip
        if dry_run:
            from kvcalib.stages import dry_run as planning

            estimate = planning.run(model, settings, run or Path())
            print_estimate(estimate)
            estimate.check()
            return
        if run is None:
            raise InputError("--run is missing: give a folder for the run, or --dry-run to see what it will take")
        from kvcalib import launch
        from kvcalib.model.loading import load_tokenizer

        here = launch.here()
        with here.step("fisher"):
            RunDir.check_free(run)
            load_tokenizer(model, revision, trust_remote_code)
            loaded = settings.load(model, here.own_device(device))
        run_dir = here.in_turn("fisher", lambda: RunDir(run, create=True))
        record = stage.run(run_dir, model, settings, overwrite, loaded, here)
        if here.first and record is not None:
            print_calibration(record, run / "calibration.safetensors")


@app.command()
def merge(
    runs: Annotated[
        list[Path], typer.Argument(help="Runs, or their calibration files: two or more.", metavar="RUN...")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the run that has the text of all.")],
    overwrite: OverwriteOption = False,
) -> None:
    """One calibration out of several runs, which may come from machines that never met."""
    with errors():
        from kvcalib.stages import merge as stage

        print_calibration(stage.run(runs, out, overwrite), out / "calibration.safetensors")


@app.command("fit-nuq")
def fit_nuq(
    run: RunArgument,
    bits: Annotated[
        float | None, typer.Option(help=f"{BUDGET_HELP} Codebooks of all widths are fitted anyway.")
    ] = None,
    key_bits: KeyBitsOption = None,
    value_bits: ValueBitsOption = None,
    granularity: Annotated[str, typer.Option(help="One key codebook per layer, head or channel.")] = "channel",
    value_granularity: Annotated[str, typer.Option(help="One value codebook per layer, head or channel.")] = "channel",
    value_basis: Annotated[
        str, typer.Option(help="pca: values along each head's principal axes; none: as they are, with zero and scale.")
    ] = "pca",
    value_scale: Annotated[
        str, typer.Option(help="Outlier ranks of values, and zero and scale, per token or (head) per token and head.")
    ] = "token",
    outliers: OutliersOption = 0.01,
    choices: ChoicesOption = None,
    sinks: SinksOption = 0,
    format: Annotated[str, typer.Option(help="nuq (fitted), nf (NormalFloat) or int (uniform).")] = "nuq",
    weights: Annotated[
        str, typer.Option(help="fisher_scale (KVQuant's Eq. 7), fisher (its code), or none.")
    ] = "fisher_scale",
    qnorm: Annotated[bool, typer.Option(help="Give codebooks back the mean and spread that rounding takes.")] = True,
    solver: Annotated[str, typer.Option(help="exact, or lloyd (scikit-learn, as the papers).")] = "exact",
    feedback: Annotated[
        bool, typer.Option(help="Let each channel's rounding make up for the errors of others (docs/feedback.md).")
    ] = True,
) -> None:
    """Codebooks by weighted k-means, and the predicted loss of every width of every channel."""
    with errors():
        uniform = one_dial(bits, key_bits, value_bits)
        from kvcalib import launch
        from kvcalib.rundir import RunDir
        from kvcalib.stages import fit_nuq as stage

        settings = make_settings(
            stage.FitNuqSettings, **uniform, granularity=granularity,
            value_granularity=value_granularity, value_basis=value_basis, value_scale=value_scale, outliers=outliers,
            sinks=sinks, format=format, weights=weights, qnorm=qnorm, solver=solver, feedback=feedback,
            **({} if choices is None else {"choices": stage.Choices() if choices else None}),
        )  # fmt: skip
        here = launch.here()
        # Processes on other disks get what they need of the run.
        run_dir = here.in_turn("fit-nuq", lambda: RunDir(run, create=not here.first))
        codebooks = stage.run(run_dir, settings, here)
        if not here.first:
            return
        table = Table(title="predicted loss, nats per token")
        widths = (1, 2, 3, 4, 6, 8)
        for column in ("layer", "", *(f"{w} bit" for w in widths)):
            table.add_column(column, justify="right")
        for layer in codebooks.layers:
            for role in stage.ROLES:
                losses = (stage.predicted_total(codebooks, layer, role, w) for w in widths)
                table.add_row(str(layer), role, *(f"{loss:.1e}" for loss in losses))
        out_console.print(table)
        print_path("codebooks", run / "codebooks.safetensors")
        if bits is not None:
            from kvcalib.stages import allocate as allocation
            from kvcalib.stages.dial import at_budget

            found, _ = allocation.run(run_dir, at_budget(run_dir, bits))
            print_allocated(found.effective_bits, found.mean_width, run)


@app.command()
def friendliness(run: RunArgument) -> None:
    """How each layer's tokens survive storage, and what eviction should make of it: table and plot."""
    with errors():
        from kvcalib.rundir import RunDir
        from kvcalib.stages import friendliness as stage

        stage.run(RunDir(run))
        print_friendliness(run)
        print_path("plot", run / "friendliness.svg")


@app.command()
def allocate(
    run: RunArgument,
    budget: Annotated[
        float | None, typer.Option(help="Effective bits: codes, outliers, scales, positions, every byte.")
    ] = None,
    widths: Annotated[float | None, typer.Option(help="Mean code width instead; overheads come on top.")] = None,
    method: Annotated[
        str, typer.Option(help="fisher (predicted loss), kl (measured with the model) or qaq (QAQ's bounds).")
    ] = "fisher",
    per: Annotated[
        str | None, typer.Option(help="What takes one width: channel, head or layer; default: channel, for qaq head.")
    ] = None,
    group: Annotated[int, typer.Option(help="Channels that share a width, for fused kernels: 16, or 0 for none.")] = 16,
    exact_layers: Annotated[
        str, typer.Option(metavar="N,N,...", help="Layers that stay exact, at 16 bits, as 0,5.")
    ] = "",
    as_published: Annotated[
        bool, typer.Option("--as-published", help="qaq by the arithmetic of the paper's code, for comparison.")
    ] = False,
    check: Annotated[int, typer.Option(min=0, help="Measure this many plans on held-out text and keep the best.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="File of the plot; default: allocation.svg in the run.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Model to measure with (kl, --check); default: the one the run names.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Text to measure on; default: what follows the calibration's own.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Sequences to measure on.")] = 8,
    seq_len: Annotated[int | None, typer.Option(min=2, help="Their tokens; default: as calibrated.")] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    max_memory: MemoryOption = None,
    offload: OffloadOption = None,
    batch_size: BatchOption = None,
    revision: RevisionOption = None,
    trust_remote_code: RemoteOption = False,
) -> None:
    """Widths for every layer, keys and values, head and channel: the least predicted loss within a budget."""
    with errors():
        quiet_libraries()
        from kvcalib import launch
        from kvcalib.rundir import RunDir
        from kvcalib.stages import allocate as stage

        settings = make_settings(
            stage.AllocateSettings, budget=budget, widths=widths, method=method, per=per, group=group,
            exact_layers=numbers("--exact-layers", exact_layers), as_published=as_published,
        )  # fmt: skip
        measuring = make_settings(
            stage.MeasureSettings, model=model, data=data, samples=samples, seq_len=seq_len, dtype=dtype, device=device,
            max_memory=max_memory, offload=offload, batch_size=batch_size, revision=revision,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
        here = launch.here()
        run_dir = here.in_turn("allocate", lambda: RunDir(run, create=not here.first))
        found, chosen = stage.run(run_dir, settings, measuring, check, plot, here=here)
        if not here.first:
            return
        print_allocation(found, chosen)
        print_path("widths", run / "allocation.safetensors")
        print_path("plot", plot or run / "allocation.svg")


@app.command()
def build(
    run: RunArgument,
    out: Annotated[Path, typer.Option(help="Folder of the artifact.")],
    bits: Annotated[
        float | None, typer.Option(help=f"{BUDGET_HELP} Default: the run's widths as allocated, else as fitted.")
    ] = None,
    key_bits: KeyBitsOption = None,
    value_bits: ValueBitsOption = None,
    recent: Annotated[int, typer.Option(min=0, help="Last tokens that a loader keeps exact by default.")] = 0,
    overwrite: OverwriteOption = False,
) -> None:
    """Codebooks and bits to an artifact."""
    with errors():
        from kvcalib.rundir import RunDir
        from kvcalib.stages import allocate as allocation
        from kvcalib.stages import build as stage
        from kvcalib.stages.dial import at_budget, budget_of

        uniform = one_dial(bits, key_bits, value_bits)
        run_dir = RunDir(run)
        widths, budget, options, planned_on = None, None, None, None
        if bits is not None:
            found, widths = allocation.run(run_dir, at_budget(run_dir, bits))
            print_allocated(found.effective_bits, found.mean_width, run)
            budget, options, planned_on = budget_of(found), found.options, found.codebooks
        elif not uniform and run_dir.record("allocate") is not None:
            found, widths = allocation.load(run_dir)
            budget, options, planned_on = budget_of(found), found.options, found.codebooks
        stage.run(run_dir, out, key_bits, value_bits, recent, overwrite, widths, budget, options, planned_on)
        print_path("artifact", out)


@app.command()
def tiers(
    run: RunArgument,
    artifact: Annotated[
        list[str], typer.Argument(help="Artifacts of this run, of different sizes.", metavar="ARTIFACT...")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the adaptive widths.")],
    budget: Annotated[float, typer.Option(help="Mean effective bits of packed tokens, every byte counted.")],
    signal: Annotated[
        str, typer.Option(help="late (mean over heads and the window's later half) or peak (QAQ's maximum).")
    ] = "late",
    overwrite: OverwriteOption = False,
) -> None:
    """Adaptive widths: which of several artifacts keeps a token, by the attention that it drew."""
    with errors():
        from kvcalib.rundir import RunDir
        from kvcalib.stages import tiers as stage

        settings = make_settings(stage.TierSettings, budget=budget, signal=signal)
        rule = stage.run(RunDir(run), artifact, out, settings, overwrite)
        out_console.print(
            f"{rule.bits:.3f} effective bits on the calibration text, {len(rule.tiers)} tiers, chosen from the first "
            f"{rule.window} queries that see a token",
            highlight=False,
            soft_wrap=True,
        )
        print_path("adaptive widths", out)


@app.command()
def verify(artifact: Annotated[Path, typer.Argument(help="An artifact's folder.")]) -> None:
    """Check every byte of an artifact against its hashes, and that a loader can use it."""
    with errors():
        from kvcalib.runtime.loader import load

        if not artifact.is_dir():
            raise InputError(f"{artifact}: no such folder; give the folder of an artifact")
        loaded = load(artifact)
        print(f"{artifact}: intact ({len(loaded.manifest.tensors)} tensors, {len(loaded.quantizers)} layers)")


@app.command()
def validate(
    recipe: Annotated[Path, typer.Argument(help="A recipe, or a sweep's grid (YAML).", metavar="PIPELINE.yaml")],
) -> None:
    """Check a recipe or a grid without running it: every field, a local model's folder, a data file."""
    with errors():
        quiet_libraries()
        from kvcalib.model.loading import resolve
        from kvcalib.model.text import SUFFIXES
        from kvcalib.recipe import read_recipe
        from kvcalib.stages.sweep_grid import is_grid, read_grid

        if is_grid(recipe):
            grid = read_grid(recipe)
            resolve(grid.model)
            print(f"{recipe}: valid; model {grid.model}, {len(grid.points)} points ({grid.way})")
            return
        checked = read_recipe(recipe)
        resolve(checked.model)
        for part, settings in (("fisher", checked.fisher), ("evaluate", checked.evaluate)):
            if settings is not None and Path(settings.data).suffix in SUFFIXES and not Path(settings.data).is_file():
                raise InputError(f"{recipe}: {part}.data is {settings.data!r}: no such file")
        spending = checked.allocate
        if spending is None:
            bits = f"keys {checked.fit.key_bits} bit, values {checked.fit.value_bits} bit"
        elif spending.budget is None:
            bits = f"mean code width {spending.widths:g}"
        else:
            bits = f"{spending.budget:g} effective bits"
        print(f"{recipe}: valid; model {checked.model}, {bits}")
