"""Stage `eval`: artifacts, a model and text to measures.

`run` measures text: perplexity as `evaluation/perplexity.py` says, or, where tokens are evicted, continuations as
`evaluation/continuation.py` says. Its batches are shared out over the processes of a launch and kept beside the JSON
until that is written (`kept.py`). `run_summaries` and `run_passkey` are the other tasks, of one process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, Field, field_validator, model_validator

from kvcalib import __version__
from kvcalib.errors import InputError
from kvcalib.evaluation.continuation import MOST_STEP, PROMPT, STEP, evaluate_continuations
from kvcalib.evaluation.passkey import Passkey, evaluate_passkey, make_needles
from kvcalib.evaluation.perplexity import Evaluation, evaluate
from kvcalib.evaluation.summaries import Summaries, evaluate_summaries, read_articles
from kvcalib.evaluation.trials import Trial
from kvcalib.files import hash_bytes, write_json
from kvcalib.launch import Launch
from kvcalib.model.identity import identify
from kvcalib.model.loading import load_tokenizer
from kvcalib.model.text import token_sequences
from kvcalib.runtime.adaptive import KeepExact
from kvcalib.runtime.eviction import Eviction, Per
from kvcalib.runtime.loader import Artifact, Prefill, check_fit, load, longest_context, prove
from kvcalib.runtime.policies import Policy, QHitter, find
from kvcalib.runtime.tiers import Adaptive, load_adaptive
from kvcalib.stages.fisher import check_vocabulary
from kvcalib.stages.kept import Kept, beside
from kvcalib.stages.loading import ModelSettings
from kvcalib.stages.progress import note, progress

TASKS = ("text", "summaries", "passkey")


class EvalSettings(ModelSettings):
    """Settings of the stage."""

    data: str = "builtin"
    samples: int = Field(default=16, ge=1)
    seq_len: int = Field(default=2048, ge=2)
    skip: int = Field(default=0, ge=0, description="Sequences of a file or Hub data set left out at its start.")
    sinks: int | None = Field(default=None, ge=0)
    recent: float | None = Field(
        default=None, ge=0, description="Tokens that stay exact; below 1: share never evicted."
    )
    prefill: Prefill = Field(default="quantized", description="See `runtime.loader.attach`.")
    step: int | None = Field(default=None, ge=1, description="Tokens of a pass; see `evaluation/perplexity.py`.")
    adaptive: str | None = Field(default=None, description="Folder that `kvcalib tiers` wrote, measured too.")
    keep_exact: KeepExact = Field(default="no", description="Where adaptive widths keep an exact copy.")
    every: int = Field(default=16, ge=1, description="Tokens between two choices, with keep_exact.")
    keep: float | None = Field(default=None, gt=0, description="Tokens that stay; below 1: share of those seen.")
    policy: tuple[str, ...] = Field(default=(), description="Eviction policies, one row each beside the artifact's.")
    age_norm: bool = Field(default=True, description="Attention per query that saw a token, not the published sum.")
    streaming: bool = Field(default=False, description="Positions within the cache: text beyond the model's context.")
    per: Per = Field(default="auto", description="What chooses its own tokens: auto, head or layer.")
    prompt: float | None = Field(default=None, gt=0, lt=1, description="Share of a sequence that is its prompt.")
    batch_size: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=-(2**63), lt=2**63)

    @field_validator("recent", "keep")
    @classmethod
    def _count_or_share(cls, value: float | None) -> float | None:
        if value is not None and value >= 1 and value != int(value):
            raise ValueError("expected a share below 1 or a whole number of tokens")
        return value

    @property
    def share(self) -> float | None:
        """`recent` if it is a share."""
        return self.recent if self.recent is not None and 0 < self.recent < 1 else None

    @property
    def recent_tokens(self) -> int | None:
        """`recent` if it is a number of exact tokens; with eviction it is what always stays."""
        return None if self.recent is None or self.keep is not None else int(self.recent)

    @property
    def evicts(self) -> bool:
        """Whether continuations are measured."""
        return self.keep is not None or bool(self.policy) or self.prompt is not None

    @property
    def evictions(self) -> list[Eviction]:
        """One for every policy.

        Raises:
            ValueError: as `Eviction`.
        """
        policies = self.policy or (() if self.keep is None else ("qhitter",))
        keep = 1.0 if self.keep is None else self.keep
        return [
            Eviction(
                keep=int(keep) if keep > 1 else keep,
                recent=self.recent,
                policy=find(policy) if self.age_norm else without_age(policy),
                streaming=self.streaming,
                per=self.per,
            )
            for policy in policies
        ]

    @model_validator(mode="after")
    def _eviction(self) -> EvalSettings:
        if self.keep is None and any(policy != "full" for policy in self.policy):
            raise ValueError(f"--policy {self.policy[0]} needs a budget; give --keep, such as --keep 0.2")
        for name, given in (("streaming", self.streaming), ("no-age-norm", not self.age_norm)):
            if given and self.keep is None:
                raise ValueError(f"--{name} is for eviction; give --keep, such as --keep 0.2")
        if self.share is not None and self.keep is None:
            raise ValueError(f"--recent is {self.recent:g}, a share of tokens never evicted; give --keep as well")
        if self.evicts and self.step is not None and self.step > MOST_STEP:
            raise ValueError(f"--step is {self.step}, expected at most {MOST_STEP}: longer passes count as prompts")
        if self.evicts and self.seq_len < 3:
            raise ValueError(f"--seq-len is {self.seq_len}, expected at least 3: a prompt and two tokens after it")
        if not self.age_norm and not {"qhitter"} & set(self.policy or ("qhitter",)):
            raise ValueError("--no-age-norm is for the policy qhitter; add --policy qhitter")
        for eviction in self.evictions:
            assert eviction.keep
        return self


def run(
    artifacts: Sequence[Artifact | str | Path],
    model_name: str,
    settings: EvalSettings,
    json_path: Path | None = None,
    model: Any = None,
    here: Launch | None = None,
    discard: bool = False,
) -> list[Evaluation]:
    """Measure `artifacts` on one model and text; writes a JSON object (a list for several) to `json_path`.

    Args:
        json_path: None to write nothing; then nothing is kept either, and a stopped measurement begins anew.
        model: the loaded model, where the caller has it already.
        here: the processes that share the batches; all of them call this and get all results, the first one writes
            them. This one alone if None.
        discard: another unfinished measurement beside `json_path` is removed.

    Raises:
        FolderInUse: there is one, and `discard` is False; names what differs.
    """
    here = here or Launch()
    with here.step("eval"):
        check_json(json_path)
        loaded = loaded_artifacts(artifacts)
        adaptive = _adaptive(settings)
        tokenizer = load_tokenizer(model_name, settings.revision, settings.trust_remote_code)
        sequences = token_sequences(
            settings.data, tokenizer, settings.samples, settings.seq_len, "evaluate", settings.seed, settings.skip
        )
        if len(sequences) < settings.samples:
            note(f"eval: data {settings.data!r} gives {len(sequences)} sequences, not {settings.samples}")
        model = model if model is not None else loaded_model(model_name, settings, here)
        check_vocabulary(model, sequences, settings.data)
        check_budgets(model, settings)
        batch_size = settings.batch_size or max(1, 2048 // settings.seq_len)
        more = {"adaptive": None if adaptive is None else adaptive.describe()}
        of = subject_of(model, loaded, sequences, settings, batch_size) | more
    with Kept(here, beside(json_path), of, discard=discard) as keeper:
        with progress("eval", len(sequences), "sequences") as show:
            if settings.evicts:
                step = settings.step or STEP
                recent, prefill = settings.recent_tokens, settings.prefill
                if adaptive is not None:
                    # All read the same tokens exactly; see `evaluation/perplexity.py`.
                    recent, prefill = adaptive.rule.window + step - 1, "exact"
                results = evaluate_continuations(
                    model, trials(loaded, settings, adaptive), sequences, settings.sinks, recent, batch_size, show,
                    prefill, settings.prompt or PROMPT, step, keeper,
                )  # fmt: skip
            else:
                results = evaluate(
                    model, loaded, sequences, settings.sinks, settings.recent_tokens, batch_size, show,
                    settings.prefill, settings.step, adaptive, keeper,
                )  # fmt: skip
        with here.step("eval"):
            if here.first:
                _write(json_path, results)
    return results


def subject_of(
    model: Any, artifacts: Sequence[Artifact], sequences: np.ndarray, settings: EvalSettings, batch_size: int
) -> dict[str, Any]:
    """Everything that the figures of a batch depend on, as JSON."""
    elsewhere = {"dtype", "device", "batch_size", "revision", "trust_remote_code", "adaptive"}
    identity = identify(model)
    return settings.model_dump(mode="json", exclude=elsewhere) | {
        "version": __version__,
        "artifacts": [hash_bytes(artifact.manifest.encode()) for artifact in artifacts],
        "weights_sha256": identity.weights_sha256,
        "rope_parameters_sha256": identity.rope_parameters_sha256,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "batch_size": batch_size,
        "token_ids_sha256": hashlib.sha256(sequences.astype("<i8").tobytes()).hexdigest(),
    }


def run_summaries(
    artifacts: Sequence[Artifact | str | Path],
    model_name: str,
    settings: EvalSettings,
    json_path: Path | None = None,
    model: Any = None,
) -> list[Summaries]:
    """ROUGE of the unquantized model's summaries and of each trial's; `settings.data` is a .jsonl file of articles."""
    check_json(json_path)
    loaded = loaded_artifacts(artifacts)
    compared = trials(loaded, settings, _adaptive(settings))
    articles = read_articles(settings.data, settings.samples)
    if len(articles) < settings.samples:
        note(f"eval: data {settings.data!r} has {len(articles)} articles, not {settings.samples}")
    tokenizer = load_tokenizer(model_name, settings.revision, settings.trust_remote_code)
    model = model if model is not None else loaded_model(model_name, settings)
    with progress("eval", len(articles), "articles") as show:
        results = evaluate_summaries(
            model, tokenizer, _rotations(model, loaded, settings), compared, articles, settings.sinks,
            settings.recent_tokens, settings.prefill, on_article=show,
        )  # fmt: skip
    _write(json_path, results)
    return results


def run_passkey(
    artifacts: Sequence[Artifact | str | Path],
    model_name: str,
    settings: EvalSettings,
    json_path: Path | None = None,
    model: Any = None,
) -> list[Passkey]:
    """Passkey retrieval at a quarter, a half and all of `settings.seq_len`, `settings.samples` prompts of each."""
    check_json(json_path)
    loaded = loaded_artifacts(artifacts)
    compared = trials(loaded, settings, _adaptive(settings))
    tokenizer = load_tokenizer(model_name, settings.revision, settings.trust_remote_code)
    lengths = sorted({settings.seq_len // 4, settings.seq_len // 2, settings.seq_len})
    needles = make_needles(tokenizer, lengths, settings.samples, settings.seed)
    model = model if model is not None else loaded_model(model_name, settings)
    with progress("eval", len(needles), "prompts") as show:
        results = evaluate_passkey(
            model, _rotations(model, loaded, settings), compared, needles, settings.sinks, settings.recent_tokens,
            settings.prefill, settings.seed, show,
        )  # fmt: skip
    _write(json_path, results)
    return results


def trials(artifacts: Sequence[Artifact], settings: EvalSettings, adaptive: Adaptive | None = None) -> list[Trial]:
    """Each artifact, and then `adaptive`, without eviction and with every policy."""
    kinds: list[tuple[Artifact, Adaptive | None]] = [(a, None) for a in artifacts]
    if adaptive is not None:
        kinds.append((artifacts[0], adaptive))
    return [Trial(a, eviction, widths) for a, widths in kinds for eviction in (None, *settings.evictions)]


def without_age(policy: str) -> Policy:
    """The policy of that name, its attention the published sum over queries."""
    return QHitter(age_norm=False) if policy == QHitter.name else find(policy)


def loaded_artifacts(artifacts: Sequence[Artifact | str | Path]) -> list[Artifact]:
    """Those that are named, loaded."""
    return [a if isinstance(a, Artifact) else load(a) for a in artifacts]


def _adaptive(settings: EvalSettings) -> Adaptive | None:
    if settings.adaptive is not None:
        return load_adaptive(settings.adaptive, settings.keep_exact, settings.every)
    if settings.keep_exact != "no":
        raise InputError(
            f"--keep-exact is {settings.keep_exact!r} without --adaptive; give the folder of `kvcalib tiers`"
        )
    return None


def loaded_model(name: str, settings: EvalSettings, here: Launch | None = None) -> Any:
    """The model, as the settings say, on this process's own device if they leave it open."""
    return settings.load(name, (here or Launch()).own_device(settings.device))


def check_budgets(model: Any, settings: EvalSettings) -> None:
    """InputError unless the model's context has tokens enough for `settings.keep`."""
    for eviction in settings.evictions:
        try:
            eviction.within(longest_context(model))
        except ValueError as error:
            raise InputError(f"--{error}") from None


def _rotations(model: Any, artifacts: Sequence[Artifact], settings: EvalSettings) -> Any:
    check_budgets(model, settings)
    for artifact in artifacts:
        check_fit(artifact, model)
    return prove(model, sorted({i for artifact in artifacts for i in artifact.quantizers}))


def check_json(path: Path | None) -> None:
    """InputError if no file can be at `path`."""
    if path is not None and path.is_dir():
        raise InputError(f"--json {path}: is a folder, expected a file")


def _write(path: Path | None, results: Sequence[BaseModel]) -> None:
    if path is not None:
        rows = [r.model_dump(mode="json") for r in results]
        write_json(path, rows[0] if len(rows) == 1 else rows)
