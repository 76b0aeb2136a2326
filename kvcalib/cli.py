"""The `kvcalib` command line: parse, call one stage, print. No arithmetic.

Results go to standard output, progress and notes to standard error. Exit codes: 0 done, 2 bad usage or input, 3 the
model or artifact does not fit, 4 the folder holds something else, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core
import typer.exceptions
from rich.console import Console
from rich.table import Table

from kvcalib import __version__
from kvcalib.errors import InputError, KvcalibError

if TYPE_CHECKING:
    from kvcalib.evaluation.perplexity import Evaluation
    from kvcalib.stages.check import Checked


class Commands(typer.core.TyperGroup):
    """Usage errors in the form of all other errors: one line with the option, the value found and what was expected."""

    def main(self, args: Any = None, prog_name: str | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """Run the command; see click's `Command.main`."""
        if not kwargs.pop("standalone_mode", True):
            return super().main(args, prog_name, **kwargs, standalone_mode=False)
        try:
            code = super().main(args, prog_name, **kwargs, standalone_mode=False)
        except typer.exceptions.TyperException as error:
            _print_error(_with_value(error, list(sys.argv[1:] if args is None else args)))
            sys.exit(getattr(error, "exit_code", 2))
        sys.exit(code if isinstance(code, int) else 0)


def _with_value(error: Any, given: list[str]) -> str:
    """The message of a usage error, with the value that the option was given."""
    message = error.format_message() if hasattr(error, "format_message") else str(error)
    options = getattr(getattr(error, "param", None), "opts", [])
    # The last one counts where an option is given twice.
    values = [value for option, value in itertools.pairwise(given) if option in options]
    return f"{options[0]} is {values[-1]}: {message}" if values else f"{message} (see kvcalib --help)"


app = typer.Typer(
    cls=Commands,
    help="Calibrate a language model's KV cache for 2 to 4 bits, and measure what it costs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
# Without a terminal rich would cut tables at 80 columns.
out_console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120)

RunOption = Annotated[Path, typer.Option("--run", help="Folder of the run; each stage reads and writes there.")]
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
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N, or map (spread over all devices).")]
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


BUDGET_HELP = "Budget in effective bits, every byte counted, such as 2.5: a width for every channel."
KeyBitsOption = Annotated[
    int | None, typer.Option(min=1, max=8, help="One code width for all keys, without a budget (experts).")
]
ValueBitsOption = Annotated[
    int | None, typer.Option(min=1, max=8, help="One code width for all values, without a budget (experts).")
]


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """Errors meant for the user become one message and their exit code."""
    try:
        yield
    except KvcalibError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except BrokenPipeError:
        # The reader of our output (head, less) has gone; that is its right.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0) from None


def _fail(message: str, code: int) -> None:
    _print_error(message)
    raise typer.Exit(code) from None


def _print_error(message: str) -> None:
    line = " ".join(message.split())
    Console(stderr=True).print(f"[bold red]error[/]: {_escape(line)}", highlight=False, soft_wrap=True)


def _escape(text: str) -> str:
    return text.replace("[", r"\[")


