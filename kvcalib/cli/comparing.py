"""The tables of `eval --compare`, and of its tasks alone: contenders below one another, intervals in brackets."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from kvcalib.cli.terminal import out_console

if TYPE_CHECKING:
    from kvcalib.evaluation.comparison import Comparison, Greedy, Interval, RecallPoint, Row, TaskComparison

MOST_DECIMALS = 5
NAME_WIDTH = 18
WIDE = 112
"""Columns of a terminal from which on all of the main table has room; intervals then stand beside their values."""


def print_comparison(found: Comparison) -> None:
    """Quality and size, then recall, greedy generations and costs where they were measured, and the protocol."""
    wide = out_console.width >= WIDE
    table = _table(
        "quality and size", "eff.\nbits", "PPL", "delta NLL", "KLD", *(["KLD\n99 %", "top-1 %"] if wide else [])
    )
    for row in found.rows:
        if row.failed is not None:
            table.add_row(folded(row.name), "not measured")
            continue
        exact = row is found.rows[0]
        cells = [
            "" if exact else with_interval(row.delta_nll, signed=True), "0" if exact else with_interval(row.kld),
            "0" if exact else rounded(row.kld_p99), "" if exact else with_interval(row.top1_agreement, 100),
        ]  # fmt: skip
        if not wide:
            cells = [cell.replace(" [", "\n[") for cell in cells[:2]]
        table.add_row(folded(row.name), f"{row.effective_bits:.2f}", f"{row.ppl:.3f}", *cells)
    out_console.print(table)
    if not wide:
        _say(f"KLD's 99 % quantile and top-1 agreement: in a terminal of {WIDE} columns, or with --json")
    measured = [row for row in found.rows if row.failed is None]
    print_recall([(row.name, row.recall) for row in measured if row.recall])
    print_greedy([(row.name, row.greedy) for row in measured if row.greedy])
    print_costs([row for row in measured if row.prefill_seconds is not None])
    print_tasks([(row.name, row.tasks) for row in measured if row.tasks])
    exact_row = found.rows[0]
    baseline = (
        f"unquantized, its cache counted at 16 bits: {exact_row.fp16_cache_bytes / found.seq_len:.0f} bytes a token; "
        f"its NLL {found.fp16_nll:.4f}, PPL {exact_row.ppl:.3f}"
    )
    _say("eff. bits: effective bits; in brackets 95 % intervals of the mean over sequences; fp16: unquantized")
    _say(f"text: {found.data}, {found.samples} sequences of {found.seq_len} tokens, {found.scored} positions scored")
    _say(f"model: {found.model} in {found.dtype}; baseline: fp16, {baseline}")
    _say(f"protocol: {found.protocol}")
    for line in (*found.protocols.values(), *found.notes):
        _say(line)


def print_task(found: TaskComparison) -> None:
    """One task alone, and its protocol."""
    print_recall([(row.name, row.recall) for row in found.rows if row.recall])
    print_greedy([(row.name, row.greedy) for row in found.rows if row.greedy])
    _say(f"model: {found.model} in {found.dtype}; baseline: fp16, unquantized; text: {found.data}")
    _say(f"protocol: {found.protocol}")
    for line in found.notes:
        _say(line)


def print_recall(rows: Sequence[tuple[str, list[RecallPoint]]]) -> None:
    """By kind and length: shares of tokens and of whole passages, NLL; means over depths."""
    for kind, what in (("verbatim", "passage"), ("passkey", "key")):
        lengths = sorted({point.length for _, points in rows for point in points if point.kind == kind})
        if not lengths:
            continue
        columns = [f"{name}\n{length}" for length in lengths for name in ("tokens %", f"{what} %", "NLL")]
        table = _table(f"{kind} recall by length, means over depths", *columns)
        blind = ["blind"]
        for name, points in rows:
            cells = [folded(name)]
            for length in lengths:
                mine = [point for point in points if point.kind == kind and point.length == length]
                cells += [
                    f"{100 * _mean(point.tokens for point in mine):.1f}",
                    f"{100 * _mean(point.exact for point in mine):.0f}",
                    f"{_mean(point.nll for point in mine):.3f}",
                ]
                if name == rows[0][0]:
                    blind += ["", "", f"{_mean(point.blind_nll or 0.0 for point in mine):.3f}"]
            table.add_row(*cells)
        table.add_row(*blind)
        out_console.print(table)


def print_greedy(rows: Sequence[tuple[str, Greedy]]) -> None:
    """Where generations leave the unquantized model's."""
    if not rows:
        return
    table = _table(
        "greedy generations", "tokens", "first difference\n(median)", "same\nthroughout %", "tokens\nthe same %"
    )
    for name, greedy in rows:
        table.add_row(
            folded(name), str(greedy.tokens), f"{greedy.first_difference:g}", f"{100 * greedy.identical:.0f}",
            f"{100 * greedy.agreement:.1f}",
        )  # fmt: skip
    out_console.print(table)


