"""A report's numbers to its page."""

from __future__ import annotations

from kvcalib.report.data import Report
from kvcalib.report.page import Missing, Page, Section, render
from kvcalib.report.sections.bits import bits
from kvcalib.report.sections.codebooks import codebooks
from kvcalib.report.sections.comparison import comparison
from kvcalib.report.sections.fisher import fisher
from kvcalib.report.sections.friendliness import friendliness
from kvcalib.report.sections.losses import losses
from kvcalib.report.sections.memory import memory
from kvcalib.report.sections.outliers import outliers
from kvcalib.report.sections.pareto import pareto
from kvcalib.report.sections.provenance import provenance
from kvcalib.report.sections.recall import recall
from kvcalib.report.sections.summary import summary
from kvcalib.report.sections.sweep import sweep


def document(report: Report, version: str) -> str:
    """The HTML of `report`; parts without data are listed at its end with the command that gives them."""
    parts: list[Section | Missing] = [
        summary(report),
        pareto(report.measurements),
        comparison(report.measurements),
        sweep(report.sweep),
        memory(report.memory),
        recall(report.measurements),
        bits(report.layers),
        losses(report.predicted, report.layers),
        friendliness(report.layers),
        codebooks(report.densities, report.densities_rule),
        fisher(report.layers),
        outliers(report.layers),
        provenance(report.provenance),
    ]
    subtitle = "calibration only" if report.artifact is None else f"artifact {report.artifact}"
    if report.budget is not None:
        subtitle += f", within {report.budget:g} effective bits"
    page = Page(
        title=report.model,
        subtitle=subtitle,
        sections=[part for part in parts if isinstance(part, Section)],
        missing=[part for part in parts if isinstance(part, Missing)],
        created=report.created,
        version=version,
    )
    return render(page)
