"""The settings of a whole run. A YAML file in pipelines/ is one of these; `bits` is its one dial.

model: meta-llama/Llama-3.1-8B
out: artifacts/llama3.1-8b-2.5
bits: 2.5
fisher: {data: wikitext2, samples: 16, seq_len: 2048}
fit: {outliers: 0.01, sinks: 1}
evaluate: {data: wikitext2, samples: 32, seq_len: 2048}

`bits` are effective bits, every byte of the cache counted; `allocate` spends them. Code widths instead, one for all
keys and one for all values, are `fit: {key_bits: 3, value_bits: 3}`, without `bits` and `allocate`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kvcalib.errors import InputError
from kvcalib.stages.allocate import AllocateSettings
from kvcalib.stages.evaluate import EvalSettings
from kvcalib.stages.fisher import FisherSettings
from kvcalib.stages.fit_nuq import FitNuqSettings

DEFAULT_BITS = 2.5
UNIFORM = ("key_bits", "value_bits")
Settings = TypeVar("Settings", bound=BaseModel)


class Recipe(BaseModel):
    """All settings of a run: model, budget, calibration, fit, artifact and evaluation.

    One of three says how wide codes are: `bits` (the budget, 2.5 if nothing is said), `allocate` (the same in its
    `budget`, or a mean code width in its `widths`), or `fit.key_bits` and `fit.value_bits` (no allocation).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: str = Field(description="Local folder, Hub id, or builtin.")
    out: Path = Field(description="Folder of the artifact.")
    run_dir: Path | None = Field(default=None, description="Folder of the run; default: OUT.run beside the artifact.")
    bits: float | None = Field(default=None, gt=0, description="Effective bits, every byte counted; short for budget.")
    fisher: FisherSettings = FisherSettings()
    fit: FitNuqSettings = FitNuqSettings()
    allocate: AllocateSettings | None = Field(default=None, description="None: one code width for all, as in `fit`.")
    recent: int = Field(default=0, ge=0, description="Last tokens that a loader keeps exact by default.")
    evaluate: EvalSettings | None = EvalSettings()

    @model_validator(mode="before")
    @classmethod
    def _one_dial(cls, body: Any) -> Any:
        """`bits` and `allocate` filled in from one another, or neither where `fit` names code widths."""
        if not isinstance(body, dict):
            return body
        bits, section = body.get("bits"), body.get("allocate")
        uniform = next((name for name in UNIFORM if _given(body.get("fit"), name)), None)
        if uniform is not None:
            for name, found in (("bits", bits), ("allocate", section)):
                if found is not None:
                    raise ValueError(
                        f"fit.{uniform} and {name} are both given: one code width for all, or a budget that is spent "
                        "channel by channel; leave one of the two out"
                    )
            return body
        if "allocate" in body and section is None and bits is None:
            return body
        if section is None:
            section = {}
        if isinstance(section, AllocateSettings):
            section = section.model_dump(exclude_unset=True)
        if not isinstance(section, dict):
            return body
        budget = section.get("budget")
        if bits is not None and (section.get("widths") is not None or budget not in (None, bits)):
            name = "widths" if budget is None else "budget"
            raise ValueError(f"bits is {bits!r} and allocate.{name} is {section[name]!r}; leave one of the two out")
        if budget is None and section.get("widths") is None:
            budget = DEFAULT_BITS if bits is None else bits
        if budget is None:
            return {**body, "allocate": section}
        if not _positive(budget):  # an error of one field, the one that was given
            return {name: part for name, part in body.items() if name != "allocate" or bits is None}
        return {**body, "bits": budget, "allocate": {**section, "budget": budget}}

    @model_validator(mode="after")
    def _one_model(self) -> Recipe:
        # The model is loaded once, as `fisher` says; another dtype or place for `evaluate` would be ignored.
        for name in ("dtype", "device", "max_memory", "offload"):
            chosen = "auto" if self.evaluate is None else getattr(self.evaluate, name)
            if chosen not in ("auto", None, getattr(self.fisher, name)):
                raise ValueError(
                    f"evaluate.{name} is {chosen!r}, expected that of fisher, {getattr(self.fisher, name)!r}"
                )
        return self

    def changed(
        self,
        bits: float | None = None,
        key_bits: int | None = None,
        value_bits: int | None = None,
        out: Path | None = None,
        fisher: dict[str, Any] | None = None,
        evaluate: dict[str, Any] | None = None,
    ) -> Recipe:
        """This recipe with other settings; None and an empty dict change nothing.

        `bits` takes the place of a budget, mean width or code widths; `key_bits` and `value_bits` that of a budget.

        Raises:
            ValidationError: a setting is outside its range, or they exclude each other.
        """
        body = self.model_dump(exclude_unset=True)
        body["fisher"] = body.get("fisher", {}) | (fisher or {})
        if self.evaluate is not None:
            body["evaluate"] = body.get("evaluate", {}) | (evaluate or {})
        uniform = {n: v for n, v in zip(UNIFORM, (key_bits, value_bits), strict=True) if v is not None}
        if bits is not None:
            body["bits"] = bits
            for section, names in (("fit", UNIFORM), ("allocate", ("budget", "widths"))):
                body[section] = {n: v for n, v in (body.get(section) or {}).items() if n not in names}
        elif uniform:
            body["fit"] = body.get("fit", {})
            body["bits"] = body["allocate"] = None
        body["fit"] = body.get("fit", {}) | uniform
        if out is not None:
            body["out"] = out
        return Recipe.model_validate(body)

    @property
    def run_path(self) -> Path:
        """The run's folder."""
        return self.run_dir or self.out.with_name(self.out.name + ".run")


def _given(section: Any, name: str) -> bool:
    """Whether a section of a recipe, as read or as a model, sets the field `name`."""
    if isinstance(section, dict):
        return section.get(name) is not None
    return isinstance(section, BaseModel) and name in section.model_fields_set and getattr(section, name) is not None


def _positive(value: Any) -> bool:
    try:
        return float(value) > 0
    except (TypeError, ValueError):
        return False


def read_recipe(path: Path) -> Recipe:
    """The recipe in a YAML file.

    Raises:
        InputError: names the file, the field, the value found and what was expected.
    """
    return read_settings(path, Recipe, "fields like 'model:' and 'out:'")


def read_settings(path: Path, kind: type[Settings], expected: str) -> Settings:
    """A YAML file as one `kind`.

    Args:
        expected: what a file that holds no fields should hold, for the message.

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
        raise InputError(f"{path}: holds {type(body).__name__}, expected {expected}")
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            where = ".".join(str(part) for part in problem["loc"])
            message = problem["msg"].removeprefix("Value error, ")
            if not where:  # of several fields together; the message names them
                lines.append(message)
                continue
            shown = "" if problem["type"] == "missing" else f" is {problem['input']!r}"
            if problem["type"] == "extra_forbidden":
                message += f"; expected one of {', '.join(_fields(kind, problem['loc'][:-1]))}"
            lines.append(f"{where}{shown}: {message}")
        raise InputError(f"{path}: " + "; ".join(lines)) from None


def _fields(kind: type[BaseModel], place: tuple[int | str, ...]) -> list[str]:
    """The fields of the model at `place` within `kind`."""
    for part in place:
        annotation: Any = kind.model_fields[str(part)].annotation
        kind = next(a for a in (annotation, *get_args(annotation)) if isinstance(a, type) and issubclass(a, BaseModel))
    own = kind.__annotations__
    return sorted(kind.model_fields, key=lambda name: name not in own)  # what stages share comes last
