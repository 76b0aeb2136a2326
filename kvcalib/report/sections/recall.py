"""Can the model still find what it was told? Retrieval by length and depth."""

from __future__ import annotations

from collections.abc import Sequence

from kvcalib.report.data import Contender, Measurement, Recall
from kvcalib.report.heat import heat_map
from kvcalib.report.page import Figure, Missing, Section

KINDS = {"passkey": "passkeys found", "verbatim": "verbatim tokens recalled"}


def recall(measurements: Sequence[Measurement]) -> Section | Missing:
    """A heat map for every contender and kind that was measured."""
    found = [(c, kind) for where in measurements for c in where.contenders for kind in KINDS if _of(c, kind)]
    if not found:
        return Missing("Recall", "kvcalib eval ARTIFACT --compare fp16 --recall --json F; report --comparison F")
    found.sort(key=lambda pair: (list(KINDS).index(pair[1]), pair[0].name != "fp16", not pair[0].ours))
    figures = [Figure(f"{c.name}: {KINDS[kind]}", _map(c, _of(c, kind)), small=True) for c, kind in found]
    says = "Share in percent, by length of the prompt and by how deep in it the text to recall stands."
    return Section("recall", "Recall by length and depth", [says], figures=figures)


def _of(contender: Contender, kind: str) -> list[Recall]:
    return [] if contender.failed else [point for point in contender.recall if point.kind == kind]


def _map(contender: Contender, points: Sequence[Recall]) -> str:
    lengths, depths = sorted({p.length for p in points}), sorted({p.depth for p in points})
    where = {(p.depth, p.length): p.share for p in points}
    values = [[where.get((depth, length)) for length in lengths] for depth in depths]
    return heat_map(
        f"{contender.name}: recall by length and depth", [f"{100 * d:.0f} %" for d in depths],
        [str(length) for length in lengths], values, 0.0, 1.0, lambda v: f"{100 * v:.0f}", "depth", "tokens",
        width=340,
    )  # fmt: skip
