"""A report with every section, from made-up numbers; its names can be hostile."""

from __future__ import annotations

import itertools
import math

from kvcalib.report.data import (
    CacheLayer,
    Contender,
    Density,
    Estimate,
    Layer,
    Measurement,
    Memory,
    Predicted,
    Recall,
    Report,
    SweepPoint,
)

METHODS = {
    "kvcalib": (0.012, 2.2), "kivi": (0.08, 2.0), "int": (0.3, 2.4), "nf": (0.2, 2.3), "turboquant": (0.06, 2.1),
    "hf-hqq": (0.14, 2.0), "hf-quanto": (0.16, 2.2), "kvquant-published": (0.03, 2.0), "qaq-published": (0.05, 1.9),
    "qhitter-published": (0.25, 1.7),
}  # fmt: skip


def around(value: float, share: float = 0.15) -> Estimate:
    return Estimate(value, value * (1 - share), value * (1 + share))


def contender(name: str, family: str, bits: float, kld: float) -> Contender:
    exact = family == "fp16"
    points = [
        Recall(
            kind, length, depth, 1.0 if exact else max(0.0, 1 - 4 * kld * (1 + 2 * depth) * length / 512), 1 + kld, 3.0
        )
        for kind in ("passkey", "verbatim")
        for length in (512, 1024, 2048)
        for depth in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    return Contender(
        name=name, family=family, ours=family == "kvcalib", bits=bits, cache_bytes=bits * 65536, ppl=10 * math.exp(kld),
        delta_nll=around(kld * 0.9), kld=around(kld), top1=around(1 - kld, 0.01), kld_p99=12 * kld,
        prefill_seconds=0.1, decode_seconds=0.012, greedy_agreement=1 - kld, greedy_first=100 * (1 - kld),
        tasks={"arc_easy/acc": 0.71}, recall=points if family in ("fp16", "kvcalib", "kivi") else (),
    )  # fmt: skip


def measurement(data: str = "english.jsonl") -> Measurement:
    rows = [contender("fp16", "fp16", 16.0, 0.0)]
    for family, (base, fall) in METHODS.items():
        for bits in (2.0, 2.5, 3.0, 4.0):
            name = f"nuq{bits:g}" if family == "kvcalib" else f"{family}:bits={bits:g}"
            rows.append(contender(name, family, bits + 0.03 * len(family), base * math.exp(-fall * (bits - 2))))
    failed = contender("kivi:bits=9", "kivi", 0.0, 0.0)
    rows.append(Contender(**{**failed.__dict__, "failed": "bits is 9, expected 1 to 8", "recall": ()}))
    return Measurement(
        data,
        48,
        512,
        math.log(10),
        16 * 65536,
        "each sequence in one pass",
        rows,
        {"machine": "2 cores, no GPU"},
        ["few sequences"],
    )


def layer(index: int, heads: int = 2, channels: int = 32) -> Layer:
    by_head = [2.0 + 0.3 * h + 0.1 * index for h in range(heads)]
    fisher = [1e-3 * math.exp(-0.1 * c) * (index + 1) for c in range(heads * channels)]
    return Layer(
        index, (2.2 + 0.1 * index, 2.8), (by_head, list(reversed(by_head))), (0.01, 0.02), (1e-3, 2e-3 / (index + 1)),
        (fisher, [f / 3 for f in fisher]), (0.2 + 0.05 * index, 0.15), 0.9, 0.95, 1.1,
    )  # fmt: skip


def density(index: int, role: str = "key") -> Density:
    edges = [-3 + 6 * k / 72 for k in range(73)]
    shape = [math.exp(-(((a + b) / 2) ** 2) / 2) for a, b in itertools.pairwise(edges)]
    whole = sum(shape)
    bins = [s / whole for s in shape]
    centroids = [-1.5, -0.5, 0.5, 1.5]
    return Density(index, role, 0, 7, "greatest Fisher", 2, edges, bins, bins[::-1], centroids, 0.001, role)


def full(model: str = "tiny-llama", artifact: str = "nuq2.5", layers: int = 6) -> Report:
    return Report(
        model=model,
        artifact=artifact,
        budget=2.5,
        layers=[layer(i) for i in range(layers)],
        densities=[density(0), density(0, "value"), density(1)],
        densities_rule="The key channel with the greatest mean Fisher.",
        predicted=[Predicted("nuq2.5", 2.48, 0.02, 0.039, 0.038), Predicted("nuq6", 5.98, 1e-4, 2.7e-4, -1.5e-4)],
        measurements=[measurement()],
        memory=Memory([CacheLayer(4096.0, 660.0)] * 31 + [CacheLayer(4096.0, 4096.0, 1024)], 16.06e9, 131072),
        sweep=[SweepPoint(f"bits={b}", b, math.exp(-b), math.exp(-b)) for b in (2.0, 3.0, 4.0)],
        provenance={"Artifact": {"sha256": "ab" * 32}, "Model": {"name": model}},
        created="2026-11-23T03:00:00Z",
    )


def hostile() -> Report:
    bad = '<script>alert("x")</script>&<b>'
    report = full(bad, bad)
    one = measurement(bad)
    rows = [Contender(**{**row.__dict__, "name": bad + row.name, "family": bad + row.family}) for row in one.contenders]
    broken = Contender(**{**rows[0].__dict__, "failed": bad, "tasks": {bad: 1.0}})
    changed = {
        "measurements": [
            Measurement(**{**one.__dict__, "contenders": [*rows, broken], "protocol": bad, "notes": [bad]})
        ],
        "provenance": {bad: {bad: bad}},
        "predicted": [Predicted(bad, 2.5, 0.02, 0.03, 0.03)],
        "sweep": [SweepPoint(bad, 2.0, 0.1, 0.1)],
        "densities_rule": bad,
        "created": bad,
    }
    return Report(**{**report.__dict__, **changed})
