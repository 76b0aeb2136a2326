"""Quality at equal bytes: kvcalib beside every baseline, at about 4, 3, 2.5 and 2 effective bits, in one run.

    python bench/quality.py [--model MODEL --data SRC --eval-data SRC] [--samples N] [--seq-len N] [--json PATH]
    python bench/quality.py --show          print what the JSON holds
    python bench/quality.py --readme        remake the README's table and plot from the JSON

Always the demo model on its own text; `--model` adds another. Of each: one calibration (16 sequences), artifacts of
several budgets, and in one go through the held-out text every contender, one pass a sequence on an empty cache
(`evaluation/compare.py`). Q-Hitter evicts, so it is measured on continuations, beside our own eviction of as many
tokens. The JSON holds every comparison whole.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kvcalib.cli.comparing import print_comparison
from kvcalib.evaluation.comparison import Comparison, Row
from kvcalib.files import write_json
from kvcalib.model.loading import BUILTIN, load_model
from kvcalib.report.picture import picture
from kvcalib.report.sections.pareto import pareto
from kvcalib.rundir import RunDir
from kvcalib.stages import allocate, build, compare, fisher, fit_nuq, friendliness
from kvcalib.stages.compare import CompareSettings
from kvcalib.stages.dial import budget_of
from kvcalib.stages.evaluate import EvalSettings
from kvcalib.stages.report_data import from_comparison

ROOT = Path(__file__).parents[1]
OURS = (4.5, 4.0, 3.5, 3.0, 2.5, 2.0)
TARGETS = (4.0, 3.0, 2.5, 2.0)
NEAR = 0.6
"""Effective bits by which a row of the README may miss its column."""
FAMILIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "KVQuant's recipe": ("kvquant-published", (
        "bits=4", "bits=3", "bits=2", "bits=4:outliers=0", "bits=3:outliers=0", "bits=2:outliers=0")),
    "QAQ's recipe": ("qaq-published", ("lowest=3", "lowest=2", "error=0.3", "error=0.3:highest=3", "highest=2")),
    "KIVI": ("kivi", ("bits=3:residual=0", "bits=2:residual=0", "bits=2:group=64:residual=0", "bits=1:residual=0")),
    "Hadamard + Lloyd-Max": ("turboquant", ("bits=4", "bits=3", "bits=2")),
    "NormalFloat": ("nf", ("bits=4", "bits=3", "bits=2")),
    "integers": ("int", ("bits=4", "bits=3", "bits=2")),
    "transformers, HQQ": ("hf-hqq", ("bits=4", "bits=3:key_axis=0:value_axis=0", "bits=2")),
    "transformers, Quanto": ("hf-quanto", ("bits=4", "bits=2")),
}  # fmt: skip
KEEP = 0.2
SAID = {"demo": "Demo model (3.5 M parameters)", "reference": "Llama of 11 M parameters"}
MARKS = ("<!-- quality: made by bench/quality.py --readme -->", "<!-- end of quality -->")
PLOT = "quality-{}.svg"


@dataclass(frozen=True)
class Subject:
    """A model with the text that it is calibrated and measured on."""

    name: str
    model: str
    data: str
    eval_data: str


def specs() -> tuple[str, ...]:
    """Every baseline of the text's comparison, as `eval --compare` takes it."""
    return tuple(f"{label}:{settings}" for label, kinds in FAMILIES.values() for settings in kinds)


def artifacts(subject, options, model):
    """Folder of the run, and of an artifact for each budget, by falling bits."""
    run = RunDir(options.run / subject.name, create=True)
    settings = fisher.FisherSettings(data=subject.data, samples=16, seq_len=512)
    fisher.run(run, subject.model, settings, model=model)
    fit_nuq.run(run, fit_nuq.FitNuqSettings())
    friendliness.run(run)
    made = []
    for bits in OURS:
        path = run.path / f"kvcalib-{bits:g}"
        found, widths = allocate.run(run, allocate.AllocateSettings(budget=bits))
        build.run(run, path, None, None, 0, True, widths, budget_of(found), found.options)
        made.append(path)
    return run.path, made


def measure(subject, options):
    """The two comparisons of one model."""
    model = load_model(subject.model, "float32")
    run, made = artifacts(subject, options, model)
    settings = EvalSettings(
        data=subject.eval_data, samples=options.samples, seq_len=options.seq_len, batch_size=options.batch_size
    )
    text = compare.run(made, subject.model, settings, CompareSettings(specs=specs(), run=run), None, model)
    evicting = settings.model_copy(update={"keep": KEEP, "policy": ("window", "h2o", "qhitter")})
    four = [path for path in made if path.name == "kvcalib-4"]
    options_there = CompareSettings(specs=(f"qhitter-published:keep={KEEP}",))
    continuations = compare.run(four, subject.model, evicting, options_there, None, model)
    # Where a file lies on one machine is nobody else's.
    names = {"model": subject.name, "data": Path(subject.eval_data).name}
    return [found.model_copy(update=names) for found in (text, continuations)]


