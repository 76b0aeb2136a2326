"""The grid of a sweep: axes to points, and the key of each. A YAML file in pipelines/ is one of these.

model: builtin
data: builtin
calibrate: {samples: 16, seq_len: 512}
evaluate: {samples: 16, seq_len: 512}
grid:
  bits: [2, 2.5, 3, 4]
  outliers: [0, 0.01]
  baselines: ["kivi:bits=2"]
exclude:
  - {bits: 2, outliers: 0.01}

Every combination of the axes is a point, baselines are one point each. All points of a grid are measured in one way,
so that they compare: with `keep` or `evaluate.prompt` on continuations, with `adaptive` or `evaluate.step` in steps,
else in one pass (see `evaluation/perplexity.py` and `continuation.py`).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from kvcalib.calibration.statistics import VERSION as CALIBRATION_VERSION
from kvcalib.errors import InputError
from kvcalib.evaluation.baselines import NAMES as BASELINES
from kvcalib.evaluation.continuation import MOST_STEP, PROMPT, STEP
from kvcalib.model.identity import hash_json
from kvcalib.model.text import SUFFIXES
from kvcalib.quant.codebook import Format
from kvcalib.quant.fitting import Granularity
from kvcalib.quant.quantizer import Scope
from kvcalib.recipe import read_settings
from kvcalib.runtime.policies import find
from kvcalib.runtime.pools import MOST_TIERS
from kvcalib.stages import allocate, fit_nuq
from kvcalib.stages.allocate import AllocateSettings
from kvcalib.stages.codebooks import ValueBasis
from kvcalib.stages.evaluate import EvalSettings
from kvcalib.stages.fisher import FisherSettings
from kvcalib.stages.fit_nuq import FitNuqSettings

VERSION = 1
"""Of what a key is made from and of how a point is measured."""

VERSIONS = [VERSION, CALIBRATION_VERSION, fit_nuq.STAGE_VERSION, allocate.STAGE_VERSION]
ELSEWHERE = {"device", "max_memory", "offload", "batch_size"}
"""Settings that say where and how fast, not what."""

Way = Literal["text", "steps", "continuations"]
Metric = Literal["kld", "nll"]
Method = Literal["fisher", "qaq"]


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Measure(_Settings):
    """What every point is measured on; the fields are those of `kvcalib eval`."""

    data: str = "builtin"
    samples: int = Field(default=16, ge=1)
    seq_len: int = Field(default=512, ge=3)
    skip: int = Field(default=0, ge=0, description="Sequences of a file or Hub data set left out at its start.")
    prompt: float | None = Field(default=None, gt=0, lt=1, description="Share of a sequence that is its prompt.")
    step: int | None = Field(default=None, ge=1, description="Tokens of a pass.")
    batch_size: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, gt=-(2**53), lt=2**53)


def _listed(value: Any) -> Any:
    return value if isinstance(value, (list, tuple)) else [value]


Listed = BeforeValidator(_listed)
Bits = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=0.05)]
Count = Annotated[int, Field(ge=0)]


class Axes(_Settings):
    """Values to combine; a single value stands for a list of one."""

    bits: Annotated[tuple[Bits, ...], Listed] = Field(default=(), description="Budget in effective bits.")
    outliers: Annotated[tuple[Share | None, ...], Listed] = Field(
        default=(None,), description="Exact share; null lets the budget choose between none and 1 %."
    )
    sinks: Annotated[tuple[Count, ...], Listed] = (0,)
    format: Annotated[tuple[Format, ...], Listed] = ("nuq",)
    granularity: Annotated[tuple[Granularity, ...], Listed] = ("channel",)
    value_basis: Annotated[tuple[ValueBasis, ...], Listed] = ("pca",)
    value_scale: Annotated[tuple[Scope, ...], Listed] = ("token",)
    method: Annotated[tuple[Method, ...], Listed] = ("fisher",)
    window: Annotated[tuple[Annotated[int, Field(ge=1)] | None, ...], Listed] = Field(
        default=(None,), description="Queries whose attention `adaptive` looks at; null: as in `calibrate`."
    )
    recent: Annotated[tuple[Annotated[float, Field(ge=0)] | None, ...], Listed] = Field(
        default=(None,), description="Last tokens that stay exact, or with keep that always stay."
    )
    keep: Annotated[tuple[Annotated[float, Field(gt=0)] | None, ...], Listed] = Field(
        default=(None,), description="Tokens that stay; below 1 a share; null: all of them."
    )
    policy: Annotated[tuple[str, ...], Listed] = Field(default=("qhitter",), description="Where keep is given.")
    adaptive: Annotated[tuple[bool, ...], Listed] = Field(
        default=(False,), description="A width per token by the attention it drew, at the same budget."
    )
    baselines: Annotated[tuple[str, ...], Listed] = ()

    @field_validator("*")
    @classmethod
    def _some(cls, value: Any, info: Any) -> Any:
        if not value and info.field_name not in ("bits", "baselines"):
            raise ValueError("expected at least one value; leave the axis out for its default")
        return value


class Point(_Settings):
    """One setting to measure: a baseline's spec, or ours."""

    baseline: str | None = None
    bits: float | None = None
    outliers: float | None = None
    sinks: int = 0
    format: Format = "nuq"
    granularity: Granularity = "channel"
    value_basis: ValueBasis = "pca"
    value_scale: Scope = "token"
    method: Method = "fisher"
    window: int | None = None
    recent: float | None = None
    keep: float | None = None
    policy: str | None = None
    adaptive: bool = False

    @property
    def kind(self) -> str:
        """What decides how long it takes: baseline, adaptive, evicting or plain."""
        if self.baseline is not None:
            return "baseline"
        return "adaptive" if self.adaptive else "plain" if self.keep is None else "evicting"

    def fit(self) -> FitNuqSettings:
        """Settings of `fit-nuq`."""
        given: dict[str, Any] = {}
        if self.outliers is not None:
            given = {"outliers": self.outliers, "choices": None}
        return FitNuqSettings(
            sinks=self.sinks,
            format=self.format,
            granularity=self.granularity,
            value_granularity=self.granularity,
            value_basis=self.value_basis,
            value_scale=self.value_scale,
            **given,
        )

    def spending(self, bits: float) -> AllocateSettings:
        """Settings of `allocate` for so many effective bits."""
        return AllocateSettings(budget=bits, method=self.method)

    def name(self, varying: tuple[str, ...]) -> str:
        """Its values on the axes of which the grid has several."""
        if self.baseline is not None:
            return self.baseline
        said = [f"{self.bits:g} bits"]
        if self.adaptive:
            said.append("adaptive")
        if self.keep is not None:
            said.append(f"keep {self.keep:g} {self.policy}")
        for axis in varying:
            if axis not in ("bits", "adaptive", "keep", "policy"):
                value = getattr(self, axis)
                shown = "default" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
                said.append(f"{axis} {shown}")
        return ", ".join(said)


