"""What `bench/frontier.py` found, as tables for people, README and docs/feedback.md, and as plots."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from quality import FAMILIES, SAID, of_family
from rich.console import Console
from rich.table import Table

from kvcalib.evaluation.compare import difference
from kvcalib.evaluation.comparison import Comparison, Interval, Row, TaskComparison
from kvcalib.report.data import Contender, Estimate, Measurement
from kvcalib.report.page import Figure
from kvcalib.report.picture import picture
from kvcalib.report.sections.pareto import pareto

KVQUANT = "kvquant-published"
TITLES = {
    "fisher": "widths by Fisher, 1 % outliers",
    "outliers": "+ outliers by budget",
    "feedback": "+ error feedback",
    "basis": "+ values along their own axes",
    "kl": "+ widths by measured KL",
    "refine": "+ codebooks by gradient",
}
WITHIN = 0.02
"""By how much of our size KVQuant's padded one may differ."""
PAGES = {"README.md": "table", "docs/feedback.md": "details"}
PLOT = "frontier-{}.svg"


def marks(part: str) -> tuple[str, str]:
    return f"<!-- frontier {part}: made by bench/frontier.py --readme -->", f"<!-- end of frontier {part} -->"


class Found:
    """One model's part of the JSON, by idea and budget."""

    def __init__(self, part) -> None:
        self.part, self.budgets = part, part["budgets"]
        self.text = Comparison.model_validate(part["comparison"])
        self.others = [Row.model_validate(row) for row in part["others"]]
        self.rows = {row.name: row for row in self.text.rows if row.failed is None}
        self.title = SAID.get(part["name"], part["name"])
        self.ideas = [idea for idea in TITLES if any(self.ours(idea, budget) for budget in self.budgets)]

    def ours(self, idea: str, budget: float) -> Row | None:
        return self.rows.get(f"{idea}-{budget:g}")

    def size(self, budget: float) -> float:
        """Effective bits of our largest artifact of a budget."""
        return max(row.effective_bits for idea in self.ideas if (row := self.ours(idea, budget)))

    def kvquant(self, budget: float) -> Row | None:
        """The best of KVQuant's rows that are as large as ours, or up to `WITHIN` larger."""
        size = self.size(budget)
        same = [
            row
            for name, row in self.rows.items()
            if name.startswith(KVQUANT) and size - 0.005 <= row.effective_bits <= (1 + WITHIN) * size
        ]
        return min(same, key=lambda row: row.kld.value, default=None)

    def other(self, label: str, budget: float) -> Row | None:
        """The smallest row of another method that is as large as ours or larger; of equal ones the better."""
        size = self.size(budget) - 0.005
        rows = [
            row
            for row in of_family(SimpleNamespace(rows=self.others), label)
            if row.failed is None and row.effective_bits >= size
        ]
        return min(rows, key=lambda row: (round(row.effective_bits, 2), row.kld.value), default=None)

    def ratio(self, row: Row, budget: float) -> float | None:
        """KLD as a share of KVQuant's at the same bytes."""
        theirs = self.kvquant(budget)
        return None if theirs is None else row.kld.value / theirs.kld.value


def table_of(found: Found) -> list[list[str]]:
    """KLD by method and budget, with its share of KVQuant's and the effective bits; the header first."""
    lines = [["KLD, its ratio to KVQuant's, at effective bits", *(f"about {budget:g}" for budget in found.budgets)]]
    lines.append(["KVQuant's recipe, padded to our bytes", *(_cell(found.kvquant(b), None) for b in found.budgets)])
    for idea in found.ideas:
        rows = [(found.ours(idea, budget), budget) for budget in found.budgets]
        last = "**" if idea == found.ideas[-1] else ""
        cells = (_cell(row, found.ratio(row, budget) if row else None) for row, budget in rows)
        lines.append([f"{last}{TITLES[idea]}{last}", *cells])
    for name, (label, _) in FAMILIES.items():
        rows = [(found.other(label, budget), budget) for budget in found.budgets]
        name = f"{name}, its own sizes" if label == KVQUANT else name
        lines.append([name, *(_cell(row, found.ratio(row, budget) if row else None) for row, budget in rows)])
    return lines


def _cell(row: Row | None, ratio: float | None) -> str:
    if row is None:
        return ""
    return f"{row.kld.value:.3g}{'' if ratio is None else f' (x {ratio:.2f})'} at {row.effective_bits:.2f}"


def details_of(found: Found) -> list[list[str]]:
    """Each idea's figures at each budget, with intervals; the header first."""
    lines = [
        ["effective bits", "", "KLD", "against the row above", "ratio to KVQuant's", "delta NLL", "top-1 agreement"]
    ]
    for budget in found.budgets:
        above: Row | None = None
        for name, row in (
            ("KVQuant's recipe", found.kvquant(budget)),
            *((TITLES[idea], found.ours(idea, budget)) for idea in found.ideas),
        ):
            if row is None:
                continue
            ratio = found.ratio(row, budget)
            lines.append([
                f"{row.effective_bits:.3f}", f"{name} ({row.name})" if row.name.startswith(KVQUANT) else name,
                _interval(row.kld), "" if above is None else _interval(difference(row, above), plus=True),
                "" if ratio is None else f"{ratio:.3f}", _interval(row.delta_nll, plus=True),
                f"{100 * row.top1_agreement.value:.1f} %",
            ])  # fmt: skip
            above = row
    return lines


def _interval(found: Interval, plus: bool = False) -> str:
    form = "+.2g" if plus else ".3g"
    return f"{found.value:{form}} [{found.low:{form}}, {found.high:{form}}]"