def _quiet_libraries() -> None:
    """transformers' own bars and hints would tear our progress bars; its errors reach the user through ours."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.showwarning = _show_warning


def _show_warning(message: Any, category: Any, *_: Any, **__: Any) -> None:
    if issubclass(category, UserWarning):
        Console(stderr=True).print(f"[yellow]warning[/]: {_escape(str(message))}", highlight=False, soft_wrap=True)


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    """kvcalib."""
    if version:
        print(f"kvcalib {__version__}")
        raise typer.Exit


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the run and its artifacts.")] = Path("artifacts/demo"),
) -> None:
    """The whole road on the embedded model, offline, in minutes on two cores."""
    with _errors():
        _quiet_libraries()
        from kvcalib.stages import pipeline

        done = pipeline.demo(out)
        _print_friendliness(done.run_dir)
        _print_evaluations(done.evaluations)
        out_console.print(f"stages took {done.seconds:.0f} s", highlight=False)
        for path in done.artifacts[-1:]:
            _print_path("artifact of the smallest budget", path)


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
    overwrite: OverwriteOption = False,
) -> None:
    """All stages: fisher, fit-nuq, friendliness, allocate, build, eval."""
    with _errors():
        uniform = _one_dial(bits, key_bits, value_bits)
        _quiet_libraries()
        from kvcalib.recipe import DEFAULT_BITS, Recipe, read_recipe
        from kvcalib.stages import pipeline

        if target.endswith((".yaml", ".yml")):
            recipe = read_recipe(Path(target))
        else:
            name = target.rstrip("/").rsplit("/", 1)[-1].lower()
            width = f"k{key_bits or 3}v{value_bits or 3}" if uniform else f"{bits or DEFAULT_BITS:g}"
            recipe = Recipe(model=target, out=Path("artifacts") / f"{name}-nuq{width}")
        where = {name: value for name, value in (("dtype", dtype), ("device", device)) if value != "auto"}
        calibrating = {"samples": samples, "seq_len": seq_len, "data": data}
        judging = {"seq_len": seq_len, "data": eval_data or data}
        recipe = recipe.changed(
            bits, key_bits, value_bits, out,
            where | {name: value for name, value in calibrating.items() if value is not None},
            where | {name: value for name, value in judging.items() if value is not None},
        )  # fmt: skip
        done = pipeline.run(recipe, overwrite)
        _print_friendliness(done.run_dir)
        _print_evaluations(done.evaluations)
        _print_path("artifact", recipe.out)


@app.command()
def fisher(
    model: ModelArgument,
    run: RunOption,
    data: DataOption = "builtin",
    samples: Annotated[int, typer.Option(min=1, help="Sequences.")] = 16,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens per sequence.")] = 2048,
    keep_tokens: Annotated[int, typer.Option(min=16, help="Tokens kept whole; bounds memory and disk.")] = 8192,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    batch_size: BatchOption = None,
    window: Annotated[int, typer.Option(min=1, help="Queries of the windowed attention maximum.")] = 5,
    sliding: Annotated[
        str, typer.Option(help="Quantize layers with a sliding window too: yes, no, auto (if there are no others).")
    ] = "auto",
    seed: SeedOption = 0,
    revision: RevisionOption = None,
    trust_remote_code: RemoteOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Fisher information of pre-RoPE keys and of values, and all other statistics, from text."""
    with _errors():
        _quiet_libraries()
        from kvcalib.rundir import RunDir
        from kvcalib.stages import fisher as stage

        settings = _settings(
            stage.FisherSettings, data=data, samples=samples, seq_len=seq_len, keep_tokens=keep_tokens, dtype=dtype,
            device=device, batch_size=batch_size, window=window, seed=seed, revision=revision,
            trust_remote_code=trust_remote_code, sliding=sliding,
        )  # fmt: skip
        from kvcalib.model.loading import load_model, load_tokenizer

        RunDir.check_free(run)
        load_tokenizer(model, revision, trust_remote_code)
        loaded = load_model(model, dtype, device, revision, trust_remote_code)
        record = stage.run(RunDir(run, create=True), model, settings, overwrite, loaded)
        info = record.info
        out_console.print(
            f"{info.sequences} sequences, {info.tokens} tokens, NLL {info.nll:.4f} nats per token, "
            f"{len(record.tensors['sample.hash'])} tokens kept, {len(info.layers)} layers",
            highlight=False,
        )
        _print_path("calibration", run / "calibration.safetensors")


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
    value_scale: Annotated[
        str, typer.Option(help="Zero and scale of values per token, or per token and head.")
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
) -> None:
    """Codebooks by weighted k-means, and the predicted loss of every width of every channel."""
    with _errors():
        uniform = _one_dial(bits, key_bits, value_bits)
        from kvcalib.rundir import RunDir
        from kvcalib.stages import fit_nuq as stage

        settings = _settings(
            stage.FitNuqSettings, **uniform, granularity=granularity,
            value_granularity=value_granularity, value_scale=value_scale, outliers=outliers,
            sinks=sinks, format=format, weights=weights, qnorm=qnorm, solver=solver,
            **({} if choices is None else {"choices": stage.Choices() if choices else None}),
        )  # fmt: skip
        codebooks = stage.run(RunDir(run), settings)
        table = Table(title="predicted loss, nats per token")
        widths = (1, 2, 3, 4, 6, 8)
        for column in ("layer", "", *(f"{w} bit" for w in widths)):
            table.add_column(column, justify="right")
        for layer in codebooks.layers:
            for role in stage.ROLES:
                losses = (stage.predicted_total(codebooks, layer, role, w) for w in widths)
                table.add_row(str(layer), role, *(f"{loss:.1e}" for loss in losses))
        out_console.print(table)
        _print_path("codebooks", run / "codebooks.safetensors")
        if bits is not None:
            from kvcalib.stages import allocate as allocation
            from kvcalib.stages.dial import at_budget

            found, _ = allocation.run(RunDir(run), at_budget(RunDir(run), bits))
            _print_allocated(found.effective_bits, found.mean_width, run)