def nearest(rows: list[Row], target: float) -> Row | None:
    """The row closest to `target` effective bits, of equal ones the better; None if none is within `NEAR`."""
    close = [row for row in rows if row.failed is None and abs(row.effective_bits - target) <= NEAR]
    return min(close, key=lambda row: (round(abs(row.effective_bits - target), 1), row.kld.value), default=None)


def of_family(found: Comparison, label: str) -> list[Row]:
    """The rows of one baseline, or of "kvcalib"."""
    return [row for row in found.rows if row.name == label or re.match(rf"{label}[:-]\d?", row.name)]


def table_of(found: Comparison) -> list[list[str]]:
    """KLD by family and target, each with the effective bits it was measured at; the header first."""
    lines = [["KLD at effective bits", *(f"about {target:g}" for target in TARGETS)]]
    for name, label in (("**kvcalib**", "kvcalib"), *((name, label) for name, (label, _) in FAMILIES.items())):
        chosen = [nearest(of_family(found, label), target) for target in TARGETS]
        cells = [name]
        for target, row in zip(TARGETS, chosen, strict=True):
            # A row stands once, in the column that it is nearest to.
            near = row is not None and target == min(
                (t for t, other in zip(TARGETS, chosen, strict=True) if other is row),
                key=lambda t: abs(row.effective_bits - t),
            )
            cells.append(f"{row.kld.value:.3g} at {row.effective_bits:.2f}" if near else "")
        lines.append(cells)
    return lines


def show(body, console):
    """Every comparison, then the families at the targets."""
    for entry in body["comparisons"]:
        print_comparison(Comparison.model_validate(entry))
    for found in texts(body):
        header, *lines = table_of(found)
        table = Table(title=f"{found.model}: KLD, nats, at effective bits")
        for column in header:
            table.add_column(column)
        for line in lines:
            table.add_row(*line)
        console.print(table)


def texts(body) -> list[Comparison]:
    """The comparisons of a text in one pass."""
    found = [Comparison.model_validate(entry) for entry in body["comparisons"]]
    return [one for one in found if any(row.name.startswith("kivi") for row in one.rows)]


def markdown(body) -> str:
    """The README's part: a table for every model, what was measured, the plot."""
    lines = []
    for number, found in enumerate(texts(body)):
        header, *rows = table_of(found)
        lines += ["", f"{SAID.get(found.model, found.model)}, {found.samples} x {found.seq_len} held-out tokens:", ""]
        lines += [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]
        lines += ["", f"![KLD against effective bits](docs/images/{PLOT.format(number)})"]
    first = texts(body)[0]
    lines += ["", f"Measured {first.created[:10]} on {first.machine.split(',')[0]}: {first.protocol}."]
    return "\n".join([*lines, ""])


def remake(body, readme: Path) -> None:
    """Put the tables into the README, between its marks, and the plots beside it."""
    for number, found in enumerate(texts(body)):
        section = pareto([from_comparison(found)])
        figure = replace(section.figures[0], title=f"{figure_title(found)}: KLD against size")
        (readme.parent / "docs/images").mkdir(parents=True, exist_ok=True)
        (readme.parent / "docs/images" / PLOT.format(number)).write_text(picture(figure))
    text = readme.read_text()
    before, _, rest = text.partition(MARKS[0])
    _, mark, after = rest.partition(MARKS[1])
    if not mark:
        raise SystemExit(f"{readme}: no {MARKS[0]} ... {MARKS[1]}; put both where the tables shall be")
    readme.write_text(before + MARKS[0] + "\n" + markdown(body) + MARKS[1] + after)


def figure_title(found: Comparison) -> str:
    """The model in a few words."""
    return SAID.get(found.model, found.model)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model folder or Hub id beside the demo's")
    parser.add_argument("--data", default="builtin", help="its calibration text")
    parser.add_argument("--eval-data", help="its held-out text; default: what follows in --data")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--run", type=Path, default=ROOT / "artifacts" / "bench-quality")
    parser.add_argument("--show", action="store_true", help="print what the JSON holds and measure nothing")
    parser.add_argument("--readme", action="store_true", help="remake the README's part from the JSON")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "quality.json")
    options = parser.parse_args()
    console = Console(width=150)
    if options.readme:
        remake(json.loads(options.json.read_text()), ROOT / "README.md")
        return
    if not options.show:
        subjects = [Subject("demo", BUILTIN, BUILTIN, BUILTIN)]
        if options.model:
            where = (options.model, options.data, options.eval_data or options.data)
            subjects.append(Subject(Path(options.model).name, *where))
        found = [one for subject in subjects for one in measure(subject, options)]
        body = {"bench": "quality", "comparisons": [one.model_dump(mode="json") for one in found]}
        write_json(options.json, body)
    show(json.loads(options.json.read_text()), console)


if __name__ == "__main__":
    main()
