"""The tables that commands print."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from kvcalib.cli.terminal import out_console

if TYPE_CHECKING:
    from kvcalib.artifact.manifest import Manifest
    from kvcalib.calibration.statistics import Calibration
    from kvcalib.evaluation.passkey import Passkey
    from kvcalib.evaluation.perplexity import Evaluation
    from kvcalib.evaluation.summaries import Summaries
    from kvcalib.stages.allocate import Allocation, Widths
    from kvcalib.stages.check import Checked

WIDEST_BY_HEAD = 4
"""Heads of a layer up to which a table shows each."""


def print_allocation(found: Allocation, chosen: Widths) -> None:
    """Widths, outliers and predicted loss by layer; the plans that were measured; what the plan comes to."""
    table = Table(title=f"mean code width and predicted loss, {found.settings.title}")
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
    print_checked(found.checked)
    best = "" if found.bound is None else f", at most {found.gap:.3%} above the best plan"
    out_console.print(
        f"{found.effective_bits:.3f} effective bits, mean code width {found.mean_width:.3f}; predicted loss "
        f"{found.loss:.5f} nats per token{best}",
        highlight=False,
        soft_wrap=True,
    )


def print_checked(rows: list[Checked]) -> None:
    """Plans that were built and measured."""
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


def print_manifest(manifest: Manifest) -> None:
    """An artifact: model, codes, calibration, and losses by layer."""
    from kvcalib.artifact.card import exact_share, refinement, value_axes

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
        *([] if manifest.refined is None else [("refined", refinement(manifest.refined))]),
        ("codebooks", f"keys per {fit.key_granularity}, values per {fit.value_granularity}, {fit.solver} solver"),
        ("values", value_axes(manifest)),
        ("rounding", "with error feedback" if manifest.feedback else "to the nearest centroid"),
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
        "alpha",
        "share",
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
            "" if friendly is None or friendly.alpha is None else f"{friendly.alpha:.3f}",
            "" if friendly is None or friendly.share is None else f"{friendly.share:.2f}",
        )  # fmt: skip
    out_console.print(table)


def print_run(target: Path) -> None:
    """The stages of a run and their settings."""
    from kvcalib.rundir import RunDir

    run = RunDir(target)
    for stage in ("fisher", "fit-nuq", "friendliness", "allocate"):
        record = run.record(stage)
        out_console.print(f"[bold]{stage}[/]: {'has not run' if record is None else ''}", highlight=False)
        for name, value in ({} if record is None else record["settings"]).items():
            out_console.print(f"  {name} = {value}", highlight=False, markup=False)


def print_allocated(effective_bits: float, mean_width: float, run: Path) -> None:
    """What a budget came to."""
    out_console.print(f"{effective_bits:.3f} effective bits, mean code width {mean_width:.3f}", highlight=False)
    print_path("widths", run / "allocation.safetensors")


def print_calibration(record: Calibration, path: Path) -> None:
    """What a calibration is of, and where it lies."""
    info = record.info
    out_console.print(
        f"{info.sequences} sequences, {info.tokens} tokens, NLL {info.nll:.4f} nats per token, "
        f"{len(record.tensors['sample.hash'])} tokens kept, {len(info.layers)} layers",
        highlight=False,
    )
    print_path("calibration", path)


def print_path(what: str, path: Path) -> None:
    """Where something was written."""
    out_console.print(f"{what}: {path}", highlight=False, soft_wrap=True, markup=False)


def print_friendliness(run: Path) -> None:
    """Friendliness by layer and width, and what the chosen widths mean for eviction, as the stage wrote it."""
    from kvcalib.files import read_json
    from kvcalib.rundir import FRIENDLINESS

    found = read_json(run / FRIENDLINESS)
    table = Table(title="friendliness: 1 - mean relative error of a layer's keys and values")
    layers = found["layers"]
    table.add_column("layer", justify="right")
    for bits in layers[0]["bits"]:
        table.add_column(f"{bits} bit", justify="right")
    for layer in layers:
        table.add_row(str(layer["index"]), *(f"{v['friendliness']:.3f}" for v in layer["bits"].values()))
    out_console.print(table)
    _print_selection(found)


def _print_selection(found: dict[str, Any]) -> None:
    """One row per layer at the chosen widths."""
    key_bits, value_bits = found["chosen"]
    by_head = len(found["layers"][0]["chosen"]["key"]["by_head"]) <= WIDEST_BY_HEAD
    known = found["layers"][0]["chosen"]["selection"] is not None
    table = Table(title=f"keys {key_bits} bit, values {value_bits} bit, and choosing tokens")
    heads = ["by head"] if by_head else []
    for column in ("layer", "keys", *heads, "values", *heads):
        table.add_column(column, justify="right")
    for column in ("overlap", "error\nheavy", "error\nothers", "alpha", "share") if known else ():
        table.add_column(column, justify="right")
    for layer in found["layers"]:
        figures, cells = layer["chosen"], []
        for role in ("key", "value"):
            cells.append(f"{1 - figures[role]['error']:.3f}")
            if by_head:
                cells.append(" ".join(f"{1 - e:.3f}" for e in figures[role]["by_head"]))
        chosen = figures["selection"]
        if chosen is not None:
            cells += [f"{chosen[name]:.3f}" for name in ("overlap", "heavy_error", "other_error", "alpha")]
            cells.append(f"{chosen['share']:.2f}")
        table.add_row(str(layer["index"]), *cells)
    out_console.print(table)
    out_console.print(
        "overlap: heavy hitters (top 20 % by mean attention) that quantized keys find too; alpha, share: weight of "
        "attention and part of the token budget for eviction"
        if known
        else "no overlap, alpha and share: the calibration is of an older version, or keeps too few tokens of each "
        "sequence; run `kvcalib fisher` again with --overwrite, or with more --keep-tokens",
        highlight=False,
        soft_wrap=True,
    )


def print_evaluations(results: list[Evaluation]) -> None:
    """Measures of artifacts, the unquantized model first, and their protocol."""
    if not results:
        return
    first = results[0]
    if first.prompt is None:
        _print_perplexities(results)
    else:
        _print_continuations(results)
    _say(
        f"protocol: {first.tokens} tokens in sequences of {first.seq_len}, {first.sinks} sinks, {first.recent} recent, "
        f"{first.prefill} prefill, model in {first.dtype} (its unquantized cache is the fp16 row, counted at 16 bit); "
        f"{first.protocol}"
    )
    for r in results:
        if r.host_bytes:
            name = Path(r.adaptive or r.artifact).name
            _say(f"{name}: on top of this {r.host_bytes / r.seq_len:.0f} bytes per token in host memory")


def _print_perplexities(results: list[Evaluation]) -> None:
    """Every token scored, nothing evicted."""
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
            _say(
                f"{Path(r.artifact).name}: sinks, a recent window and spare room add to the budget in a cache of only "
                f"{r.seq_len} tokens; a long one has {r.long_cache_bits:.2f} effective bits"
            )


def _print_continuations(results: list[Evaluation]) -> None:
    """Continuations scored after their prompt has been evicted; policies below the artifact that they run on."""
    first = results[0]
    evicted = any(r.policy is not None for r in results)
    table = Table(title="continuations: quality, size and time")
    columns = (
        "",
        "effective\nbits",
        "bytes\n/ token",
        "tokens\nkept",
        "delta\nNLL",
        "std.\nerror",
        "KLD",
        "top-1\n%",
        "ms\n/ token",
        *(["heavy\n%", "attn.\n%"] if evicted else []),
    )
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    table.add_row(
        "fp16", "16.00", f"{first.fp16_cache_bytes / first.seq_len:.0f}", str(first.seq_len), "0", "", "0", "100.0",
        f"{1000 * (first.fp16_seconds_per_token or 0):.2f}", *(["100", "100"] if evicted else []),
    )  # fmt: skip
    for r in results:
        shares = ["" if share is None else f"{100 * share:.0f}" for share in (r.overlap, r.captured)]
        table.add_row(
            _row_name(r.adaptive or r.artifact, r.eviction), f"{r.effective_bits:.2f}",
            f"{r.cache_bytes / r.seq_len:.0f}",
            f"{r.kept:.0f}", f"{r.delta_nll:+.4f}", "" if r.delta_nll_error is None else f"{r.delta_nll_error:.4f}",
            f"{r.kld:.4f}", f"{100 * r.top1_agreement:.1f}", f"{1000 * (r.seconds_per_token or 0):.2f}",
            *(shares if evicted else []),
        )  # fmt: skip
    out_console.print(table)
    _say(f"perplexity of the unquantized model on the continuations: {_exp(first.fp16_nll):.3f}")
    if evicted:
        _say(
            "effective bits: of the tokens held; bytes: of all tokens that came; heavy: how many of the prompt's "
            "tokens with the most accumulated exact attention stayed; attn.: how much of the continuation's attention "
            "to the prompt falls on what stayed; both right after the prompt"
        )


def print_summaries(results: list[Summaries]) -> None:
    """ROUGE of every trial, the unquantized model first, and the protocol."""
    table = Table(title="summaries")
    columns = ("", "effective\nbits", "cache bytes", "tokens\nkept", "ROUGE-1", "ROUGE-2", "ROUGE-L", "same as\nfp16")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for r in results:
        table.add_row(
            _row_name(r.artifact, r.eviction), f"{r.effective_bits:.2f}", f"{r.cache_bytes:.0f}", f"{r.kept:.0f}",
            *(f"{100 * score:.2f}" for score in (r.rouge1, r.rouge2, r.rougeL)), _percent(r.same),
        )  # fmt: skip
    out_console.print(table)
    _say(f"protocol: {results[0].protocol}")


def print_passkeys(results: list[Passkey]) -> None:
    """Retrieval of every trial, the unquantized model first; scores by length; the protocol."""
    lengths = sorted({cell.length for cell in results[0].cells})
    table = Table(title="passkey")
    columns = ("", "tokens\nkept", "cache bytes", "retrieved", "tokens of\nthe key right", "score, nats\nper token")
    for number, column in enumerate((*columns, *(f"score at\n{length}" for length in lengths))):
        table.add_column(column, justify="right" if number else "left")
    for r in results:
        by_length = [[cell.score for cell in r.cells if cell.length == length] for length in lengths]
        table.add_row(
            _row_name(r.artifact, r.eviction), f"{r.kept:.0f}", f"{r.cache_bytes:.0f}", _percent(r.retrieved),
            _percent(r.digits), f"{r.score:.3f}", *(f"{sum(scores) / len(scores):.3f}" for scores in by_length),
        )  # fmt: skip
    out_console.print(table)
    _say(f"protocol: {results[0].protocol}")


def _row_name(path: str | None, eviction: dict[str, Any] | None) -> str:
    """The artifact's name, or, below it, its policy and budget."""
    if path is None:
        return "fp16"
    if eviction is None:
        return Path(path).name
    keep, policy = eviction["keep"], eviction["policy"]
    if policy == "full":
        return "  full"
    return f"  {policy} " + (f"{100 * keep:g} %" if keep <= 1 else f"{keep:g}")


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f} %"


def _say(line: str) -> None:
    out_console.print(line, highlight=False, soft_wrap=True)


def _exp(nll: float) -> float:
    return math.exp(min(nll, 700.0))
