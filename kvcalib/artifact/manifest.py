"""The manifest of an artifact, `manifest.json`: what the tensors mean, for which model, from which calibration.

These classes are the format; `docs/artifact.schema.json` is generated from them
(`python -m kvcalib.artifact.manifest`).
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from kvcalib.files import hash_tensor
from kvcalib.model.identity import ModelIdentity
from kvcalib.quant.codebook import Format
from kvcalib.quant.packing import Segment
from kvcalib.quant.quantizer import Scope

FORMAT_VERSION: Literal[4] = 4
_HEX = r"^[0-9a-f]{64}$"
Sha256 = Annotated[str, Field(pattern=_HEX)]
LARGEST = (1 << 53) - 1
"""The largest integer that any JSON reader keeps exactly."""
MOST_LINES = 200_000
"""A layer takes about a hundred."""
MOST_LEVELS = 8
MOST_SINKS = 4096
"""Sinks have their room from the first token on, so their number must not be anybody's to choose."""
Count = Annotated[int, Field(ge=0, le=LARGEST)]
Positive = Annotated[int, Field(ge=1, le=LARGEST)]


class Record(BaseModel):
    """Base of the manifest's parts: immutable, no unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class Producer(Record):
    """The program that wrote the artifact."""

    name: Literal["kvcalib"] = "kvcalib"
    version: str


class Calibration(Record):
    """What the codebooks were fitted on."""

    data: str = Field(description="Where the text came from, as the user named it.")
    sequences: Positive
    tokens: Positive
    sampled_tokens: Positive
    seq_len: int = Field(ge=2, le=LARGEST)
    seed: int = Field(ge=-LARGEST, le=LARGEST)
    nll: float = Field(description="Mean NLL of the unquantized model on the calibration text, nats per token.")
    fingerprint: Sha256


class FitSettings(Record):
    """How the codebooks were fitted; see `kvcalib fit-nuq --help`."""

    format: Format
    weights: Literal["fisher_scale", "fisher", "none"]
    key_granularity: Literal["layer", "head", "channel"]
    value_granularity: Literal["layer", "head", "channel"]
    outliers: float = Field(ge=0, le=0.5)
    sinks: int = Field(ge=0, le=MOST_SINKS)
    qnorm: bool
    solver: Literal["exact", "lloyd"]


class TensorSpec(Record):
    """Keys or values of one layer."""

    kv_heads: Positive
    head_dim: Positive
    words: Count = Field(description="32-bit words per token.")
    segment: Segment = Field(description="Whether each head's words stand alone, or a row's heads share words.")
    group: Literal[0, 16] = Field(
        default=0, description="Channels that lie side by side with one width, as fused kernels want; 0: free."
    )
    scope: Scope = Field(description="Group of outlier ranks and, where values have them, of zero and scale.")
    outliers: Count = Field(description="Exact elements per group and token.")
    feedback: bool = Field(description="Whether codes are chosen with error feedback.")
    basis: bool = Field(description="Whether values are kept along axes of their own, without zero and scale.")
    mean_bits: float = Field(ge=0, le=8, description="Mean code width of the channels.")
    predicted_loss: float = Field(ge=0, description="Half of sum F (x - x^)^2 by nearest rounding, nats per token.")


class Friendliness(Record):
    """How one layer's tokens survive being stored, and what eviction should make of it.

    Relative errors are means of |x - x^| / |x| over sampled tokens; fields that are None are not written.
    """

    key_error: float = Field(ge=0, description="Mean over heads.")
    value_error: float = Field(ge=0, description="Mean over heads.")
    key_by_head: list[Annotated[float, Field(ge=0)]] | None = Field(default=None, description="Of each KV head.")
    value_by_head: list[Annotated[float, Field(ge=0)]] | None = Field(default=None, description="Of each KV head.")
    overlap: float | None = Field(
        default=None, ge=0, le=1, description="Share of heavy hitters that quantized keys find too."
    )
    alpha: float | None = Field(default=None, ge=0, le=1, description="Weight of attention in the eviction score.")
    share: float | None = Field(default=None, gt=0, description="The layer's token budget over the mean one.")


class LayerSpec(Record):
    """One quantized layer. Layers that are not listed keep the model's own cache."""

    index: Count
    key: TensorSpec
    value: TensorSpec
    friendliness: Friendliness | None = None
    sliding: Positive | None = Field(default=None, description="The layer's sliding window; None: it attends in full.")

    @model_validator(mode="after")
    def _keys_as_they_are(self) -> LayerSpec:
        if self.key.basis:
            raise ValueError(f"layers[{self.index}].key.basis is true, expected false: RoPE turns keys as they are")
        return self

    @model_validator(mode="after")
    def _one_error_per_head(self) -> LayerSpec:
        if self.friendliness is not None:
            for role, spec in (("key", self.key), ("value", self.value)):
                found = getattr(self.friendliness, f"{role}_by_head")
                if found is not None and len(found) != spec.kv_heads:
                    raise ValueError(
                        f"layers[{self.index}].friendliness.{role}_by_head has {len(found)} entries, expected one for "
                        f"each of the {spec.kv_heads} kv heads; build the artifact again"
                    )
        return self


class RuntimeDefaults(Record):
    """What a loader uses unless told otherwise."""

    sinks: int = Field(default=0, ge=0, le=MOST_SINKS, description="First real tokens of each row that stay exact.")
    recent: Count = Field(default=0, description="Last tokens that stay exact.")


