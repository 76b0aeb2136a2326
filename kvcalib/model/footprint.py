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

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""What configs call the number of experts of a layer."""


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


@dataclass(frozen=True)
class Dimensions:
    """Sizes of a decoder that the time and memory of a pass follow from.

    Attributes:
        family: the config's model_type.
        parameters: of all weights. active: those of the matrix products that a token goes through.
        depth: layers, those without keys and values of their own too. layers: as `Footprint`.
        hidden: elements of a token between layers. inner: inside a layer's MLP, in all experts that it goes through.
        query_heads, head_dim: of an attention. vocabulary: rows of the output.
        stored: bytes of an element in the checkpoint, as the config says.
    """

    family: str
    parameters: int
    active: int
    depth: int
    layers: dict[int, tuple[int, int, int | None]]
    hidden: int
    inner: int
    query_heads: int
    head_dim: int
    vocabulary: int
    stored: int


def footprint(name: str, network: bool = True) -> Footprint:
    """The size of the causal LM `name`: a folder, `builtin`, or a Hub id.

    Args:
        network: whether the Hub may be asked for the config; if not, only one that is on this machine is read.

    Raises:
        InputError: there is no config that transformers knows.
    """
    config, model = _shell(name, network)
    longest = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return Footprint(
        parameters=sum(p.numel() for p in model.parameters()),
        context=longest if isinstance(longest, int) else None,
        layers=_layers(config, model),
    )


def dimensions(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Dimensions:
    """The sizes of the causal LM `name`: a folder, `builtin`, or a Hub id.

    Raises:
        InputError: there is no config that transformers knows.
    """
    config, model = _shell(name, True, revision, trust_remote_code)
    text = config.get_text_config(decoder=True)
    inner, experts, chosen = getattr(text, "intermediate_size", None) or 4 * text.hidden_size, 0, 0.0
    there = next((count for key in EXPERTS if (count := getattr(text, key, None))), 0)
    if there:
        taken = getattr(text, "num_experts_per_tok", None) or 1
        inner = taken * (getattr(text, "moe_intermediate_size", None) or inner)
        inner += getattr(text, "shared_expert_intermediate_size", None) or 0
        experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
        chosen = experts * taken / there
    table = model.get_input_embeddings().weight
    output = model.get_output_embeddings()
    total = sum(p.numel() for p in model.parameters())
    # Looking a token up costs nothing; a table that is the output's matrix too is met there.
    looked_up = 0 if output is not None and output.weight is table else table.numel()
    dtype = getattr(text, "dtype", None)
    layers = _layers(config, model)
    return Dimensions(
        family=text.model_type,
        parameters=total,
        active=round(total - looked_up - experts + chosen),
        depth=text.num_hidden_layers,
        layers=layers,
        hidden=text.hidden_size,
        inner=inner,
        query_heads=text.num_attention_heads,
        head_dim=next(iter(layers.values()))[1] if layers else text.hidden_size // text.num_attention_heads,
        vocabulary=text.vocab_size,
        stored=dtype.itemsize if isinstance(dtype, torch.dtype) else 2,
    )


def _shell(name: str, network: bool, revision: str | None = None, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """Config and model of `name`, the model's weights without any memory."""
    try:
        where = resolve(name)
        if not network and not Path(where).is_dir():
            where = _cached(where)
        given = {"trust_remote_code": trust_remote_code}
        config: Any = AutoConfig.from_pretrained(where, revision=revision, **given)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, **given)
    except InputError:
        raise
    except Exception as error:  # transformers, the Hub and validators have no common base
        line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(f"model {name!r}: no usable config ({line}); give the model's folder with --model") from error
    return config, model


def _layers(config: Any, model: Any) -> dict[int, tuple[int, int, int | None]]:
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return {index: (heads, head_dim, window) for index, window in attention_layers(model).items()}


def _cached(name: str) -> str:
    """The folder in which the Hub's cache on this machine has the config of `name`."""
    found = try_to_load_from_cache(name, "config.json")
    if not isinstance(found, str):
        raise InputError(f"model {name!r}: its config is not on this machine; give the model's folder with --model")
    return str(Path(found).parent)
