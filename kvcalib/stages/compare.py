"""Stage `eval --compare`: artifacts and baselines on one model and text, to a table and one JSON.

`run` measures text as `evaluation/compare.py` says, and recall, greedy generations and costs where asked. `run_task`
measures one of recall and greedy alone. Batches of text are shared out over the processes of a launch and kept beside
the JSON (`kept.py`); what is no text is measured by the first process alone, anew each time: its trials are few, and
times of processes that share a machine would say little.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from kvcalib.calibration.statistics import Calibration
from kvcalib.errors import InputError
from kvcalib.evaluation import costs, greedy
from kvcalib.evaluation import recall as recalling
from kvcalib.evaluation.baselines import CALIBRATES, Calibrated, find
from kvcalib.evaluation.compare import check_names, compare
from kvcalib.evaluation.comparison import Comparison, Greedy, RecallPoint, Row, TaskComparison, TaskRow
from kvcalib.evaluation.contender import ArtifactContender, Contender, Unquantized
from kvcalib.evaluation.continuation import PROMPT, STEP, split
from kvcalib.evaluation.failures import Failures
from kvcalib.evaluation.passes import batches
from kvcalib.evaluation.passkey import DIGITS, Needle
from kvcalib.evaluation.provenance import machine, now, versions
from kvcalib.files import write_json
from kvcalib.launch import Launch
from kvcalib.model.identity import HARD, identify
from kvcalib.model.loading import load_tokenizer
from kvcalib.model.text import token_sequences
from kvcalib.rundir import CALIBRATION, RunDir, fingerprint
from kvcalib.runtime.loader import Artifact, check_fit
from kvcalib.stages import calibrated
from kvcalib.stages.evaluate import (
    EvalSettings,
    check_budgets,
    check_json,
    loaded_artifacts,
    loaded_model,
    subject_of,
)
from kvcalib.stages.fisher import check_vocabulary
from kvcalib.stages.kept import Kept, beside
from kvcalib.stages.progress import note, progress
from kvcalib.stages.tasks import Harness, TaskSettings

Task = Literal["recall", "greedy"]
TASKS: tuple[Task, ...] = ("recall", "greedy")
SHORTEST = 8
"""Tokens of a text that a timing needs."""


class CompareSettings(BaseModel):
    """What is compared, and which measures beside those of the text are taken."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    specs: tuple[str, ...] = Field(default=(), description="Baselines; see `evaluation/baselines`.")
    run: Path | None = Field(default=None, description="Run folder, for baselines that need a calibration.")
    recall: bool = False
    trials: int = Field(default=recalling.TRIALS, ge=1, description="Of recall, at each length and depth.")
    passage: Literal["auto", "random", "text"] = Field(default="auto", description="What verbatim recall plants.")
    greedy: int | None = Field(default=None, ge=1, description="Tokens to generate, at most.")
    costs: bool = False
    tasks: TaskSettings | None = Field(default=None, description="Of lm-evaluation-harness.")


