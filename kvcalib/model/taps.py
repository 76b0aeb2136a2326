"""Identity rotary: the one tap through which keys are seen, measured and cached before RoPE.

A pre-hook on every tapped attention module remembers `position_embeddings` and passes `(ones, zeros)` on, so queries
and keys reach `Cache.update` and the attention function un-rotated, after any k_norm, in the model's own layout. A
registered attention function hands them to a `Handler` (calibration, packed cache), which rotates them with the
module's own function. One mechanism for every family; `selftest.py` proves it exact on the model at hand.

    with Taps(model, handler):
        model(input_ids)

Shapes: query `[B, Hq, Q, D]`, key and value `[B, H, T, D]`, H kv heads. Several threads may run a tapped model at once,
each with a cache of its own: what belongs to a call is kept per thread, and let go when the forward pass ends.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvcalib.errors import UnsupportedModel
from kvcalib.model.angles import Angles
from kvcalib.model.rotary import RotaryCall, RotaryRecorder, Rotation

AttentionOutput = tuple[Tensor, Tensor | None]
BASES = ("sdpa", "eager")
_TAPPED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@dataclass
class Tap:
    """One tapped attention module, with what one call was given; a new one for each call."""

    module: nn.Module
    layer: int
    owner: Taps
    rotation: Rotation = field(default_factory=lambda: Rotation(None, "none"))
    rotary: RotaryCall | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None
    cache: Any = None
    mask: Tensor | None = None


@dataclass
class Call:
    """One attention call as a handler sees it: everything un-rotated."""

    tap: Tap
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float
    kwargs: dict[str, Any]

    def rotate_new(self, x: Tensor) -> Tensor:
        """Rotate queries or keys of the tokens now processed, `[B, *, Q, D]`."""
        assert self.tap.cos is not None
        assert self.tap.sin is not None
        return self.tap.rotation.apply(x, self.tap.cos, self.tap.sin)

    def rotate_at(self, x: Tensor, positions: Tensor, start: int = 0) -> Tensor:
        """Rotate cached keys `x [B, H, t, D]` that lie at `positions[:, start:start + t]`."""
        if self.tap.rotation.style == "none":
            return x
        assert self.tap.rotary is not None
        cos, sin = self.tap.owner.recorder.angles(self.tap.rotary, positions)
        part = slice(start, start + x.shape[2])
        return self.tap.rotation.apply(x, cos[:, part].to(x.device), sin[:, part].to(x.device))

    @property
    def angles(self) -> Angles | None:
        """The rotation as numbers, for kernels; None where it has none (see `Angles.of`)."""
        return self.tap.owner.angles(self.tap, self.key.shape[-1])

    def plain(self, query: Tensor, key: Tensor, value: Tensor) -> AttentionOutput:
        """The model's untouched attention on rotated `query` and `key`."""
        return self.tap.owner.base_attention(
            self.tap.module, query, key, value, self.mask, scaling=self.scaling, **self.kwargs
        )


class _Present(threading.local):
    """The call that is under way in this thread: from a module's pre-hook to its attention function."""

    tap: Tap | None = None


class _Switch(threading.local):
    """Whether this thread's passes are tapped."""

    on = True


_PRESENT = _Present()


class Handler(Protocol):
    """What happens at a tapped attention."""

    def attend(self, call: Call) -> AttentionOutput:
        """The attention output `[B, Q, Hq, D]` and, if asked for, the weights."""
        ...

    def before(self, tap: Tap) -> None:
        """Called before the module runs: mask, cache and angles of the call are known, keys are not."""
        ...


def find_attention(model: PreTrainedModel) -> dict[int, nn.Module]:
    """Attention modules by layer index: those that take `position_embeddings` and know their `layer_idx`.

    Raises:
        UnsupportedModel: there is none, or the keys are not kept per head (multi-head latent attention).
    """
    config = model.config.get_text_config(decoder=True)
    family = config.model_type
    if getattr(config, "kv_lora_rank", None):
        raise UnsupportedModel(
            f"model_type {family!r}: multi-head latent attention (kv_lora_rank={config.kv_lora_rank}) caches a latent "
            "vector and not keys and values per head; kvcalib needs keys and values per kv head"
        )
    found = {}
    for module in model.modules():
        if not hasattr(module, "layer_idx") or not isinstance(module.layer_idx, int):
            continue
        parameters = inspect.signature(module.forward).parameters
        if "position_embeddings" in parameters and "past_key_values" in parameters and hasattr(module, "config"):
            found[module.layer_idx] = module
    if not found:
        raise UnsupportedModel(
            f"model_type {family!r} ({type(model).__name__}): no attention module takes `position_embeddings` and "
            "`past_key_values`, so keys cannot be seen before RoPE; use a decoder model with rotary positions"
        )
    if not model._can_set_attn_implementation():
        raise UnsupportedModel(
            f"model_type {family!r} ({type(model).__name__}): its attention does not go through transformers' "
            "AttentionInterface, so it cannot be tapped"
        )
    return dict(sorted(found.items()))


