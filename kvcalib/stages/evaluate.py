"""Stage `eval`: artifacts, a model and text to measures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from kvcalib.errors import InputError
from kvcalib.evaluation.perplexity import Evaluation, evaluate
from kvcalib.files import write_json
from kvcalib.model.loading import load_model, load_tokenizer
from kvcalib.model.text import token_sequences
from kvcalib.runtime.adaptive import KeepExact
from kvcalib.runtime.loader import Artifact, Prefill, load
from kvcalib.runtime.tiers import load_adaptive
from kvcalib.stages.fisher import check_vocabulary
from kvcalib.stages.progress import note, progress


class EvalSettings(BaseModel):
    """Settings of the stage."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str = "builtin"
    samples: int = Field(default=16, ge=1)
    seq_len: int = Field(default=2048, ge=2)
    skip: int = Field(default=0, ge=0, description="Sequences of a file or Hub data set left out at its start.")
    sinks: int | None = Field(default=None, ge=0)
    recent: int | None = Field(default=None, ge=0)
    prefill: Prefill = Field(default="quantized", description="See `runtime.loader.attach`.")
    step: int | None = Field(default=None, ge=1, description="Tokens of a pass; see `evaluation/perplexity.py`.")
    adaptive: str | None = Field(default=None, description="Folder that `kvcalib tiers` wrote, measured too.")
    keep_exact: KeepExact = Field(default="no", description="Where adaptive widths keep an exact copy.")
    every: int = Field(default=16, ge=1, description="Tokens between two choices, with keep_exact.")
    dtype: str = "auto"
    device: str = "auto"
    batch_size: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=-(2**63), lt=2**63)
    revision: str | None = None
    trust_remote_code: bool = False


def run(
    artifacts: Sequence[Artifact | str | Path],
    model_name: str,
    settings: EvalSettings,
    json_path: Path | None = None,
    model: Any = None,
) -> list[Evaluation]:
    """Measure `artifacts` on one model and text; writes a JSON object (a list for several) to `json_path`."""
    if json_path is not None and json_path.is_dir():
        raise InputError(f"--json {json_path}: is a folder, expected a file")
    loaded = [a if isinstance(a, Artifact) else load(a) for a in artifacts]
    if settings.adaptive is None and settings.keep_exact != "no":
        raise InputError(
            f"--keep-exact is {settings.keep_exact!r} without --adaptive; give the folder of `kvcalib tiers`"
        )
    adaptive = None
    if settings.adaptive is not None:
        adaptive = load_adaptive(settings.adaptive, settings.keep_exact, settings.every)
    tokenizer = load_tokenizer(model_name, settings.revision, settings.trust_remote_code)
    sequences = token_sequences(
        settings.data, tokenizer, settings.samples, settings.seq_len, "evaluate", settings.seed, settings.skip
    )
    if len(sequences) < settings.samples:
        note(f"eval: data {settings.data!r} gives {len(sequences)} sequences, not {settings.samples}")
    if model is None:
        model = load_model(model_name, settings.dtype, settings.device, settings.revision, settings.trust_remote_code)
    check_vocabulary(model, sequences, settings.data)
    batch_size = settings.batch_size or max(1, 2048 // settings.seq_len)
    with progress("eval", len(sequences), "sequences") as show:
        results = evaluate(
            model, loaded, sequences, settings.sinks, settings.recent, batch_size, show, settings.prefill,
            settings.step, adaptive,
        )  # fmt: skip
    if json_path is not None:
        rows = [r.model_dump(mode="json") for r in results]
        write_json(json_path, rows[0] if len(rows) == 1 else rows)
    return results
