"""Where bits go: allocators against each other and against uniform splits, and does predicted loss rank plans?

    python bench/allocation.py [--model MODEL] [--data SRC] [--eval-data SRC] [--bars .0212 .0097 .0046] [--json PATH]

One calibration; then at mean code widths 2.0, 2.5 and 3.0 a plan of every allocator, every split of the bits between
keys and values with one width each, and `fisher` at exactly those splits' effective bits. Each plan is built and
measured on real packed storage, every sequence in one pass. 60 random plans, 30 of widely different budgets and 30 of
one, give the rank correlation of predicted loss with KLD. 1 % outliers, one value scale per token, no sinks, no recent
window. Every measured row is written at once; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from kvcalib.files import write_json
from kvcalib.model.loading import load_model
from kvcalib.rundir import RunDir
from kvcalib.runtime.loader import load
from kvcalib.stages import allocate, build, evaluate, fisher, fit_nuq
from kvcalib.stages.allocate import AllocateSettings
from kvcalib.stages.evaluate import EvalSettings
from kvcalib.stages.fit_nuq import ROLES

MEANS = (2.0, 2.5, 3.0)
FISHER = {
    "fisher, groups of 16": {"group": 16},
    "fisher, free channels": {"group": 0},
    "fisher, per head": {"per": "head"},
    "fisher, per layer": {"per": "layer"},
}
RANDOM, RANDOM_MEAN, RANDOM_RANGE = 30, 2.5, (1.5, 4.5)


@dataclass
class Plan:
    """Widths to measure."""

    name: str
    kind: str  # "width": at a mean code width; "bits": at a uniform split's effective bits; "wide", "same": random
    mean: float
    widths: allocate.Widths


def table_plans(run, codebooks):
    """The plans of the table: those that the checks ask for, and the rest."""

    def chosen(**settings):
        return allocate.run(run, AllocateSettings(**settings))[1]

    first = [Plan(name, "width", mean, chosen(widths=mean, **FISHER[name])) for mean in MEANS for name in FISHER]
    rest = []
    for mean in MEANS:
        uniform = splits(codebooks, round(2 * mean))
        bits = min(allocate.effective_bits(codebooks, widths) for widths in uniform.values())
        for (key, value), widths in uniform.items():
            plan = Plan(f"uniform, keys {key} values {value}", "bits", mean, widths)
            (first if abs(key - value) < 2 else rest).append(plan)
        for name, plans in (("fisher, groups of 16", first), ("fisher, free channels", rest)):
            plans.append(Plan(name, "bits", mean, chosen(budget=bits, **FISHER[name])))
        for name, plans in (("qaq, as published", first), ("qaq", rest)):
            published = name == "qaq, as published"
            plans.append(Plan(name, "width", mean, chosen(widths=mean, method="qaq", as_published=published)))
    return first, rest


def splits(codebooks, total):
    """Every pair of whole widths, at least 1, that adds up to `total`."""
    return {
        (key, total - key): {
            (layer, role): codebooks.widths(layer, role, key if role == "key" else total - key)
            for layer in codebooks.layers
            for role in ROLES
        }
        for key in range(max(1, total - 8), min(9, total))
    }


def random_plans(codebooks, kind):
    """Random widths of layers, heads or channels: means drawn from a wide range, or all of one mean."""
    generator = np.random.default_rng({"wide": 0, "same": 1}[kind])
    plans = []
    for number in range(RANDOM):
        mean = generator.uniform(*RANDOM_RANGE) if kind == "wide" else RANDOM_MEAN
        unit = ("layer", "head", "channel")[number % 3]
        spread = generator.uniform(0.3, 1.2)
        shapes = {(i, r): codebooks.get(i, r, "weight").shape for i in codebooks.layers for r in ROLES}
        counts = [{"layer": 1, "head": h, "channel": h * d}[unit] for h, d in shapes.values()]
        widths = np.clip(np.rint(generator.normal(mean, spread, sum(counts))), 0, 8).astype(np.int64)
        sizes = np.repeat([h * d // n for (h, d), n in zip(shapes.values(), counts, strict=True)], counts)
        while kind == "same" and abs(gap := round(mean * sizes.sum()) - int(sizes @ widths)) >= sizes.min():
            step = 1 if gap > 0 else -1
            widths[generator.choice(np.flatnonzero((widths + step >= 0) & (widths + step <= 8)))] += step
        parts = np.split(widths, np.cumsum(counts)[:-1])
        chosen = {
            name: torch.from_numpy(part.repeat(h * d // len(part)).reshape(h, d).astype(np.uint8))
            for (name, (h, d)), part in zip(shapes.items(), parts, strict=True)
        }
        plans.append(Plan(f"random {number}, per {unit}", kind, mean, chosen))
    return plans


def fingerprint(codebooks, plan, settings):
    """Whether a row is of the same codebooks, widths and text as before."""
    digest = hashlib.sha256(json.dumps(settings.model_dump(), sort_keys=True).encode())
    for (layer, role), widths in plan.widths.items():
        for tensor in (widths, codebooks.get(layer, role, "ladder"), codebooks.get(layer, role, "weight")):
            digest.update(np.ascontiguousarray(tensor.numpy()).tobytes())
    return digest.hexdigest()[:16]


def measure(run, codebooks, plans, settings, model_name, model):
    """Rows of `plans`, measured in one go; the unquantized logits are computed once."""
    with tempfile.TemporaryDirectory() as folder:
        for number, plan in enumerate(plans):
            build.run(run, Path(folder) / str(number), widths=plan.widths)
        loaded = [load(Path(folder) / str(number)) for number in range(len(plans))]
        found = evaluate.run(loaded, model_name, settings, model=model)
    rows = []
    for plan, measures in zip(plans, found, strict=True):
        predicted = sum(fit_nuq.predicted_total(codebooks, i, role, w) for (i, role), w in plan.widths.items())
        rows.append(
            {
                "name": plan.name,
                "kind": plan.kind,
                "mean": plan.mean,
                "mean_width": float(torch.cat([w.flatten() for w in plan.widths.values()]).double().mean()),
                "effective_bits": allocate.effective_bits(codebooks, plan.widths),
                "measured_bits": measures.effective_bits,
                "predicted_loss": predicted,
                "kld": measures.kld,
                "delta_nll": measures.delta_nll,
                "top1_agreement": measures.top1_agreement,
                "fingerprint": fingerprint(codebooks, plan, settings),
            }
        )
    return rows


def checks(rows, bars):
    """What must hold: `(claim, found, holds)`."""
    found = []
    for number, mean in enumerate(MEANS):
        at = {(row["kind"], row["name"]): row["kld"] for row in rows if row["mean"] == mean}
        ours = at.get(("width", "fisher, groups of 16"))
        if bars and ours is not None:
            best = at.get(("width", "fisher, free channels"), ours)
            shown = f"groups {ours:.5f}, free {best:.5f}, bar {bars[number]:g}"
            found.append((f"width {mean}: KLD of groups within the bar", shown, ours <= bars[number]))
            found.append((f"width {mean}: KLD of free channels within the bar", shown, best <= bars[number]))
        others = {name: kld for (kind, name), kld in at.items() if kind == "bits" and name.startswith("uniform")}
        same = at.get(("bits", "fisher, groups of 16"))
        if others and same is not None:
            least = min(others, key=others.get)
            shown = f"{same:.5f} against {others[least]:.5f} ({least})"
            found.append((f"width {mean}: below every uniform split at their bits", shown, same < others[least]))
        published = at.get(("width", "qaq, as published"))
        if published is not None and same is not None:
            shown = f"{same:.5f} against {published:.5f}"
            found.append((f"width {mean}: below qaq as published, at the splits' bits", shown, same < published))
    for kind in ("wide", "same"):
        if (rank := correlation(rows, kind)) is not None:
            what = "widely different budgets" if kind == "wide" else "one budget"
            found.append((f"rank correlation, {what}", f"{rank['kld']:.3f} (KLD), {rank['delta_nll']:.3f} (delta NLL)",
                          rank["kld"] >= 0.9))  # fmt: skip
    return found


def correlation(rows, kind):
    """Spearman's coefficient of predicted loss and measures over the random plans of `kind`."""
    mine = [row for row in rows if row["kind"] == kind]
    if len(mine) < 10:
        return None
    predicted = [row["predicted_loss"] for row in mine]
    ranks = {name: float(spearmanr(predicted, [row[name] for row in mine])[0]) for name in ("kld", "delta_nll")}
    return {"plans": len(mine), **ranks}