@app.command()
def friendliness(run: RunArgument) -> None:
    """Relative quantization error of each layer's tokens."""
    with _errors():
        from kvcalib.rundir import RunDir
        from kvcalib.stages import friendliness as stage

        stage.run(RunDir(run))
        _print_friendliness(run)


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
    batch_size: BatchOption = None,
    revision: RevisionOption = None,
    trust_remote_code: RemoteOption = False,
) -> None:
    """Widths for every layer, keys and values, head and channel: the least predicted loss within a budget."""
    with _errors():
        _quiet_libraries()
        from kvcalib.rundir import RunDir
        from kvcalib.stages import allocate as stage

        settings = _settings(
            stage.AllocateSettings, budget=budget, widths=widths, method=method, per=per, group=group,
            exact_layers=_numbers("--exact-layers", exact_layers), as_published=as_published,
        )  # fmt: skip
        measuring = _settings(
            stage.MeasureSettings, model=model, data=data, samples=samples, seq_len=seq_len, dtype=dtype, device=device,
            batch_size=batch_size, revision=revision, trust_remote_code=trust_remote_code,
        )  # fmt: skip
        found, chosen = stage.run(RunDir(run), settings, measuring, check, plot)
        table = Table(title=f"mean code width and predicted loss, {settings.title}")
        for column in ("layer", "keys", "by head", "outliers", "loss", "values", "by head", "outliers", "loss"):
            table.add_column(column, justify="right")
        for layer in found.layers:
            cells: list[str] = []
            pair = chosen[layer.index, "key"], chosen[layer.index, "value"]
            options = found.key_options[layer.index], found.value_options[layer.index]
            for widths_of, option, loss in zip(pair, options, (layer.key_loss, layer.value_loss), strict=True):
                by_head = widths_of.float().mean(1)
                if layer.exact:
                    cells += ["exact", "16", "", "0"]
                else:
                    cells += [
                        f"{by_head.mean():.2f}",
                        " ".join(f"{b:.2f}" for b in by_head),
                        f"{100 * option.outliers:g} %" + " per head" * (option.scope == "head"),
                        f"{loss:.1e}",
                    ]
            table.add_row(str(layer.index), *cells)
        out_console.print(table)
        _print_checked(found.checked)
        best = "" if found.bound is None else f", at most {found.gap:.3%} above the best plan"
        out_console.print(
            f"{found.effective_bits:.3f} effective bits, mean code width {found.mean_width:.3f}; predicted loss "
            f"{found.loss:.5f} nats per token{best}",
            highlight=False,
            soft_wrap=True,
        )
        _print_path("widths", run / "allocation.safetensors")
        _print_path("plot", plot or run / "allocation.svg")


def _print_checked(rows: list[Checked]) -> None:
    if not rows:
        return
    table = Table(title="plans on held-out text, losses in nats per token")
    for number, column in enumerate(("plan", "width", "effective\nbits", "predicted\nloss", "KLD", "delta\nNLL", "")):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(
            row.plan, f"{row.mean_width:.3f}", f"{row.effective_bits:.3f}", f"{row.predicted:.5f}", f"{row.kld:.5f}",
            f"{row.delta_nll:+.5f}", "kept" if row.kept else "",
        )  # fmt: skip
    out_console.print(table)


