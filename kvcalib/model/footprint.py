"""What a model takes in memory, from its config alone: no weight is read or made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig, AutoModelForCausalLM

from kvcalib.errors import InputError
from kvcalib.model.loading import resolve
from kvcalib.model.selftest import attention_layers


@dataclass(frozen=True)
class Footprint:
    """A model's size.

    Attributes:
        parameters: of all weights, tied ones counted once.
        context: the longest context that the config names, None if none.
        layers: layers with keys and values of their own: `(kv_heads, head_dim, sliding window or None)` by index.
    """

    parameters: int
    context: int | None
    layers: dict[int, tuple[int, int, int | None]]


def footprint(name: str, network: bool = True) -> Footprint:
    """The size of the causal LM `name`: a folder, `builtin`, or a Hub id.

    Args:
        network: whether the Hub may be asked for the config; if not, only one that is on this machine is read.

    Raises:
        InputError: there is no config that transformers knows.
    """
    try:
        where = resolve(name)
        if not network and not Path(where).is_dir():
            where = _cached(where)
        config: Any = AutoConfig.from_pretrained(where)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except InputError:
        raise
    except Exception as error:  # transformers, the Hub and validators have no common base
        line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(f"model {name!r}: no usable config ({line}); give the model's folder with --model") from error
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    longest = getattr(text, "max_position_embeddings", None)
    return Footprint(
        parameters=sum(p.numel() for p in model.parameters()),
        context=longest if isinstance(longest, int) else None,
        layers={index: (heads, head_dim, window) for index, window in attention_layers(model).items()},
    )


def _cached(name: str) -> str:
    """The folder in which the Hub's cache on this machine has the config of `name`."""
    found = try_to_load_from_cache(name, "config.json")
    if not isinstance(found, str):
        raise InputError(f"model {name!r}: its config is not on this machine; give the model's folder with --model")
    return str(Path(found).parent)