def tasks_of(found: Found) -> list[list[str]]:
    """Verbatim recall and greedy generations; the header first, nothing if neither was measured."""
    parts = {t: TaskComparison.model_validate(found.part[t]) for t in ("recall", "greedy") if t in found.part}
    if not parts:
        return []
    rows = {task: {row.name: row for row in part.rows} for task, part in parts.items()}
    lines = [["cache", "recalled tokens", "their NLL (blind)", "greedy: same tokens", "first other token"]]
    for name in next(iter(rows.values())):
        idea, _, budget = name.rpartition("-")
        points = [p for p in (rows["recall"][name].recall if "recall" in rows else None) or () if p.kind == "verbatim"]
        written = rows["greedy"][name].greedy if "greedy" in rows else None
        lines.append([
            f"{TITLES[idea]}, {budget}" if idea in TITLES else name,
            f"{100 * _mean(p.tokens for p in points):.1f} %" if points else "",
            f"{_mean(p.nll for p in points):.3f} ({_mean(p.blind_nll or 0.0 for p in points):.3f})" if points else "",
            f"{100 * written.agreement:.1f} %" if written else "",
            f"{written.first_difference:g} of {written.tokens}" if written else "",
        ])  # fmt: skip
    return lines


def _mean(values) -> float:
    return statistics.fmean(values)


def decode_of(found: Found) -> list[list[str]]:
    """Times of a decode step and of a prompt; the header first, nothing if not measured."""
    if "decode" not in found.part:
        return []
    lines = [["cache", "context", "decode step", "against no feedback", "prompt", "against no feedback"]]
    for row in found.part["decode"]["rows"]:
        idea, _, budget = row["cache"].rpartition("-")
        lines.append([
            f"{TITLES[idea]}, {budget}", str(row["context"]), f"{1000 * row['step_seconds']:.2f} ms",
            f"x {row['step_ratio']:.3f}", f"{1000 * row['prompt_seconds']:.0f} ms", f"x {row['prompt_ratio']:.2f}",
        ])  # fmt: skip
    return lines


def show(body, console: Console) -> None:
    """Every table of every model."""
    for part in body["subjects"]:
        found = Found(part)
        for lines in (table_of(found), details_of(found), tasks_of(found), decode_of(found)):
            if lines:
                table = Table(title=found.title)
                for column in lines[0]:
                    table.add_column(column)
                for line in lines[1:]:
                    table.add_row(*line)
                console.print(table)


def markdown(body, part: str) -> str:
    """What stands between the marks of a page: the README's table, or all details."""
    lines: list[str] = []
    for number, each in enumerate(body["subjects"]):
        found = Found(each)
        lines += ["", f"{found.title}, {found.text.samples} x {found.text.seq_len} held-out tokens:", ""]
        if part == "table":
            lines += [*_lines(table_of(found)), "", f"![KLD of each idea](docs/images/{PLOT.format(number)})"]
            continue
        lines += _lines(details_of(found))
        for more in (tasks_of(found), decode_of(found)):
            lines += ["", *_lines(more)] if more else []
    first = Found(body["subjects"][0])
    lines += ["", f"Measured {first.text.created[:10]} on {first.text.machine.split(',')[0]}: {first.text.protocol}."]
    if part == "details":
        told = {task: first.part[task]["protocol"] for task in ("recall", "greedy", "decode") if task in first.part}
        lines += [f"{text[:1].upper()}{text[1:]}." for text in told.values()]
    return "\n".join([*lines, ""])


def _lines(rows: list[list[str]]) -> list[str]:
    header, *others = rows
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *others)]


def plot(found: Found) -> Figure:
    """KLD against effective bits: each idea a family, the last one ours."""
    shown = [(TITLES[idea], row, idea == found.ideas[-1]) for idea in found.ideas for row in _at(found, idea)]
    shown += [("KVQuant's recipe, padded", row, False) for b in found.budgets if (row := found.kvquant(b))]
    for name, (label, _) in FAMILIES.items():
        rows = {row.name: row for b in found.budgets if (row := found.other(label, b))}
        shown += [(name, row, False) for row in rows.values() if label != KVQUANT]
    contenders = [
        Contender(
            f"{row.effective_bits:.2f}" if ours else row.name, family, ours, row.effective_bits, row.cache_bytes,
            row.ppl, _estimate(row.delta_nll), _estimate(row.kld), _estimate(row.top1_agreement),
        )
        for family, row, ours in shown
    ]  # fmt: skip
    text = found.text
    size = text.rows[0].fp16_cache_bytes
    where = Measurement(text.data, text.samples, text.seq_len, text.fp16_nll, size, text.protocol, contenders)
    figure = pareto([where]).figures[0]
    return replace(figure, title=f"{found.title}: KLD against size")


def _at(found: Found, idea: str) -> list[Row]:
    return [row for budget in found.budgets if (row := found.ours(idea, budget))]


def _estimate(found: Interval) -> Estimate:
    return Estimate(found.value, found.low, found.high)


def remake(body, root: Path) -> None:
    """Put the tables into the pages, between their marks, and the plots beside them."""
    for number, part in enumerate(body["subjects"]):
        (root / "docs/images").mkdir(parents=True, exist_ok=True)
        (root / "docs/images" / PLOT.format(number)).write_text(picture(plot(Found(part))))
    for name, part in PAGES.items():
        page, (begin, end) = root / name, marks(part)
        before, _, rest = page.read_text().partition(begin)
        _, mark, after = rest.partition(end)
        if not mark:
            raise SystemExit(f"{page}: no {begin} ... {end}; put both where the tables shall be")
        page.write_text(before + begin + "\n" + markdown(body, part) + end + after)