def _numbers(option: str, given: str) -> tuple[int, ...]:
    """Whole numbers with commas between them."""
    try:
        return tuple(int(part) for part in given.split(",") if part.strip())
    except ValueError:
        raise InputError(f"{option} is {given!r}, expected layer indices with commas between them, as 0,5") from None


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
    with _errors():
        from kvcalib.rundir import RunDir
        from kvcalib.stages import allocate as allocation
        from kvcalib.stages import build as stage
        from kvcalib.stages.dial import at_budget, budget_of

        uniform = _one_dial(bits, key_bits, value_bits)
        run_dir = RunDir(run)
        widths, budget, options = None, None, None
        if bits is not None:
            found, widths = allocation.run(run_dir, at_budget(run_dir, bits))
            _print_allocated(found.effective_bits, found.mean_width, run)
            budget, options = budget_of(found), found.options
        elif not uniform and run_dir.record("allocate") is not None:
            found, widths = allocation.load(run_dir)
            budget, options = budget_of(found), found.options
        stage.run(run_dir, out, key_bits, value_bits, recent, overwrite, widths, budget, options)
        _print_path("artifact", out)


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
    with _errors():
        from kvcalib.rundir import RunDir
        from kvcalib.stages import tiers as stage

        settings = _settings(stage.TierSettings, budget=budget, signal=signal)
        rule = stage.run(RunDir(run), artifact, out, settings, overwrite)
        out_console.print(
            f"{rule.bits:.3f} effective bits on the calibration text, {len(rule.tiers)} tiers, chosen from the first "
            f"{rule.window} queries that see a token",
            highlight=False,
            soft_wrap=True,
        )
        _print_path("adaptive widths", out)


@app.command("eval")
def evaluate(
    artifact: Annotated[list[str], typer.Argument(help="Artifact folders or Hub ids.", metavar="ARTIFACT...")],
    model: Annotated[
        str | None, typer.Option(help="Model folder or Hub id; default: the one the artifact names.")
    ] = None,
    data: DataOption = "builtin",
    samples: Annotated[int, typer.Option(min=1, help="Sequences.")] = 16,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens per sequence.")] = 2048,
    skip: Annotated[int, typer.Option(min=0, help="Sequences of a file or data set left out at its start.")] = 0,
    sinks: Annotated[int | None, typer.Option(min=0, help="First tokens kept exact; default: the artifact's.")] = None,
    recent: Annotated[int | None, typer.Option(min=0, help="Last tokens kept exact; default: the artifact's.")] = None,
    prefill: Annotated[
        str, typer.Option(help="quantized, or exact: score the second half after an exact prefill of the first.")
    ] = "quantized",
    step: Annotated[
        int | None, typer.Option(min=1, help="Feed this many tokens a pass, as decoding does; with --adaptive 1.")
    ] = None,
    adaptive: Annotated[
        str | None, typer.Option(help="Measure these adaptive widths too: a folder that `kvcalib tiers` wrote.")
    ] = None,
    keep_exact: Annotated[
        str, typer.Option(help="no, or cpu: an exact copy in host memory, adaptive widths are chosen again.")
    ] = "no",
    every: Annotated[int, typer.Option(min=1, help="Tokens from one such choice to the next.")] = 16,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    batch_size: BatchOption = None,
    seed: SeedOption = 0,
    json: Annotated[Path | None, typer.Option(help="Also write the measures to this file.")] = None,
    revision: RevisionOption = None,
    trust_remote_code: RemoteOption = False,
) -> None:
    """Perplexity and KLD against the unquantized model, on real packed storage, prompt included."""
    with _errors():
        _quiet_libraries()
        from kvcalib.runtime.loader import load
        from kvcalib.stages import evaluate as stage

        settings = _settings(
            stage.EvalSettings, data=data, samples=samples, seq_len=seq_len, skip=skip, sinks=sinks, recent=recent,
            prefill=prefill, step=step, adaptive=adaptive, keep_exact=keep_exact, every=every, dtype=dtype,
            device=device, batch_size=batch_size, seed=seed, revision=revision, trust_remote_code=trust_remote_code,
        )  # fmt: skip
        loaded = [load(a) for a in artifact]
        _print_evaluations(stage.run(loaded, model or loaded[0].manifest.model.name, settings, json))


