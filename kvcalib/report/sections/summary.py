"""What somebody who decides wants to know: how much smaller, at what cost, how much context."""

from __future__ import annotations

import math

from kvcalib.report.capacity import RESERVE, long_bits, tokens_that_fit, usual_gpu
from kvcalib.report.data import Contender, Estimate, Measurement, Report
from kvcalib.report.page import Section, Tile
from kvcalib.report.words import many, percent, signed, size


def summary(report: Report) -> Section:
    """Two sentences and their numbers as tiles."""
    if report.memory is None or report.artifact is None:
        empty = f"{report.model} has been calibrated; no artifact has been built from this run yet."
        return Section("summary", "Summary", [empty], notes=["Build one with kvcalib build RUN --out ARTIFACT."])
    bits = long_bits(report.memory)
    sentence = (
        f"The KV cache of {report.model} takes {bits:.2f} bits per element in place of 16: {times(16 / bits)} times "
        "less memory."
    )
    tiles = [
        Tile(f"{times(16 / bits)}×", "smaller cache, every byte counted"),
        Tile(f"{bits:.2f} bits", "per key and value element in place of 16"),
    ]
    notes = [
        "Bits are those of a long cache: codes, outliers, scales and positions, without a recent window and spare room."
    ]
    found = measured(report)
    if found is not None:
        where, contender = found
        change = perplexity_change(where, contender)
        before = math.exp(where.fp16_nll)
        sentence += (
            f" Perplexity goes from {before:.2f} to {contender.ppl:.2f} ({told(change)}) on {where.data}, "
            f"{where.samples} sequences of {where.seq_len} tokens."
        )
        tiles.append(Tile(signed(change.value), f"perplexity, {signed(100 * change.value / before, 2)} %"))
        if change.low is None:
            notes.append(
                "No interval was measured: kvcalib eval ARTIFACT --compare fp16 --json F, then kvcalib report with "
                "--comparison F, gives one."
            )
    else:
        notes.append("What it costs was not measured: run kvcalib eval ARTIFACT.")
    says = [sentence]
    gpu = usual_gpu(report.memory)
    if gpu is not None:
        exact, packed = (tokens_that_fit(report.memory, gpu, packed) for packed in (False, True))
        if exact is not None and packed is not None:
            says.append(
                f"On a {gpu} GB GPU, {many(packed)} tokens of context fit in place of {many(exact)}"
                + (f", beside {size(report.memory.weights)} of weights." if report.memory.weights else ".")
            )
            tiles.append(Tile(f"{many(packed)} tokens", f"fit on a {gpu} GB GPU, {many(exact)} at 16 bits"))
            context = report.memory.context
            notes.append(
                "Memory alone: one sequence, "
                + (f"weights at 16 bits, {percent(RESERVE)} set aside" if report.memory.weights else "without weights")
                + (f"; the model itself was made for contexts of {context} tokens." if context else ".")
            )
    return Section("summary", "Summary", says, tiles, notes=notes)


def measured(report: Report) -> tuple[Measurement, Contender] | None:
    """The measurement of the report's artifact, if there is one."""
    for where in report.measurements:
        for contender in where.contenders:
            if contender.ours and contender.name == report.artifact and contender.failed is None:
                return where, contender
    return None


def perplexity_change(where: Measurement, contender: Contender) -> Estimate:
    """Perplexity above the unquantized model's, with the interval of delta NLL carried over: e^(nll + delta)."""
    before, delta = math.exp(where.fp16_nll), contender.delta_nll
    ends = [None if d is None else before * math.expm1(d) for d in (delta.low, delta.high)]
    return Estimate(before * math.expm1(delta.value), ends[0], ends[1])


def told(change: Estimate) -> str:
    """`+0.34, 95 % interval +0.31 to +0.37`."""
    if change.low is None or change.high is None:
        return signed(change.value)
    return f"{signed(change.value)}, 95 % interval {signed(change.low)} to {signed(change.high)}"


def times(ratio: float) -> str:
    """`6.4`."""
    return f"{ratio:.1f}"
