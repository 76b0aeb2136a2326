"""Where the figures come from: protocol, hashes, versions, text, seeds, machine."""

from __future__ import annotations

from collections.abc import Mapping

from kvcalib.report.page import Facts, Missing, Section


def provenance(groups: Mapping[str, Mapping[str, str]]) -> Section | Missing:
    """A list of names and values for every group."""
    facts = [Facts(list(rows.items()), title) for title, rows in groups.items() if rows]
    if not facts:
        return Missing("Protocol and provenance", "kvcalib report ARTIFACT")
    return Section("provenance", "Protocol and provenance", facts=facts)
