"""What all baselines share: a name and settings out of a spec, and a cache in which a layer of theirs stands for each
layer that attends in full.

    kivi                        its default settings
    kivi:bits=4:residual=64     others
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvcalib.errors import InputError, UnsupportedModel
from kvcalib.evaluation.baselines.calibrated import Calibrated
from kvcalib.evaluation.contender import Contender
from kvcalib.evaluation.trials import Session
from kvcalib.model.selftest import full_attention_layers
from kvcalib.runtime.loader import kv_shape


class Settings(BaseModel):
    """Base of every baseline's settings."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class BitSettings(Settings):
    """Bits of a code, for methods whose keys and values may differ."""

    bits: int = Field(default=4, ge=1, le=8, description="Of keys and values.")
    key_bits: int | None = Field(default=None, ge=1, le=8, description="Of keys, in place of `bits`.")
    value_bits: int | None = Field(default=None, ge=1, le=8, description="Of values, in place of `bits`.")

    @property
    def widths(self) -> tuple[int, int]:
        """Bits of keys and of values."""
        return self.key_bits or self.bits, self.value_bits or self.bits


@dataclass(frozen=True)
class Place:
    """Where a layer stands: its index, KV heads and channels of a head."""

    index: int
    kv_heads: int
    head_dim: int


class Baseline(Contender):
    """A published method on real packed storage, under the settings of a spec.

    Layers that do not keep every token (sliding windows, linear ones) keep the model's own exact cache.

    Attributes:
        label: its name in a spec.
        accepts: the model of its settings.
        calibrates: it needs `Calibrated`.
    """

    label: ClassVar[str]
    accepts: ClassVar[type[Settings]]
    calibrates: ClassVar[bool] = False

    def __init__(self, chosen: Settings | None = None, calibrated: Calibrated | None = None) -> None:
        self.chosen = self.accepts() if chosen is None else chosen
        self.calibrated = calibrated
        told = self.chosen.model_dump(exclude_defaults=True)
        self.name = ":".join([self.label, *(f"{name}={_written(value)}" for name, value in told.items())])

    @classmethod
    def parse(cls, texts: dict[str, str], calibrated: Calibrated | None = None) -> Baseline:
        """The baseline with settings given as text.

        Raises:
            InputError: a setting is unknown or its value outside what it may be, or the calibration is missing.
        """
        try:
            chosen = cls.accepts.model_validate(texts)
        except ValidationError as error:
            raise InputError(cls._explain(error)) from error
        if cls.calibrates and calibrated is None:
            raise InputError(
                f"baseline {cls.label!r} is fitted to a calibration and got none; run `kvcalib fisher MODEL --run DIR` "
                "and name that folder"
            )
        return cls(chosen, calibrated)

    @classmethod
    def _explain(cls, error: ValidationError) -> str:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        known = ", ".join(cls.accepts.model_fields) or "none"
        if first["type"] == "extra_forbidden":
            return f"baseline {cls.label!r} has no setting {field!r}, expected one of: {known}"
        reason = first["msg"][:1].lower() + first["msg"][1:].removeprefix("Value error, ")
        what = f"baseline {cls.label!r}: {field} is {first['input']!r}" if field else f"baseline {cls.label!r}"
        return f"{what}: {reason}; write it as {cls.label}:{field or 'setting'}=VALUE (settings: {known})"

    @property
    def settings(self) -> dict[str, Any]:
        return self.chosen.model_dump()

    @abstractmethod
    def layer(self, place: Place) -> Any:
        """An empty cache layer for one place.

        Raises:
            InputError: the settings do not fit the layer's shape.
        """

    def layers(self, model: PreTrainedModel) -> dict[int, Any]:
        """Empty layers by index.

        Raises:
            UnsupportedModel: no layer of the model attends in full.
        """
        indices = full_attention_layers(model)
        if not indices:
            raise UnsupportedModel(
                f"baseline {self.name!r}: no layer of this model keeps every token (all slide or are linear), and "
                "baselines leave such layers exact; there is nothing to compare"
            )
        return {index: self.layer(Place(index, *kv_shape(model, index))) for index in indices}

    def new_cache(self, model: PreTrainedModel) -> DynamicCache:
        """An empty cache."""
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        for index, layer in self.layers(model).items():
            cache.layers[index] = layer
        return cache

    @contextlib.contextmanager
    def run(self, model: PreTrainedModel) -> Iterator[Session]:
        # Settings that do not fit are refused now and not by the first pass.
        self.new_cache(model)
        yield CacheSession(model, lambda: self.new_cache(model))

    def nbytes(self, cache: DynamicCache) -> float:
        return float(sum(layer_bytes(layer) for layer in cache.layers))


class CacheSession(Session):
    """A session on caches that `make` gives."""

    def __init__(self, model: PreTrainedModel, make: Callable[[], DynamicCache]) -> None:
        super().__init__(model, None)
        self.make = make

    def new_cache(self) -> DynamicCache:
        """An empty cache."""
        return self.make()


def layer_bytes(layer: Any) -> int:
    """Bytes of what a layer holds, spare room included; a stock layer's elements count at 16 bits."""
    held = getattr(layer, "nbytes", None)
    if held is not None:
        return int(held)
    return sum(2 * t.numel() for t in (getattr(layer, n, None) for n in ("keys", "values")) if isinstance(t, Tensor))


def two_bytes(dtype: torch.dtype) -> torch.dtype:
    """The type in which scales, outliers and exact tokens of a model of `dtype` are kept."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float16


def group_size(name: str, group: int, head_dim: int) -> int:
    """`group` channels, or the whole head for 0.

    Raises:
        InputError: a head is no whole number of groups.
    """
    size = group or head_dim
    if head_dim % size:
        fitting = ", ".join(str(n) for n in range(1, head_dim + 1) if head_dim % n == 0)
        raise InputError(
            f"baseline {name!r}: group is {group}, and a head of this model has {head_dim} channels, not a multiple; "
            f"take one of {fitting}"
        )
    return size


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
