"""All measures of all contenders, with their intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvcalib.report.data import Contender, Measurement
from kvcalib.report.page import Missing, Section, Table
from kvcalib.report.words import percent, short, size, two_lines

Column = tuple[str, Callable[[Contender, Measurement], str | None]]


def comparison(measurements: Sequence[Measurement]) -> Section | Missing:
    """A table for every measurement; columns that nobody has are left out."""
    if not measurements:
        return Missing("Comparison", "kvcalib eval ARTIFACT --compare fp16,kivi,int --json F; report --comparison F")
    tables, notes = [], []
    for where in measurements:
        tables.append(_table(where))
        notes += [f"{c.name} could not be measured: {c.failed}" for c in where.contenders if c.failed]
        notes.append(f"Protocol, {where.data}: {where.protocol}.")
    if any(c.kld.low is not None for where in measurements for c in where.contenders):
        notes.append("Below the figures 95 % intervals, by paired bootstrap over sequences.")
    return Section("comparison", "Comparison", tables=tables, notes=list(dict.fromkeys(notes)))


def _table(where: Measurement) -> Table:
    shown = [c for c in where.contenders if c.failed is None]
    tasks = sorted({task for c in shown for task in c.tasks})
    columns: list[Column] = [
        ("effective bits", lambda c, _: f"{c.bits:.2f}"),
        ("cache bytes per token", lambda c, w: f"{c.cache_bytes / w.seq_len:.0f}"),
        ("times smaller", lambda c, w: f"{w.fp16_bytes / c.cache_bytes:.1f}" if c.cache_bytes else None),
        ("perplexity", lambda c, _: f"{c.ppl:.3f}"),
        ("delta NLL", lambda c, _: two_lines(c.delta_nll, plus=True)),
        ("KLD", lambda c, _: two_lines(c.kld)),
        ("KLD, 99 % quantile", lambda c, _: None if c.kld_p99 is None else short(c.kld_p99)),
        ("top-1 agreement", lambda c, _: two_lines(c.top1, factor=100, unit=" %")),
        ("greedy: same tokens", lambda c, _: None if c.greedy_agreement is None else percent(c.greedy_agreement)),
        ("greedy: first difference", lambda c, _: None if c.greedy_first is None else f"{c.greedy_first:.0f}"),
        ("prefill, s", lambda c, _: None if c.prefill_seconds is None else short(c.prefill_seconds)),
        ("decode, ms per token", lambda c, _: None if c.decode_seconds is None else short(1000 * c.decode_seconds)),
        ("peak memory", lambda c, _: None if c.peak_bytes is None else size(c.peak_bytes)),
        *((task, lambda c, _, t=task: short(c.tasks[t]) if t in c.tasks else None) for task in tasks),
    ]
    kept = [(name, get) for name, get in columns if any(get(c, where) is not None for c in shown)]
    rows = [[c.name, *(get(c, where) or "" for _, get in kept)] for c in shown]
    ours = frozenset(number for number, c in enumerate(shown) if c.ours)
    title = f"{where.data}, {where.samples} × {where.seq_len} tokens"
    return Table(["", *(name for name, _ in kept)], rows, title, ours)
