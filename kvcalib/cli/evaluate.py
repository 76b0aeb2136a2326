"""The command `eval`: what an artifact costs, on text or a task, with and without eviction, beside baselines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from kvcalib.cli.commands import app
from kvcalib.cli.comparing import print_comparison, print_task
from kvcalib.cli.options import (
    BatchOption,
    DataOption,
    DeviceOption,
    DtypeOption,
    MemoryOption,
    OffloadOption,
    RemoteOption,
    RevisionOption,
    SeedOption,
)
from kvcalib.cli.tables import print_evaluations, print_passkeys, print_summaries
from kvcalib.cli.terminal import errors, make_settings, quiet_libraries
from kvcalib.errors import InputError


@app.command("eval")
def evaluate(
    artifact: Annotated[
        list[str] | None,
        typer.Argument(help="Artifact folders or Hub ids; none with --compare.", metavar="ARTIFACT..."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Model folder or Hub id; default: the one the artifact names.")
    ] = None,
    data: DataOption = "builtin",
    samples: Annotated[int, typer.Option(min=1, help="Sequences.")] = 16,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens per sequence.")] = 2048,
    skip: Annotated[int, typer.Option(min=0, help="Sequences of a file or data set left out at its start.")] = 0,
    sinks: Annotated[int | None, typer.Option(min=0, help="First tokens kept exact; default: the artifact's.")] = None,
    recent: Annotated[
        float | None,
        typer.Option(min=0, help="Last tokens kept exact; default: the artifact's. With --keep: that always stay."),
    ] = None,
    prefill: Annotated[
        str, typer.Option(help="quantized, or exact: score the second half after an exact prefill of the first.")
    ] = "quantized",
    step: Annotated[
        int | None,
        typer.Option(min=1, help="Feed this many tokens a pass, as decoding does; with --adaptive 1, with --keep 8."),
    ] = None,
    task: Annotated[
        str,
        typer.Option(
            help="text, summaries (ROUGE; --data is a .jsonl of article, summary_gt), passkey, recall (passages word "
            "for word, and pass keys), or greedy (where generations leave the unquantized model's)."
        ),
    ] = "text",
    compare: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC,SPEC,...",
            help="Beside baselines, with intervals: names with settings, as fp16,kivi:bits=2:residual=32.",
        ),
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="With --compare: folder of a run, for baselines that need a calibration.")
    ] = None,
    recall: Annotated[
        bool, typer.Option("--recall", help="With --compare: verbatim recall and pass keys too.")
    ] = False,
    greedy: Annotated[
        int | None,
        typer.Option(min=1, help="With --compare: greedy generations of this many tokens too; --task greedy: 512."),
    ] = None,
    costs: Annotated[bool, typer.Option("--costs", help="With --compare: time and device memory too.")] = False,
    trials: Annotated[int | None, typer.Option(min=1, help="Of recall, at each length and depth; default 4.")] = None,
    passage: Annotated[
        str | None,
        typer.Option(help="What recall plants: random (tokens), text, or auto: random if the model can copy."),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="NAME,NAME,...", help="Tasks of lm-evaluation-harness too; needs the extra eval."),
    ] = None,
    task_limit: Annotated[int | None, typer.Option(min=1, help="With --tasks: examples of each.")] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="With --tasks: folder of further tasks (YAML), as of local data.")
    ] = None,
    fewshot: Annotated[int | None, typer.Option(min=0, help="With --tasks: examples in the prompt.")] = None,
    keep: Annotated[
        float | None,
        typer.Option(help="Tokens that stay: below 1 a share of those seen, else a number. Scores continuations."),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(help="Which stay: qhitter (default), h2o, window, qhitter-published, full. May be given again."),
    ] = None,
    age_norm: Annotated[
        bool, typer.Option("--age-norm/--no-age-norm", help="qhitter: attention per query, or the published sum.")
    ] = True,
    streaming: Annotated[
        bool, typer.Option("--streaming", help="Positions within the cache: text without end. Give --keep as well.")
    ] = False,
    per: Annotated[str, typer.Option(help="What chooses its own tokens: auto, head or layer.")] = "auto",
    prompt: Annotated[
        float | None, typer.Option(help="Share of a sequence that is a prompt, not scored; with --keep 0.75.")
    ] = None,
    adaptive: Annotated[
        str | None, typer.Option(help="Measure these adaptive widths too: a folder that `kvcalib tiers` wrote.")
    ] = None,
    keep_exact: Annotated[
        str, typer.Option(help="no, or cpu: an exact copy in host memory, adaptive widths are chosen again.")
    ] = "no",
    every: Annotated[int, typer.Option(min=1, help="Tokens from one such choice to the next.")] = 16,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    max_memory: MemoryOption = None,
    offload: OffloadOption = None,
    batch_size: BatchOption = None,
    seed: SeedOption = 0,
    json: Annotated[
        Path | None, typer.Option(help="Also write the measures to this file; a stopped eval goes on beside it.")
    ] = None,
    revision: RevisionOption = None,
    trust_remote_code: RemoteOption = False,
) -> None:
    """Perplexity and KLD against the unquantized model, on real packed storage; tasks; eviction; beside baselines."""
    with errors():
        quiet_libraries()
        from kvcalib import launch
        from kvcalib.runtime.loader import load
        from kvcalib.stages import compare as comparing
        from kvcalib.stages import evaluate as stage
        from kvcalib.stages.progress import note

        settings = make_settings(
            stage.EvalSettings, data=data, samples=samples, seq_len=seq_len, skip=skip, sinks=sinks, recent=recent,
            prefill=prefill, step=step, adaptive=adaptive, keep_exact=keep_exact, every=every, dtype=dtype,
            keep=keep, policy=tuple(policy or ()), age_norm=age_norm, streaming=streaming, per=per, prompt=prompt,
            device=device, max_memory=max_memory, offload=offload, batch_size=batch_size, seed=seed,
            revision=revision, trust_remote_code=trust_remote_code,
        )  # fmt: skip
        if task not in (*stage.TASKS, *comparing.TASKS):
            known = ", ".join((*stage.TASKS, *comparing.TASKS))
            raise InputError(f"--task is {task!r}, expected one of {known}")
        chosen: dict[str, Any] = {"run": run, "trials": trials, "passage": passage, "greedy": greedy}
        chosen |= {"recall": recall or None, "costs": costs or None}
        chosen = {option: value for option, value in chosen.items() if value is not None}
        harness = _task_settings(tasks, task, limit=task_limit, include_path=include_path, fewshot=fewshot)
        _check_together(task, compare, set(chosen))
        if not artifact and compare is None:
            raise InputError("no ARTIFACT is given; name one, or baselines with --compare")
        if not artifact and model is None:
            raise InputError("--model is missing: without an ARTIFACT nothing else names the model; give --model")
        here = launch.here()
        with here.step("eval"):
            loaded = [load(a) for a in artifact or ()]
        name = model or loaded[0].manifest.model.name
        if task == "text" and (compare is not None or harness is not None):
            options = _compared(compare, harness, chosen)
            compared = comparing.run(loaded, name, settings, options, json, launch=here)
            if here.first:
                print_comparison(compared)
        elif task == "text":
            measured = stage.run(loaded, name, settings, json, here=here)
            if here.first:
                print_evaluations(measured)
        else:
            with here.step("eval"):  # tasks are few trials: the first process does them
                if not here.first:
                    return
                if here.size > 1:
                    note(f"eval: --task {task} is measured by the first of {here.size} processes alone")
                if task == "summaries":
                    print_summaries(stage.run_summaries(loaded, name, settings, json))
                elif task == "passkey":
                    print_passkeys(stage.run_passkey(loaded, name, settings, json))
                else:
                    options = _compared(compare, harness, chosen)
                    print_task(comparing.run_task(cast("comparing.Task", task), loaded, name, settings, options, json))


def _compared(compare: str | None, harness: Any, chosen: dict[str, Any]) -> Any:
    """The settings of a comparison."""
    from kvcalib.stages.compare import CompareSettings

    specs = tuple(part.strip() for part in (compare or "").split(",") if part.strip())
    return make_settings(CompareSettings, specs=specs, tasks=harness, **chosen)


def _task_settings(names: str | None, task: str, **chosen: Any) -> Any:
    """What `--tasks` and its options say, None without it."""
    from kvcalib.stages.tasks import TaskSettings

    given = [option for option, value in chosen.items() if value is not None]
    if names is None:
        if given:
            option = {"limit": "task-limit"}.get(given[0], given[0].replace("_", "-"))
            raise InputError(f"--{option} is for tasks of lm-eval; give --tasks as well, such as --tasks hellaswag")
        return None
    if task != "text":
        raise InputError(f"--tasks and --task {task} exclude each other; measure one after the other")
    listed = tuple(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    if not listed:
        raise InputError(f"--tasks is {names!r}, expected names with commas between them, as hellaswag,arc_easy")
    return make_settings(TaskSettings, names=listed, **chosen)


def _check_together(task: str, compare: str | None, chosen: set[str]) -> None:
    """InputError if an option is given where it says nothing."""
    if compare is not None and task not in ("text", "recall", "greedy"):
        raise InputError(f"--compare and --task {task} exclude each other; compare text, recall or greedy")
    if compare is not None and not compare.strip(" ,"):
        raise InputError(f"--compare is {compare!r}, expected names with commas between them, as fp16,kivi")
    recalls, of_text = {"trials", "passage"}, {"recall", "greedy", "costs"}
    if chosen & recalls and task != "recall" and "recall" not in chosen:
        raise InputError(f"--{min(chosen & recalls)} is for recall; give --recall with --compare, or --task recall")
    own = {"recall": recalls, "greedy": {"greedy"}}.get(task, set())
    beside = {"run"} if task != "text" else {"run"} | recalls | of_text
    for option in sorted(chosen - own):
        instead = f", or --task {option}" if option in ("recall", "greedy") else ""
        if compare is None:
            raise InputError(
                f"--{option} is for a comparison; give --compare as well, such as --compare fp16,kivi{instead}"
            )
        if option not in beside:
            raise InputError(f"--{option} and --task {task} exclude each other; leave --task out to measure both")