@app.command()
def inspect(target: Annotated[Path, typer.Argument(help="An artifact's or a run's folder.")]) -> None:
    """What an artifact or a run is: model, calibration, bits and losses by layer."""
    with _errors():
        from kvcalib.artifact import store
        from kvcalib.stages.build import exact_share

        if (target / "run.json").is_file():
            _inspect_run(target)
            return
        manifest = store.read_manifest(target)
        key, value = manifest.mean_bits
        grid = Table.grid(padding=(0, 2))
        fit, source, asked = manifest.fit, manifest.calibration, manifest.budget
        for name, shown in (
            ("model", f"{manifest.model.name} ({manifest.model.model_type})"),
            ("made by", f"kvcalib {manifest.producer.version}, format version {manifest.format_version}"),
            ("codes", f"keys {key:.2f} bit, values {value:.2f} bit, {fit.format}, weights {fit.weights}"),
            (
                "budget",
                "none" if asked is None else f"{asked.asked:g} effective bits, {asked.planned:.3f} in a long cache",
            ),
            ("codebooks", f"keys per {fit.key_granularity}, values per {fit.value_granularity}, {fit.solver} solver"),
            (
                "exact",
                f"{exact_share(manifest)} % outliers, {manifest.runtime.sinks} sinks, {manifest.runtime.recent} recent",
            ),
            (
                "calibration",
                f"{source.data}: {source.sequences} x {source.seq_len} tokens, {source.sampled_tokens} kept",
            ),
            ("layers", f"{len(manifest.layers)} of {manifest.model.num_hidden_layers} quantized"),
        ):
            grid.add_row(name, shown)
        out_console.print(grid, highlight=False)
        table = Table()
        for column in (
            "layer",
            "kv heads",
            "head dim",
            "key bits",
            "value bits",
            "key loss",
            "value loss",
            "key error",
            "value error",
        ):
            table.add_column(column, justify="right")
        for layer in manifest.layers:
            friendly = layer.friendliness
            table.add_row(
                str(layer.index), str(layer.key.kv_heads), str(layer.key.head_dim),
                f"{layer.key.mean_bits:.2f}", f"{layer.value.mean_bits:.2f}",
                f"{layer.key.predicted_loss:.2e}", f"{layer.value.predicted_loss:.2e}",
                "" if friendly is None else f"{friendly.key_error:.3f}",
                "" if friendly is None else f"{friendly.value_error:.3f}",
            )  # fmt: skip
        out_console.print(table)


def _inspect_run(target: Path) -> None:
    from kvcalib.rundir import RunDir

    run = RunDir(target)
    for stage in ("fisher", "fit-nuq", "friendliness", "allocate"):
        record = run.record(stage)
        out_console.print(f"[bold]{stage}[/]: {'has not run' if record is None else ''}", highlight=False)
        for name, value in ({} if record is None else record["settings"]).items():
            out_console.print(f"  {name} = {value}", highlight=False, markup=False)


@app.command()
def verify(artifact: Annotated[Path, typer.Argument(help="An artifact's folder.")]) -> None:
    """Check every byte of an artifact against its hashes, and that a loader can use it."""
    with _errors():
        from kvcalib.runtime.loader import load

        if not artifact.is_dir():
            raise InputError(f"{artifact}: no such folder; give the folder of an artifact")
        loaded = load(artifact)
        print(f"{artifact}: intact ({len(loaded.manifest.tensors)} tensors, {len(loaded.quantizers)} layers)")


@app.command()
def validate(
    recipe: Annotated[Path, typer.Argument(help="A recipe (YAML).", metavar="PIPELINE.yaml")],
) -> None:
    """Check a recipe without running it: every field, a local model's folder, a data file."""
    with _errors():
        _quiet_libraries()
        from kvcalib.model.loading import resolve
        from kvcalib.model.text import SUFFIXES
        from kvcalib.recipe import read_recipe

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


def _settings(kind: Callable[..., Any], **values: Any) -> Any:
    """A stage's settings, or an error that names the option."""
    from pydantic import ValidationError

    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:  # of several options together
            raise InputError(first["msg"].removeprefix("Value error, ")) from None
        option = "--" + str(first["loc"][0]).replace("_", "-")
        raise InputError(f"{option} is {first['input']!r}: {first['msg']}") from None


