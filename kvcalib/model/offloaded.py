"""Weights that accelerate keeps in host memory or on disk: where they are, and their elements.

Such a parameter is an empty one on the device `meta`; a hook of its module puts the real one there for as long as the
module runs. What is asked of it in between is read here, from where the hook would take it.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

_M_MMAP_THRESHOLD = -3  # malloc.h
_BLOCK = 1 << 17


def give_back_memory() -> None:
    """Have the C library give freed blocks of 128 KiB and more back at once, from now on in this process.

    That is how glibc begins, but it takes to keeping blocks as large as those it has seen freed. Weights from disk come
    and go with every layer, and what is kept of them, in pieces, grows with the number of layers.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _BLOCK)


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


def places(model: nn.Module) -> dict[str, int]:
    """Bytes of weights by where they are: a device such as `cpu`, or `disk`.

    Raises:
        LookupError: as `elements`.
    """
    found: dict[str, int] = {}
    for name, parameter in parameters(model):
        place = str(parameter.device)
        if place == "meta":
            place = "cpu" if _source(model, name)[0] is not None else "disk"
        found[place] = found.get(place, 0) + parameter.numel() * parameter.element_size()
    return found


def elements(root: nn.Module, name: str, step: int = 1) -> Tensor:
    """Every `step`-th element of `root`'s parameter `name`, which may have dots, as `[n]` of its dtype.

    Of a file only what lies around these elements is read: it is mapped, and not loaded.

    Raises:
        LookupError: it is on `meta`, and no hook knows its values.
    """
    parameter = root.get_parameter(name)
    if parameter.device.type != "meta":
        return parameter.detach().reshape(-1)[::step]
    held, entry = _source(root, name)
    if held is not None:
        return _thinned(held, step, parameter.dtype)
    with safe_open(entry["safetensors_file"], framework="pt", device="cpu") as file:
        return _thinned(file.get_tensor(entry["weight_name"]), step, parameter.dtype)


def _thinned(x: Tensor, step: int, dtype: torch.dtype) -> Tensor:
    # A copy: the file's pages go when it is closed.
    return x.reshape(-1)[::step].clone().to(dtype)


def _source(root: nn.Module, name: str) -> tuple[Tensor | None, dict[str, str]]:
    """The weight where it is held in memory, else None and its file; the innermost hook that has it knows."""
    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        for hook in hooks(root.get_submodule(".".join(parts[:depth]))):
            weights = getattr(hook, "weights_map", None)
            key = getattr(weights, "prefix", "") + ".".join(parts[depth:])
            store: Any = getattr(weights, "dataset", weights)
            held = getattr(store, "state_dict", store)
            if held is not None and key in held:
                return held[key], {}
            if key in getattr(store, "index", {}):
                return None, store.index[key]
    raise LookupError(f"parameter {name!r} is on the device meta, and no hook says where its values are")
