"""Which model is this? The fields that decide whether an artifact fits, and hashes of its weights.

Hard fields (shapes and family) must agree for an artifact to work at all. Soft fields (weights, rotary settings) may
differ on purpose, as after fine-tuning or context extension: that is worth a warning.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from kvcalib.model.offloaded import elements, parameters

HARD = ("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
SOFT = {"rope_parameters_sha256": "rotary settings", "weights_sha256": "weights"}
SAMPLES_PER_TENSOR = 256
Size = Annotated[int, Field(ge=1, le=(1 << 53) - 1)]
UNKNOWN_WEIGHTS = "unknown"


class ModelIdentity(BaseModel):
    """What is recorded of a model in calibration files and artifacts."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    name: str = Field(description="Folder name or Hub id the model was loaded from; informative only.")
    revision: str | None = Field(default=None, description="Commit of the Hub repository, if known.")
    model_type: str
    num_hidden_layers: Size
    hidden_size: Size
    num_attention_heads: Size
    vocab_size: Size
    rope_parameters_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    weights_sha256: str = Field(
        pattern=r"^([0-9a-f]{64}|unknown)$",
        description="Over every parameter's name, shape and up to 256 of its elements.",
    )

    def differences(self, other: ModelIdentity, fields: tuple[str, ...]) -> list[str]:
        """`field is X, expected Y` for each of `fields` in which `other` differs from this one."""
        return [
            f"{name} is {getattr(other, name)!r}, expected {getattr(self, name)!r}"
            for name in fields
            if getattr(self, name) != getattr(other, name)
            and UNKNOWN_WEIGHTS not in (getattr(self, name), getattr(other, name))
        ]


def identify(model: nn.Module) -> ModelIdentity:
    """The identity of a loaded transformers model."""
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    name = str(getattr(config, "_name_or_path", "") or type(model).__name__)
    return ModelIdentity(
        # A path says where it lay on one machine; its last part is what a reader recognises, anywhere.
        name=Path(name).resolve().name if Path(name).is_dir() else name,
        revision=getattr(config, "_commit_hash", None),
        model_type=text.model_type,
        num_hidden_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        num_attention_heads=text.num_attention_heads,
        vocab_size=text.vocab_size,
        rope_parameters_sha256=hash_json(getattr(text, "rope_parameters", None)),
        weights_sha256=hash_weights(model),
    )


def hash_weights(model: nn.Module) -> str:
    """sha256 over name, shape and evenly spaced elements (as float32) of every parameter, in name order.

    Loading a bfloat16 checkpoint as float32 does not change it, nor does it matter where weights live; fine-tuning
    changes it. `UNKNOWN_WEIGHTS` where there are none to read, as on the device `meta`.
    """
    digest = hashlib.sha256()
    for name, parameter in parameters(model):
        step = max(1, -(-parameter.numel() // SAMPLES_PER_TENSOR))
        try:
            sampled = elements(model, name, step)
        except LookupError:
            return UNKNOWN_WEIGHTS
        digest.update(f"{name} {list(parameter.shape)}".encode())
        digest.update(sampled.to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()


def hash_json(value: Any) -> str:
    """sha256 of `value` as canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
