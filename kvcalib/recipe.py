"""The settings of a whole run. A YAML file in pipelines/ is one of these; `--bits` is its one dial.

model: meta-llama/Llama-3.1-8B
out: artifacts/llama3.1-8b-nuq3
fisher: {data: wikitext2, samples: 16, seq_len: 2048}
fit: {key_bits: 3, value_bits: 3, outliers: 0.01, sinks: 1}
evaluate: {data: wikitext2, samples: 32, seq_len: 2048}
"""

from __future__ import annotations

from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kvcalib.errors import InputError
from kvcalib.stages.evaluate import EvalSettings
from kvcalib.stages.fisher import FisherSettings
from kvcalib.stages.fit_nuq import FitNuqSettings


class Recipe(BaseModel):
    """All settings of a run: model, calibration, fit, artifact and evaluation."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: str = Field(description="Local folder, Hub id, or builtin.")
    out: Path = Field(description="Folder of the artifact.")
    run_dir: Path | None = Field(default=None, description="Folder of the run; default: OUT.run beside the artifact.")
    fisher: FisherSettings = FisherSettings()
    fit: FitNuqSettings = FitNuqSettings()
    recent: int = Field(default=0, ge=0, description="Last tokens that a loader keeps exact by default.")
    evaluate: EvalSettings | None = EvalSettings()

    @model_validator(mode="after")
    def _one_model(self) -> Recipe:
        # The model is loaded once, as `fisher` says; another dtype or device for `evaluate` would be ignored.
        for name in ("dtype", "device"):
            chosen = "auto" if self.evaluate is None else getattr(self.evaluate, name)
            if chosen not in ("auto", getattr(self.fisher, name)):
                raise ValueError(
                    f"evaluate.{name} is {chosen!r}, expected that of fisher, {getattr(self.fisher, name)!r}"
                )
        return self

    @property
    def run_path(self) -> Path:
        """The run's folder."""
        return self.run_dir or self.out.with_name(self.out.name + ".run")


def read_recipe(path: Path) -> Recipe:
    """The recipe in a YAML file.

    Raises:
        InputError: names the file, the field, the value found and what was expected.
    """
    try:
        body = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: not valid YAML ({reason})") from None
    if not isinstance(body, dict):
        raise InputError(f"{path}: holds {type(body).__name__}, expected fields like 'model:' and 'out:'")
    try:
        return Recipe.model_validate(body)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            where = ".".join(str(part) for part in problem["loc"])
            shown = "" if problem["type"] == "missing" else f" is {problem['input']!r}"
            lines.append(f"{where}{shown}: {problem['msg']}")
        raise InputError(f"{path}: " + "; ".join(lines)) from None