class Taps:
    """Tap `layers` (default: all that attend in full) of `model` and give their attention calls to `handler`.

    A context manager; `remove()` restores the model. While a thread has entered `bypass()`, its passes run untouched.
    Nothing outside the model keeps it alive: who drops a tapped model needs no `remove()`.

    Raises:
        UnsupportedModel: see `find_attention`. RuntimeError: the model is tapped already.
    """

    def __init__(self, model: PreTrainedModel, handler: Handler, rotations: dict[int, Rotation]) -> None:
        self.model = model
        self.handler = handler
        self._switch = _Switch()
        self.recorder = RotaryRecorder(model)
        self._angles: dict[Any, Angles | None] = {}
        self.base = base_implementation(model)
        self._original = model.config._attn_implementation
        modules = find_attention(model)
        self.taps = {layer: Tap(modules[layer], layer, self, rotations[layer]) for layer in rotations}
        self._of = {tap.module: tap for tap in self.taps.values()}
        if any(module in _TAPPED for module in self._of):
            self._of.clear()
            self.recorder.remove()
            raise RuntimeError("the model is already tapped (attached?); call kvcalib.detach(model) first")
        # On the base model, which callers may run without its head.
        inner = model.base_model
        self._handles: list[Any] = [
            inner.register_forward_pre_hook(self._start, with_kwargs=True),
            inner.register_forward_hook(self._end, always_call=True),
        ]
        for module in self._of:
            _TAPPED.add(module)
            self._handles.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
        model.set_attn_implementation(implementation_name(self.base))

    def __enter__(self) -> Taps:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Take every hook off again and restore the attention implementation. Safe to call twice."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.recorder.remove()
        for module in self._of:
            _TAPPED.discard(module)
        if self.model.config._attn_implementation == implementation_name(self.base):
            self.model.set_attn_implementation(self._original)

    def __deepcopy__(self, memo: dict[int, Any]) -> Taps:
        raise RuntimeError("the model is tapped (attached?) and cannot be copied; call kvcalib.detach(model) first")

    @property
    def enabled(self) -> bool:
        """Whether this thread's passes are tapped."""
        return self._switch.on

    @contextlib.contextmanager
    def bypass(self) -> Iterator[None]:
        """Run the model, in this thread, as if it were not tapped."""
        before, self._switch.on = self._switch.on, False
        try:
            yield
        finally:
            self._switch.on = before

    def base_attention(self, module: nn.Module, *args: Any, **kwargs: Any) -> AttentionOutput:
        """The attention function that the model used before."""
        return base_function(self.base, module)(module, *args, **kwargs)

    def angles(self, tap: Tap, head_dim: int) -> Angles | None:
        """`Angles.of` the tap; found once for all layers that turn alike."""
        call = tap.rotary if tap.rotation.style != "none" else None
        where = None if call is None else (id(call.module), tuple(sorted(call.extra.items(), key=str)))
        key = (tap.rotation.function, tap.rotation.style, where, head_dim)
        if key not in self._angles:
            self._angles[key] = Angles.of(tap.rotation, call, head_dim)
        return self._angles[key]

    @torch.compiler.disable
    def _start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.recorder.start()

    @torch.compiler.disable
    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # After an error too. A cache or its angles, kept until the next pass, could be gigabytes.
        _PRESENT.tap = None
        self.recorder.finish()

    @torch.compiler.disable
    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        _PRESENT.tap = None
        if not self.enabled:
            return None
        given = dict(zip(parameter_names(type(module)), args, strict=False)) | kwargs
        embeddings = given.get("position_embeddings")
        tap = replace(self._of[module], cache=given.get("past_key_values"), mask=given.get("attention_mask"))
        if embeddings is not None:
            tap.cos, tap.sin = embeddings
            tap.rotary = self.recorder.match(tap.cos)
            given["position_embeddings"] = (torch.ones_like(tap.cos), torch.zeros_like(tap.sin))
        self.handler.before(tap)
        _PRESENT.tap = tap
        return (), given


def implementation_name(base: str) -> str:
    """The name under which our attention function is registered for a model that uses `base`."""
    return f"kvcalib_{base}"


def base_implementation(model: PreTrainedModel) -> str:
    """ "sdpa" or "eager": what runs for untapped layers and exact storage.

    flash and flex kernels take other masks; models loaded with them run on sdpa while tapped.
    """
    current = model.config._attn_implementation
    if current in BASES:
        return current
    return "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"


def base_function(base: str, module: nn.Module) -> Callable[..., AttentionOutput]:
    """transformers' function `base`; eager lives in the module's own file."""
    if base == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[base]


_PARAMETERS: dict[type, tuple[str, ...]] = {}


def parameter_names(kind: type) -> tuple[str, ...]:
    """Names of the arguments of `kind.forward`, in order."""
    if kind not in _PARAMETERS:
        _PARAMETERS[kind] = tuple(inspect.signature(kind.forward).parameters)[1:]  # type: ignore[attr-defined]
    return _PARAMETERS[kind]


def _attention_for(base: str) -> Any:
    """The function that transformers calls for every attention of a model that is tapped on `base`."""

    @torch.compiler.disable
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> AttentionOutput:
        tap, _PRESENT.tap = _PRESENT.tap, None
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        if tap is None or tap.module is not module:
            return base_function(base, module)(module, query, key, value, attention_mask, scaling=scale, **kwargs)
        return tap.owner.handler.attend(Call(tap, query, key, value, attention_mask, scale, kwargs))

    return attention


for _base, _mask in (("sdpa", sdpa_mask), ("eager", eager_mask)):
    AttentionInterface.register(implementation_name(_base), _attention_for(_base))
    # Without a mask function of the same name transformers passes no mask at all, and padding is silently lost.
    AttentionMaskInterface.register(implementation_name(_base), _mask)
