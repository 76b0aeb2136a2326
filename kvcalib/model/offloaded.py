"""Weights that accelerate keeps in host memory or on disk: where they are, and their elements.

Such a parameter is an empty one on the device `meta`; a hook of its module puts the real one there for as long as the
module runs. What is asked of it in between is read here, from where the hook would take it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn


def hooks(module: nn.Module) -> Iterator[Any]:
    """accelerate's hooks of the module itself."""
    hook: Any = getattr(module, "_hf_hook", None)
    if hook is not None:
        yield from getattr(hook, "hooks", (hook,))


def is_offloaded(model: nn.Module) -> bool:
    """Whether some weights are only there while their module runs."""
    return any(parameter.device.type == "meta" for parameter in model.parameters())


def parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """All parameters in order of their names, tied ones once, under the name that comes first in the model.

    Offloading takes tied weights apart, and they are no longer the same object; transformers still knows of them.
    """
    if not is_offloaded(model):
        return sorted(model.named_parameters(), key=lambda named: named[0])
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    seen: set[str] = set()
    found = []
    for name, parameter in model.named_parameters():
        group = ties.get(name, name)
        if group not in seen:
            seen.add(group)
            found.append((name, parameter))
    return sorted(found, key=lambda named: named[0])


def elements(root: nn.Module, name: str, step: int = 1) -> Tensor:
    """Every `step`-th element of `root`'s parameter `name`, which may have dots, as `[n]` of its dtype.

    Of a weight in a checkpoint only the pages in which these elements lie are read.

    Raises:
        LookupError: it is on `meta`, and no hook knows its values.
    """
    parameter = root.get_parameter(name)
    if parameter.device.type != "meta":
        return parameter.detach().reshape(-1)[::step]
    weights, key = _source(root, name)
    entry = getattr(weights, "index", {}).get(key, {})
    path = entry.get("safetensors_file")
    if path is None or key in weights.state_dict:
        return _thinned(weights[key], step, parameter.dtype)
    with safe_open(path, framework="pt", device="cpu") as file:
        return _thinned(file.get_tensor(entry.get("weight_name", key)), step, parameter.dtype)


def _thinned(x: Tensor, step: int, dtype: torch.dtype) -> Tensor:
    # A copy: the file's pages go when it is closed.
    return x.reshape(-1)[::step].clone().to(dtype)


def _source(root: nn.Module, name: str) -> tuple[Any, str]:
    """accelerate's store of offloaded weights, and the weight's key in it; the innermost hook that has one knows."""
    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        for hook in hooks(root.get_submodule(".".join(parts[:depth]))):
            weights = getattr(hook, "weights_map", None)
            if weights is not None:
                key = getattr(weights, "prefix", "") + ".".join(parts[depth:])
                store = getattr(weights, "dataset", weights)
                if key in store:
                    return store, key
    raise LookupError(f"parameter {name!r} is on the device meta, and no hook says where its values are")
