"""Tasks of lm-evaluation-harness, for `eval --tasks`: every contender on the same examples.

Names are the harness' own, RULER's and LongBench's among them; `include_path` adds YAML files, as its `--include_path`
does, and a YAML there may take its data from a local file (`dataset_path: json`, `dataset_kwargs: {data_files: ...}`).
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from kvcalib.errors import CacheBypassed, InputError
from kvcalib.evaluation.contender import Contender
from kvcalib.evaluation.failures import Failures
from kvcalib.model.loading import resolve

PROTOCOL = (
    "tasks ({names}): lm-eval {version}, {fewshot}, {limit}; log-likelihoods and generations on the contender's own "
    "cache, prompts included, rows of one length per batch, so that none is padded"
)
SEED = 1234
"""The harness' own default."""

RESAMPLED = 1000
"""Bootstrap replicates of a standard error that no formula gives."""

UNREACHABLE = ("datasets", "huggingface_hub", "requests", "urllib3", "httpx", "httpx2", "aiohttp", "fsspec")
"""Libraries whose errors say that a data set cannot be had."""


class TaskSettings(BaseModel):
    """Which tasks, and how much of them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    names: tuple[str, ...] = Field(min_length=1, description="Tasks, groups or tags of the harness.")
    limit: int | None = Field(default=None, ge=1, description="Examples of each task, its first ones.")
    include_path: Path | None = Field(default=None, description="Folder of further tasks (YAML).")
    fewshot: int | None = Field(default=None, ge=0, description="Examples in the prompt; None: as each task says.")


class Harness:
    """The tasks of `settings`, their data loaded.

    Args:
        model_name, seq_len: what tasks that make their own prompts (RULER) ask for: a tokenizer, and a length.

    Raises:
        InputError: lm-eval is not installed, a task has no such name, or its data cannot be reached.
    """

    def __init__(self, settings: TaskSettings, model_name: str, seq_len: int) -> None:
        try:
            import lm_eval
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise InputError(
                f"--tasks needs lm-evaluation-harness ({error}); install it: pip install 'kvcalib[eval]'"
            ) from None
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        include = settings.include_path
        if include is not None and not include.is_dir():
            raise InputError(f"--include-path is {str(include)!r}: no such folder; give one with tasks as YAML files")
        self.settings, self.version = settings, lm_eval.__version__
        made = {"pretrained": resolve(model_name), "max_seq_lengths": [seq_len]}
        # The harness' own tasks are some ten thousand files, read only where a name is not of the folder's.
        own = None if include is None else TaskManager(include_path=str(include), include_defaults=False, metadata=made)
        if own is None or set(settings.names) - set(own.all_tasks):
            own = TaskManager(include_path=None if include is None else str(include), metadata=made)
        self._check_names(set(own.all_tasks))
        self._loaded: dict[str, Any] = {"tasks": {}, "groups": {}}
        for name in settings.names:
            try:
                found = own.load([name])
            except Exception as error:
                raise InputError(f"--tasks {name}: {_why(error)}") from error
            for kind, each in self._loaded.items():
                each.update(found[kind])
        for task in self._loaded["tasks"].values():
            # As the harness does: a task whose own number is 0 keeps it.
            if settings.fewshot is not None and task.get_config("num_fewshot") != 0:
                task.set_config(key="num_fewshot", value=settings.fewshot)
            elif task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)

    def _check_names(self, known: set[str]) -> None:
        """InputError for a name that is no task's."""
        for name in self.settings.names:
            if name not in known:
                close = [k for k in sorted(known) if name.lower() in k.lower()][:8]
                like = f"; there is {', '.join(close)}" if close else ""
                where = "; own tasks are given with --include-path"
                if self.settings.include_path is not None:
                    where = f" and none in {self.settings.include_path}"
                raise InputError(f"--tasks names {name!r}, which is no task of lm-eval {self.version}{where}{like}")

    @property
    def protocol(self) -> str:
        """One line for readers of the figures."""
        asked = self.settings
        shots = "few-shot examples as each task says" if asked.fewshot is None else f"{asked.fewshot} few-shot examples"
        limit = "all examples" if asked.limit is None else f"the first {asked.limit} examples of each task"
        return PROTOCOL.format(names=", ".join(asked.names), version=self.version, fewshot=shots, limit=limit)

    def run(
        self,
        model: Any,
        tokenizer: Any,
        contenders: Sequence[Contender],
        failures: Failures,
        batch_size: int = 1,
        on_contender: Callable[[int], None] | None = None,
    ) -> dict[str, dict[str, float]]:
        """Metrics by contender, `task/metric` each.

        Raises:
            CacheBypassed: a pass was made without a contender's cache.
        """
        found: dict[str, dict[str, float]] = {}
        for number, contender in enumerate(failures.standing(contenders), 1):
            bypassed: CacheBypassed | None = None
            with failures.of(contender):
                try:
                    found[contender.name] = self._measure(model, tokenizer, contender, batch_size)
                except CacheBypassed as error:  # no contender's fault: nothing here can be believed
                    bypassed = error
            if bypassed is not None:
                raise bypassed
            if on_contender is not None:
                on_contender(number)
        return found

    def _measure(self, model: Any, tokenizer: Any, contender: Contender, batch_size: int) -> dict[str, float]:
        from lm_eval.evaluator import evaluate

        from kvcalib.evaluation.tasks import PackedLM, metrics

        # Every contender is asked the same, few-shot examples included.
        random.seed(SEED)
        np.random.seed(SEED)  # noqa: NPY002 what tasks draw from
        torch.manual_seed(SEED)
        for task in self._loaded["tasks"].values():
            task.set_fewshot_seed(seed=SEED)
        with PackedLM(model, tokenizer, contender=contender, batch_size=batch_size) as lm:
            results = evaluate(
                lm, self._loaded, limit=self.settings.limit, bootstrap_iters=RESAMPLED, log_samples=False
            )
            if not lm.attached_calls:
                raise CacheBypassed(f"tasks: {', '.join(self.settings.names)} made no pass of the model at all")
        return metrics(results or {"results": {}})


def _why(error: Exception) -> str:
    """What is missing, and what to do."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    first = " ".join(str(error).split())[:300] or type(error).__name__
    for each in chain:
        if isinstance(each, ModuleNotFoundError):
            return f"needs a package that is not installed ({each.name}); see the task's own page, as lm-eval[ruler]"
    away = any(
        isinstance(each, (ConnectionError, FileNotFoundError)) or type(each).__module__.split(".")[0] in UNREACHABLE
        for each in chain
    )
    if away:
        return (
            f"its data cannot be reached from here ({first}); load it once where there is a network, with HF_HOME on a "
            "disk that both see, or give --include-path, a folder with a YAML of the task whose dataset_path is json "
            "and whose dataset_kwargs name local data_files"
        )
    return f"cannot be loaded ({type(error).__name__}: {first})"
