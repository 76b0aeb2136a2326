"""Caches on disk: a prompt is quantized once and other processes go on from it.

One `.safetensors` file: the live rows of every layer (spare room is not written), positions, and as its one metadata
key the `Origin`, each layer's state and the sha256 of every tensor. A cache is worth nothing with another artifact or
other weights, so both are compared before anything is taken.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from kvcalib.errors import ArtifactMismatch, CorruptFile, UnsupportedModel
from kvcalib.files import hash_tensor, read_tensors, write_tensors
from kvcalib.model.identity import HARD, SOFT, ModelIdentity
from kvcalib.runtime.adaptive import AdaptiveLayer
from kvcalib.runtime.layers import PackedLayer, TapLayer

if TYPE_CHECKING:
    from kvcalib.runtime.cache import PackedCache

STOCK = ("DynamicLayer", "DynamicSlidingWindowLayer")


class Origin(BaseModel):
    """What a cache was made from; it continues only where all of this is the same."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    artifact: str = Field(description="Name of the artifact's folder; informative only.")
    artifact_sha256: str = Field(description="sha256 of the artifact's manifest.json.")
    model: ModelIdentity
    dtype: str = Field(description="Of the model's keys and values.")
    sinks: int
    recent: int
    eviction: str | None = Field(default=None, description="Settings of eviction, None without.")
    adaptive: str | None = Field(default=None, description="Adaptive widths, None without.")


class LayerState(BaseModel):
    """One layer of a saved cache."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["packed", "adaptive", "DynamicLayer", "DynamicSlidingWindowLayer", "empty"]
    seen: int = Field(ge=0)


class Header(BaseModel):
    """The metadata of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["kvcalib-cache"] = "kvcalib-cache"
    format_version: Literal[1] = 1
    origin: Origin
    layers: list[LayerState]
    sha256: dict[str, str]


class Place(NamedTuple):
    """Where a layer's tensors go, and the heads and channels of its keys and values."""

    device: torch.device
    kv_heads: int
    head_dim: int


def save(cache: PackedCache, path: Path) -> None:
    """Write `cache` to `path`, atomically.

    Raises:
        ValueError: the cache is empty, or was not made by `Artifact.new_cache`.
        UnsupportedModel: a layer's state cannot be saved. InputError: `path` cannot be written.
    """
    if cache.origin is None:
        raise ValueError("this cache has no origin; make it with artifact.new_cache(model) to save it")
    if not cache.get_seq_length():
        raise ValueError(f"{path}: the cache holds no tokens yet; run the prompt through the model first")
    tensors = {f"positions.{n}": t for n, t in cache.positions().items()}
    states = []
    for index, layer in enumerate(cache.layers):
        mine, state = _state(index, layer)
        states.append(state)
        tensors.update({f"layers.{index}.{name}": t for name, t in mine.items()})
    ready = {name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}
    header = Header(origin=cache.origin, layers=states, sha256={n: hash_tensor(t) for n, t in ready.items()})
    write_tensors(path, ready, header.model_dump(mode="json"))


def _state(index: int, layer: Any) -> tuple[dict[str, Tensor], LayerState]:
    if isinstance(layer, PackedLayer | AdaptiveLayer):
        return layer.live(), LayerState(kind=_kind(layer), seen=layer.seen)
    kind = _kind(layer)
    if kind not in STOCK:
        raise UnsupportedModel(f"layer {index} of the cache is a {kind}; only caches of {STOCK} can be saved yet")
    if not layer.is_initialized:
        return {}, LayerState(kind="empty", seen=0)
    held = stock_tensors(layer)
    if layer.is_sliding:
        # More than that is there while the layer records its past, and no later query sees it.
        held = {name: t[:, :, -(layer.sliding_window - 1) :] for name, t in held.items()}
    return held, LayerState(kind=kind, seen=layer.get_seq_length())


def _kind(layer: Any) -> Any:
    if isinstance(layer, PackedLayer):
        return "packed"
    return "adaptive" if isinstance(layer, AdaptiveLayer) else type(layer).__name__


def stock_tensors(layer: Any) -> dict[str, Tensor]:
    """Keys and values of one of transformers' own layers."""
    held = {name: getattr(layer, name, None) for name in ("keys", "values")}
    return {name: t for name, t in held.items() if isinstance(t, Tensor)}