class Budget(Record):
    """Effective bits of a long cache, every byte counted, without sinks, recent window and spare room."""

    asked: float = Field(gt=0, description="The budget that the widths were chosen for.")
    planned: float = Field(gt=0, description="What the chosen widths take.")


class Refined(Record):
    """That the codebooks were tuned by gradient after they had been fitted; see `kvcalib refine --help`."""

    steps: Positive = Field(description="Gradient steps behind these codebooks.")
    data: str = Field(description="Where the text came from, as the user named it.")
    fingerprint: Sha256 = Field(description="Of the token ids that were trained on.")
    held_out_fingerprint: Sha256 = Field(description="Of the token ids that the divergences were measured on.")
    kld_before: float = Field(gt=0, description="KL(unquantized || quantized) before, nats per token.")
    kld_after: float = Field(ge=0, description="The same after.")
    lr: float = Field(gt=0, description="Learning rate of the first step.")
    seed: Count


class TensorRecord(Record):
    """One tensor of `tensors.safetensors`."""

    dtype: Literal["float32", "int16", "uint8"]
    shape: list[Positive]
    sha256: Sha256 = Field(description="Of the tensor's bytes, little endian, row-major.")

    @classmethod
    def of(cls, tensor: Tensor) -> TensorRecord:
        """The record of `tensor`; ValidationError if it has no place in an artifact."""
        dtype = str(tensor.dtype).removeprefix("torch.")
        return cls.model_validate({"dtype": dtype, "shape": list(tensor.shape), "sha256": hash_tensor(tensor)})


class Manifest(Record):
    """`manifest.json`."""

    format: Literal["kvcalib-artifact"] = "kvcalib-artifact"
    format_version: Literal[4] = FORMAT_VERSION
    producer: Producer
    model: ModelIdentity
    calibration: Calibration
    fit: FitSettings
    runtime: RuntimeDefaults
    budget: Budget | None = Field(default=None, description="Absent if none was given. Informative.")
    refined: Refined | None = Field(default=None, description="Absent if they were not. Informative.")
    layers: list[LayerSpec]
    tensors: dict[str, TensorRecord]
    files: dict[str, Sha256] = Field(description="sha256 of the artifact's other files.")

    def encode(self) -> bytes:
        """The bytes of `manifest.json`: these fields and their digest, one way of writing them only."""
        unknown = {name for name in ("budget", "refined") if getattr(self, name) is None}
        body = self.model_dump(mode="json", exclude=unknown)
        for layer in body["layers"]:
            if layer["friendliness"] is not None:
                layer["friendliness"] = {n: v for n, v in layer["friendliness"].items() if v is not None}
        return _render({**body, "digest": hashlib.sha256(_render(body)).hexdigest()})

    @property
    def feedback(self) -> bool:
        """Whether any codes are chosen with error feedback."""
        return any(spec.feedback for layer in self.layers for spec in (layer.key, layer.value))

    @property
    def basis(self) -> bool:
        """Whether any values are kept in a basis of their own."""
        return any(layer.value.basis for layer in self.layers)

    @property
    def mean_bits(self) -> tuple[float, float]:
        """Mean code widths of all key and of all value channels."""
        sums = {"key": [0.0, 0], "value": [0.0, 0]}
        for layer in self.layers:
            for name, spec in (("key", layer.key), ("value", layer.value)):
                sums[name][0] += spec.mean_bits * spec.kv_heads * spec.head_dim
                sums[name][1] += spec.kv_heads * spec.head_dim
        key, value = (s / n if n else 0.0 for s, n in sums.values())
        return key, value


def decode(raw: bytes, body: dict[str, Any]) -> Manifest:
    """The manifest whose bytes are `raw`, parsed `body`.

    Raises:
        ValueError: it has too many lines or levels, is not written in the one way there is, or its digest is another's.
        ValidationError: a field is unknown, missing, of another type or out of its range.
    """
    lines = raw.count(b"\n")
    if lines > MOST_LINES:
        raise ValueError(f"it has {lines} lines, expected at most {MOST_LINES}")
    if not _fits(body, lines) or _render(body) != raw:
        raise ValueError("it is not written as a manifest is (sorted keys, one item a line, see docs/artifact.md)")
    rest = {name: value for name, value in body.items() if name != "digest"}
    if body.get("digest") != hashlib.sha256(_render(rest)).hexdigest():
        raise ValueError("its digest does not match its content")
    manifest = Manifest.model_validate(rest, strict=True)
    if manifest.encode() != raw:
        raise ValueError("an optional field is null that is left out where it is not known, or a float has no point")
    return manifest


def _fits(body: Any, lines: int) -> bool:
    """Whether `body` can be a manifest's by its number of items, one a line, and by its depth: a quick look."""
    level = [body]
    for _ in range(MOST_LEVELS):
        if (lines := lines - sum(len(value) for value in level)) < 0:
            return False
        items = (item for value in level for item in (value.values() if isinstance(value, dict) else value))
        level = [item for item in items if isinstance(item, dict | list)]
        if not level:
            return True
    return False


def _render(body: dict[str, Any]) -> bytes:
    return (json.dumps(body, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def schema() -> str:
    """JSON schema of `manifest.json`, as checked in under docs/."""
    described = Manifest.model_json_schema(mode="serialization")
    described["properties"]["digest"] = {
        "description": "sha256 of the manifest written without this field.", "pattern": _HEX, "type": "string",
    }  # fmt: skip
    described["required"] = [*described["required"], "digest"]
    return json.dumps(described, indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    print(schema(), end="")
