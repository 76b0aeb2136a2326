"""How a model is loaded: the settings that every stage with a model shares."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from kvcalib.model.loading import load_model
from kvcalib.model.offloaded import places
from kvcalib.model.placement import parse_memory
from kvcalib.stages.progress import note


class ModelSettings(BaseModel):
    """Where weights come from, and where they live."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dtype: str = "auto"
    device: str = "auto"
    max_memory: str | None = Field(default=None, description="With device map: as cpu=2GiB,0=20GiB.")
    offload: str | None = Field(default=None, description="With device map: folder of weights that are put on disk.")
    revision: str | None = None
    trust_remote_code: bool = False

    @field_validator("max_memory")
    @classmethod
    def _sizes(cls, value: str | None) -> str | None:
        if value is not None:
            parse_memory(value)
        return value

    @model_validator(mode="after")
    def _for_map(self) -> ModelSettings:
        for name in ("max_memory", "offload"):
            value = getattr(self, name)
            if value is not None and self.device != "map":
                option = "--" + name.replace("_", "-")
                raise ValueError(
                    f"{option} is {value!r} and --device {self.device!r}: only --device map splits a model; give it too"
                )
        return self

    def load(self, name: str, device: str | None = None, process: tuple[int, int] | None = None) -> Any:
        """The model `name`; see `load_model`. Says where its weights are, if in several places.

        Args:
            device: in place of the settings' own. process: as `load_model`'s.
        """
        model = load_model(
            name, self.dtype, device or self.device, self.revision, self.trust_remote_code,
            max_memory=self.max_memory, offload=self.offload, process=process,
        )  # fmt: skip
        found = places(model) if self.device == "map" else {}
        if found:
            told = ", ".join(f"{size / 1e6:.1f} MB on {place}" for place, size in sorted(found.items()))
            note(f"model: weights are {told}")
        return model