@dataclass(frozen=True)
class Names:
    """Folders within a sweep: of calibration, codebooks, artifacts by budget, adaptive widths."""

    calibrated: str
    fitted: str
    built: dict[float, str]
    mixed: str | None


class Grid(_Settings):
    """A sweep: model, texts, axes, and what the front is drawn of."""

    model: str = Field(description="Local folder, Hub id, or builtin.")
    out: Path | None = Field(default=None, description="Folder of the sweep.")
    data: str | None = Field(default=None, description="Text of both parts below where they name none.")
    calibrate: FisherSettings = FisherSettings(seq_len=512)
    evaluate: Measure = Measure()
    grid: Axes
    tiers: tuple[Bits, ...] = Field(
        default=(2.0, 3.0, 4.0), min_length=2, max_length=MOST_TIERS, description="Budgets that `adaptive` mixes."
    )
    exclude: tuple[dict[str, Any], ...] = Field(default=(), description="Points that match one of these are left out.")
    metric: Metric = Field(default="kld", description="Loss of the Pareto front: KLD, or the rise of NLL.")

    @model_validator(mode="before")
    @classmethod
    def _texts(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        body = dict(body)
        calibrate = body.get("calibrate") or {}
        if isinstance(calibrate, dict):
            body["calibrate"] = {"seq_len": 512, **calibrate}
        if isinstance(body.get("data"), str):
            for name in ("calibrate", "evaluate"):
                if isinstance(body.get(name, {}), dict):
                    body[name] = {"data": body["data"], **(body.get(name) or {})}
        return body

    @model_validator(mode="after")
    def _together(self) -> Grid:
        axes = self.grid
        if not axes.bits and not axes.baselines:
            raise ValueError("grid has neither bits nor baselines; give at least one value of one of them")
        if self.way == "continuations":
            if any(axes.adaptive):
                raise ValueError(
                    "grid has adaptive beside keep (or evaluate.prompt): they are measured in different ways, which do "
                    "not compare; make two grids"
                )
            if self.evaluate.step is not None and self.evaluate.step > MOST_STEP:
                raise ValueError(f"evaluate.step is {self.evaluate.step}, expected at most {MOST_STEP} with keep")
        for policy in axes.policy:
            find(policy)
        for spec in axes.baselines:
            name = spec.split(":")[0]
            if name not in BASELINES:
                raise ValueError(f"grid.baselines names {name!r} (in {spec!r}), expected one of {', '.join(BASELINES)}")
        for number, rule in enumerate(self.exclude):
            unknown = sorted(set(rule) - set(Axes.model_fields))
            if unknown or not rule:
                raise ValueError(
                    f"exclude[{number}] names {unknown[0] if unknown else 'nothing'!r}, expected some of "
                    f"{', '.join(Axes.model_fields)}"
                )
            for axis, given in rule.items():
                there = getattr(axes, axis)
                strange = [value for value in _listed(given) if value not in there]
                if strange:
                    raise ValueError(
                        f"exclude[{number}].{axis} is {strange[0]!r}, which the grid does not have; expected one of "
                        f"{', '.join(map(repr, there))}"
                    )
        if not self.points:
            raise ValueError("exclude leaves no point")
        for point in self.points:
            if point.baseline is not None:
                continue
            try:
                self.settings(point)
            except ValidationError as error:
                reason = error.errors()[0]["msg"].removeprefix("Value error, ")
                raise ValueError(f"point {point.name(self.varying)!r}: {reason}; use exclude to leave it out") from None
        return self

    @property
    def way(self) -> Way:
        """How all points are measured."""
        if self.evaluate.prompt is not None or any(keep is not None for keep in self.grid.keep):
            return "continuations"
        return "steps" if self.evaluate.step is not None or any(self.grid.adaptive) else "text"

    @property
    def step(self) -> int | None:
        """Tokens of a pass, None for whole sequences."""
        if self.way == "text":
            return None
        return self.evaluate.step or (STEP if self.way == "continuations" else 1)

    @property
    def prompt(self) -> float | None:
        """Share of a sequence that is its prompt, None where all of it is scored."""
        return (self.evaluate.prompt or PROMPT) if self.way == "continuations" else None

    @property
    def skip(self) -> int:
        """Sequences left out at the start of the evaluation's text: what calibrated must not also judge."""
        if self.evaluate.data == self.calibrate.data and not self.evaluate.skip:
            return -(-self.calibrate.samples * self.calibrate.seq_len // self.evaluate.seq_len)
        return self.evaluate.skip

    @property
    def varying(self) -> tuple[str, ...]:
        """Axes with several values."""
        return tuple(name for name in Axes.model_fields if name != "baselines" and len(getattr(self.grid, name)) > 1)

    @property
    def points(self) -> list[Point]:
        """All points, each once, ours before baselines."""
        axes = self.grid
        names = [name for name in Axes.model_fields if name != "baselines"]
        found = []
        for values in itertools.product(*(getattr(axes, name) for name in names)):
            chosen = dict(zip(names, values, strict=True))
            if any(all(chosen.get(n) in _listed(v) for n, v in rule.items()) for rule in self.exclude):
                continue
            if chosen["keep"] is None:
                chosen["policy"] = None
            if chosen["window"] is None:
                chosen["window"] = self.calibrate.window
            found.append(Point(**chosen))
        # A baseline is left out by a rule that names it alone.
        out = {b for rule in self.exclude if set(rule) == {"baselines"} for b in _listed(rule["baselines"])}
        found += [Point(baseline=spec) for spec in axes.baselines if spec not in out]
        return list({hash_json(p.model_dump(mode="json")): p for p in found}.values())

    def fisher(self, point: Point) -> FisherSettings:
        """Settings of the point's calibration."""
        if point.window is None:
            return self.calibrate
        return self.calibrate.model_copy(update={"window": point.window})

    def settings(self, point: Point) -> EvalSettings:
        """What `eval` would be told of cache and passes, for a point of ours.

        Raises:
            ValidationError: eviction's settings do not go together.
        """
        recent = point.recent
        if self.way == "steps" and recent is None:
            # Then points with and without adaptive widths read the same tokens exactly; see `evaluation/perplexity.py`.
            recent = float((point.window or self.calibrate.window) + (self.step or 1) - 1)
        return EvalSettings(
            seq_len=self.evaluate.seq_len,
            recent=recent,
            step=self.step,
            prompt=self.prompt,
            keep=point.keep,
            policy=() if point.policy is None else (point.policy,),
        )

    def names(self, point: Point) -> Names:
        """Folders of what the point needs and shares with others that need the same."""
        calibrated = self._name("fisher", self.fisher(point).model_dump(mode="json", exclude=ELSEWHERE))
        fitted = self._name("fit", [calibrated, point.fit().model_dump(mode="json")])
        own = () if point.bits is None else (point.bits,)
        budgets = self.tiers if point.adaptive else own
        built = tuple(
            self._name("artifact", [fitted, point.spending(bits).model_dump(mode="json")]) for bits in budgets
        )
        mixed = self._name("adaptive", [*built, point.bits]) if point.adaptive else None
        return Names(calibrated, fitted, dict(zip(budgets, built, strict=True)), mixed)

    def _name(self, kind: str, settings: Any) -> str:
        return f"{kind}-{hash_json([VERSIONS, self.model, settings])[:16]}"

    def described(self, point: Point) -> dict[str, Any]:
        """Everything that a point's figures depend on, as JSON; the key is its hash."""
        return {
            "version": VERSIONS,
            "model": self.model,
            "calibrate": self.calibrate.model_dump(mode="json", exclude=ELSEWHERE | {"window"}),
            "evaluate": self.evaluate.model_dump(mode="json", exclude={"batch_size", "step"}),
            "way": self.way,
            "step": self.step,
            "tiers": list(self.tiers) if point.adaptive else None,
            "point": point.model_dump(mode="json"),
        }

    def key(self, point: Point) -> str:
        """The point's name in the results: sha256 of `described`, in hex."""
        return hash_json(self.described(point))


def read_grid(path: Path) -> Grid:
    """The grid in a YAML file.

    Raises:
        InputError: names the file, the field, the value found and what was expected.
    """
    grid = read_settings(path, Grid, "fields like 'model:' and 'grid:'")
    for name, data in (("calibrate", grid.calibrate.data), ("evaluate", grid.evaluate.data)):
        if Path(data).suffix in SUFFIXES and not Path(data).is_file():
            raise InputError(f"{path}: {name}.data is {data!r}: no such file")
    return grid


def is_grid(path: Path) -> bool:
    """Whether a YAML file is a grid and not a recipe: it has the field `grid`."""
    try:
        body = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return False
    return isinstance(body, dict) and "grid" in body
