"""Can this model be tapped exactly? Asked of every model before it is calibrated or attached.

Two checks on a handful of random tokens, left-padded, prefill and then decode. First each attention module is replayed
with real and with identity angles: the rotation that takes the one's keys to the other's, bit by bit, is the layer's
(`Rotation.find`). Then the whole model runs with taps and an exact cache: its logits must equal the untouched model's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kvcalib.errors import UnsupportedModel
from kvcalib.model.loading import input_device
from kvcalib.model.rotary import Rotation, identical
from kvcalib.model.taps import base_implementation, find_attention, parameter_names


class _Recorder:
    """Stands in for a cache during a replay: keeps the keys it is given."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys = key
        return key, value


def attention_layers(model: PreTrainedModel) -> dict[int, int | None]:
    """Layers that keep keys and values of their own: index to sliding window, None where every token is kept.

    A window of n shows a query itself and the n - 1 tokens before it. Linear, chunked and shared layers are left out.
    """
    found: dict[int, int | None] = {}
    for index, layer in enumerate(DynamicCache(config=model.config.get_text_config(decoder=True)).layers):
        if type(layer) is DynamicLayer:
            found[index] = None
        elif type(layer) is DynamicSlidingWindowLayer:
            found[index] = int(layer.sliding_window)
    return found


def full_attention_layers(model: PreTrainedModel) -> list[int]:
    """Layers whose stock cache layer keeps every token (not sliding, chunked, linear or shared)."""
    return [index for index, window in attention_layers(model).items() if window is None]


def find_rotations(model: PreTrainedModel, layers: list[int]) -> dict[int, Rotation]:
    """The rotation of every layer in `layers`, found by replaying its attention module.

    Raises:
        UnsupportedModel: the angles are not a (cos, sin) pair, or no rotation of what reaches the cache reproduces
            the module's keys.
    """
    family = model.config.get_text_config(decoder=True).model_type
    modules = find_attention(model)
    missing = [layer for layer in layers if layer not in modules]
    if missing:
        raise UnsupportedModel(f"model_type {family!r}: layer {missing[0]} has no attention module that can be tapped")
    seen: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    handles = []
    for layer in layers:

        def remember(_: nn.Module, args: Any, kwargs: Any, layer: int = layer) -> None:
            seen[layer] = (args, kwargs)

        handles.append(modules[layer].register_forward_pre_hook(remember, with_kwargs=True))
    training = model.training
    original = model.config._attn_implementation
    try:
        model.eval()
        model.set_attn_implementation(base_implementation(model))
        with torch.no_grad():
            model(input_ids=_tokens(model, rows=1, length=7), use_cache=False)
        for handle in handles:
            handle.remove()
        return {layer: _replay(modules[layer], layer, family, *seen[layer]) for layer in layers}
    finally:
        for handle in handles:
            handle.remove()
        model.set_attn_implementation(original)
        model.train(training)


def _replay(module: nn.Module, layer: int, family: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Rotation:
    given = dict(zip(parameter_names(type(module)), args, strict=False)) | kwargs
    embeddings = given.get("position_embeddings")
    if not (isinstance(embeddings, tuple) and len(embeddings) == 2 and all(isinstance(e, Tensor) for e in embeddings)):
        raise UnsupportedModel(
            f"model_type {family!r}: layer {layer} gets its rotary angles as {type(embeddings).__name__}, not as a "
            "(cos, sin) pair of real tensors; complex rotary embeddings cannot be tapped"
        )
    cos, sin = embeddings
    keys = []
    with torch.no_grad():
        for pair in ((cos, sin), (torch.ones_like(cos), torch.zeros_like(sin))):
            recorder = _Recorder()
            module(**(given | {"position_embeddings": pair, "past_key_values": recorder}))
            if recorder.keys is None:
                raise UnsupportedModel(f"model_type {family!r}: layer {layer} does not put its keys into the cache")
            keys.append(recorder.keys)
    rotation = Rotation.find(module, keys[1], keys[0], cos, sin)
    if rotation is None:
        raise UnsupportedModel(
            f"model_type {family!r}: layer {layer}'s keys are not the rotation of what reaches the cache without "
            "rotation (a norm after RoPE?), so keys before RoPE cannot stand for them"
        )
    return rotation


def check_exact(model: PreTrainedModel, make_cache: Callable[[], Any], make_taps: Callable[[], Any]) -> None:
    """Compare logits with and without taps: left-padded prefill of 2 rows, then 2 decode steps.

    Args:
        make_cache: makes an exact cache for the tapped run.
        make_taps: taps the model and returns a context manager that undoes it.

    Raises:
        UnsupportedModel: a logit differs by even one bit.
    """
    training = model.training
    original = model.config._attn_implementation
    model.eval()
    try:
        model.set_attn_implementation(base_implementation(model))
        expected = _steps(model, None)
        with make_taps():
            found = _steps(model, make_cache())
    finally:
        model.set_attn_implementation(original)
        model.train(training)
    for step, (a, b) in enumerate(zip(expected, found, strict=True)):
        if not identical(a, b):
            worst = (a.float() - b.float()).abs().max().item()
            raise UnsupportedModel(
                f"model_type {model.config.get_text_config(decoder=True).model_type!r}: the self-test found logits "
                f"that differ by {worst:.3g} at step {step} between the tapped and the untouched model, expected "
                "identical bits; please report the model"
            )


def _steps(model: PreTrainedModel, cache: Any) -> list[Tensor]:
    ids = _tokens(model, rows=2, length=9)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    logits = []
    with torch.no_grad():
        for start, stop in ((0, 7), (7, 8), (8, 9)):
            seen = mask[:, :stop]
            positions = (seen.cumsum(-1) - 1).clamp(min=0)[:, start:stop]
            out = model(
                input_ids=ids[:, start:stop],
                attention_mask=seen,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
            cache = out.past_key_values
            # Pad positions attend to nothing; what a model computes there is never read.
            logits.append(out.logits[mask[:, start:stop].bool()])
    return logits


def _tokens(model: PreTrainedModel, rows: int, length: int) -> Tensor:
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(7)
    low = min(3, vocabulary - 1)
    ids = torch.randint(low, vocabulary, (rows, length), generator=generator)
    return ids.to(input_device(model))