def show(rows, bars):
    """Print the table and the checks."""
    table = Table(title="where bits go")
    for column in ("mean width", "plan", "effective bits", "predicted loss", "KLD", "delta NLL", "top-1"):
        table.add_column(column, justify="left" if column == "plan" else "right")
    for kind in ("width", "bits"):
        for mean in MEANS:
            for row in sorted((r for r in rows if r["kind"] == kind and r["mean"] == mean), key=lambda r: r["kld"]):
                table.add_row(
                    f"{row['mean_width']:.2f}", row["name"], f"{row['effective_bits']:.3f}",
                    f"{row['predicted_loss']:.5f}", f"{row['kld']:.5f}", f"{row['delta_nll']:+.5f}",
                    f"{100 * row['top1_agreement']:.1f} %",
                )  # fmt: skip
            table.add_section()
    console = Console(width=120)
    console.print(table)
    for claim, shown, holds in checks(rows, bars):
        console.print(f"{'PASS' if holds else 'FAIL'}  {claim}: {shown}", highlight=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--data", default="builtin")
    parser.add_argument("--eval-data", default=None, help="default: --data")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--eval-samples", type=int, default=48)
    parser.add_argument("--random-samples", type=int, default=10, help="sequences that a random plan is measured on")
    parser.add_argument("--bars", type=float, nargs=3, help="KLD that fisher must reach at widths 2.0, 2.5 and 3.0")
    parser.add_argument("--run", type=Path, default=Path("artifacts/bench-allocation.run"), help="kept for next time")
    parser.add_argument("--together", type=int, default=4, help="plans measured in one go")
    parser.add_argument("--show", action="store_true", help="print what the JSON holds and measure nothing")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "allocation.json")
    options = parser.parse_args()
    before = json.loads(options.json.read_text())["rows"] if options.json.is_file() else []
    if options.show:
        show(before, options.bars)
        return

    model = load_model(options.model)
    run = RunDir(options.run, create=True)
    calibrating = fisher.FisherSettings(data=options.data, samples=options.samples, seq_len=options.seq_len)
    fisher.run(run, options.model, calibrating, model=model)
    codebooks = fit_nuq.run(run, fit_nuq.FitNuqSettings(choices=None))
    data = options.eval_data or options.data
    long = EvalSettings(data=data, samples=options.eval_samples, seq_len=options.seq_len)
    short = EvalSettings(data=data, samples=options.random_samples, seq_len=options.seq_len)
    first, rest = table_plans(run, codebooks)
    random = [plan for kind in ("same", "wide") for plan in random_plans(codebooks, kind)]
    parts = ((first, long), (random, short), (rest, long))

    def key(row):
        return row["name"], row["kind"], row["mean"]

    wanted = {
        (plan.name, plan.kind, plan.mean): fingerprint(codebooks, plan, text) for mine, text in parts for plan in mine
    }
    rows = [row for row in before if wanted.get(key(row)) == row["fingerprint"]]
    done = {key(row) for row in rows}
    for mine, text in parts:
        left = [plan for plan in mine if (plan.name, plan.kind, plan.mean) not in done]
        for start in range(0, len(left), options.together):
            rows += measure(run, codebooks, left[start : start + options.together], text, options.model, model)
            order = list(wanted)
            rows.sort(key=lambda row: order.index(key(row)))
            write_json(options.json, {
                "model": Path(options.model).name,
                "calibration": {"data": Path(options.data).name, "sequences": options.samples},
                "evaluation": {"data": Path(data).name, "sequences": options.eval_samples,
                               "random_sequences": options.random_samples},
                "seq_len": options.seq_len, "outliers": 0.01, "value_scale": "token", "sinks": 0, "recent": 0,
                "rows": rows,
                "rank_correlation": {kind: correlation(rows, kind) for kind in ("wide", "same")},
                "checks": [{"claim": c, "found": f, "holds": h} for c, f, h in checks(rows, options.bars)],
                "machine": {"platform": platform.platform(), "cpus": os.cpu_count()},
                "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
                "date": datetime.now(UTC).date().isoformat(),
            })  # fmt: skip
    show(rows, options.bars)


if __name__ == "__main__":
    main()