def _one_dial(bits: float | None, key_bits: int | None, value_bits: int | None) -> dict[str, int]:
    """The code widths that were given, if no budget was; both are refused, and so is a budget of nothing."""
    uniform = {n: v for n, v in (("key_bits", key_bits), ("value_bits", value_bits)) if v is not None}
    if bits is not None and uniform:
        option = "--" + next(iter(uniform)).replace("_", "-")
        raise InputError(
            f"--bits {bits:g} (a budget in effective bits) and {option} (one code width for all) exclude each other; "
            "give one of the two"
        )
    if bits is not None and not 0 < bits < float("inf"):
        raise InputError(f"--bits is {bits:g}: expected effective bits above 0, such as 2.5")
    return uniform


def _print_allocated(effective_bits: float, mean_width: float, run: Path) -> None:
    out_console.print(f"{effective_bits:.3f} effective bits, mean code width {mean_width:.3f}", highlight=False)
    _print_path("widths", run / "allocation.safetensors")


def _print_path(what: str, path: Path) -> None:
    out_console.print(f"{what}: {path}", highlight=False, soft_wrap=True, markup=False)


def _print_friendliness(run: Path) -> None:
    from kvcalib.files import read_json
    from kvcalib.rundir import FRIENDLINESS

    table = Table(title="friendliness: 1 - mean relative error of a layer's keys and values")
    layers = read_json(run / FRIENDLINESS)["layers"]
    table.add_column("layer", justify="right")
    for bits in layers[0]["bits"]:
        table.add_column(f"{bits} bit", justify="right")
    for layer in layers:
        table.add_row(str(layer["index"]), *(f"{v['friendliness']:.3f}" for v in layer["bits"].values()))
    out_console.print(table)


def _print_evaluations(results: list[Evaluation]) -> None:
    if not results:
        return
    first = results[0]
    table = Table(title="quality and size")
    asked = any(r.budget is not None for r in results)
    columns = (
        "",
        *(["bits\nasked for"] if asked else []),
        "effective\nbits",
        "cache bytes\nper token",
        "perplexity",
        "delta\nNLL",
        "KLD",
        "top-1\nagreement",
    )
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    per_token = first.fp16_cache_bytes / first.seq_len
    table.add_row(
        "fp16", *([""] if asked else []), "16.00", f"{per_token:.0f}", f"{_exp(first.fp16_nll):.3f}", "", "0", ""
    )
    for r in results:
        wanted = ["" if r.budget is None else f"{r.budget:.2f}"] if asked else []
        table.add_row(
            Path(r.adaptive or r.artifact).name, *wanted, f"{r.effective_bits:.2f}", f"{r.cache_bytes / r.seq_len:.0f}",
            f"{r.ppl:.3f}", f"{r.delta_nll:+.5f}", f"{r.kld:.5f}", f"{100 * r.top1_agreement:.2f} %",
        )  # fmt: skip
    out_console.print(table)
    for r in results:
        if r.budget is not None and r.long_cache_bits is not None and r.effective_bits > r.budget + 0.005:
            out_console.print(
                f"{Path(r.artifact).name}: sinks, a recent window and spare room add to the budget in a cache of only "
                f"{r.seq_len} tokens; a long one has {r.long_cache_bits:.2f} effective bits",
                highlight=False,
                soft_wrap=True,
            )
    out_console.print(
        f"protocol: {first.tokens} tokens in sequences of {first.seq_len}, {first.sinks} sinks, {first.recent} recent, "
        f"{first.prefill} prefill, model in {first.dtype} (its unquantized cache is the fp16 row, counted at 16 bit); "
        f"{first.protocol}",
        highlight=False,
        soft_wrap=True,
    )
    for r in results:
        if r.host_bytes:
            out_console.print(
                f"{Path(r.adaptive or r.artifact).name}: on top of this {r.host_bytes / r.seq_len:.0f} bytes per token "
                "in host memory",
                highlight=False,
            )


def _exp(nll: float) -> float:
    import math

    return math.exp(min(nll, 700.0))
