"""Can the model still find what it was told? Retrieval by length and depth."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from kvcalib.report.data import Contender, Measurement, Recall
from kvcalib.report.heat import heat_map
from kvcalib.report.page import Figure, Missing, Section, Table
from kvcalib.report.words import percent, short, signed

KINDS = {"passkey": "passkeys found", "verbatim": "verbatim tokens recalled"}


def recall(measurements: Sequence[Measurement]) -> Section | Missing:
    """Means of every contender, and a heat map of each for what the unquantized model can recall at all."""
    tables, figures, notes = [], [], list[str]()
    for where in measurements:
        for kind, name in KINDS.items():
            known = [c for c in where.contenders if _of(c, kind)]
            if not known:
                continue
            tables.append(_table(known, kind, f"{name}, {where.data}"))
            exact = [c for c in known if c.name == "fp16"]
            if exact and not any(p.share for p in _of(exact[0], kind)):
                notes.append(f"No picture of {name}: the unquantized model itself has none; its NLL tells more.")
                continue
            known.sort(key=lambda c: (c.name != "fp16", not c.ours))
            figures += [Figure(f"{c.name}: {name}", _map(c, _of(c, kind)), small=True) for c in known]
    if not tables:
        return Missing("Recall", "kvcalib eval ARTIFACT --compare fp16 --recall --json F; report --comparison F")
    says = [
        "Shares in percent, by length of the prompt and by how deep in it stands what is to be recalled. NLL is that "
        "of the tokens to recall; blind: of the unquantized model that was never told."
    ]
    return Section("recall", "Recall by length and depth", says, figures=figures, tables=tables, notes=notes)


def _of(contender: Contender, kind: str) -> list[Recall]:
    return [] if contender.failed else [point for point in contender.recall if point.kind == kind]


def _table(known: Sequence[Contender], kind: str, title: str) -> Table:
    exact = next((mean(p.nll for p in _of(c, kind)) for c in known if c.name == "fp16"), None)
    rows = []
    for c in known:
        points = _of(c, kind)
        nll = mean(p.nll for p in points)
        above = "" if exact is None else signed(nll - exact)
        rows.append([c.name, percent(mean(p.share for p in points)), short(nll), above])
    blind = [p.blind for p in _of(known[0], kind) if p.blind is not None]
    if blind:
        rows.append(["blind", "", short(mean(blind)), "" if exact is None else signed(mean(blind) - exact)])
    ours = frozenset(number for number, c in enumerate(known) if c.ours)
    return Table(["", KINDS[kind], "NLL, nats per token", "above fp16"], rows, title, ours)


def _map(contender: Contender, points: Sequence[Recall]) -> str:
    lengths, depths = sorted({p.length for p in points}), sorted({p.depth for p in points})
    where = {(p.depth, p.length): p.share for p in points}
    values = [[where.get((depth, length)) for length in lengths] for depth in depths]
    return heat_map(
        f"{contender.name}: recall by length and depth", [f"{100 * d:.0f} %" for d in depths],
        [str(length) for length in lengths], values, 0.0, 1.0, lambda v: f"{100 * v:.0f}", "depth", "tokens",
        width=340,
    )  # fmt: skip