@dataclass
class _Setting:
    """What all measures of one call share."""

    model: Any
    tokenizer: Any
    sequences: np.ndarray
    settings: EvalSettings
    options: CompareSettings
    contenders: list[Contender]
    failures: Failures = field(default_factory=Failures)
    protocols: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def batch_size(self) -> int:
        return self.settings.batch_size or max(1, 2048 // self.settings.seq_len)


def run(
    artifacts: Sequence[Artifact | str | Path],
    model_name: str,
    settings: EvalSettings,
    options: CompareSettings,
    json_path: Path | None = None,
    model: Any = None,
    launch: Launch | None = None,
    discard: bool = False,
) -> Comparison:
    """Compare `artifacts` and `options.specs` with the unquantized model, and with each other; writes `json_path`.

    Args:
        json_path: None to write nothing; then nothing is kept either, and a stopped comparison begins anew.
        launch: the processes that share the batches of text; all of them call this. What is no text only the first one
            measures, and has in its result. This one alone if None.
        discard: another unfinished measurement beside `json_path` is removed, not refused.

    Raises:
        InputError: settings that do not go together, a spec that is none, or not one contender could be measured.
        ArtifactMismatch: an artifact was built for another model. FolderInUse: beside `json_path` lies another
            unfinished measurement; names what differs.
    """
    launch = launch or Launch()
    harness: Harness | None = None
    with launch.step("eval"):
        _check_one_pass(settings)
        if options.tasks is not None and launch.first:
            harness = Harness(options.tasks, model_name, settings.seq_len)
        here = _prepare(artifacts, model_name, settings, options, json_path, model, launch)
        if options.costs and settings.seq_len < SHORTEST:
            raise InputError(f"--costs needs sequences of at least {SHORTEST} tokens, --seq-len is {settings.seq_len}")
        if options.greedy is not None:
            greedy.room(here.model, settings.seq_len // 2, options.greedy)
        prompt = split(settings.seq_len, settings.prompt or PROMPT) if settings.evicts else 0
        of = _subject(here)
    with Kept(launch, beside(json_path), of, discard=discard) as keeper:
        with progress("compare", len(here.sequences), "sequences") as show:
            found = compare(
                here.model, here.contenders, here.sequences, here.batch_size, prompt, settings.step or STEP,
                settings.seed, data=settings.data, on_batch=show, failures=here.failures, keeper=keeper,
            )  # fmt: skip
        with launch.step("eval"):
            standing = here.failures.standing(here.contenders)
            if not standing or (len(here.contenders) > 1 and all(isinstance(each, Unquantized) for each in standing)):
                keeper.forget()
                raise InputError(f"no contender could be measured; {'; '.join(found.notes)}")
            result = found
            if launch.first:
                result = _with_extras(found, here, harness, model_name)
                if json_path is not None:
                    write_json(json_path, result.model_dump(mode="json"))
    return result


def _with_extras(found: Comparison, here: _Setting, harness: Harness | None, model_name: str) -> Comparison:
    """The comparison of text, and beside it what else was asked for."""
    options = here.options
    told = set(here.failures)
    extras: dict[str, dict[str, Any]] = {each.name: {} for each in here.contenders}
    if options.recall:
        _merge(extras, "recall", _recall(here))
    if options.greedy is not None:
        _merge(extras, "greedy", _greedy(here, options.greedy))
    if options.costs:
        for name, each in _costs(here).items():
            extras[name] |= vars(each)
    if harness is not None:
        here.protocols["tasks"] = harness.protocol
        with progress("tasks", len(here.failures.standing(here.contenders)), "contenders") as show:
            given = (here.model, here.tokenizer, here.contenders, here.failures, here.batch_size, show)
            _merge(extras, "tasks", harness.run(*given))
    late = [f"{name}: not measured further: {why}" for name, why in here.failures.items() if name not in told]
    return found.model_copy(
        update={
            "model": model_name,
            "rows": [_with(row, extras.get(row.name, {})) for row in found.rows],
            "protocols": here.protocols,
            "notes": [*found.notes, *here.notes, *late],
        }
    )


def _subject(here: _Setting) -> dict[str, Any]:
    """Everything that the figures of a batch depend on."""
    artifacts = [each.artifact for each in here.contenders if isinstance(each, ArtifactContender)]
    run = here.options.run
    return subject_of(here.model, artifacts, here.sequences, here.settings, here.batch_size) | {
        "compared": [[each.name, each.settings] for each in here.contenders],
        "calibration": None if run is None else fingerprint(RunDir(run).settings("fisher")),
    }


def run_task(
    task: Task,
    artifacts: Sequence[Artifact | str | Path],
    model_name: str,
    settings: EvalSettings,
    options: CompareSettings,
    json_path: Path | None = None,
    model: Any = None,
) -> TaskComparison:
    """Recall or greedy generations alone, the unquantized model first; writes `json_path`.

    Raises:
        InputError: as `run`; no recall fits the length. ArtifactMismatch: an artifact was built for another model.
    """
    here = _prepare(artifacts, model_name, settings, options, json_path, model)
    points: dict[str, list[RecallPoint]] = {}
    generations: dict[str, Greedy] = {}
    if task == "recall":
        points = _recall(here)
        if not any(points.values()):
            raise InputError("; ".join(here.notes))
    else:
        generations = _greedy(here, options.greedy or greedy.TOKENS)
    if len(here.contenders) > 1 and len(here.failures) == len(here.contenders) - 1:
        raise InputError(f"no contender could be measured; {'; '.join(here.failures.values())}")
    late = [f"{name}: not measured: {why}" for name, why in here.failures.items()]
    result = TaskComparison(
        task=task,
        model=model_name,
        dtype=str(here.model.dtype).removeprefix("torch."),
        data=settings.data,
        seed=settings.seed,
        protocol=here.protocols[task],
        notes=[*here.notes, *late],
        created=now(),
        machine=machine(),
        versions=versions(),
        rows=[
            TaskRow(
                name=each.name,
                source=each.source,
                settings=each.settings,
                recall=points.get(each.name),
                greedy=generations.get(each.name),
                failed=here.failures.get(each.name),
            )
            for each in here.contenders
        ],
    )
    if json_path is not None:
        write_json(json_path, result.model_dump(mode="json"))
    return result


def calibrated_of(folder: Path, model: Any) -> Calibrated:
    """The token sample of a run, for the baselines that are fitted to one.

    Raises:
        InputError: no run or calibration there, or it is of another model.
    """
    run_dir = RunDir(folder)
    run_dir.settings("fisher")
    calibration, _ = Calibration.load(run_dir.file(CALIBRATION))
    for apart in calibration.info.model.differences(identify(model), HARD):
        raise InputError(f"--run {folder}: calibrated on another model: this model's {apart}; give a run of this one")
    return calibrated.sample_of(calibration, str(run_dir.path))


def _check_one_pass(settings: EvalSettings) -> None:
    """InputError for settings that one pass over a text does not show."""
    if not settings.evicts:
        for name, given in (("--prefill exact", settings.prefill == "exact"), ("--step", settings.step is not None)):
            if given:
                raise InputError(f"{name} is for sequences with a prompt; give --prompt as well, such as --prompt 0.5")


def _prepare(
    artifacts: Sequence[Artifact | str | Path],
    model_name: str,
    settings: EvalSettings,
    options: CompareSettings,
    json_path: Path | None,
    model: Any,
    launch: Launch | None = None,
) -> _Setting:
    check_json(json_path)
    if settings.adaptive is not None:
        raise InputError("--adaptive is not measured with --compare, recall and greedy; leave it out")
    loaded = loaded_artifacts(artifacts)
    tokenizer = load_tokenizer(model_name, settings.revision, settings.trust_remote_code)
    sequences = token_sequences(
        settings.data, tokenizer, settings.samples, settings.seq_len, "evaluate", settings.seed, settings.skip
    )
    if len(sequences) < settings.samples:
        note(f"eval: data {settings.data!r} gives {len(sequences)} sequences, not {settings.samples}")
    needing = [spec for spec in options.specs if spec.strip().split(":")[0] in CALIBRATES]
    if needing and options.run is None:
        raise InputError(f"--compare {needing[0]} is fitted to a calibration; give --run, a folder of `kvcalib fisher`")
    if options.run is not None and not needing:
        raise InputError(
            f"--run is for baselines that need a calibration ({', '.join(CALIBRATES) or 'none does'}); leave it out"
        )
    for spec in options.specs:
        if spec not in needing:
            find(spec)  # before a model is loaded
    model = model if model is not None else loaded_model(model_name, settings, launch)
    check_vocabulary(model, sequences, settings.data)
    check_budgets(model, settings)
    for artifact in loaded:
        check_fit(artifact, model)
    sample = None if options.run is None else calibrated_of(options.run, model)
    baselines = [find(spec, sample) for spec in options.specs]
    ours = _named(loaded, settings)
    contenders = [Unquantized(), *ours, *(each for each in baselines if not isinstance(each, Unquantized))]
    check_names(contenders)
    return _Setting(model, tokenizer, sequences, settings, options, contenders)


def _named(artifacts: Sequence[Artifact], settings: EvalSettings) -> list[Contender]:
    """Each artifact without eviction, then with every policy; by their folders' names where these differ."""
    names = [a.path.name if a.path else a.manifest.model.name for a in artifacts]
    found: list[Contender] = []
    for artifact, short in zip(artifacts, names, strict=True):
        name = short if names.count(short) == 1 else str(artifact.path)
        for eviction in (None, *settings.evictions):
            suffix = "" if eviction is None else f":{eviction.rule.name}:keep={eviction.keep:g}"
            found.append(
                ArtifactContender(
                    artifact, name + suffix, settings.sinks, settings.recent_tokens, settings.prefill, eviction
                )
            )
    return found


def _recall(here: _Setting) -> dict[str, list[RecallPoint]]:
    """Verbatim recall and pass keys at a quarter, a half and all of the sequences' length, where they fit."""
    longest = here.sequences.shape[1]
    lengths = sorted({longest // 4, longest // 2, longest})
    passage, plants = _plants(here, lengths)
    needles: list[Needle] = []
    for length in lengths:
        try:
            needles += recalling.make_keys(here.tokenizer, [length], here.options.trials, seed=here.settings.seed)
        except InputError as error:
            here.notes.append(f"passkey: {error}")
    here.protocols["recall"] = recalling.PROTOCOL.format(
        depths=", ".join(f"{depth:g}" for depth in recalling.DEPTHS), trials=here.options.trials,
        passage="random tokens" if passage == "random" else "text from elsewhere", size=recalling.CUE + recalling.ASKED,
        cue=recalling.CUE, step=recalling.STEP, digits=DIGITS, seed=here.settings.seed,
    )  # fmt: skip
    count = len(here.failures.standing(here.contenders))
    with progress("recall", count * (len(plants) + len(needles)), "trials") as show:
        found = recalling.measure_recall(
            here.model, here.contenders, plants, needles, passage, here.failures, here.batch_size, show
        )
    exact = [point.exact for point in found[Unquantized.name] if point.kind == "verbatim"]
    if exact and statistics.fmean(exact) < recalling.RECALLS:
        here.notes.append(
            f"recall: the unquantized model itself repeats {100 * statistics.fmean(exact):.0f} % of passages whole; "
            "shares say little of a model that cannot copy, compare NLLs with its own and with the blind one"
        )
    return found


def _plants(here: _Setting, lengths: Sequence[int]) -> tuple[recalling.Passage, list[recalling.Plant]]:
    """What is planted, and the trials, of the lengths that have room."""
    special = set(here.tokenizer.all_special_ids)

    def plants(of: Sequence[int], passage: recalling.Passage) -> list[recalling.Plant]:
        trials, seed = here.options.trials, here.settings.seed
        return recalling.make_plants(here.sequences, of, passage, trials, seed=seed, special=special)

    fitting = []
    for length in lengths:
        try:
            plants([length], "random")
            fitting.append(length)
        except InputError as error:
            here.notes.append(f"verbatim: {error}")
    if not fitting or here.options.passage != "auto":
        passage: recalling.Passage = "random" if here.options.passage == "random" else "text"
        return passage, plants(fitting, passage)
    trial = plants(fitting[:1], "random")
    passage, share = recalling.choose_passage(here.model, trial, here.batch_size)
    if passage == "text":
        here.notes.append(
            f"recall: the unquantized model repeats {100 * share:.0f} % of random tokens, so passages are text; parts "
            "of them can be guessed, as the blind NLL shows"
        )
    return passage, plants(fitting, passage)


def _greedy(here: _Setting, most: int) -> dict[str, Greedy]:
    prompts = here.sequences[: greedy.PROMPTS, : here.sequences.shape[1] // 2]
    tokens = greedy.room(here.model, prompts.shape[1], most)
    if tokens < most:
        here.notes.append(f"greedy: {tokens} tokens fit into the model's context, not {most}")
    here.protocols["greedy"] = greedy.PROTOCOL.format(prompts=len(prompts), prompt=prompts.shape[1], tokens=tokens)
    with progress("greedy", len(prompts), "prompts") as show:
        return greedy.measure_greedy(here.model, here.contenders, prompts, tokens, here.failures, show)


def _costs(here: _Setting) -> dict[str, costs.Costs]:
    (ids,) = batches(here.model, here.sequences[:1], 1)
    tokens = min(costs.NEW_TOKENS, ids.shape[1] // 2)
    here.protocols["costs"] = costs.PROTOCOL.format(prompt=ids.shape[1] - tokens, tokens=tokens, rounds=costs.ROUNDS)
    with progress("costs", costs.ROUNDS + 1, "rounds") as show:
        return costs.measure_costs(here.model, here.contenders, ids, here.failures, tokens, on_round=show)


def _merge(extras: dict[str, dict[str, Any]], name: str, found: dict[str, Any]) -> None:
    for contender, value in found.items():
        extras[contender][name] = value


def _with(row: Row, extra: dict[str, Any]) -> Row:
    """The row with further measures, checked."""
    return row if not extra else Row.model_validate(row.model_dump() | extra)
