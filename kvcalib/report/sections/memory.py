"""Memory by length of context, and what fits on common GPUs."""

from __future__ import annotations

from dataclasses import replace

from kvcalib.report.capacity import GPUS, RESERVE, cache_bytes, tokens_that_fit, usual_gpu
from kvcalib.report.chart import Axis, Chart
from kvcalib.report.data import Memory
from kvcalib.report.page import Figure, Key, Missing, Section, Table
from kvcalib.report.words import GIB, many, percent, size

LEGEND = (Key("c8", "cache at 16 bits"), Key("first", "cache of this artifact"))


def memory(found: Memory | None) -> Section | Missing:
    """Weights and cache against context, and a table of GPUs."""
    if found is None:
        return Missing("Memory by length of context", "kvcalib build RUN --out ARTIFACT")
    alone = found.weights is not None and usual_gpu(found) is None
    if alone:
        too_large, found = found.weights or 0.0, replace(found, weights=None)
    rows = []
    for gib in GPUS:
        fits = [tokens_that_fit(found, gib, packed) for packed in (False, True)]
        rows.append(
            [f"{gib} GB", *("any length" if n is None else many(n) if n else "weights do not fit" for n in fits)]
        )
    layers = tuple(found.layers)
    per_token = [cache_bytes(layers, 1, packed) for packed in (False, True)]
    says = [f"A token takes {size(per_token[0])} at 16 bits and {size(per_token[1])} in this artifact, in all layers."]
    if any(layer.window for layer in layers):
        says.append("Layers with a sliding window stop growing at their window.")
    notes = [
        f"One sequence; a GPU's GB are 2^30 bytes, {percent(RESERVE)} of them set aside for activations and framework"
        + (f"; weights at 16 bits: {size(found.weights)}." if found.weights else "; weights are not counted.")
    ]
    if alone:
        notes.append(f"The weights ({size(too_large)}) leave no room on one of these GPUs: this is the cache alone.")
    elif found.weights is None:
        notes.append("The model's config was not at hand: give it with --model.")
    if found.context:
        notes.append(f"The model's config names a context of {found.context} tokens; this is about memory alone.")
    head = ["GPU", "tokens at 16 bits", "tokens with this artifact"]
    figure = Figure("Weights and cache", _plot(found), LEGEND)
    return Section(
        "memory", "Memory by length of context", says, figures=[figure],
        tables=[Table(head, rows, beside=True)], notes=notes,
    )  # fmt: skip


def _plot(found: Memory) -> str:
    layers, weights = tuple(found.layers), found.weights or 0.0
    fits = [[tokens_that_fit(found, gib, packed) for gib in GPUS] for packed in (False, True)]
    ends = [n for row in fits for n in row if n] or [found.context or 2**20]
    low, high = max(1.0, min(ends) / 8), max(ends) / (1 - RESERVE)
    lengths = [low * (high / low) ** (k / 80) for k in range(81)]
    x = Axis.over([low, high], "tokens of context", log=True)
    inside = [m for m in x.marks if low <= m <= high]
    x = Axis(x.name, tuple(inside), True, tuple(many(n) for n in inside), (low, high))
    top = GPUS[-1] * 1.04
    y = Axis("weights and cache, GB", tuple(range(0, GPUS[-1], 50)), ends=(0.0, top))
    chart = Chart("memory against length of context", x, y, width=440, height=330, right=52)
    for gib in GPUS:
        chart.rule(gib, f"{gib} GB")
    for packed, colour in ((False, "c8"), (True, "first")):
        curve = [(n, (weights + cache_bytes(layers, int(n), packed)) / GIB) for n in lengths]
        chart.line([p for p in curve if p[1] <= top], colour)
    return chart.svg()