def restore(cache: PackedCache, path: Path, places: dict[int, Place]) -> None:
    """Fill the empty `cache`, made for the artifact and model at hand, from `path`.

    Args:
        places: of every layer that keeps keys and values.

    Raises:
        ArtifactMismatch: the file is of another artifact, model or setting. CorruptFile: it is damaged or not ours.
        InputError: there is no such file.
    """
    tensors, note = read_tensors(path)
    try:
        header = Header.model_validate(note)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise CorruptFile(f"{path}: {field}: {first['msg']}; it is not a saved cache of this version") from None
    assert cache.origin is not None
    check_origin(path, header.origin, cache.origin)
    for name in sorted(set(tensors) ^ set(header.sha256)):
        where = "is not in the header" if name in tensors else "is missing"
        raise CorruptFile(f"{path}: tensor {name!r} {where}; copy or save the cache again")
    for name, tensor in tensors.items():
        if hash_tensor(tensor) != header.sha256[name]:
            raise CorruptFile(f"{path}: tensor {name!r} is not what was saved; copy or save the cache again")
    if len(header.layers) != len(cache.layers):
        raise CorruptFile(f"{path}: it has {len(header.layers)} layers, expected {len(cache.layers)}")
    try:
        for index, (layer, state) in enumerate(zip(cache.layers, header.layers, strict=True)):
            mine = {name: tensors.pop(name) for name in list(tensors) if name.startswith(f"layers.{index}.")}
            mine = {n.removeprefix(f"layers.{index}."): t for n, t in mine.items()}
            try:
                _restore_layer(layer, state, mine, places.get(index), header.origin)
            except ValueError as error:
                raise ValueError(f"layers[{index}]: {error}") from None
        _check_together(cache, header, tensors)
        if cache.in_order:
            cache.put_positions(tensors["positions.position"].to(places[cache.tapped[0]].device))
    except ValueError as error:
        cache.reset()
        raise CorruptFile(f"{path}: {error}; save the cache again") from None


def _check_together(cache: PackedCache, header: Header, rest: dict[str, Tensor]) -> None:
    """ValueError unless all layers hold the same rows and tokens, and nothing but positions is left of the file."""
    wanted = ["positions.position"] if cache.in_order else []
    if sorted(rest) != wanted:
        raise ValueError(f"beside layers it holds {sorted(rest)}, expected {wanted}")
    seen = {state.seen for state in header.layers if state.kind != "empty"}
    if len(seen) != 1:
        raise ValueError(f"its layers have seen {sorted(seen)} tokens, expected one number")
    layers: list[Any] = [cache.layers[i] for i, state in enumerate(header.layers) if state.kind != "empty"]
    batches = {x.batch if isinstance(x, TapLayer) else x.keys.shape[0] for x in layers}
    rows = [t.shape[0] for t in rest.values()]
    if len(batches) != 1 or any(n not in (1, *batches) for n in rows):
        raise ValueError(f"its layers are of {sorted(batches)} rows and its positions of {rows[0]}")


def check_origin(path: Path, saved: Origin, expected: Origin) -> None:
    """ArtifactMismatch, naming both sides, unless a cache saved from `saved` may go on in `expected`."""
    for difference in expected.model.differences(saved.model, (*HARD, *SOFT)):
        raise ArtifactMismatch(
            f"{path}: the cache was saved from model {saved.model.name!r}, this model is {expected.model.name!r}: "
            f"{difference}; run the prompt through this model and save it anew"
        )
    if saved.artifact_sha256 != expected.artifact_sha256:
        raise ArtifactMismatch(
            f"{path}: the cache was saved with artifact {saved.artifact!r} ({saved.artifact_sha256[:12]}), this is "
            f"{expected.artifact!r} ({expected.artifact_sha256[:12]}); load that artifact, or save the cache anew"
        )
    for name in ("dtype", "sinks", "recent", "eviction", "adaptive"):
        if getattr(saved, name) != getattr(expected, name):
            raise ArtifactMismatch(
                f"{path}: {name} was {getattr(saved, name)!r} when the cache was saved, expected "
                f"{getattr(expected, name)!r}; load the model and make the cache with the same {name}"
            )


def _restore_layer(
    layer: Any, state: LayerState, tensors: dict[str, Tensor], place: Place | None, origin: Origin
) -> None:
    kind = _kind(layer)
    if state.kind == "empty" and not isinstance(layer, TapLayer) and not tensors:
        return
    if state.kind != kind:
        raise ValueError(f"it was saved as {state.kind}, expected {kind}")
    if place is None:
        raise ValueError(f"it holds {sorted(tensors)}, but this layer keeps no keys and values")
    dtype = getattr(torch, origin.dtype)
    here = {n: t if ".host." in f".{n}" else t.to(place.device) for n, t in tensors.items()}
    if isinstance(layer, TapLayer):
        layer.revive(here, state.seen, dtype)
        return
    tokens = min(state.seen, layer.sliding_window - 1) if layer.is_sliding else state.seen
    if set(here) != {"keys", "values"}:
        raise ValueError(f"it holds {sorted(here)}, expected keys and values")
    for name, tensor in here.items():
        expected = (*here["keys"].shape[:1], place.kv_heads, tokens, place.head_dim)
        if tensor.shape != expected or tensor.dtype != dtype:
            raise ValueError(
                f"{name} are {tensor.dtype} {list(tensor.shape)}, expected {dtype} of {tokens} tokens, "
                f"{place.kv_heads} heads and {place.head_dim} channels"
            )
    layer.lazy_initialization(here["keys"], here["values"])
    layer.keys, layer.values = here["keys"], here["values"]
    if layer.is_sliding:
        layer.cumulative_length = state.seen