def print_costs(rows: Sequence[Row]) -> None:
    """Times and memory."""
    if not rows:
        return
    peak = any(row.peak_bytes is not None for row in rows)
    table = _table(
        "costs", "cache bytes", "prefill ms", "decode ms\na token", *(["peak MB\nbeyond model"] if peak else [])
    )
    for row in rows:
        table.add_row(
            folded(row.name), f"{row.cache_bytes:.0f}", f"{1000 * (row.prefill_seconds or 0):.1f}",
            f"{1000 * (row.decode_seconds or 0):.2f}",
            *([] if not peak else ["" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.1f}"]),
        )  # fmt: skip
    out_console.print(table)


def print_tasks(rows: Sequence[tuple[str, dict[str, float]]]) -> None:
    """One line per task and metric, one column per contender."""
    if not rows:
        return
    table = _table("lm-eval tasks", *(name for name, _ in rows))
    for metric in dict.fromkeys(metric for _, found in rows for metric in found):
        if "_stderr" not in metric:
            task, _, name = metric.rpartition("/")
            error = f"{task}/{name.replace(',', '_stderr,') if ',' in name else name + '_stderr'}"
            table.add_row(metric, *(_with_error(found, metric, error) for _, found in rows))
    out_console.print(table)


def _with_error(found: dict[str, float], metric: str, error: str) -> str:
    """`0.7500 ± 0.0500`, without the part behind where no standard error is known."""
    if metric not in found:
        return ""
    known = math.isfinite(found.get(error, math.nan))
    return f"{found[metric]:.4f}" + (f" ± {found[error]:.4f}" if known else "")


def with_interval(found: Interval, times: float = 1.0, signed: bool = False) -> str:
    """`0.0123 [0.0118, 0.0129]`: three significant digits of the value, the bounds with as many decimals.

    Args:
        times: 100 for percent, then one decimal. signed: a + before a value above 0.
    """
    decimals = 1 if times != 1.0 else _decimals(found.value, found.high - found.low)
    value, low, high = (f"{times * x:.{decimals}f}" for x in (found.value, found.low, found.high))
    return f"{'+' if signed and found.value > 0 else ''}{value} [{low}, {high}]"


def rounded(value: float) -> str:
    """Three significant digits, at most `MOST_DECIMALS` decimals."""
    return f"{value:.{_decimals(value, 0.0)}f}"


def folded(name: str) -> str:
    """A spec on lines of at most `NAME_WIDTH` characters where its settings allow it, broken behind colons."""
    lines = [""]
    for part in name.replace(":", ":\n").split("\n"):
        if lines[-1] and len(lines[-1]) + len(part) > NAME_WIDTH:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _decimals(value: float, width: float) -> int:
    """Decimals that show three significant digits of the larger of the two."""
    largest = max(abs(value), width)
    if largest == 0:
        return MOST_DECIMALS
    return min(MOST_DECIMALS, max(0, 2 - math.floor(math.log10(largest))))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("", overflow="fold", min_width=NAME_WIDTH)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / max(1, len(found))


def _say(line: str) -> None:
    out_console.print(line, highlight=False, soft_wrap=True, markup=False)
